"""The compiled backend beyond parity: threads, limits, scratch memory, `torch.library`."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import AGAINST_FLOAT64, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from darkformer import AttentionState, ConfigError, DarkConfig, NonFiniteError, attention, feature_map
from darkformer.ops import native
from darkformer.ops.attention import BACKENDS, problem_of
from darkformer.ops.native import load
from darkformer.ops.native.build import usable
from darkformer.ops.native.maps import folds, pack

from .cases import NATIVE, ODD_SIZES, Case, make_inputs, make_map, needs_native, solve
from .test_linear import elements
from .test_recurrent import state_errors, stream

pytestmark = needs_native
ERROR = AGAINST_FLOAT64[torch.float32]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=700, heads=2, kv_heads=1, batch=1, window=16, sinks=4, mode="warm", **ODD_SIZES),
        Case(length=600, heads=3, kv_heads=3, batch=1, window=100, **ODD_SIZES),
        Case(length=530, heads=2, kv_heads=1, batch=3, padding="left", **ODD_SIZES),
    ],
    ids=str,
)
def test_segments(case: Case, count: int) -> None:
    """Pairs of (batch row, kv head) that the threads do not divide are cut along the sequence."""
    with threads(count):
        assert not NATIVE.wrong(case)
        again = solve(case, "native", dtype=torch.float32).tensors
        for name, tensor in solve(case, "native", dtype=torch.float32).tensors.items():
            assert torch.equal(tensor, again[name]), name  # the order of additions is fixed


@pytest.mark.parametrize(
    "case",
    [
        Case(length=150, window=16, sinks=4, mode="warm", **ODD_SIZES),
        Case(length=150, tied=False, dim=32, features=24),
        Case(length=70, heads=2, kv_heads=1, window=20, dim=64, value_dim=64, features=40),
        Case(length=70, method="performer", dim=32),
        Case(length=70, method="lfk", proposal="isotropic", **ODD_SIZES),
    ],
    ids=str,
)
def test_long_calls_multiply_by_a_triangle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of the norm is turned until it is triangular; outputs, states and every gradient stay what they are."""
    monkeypatch.setattr("darkformer.ops.native.maps.TRIANGULAR_TOKENS", 1)
    monkeypatch.setattr("darkformer.ops.native.maps.ORTHOGONAL", 0.0)  # else the norm needs no product at all
    made = make_map(case).float()
    maps = pack(made.parameters_for(torch.float32), case.kv_heads, case.dim, 0.5, tokens=1)
    for w in (maps.map_q, maps.map_k):
        assert not w[:, case.features :].tril(-1).any()
    assert not NATIVE.wrong(case)


FOLDED = dict(dim=24, features=40, value_dim=20)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=150, window=16, sinks=4, mode="warm", **FOLDED),
        Case(length=150, tied=False, heads=2, kv_heads=1, batch=1, **FOLDED),
        Case(length=70, window=20, padding="left", dim=16, value_dim=16, features=16),
        Case(length=150, method="performer", **FOLDED),
        Case(length=150, scale=2.0, dim=64, value_dim=64, features=128, heads=2, kv_heads=1, batch=1),
    ],
    ids=str,
)
def test_orthogonal_draws_hold_the_norm(case: Case, count: int) -> None:
    """The norm is taken from the first log-features; outputs, states and every gradient stay what they are."""
    parameters = make_map(case).float().parameters_for(torch.float32)
    assert pack(parameters, case.kv_heads, case.dim, 0.5, tokens=1).fold_q.shape[1] == 3
    with threads(count):
        assert not NATIVE.wrong(case)


def test_only_orthogonal_draws_hold_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkformer.ops.native.maps.ORTHOGONAL_TOKENS", 1)

    def folded(case: Case) -> bool:
        return folds(make_map(case).float().parameters_for(torch.float32), case.dim, 1)

    case = Case(length=70, **FOLDED)
    assert folded(case)
    for other in (
        replace(case, draw="iid"), replace(case, draw="simplex"), replace(case, features=23),
        replace(case, method="lfk"), replace(case, proposal="optimal"),
    ):  # fmt: skip
        assert not folded(other), other
        assert not NATIVE.wrong(other)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    made.projection.data[0, 1] += 0.01  # no version counter tells
    assert not folds(made.parameters_for(torch.float32), case.dim, 1)
    want = attention(*inputs, made, backend="reference")
    assert relative_error(attention(*inputs, made, backend="native"), want) <= ERROR


