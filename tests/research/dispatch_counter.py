"""Counts what torch's operators read and write, seen from a dispatch mode."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Give memory out, or another view of it, although their schemas do not say so.
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
#: Overwrite their argument without reading it.
OVERWRITE = {"copy_", "fill_", "zero_"}
#: Take a tensor for its kind alone.
FILL = {"new_zeros", "new_full", "new_ones", "zeros_like", "ones_like", "full_like"}
#: Read a few rows or numbers of a large input.
GATHER = {"embedding": 0, "nll_loss_forward": 0, "nll_loss_backward": 1}
#: Marked as written in AdamW's schema for scaled losses alone.
NOT_WRITTEN = {"grads"}


def elements(x: Tensor) -> int:
    """Distinct numbers of a tensor: an expanded dimension has one."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)


def numbers(value: Any) -> int:
    return sum(elements(x) for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point())


class DispatchCounter(TorchDispatchMode):
    """Numbers read and written and calls, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, schema = func._schema.name.split("::")[1], func._schema
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
        if views or name in FREE:
            return result
        arguments = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
        changed = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
        read = [value for key, value in arguments.items() if not (key in changed and name in OVERWRITE)]
        if name in FILL:
            read = []
        if name in GATHER:
            del read[GATHER[name]]
            read.append(result if name == "embedding" else [])
        self.read[name] += numbers(read)
        self.written[name] += numbers([arguments.get(key) for key in changed - NOT_WRITTEN] if changed else result)
        self.calls[name] += 1
        return result

    @property
    def copies(self) -> int:
        return self.read.total() + self.written.total()


def counted_step(model: Any, optimizer: Any, ids: Tensor, *, autocast: bool = False) -> dict[str, DispatchCounter]:
    """The three phases of a training step, each with its counts."""
    counters = {phase: DispatchCounter() for phase in ("forward", "backward", "optimizer")}
    with counters["forward"], torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with counters["backward"]:
        loss.backward()
    with counters["optimizer"]:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return counters
