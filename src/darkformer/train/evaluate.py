"""Loss, perplexity and next-token accuracy of a causal language model on token blocks, in all and by position."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError
from ..reporting import Progress

#: Tokens in one forward pass of `evaluate`, unless one block is longer: logits of a large vocabulary are large.
TOKENS_AT_ONCE = 2048
#: Numbers of logits that are in float32 at a time: what a processor's cache holds, or a GPU's memory easily.
NUMBERS_AT_ONCE, NUMBERS_AT_ONCE_CUDA = 2**21, 2**26
#: End of the first bucket of positions; each later one is twice as long.
FIRST_POSITIONS = 64


class PositionScore(NamedTuple):
    """Means over the predicted tokens at the positions start to stop - 1 of their blocks (a block's first is 0)."""

    start: int
    stop: int
    loss: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """Means over all predicted tokens, and by their position in the block."""

    loss: float  # nats per token
    perplexity: float
    accuracy: float  # share of tokens that were the most likely one
    tokens: int
    by_position: tuple[PositionScore, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "by_position": [bucket._asdict() for bucket in self.by_position]}


def position_buckets(length: int) -> list[tuple[int, int]]:
    """(start, stop) of the predicted positions of blocks of `length` tokens: 1 to 63, 64 to 127, 128 to 255, …

    >>> position_buckets(200)
    [(1, 64), (64, 128), (128, 200)]
    """
    edges = [1]
    while edges[-1] < length:
        edges.append(min(FIRST_POSITIONS if edges[-1] == 1 else 2 * edges[-1], length))
    return list(pairwise(edges))


def rows_at_once(logits: Tensor) -> int:
    """Rows of logits (N, V) that are computed with in float32 at a time."""
    return max(1, (NUMBERS_AT_ONCE_CUDA if logits.is_cuda else NUMBERS_AT_ONCE) // logits.shape[-1])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Score:
    """Scores `model` on blocks (N, L) of tokens; every token but a block's first is predicted.

    Args:
        batch_size: blocks in one forward pass; None: as many as `TOKENS_AT_ONCE` hold, one at least.
        dtype: `bfloat16` runs under autocast.
        progress: called after each batch.

    Raises:
        InputError: no blocks. NonFiniteError: the loss is not a finite number.
    """
    if len(blocks) == 0 or blocks.shape[1] < 2:
        raise InputError(f"blocks of shape {tuple(blocks.shape)}: at least one block of two tokens is needed.")
    length = blocks.shape[1]
    device = next(model.parameters()).device
    was_training = model.training
    losses = torch.zeros(length - 1, dtype=torch.float64)  # sums over the blocks, by position
    correct = torch.zeros(length - 1, dtype=torch.int64)
    batches = blocks.split(max(1, TOKENS_AT_ONCE // length) if batch_size is None else batch_size)
    try:
        model.eval()
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            for row, target in zip(logits, batch[:, 1:], strict=True):
                parts = (x.split(rows_at_once(row)) for x in (row, target, losses, correct))
                for some, wanted, loss, right in zip(*parts, strict=True):
                    some = some.float()
                    loss += F.cross_entropy(some, wanted, reduction="none").double().cpu()
                    right += (some.argmax(-1) == wanted).cpu()
            if progress:
                progress(i + 1, len(batches))
    finally:
        model.train(was_training)
    count = len(blocks) * (length - 1)
    loss = float(losses.sum()) / count
    if not math.isfinite(loss):
        raise NonFiniteError(f"the evaluation loss is {loss}: the model has diverged.")
    by_position = []
    for start, stop in position_buckets(length):
        places, tokens = slice(start - 1, stop - 1), len(blocks) * (stop - start)  # the first prediction is of token 1
        by_position.append(
            PositionScore(
                start, stop, float(losses[places].sum()) / tokens, int(correct[places].sum()) / tokens, tokens
            )
        )
    return Score(loss, math.exp(min(loss, 700.0)), int(correct.sum()) / count, count, tuple(by_position))
