"""The compiled library as Python functions on tensors: `forward` and `backward`."""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, NonFiniteError, OutOfMemoryError
from ..state import LARGEST_COUNT, OVERFLOW
from .build import BuildError, build


class Status(IntEnum):
    """What a kernel returns; `Status` of csrc/call.h."""

    OK = 0
    NON_FINITE_INPUT = 1  # from a step only
    NON_FINITE = 2
    OUT_OF_MEMORY = 3


def _fields(integers: str, strides: dict[str, int], numbers: str, pointers: str) -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_int64 * count) for name, count in strides.items()),
        *((name, ctypes.c_double) for name in numbers.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class Call(ctypes.Structure):
    """`Call` of csrc/call.h, which says what the fields are."""

    _fields_ = [
        *_fields(
            "B G R L d d_v m r window sinks bf16 threads",
            {"q_strides": 4, "k_strides": 3, "v_strides": 3},
            "scaling",
            "omp_parallel splits q k v map_q offset_q map_k offset_k fold_q fold_k "
            "feature_values feature_sum log_scale recent_k recent_v sink_k sink_v lengths counts "
            "out lse feature_values_out feature_sum_out log_scale_out d_out d_feature_values_out d_feature_sum_out "
            "dq dk dv d_map_q d_offset_q d_map_k d_offset_k d_fold_q d_fold_k d_feature_values d_feature_sum "
            "d_recent_k d_recent_v d_sink_k d_sink_v",
        ),
        ("status", ctypes.c_int64),
    ]


class StepCall(ctypes.Structure):
    """`StepCall` of csrc/call.h."""

    _fields_ = _fields(
        "B G R d d_v m r window sinks bf16 threads head slot_bytes",
        {"q_strides": 2, "k_strides": 2, "v_strides": 2},
        "scaling softcap",
        "omp_parallel q k v map_q offset_q map_k offset_k feature_values feature_sum log_scale "
        "recent_k recent_v sink_k sink_v counts out slots",
    )


#: Structures, and the functions that return the library's own size of them.
_SIZES: dict[str, type[ctypes.Structure]] = {
    "darkformer_call_size": Call,
    "darkformer_step_call_size": StepCall,
}


class Inputs(NamedTuple):
    """The tensors of one call; but for the first three under the names of `Call`.

    Maps: ℓ = P·x - a - ½‖N·x - b‖² with [P; N] = `map_q`, [a; b] = `offset_q`; keys alike. With folds (rows i, c, u):
    ℓ = P·x + uᵀx - a - ½‖y‖² with y = i·(P·x) - c over the first d rows, which `maps.pack` makes where those rows, each
    times its i, are a rotation of N.
    """

    query: Tensor  # (B, G, R, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    map_q: Tensor  # (G, m + r, d) float32
    offset_q: Tensor  # (G, m + r)
    map_k: Tensor
    offset_k: Tensor
    feature_values: Tensor  # (B, G, m, d_v) float32: of the state; all three empty before the first token
    feature_sum: Tensor  # (B, G, m)
    log_scale: Tensor  # (B, G, m)
    recent_k: Tensor  # (B, G, W, d)
    recent_v: Tensor
    sink_k: Tensor  # (B, G, sinks, d)
    sink_v: Tensor
    lengths: Tensor  # (B,) int64, real tokens
    counts: Tensor  # (B,) int64, tokens before this call
    fold_q: Tensor  # (G, 3, d), or (G, 0, d) without
    fold_k: Tensor


class Options(NamedTuple):
    """What a call has besides tensors."""

    features: int
    scaling: float
    wants_state: bool  # else only the log_scale after the last token is computed, which the backward pass needs


class Outputs(NamedTuple):
    """What `forward` returns. The sums after the last token are empty unless wanted."""

    output: Tensor  # (B, G, R, L, d_v) in the inputs' dtype
    log_normalizer: Tensor  # (B, G, R, L) float32
    feature_values: Tensor  # (B, G, m, d_v) float32
    feature_sum: Tensor  # (B, G, m)
    log_scale: Tensor  # (B, G, m)


#: Queries, keys and maps must be smaller: sums of products of two of them are finite then. As in csrc/call.h.
LARGEST_NUMBER = 2.0**59
#: Chunks that were split so far because a row's normaliser underflowed.
splits = ctypes.c_int64(0)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built if need be.

    Raises:
        BuildError: it cannot be built, or the file is not a library for this machine and these structures.
    """
    path = build()
    try:
        loaded = ctypes.CDLL(str(path))
        sizes = {name: getattr(loaded, name)() for name in _SIZES}
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded ({error}); delete it, or run `darkformer native build`") from error
    for name, structure in _SIZES.items():
        if sizes[name] != ctypes.sizeof(structure):
            raise BuildError(
                f"{path} was made for another interface ({structure.__name__} has {sizes[name]} bytes, "
                f"not {ctypes.sizeof(structure)})"
            )
    return loaded


@functools.cache
def omp_parallel() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded, so that its threads do the work; None without one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def check(status: int, non_finite: str = "a number is not finite.") -> None:
    """Raises the error that a kernel's status stands for; `non_finite` is the message of NonFiniteError."""
    if status == Status.OUT_OF_MEMORY:
        raise OutOfMemoryError("the native attention could not allocate its working memory: use shorter pieces.")
    if status != Status.OK:
        raise NonFiniteError(non_finite)


def as_memory(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, strided: bool = False) -> Tensor:
    """The tensor as the library reads it: contiguous, every number in memory as it is.

    Args:
        name: for the message.
        strided: only the last dimension has to be contiguous.

    Raises:
        InputError: another shape, dtype or device, or a tensor without memory of its own.
    """
    if x.shape != shape or x.dtype != dtype or not x.is_cpu or x.layout != torch.strided:
        raise InputError(
            f"the native attention was passed {name} as {tuple(x.shape)} {x.dtype} on {x.device} ({x.layout}); it "
            f"needs {tuple(shape)} {dtype} on the CPU."
        )
    if x.is_neg():  # of some views torch keeps the sign beside the memory
        x = x.resolve_neg()
    if not x.is_contiguous() and not (strided and x.stride(-1) == 1):
        x = x.contiguous()
    if not x.data_ptr() and x.numel():
        raise InputError(f"the native attention was passed {name} as a tensor without memory: clone it first.")
    return x


def _checked(inputs: Inputs, options: Options) -> Inputs:
    """The inputs as the library reads them.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together, or counts that no sequence has.
    """
    query, m = inputs.query, options.features
    if query.dim() != 5 or query.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"the native attention was passed query as {tuple(query.shape)} {query.dtype}.")
    if any(x.dim() != n for x, n in ((inputs.value, 4), (inputs.map_q, 3), (inputs.recent_k, 4), (inputs.sink_k, 4))):
        raise InputError("the native attention was passed a value, a map, a window or sinks of the wrong dimension.")
    (batch, groups, _, length, d), d_v = query.shape, inputs.value.shape[-1]
    rows, window, sinks = inputs.map_q.shape[1], inputs.recent_k.shape[2], inputs.sink_k.shape[2]
    if not 0 <= m <= rows:
        raise InputError(f"the native attention was passed maps of {rows} rows for {m} features.")
    shapes: dict[str, tuple[int, ...]] = dict(
        query=query.shape, key=(batch, groups, length, d), value=(batch, groups, length, d_v),
        map_q=(groups, rows, d), offset_q=(groups, rows), map_k=(groups, rows, d), offset_k=(groups, rows),
        feature_values=(batch, groups, m, d_v), feature_sum=(batch, groups, m), log_scale=(batch, groups, m),
        recent_k=(batch, groups, window, d), recent_v=(batch, groups, window, d_v),
        sink_k=(batch, groups, sinks, d), sink_v=(batch, groups, sinks, d_v), lengths=(batch,), counts=(batch,),
        fold_q=(groups, 3, d), fold_k=(groups, 3, d),
    )  # fmt: skip
    absent: set[str] = set()
    if not any(x.numel() for x in inputs[7:10]):
        absent |= {"feature_values", "feature_sum", "log_scale"}
    if not (inputs.fold_q.numel() or inputs.fold_k.numel()):
        absent |= {"fold_q", "fold_k"}
    elif m < d or rows != m + d:
        raise InputError(f"the native attention was passed folds for {m} features and maps of {rows} rows.")
    checked = Inputs._make(
        x if name in absent else as_memory(name, x, shapes[name], dtype, strided=name in ("query", "key", "value"))
        for name, x, dtype in zip(Inputs._fields, inputs, _dtypes(query.dtype), strict=True)
    )
    lengths, counts = checked.lengths.tolist(), checked.counts.tolist()
    if not all(0 <= n <= length for n in lengths) or not all(0 <= n <= LARGEST_COUNT for n in counts):
        raise InputError(f"the native attention was passed lengths {lengths} of {length} tokens after counts {counts}.")
    return checked


