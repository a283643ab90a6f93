"""`torch.compile` computes what eager does. The attention function stays outside the graph, one break a layer.

What differs from family to family is how torch traces the model's Python around that function, so every row is traced
(`backend="eager"`, and the same graphs run as they are). Code generation is torch's own and takes 15 seconds a row.
`make test` has some rows of both, `pytest -m full` all of them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import STREAM, relative_error
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import dark_layers
from hf.families import FAMILIES, left_mask, linear, logits, tokens

#: One of each kind: mixed heads, sliding layers, learned positions, two norms and soft caps, an encoder.
TRACED = ["llama-mixed", "gemma3", "gpt2", "gemma2-mixed", "modernbert"]
#: The row that compiles fastest; rotary embeddings take longer.
GENERATED = ["gpt2"]


def _rows(some: list[str]) -> list[Any]:
    """Every family, those that are not among `some` in the full form only."""
    return [name if name in some else pytest.param(name, marks=pytest.mark.full) for name in sorted(FAMILIES)]


IDS, MASK = tokens(2, 24), left_mask([0, 5], 24)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _compared(name: str, backend: str) -> float:
    model = linear(name)
    wanted = logits(model, IDS, MASK)
    compiled = torch.compile(model, backend=backend)
    found = logits(compiled, IDS, MASK)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] >= len(FAMILIES[name].layers), frames  # something was compiled, not skipped
    with torch.no_grad():  # control: the compiled model has the features in it, and not a copy of what they were
        next(dark_layers(model)).projection.mul_(1.5)
    assert relative_error(logits(compiled, IDS, MASK), wanted) > 1e-3
    return relative_error(found, wanted)


@pytest.mark.parametrize("name", _rows(TRACED))
def test_every_family_is_traced(name: str) -> None:
    assert _compared(name, "eager") <= STREAM


@pytest.mark.slow
@pytest.mark.parametrize("name", _rows(GENERATED))
def test_generated_code_is_eager(name: str) -> None:
    assert _compared(name, "inductor") <= STREAM


def test_generation_through_a_compiled_forward() -> None:
    # The mixin's test_generate_compilation_all_outputs.
    model, ids, mask = linear("llama"), tokens(2, 9), left_mask([0, 4], 9)
    options = dict(
        attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True,
    )  # fmt: skip
    wanted = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, wanted.sequences) and len(found.hidden_states) == 4
    assert relative_error(torch.stack(found.logits), torch.stack(wanted.logits)) <= STREAM


def _gradients(model: PreTrainedModel, run: object) -> dict[str, Tensor]:
    run(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()  # type: ignore[operator]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def test_gradients_through_a_compiled_model() -> None:
    model = linear("llama").train()
    wanted = _gradients(model, model)
    found = _gradients(model, torch.compile(model, backend="aot_eager"))
    assert found.keys() == wanted.keys() and sum(".dark." in name for name in found) >= 6
    assert max(relative_error(found[name], wanted[name], 1e-6) for name in wanted) <= STREAM
