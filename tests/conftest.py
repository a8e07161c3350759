"""Settings shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub client is imported

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None)
settings.load_profile("default")
