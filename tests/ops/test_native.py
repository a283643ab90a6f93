"""The compiled backend against the float64 oracle: output, state, gradients; threads, strides, building, refusing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tolerances import float32_error, relative_error
from torch import Tensor

from darkformer import AttentionState, ConfigError, DarkConfig, NonFiniteError, attention, feature_map
from darkformer.ops import attention as attention_module
from darkformer.ops import native
from darkformer.ops.attention import BACKENDS
from darkformer.ops.native import load, selftest
from darkformer.ops.native.build import BuildError
from darkformer.ops.problem import LOG_ZERO

from .cases import FLOOR, Case, make_inputs, make_map, make_mask, make_state
from .test_linear import elements
from .test_recurrent import state_errors, stream

REASON = native.unavailable()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")
#: float32 against float64, and bfloat16 products (inputs, outputs and cotangents are exact in bfloat16).
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STATES = ("feature_values", "feature_sum", "recent_key", "recent_value", "sink_key", "sink_value")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(case: Case, low: torch.dtype, high: torch.dtype | None) -> AttentionState:
    """The case's warm state rounded as a call with `low` inputs keeps it; in `high` where that is given."""
    state, kept = make_state(case, make_map(case)), {}
    for f in fields(state):
        x = getattr(state, f.name)
        if f.name != "count":
            empty = x < LOG_ZERO / 2
            x = x.to(low if f.name[:4] in ("rece", "sink") else torch.float32)
            x = (x.to(high) if high else x).masked_fill(empty, LOG_ZERO)
        kept[f.name] = x.detach().requires_grad_(f.name in STATES)
    return AttentionState(**kept)


def solve(case: Case, backend: str, low: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """As `cases.solve`, from inputs of dtype `low`: the reference computes with them in float64."""
    high = torch.float64 if backend == "reference" else None
    made = make_map(case).float().to(high or torch.float32)
    inputs = [x.to(high or low).requires_grad_() for x in make_inputs(case, dtype=low)]
    leaves = dict(zip(("query", "key", "value"), inputs, strict=True)) | dict(made.named_parameters())
    state = start(case, low, high) if case.mode == "warm" else None
    if state is not None:
        leaves |= {f"initial {name}": getattr(state, name) for name in STATES}
    output, after = attention(
        *inputs, made, key_mask=make_mask(case.padding, case.batch, case.length), initial_state=state,
        return_state=True, backend=backend,
    )  # fmt: skip
    found = {"output": output} | {f"state {f.name}": getattr(after, f.name) for f in fields(after)}
    generator, terms = torch.Generator().manual_seed(5), []
    for tensor in found.values():
        cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(low)
        if tensor.requires_grad:
            terms.append(tensor * cotangent.to(tensor.dtype))
    torch.stack([term.double().sum() for term in terms]).sum().backward()
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {n: t.detach() for n, t in found.items()}, float(sum(t.detach().double().abs().sum() for t in terms))


def errors(
    case: Case, low: torch.dtype = torch.float32, backend: str = "native", limit: float | None = None
) -> dict[str, float]:
    """Every error above the tolerance. In bfloat16 a gradient that cancels is measured against its terms."""
    (found, _), (wanted, size) = solve(case, backend, low), solve(case, "reference", low)
    assert found.keys() == wanted.keys()
    above = {}
    for name, want in wanted.items():
        got = found[name]
        if name == "state log_scale":
            assert torch.equal(got < LOG_ZERO / 2, want < LOG_ZERO / 2)
            got, want = got.clamp_min(-1e6), want.clamp_min(-1e6)
        floor = FLOOR * size * (1 if low == torch.float32 else 20) if name.startswith("gradient") else 0.0
        error = relative_error(got, want, floor)
        if not error <= (ERROR[low] if limit is None else limit):
            above[name] = error
    return above


SIZES = {"features": 20, "dim": 20, "value_dim": 24}  # nothing a multiple of 16, m not a power of two, d_v ≠ d


def grid() -> Iterator[Case]:
    axes = ((1, 5, 63, 64, 65, 150), (0, 1, 16, 64, 100), (0, 4), (1, 2, 6), ("cold", "warm"))
    for indices in product(*(range(len(axis)) for axis in axes)):
        length, window, sinks, kv_heads, mode = (axis[i] for axis, i in zip(axes, indices, strict=True))
        if (sum(indices) + indices[0] * indices[1]) % 3 == 0:
            padding = ("none", "left", "right", "interior")[sum(indices[1:]) % 4]
            yield Case(
                length=length, window=window, sinks=sinks, kv_heads=kv_heads, mode=mode, padding=padding,
                tied=sum(indices) % 2 == 0, **SIZES,
            )  # fmt: skip


@needs_native
@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_float32(case: Case) -> None:
    assert not errors(case)


@needs_native
@pytest.mark.parametrize("case", list(grid())[::6], ids=str)
def test_bfloat16(case: Case) -> None:
    assert not errors(case, torch.bfloat16)


@needs_native
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=700, heads=2, kv_heads=1, batch=1, window=16, sinks=4, mode="warm", **SIZES),
        Case(length=600, heads=3, kv_heads=3, batch=1, window=100, **SIZES),
        Case(length=530, heads=2, kv_heads=1, batch=3, padding="left", **SIZES),
    ],
    ids=str,
)
def test_segments(case: Case, count: int) -> None:
    """Pairs of (batch row, kv head) that the threads do not divide are cut along the sequence."""
    with threads(count):
        assert not errors(case)
        again = solve(case, "native", torch.float32)[0]
        for name, tensor in solve(case, "native", torch.float32)[0].items():
            assert torch.equal(tensor, again[name]), name  # the order of additions is fixed


