"""Backend `native`: fused C++ on the CPU, built on first use. docs/native.md says how, and how to switch it off."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...features.feature_map import FeatureMap
from ...features.tracing import traced, transformed
from ..state import AttentionState, Problem, State, next_buffers
from . import load
from .build import BuildError, build, cache_folder, check_compiler, compiler, instruction_set, library_path, report
from .maps import pack
from .step import Step

__all__ = ["Step", "build", "native", "release", "splits", "status", "stepper", "unavailable", "why_not"]

METHODS = ("dark", "performer", "lfk", "local")
LIMITS = {"head dimension": 512, "number of features": 2048, "window": 8192}


def native(problem: Problem) -> tuple[Tensor, State]:
    """Attention in time linear in L, forward and backward, which recomputes what it needs from the inputs.

    Returns:
        output (B, G, R, L, d_v) in the inputs' dtype, zero at pads, and the state after the last token, or the one that
        came with the problem if that is not wanted.

    Raises:
        NonFiniteError: a number of an input, a parameter, the state or the output is not finite; it does not say which.
    """
    from .op import attend

    state, config = problem.state, problem.config
    batch, groups, tokens, head_dim = problem.key.shape
    total_tokens = 1 if problem.traced else batch * tokens  # a trace's length is not known
    maps = pack(problem.parameters, groups, head_dim, problem.scaling, tokens=total_tokens)
    sums = (state.feature_values, state.feature_sum, state.log_scale.detach())
    if problem.fresh:
        sums = (torch.empty(0),) * 3
    output, _, values, total, log_scale = attend(
        problem.query, problem.key, problem.value, *maps[:4], *sums,
        state.recent_key, state.recent_value, state.sink_key, state.sink_value,
        problem.lengths, state.count, *maps[4:],
        config.feature_count, problem.scaling, problem.wants_state,
    )  # fmt: skip
    if not problem.wants_state:
        return output, state
    return output, AttentionState(
        feature_values=values, feature_sum=total, log_scale=log_scale, **next_buffers(problem)
    )


def _unsupported_tensor(query: Tensor) -> str | None:
    """Why its device or dtype is not covered."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, not in {query.dtype}"
    return None


def _unsupported(problem: Problem) -> str | None:
    """Why a problem is not covered, whatever the machine."""
    config, query = problem.config, problem.query
    if reason := _unsupported_tensor(query):
        return reason
    if not problem.is_causal:
        return "it is causal only"
    if problem.softcap is not None:
        return "it cannot cap logits"
    if config.method not in METHODS:
        return f"method={config.method!r} is not among {', '.join(METHODS)}"
    sizes = (max(query.shape[-1], problem.value.shape[-1]), config.feature_count, config.window)
    for (name, limit), size in zip(LIMITS.items(), sizes, strict=True):
        if size > limit:
            return f"the {name} {size} is above its limit of {limit}"
    return None


@functools.cache
def _library_reason() -> str | None:
    """Builds, loads and tests the library, once per process; a failure is reported once and not tried again."""
    try:
        load.library()
        from .selftest import selftest

        # The first caller may be in inference mode, under autocast or inside a checkpoint that counts saved tensors;
        # all of that belongs to its thread, so the test has one of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(selftest).result()
    except (BuildError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no more threads
        report(f"the native attention is not available, torch's operators do the work: {error}")
        return str(error)
    return None


def _switched_off() -> str | None:
    off = os.environ.get("DARKFORMER_NATIVE", "1") in ("0", "off", "false")
    return "DARKFORMER_NATIVE=0 switches it off" if off else None


def unavailable() -> str | None:
    """Why the library cannot be used on this machine, None if it can. Builds it if it is not there yet."""
    return _switched_off() or _library_reason()


def why_not(problem: Problem) -> str | None:
    """Why the native backend cannot take a problem, or None."""
    return _unsupported(problem) or unavailable()


def stepper(
    state: AttentionState | None, query: Tensor, key: Tensor, feature_map: FeatureMap, *,
    scaling: float, softcap: float | None,
) -> Step | None:  # fmt: skip
    """A `Step` that goes on from `state` with tokens of these shapes and dtype; None where the library cannot."""
    if transformed() or traced(query):  # a step passes pointers to the library, which neither sees
        return None
    if state is None or feature_map.config.method not in METHODS or state.recent_key.dtype != query.dtype:
        return None
    if _unsupported_tensor(query) or unavailable():
        return None
    step = Step(state, feature_map, scaling=scaling, softcap=softcap)
    return step if step.finite and step.takes(query, key, scaling, softcap) else None


def release() -> None:
    """Returns the memory that threads keep between calls to the system. Must not be called while a call runs."""
    if load.library.cache_info().currsize:
        load.library().darkformer_release()


def splits() -> int:
    """How many chunks were split so far because a row's normaliser underflowed (see docs/native.md)."""
    return load.splits.value


def status() -> dict[str, Any]:
    """What `darkformer native status` prints: plain values, without building anything.

    Keys: reason (why it cannot run, or None), instruction_set, compiler, library, built, cache.
    """
    result: dict[str, Any] = {"reason": None, "built": False}
    try:
        result["cache"] = str(cache_folder())
        result["instruction_set"] = instruction_set()
        result["compiler"] = " ".join(compiler())
        path = library_path()
        result["library"], result["built"] = str(path), os.path.exists(path)
        if result["built"] or _library_reason.cache_info().currsize:
            result["reason"] = unavailable()
        else:
            check_compiler()
    except BuildError as error:
        result["reason"] = str(error)
    result["reason"] = _switched_off() or result["reason"]
    return result
