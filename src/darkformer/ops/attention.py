"""The public door: checks, padding, choice of backend. Every check of tensors is written here, once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, NonFiniteError
from ..features.feature_map import FeatureMap
from ..features.affine import FeatureParameters
from ..features.tracing import traced, transformed
from . import functional
from .assembled import assembled
from .assembled import why_not as _why_not_assembled
from .chunked import chunked
from .exact import exact
from .native import native
from .native import why_not as _why_not_native
from .packing import apart, check_documents
from .recurrent import recurrent
from .reference import reference
from .state import AttentionState, Problem, check_state, compact, reorder


class Backend(NamedTuple):
    """A way to compute the same numbers. `why_not` says why it cannot take a problem, or None if it can.

    watchful: it looks at its inputs and its output itself, and answers NaN throughout where a number is not finite.
    portable: it consists of torch's own operators, so that a program traced from it runs without this library.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    function: Callable[[Problem], tuple[Tensor, AttentionState]]
    watchful: bool = False
    portable: bool = True


def _why_not_exact(problem: Problem) -> str | None:
    return None if problem.config.method == "exact" else f"method={problem.config.method!r} is not exact attention"


def _why_not_recurrent(problem: Problem) -> str | None:
    if problem.config.method == "exact":
        return "exact attention has no constant-size state"
    if not problem.is_causal:
        return "it is causal only"
    if problem.key.shape[2] != 1 or problem.padded:
        return f"it takes one real token per row, this call has {problem.key.shape[2]} with padding={problem.padded}"
    return None


def _why_not_reference(problem: Problem) -> str | None:
    return "it looks at the number of tokens of each row, which a trace cannot" if problem.traced else None


def _why_not_chunked(problem: Problem) -> str | None:
    return "exact attention is not linear" if problem.config.method == "exact" else None


#: In order of preference; `auto` takes the first without a reason against it.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("exact", _why_not_exact, exact),
        Backend("recurrent", _why_not_recurrent, recurrent),
        Backend("native", _why_not_native, native, watchful=True, portable=False),
        Backend("chunked", _why_not_chunked, chunked),
        Backend("assembled", _why_not_assembled, assembled),
        Backend("reference", _why_not_reference, reference),
    )
}


def _choose(name: str, problem: Problem) -> Backend:
    if name == "auto":
        every = (backend for backend in BACKENDS.values() if backend.portable or not problem.traced)
        return next(backend for backend in every if backend.why_not(problem) is None)
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r} is unknown: choose auto, {', '.join(BACKENDS)}.")
    if reason := BACKENDS[name].why_not(problem):
        raise ConfigError(f"backend={name!r} cannot be used here: {reason}. backend='auto' picks one that can.")
    return BACKENDS[name]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, mask: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise InputError(f"{shapes}: all must be (batch, heads, tokens, dim).")
    expected = (feature_map.num_heads, feature_map.num_kv_heads, feature_map.head_dim)
    if query.shape[-1] != feature_map.head_dim or key.shape[-1] != feature_map.head_dim:
        raise InputError(f"{shapes}: the feature map was made for head_dim={feature_map.head_dim}.")
    if (query.shape[1], key.shape[1]) != expected[:2]:
        raise InputError(f"{shapes}: the feature map was made for {expected[0]} query and {expected[1]} kv heads.")
    if key.shape[:3] != value.shape[:3] or (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[2]):
        raise InputError(f"{shapes}: query, key and value need the same batch and tokens (past keys are in the state).")
    if not (query.dtype == key.dtype == value.dtype) or not query.dtype.is_floating_point:
        raise InputError(f"query {query.dtype}, key {key.dtype}, value {value.dtype}: one floating dtype is needed.")
    if mask is not None and mask.shape != (query.shape[0], query.shape[2]):
        raise InputError(f"key_mask {tuple(mask.shape)}: must be (batch, tokens) = {(query.shape[0], query.shape[2])}.")
    if mask is not None and mask.dtype.is_floating_point:
        raise InputError(f"key_mask has dtype {mask.dtype}: give booleans or integers, True or 1 for real tokens.")


def _non_finite(**tensors: Tensor) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""

    def total(x: Tensor) -> Tensor:  # a sum in another dtype copies the whole tensor first; only float16 overflows
        return x.detach().sum(dtype=torch.float32 if x.dtype == torch.float16 else None)

    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(total(x)))]
    return [name for name in bad if not bool(torch.isfinite(tensors[name]).all())]  # a sum may overflow by itself


