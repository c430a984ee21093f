"""Settings for all tests."""

import os

import torch
from hypothesis import settings


# The models are tiny: threads cost more than they give, above all with several test processes.
torch.set_num_threads(1)

# A fixed choice of examples on every machine; set HYPOTHESIS_PROFILE=explore to look for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
