"""Loss, perplexity and next-token accuracy of a causal language model on token blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError, NonFiniteError

#: Called with (done, total) batches.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """Means over all predicted tokens."""

    loss: float  # nats per token
    perplexity: float
    accuracy: float  # share of tokens that were the most likely one
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Score:
    """Scores `model` on blocks (N, L) of tokens; every token but a block's first is predicted.

    Args:
        dtype: `bfloat16` runs under autocast.
        progress: called after each batch.

    Raises:
        InputError: no blocks. NonFiniteError: the loss is not a finite number.
    """
    if len(blocks) == 0 or blocks.shape[1] < 2:
        raise InputError(f"blocks of shape {tuple(blocks.shape)}: at least one block of two tokens is needed.")
    device = next(model.parameters()).device
    was_training = model.training
    total, correct, count = 0.0, 0, 0
    batches = blocks.split(batch_size)
    try:
        model.eval()
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            target = batch[:, 1:]
            for row, wanted in zip(logits, target, strict=True):  # one row at a time: float32 logits are large
                row = row.float()
                total += float(F.cross_entropy(row, wanted, reduction="sum"))
                correct += int((row.argmax(-1) == wanted).sum())
                count += wanted.numel()
            if progress:
                progress(i + 1, len(batches))
    finally:
        model.train(was_training)
    loss = total / count
    if not math.isfinite(loss):
        raise NonFiniteError(f"the evaluation loss is {loss}: the model has diverged.")
    return Score(loss, math.exp(min(loss, 700.0)), correct / count, count)
