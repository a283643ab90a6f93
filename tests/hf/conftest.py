"""Nothing here may look for a model on a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which the tests below do first

import pytest
from transformers import PreTrainedModel

from hf.families import CORE, tiny


@pytest.fixture(params=sorted(CORE))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A softmax model of each core family in turn; `test_families.py` has all of them."""
    return tiny(family)