@pytest.mark.parametrize("window", [0, 1, 16, 100])
def test_any_split_of_a_stream(window: int) -> None:
    case = Case(length=200, window=window, sinks=4, padding="none", **ODD_SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    want, want_state = attention(*inputs, made, return_state=True, backend="reference")
    for pieces in ([200], [3, 64, 1, 132], [130, 1, 1, 68]):
        found, state = stream(inputs, made, pieces)
        assert relative_error(found, want) <= ERROR
        assert max(state_errors(state, want_state).values()) <= ERROR


def test_padding_changes_nothing() -> None:
    case = Case(length=90, window=5, sinks=3, **ODD_SIZES)
    made, inputs = make_map(case).float(), [x[:1] for x in make_inputs(case, dtype=torch.float32)]
    want = attention(*inputs, made, backend="native")
    for left in (1, 70):
        mask = torch.arange(90 + left)[None] >= left
        wide = [torch.nn.functional.pad(x, (0, 0, left, 0), value=float("nan")) for x in inputs]
        assert torch.equal(attention(*wide, made, key_mask=mask, backend="native")[:, :, left:], want)


def test_bfloat16_is_as_good_as_softmax_attention() -> None:
    """Errors against float64 on the same bfloat16 inputs, root mean square: at most 1.3 times those of torch's SDPA."""
    torch.manual_seed(0)
    made = feature_map(DarkConfig(num_features=128, window=0, sinks=0), num_heads=2, num_kv_heads=2, head_dim=64)
    inputs = [torch.randn(1, 2, 512, 64).bfloat16() for _ in range(3)]
    cotangent = torch.randn(1, 2, 512, 64).bfloat16()

    def rms(function: object, exact: object) -> list[float]:
        results = []
        for call, cast in ((function, torch.bfloat16), (exact, torch.float64)):
            leaves = [x.detach().clone().to(cast).requires_grad_() for x in inputs]
            output = call(*leaves)  # type: ignore[operator]
            output.backward(cotangent.to(output.dtype))
            results.append([output.detach(), *(x.grad for x in leaves)])
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]

    sdpa = torch.nn.functional.scaled_dot_product_attention
    softmax = rms(lambda *x: sdpa(*x, is_causal=True), lambda *x: sdpa(*x, is_causal=True))
    ours = rms(lambda *x: attention(*x, made, backend="native"), lambda *x: attention(*x, made, backend="reference"))
    assert all(a <= 1.3 * b for a, b in zip(ours, softmax, strict=True)), (ours, softmax)


@pytest.mark.parametrize("tokens", [0, 1], ids=["plain", "folded"])
@pytest.mark.parametrize("keeps", [True, False], ids=["state", "no-state"])
def test_opcheck(keeps: bool, tokens: int) -> None:
    from darkformer.ops.native.op import attention_op

    torch.manual_seed(0)
    made = feature_map(DarkConfig(num_features=8, window=3, sinks=2), num_heads=4, num_kv_heads=2, head_dim=6)
    inputs = [torch.randn(1, 2, 2, 9, 6), torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 5)]
    state = AttentionState.empty(made.config, inputs[1], inputs[2], batch=1, compute=torch.float32)
    maps = [x.detach() for x in pack(made.parameters_for(torch.float32), 2, 6, 0.4, tokens=tokens)]
    sums = [x.clone() if keeps else x.new_empty(0) for x in (state.feature_values, state.feature_sum, state.log_scale)]
    tensors = [*inputs, *maps[:4], *sums, state.recent_key]
    tensors += [state.recent_value, state.sink_key, state.sink_value, torch.tensor([9]), state.count, *maps[4:]]
    leaves = [x.requires_grad_() if x.is_floating_point() and i != 9 else x for i, x in enumerate(tensors)]
    torch.library.opcheck(attention_op, (*leaves, 8, 0.4, keeps))


def test_eager_code_and_the_operator_agree() -> None:
    """Numbers and gradients, with the state and without; code that watches operators sees one."""
    case = Case(length=70, window=5, sinks=2, mode="warm", **ODD_SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    leaves = [*inputs, *made.parameters()]
    found = []
    for watched in (False, True):
        for wants in (False, True):
            with FlopCounterMode(display=False) if watched else nullcontext():
                result = attention(*(x.requires_grad_() for x in inputs), made, return_state=wants, backend="native")
                output = result[0] if isinstance(result, tuple) else result
                found.append([output, *torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)])
    for other in found[1:]:
        assert all((x is None) == (y is None) for x, y in zip(found[0], other, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True) if x is not None)


def test_a_traced_graph_holds_the_operator() -> None:
    case = Case(length=40, window=5, sinks=2, **ODD_SIZES)
    made, inputs = make_map(case).float().requires_grad_(False), make_inputs(case, dtype=torch.float32)

    def function(*x: Tensor) -> Tensor:
        return attention(*x, made, backend="native")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing cannot see
        traced = torch.jit.trace(function, tuple(inputs), check_trace=False)
    assert "darkformer::attention" in str(traced.graph)
    assert relative_error(traced(*inputs), function(*inputs)) <= ERROR


