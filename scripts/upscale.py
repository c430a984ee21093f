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

"""Enlarges photos: the command `flux-dino-tile` without installing it, from `flux_dino_tile/upscale.py`."""

import sys
from pathlib import Path


# The other scripts import this module for that.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flux_dino_tile.upscale import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main())
