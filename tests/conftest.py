"""Settings for all tests."""

import os


# The models are tiny: threads cost more than they give, above all with several test processes. Those that tests start
# read it from the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings


torch.set_num_threads(1)

# A fixed choice of examples on every machine; set HYPOTHESIS_PROFILE=explore to look for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