def test_maps_without_a_gradient_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(length=150, window=5, sinks=2, **ODD_SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    backward, asked = load.backward, []
    monkeypatch.setattr(load, "backward", lambda *x, maps: asked.append(maps) or backward(*x, maps=maps))
    found = []
    for frozen in (False, True):
        made.requires_grad_(not frozen)
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = attention(*leaves, made, backend="native")
        found.append(torch.autograd.grad(output.sin().sum(), leaves))
    assert asked == [True, False]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_there_is_no_second_derivative() -> None:
    case = Case(length=20, window=0)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    query = inputs[0].requires_grad_()
    output = attention(query, *inputs[1:], made, backend="native")
    (slope,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        slope.sum().backward()


def test_float64_and_other_methods_go_elsewhere() -> None:
    case = Case(length=9, window=2)
    with pytest.raises(ConfigError, match="float64"):
        attention(*make_inputs(case), make_map(case), backend="native")
    for other in (replace(case, method="random", tied=False), replace(case, method="constant", tied=False)):
        with pytest.raises(ConfigError, match="method"):
            attention(*make_inputs(other, dtype=torch.float32), make_map(other).float(), backend="native")
    with pytest.raises(ConfigError, match="causal"):
        attention(*make_inputs(case, dtype=torch.float32), make_map(case).float(), is_causal=False, backend="native")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": 2049}, "the number of features 2049 is above its limit of 2048"),
        ({"dim": 520}, "the head dimension 520 is above its limit of 512"),
        ({"value_dim": 513}, "the head dimension 513 is above its limit of 512"),
        ({"window": 8193}, "the window 8193 is above its limit of 8192"),
    ],
    ids=str,
)
def test_sizes_it_does_not_cover_fall_back_with_their_reason(changes: dict[str, int], says: str) -> None:
    case = replace(Case(length=3, batch=1, heads=2, kv_heads=1, scale=0.1), **changes)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    with pytest.raises(ConfigError, match=says):
        attention(*inputs, made, backend="native")
    assert torch.equal(attention(*inputs, made), attention(*inputs, made, backend="chunked"))


def test_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    spy = BACKENDS["native"]._replace(function=lambda problem: used.append(1) or native.native(problem))  # type: ignore[func-returns-value]
    monkeypatch.setitem(BACKENDS, "native", spy)
    case = Case(length=9, window=2)
    attention(*make_inputs(case, dtype=torch.float32), make_map(case).float())
    assert used