def check_finite(**tensors: Tensor) -> None:
    """Raises NonFiniteError that names the tensors holding NaN or infinity."""
    if bad := _non_finite(**tensors):
        raise NonFiniteError(
            f"{' and '.join(bad)} hold NaN or infinity: the layers before this one have diverged; "
            "lower the learning rate or go back to the last checkpoint."
        )


class _Options(NamedTuple):
    """Arguments of `attention` that are not one per token."""

    feature_map: FeatureMap
    scaling: float | None
    is_causal: bool
    initial_state: AttentionState | None
    return_state: bool
    softcap: float | None
    backend: str
    parameters: FeatureParameters | None = None  # the feature map's, where they are made already


def _compute(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _pose(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, options: _Options
) -> tuple[Problem, tuple[Tensor, Tensor] | None]:
    """The checked problem with real tokens first, and the order (B, L) that put them there with its inverse, if any."""
    batch, heads, length, head_dim = query.shape
    feature_map, softcap = options.feature_map, options.softcap
    groups = feature_map.num_kv_heads
    scaling = head_dim**-0.5 if options.scaling is None else float(options.scaling)
    if not (math.isfinite(scaling) and scaling > 0):  # queries and keys are both multiplied by its square root
        raise InputError(f"scaling={scaling}: must be a finite number above 0.")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise InputError(f"softcap={softcap}: must be a finite number above 0, or None.")
    orders = None
    recorded = traced(query)
    lengths = torch.full((batch,), length, dtype=torch.int64, device=query.device)
    if key_mask is not None and (recorded or not bool(key_mask.all())):
        mask = key_mask.bool()
        order, inverse, lengths = compact(mask)
        orders = order, inverse
        pads = ~mask.gather(1, order)[:, None, :, None]
        query, key, value = (reorder(x, *orders).masked_fill(pads, 0) for x in (query, key, value))
    compute = _compute(query)
    state = AttentionState.expanded(feature_map.config, key, value, batch=batch, compute=compute)
    if options.initial_state is not None:
        state = check_state(options.initial_state, state, feature_map.config)
    problem = Problem(
        query=query.unflatten(1, (groups, heads // groups)),
        key=key,
        value=value,
        lengths=lengths,
        scaling=scaling,
        parameters=options.parameters or feature_map.parameters_for(compute),
        state=state,
        is_causal=options.is_causal,
        padded=orders is not None,
        softcap=softcap,
        fresh=options.initial_state is None,
        wants_state=options.return_state,
        traced=recorded,
    )
    return problem, orders


def _solve(problem: Problem, backend: str) -> tuple[Tensor, AttentionState]:
    chosen = _choose(backend, problem)
    if problem.query.numel() == 0:
        nothing = problem.query.new_zeros(*problem.query.shape[:-1], problem.value.shape[-1])
        return nothing, problem.state.select(torch.arange(len(problem.query), device=problem.query.device))
    if problem.traced:
        return chosen.function(problem)
    given = {"query": problem.query, "key": problem.key, "value": problem.value}
    if not chosen.watchful:
        check_finite(**given)
    output, state = chosen.function(problem)
    if not math.isfinite(output.view(-1)[0].item()) if chosen.watchful else _non_finite(output=output):
        check_finite(**given)
        raise NonFiniteError(
            "the output holds NaN or infinity although query, key and value do not: the feature map's parameters or "
            f"the initial state have diverged, or the logits exceed the range of {output.dtype}."
        )
    return output, state


def _attend(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, options: _Options
) -> tuple[Tensor, AttentionState]:
    problem, orders = _pose(query, key, value, key_mask, options)
    output, after = _solve(problem, options.backend)
    output = output.flatten(1, 2).to(query.dtype)
    return output if orders is None else reorder(output, *reversed(orders)), after


def _run(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, documents: Tensor | None, options: _Options
) -> tuple[Tensor, AttentionState | None]:
    """The whole operator on tensors that may be looked at, or in a trace."""
    if documents is None:
        return _attend(query, key, value, key_mask, options)
    check_documents(documents, query.shape[0], query.shape[2])
    if options.initial_state is not None or options.return_state:
        raise InputError("packed documents take and return no state: each would need one of its own.")
    solve = lambda q, k, v, mask: _attend(q, k, v, mask, options)[0]  # noqa: E731
    return apart(solve, query, key, value, key_mask, documents), None


_STATE = tuple(f.name for f in fields(AttentionState))
#: The tensors of a feature map's parameters.
_PARAMETERS = ("query_map", "key_map", "projection", "query_center", "key_center", "far_bias", "log_weight")


def _run_transformed(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, documents: Tensor | None, options: _Options
) -> tuple[Tensor, AttentionState | None]:
    """The whole operator as one for torch.func: every tensor that may be wrapped is an argument of it.

    What the feature map makes of M, balance and weights are products of torch, so their gradients need no rule.
    """
    parameters, state = options.feature_map.parameters_for(_compute(query)), options.initial_state
    maps = [getattr(parameters, name) for name in _PARAMETERS]
    sums = [None if state is None else getattr(state, name) for name in _STATE]

    def function(*given: Tensor | None) -> tuple[Tensor, ...]:
        (q, k, v, mask, numbers), rest = given[:5], given[5:]
        assert q is not None and k is not None and v is not None
        before: dict[str, Any] = dict(zip(_STATE, rest[: len(_STATE)], strict=True))
        made: dict[str, Any] = dict(zip(_PARAMETERS, rest[len(_STATE) :], strict=True))
        plain = options._replace(
            initial_state=None if state is None else AttentionState(**before),
            parameters=parameters._replace(**made, cache=None),
        )
        output, after = _run(q, k, v, mask, numbers, plain)
        if not options.return_state:
            return (output,)
        return output, *(getattr(after, name) for name in _STATE)

    constants = [1 + _STATE.index(name) for name in ("count", "log_scale")] if options.return_state else []
    plain = functional.Plain(function, 5 + len(_STATE), tuple(constants))
    output, *after = functional.apply(plain, query, key, value, key_mask, documents, *sums, *maps)
    return output, AttentionState(*after) if options.return_state else None


def _full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, where it is on: a trace would hold the switch."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    scaling: float | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = True,
    initial_state: AttentionState | None = None,
    return_state: bool = False,
    softcap: float | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionState]:
    """Random-feature attention with an exact window and exact sinks, under one normaliser, in O(L).

    out_t = (Σ_{j∈E(t)} e^{s·q_tᵀk_j} v_j + φ(q_t)ᵀ S_t) / (the same with 1 for v), E(t) the last `window` keys and the
    first `sinks` keys of the document, S_t the features of all the keys between. `window=0, sinks=0` is the paper's
    form Φ(Q)(Φ(K)ᵀV) / Φ(Q)(Φ(K)ᵀ1). Bidirectional: |t-j| < window is exact, everything else far.
    Positions count real tokens: padding anywhere changes nothing, and its gradient is exactly zero.

    Args:
        query: (B, H, L, d) after rotary embedding, before scaling; float64, float32, bfloat16 or float16.
        key: (B, G, L, d), H a multiple of G.
        value: (B, G, L, d_v).
        feature_map: owns M, Ω, centres, balance and the configuration; from `darkformer.feature_map`.
        scaling: the logits' factor s; default d^-½.
        key_mask: (B, L), True or 1 for real tokens. Pads may be anywhere and hold anything, NaN included.
        is_causal: False for bidirectional attention.
        initial_state: what an earlier call returned: L more tokens after those (causal only).
        return_state: also return the state after the last token.
        softcap: c that the exact part's logits are capped with, c·tanh(logit / c). Features are not capped.
        documents: (B, L) integers that rise along a row: tokens of one number attend to each other only (no states).
        backend: `auto`, or one of `darkformer.ops.attention.BACKENDS`; a forced one that cannot raises.

    Returns:
        (B, H, L, d_v) in the query's dtype, zero at pads; with `return_state` a tuple with an `AttentionState`,
        whose sums are float32 (float64 for float64 inputs) whatever the inputs' dtype.

    Raises:
        InputError: shapes, dtypes, masks or states that do not fit. NonFiniteError: NaN or infinity at a real token.
        ConfigError: unknown or impossible backend. DerivativeError: forward-mode differentiation, or second derivatives
            under torch.func.
    """
    _check_shapes(query, key, value, feature_map, key_mask)
    if not is_causal and (initial_state is not None or return_state):
        raise InputError("a state exists for causal attention only: is_causal=False takes and returns none.")
    if initial_state is not None and not isinstance(initial_state, AttentionState):
        raise InputError(f"initial_state is a {type(initial_state).__name__}: give an earlier call's AttentionState.")
    options = _Options(feature_map, scaling, is_causal, initial_state, return_state, softcap, backend)
    run, device = _run_transformed if transformed() else _run, query.device.type
    with _full_precision(device):
        output, after = run(query, key, value, key_mask, documents, options)
    if not return_state:
        return output
    assert after is not None
    return output, after
