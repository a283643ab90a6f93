"""Problems for the operator tests, and one way to solve them with everything that can be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import AGAINST_FLOAT64, PARITY, relative_error
from torch import Tensor

from darkformer import AttentionState, DarkConfig, FeatureMap, attention, feature_map
from darkformer.ops import native
from darkformer.ops.attention import BACKENDS
from darkformer.ops.chunked import chunked_with, fastest_sizes
from darkformer.ops.state import LOG_ZERO, Problem

#: The terms a gradient is the difference of, relative to which rounding is measured: see `differences`.
FLOOR = 1e-3
NATIVE_REASON = native.unavailable()
needs_native = pytest.mark.skipif(NATIVE_REASON is not None, reason=f"native: {NATIVE_REASON}")
#: Nothing a multiple of 16, m not a power of two, d_v ≠ d.
ODD_SIZES = {"features": 20, "dim": 20, "value_dim": 24}
#: Tensors of a state that may have a gradient.
STATE_LEAVES = ("feature_values", "feature_sum", "recent_key", "recent_value", "sink_key", "sink_value")


@dataclass(frozen=True)
class Case:
    """One problem. `mode`: causal from nothing ("cold"), causal after a state ("warm"), or "bidirectional"."""

    length: int = 5
    window: int = 0
    sinks: int = 0
    kv_heads: int = 2
    padding: str = "none"
    mode: str = "cold"
    method: str = "dark"
    tied: bool = True
    draw: str = "orthogonal"
    heads: int = 6
    batch: int = 2
    features: int = 8
    dim: int = 8
    value_dim: int = 5
    scale: float = 1.0
    far_bias: bool = True
    proposal: str = "isotropic"
    proposal_weights: bool = True
    softcap: float | None = None

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return (
            f"{self.method}-{tied}-L{self.length}-W{self.window}-S{self.sinks}-G{self.kv_heads}"
            f"-{self.padding}-{self.mode}-{self.draw}"
            + (f"-{self.proposal}-{self.proposal_weights}" if self.proposal != "isotropic" else "")
            + (f"-d{self.dim}-m{self.features}-v{self.value_dim}" if self.dim != 8 else "")
            + (f"-cap{self.softcap}" if self.softcap else "")
        )

    @property
    def config(self) -> DarkConfig:
        return DarkConfig(
            method=self.method, num_features=self.features, window=self.window, sinks=self.sinks,
            tied=self.tied, draw=self.draw, far_bias=self.far_bias, proposal=self.proposal,
            proposal_weights=self.proposal_weights,
        )  # fmt: skip

    @property
    def fast(self) -> str:
        """The backend that is compared with `reference`."""
        return "exact" if self.method == "exact" else "chunked"


def make_map(case: Case, dtype: torch.dtype = torch.float64) -> FeatureMap:
    """The case's feature map, every parameter moved away from its start; by less where d > 8, as maps add up."""
    made = feature_map(case.config, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.add_(0.3 * min(1.0, 8 / case.dim) * noise)
    if made.proposal_root is not None:
        root = torch.randn(case.kv_heads, case.dim, case.dim, generator=generator, dtype=torch.float64)
        made.propose_(torch.eye(case.dim, dtype=torch.float64) + 0.2 * root @ root.mT)
    return made


def make_inputs(
    case: Case, length: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, H, L, d), key (B, G, L, d), value (B, G, L, d_v)."""
    generator = torch.Generator().manual_seed(seed)
    length = case.length if length is None else length

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(case.batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)

    query, key = case.scale * draw(case.heads, case.dim), case.scale * draw(case.kv_heads, case.dim)
    return query, key, draw(case.kv_heads, case.value_dim)


def make_mask(padding: str, batch: int, length: int) -> Tensor | None:
    """(B, L) bool; row 0 has fewer pads than the others, a single token may be a pad."""
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    if padding == "interior" and length > 2:
        generator = torch.Generator().manual_seed(3)
        mask = torch.rand(batch, length, generator=generator) > 0.4
        mask[:, 0] = mask[:, -1] = True
        mask[:, length // 2] = False
        return mask
    mask[1:, : max(1, length // 2)] = False
    mask[0, : length // 5] = False
    return mask.flip(1) if padding == "right" else mask


def make_state(case: Case, made: FeatureMap, dtype: torch.dtype = torch.float64) -> AttentionState:
    """The state after a ragged history: row 0 has filled window and sinks, the others only two tokens."""
    length = case.window + case.sinks + 7
    mask = torch.ones(case.batch, length, dtype=torch.bool)
    mask[1:, : length - 2] = False
    with torch.no_grad():
        inputs = make_inputs(case, length, dtype, seed=4)
        return attention(*inputs, made, key_mask=mask, return_state=True, backend="reference")[1]


class Solution(NamedTuple):
    tensors: dict[str, Tensor]  # output, state and gradients
    size: float  # Σ |cotangent · result|: of the terms that gradients are sums of


def use_chunked(monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> None:
    """From here on the backend `chunked` cuts its work in other sizes than the fastest."""

    def function(problem: Problem) -> tuple[Tensor, AttentionState]:
        return chunked_with(problem, fastest_sizes(problem)._replace(**sizes))

    monkeypatch.setitem(BACKENDS, "chunked", BACKENDS["chunked"]._replace(function=function))


def _rounded_state(case: Case, dtype: torch.dtype, rounded: torch.dtype) -> AttentionState:
    """The case's warm state: keys and values rounded to `rounded` and kept in `dtype`, sums to float32."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    state, kept = make_state(case, make_map(case)), {}
    for f in fields(state):
        x = getattr(state, f.name)
        if f.name != "count":
            empty, buffer = x < LOG_ZERO / 2, f.name.endswith(("key", "value"))
            x = x.to(rounded if buffer else torch.float32).to(dtype if buffer else compute).masked_fill(empty, LOG_ZERO)
        kept[f.name] = x.detach().requires_grad_(f.name in (*STATE_LEAVES, "key", "value"))
    return type(state)(**kept)


def solve(
    case: Case,
    backend: str,
    perturb: Callable[[FeatureMap], Any] = lambda made: None,
    dtype: torch.dtype = torch.float64,
    rounded: torch.dtype = torch.float32,
) -> Solution:
    """Output, state, and the gradients of all inputs, parameters and of the initial state, for random cotangents.

    All numbers are rounded to `rounded` (parameters and sums to float32) and given in `dtype`, so that one float64
    solution of the reference serves every backend and dtype.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    made = make_map(case).float().to(compute)
    perturb(made)
    inputs = [x.to(dtype).requires_grad_() for x in make_inputs(case, dtype=rounded)]
    state, leaves = None, dict(zip(("query", "key", "value"), inputs, strict=True))
    if case.mode == "warm":
        state = _rounded_state(case, dtype, rounded)
        leaves |= {
            f"initial {f.name}": getattr(state, f.name)
            for f in fields(state)
            if f.name in (*STATE_LEAVES, "key", "value")
        }
    leaves |= dict(made.named_parameters())
    causal = case.mode != "bidirectional"
    result = attention(
        *inputs, made, key_mask=make_mask(case.padding, case.batch, case.length), is_causal=causal,
        initial_state=state, return_state=causal, softcap=case.softcap, backend=backend,
    )  # fmt: skip
    output, after = result if causal else (result, None)
    found = {"output": output}
    if after is not None:
        found |= {f"state {f.name}": getattr(after, f.name) for f in fields(after)}
    generator, terms = torch.Generator().manual_seed(5), []
    for tensor in found.values():
        cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(rounded)
        if tensor.requires_grad:
            terms.append(tensor * cotangent.to(tensor.dtype))
    torch.stack([term.double().sum() for term in terms]).sum().backward()
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    size = sum(float(t.detach().double().abs().sum()) for t in terms)
    return Solution({n: t.detach() for n, t in found.items()}, size)


@functools.lru_cache(maxsize=4)
def expected(case: Case, rounded: torch.dtype = torch.float32) -> Solution:
    """The oracle's solution in float64, once for all the backends that are compared with it in a row."""
    return solve(case, "reference", rounded=rounded)


class Way(NamedTuple):
    """A backend and the dtype it is given."""

    backend: str
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    def wrong(self, case: Case, limit: float | None = None) -> dict[str, float]:
        """The errors against the oracle that are above `limit`, by default what tolerances.py says of the dtype."""
        rounded = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        want = expected(case, rounded)
        errors = differences(solve(case, self.backend, dtype=self.dtype, rounded=rounded), want, self.dtype)
        tolerance = PARITY if self.dtype == torch.float64 else AGAINST_FLOAT64[self.dtype]
        return above(errors, tolerance if limit is None else limit)


CHUNKED = Way("chunked")
NATIVE = Way("native", torch.float32)
NATIVE_BFLOAT16 = Way("native", torch.bfloat16)


def ways(case: Case) -> list[Way]:
    """Every fast way there is to solve the case (bfloat16 aside, which would want an oracle of its own)."""
    if case.method == "exact":
        return [Way("exact")]
    found = [CHUNKED]
    if case.mode != "bidirectional" and case.method in native.METHODS:
        found.append(NATIVE)
    if case.length == 1 and case.mode != "bidirectional" and case.padding == "none":
        found.append(Way("recurrent"))
    return found


def by_way(cases: Iterable[Case], of: Callable[[Case], list[Way]] = ways) -> list[Any]:
    """pytest parameters (case, way): every case in each of its ways, one after the other."""
    return [
        pytest.param(case, way, id=f"{way}-{case}", marks=[needs_native] if way.backend == "native" else [])
        for case in cases
        for way in of(case)
    ]


def differences(actual: Solution, expected: Solution, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Relative error of every tensor.

    A gradient may be zero in exact arithmetic (all but the values' when a query sees one key, because the weight
    cancels in the normaliser). It is then a sum of terms of about `size` that cancel, so its rounding is measured
    against `FLOOR`·`size`: with the tolerance 1e-9 that is 1e-12 of the terms, 4 digits above float64's rounding.
    In float32 the terms carry log-features of size 10 (10 times that); in bfloat16 they are rounded themselves (20).
    """
    assert actual.tensors.keys() == expected.tensors.keys()
    floor = FLOOR * expected.size * {torch.float64: 1, torch.float32: 10, torch.bfloat16: 20}[dtype]
    errors = {}
    for name, want in expected.tensors.items():
        got = actual.tensors[name]
        if name == "state log_scale":  # LOG_ZERO would hide every other entry's error
            empty = want < LOG_ZERO / 2
            assert torch.equal(empty, got < LOG_ZERO / 2)
            want, got = want.masked_fill(empty, 0), got.masked_fill(empty, 0)
        errors[name] = relative_error(got, want, floor if name.startswith("gradient") else 0.0)
    return errors


def above(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    """The errors that are not within the tolerance (NaN included)."""
    return {name: error for name, error in errors.items() if not error <= tolerance}


Pair = frozenset[tuple[str, Any]]


def pairs(row: dict[str, Any]) -> set[Pair]:
    """Every pair of values of two different axes in one row."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def all_pairs(axes: dict[str, tuple[Any, ...]], forbidden: Callable[[Pair], bool] = lambda pair: False) -> set[Pair]:
    """Every allowed pair of values of two different axes."""
    every = ({(a, x), (b, y)} for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b])
    return {frozenset(pair) for pair in every if not forbidden(frozenset(pair))}


def covering(
    axes: dict[str, tuple[Any, ...]], forbidden: Callable[[Pair], bool] = lambda pair: False
) -> Iterable[dict[str, Any]]:
    """Few rows that hold every allowed pair: each starts from a missing pair and is completed greedily."""
    order = {axis: {value: i for i, value in enumerate(values)} for axis, values in axes.items()}
    missing = all_pairs(axes, forbidden)
    while missing:
        first = min(missing, key=lambda pair: sorted((list(axes).index(a), order[a][x]) for a, x in pair))
        row = dict(first)
        for axis in axes:
            if axis not in row:
                extended = [row | {axis: value} for value in axes[axis]]
                allowed = [r for r in extended if not any(map(forbidden, pairs(r)))]
                row = max(allowed, key=lambda r: len(pairs(r) & missing))
        missing -= pairs(row)
        yield {axis: row[axis] for axis in axes}
