"""How a converted model's memory is divided into pages. Needs no vLLM."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from darkformer import ConversionError, DarkConfig
from darkformer.ops.slots import slot_words
from darkformer.vllm.layout import TOKENS, Layout, converted_layers, kinds_before, kinds_of, layout_of

ROOT = Path(__file__).parents[2]
#: SmolLM2-135M.
LAYERS, HEADS, DIM = 30, 3, 64


def described(config: DarkConfig, layers: range | list[int] = range(LAYERS), **changes: Any) -> SimpleNamespace:
    """A model's configuration as the plugin finds it, with these of its layers converted."""
    rows = [{"name": f"layers.{i}.self_attn", "layer": i, "slots": [i], "calls": 1, **changes} for i in layers]
    return SimpleNamespace(
        num_hidden_layers=LAYERS, darkformer_saved=config.to_dict(), darkformer_saved_layers=rows, layer_types=None
    )


def lay_out(text_config: SimpleNamespace, dtype: torch.dtype = torch.bfloat16) -> Layout:
    return layout_of(text_config, dtype=dtype, cache_dtype=dtype, num_kv_heads=HEADS, head_dim=DIM)


def bytes_after(layout: Layout, tokens: int) -> int:
    """Bytes of a request in vLLM, without what its grouping of layers adds."""
    pages = 1 + max(place.page for place in layout.places.values())
    attentions = sum(len(layer.exact) for layer in layout.layers.values()) // (layout.together or 1)
    blocks = 0 if layout.block is None else attentions * math.ceil(tokens / layout.block)
    return (pages + blocks) * layout.page


def frontier(name: str) -> DarkConfig:
    rows = json.loads((ROOT / "benchmarks" / "records" / "frontier-smollm2.json").read_text())["rows"]
    return DarkConfig.from_dict(next(row["config"] for row in rows if row["name"] == name))


def test_bytes_of_a_request_after_8k_tokens() -> None:
    softmax = 8192 * LAYERS * HEADS * 2 * DIM * 2
    assert softmax >= 40 * bytes_after(lay_out(described(DarkConfig())), 8192)
    assert softmax >= 8 * bytes_after(lay_out(described(frontier("budget-10"))), 8192)


@pytest.mark.parametrize(
    "config",
    [
        DarkConfig(),
        frontier("budget-10"),
        DarkConfig(keep_exact=(1, "2.0"), no_features=(5, "6.1"), layer_windows=((3, 512), (7, 16))),
        DarkConfig(method="local", window=300),
        DarkConfig.paper(),
    ],
    ids=["default", "budget-10", "mixed", "local", "paper"],
)
@pytest.mark.parametrize("layers", [range(LAYERS), [0, 3, 7, 8]], ids=["all", "some"])
def test_every_state_has_a_place_of_its_own(config: DarkConfig, layers: Any) -> None:
    layout = lay_out(described(config, layers))
    used: dict[int, list[tuple[int, int]]] = {}
    for layer in layout.layers.values():
        heads = [head for _, part in layer.parts for head in part]
        assert sorted([*heads, *layer.exact]) == list(range(HEADS))
        for number, (own, part) in enumerate(layer.parts):
            place = layout.places[layer.index, number]
            words = slot_words(own, num_kv_heads=len(part), head_dim=DIM, dtype=torch.bfloat16)
            assert own.window == config.window_of(layer.number)
            used.setdefault(place.page, []).append((place.begin, place.begin + words))
    assert sorted(used) == list(range(len(used)))
    for spans in used.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert 4 * spans[-1][1] <= layout.page
    if layout.block is not None:
        assert layout.block % TOKENS == 0
        widest = HEADS if len(layers) < LAYERS else layout.together
        assert layout.page == layout.block * widest * 2 * DIM * 2


def test_layers_are_called_by_what_they_keep() -> None:
    layers = converted_layers(described(DarkConfig(keep_exact=(1, "2.0")), [0, 1, 2]), HEADS)
    kinds = kinds_of(layers, ["full_attention"] * 3 + ["sliding_attention"])
    assert kinds == ["linear_attention", "full_attention", "linear_attention", "sliding_attention"]


def test_a_folder_of_the_first_version_is_read_by_its_layer_types() -> None:
    config = described(DarkConfig())
    config.darkformer_saved_layers, config.layer_types = None, ["full_attention", "sliding_attention"] * (LAYERS // 2)
    assert sorted(converted_layers(config, HEADS)) == list(range(0, LAYERS, 2))
    # vLLM's names in their place, as the settings leave them.
    config.darkformer_layer_types, config.layer_types = config.layer_types, ["linear_attention", "sliding_attention"]
    assert sorted(converted_layers(config, HEADS)) == list(range(0, LAYERS, 2))


@pytest.mark.parametrize("kind", ["conv", "linear_attention", "chunked_attention"])
def test_layers_that_keep_something_else_are_refused(kind: str) -> None:
    config = described(DarkConfig())
    config.model_type, config.layer_types = "odd", ["full_attention", kind] * (LAYERS // 2)
    with pytest.raises(ConversionError, match=f"odd has layers of the kinds .*{kind}"):
        kinds_before(config)


def test_models_of_other_mixers_are_refused() -> None:
    class Mixed(SimpleNamespace):
        layers_block_type = property(lambda _: ["mamba", "attention"])

    with pytest.raises(ConversionError, match="layers of the kinds attention, mamba"):
        kinds_before(Mixed(model_type="odd"))


@pytest.mark.parametrize("changes", [{"calls": 2}, {"slots": [0, 1]}], ids=["twice", "shared"])
def test_what_one_layer_of_vllm_cannot_stand_for_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match="attends more than once"):
        lay_out(described(DarkConfig(), [0], **changes))


def test_a_model_of_softmax_heads_alone_is_refused() -> None:
    with pytest.raises(ConversionError, match="every head of this model computes softmax"):
        lay_out(described(DarkConfig(keep_exact=tuple(range(LAYERS)))))
