"""The reference in pieces: linear time and memory for what the fast backends cannot compute (soft-capped logits)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .problem import AttentionState, Problem
from .reference import reference

#: Tokens of one piece. A piece costs PIECE·(PIECE + window + sinks)·m exponentials a head.
PIECE = 64


def streamed(problem: Problem) -> tuple[Tensor, AttentionState]:
    """`reference` on pieces of `PIECE` tokens, each starting from the state the one before left behind.

    The state makes any split exact, so these are the reference's numbers. Every far pair inside a piece still has
    its own logarithm: about m times the work of the chunked backend there. Pieces are recomputed in the backward pass.

    Returns:
        output (B, G, R, L, d_v) in the compute dtype, zero at pads, and the state after the last token.
    """
    state, outputs, done = problem.state, [], 0
    split = zip(problem.query.split(PIECE, 3), problem.key.split(PIECE, 2), problem.value.split(PIECE, 2), strict=True)
    for query, key, value in split:
        length = query.shape[3]
        piece = problem._replace(
            query=query, key=key, value=value, state=state, lengths=(problem.lengths - done).clamp(0, length)
        )
        output, state = _recomputed(piece) if torch.is_grad_enabled() else reference(piece)
        outputs.append(output)
        done += length
    return torch.cat(outputs, dim=3), state


def _recomputed(piece: Problem) -> tuple[Tensor, AttentionState]:
    result: Any = checkpoint(reference, piece, use_reentrant=False, preserve_rng_state=False)
    return result
