# Copyright 2026 The flux-dino-tile authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The small checkpoint that comes with the project: a whole pipeline with its projector."""

from pathlib import Path


DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
# What the programs call it, so that no path of a user's disk gets into pictures and reports.
EMBEDDED = "embedded"


def locate_model(name: str) -> str:
    """The folder of the embedded checkpoint for its name; any other name is a folder or Hub repository as it is."""
    return str(DEMO_FOLDER) if name == EMBEDDED else name