@needs_native
@pytest.mark.parametrize(
    "case",
    [
        Case(method="performer", tied=True), Case(method="lfk", window=3), Case(method="local", window=7, sinks=2),
        Case(proposal="optimal", window=4), Case(proposal="oprf", proposal_weights=False),
        Case(far_bias=False, window=2),
        Case(dim=16, value_dim=64, features=16), Case(dim=72, value_dim=16, features=33, window=9),
        Case(dim=256, value_dim=128, features=130, heads=2, kv_heads=1, window=20, sinks=4),
    ],
    ids=str,
)  # fmt: skip
def test_methods_and_sizes(case: Case) -> None:
    # The moved parameters of `make_map` give log-features of hundreds at d = 72 and thousands at d = 256, which float32
    # carries to 1e-5 and 1e-3: what is left is measured against `chunked`, which rounds in the same places.
    case = replace(case, length=90, scale=min(1.0, 16 / case.dim), mode="warm")
    if wrong := errors(case):
        assert case.dim >= 72
        rounding = max(errors(case, backend="chunked", limit=0.0).values())
        assert max(wrong.values()) <= 8 * rounding


@needs_native
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (0, 4), (16, 0), (64, 4)])
@pytest.mark.parametrize("std", [1, 4, 16, 64, 128, 256])
def test_large_logits(std: int, window: int, sinks: int) -> None:
    """As tests/ops/test_stability.py; without window and sinks chunks are cut from some logits on, never otherwise."""
    from .test_stability import solve as gradients

    made = feature_map(
        DarkConfig(num_features=64, window=window, sinks=sinks), num_heads=2, num_kv_heads=1, head_dim=64
    )
    query, key, value = (torch.randn(1, heads, 256, 64) for heads in (2, 1, 1))
    inputs = [query * std**0.5, key * std**0.5, value]
    before = native.splits()
    found = gradients(inputs, made, "native")
    cut = native.splits() - before
    assert cut == 0 if window or sinks or std <= 4 else cut > 0 or std < 64
    expected = gradients([x.double() for x in inputs], made, "reference")
    assert relative_error(found[0], expected[0]) <= float32_error(std)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative_error(got, want) <= 4 * float32_error(std)


