"""The public door: check → choose → run. Every check of tensors is written here, once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, NonFiniteError
from ..features.affine import TENSOR_FIELDS, FeatureParameters
from ..features.feature_map import FeatureMap
from ..features.tracing import traced, transformed
from . import torch_func
from .assembled import assembled
from .assembled import why_not as _why_not_assembled
from .chunked import chunked
from .exact import exact
from .native import native
from .native import why_not as _why_not_native
from .packing import check_documents, separately
from .recurrent import recurrent
from .reference import reference
from .state import (
    AttentionState,
    KeyValueState,
    Problem,
    State,
    check_state,
    compact,
    compute_dtype,
    non_finite,
    reorder,
)


class Backend(NamedTuple):
    """A way to compute the same numbers. `why_not` says why it cannot take a problem, or None if it can.

    checks_finite: it checks its inputs and its output itself, and raises NonFiniteError without saying which it was.
    portable: it consists of torch's own operators, so that a program traced from it runs without this library.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    function: Callable[[Problem], tuple[Tensor, State]]
    checks_finite: bool = False
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


#: In order of preference; `auto` takes the first without a reason against it, and ends at `chunked`: the last two are
#: taken by name only.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("exact", _why_not_exact, exact),
        Backend("recurrent", _why_not_recurrent, recurrent),
        Backend("native", _why_not_native, native, checks_finite=True, portable=False),
        Backend("chunked", _why_not_chunked, chunked),
        Backend("assembled", _why_not_assembled, assembled),
        Backend("reference", _why_not_reference, reference),
    )
}


def _choose(name: str, problem: Problem) -> Backend:
    if name == "auto":
        candidates = (backend for backend in BACKENDS.values() if backend.portable or not problem.traced)
        return next(backend for backend in candidates if backend.why_not(problem) is None)
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r} is unknown: choose auto, {', '.join(BACKENDS)}.")
    if reason := BACKENDS[name].why_not(problem):
        raise ConfigError(f"backend={name!r} cannot be used here: {reason}. backend='auto' picks one that can.")
    return BACKENDS[name]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, mask: Tensor | None) -> None:
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


