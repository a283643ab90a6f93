"""The fingerprint of weights that are no dense tensors, or lie elsewhere: quantized, in parts, offloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import PreTrainedModel

from darkformer import ConversionError, InputError, convert, load_cache, load_light, save_cache, save_light
from darkformer.hf.added import own_entries
from darkformer.hf.fingerprint import describe_base, digest
from hf.families import DARK, disturb, linear, logits, tiny, tokens

IDS = tokens(2, 40)


class Scaled(Tensor):
    """int8 numbers times one scale a row, known to torch as one tensor of floats; what it does is done dense."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket
        if name in (torch.ops.aten.detach, torch.ops.aten.clone):
            return Scaled(args[0].numbers.clone(), args[0].scale.clone())
        if name is torch.ops.aten.view:
            raise NotImplementedError("as torchao's do")
        dense = [x.numbers * x.scale if isinstance(x, Scaled) else x for x in args]
        return function(*dense, **(kwargs or {}))


def _in_parts(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Scaled(numbers, scale), requires_grad=False)
    return model


def _dynamic(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model: PreTrainedModel) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.fixture(params=[_in_parts, _dynamic, _torchao], ids=["in parts", "dynamic int8", "torchao"])
def quantize(request: pytest.FixtureRequest) -> Callable[[PreTrainedModel], PreTrainedModel]:
    return request.param


def _prompt(model: PreTrainedModel, file: Path) -> None:
    with torch.no_grad():
        save_cache(model(IDS, use_cache=True).past_key_values, model, file)


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights_are_told_apart(quantize: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    first, again, other, dense = (
        describe_base(m) for m in (quantize(tiny("llama")), quantize(tiny("llama")), quantize(tiny("llama", 1)),
                                   tiny("llama"))
    )  # fmt: skip
    assert first is not None and other is not None and dense is not None
    assert first == again
    assert len({x["fingerprint"] for x in (first, other, dense)}) == 3


@pytest.mark.filterwarnings("ignore")
def test_quantize_then_convert(quantize: Callable[[PreTrainedModel], PreTrainedModel], tmp_path: Path) -> None:
    model = disturb(convert(quantize(tiny("llama")), DARK))
    save_light(model, tmp_path)
    loaded = load_light(quantize(tiny("llama")), tmp_path)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    _prompt(model, tmp_path / "cache")
    load_cache(tmp_path / "cache", loaded)
    with pytest.raises(InputError, match="whose weights differ"):
        load_light(tiny("llama"), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_convert_then_quantize(quantize: Callable[[PreTrainedModel], PreTrainedModel], tmp_path: Path) -> None:
    model = quantize(linear("llama"))
    _prompt(model, tmp_path / "cache")
    load_cache(tmp_path / "cache", quantize(linear("llama")))
    with pytest.raises(InputError, match="its weights are others"):
        load_cache(tmp_path / "cache", linear("llama"))
    with pytest.raises(ConversionError, match="no longer those of"):  # it was converted from other weights
        save_light(model, tmp_path)


def test_a_changed_part_of_a_quantized_tensor_counts() -> None:
    numbers, scales = torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3])
    zeros = torch.zeros(3, dtype=torch.int64)
    tensors = [
        torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8),
        torch.quantize_per_tensor(numbers, 0.2, 0, torch.qint8),
        torch.quantize_per_channel(numbers, scales, zeros, 0, torch.qint8),
        torch.quantize_per_channel(numbers, 2 * scales, zeros, 0, torch.qint8),
    ]
    assert len({digest({"weight": x}) for x in tensors}) == len(tensors)
    assert len({digest({"packed": x}) for x in ((numbers, None), (numbers, scales), (numbers, torch.qint8))}) == 3
    assert digest({"state": {"b": object(), "a": numbers}}) == digest({"state": {"a": numbers.clone(), "b": object()}})


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_accelerate_keeps_them(where: str, tmp_path: Path) -> None:
    model = linear("llama")
    want, base = logits(model, IDS), describe_base(model)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert any(x.is_meta for x in own_entries(model).values())
    assert describe_base(model) == base
    save_light(model, tmp_path / "light")
    assert torch.equal(logits(load_light(tiny("llama"), tmp_path / "light"), IDS), want)


def test_weights_that_are_nowhere_have_no_fingerprint() -> None:
    assert describe_base(tiny("llama").to("meta")) is None


def test_a_single_number_with_a_stride() -> None:
    """The bias of one head, seen as a column, was refused; transfer's checkpoints hold such tensors."""
    column = torch.full((1, 8), 2.0)[:, 0]
    assert column.stride() == (8,) and digest({"x": column}) == digest({"x": torch.tensor([2.0])})
