"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples every time.

No test, and no process that one starts, asks the network: a name on a hub is one that cannot be reached.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the workers of pytest-xdist would otherwise fight for the cores
settings.register_profile("darkformer", deadline=None, derandomize=True, database=None)
settings.load_profile("darkformer")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
