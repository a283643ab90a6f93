"""The account of a step is what torch's operators read and write, and follows from the shape as it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dispatch_counter import DispatchCounter, counted_step
from transformers import AutoConfig, AutoModelForCausalLM

from darkformer import DarkConfig, InputError
from darkformer.cost import linear_attention_work, softmax_attention_work
from darkformer.ops import native
from darkformer.research.time.calibration import adamw, model_of
from darkformer.research.time.copies import (
    BACKWARD,
    FORWARD,
    LINEAR,
    PRODUCT,
    SOFTMAX,
    attention,
    forward_operations,
    step_operations,
    totals,
    training_bytes,
)
from darkformer.research.time.shape import Shape, llama_shape, shape_of

SHAPES = {
    "deep": llama_shape(4, 64, vocabulary=256, head_dim=16),
    "grouped heads": llama_shape(2, 96, vocabulary=512, head_dim=16, kv_heads=2),
    "large vocabulary": llama_shape(1, 64, vocabulary=4096, head_dim=32, kv_heads=1),
    "untied": replace(llama_shape(2, 64, vocabulary=512, head_dim=32), tied=False),
}


def moved(shape: Shape, batch: int, seq_len: int, config: DarkConfig | None, **options: bool) -> dict[str, float]:
    """Numbers that cross kernels, by phase."""
    rows = step_operations(shape, batch, seq_len, config, **options)
    phases = dict.fromkeys(row.phase for row in rows)
    return {phase: sum(row.read + row.written for row in rows if row.phase == phase) for phase in phases}


def seen(
    shape: Shape, batch: int, seq_len: int, config: DarkConfig | None, **options: bool
) -> dict[str, DispatchCounter]:
    model = model_of(shape, seq_len, config)
    optimizer = adamw(model, 1e-3)
    ids = torch.randint(5, shape.vocabulary, (batch, seq_len))
    counted_step(model, optimizer, ids, **options)  # the first step makes the optimizer's state
    return counted_step(model, optimizer, ids, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("size", [(2, 64), (1, 200)])
def test_softmax_steps_are_what_torch_does(shape: Shape, size: tuple[int, int]) -> None:
    counters = seen(shape, *size, None)
    for phase, expected in moved(shape, *size, None).items():
        assert counters[phase].copies == pytest.approx(expected, rel=0.05), phase
    rows = step_operations(shape, *size)
    for phase in (FORWARD, BACKWARD):  # products to the last number
        products = [row for row in rows if row.kind == PRODUCT and row.phase == phase]
        assert counters[phase].read["mm"] == sum(row.read for row in products)
        assert counters[phase].written["mm"] == sum(row.written for row in products)


@pytest.mark.skipif(bool(native.unavailable()), reason="needs the compiled attention")
@pytest.mark.parametrize(
    "config",
    [DarkConfig(num_features=32), DarkConfig.paper(16), DarkConfig(method="local", window=32),
     DarkConfig(num_features=16, keep_exact=("0.1", 1))],
    ids=["default", "paper", "local", "mixed"],
)  # fmt: skip
def test_steps_of_features_are_what_torch_does(config: DarkConfig) -> None:
    shape, size = SHAPES["grouped heads"], (2, 256)
    counters = seen(shape, *size, config)
    for phase, expected in moved(shape, *size, config).items():
        assert counters[phase].copies == pytest.approx(expected, rel=0.1), phase


@pytest.mark.parametrize("name", ["deep", "grouped heads"])
def test_autocast_adds_its_casts(name: str) -> None:
    shape, size = SHAPES[name], (2, 128)
    counters = seen(shape, *size, None, autocast=True)
    for phase, expected in moved(shape, *size, None, autocast=True).items():
        assert counters[phase].copies == pytest.approx(expected, rel=0.1), phase


def test_flops_are_six_a_weight_and_token() -> None:
    """Of the matrices: two forward, four backward; the embedding's table multiplies once, as logits."""
    shape = SHAPES["deep"]
    weights = shape.layers * shape.layer_weights + shape.vocabulary * shape.hidden
    assert totals(step_operations(shape, 2, 64)).product == 6 * weights * 128
    assert totals(forward_operations(shape, 2, 64)).product == 2 * weights * 128


def test_attention_is_counted_by_its_kind() -> None:
    shape, size = SHAPES["grouped heads"], (3, 512)
    heads = {"batch": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    softmax = totals(attention(shape, *size, None, 0))
    assert softmax.softmax == softmax_attention_work(512, **heads, backward=True).flops and not softmax.linear
    config = DarkConfig(num_features=32, window=60, sinks=4)
    linear = totals(attention(shape, *size, config, 0))
    work = linear_attention_work(512, **heads, num_features=32, window=64, backward=True)
    assert linear.linear == work.flops and not linear.softmax
    half = totals(attention(shape, *size, replace(config, keep_exact=("0.1",)), 0))
    assert half.softmax == softmax.softmax / 2 and half.linear == linear.linear / 2
    assert half.copies > (softmax.copies + linear.copies) / 2  # joining the heads is a copy
    sliding = replace(shape, sliding=(0,))
    assert totals(attention(sliding, *size, config, 0)) == softmax
    assert totals(attention(sliding, *size, replace(config, convert_sliding=True), 0)) == linear


def test_lengths_grow_as_they_should() -> None:
    """Twice the length: softmax's FLOPs four times, those of features twice, and copies in between."""
    shape, config = SHAPES["deep"], DarkConfig(num_features=16)
    for form, kind, ratio in ((None, SOFTMAX, 4), (config, LINEAR, 2)):
        one, two = (totals(attention(shape, 1, n, form, 0)) for n in (2048, 4096))
        assert getattr(two, kind) / getattr(one, kind) == pytest.approx(ratio, rel=0.01)


def test_memory_is_what_backward_keeps() -> None:
    shape, size = llama_shape(4, 64, vocabulary=512, head_dim=32), (4, 128)
    model = model_of(shape, 128)
    ids = torch.randint(5, 512, size)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        weights = sum(kept.pop(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
        assert weights
    logits = 4 * ids.numel() * shape.vocabulary
    expected = training_bytes(shape, *size) - 12 * shape.parameters - 2 * logits
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)
    del loss


# shapes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_shape_survives_its_configuration(shape: Shape) -> None:
    assert shape_of(shape.config(128), "x") == shape
    assert shape.parameters == sum(p.numel() for p in model_of(shape, 128).parameters())


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}, {"mlp_matrices": 2}),
        ("qwen3", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}, {"head_norms": True, "kv_heads": 2}),
        ("gemma3_text", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
                         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 100},
         {"norms": 4, "sliding": (0, 1, 2, 3, 4)}),
        ("phi3", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "vocab_size": 100, "pad_token_id": 0}, {"mlp_matrices": 3, "tied": False}),
    ],
)  # fmt: skip
def test_families(kind: str, values: dict, expected: dict) -> None:
    config = AutoConfig.for_model(kind, **values)
    shape = shape_of(config, kind)
    assert {name: getattr(shape, name) for name in expected} == expected
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_what_is_no_dense_decoder_is_refused() -> None:
    experts = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(InputError, match="experts"):
        shape_of(experts, "x")
    without_heads = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=100)
    with pytest.raises(InputError, match="num_attention_heads=None"):
        shape_of(without_heads, "x")