@functools.cache
def _dtypes(own: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtype of every input of a call whose queries have dtype `own`."""
    like_query = ("query", "key", "value", "recent_k", "recent_v", "sink_k", "sink_v")
    return tuple(
        own if name in like_query else torch.int64 if name in ("lengths", "counts") else torch.float32
        for name in Inputs._fields
    )


def _call(inputs: Inputs, options: Options, others: dict[str, Tensor]) -> tuple[Call, list[Tensor]]:
    """The structure with checked inputs and `others` (contiguous, by field), and the tensors that it points to."""
    query, key, value = inputs[:3]
    call = Call()
    call.B, call.G, call.R, call.L, call.d = query.shape
    call.d_v, call.m, call.r = value.shape[-1], options.features, inputs.map_q.shape[1] - options.features
    call.window, call.sinks = inputs.recent_k.shape[2], inputs.sink_k.shape[2]
    call.bf16, call.threads = query.dtype == torch.bfloat16, torch.get_num_threads()
    call.scaling, call.omp_parallel, call.splits = options.scaling, omp_parallel(), ctypes.addressof(splits)
    call.q_strides[:], call.k_strides[:], call.v_strides[:] = query.stride()[:4], key.stride()[:3], value.stride()[:3]
    tensors = {"q": query, "k": key, "v": value, **others}
    for name, x in zip(Inputs._fields[3:], inputs[3:], strict=True):
        if x.numel() or not name.startswith("fold"):
            tensors[name] = x
    for name, x in tensors.items():
        setattr(call, name, x.data_ptr())
    return call, list(tensors.values())


def _output_shapes(inputs: Inputs, options: Options) -> tuple[tuple[int, ...], ...]:
    """The shapes of `Outputs`."""
    query, value = inputs.query, inputs.value
    state = (*query.shape[:2], options.features)
    sums = state if options.wants_state else (0,)
    return (*query.shape[:-1], value.shape[-1]), tuple(query.shape[:-1]), (*sums, value.shape[-1]), sums, state


def empty_outputs(inputs: Inputs, options: Options) -> Outputs:
    """What `forward` fills."""
    output, *others = _output_shapes(inputs, options)
    empty = inputs.query.new_empty
    return Outputs(empty(output), *(empty(shape, dtype=torch.float32) for shape in others))


def forward(inputs: Inputs, options: Options) -> Outputs:
    """The forward pass.

    Raises:
        NonFiniteError: a number of a query, key, value, map, the state or the output is not finite.
        InputError: see `_checked`. OutOfMemoryError: there is no memory to work in.
    """
    inputs = _checked(inputs, options)
    outputs = output, log_normalizer, values, total, log_scale = empty_outputs(inputs, options)
    call, alive = _call(inputs, options, {
        "out": output, "lse": log_normalizer,
        "feature_values_out": values, "feature_sum_out": total, "log_scale_out": log_scale,
    })  # fmt: skip
    status = library().darkformer_forward(ctypes.byref(call))
    del alive
    check(status, "query, key, value, the feature map, the state or the output hold NaN or infinity.")
    return outputs


#: The gradients, by the field of `Inputs` that they belong to, in its order.
GRADIENTS = {
    "query": "dq", "key": "dk", "value": "dv",
    "map_q": "d_map_q", "offset_q": "d_offset_q", "map_k": "d_map_k", "offset_k": "d_offset_k",
    "feature_values": "d_feature_values", "feature_sum": "d_feature_sum",
    "recent_k": "d_recent_k", "recent_v": "d_recent_v", "sink_k": "d_sink_k", "sink_v": "d_sink_v",
    "fold_q": "d_fold_q", "fold_k": "d_fold_k",
}  # fmt: skip
#: The maps among them.
MAPS = ("map_q", "offset_q", "map_k", "offset_k", "fold_q", "fold_k")
#: Those of which the library writes only what is not 0.
_SPARSE = ("recent_k", "recent_v", "sink_k", "sink_v")


def backward(
    inputs: Inputs,
    options: Options,
    log_scale: Tensor,
    log_normalizer: Tensor,
    grad_output: Tensor,
    grad_values: Tensor,
    grad_sum: Tensor,
    *,
    maps: bool = True,
) -> list[Tensor | None]:
    """Gradients in the order of `GRADIENTS`.

    Args:
        log_scale, log_normalizer: as `forward` returned them.
        grad_output, grad_values, grad_sum: gradients of `forward`'s output and sums.
        maps: whether gradients of the maps and folds are wanted, a sixth of the time; else None stands for them.

    Raises:
        InputError: see `_checked`. OutOfMemoryError: there is no memory to work in. NonFiniteError: a gradient is not
            finite although `grad_output`, `grad_values` and `grad_sum` are.
    """
    inputs = _checked(inputs, options)
    names = ("d_out", "lse", "d_feature_values_out", "d_feature_sum_out", "log_scale_out")
    saved = (grad_output.to(inputs.query.dtype), log_normalizer, grad_values, grad_sum, log_scale)
    dtypes = (inputs.query.dtype, *[torch.float32] * 4)
    others = {
        name: as_memory(name, x, shape, dtype)
        for name, x, shape, dtype in zip(names, saved, _output_shapes(inputs, options), dtypes, strict=True)
    }
    gradients = {}
    for field, name in GRADIENTS.items():
        if maps or field not in MAPS:
            allocate = torch.zeros_like if field in _SPARSE else torch.empty_like
            gradients[name] = allocate(getattr(inputs, field), memory_format=torch.contiguous_format)
    call, alive = _call(inputs, options, gradients | others)
    status = library().darkformer_backward(ctypes.byref(call))
    del alive
    # Scaled losses overflow by design, and whoever scaled them looks at the gradients.
    if status != Status.NON_FINITE or all(bool(x.isfinite().all()) for x in (grad_output, grad_values, grad_sum)):
        check(status, OVERFLOW.format(inputs.query.dtype))
    return [gradients.get(name) for name in GRADIENTS.values()]
