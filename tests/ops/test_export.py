"""torch.export, make_fx and fake tensors: a program of torch's own operators that holds for every length."""

import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from darkformer import AttentionState, ConfigError, InputError, attention
from darkformer.ops.chunked import chunked, scan
from darkformer.ops.state import LOG_ZERO

from .cases import Case, Way, make_inputs, make_map, make_mask, make_state, needs_native, use_chunked

door_module = sys.modules["darkformer.ops.attention"]  # the package exports a function of this name
SIZES: dict[str, Any] = {"features": 3, "dim": 4, "value_dim": 3}
LENGTHS = ((2, 40), (3, 2), (1, 1), (1, 17), (2, 128), (2, 129), (2, 300))
STATE = tuple(f.name for f in fields(AttentionState))


class Door(nn.Module):
    """`attention` of q, k, v, a mask and a state's tensors, or None for either."""

    def __init__(self, case: Case, backend: str = "auto") -> None:
        super().__init__()
        self.feature_map = make_map(case).float()
        self.options: dict[str, Any] = dict(
            is_causal=case.mode != "bidirectional", softcap=case.softcap, backend=backend,
            return_state=case.mode == "warm",
        )  # fmt: skip

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, state: tuple[Tensor, ...] | None
    ) -> Any:
        before = None if state is None else AttentionState(*state)
        result = attention(
            query, key, value, self.feature_map, key_mask=mask, initial_state=before, **self.options
        )  # fmt: skip
        return (result[0], *(getattr(result[1], name) for name in STATE)) if isinstance(result, tuple) else (result,)


def arguments(case: Case, door: Door, batch: int, length: int) -> tuple[Any, ...]:
    here = replace(case, batch=batch, length=length)
    state = None
    if case.mode == "warm":
        made = make_state(here, door.feature_map, torch.float32)
        state = tuple(getattr(made, name) for name in STATE)
    return *make_inputs(here, dtype=torch.float32), make_mask(case.padding, batch, length), state


def exported(case: Case, door: Door) -> torch.export.ExportedProgram:
    batch, length = Dim("batch"), Dim("length")
    given = arguments(case, door, 2, 40)
    shapes = (
        *({0: batch, 2: length},) * 3,
        None if given[3] is None else {0: batch, 1: length},
        None if given[4] is None else tuple({0: batch} for _ in STATE),
    )
    return export(door, given, dynamic_shapes=shapes, strict=False)


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, wanted, strict=True):
        x, y = (z.masked_fill(z < LOG_ZERO / 2, 0) if z.is_floating_point() else z for z in (x, y))
        assert relative_error(x, y, floor=1.0) <= 1e-5


