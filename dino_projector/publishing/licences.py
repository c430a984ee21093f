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

"""Which licence a projector takes over from the models that it was trained with."""

from collections.abc import Sequence
from typing import NamedTuple


class Licence(NamedTuple):
    """`id`, `name` and `link` are the model card's `license`, `license_name` and `license_link`."""

    id: str
    title: str
    name: str | None = None
    link: str | None = None


APACHE = Licence("apache-2.0", "Apache-2.0")
FLUX_DEV = Licence(
    "other",
    "FLUX.1 [dev] Non-Commercial License",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)
DINOV3 = Licence(
    "other", "DINOv3 License", "dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
)

# Section 3 of that licence asks for the first two paragraphs in these words, and for what the last one says.
FLUX_DEV_NOTICE = """\
The FLUX.1 [dev] Model is licensed by Black Forest Labs. Inc. under the FLUX.1 [dev] Non-Commercial License. \
Copyright Black Forest Labs. Inc.

IN NO EVENT SHALL BLACK FOREST LABS, INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION \
OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL.

This repository holds a projector that was trained with the FLUX.1 [dev] Model and is a modified work based on it. \
It is no product of Black Forest Labs, Inc. and not endorsed by it. Any rights to use the FLUX.1 [dev] Model and its \
derivatives are granted directly by Black Forest Labs, Inc. under that licence, a copy of which is in LICENSE.md.
"""


def model_licence(name: str) -> Licence | None:
    """Of a model that a projector can be trained with, by its name on the Hub; `None` if it is not known here."""
    owner, _, model = name.lower().partition("/")
    if owner == "black-forest-labs" and model == "flux.1-schnell":
        return APACHE
    # FLUX.1-Redux-dev and the other models of that family are under the licence of FLUX.1-dev.
    if owner == "black-forest-labs" and model.startswith("flux.1-") and model.endswith("-dev"):
        return FLUX_DEV
    if owner == "facebook" and model.startswith("dinov3"):
        return DINOV3
    if owner == "facebook" and model.startswith("dinov2"):
        return APACHE
    return None


def choose_licence(licences: Sequence[Licence | None]) -> Licence | None:
    """The strictest of the models' licences; `None` if one of them is not known."""
    for strict in (FLUX_DEV, DINOV3):
        if strict in licences:
            return strict
    return None if None in licences or not licences else APACHE
