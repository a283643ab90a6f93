"""The library as Python functions on tensors: `forward` and `backward`."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import BuildError, build

_INTEGERS = ("B", "G", "R", "L", "d", "dv", "m", "r", "window", "sinks", "bf16", "threads")
_INPUTS = ("wq", "offq", "wk", "offk", "values", "total", "scale", "recent_k", "recent_v", "sink_k", "sink_v")
_POINTERS = (
    "parallel", "splits", "bad", "q", "k", "v", *_INPUTS, "lengths", "count", "foldq", "foldk",
    "out", "lse", "values_out", "total_out", "scale_out", "grad_out", "grad_values", "grad_total",
    "dq", "dk", "dvalue", "dwq", "doffq", "dwk", "doffk", "dvalues", "dtotal",
    "d_recent_k", "d_recent_v", "d_sink_k", "d_sink_v", "dfoldq", "dfoldk",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of common.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("qs", ctypes.c_int64 * 4), ("ks", ctypes.c_int64 * 3), ("vs", ctypes.c_int64 * 3),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of one call. Maps: ℓ = P·x - a - ½‖N·x - b‖² with [P; N] = `wq`, [a; b] = `offq`; keys alike.

    With folds (rows i, c, u): ℓ = P·x + uᵀx - a - ½‖y‖² with y = i·(P·x) - c over the first d rows, which `maps.pack`
    makes where those rows, each times its i, are a turned N.
    """

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    wq: Tensor  # (G, m + r, d) float32
    offq: Tensor  # (G, m + r)
    wk: Tensor
    offk: Tensor
    values: Tensor  # (B, G, m, d_v) float32: the state's sums; all three empty before the first token
    total: Tensor  # (B, G, m)
    scale: Tensor  # (B, G, m)
    recent_k: Tensor  # (B, G, W, d)
    recent_v: Tensor
    sink_k: Tensor  # (B, G, sinks, d)
    sink_v: Tensor
    lengths: Tensor  # (B,) int64
    counts: Tensor
    foldq: Tensor  # (G, 3, d), or (G, 0, d) without
    foldk: Tensor


class Sizes(NamedTuple):
    features: int
    scaling: float
    keeps: bool  # whether the sums after the last token are wanted; their scale always is, by the backward pass


splits = ctypes.c_int64(0)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built if need be.

    Raises:
        BuildError: it cannot be built, or the file is not a library for this machine.
    """
    path = build()
    try:
        found = ctypes.CDLL(str(path))
        size = found.darkformer_call_size()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded ({error}); delete it, or run `darkformer native build`") from error
    if size != ctypes.sizeof(_Call):
        raise BuildError(f"{path} was made for another interface ({size} bytes, not {ctypes.sizeof(_Call)})")
    return found


@functools.cache
def pool() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are there already."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def _plain(x: Tensor) -> Tensor:
    """Any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def _call(inputs: Inputs, sizes: Sizes, **results: Tensor) -> tuple[_Call, list[Tensor]]:
    """The structure, and the tensors that must live as long as it."""
    query, key, value = _plain(inputs.query), _plain(inputs.key), _plain(inputs.value)
    call = _Call()
    call.B, call.G, call.R, call.L, call.d = query.shape
    call.dv, call.m, call.r = value.shape[-1], sizes.features, inputs.wq.shape[1] - sizes.features
    call.window, call.sinks = inputs.recent_k.shape[2], inputs.sink_k.shape[2]
    call.bf16, call.threads = query.dtype == torch.bfloat16, torch.get_num_threads()
    call.scaling, call.parallel, call.splits = sizes.scaling, pool(), ctypes.addressof(splits)
    call.qs[:], call.ks[:], call.vs[:] = query.stride()[:4], key.stride()[:3], value.stride()[:3]
    tensors: dict[str, Any] = {"q": query, "k": key, "v": value}
    folds = ("foldq", "foldk") if inputs.foldq.numel() else ()
    plain = {name: getattr(inputs, name).contiguous() for name in (*_INPUTS, "lengths", *folds)}
    plain["count"] = inputs.counts.contiguous()
    for name, x in (tensors | plain | results).items():
        setattr(call, name, x.data_ptr())
    return call, [*tensors.values(), *plain.values(), *results.values()]


def empty_results(inputs: Inputs, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, not yet filled."""
    query, value = inputs.query, inputs.value
    sums = (*query.shape[:2], sizes.features)
    kept = sums if sizes.keeps else (0,)
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
        query.new_empty(*kept, value.shape[-1], dtype=torch.float32),
        query.new_empty(kept, dtype=torch.float32),
        query.new_empty(sums, dtype=torch.float32),
    )


def forward(inputs: Inputs, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (B, G, R, L, d_v) in the inputs' dtype, log-normaliser (B, G, R, L), the sums after the last token.

    The output is NaN throughout if a query, key, value, map, sum of the state or number of the output is not finite.
    """
    results = out, lse, values, total, scale = empty_results(inputs, sizes)
    call, alive = _call(inputs, sizes, out=out, lse=lse, values_out=values, total_out=total, scale_out=scale)
    bad = ctypes.c_int64(0)
    call.bad = ctypes.addressof(bad)
    library().darkformer_forward(ctypes.byref(call))
    del alive
    if bad.value:
        out.fill_(math.nan)
    return results


#: The gradients, by the field of `Inputs` that they belong to, in its order.
GRADIENTS = {
    "query": "dq", "key": "dk", "value": "dvalue", "wq": "dwq", "offq": "doffq", "wk": "dwk", "offk": "doffk",
    "values": "dvalues", "total": "dtotal", "recent_k": "d_recent_k", "recent_v": "d_recent_v",
    "sink_k": "d_sink_k", "sink_v": "d_sink_v", "foldq": "dfoldq", "foldk": "dfoldk",
}  # fmt: skip
#: The maps among them.
MAPS = ("wq", "offq", "wk", "offk", "foldq", "foldk")
#: Of these the library writes what is not 0.
_SPARSE = ("recent_k", "recent_v", "sink_k", "sink_v")


def backward(
    inputs: Inputs,
    sizes: Sizes,
    scale_after: Tensor,
    log_normaliser: Tensor,
    grad_output: Tensor,
    grad_values: Tensor,
    grad_total: Tensor,
    *,
    maps: bool = True,
) -> list[Tensor | None]:
    """Gradients in the order of `GRADIENTS`.

    Args:
        maps: whether those of the maps and folds are wanted, a sixth of the time; else None stands for them.
    """

    def made(field: str) -> Tensor:
        make = torch.zeros_like if field in _SPARSE else torch.empty_like
        return make(getattr(inputs, field), memory_format=torch.contiguous_format)

    results = {name: made(field) for field, name in GRADIENTS.items() if maps or field not in MAPS}
    given = {
        "lse": log_normaliser, "scale_out": scale_after,
        "grad_out": grad_output.to(inputs.query.dtype), "grad_values": grad_values, "grad_total": grad_total,
    }  # fmt: skip
    call, alive = _call(inputs, sizes, **results, **{name: x.contiguous() for name, x in given.items()})
    library().darkformer_backward(ctypes.byref(call))
    del alive
    return [results.get(name) for name in GRADIENTS.values()]
