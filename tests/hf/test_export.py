"""`torch.export` of a whole converted model, with and without a cache, and what ONNX makes of it."""

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import STREAM, relative_error
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from darkformer import AttentionState, convert
from darkformer.hf.layers import converted_modules
from darkformer.hf.saved_cache import cache_of
from hf.families import DARK, Whole, disturb, left_mask, linear, logits, positions, tiny, tokens

FIELDS = [f.name for f in dataclasses.fields(AttentionState)]
LENGTH = torch.export.Dim("length", min=2, max=4096)
#: Sums behind single tokens are rescaled at other tokens than those of a whole sequence.
STEPPED = 10 * STREAM


class WithStates(nn.Module):
    """Some tokens after a state of every layer: their logits, and the states after them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.slots = [m.layer_idx for m in converted_modules(model)]

    def forward(self, ids: Tensor, place: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        size = len(FIELDS)
        held = {
            slot: AttentionState(**dict(zip(FIELDS, states[i * size : (i + 1) * size], strict=True)))
            for i, slot in enumerate(self.slots)
        }
        cache = cache_of(self.model, held, seen=1)
        output = self.model(ids, position_ids=place, past_key_values=cache, use_cache=True)
        return output.logits, tensors_of(cache, self.slots)


def tensors_of(cache: Any, slots: list[int]) -> list[Tensor]:
    return [getattr(cache.layers[slot].state, name) for slot in slots for name in FIELDS]


def one_layer() -> PreTrainedModel:
    """Symbols for lengths take torch some ten seconds a layer."""
    config = copy.deepcopy(tiny("llama").config)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return disturb(convert(LlamaForCausalLM(config).eval(), DARK))


@pytest.mark.slow
@pytest.mark.full
@torch.no_grad()
def test_any_length() -> None:
    """The short form is the program in docs/export.md, which a test runs."""
    model, ids, mask = one_layer(), tokens(2, 24), left_mask([0, 5], 24)
    shapes = ({1: LENGTH}, {1: LENGTH})
    program = torch.export.export(Whole(model), (ids, mask), dynamic_shapes=shapes, strict=False).module()
    for length in (3, 24, 90):
        ids, mask = tokens(2, length), left_mask([0, length // 3], length)
        real = mask.bool()
        wanted = logits(model, ids, mask)[real]
        assert relative_error(program(ids, mask)[real], wanted) <= STREAM


@torch.no_grad()
def test_single_tokens_after_a_state() -> None:
    model, ids = linear("llama"), tokens(2, 24)
    whole, place = logits(model, ids), positions(torch.ones_like(ids))
    wrapper = WithStates(model)
    states = tensors_of(model(ids[:, :10], use_cache=True).past_key_values, wrapper.slots)
    example = (ids[:, 10:11], place[:, 10:11], states)
    program = torch.export.export(wrapper, example, strict=False).module()
    for t in range(10, 24):
        found, states = program(ids[:, t : t + 1], place[:, t : t + 1], states)
        assert relative_error(found, whole[:, t : t + 1]) <= STEPPED


@torch.no_grad()
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
def test_onnx(tmp_path: Path) -> None:
    import onnxruntime

    model, ids, mask = one_layer(), tokens(2, 24), left_mask([0, 5], 24)
    file = tmp_path / "model.onnx"
    shapes = ({1: LENGTH}, {1: LENGTH})
    torch.onnx.export(Whole(model), (ids, mask), str(file), dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(file))
    names = [x.name for x in session.get_inputs()]
    for length in (7, 24, 50):
        ids, mask = tokens(2, length), left_mask([0, 3], length)
        (found,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        real = mask.bool()
        assert relative_error(torch.from_numpy(found)[real], logits(model, ids, mask)[real]) <= 1e-4
