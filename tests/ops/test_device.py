"""No backend of plain torch makes a tensor anywhere but on its inputs' device, so a GPU gets them as they are."""

import pytest
import torch

from darkformer import attention

from .cases import Case, Way, make_inputs, make_map, make_mask, make_state
from .test_assembled import install

CASES = [
    Case(length=70, window=5, sinks=2, padding="left", mode="warm"),
    Case(length=70, window=5, sinks=2, padding="interior", mode="bidirectional", softcap=0.7),
    Case(length=70, method="random", window=3),
    Case(length=70, scale=30.0),  # chunks that underflow
    Case(length=1, window=2, sinks=2, mode="warm"),
    Case(length=9, method="exact", padding="left", mode="warm"),
]


def backends(case: Case) -> list[str]:
    if case.method == "exact":
        return ["exact"]
    return ["chunked", "reference", *(["recurrent"] if case.length == 1 else []),
            *(["assembled"] if case.mode != "bidirectional" else [])]  # fmt: skip


@pytest.mark.parametrize(("case", "way"), [(case, Way(name)) for case in CASES for name in backends(case)], ids=str)
def test_every_tensor_is_on_the_inputs_device(case: Case, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another default device a tensor made without naming one would be there, and the numbers would be gone."""
    install(monkeypatch)
    made, inputs = make_map(case), [x.requires_grad_() for x in make_inputs(case)]
    state = make_state(case, made) if case.mode == "warm" else None
    causal, mask = case.mode != "bidirectional", make_mask(case.padding, case.batch, case.length)
    found = []
    for default in ("cpu", "meta"):
        made.zero_grad()
        for x in inputs:
            x.grad = None
        with torch.device(default):
            output = attention(
                *inputs, made, key_mask=mask, initial_state=state, is_causal=causal, softcap=case.softcap,
                backend=way.backend,
            )  # fmt: skip
            output.square().sum().backward()
        found.append([output.detach(), *(x.grad for x in inputs)])
    assert all(x.device.type == "cpu" and torch.equal(x, y) for x, y in zip(*found, strict=True))
