"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples every time."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the workers of pytest-xdist would otherwise fight for the cores
settings.register_profile("darkformer", deadline=None, derandomize=True, database=None)
settings.load_profile("darkformer")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