CASES = [
    Case(window=4, sinks=2, padding="interior", mode="warm", **SIZES),
    pytest.param(Case(window=0, padding="none", **SIZES), marks=(pytest.mark.slow, pytest.mark.full)),
    pytest.param(
        Case(window=4, sinks=1, method="local", padding="left", softcap=2.0, **SIZES),
        marks=(pytest.mark.slow, pytest.mark.full),
    ),
    Case(method="exact", padding="right", **SIZES),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_an_exported_program_holds_for_every_length(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK", 4)
    monkeypatch.setattr(scan, "DOUBLINGS", 5)  # enough for these lengths, and fewer nodes
    use_chunked(monkeypatch, chunk=4)
    check(case)


@pytest.mark.slow
@pytest.mark.full
@torch.no_grad()
def test_an_exported_bidirectional_program_in_full() -> None:
    check(Case(window=20, sinks=2, padding="interior", mode="bidirectional", **SIZES))


def check(case: Case) -> None:
    door = Door(case)
    program = exported(case, door)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not [x for x in targets if isinstance(x, torch._ops.OpOverload) and x.namespace != "aten"]
    run = program.module()
    for batch, length in LENGTHS:
        given = arguments(case, door, batch, length)
        close(run(*given), door(*given))


@needs_native
@torch.no_grad()
def test_a_forced_native_is_exported_as_its_operator() -> None:
    case = Case(window=4, sinks=2, padding="interior", **SIZES)
    door = Door(case, "native")
    program = exported(case, door)
    assert "darkformer.attention" in str(program.graph)
    for batch, length in LENGTHS:
        given = arguments(case, door, batch, length)
        close(program.module()(*given), door(*given))


@torch.no_grad()
def test_one_token_with_a_state_and_fixed_lengths() -> None:
    """A step of generation is exported by itself (the recurrent form); a fixed length needs no symbol."""
    case = Case(window=4, sinks=2, mode="warm", **SIZES)
    door = Door(case)
    for length, most in ((1, 320), (20, 1000)):
        given = arguments(case, door, 2, length)
        program = export(door, given, strict=False)
        close(program.module()(*given), door(*given))
        assert len(program.graph.nodes) < most


TRACED = [
    Case(length=1, **SIZES),
    Case(length=17, window=5, sinks=2, mode="warm", padding="left", **SIZES),
    Case(length=130, window=16, sinks=4, padding="interior", method="lfk", **SIZES),
    Case(length=130, window=40, sinks=1, mode="bidirectional", padding="right", **SIZES),
    Case(length=16, window=1, mode="bidirectional", method="performer", **SIZES),
    Case(length=140, sinks=1, mode="warm", padding="interior", method="random", **SIZES),
    Case(length=33, window=3, padding="left", method="constant", **SIZES),
]


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_what_a_trace_holds_is_the_reference_with_all_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = door_module.BACKENDS
    traced = backends["chunked"]._replace(function=lambda problem: chunked(problem._replace(traced=True)))
    monkeypatch.setitem(backends, "chunked", traced)
    assert not Way("chunked").wrong(case)
    wrong = backends["chunked"]._replace(  # negative control
        function=lambda problem: chunked(problem._replace(traced=True, scaling=1.01 * problem.scaling))
    )
    monkeypatch.setitem(backends, "chunked", wrong)
    assert case.method == "constant" or case.length == 1 or Way("chunked").wrong(case)


def test_large_logits_do_not_underflow() -> None:
    """Where `chunked` has to look at its normalisers and compute chunks again, a trace may not look."""
    case = Case(length=150, window=4, scale=40.0, **SIZES)
    made, inputs = make_map(case), make_inputs(case)
    problem, _ = door_module.problem_of(*inputs, made.parameters_for(torch.float64), scaling=4**-0.5)
    found, _ = chunked(problem._replace(traced=True))
    wanted = attention(*inputs, made, backend="reference")
    assert relative_error(found.flatten(1, 2), wanted) <= 1e-9


def test_make_fx_and_fake_tensors() -> None:
    """Symbolic traces with gradients; fake and meta tensors give shapes. What is kept for real calls stays real."""
    case = Case(window=4, sinks=1, padding="interior", **SIZES)
    door = Door(case)
    given = arguments(case, door, 2, 20)

    def gradient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query = query.detach().requires_grad_()
        return torch.autograd.grad(door(query, key, value, mask, None)[0].sin().sum(), query)[0]

    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(*given[:4])
    query, key, value = make_inputs(replace(case, length=20), dtype=torch.float32, seed=9)
    mask = make_mask("left", 2, 20)
    assert mask is not None
    close((graph(query, key, value, mask),), (gradient(query, key, value, mask),))
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(x) for x in given[:4]]
            assert door(*fake, None)[0].shape == (2, case.heads, 20, case.value_dim)
        after = door(*given)[0]
        assert type(after) is Tensor and bool(after.isfinite().all())
        meta = Door(case).to("meta")
        assert meta(*(x.to("meta") for x in given[:4]), None)[0].shape == after.shape


def test_what_a_trace_cannot_know_is_refused() -> None:
    case = Case(length=20, window=4, **SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, length=20, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        with pytest.raises(InputError, match="packed documents cannot be traced"):
            attention(*fake, made, documents=mode.from_tensor(torch.ones(2, 20, dtype=torch.long)))
        with pytest.raises(ConfigError, match="a trace cannot"):
            attention(*fake, made, backend="reference")


@pytest.mark.slow
@torch.no_grad()
def test_onnx(tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = Case(window=4, sinks=2, padding="interior", **SIZES)
    door = Door(case)
    batch, length = Dim("batch"), Dim("length")
    shapes = (*({0: batch, 2: length},) * 3, {0: batch, 1: length}, None)
    torch.onnx.export(door, arguments(case, door, 2, 40), dynamo=True, dynamic_shapes=shapes).save(tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for b, n in LENGTHS:
        given = arguments(case, door, b, n)[:4]
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        assert relative_error(torch.from_numpy(session.run(None, feed)[0]), door(*given, None)[0]) <= 1e-4
