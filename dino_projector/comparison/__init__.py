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

"""What DINO adds, on a person's own pictures: enlargements by many settings, numbers about them, and a report."""

# What `--ablate` tries instead of the defaults, one at a time.
ABLATIONS: dict[str, tuple[str, tuple]] = {
    "overlap": ("tile_overlap", (32, 64, 128)),
    "color-fix": ("color_fix", (None, "wavelet", "adain")),
    "vae-residual": ("vae_residual", (False, True)),
    "window": ("window", ("cosine", "linear", "box")),
}