@needs_native
@pytest.mark.parametrize("window", [0, 1, 16, 100])
def test_any_split_of_a_stream(window: int) -> None:
    case = Case(length=200, window=window, sinks=4, padding="none", **SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    want, want_state = attention(*inputs, made, return_state=True, backend="reference")
    for pieces in ([200], [3, 64, 1, 132], [130, 1, 1, 68]):
        found, state = stream(inputs, made, pieces)
        assert relative_error(found, want) <= ERROR[torch.float32]
        assert max(state_errors(state, want_state).values()) <= ERROR[torch.float32]


@needs_native
def test_padding_changes_nothing() -> None:
    case = Case(length=90, window=5, sinks=3, **SIZES)
    made, inputs = make_map(case).float(), [x[:1] for x in make_inputs(case, dtype=torch.float32)]
    want = attention(*inputs, made, backend="native")
    for left in (1, 70):
        mask = torch.arange(90 + left)[None] >= left
        wide = [torch.nn.functional.pad(x, (0, 0, left, 0), value=float("nan")) for x in inputs]
        assert torch.equal(attention(*wide, made, key_mask=mask, backend="native")[:, :, left:], want)


@needs_native
def test_any_strides() -> None:
    case = Case(length=70, window=5, sinks=3, **SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    want = attention(*inputs, made, backend="native")
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    last_strided = [x.mT.contiguous().mT for x in inputs]
    for other in (token_major, last_strided):
        leaves = [x.requires_grad_() for x in other]
        found = attention(*leaves, made, backend="native")
        assert torch.equal(found, want)
        found.sum().backward()  # an expanded gradient
    one = [x[:1, :1].expand(2, heads, -1, -1) for x, heads in zip(inputs, (6, 2, 2), strict=True)]
    assert torch.equal(
        attention(*one, made, backend="native"), attention(*map(torch.clone, one), made, backend="native")
    )


@needs_native
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


@needs_native
def test_opcheck() -> None:
    from darkformer.ops.native.maps import sides
    from darkformer.ops.native.op import attention_op

    torch.manual_seed(0)
    made = feature_map(DarkConfig(num_features=8, window=3, sinks=2), num_heads=4, num_kv_heads=2, head_dim=6)
    inputs = [torch.randn(1, 2, 2, 9, 6), torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 5)]
    state = AttentionState.empty(made.config, inputs[1], inputs[2], batch=1, compute=torch.float32)
    maps = [x.detach() for x in sides(made.parameters_for(torch.float32), 2, 6, 0.4)]
    tensors = [*inputs, *maps, state.feature_values, state.feature_sum, state.log_scale, state.recent_key]
    tensors += [state.recent_value, state.sink_key, state.sink_value, torch.tensor([9]), state.count]
    leaves = [x.requires_grad_() if x.is_floating_point() and i != 9 else x for i, x in enumerate(tensors)]
    torch.library.opcheck(attention_op, (*leaves, 8, 0.4))


@needs_native
def test_float64_and_other_methods_go_elsewhere() -> None:
    case = Case(length=9, window=2)
    with pytest.raises(ConfigError, match="float64"):
        attention(*make_inputs(case), make_map(case), backend="native")
    for other in (replace(case, method="random", tied=False), replace(case, method="constant", tied=False)):
        with pytest.raises(ConfigError, match="method"):
            attention(*make_inputs(other, dtype=torch.float32), make_map(other).float(), backend="native")
    with pytest.raises(ConfigError, match="causal"):
        attention(*make_inputs(case, dtype=torch.float32), make_map(case).float(), is_causal=False, backend="native")


@needs_native
def test_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    spy = BACKENDS["native"]._replace(function=lambda problem: used.append(1) or native.native(problem))  # type: ignore[func-returns-value]
    monkeypatch.setitem(BACKENDS, "native", spy)
    case = Case(length=9, window=2)
    attention(*make_inputs(case, dtype=torch.float32), make_map(case).float())
    assert used


@needs_native
def test_work_and_memory_are_linear() -> None:
    small = {"batch": 1, "heads": 2, "kv_heads": 1, "features": 4, "dim": 4, "value_dim": 4, "window": 16, "sinks": 2}

    few, many = (elements(Case(length=n, **small), "native", torch.float32) for n in (4096, 8192))
    assert many / few < 2.02


@needs_native
def test_a_wrong_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the self-test: a result that is off by a thousandth."""
    right = load.forward

    def wrong(*arguments: object) -> tuple[Tensor, ...]:
        output, *rest = right(*arguments)  # type: ignore[arg-type]
        return output * 1.001, *rest

    selftest.selftest()
    monkeypatch.setattr(load, "forward", wrong)
    with pytest.raises(BuildError, match="self-test failed"):
        selftest.selftest()


FALLBACK = """
import torch, darkformer
from darkformer.ops import native
made = darkformer.feature_map(darkformer.DarkConfig(num_features=8), num_heads=2, num_kv_heads=1, head_dim=8)
x = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
first, second = darkformer.attention(*x, made), darkformer.attention(*x, made)
want = darkformer.attention(*x, made, backend="chunked")
assert torch.equal(first, want) and torch.equal(second, want)
print(native.unavailable())
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "/bin/false", "CXX": ""}, "/bin/false failed"),
        ({"CXX": "/nowhere/c++"}, "No such file"),
        ({"DARKFORMER_NATIVE": "0"}, "switches it off"),
        ({"DARKFORMER_NATIVE_ISA": "mmx"}, "unknown"),
    ],
)
def test_without_a_compiler_chunked_works(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(tmp_path), **environment}
    run = subprocess.run([sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
    assert run.stderr.count("not available") == (
        0 if "DARKFORMER_NATIVE" in environment.keys() - os.environ.keys() else 1
    )
    assert not list(tmp_path.glob("**/*.so"))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "/bin/false", "CXX": ""}, "/bin/false does not run"),
        ({"DARKFORMER_NATIVE": "0"}, "DARKFORMER_NATIVE=0 switches it off"),
    ],
)
def test_status_says_why(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "darkformer.cli", "native", "status"]
    environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(tmp_path), **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and f"not available: {says}" in run.stdout.replace("the compiler ", ""), run.stdout
    assert not list(tmp_path.iterdir())  # status builds nothing