def test_work_and_memory_are_linear() -> None:
    small = {"batch": 1, "heads": 2, "kv_heads": 1, "features": 4, "dim": 4, "value_dim": 4, "window": 16, "sinks": 2}

    few, many = (elements(Case(length=n, **small), "native", torch.float32) for n in (4096, 8192))
    assert many / few < 2.02


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16", "amx_bf16"])
def test_nothing_is_read_before_it_is_written(isa: str) -> None:
    """Built with scratch memory full of NaN, for every instruction set that runs here: the self-test and some cases."""
    if not usable(isa):
        pytest.skip(f"{isa} does not run here")
    code = (
        "import torch; from darkformer.ops import native; assert native.unavailable() is None, native.unavailable()\n"
        "from ops.cases import NATIVE, NATIVE_BFLOAT16, ODD_SIZES, Case\n"
        "for window, sinks, length in ((64, 16, 60), (64, 32, 60), (64, 32, 1000), (16, 32, 64), (64, 70, 50)):\n"
        "    case = Case(length=length, window=window, sinks=sinks, batch=1, dim=16, features=16, value_dim=16)\n"
        "    assert not NATIVE.wrong(case), (window, sinks, length)\n"
        "for way in (NATIVE, NATIVE_BFLOAT16):\n"
        "    for window in (0, 5, 64, 100):\n"
        "        case = Case(length=130, window=window, sinks=3, mode='warm', padding='left', **ODD_SIZES)\n"
        "        assert not way.wrong(case), (way, window)\n"
        "print('clean')"
    )
    environment = {**os.environ, "DARKFORMER_NATIVE_ISA": isa, "DARKFORMER_NATIVE_POISON": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "clean", run.stdout + run.stderr


BEHIND = '''
import ctypes, mmap, torch
from darkformer import DarkConfig, attention, feature_map
libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept = []

def at_the_edge(x):
    """The same numbers, their last byte followed by a page that nobody may read."""
    pages = -(-x.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0) == 0
    kept.append(memory)
    edge = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * PAGE - x.nbytes)
    return edge.view(x.shape).copy_(x)

for dtype in (torch.bfloat16, torch.float32):
    for dim in (16, 24, 32, 48, 64):
        for window in (0, 5, 64):
            config = DarkConfig(num_features=32, window=window, sinks=2)
            made = feature_map(config, num_heads=2, num_kv_heads=1, head_dim=dim)
            inputs = [at_the_edge(torch.randn(1, heads, 128, dim).to(dtype)).requires_grad_() for heads in (2, 1, 1)]
            output = attention(*inputs, made, backend="native")
            output.backward(at_the_edge(torch.randn_like(output)))
print("clean")
'''


def test_nothing_is_read_behind_a_tensor() -> None:
    """Rows are read where they lie, in whole vectors; a page behind them that may not be read ends the process."""
    run = subprocess.run([sys.executable, "-c", BEHIND], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "clean", (run.returncode, run.stdout, run.stderr)


def test_it_compiles() -> None:
    """`torch.compile` accepts the operator (no code is generated: backend="aot_eager")."""
    case = Case(length=40, window=5, sinks=2, **ODD_SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    problem, _ = problem_of(*inputs, made.parameters_for(torch.float32), scaling=0.3, return_state=True)

    def function(query: Tensor) -> Tensor:
        return native.native(problem._replace(query=query))[0].square()

    found = torch.compile(function, backend="aot_eager", fullgraph=True)(problem.query)
    # Eager code may fold the norm into the features, a traced graph cannot look whether it may.
    assert relative_error(found, function(problem.query)) <= ERROR


@pytest.mark.parametrize("where", ["geometry", "projection", "query_center"])
def test_diverged_parameters_are_refused_as_everywhere(where: str) -> None:
    fm = feature_map(DarkConfig(num_features=16, window=4, sinks=2), num_heads=2, num_kv_heads=1, head_dim=16)
    getattr(fm, where).data.view(-1)[3] = float("nan")
    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NonFiniteError, match="feature map's parameters"):
        attention(x, x[:, :1], x[:, :1], fm, backend="native")


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("at", [0, 77, 299])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_the_library_looks_at_its_inputs_itself(name: str, window: int, at: int, poison: float) -> None:
    case = Case(length=300, window=window, sinks=3, heads=2, kv_heads=1, batch=1, **ODD_SIZES)
    made = make_map(case).float()
    inputs = dict(zip(("query", "key", "value"), make_inputs(case, dtype=torch.float32), strict=True))
    assert attention(*inputs.values(), made, backend="native").isfinite().all()
    inputs[name][0, -1, at, -1] = poison
    with pytest.raises(NonFiniteError, match=f"^{name} hold NaN or infinity"):
        attention(*inputs.values(), made, backend="native")


def test_the_library_looks_at_its_output_itself() -> None:
    """Values near the largest float32 add up to infinity; pads may hold anything."""
    case = Case(length=40, heads=2, kv_heads=1, batch=1, **ODD_SIZES)
    made, (q, k, v) = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    mask = torch.arange(40)[None] >= 5
    v[:, :, :5] = float("nan")
    assert attention(q, k, v, made, key_mask=mask, backend="native").isfinite().all()
    v = torch.full_like(v, 3.4e38)
    with pytest.raises(NonFiniteError, match="the output holds NaN or infinity although"):
        attention(q, k, v, made, backend="native")


def test_traced_code_raises_on_what_is_not_finite() -> None:
    """The operator itself says so: nobody looks at the numbers of a trace."""
    case = Case(length=40, window=5, sinks=2, **ODD_SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    problem, _ = problem_of(*inputs, made.parameters_for(torch.float32), scaling=0.3, return_state=True)
    compiled = torch.compile(
        lambda query: native.native(problem._replace(query=query))[0], backend="aot_eager", fullgraph=True
    )
    query = problem.query.clone()
    assert compiled(query).isfinite().all()
    query[0, 0, 0, 7, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        compiled(query)


OUT_OF_MEMORY = """
import resource, torch
from darkformer import DarkConfig, DarkformerError, attention, feature_map
from darkformer.ops import native
assert native.unavailable() is None
torch.set_num_threads(2)
made = feature_map(DarkConfig(num_features=64, window=8192), num_heads=2, num_kv_heads=2, head_dim=512)
x = torch.randn(1, 2, 16, 512)
refused = 0
for megabytes in range(20, 260, 20):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        attention(x, x, x, made, backend="native")
    except MemoryError as error:
        refused += isinstance(error, DarkformerError)
    except RuntimeError:  # torch's own tensors
        pass
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    native.release()
assert refused
assert attention(x, x, x, made, backend="native").isfinite().all()
print("goes on")
"""


def test_without_memory_it_raises_and_goes_on() -> None:
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "goes on", (run.returncode, run.stdout, run.stderr)