def check_finite(**tensors: Tensor) -> None:
    """Raises NonFiniteError that names the tensors holding NaN or infinity."""
    if bad := non_finite(**tensors):
        raise NonFiniteError(
            f"{' and '.join(bad)} hold NaN or infinity: the layers before this one have diverged; "
            "lower the learning rate or go back to the last checkpoint."
        )


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: FeatureParameters,
    *,
    scaling: float,
    key_mask: Tensor | None = None,
    is_causal: bool = True,
    initial_state: State | None = None,
    return_state: bool = False,
    softcap: float | None = None,
) -> tuple[Problem, tuple[Tensor, Tensor] | None]:
    """What a backend receives, real tokens first, and the order (B, L) that put them there with its inverse, if any."""
    batch, heads, length, _ = query.shape
    recorded, orders = traced(query), None
    lengths = torch.full((batch,), length, dtype=torch.int64, device=query.device)
    if key_mask is not None and (recorded or not bool(key_mask.all())):
        mask = key_mask.bool()
        order, inverse, lengths = compact(mask)
        orders = order, inverse
        pads = ~mask.gather(1, order)[:, None, :, None]
        query, key, value = (reorder(x, *orders).masked_fill(pads, 0) for x in (query, key, value))
    kind = KeyValueState if parameters.config.method == "exact" else AttentionState
    state: State = kind.expanded(parameters.config, key, value, batch=batch, compute=compute_dtype(query))
    if initial_state is not None:
        state = check_state(initial_state, state)
    problem = Problem(
        query=query.unflatten(1, (key.shape[1], heads // key.shape[1])),
        key=key,
        value=value,
        lengths=lengths,
        scaling=scaling,
        parameters=parameters,
        state=state,
        is_causal=is_causal,
        padded=orders is not None,
        softcap=softcap,
        fresh=initial_state is None,
        wants_state=return_state,
        traced=recorded,
    )
    return problem, orders


def _run(backend: Backend, problem: Problem) -> tuple[Tensor, State]:
    if problem.query.numel() == 0:
        output = problem.query.new_zeros(*problem.query.shape[:-1], problem.value.shape[-1])
        return output, problem.state.select(torch.arange(len(problem.query), device=problem.query.device))
    if problem.traced:
        return backend.function(problem)
    inputs = {"query": problem.query, "key": problem.key, "value": problem.value}
    if not backend.checks_finite:
        check_finite(**inputs)
    try:
        output, state = backend.function(problem)
        finite = backend.checks_finite or not non_finite(output=output)
    except NonFiniteError:
        finite = False
    if not finite:
        check_finite(**inputs)
        raise NonFiniteError(
            "the output holds NaN or infinity although query, key and value do not: the feature map's parameters or "
            f"the initial state have diverged, or the logits exceed the range of {problem.query.dtype}."
        )
    return output, state


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: FeatureParameters,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str,
    **options: Any,
) -> tuple[Tensor, State | None]:
    """`attention` after its checks: choose and run, for tensors that may be read, or in a trace."""
    if documents is not None:
        check_documents(documents, query.shape[0], query.shape[2])

        def solve(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return _attend(q, k, v, parameters, key_mask=mask, backend=backend, **options)[0]

        return separately(solve, query, key, value, key_mask, documents), None
    problem, orders = problem_of(query, key, value, parameters, key_mask=key_mask, **options)
    output, state = _run(_choose(backend, problem), problem)
    output = output.flatten(1, 2).to(query.dtype)
    return output if orders is None else reorder(output, *reversed(orders)), state


def _attend_under_transforms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: FeatureParameters,
    *,
    key_mask: Tensor | None,
    documents: Tensor | None,
    initial_state: State | None,
    return_state: bool,
    **options: Any,
) -> tuple[Tensor, State | None]:
    """`_attend` as one operator for torch.func: every tensor that may be wrapped is an argument of it.

    M, balance and weights reach the parameters through products of torch, so their gradients need no rule.
    """
    kind = KeyValueState if parameters.config.method == "exact" else AttentionState
    names = [f.name for f in fields(kind)]
    state = [None if initial_state is None else getattr(initial_state, name) for name in names]

    def function(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        (q, k, v, mask, numbers), rest = tensors[:5], tensors[5:]
        assert q is not None and k is not None and v is not None
        before: dict[str, Any] = dict(zip(names, rest[: len(names)], strict=True))
        learned: dict[str, Any] = dict(zip(TENSOR_FIELDS, rest[len(names) :], strict=True))
        output, after = _attend(
            q, k, v, parameters._replace(**learned, cache=None), key_mask=mask, documents=numbers,
            initial_state=None if initial_state is None else kind(**before), return_state=return_state, **options,
        )  # fmt: skip
        return (output, *(getattr(after, name) for name in names)) if return_state else (output,)

    without_gradient = [i for i, name in enumerate(names, 1) if name in ("count", "log_scale")] if return_state else []
    operator = torch_func.Operator(function, 5 + len(names), tuple(without_gradient))
    learned = [getattr(parameters, name) for name in TENSOR_FIELDS]
    output, *after = torch_func.apply(operator, query, key, value, key_mask, documents, *state, *learned)
    return output, kind(*after) if return_state else None


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
    initial_state: State | None = None,
    return_state: bool = False,
    softcap: float | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Any]:
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
        whose sums are float32 (float64 for float64 inputs) whatever the inputs' dtype. Method `exact` has a
        `darkformer.ops.state.KeyValueState`, which grows.

    Raises:
        InputError: shapes, dtypes, masks or states that do not fit. NonFiniteError: NaN or infinity at a real token.
        ConfigError: unknown or impossible backend. DerivativeError: forward-mode differentiation, or second derivatives
            under torch.func.
    """
    _check_tensors(query, key, value, feature_map, key_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not (math.isfinite(scaling) and scaling > 0):  # queries and keys are both multiplied by its square root
        raise InputError(f"scaling={scaling}: must be a finite number above 0.")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise InputError(f"softcap={softcap}: must be a finite number above 0, or None.")
    if not is_causal and (initial_state is not None or return_state):
        raise InputError("a state exists for causal attention only: is_causal=False takes and returns none.")
    if initial_state is not None and not isinstance(initial_state, AttentionState | KeyValueState):
        raise InputError(f"initial_state is a {type(initial_state).__name__}: give an earlier call's AttentionState.")
    run: Callable[..., tuple[Tensor, State | None]] = _attend
    if transformed():
        run = _attend_under_transforms
    if documents is not None and (initial_state is not None or return_state):
        raise InputError("packed documents take and return no state: each would need one of its own.")
    with _full_precision(query.device.type):
        output, state = run(
            query, key, value, feature_map.parameters_for(compute_dtype(query)), scaling=scaling, key_mask=key_mask,
            is_causal=is_causal, initial_state=initial_state, return_state=return_state, softcap=softcap,
            documents=documents, backend=backend,
        )  # fmt: skip
    if not return_state:
        return output
    assert state is not None
    return output, state