@needs_native
def test_a_broken_cache_is_replaced_or_refused(tmp_path: Path) -> None:
    """A file that is no library: one line, torch's operators do the work; `build` puts it right."""
    environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(tmp_path)}
    code = "from darkformer.ops.native.build import library_path; p = library_path(); p.write_bytes(b'x'); print(p)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    run = subprocess.run([sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "cannot be loaded" in run.stdout


@needs_native
@pytest.mark.parametrize("isa", ["avx2", ""], ids=["avx2", "widest"])
def test_nothing_is_read_before_it_is_written(isa: str) -> None:
    """Built with scratch memory full of NaN, also for the narrower instruction set: the self-test and some cases."""
    code = (
        "import torch; from darkformer.ops import native; assert native.unavailable() is None, native.unavailable()\n"
        "from ops.test_native import Case, SIZES, errors\n"
        "for low in (torch.float32, torch.bfloat16):\n"
        "    for window in (0, 5, 64, 100):\n"
        "        case = Case(length=130, window=window, sinks=3, mode='warm', padding='left', **SIZES)\n"
        "        assert not errors(case, low), (low, window)\n"
        "print('clean')"
    )
    environment = {**os.environ, "DARKFORMER_NATIVE_ISA": isa, "DARKFORMER_NATIVE_POISON": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "clean", run.stdout + run.stderr


@needs_native
def test_it_compiles() -> None:
    """`torch.compile` accepts the operator (no code is generated: backend="aot_eager")."""
    case = Case(length=40, window=5, sinks=2, **SIZES)
    made, inputs = make_map(case).float(), make_inputs(case, dtype=torch.float32)
    problem_of = attention_module._pose(*inputs, made, None, None, True, None, None)[0]

    def function(query: Tensor) -> Tensor:
        return native.native(problem_of._replace(query=query))[0].square()

    found = torch.compile(function, backend="aot_eager", fullgraph=True)(problem_of.query)
    assert torch.equal(found, function(problem_of.query))


@needs_native
@pytest.mark.parametrize("where", ["geometry", "projection", "query_center"])
def test_diverged_parameters_are_refused_as_everywhere(where: str) -> None:
    fm = feature_map(DarkConfig(num_features=16, window=4, sinks=2), num_heads=2, num_kv_heads=1, head_dim=16)
    getattr(fm, where).data.view(-1)[3] = float("nan")
    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NonFiniteError, match="feature map's parameters"):
        attention(x, x[:, :1], x[:, :1], fm, backend="native")
