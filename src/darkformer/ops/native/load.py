"""The compiled library as Python functions on tensors: `forward` and `backward`."""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import NonFiniteError, OutOfMemoryError
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
        "B G R d d_v m r window sinks bf16 threads head",
        {"q_strides": 2, "k_strides": 2, "v_strides": 2},
        "scaling softcap",
        "omp_parallel q k v map_q offset_q map_k offset_k feature_values feature_sum log_scale "
        "recent_k recent_v sink_k sink_v counts out",
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


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def _call(inputs: Inputs, options: Options, others: dict[str, Tensor]) -> tuple[Call, list[Tensor]]:
    """The structure with inputs and `others` (contiguous, by field), and the tensors that must live as long as it."""
    query, key, value = (_last_stride_one(x) for x in inputs[:3])
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
            tensors[name] = x.contiguous()
    for name, x in tensors.items():
        setattr(call, name, x.data_ptr())
    return call, list(tensors.values())


def empty_outputs(inputs: Inputs, options: Options) -> Outputs:
    """What `forward` fills."""
    query, value = inputs.query, inputs.value
    state = (*query.shape[:2], options.features)
    sums = state if options.wants_state else (0,)
    return Outputs(
        output=query.new_empty(*query.shape[:-1], value.shape[-1]),
        log_normalizer=query.new_empty(query.shape[:-1], dtype=torch.float32),
        feature_values=query.new_empty(*sums, value.shape[-1], dtype=torch.float32),
        feature_sum=query.new_empty(sums, dtype=torch.float32),
        log_scale=query.new_empty(state, dtype=torch.float32),
    )


def forward(inputs: Inputs, options: Options) -> Outputs:
    """The forward pass.

    Raises:
        NonFiniteError: a number of a query, key, value, map, the state or the output is not finite.
        OutOfMemoryError: there is no memory to work in.
    """
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
        OutOfMemoryError: there is no memory to work in.
    """
    gradients = {}
    for field, name in GRADIENTS.items():
        if maps or field not in MAPS:
            allocate = torch.zeros_like if field in _SPARSE else torch.empty_like
            gradients[name] = allocate(getattr(inputs, field), memory_format=torch.contiguous_format)
    saved = {
        "lse": log_normalizer, "log_scale_out": log_scale, "d_out": grad_output.to(inputs.query.dtype),
        "d_feature_values_out": grad_values, "d_feature_sum_out": grad_sum,
    }  # fmt: skip
    call, alive = _call(inputs, options, gradients | {name: x.contiguous() for name, x in saved.items()})
    status = library().darkformer_backward(ctypes.byref(call))
    del alive
    check(status)
    return [gradients.get(name) for name in GRADIENTS.values()]
