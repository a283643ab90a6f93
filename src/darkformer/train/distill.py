"""Distillation from the softmax model: a frozen copy of it, and the loss against its next-token distributions."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import native_dtype
from ..errors import ConversionError
from ..hf.layers import dark_layers
from .evaluate import LOGITS_AT_ONCE


def teacher_of(model: Any) -> Any:
    """A frozen copy of a softmax model, in bfloat16 where the machine multiplies it faster.

    Raises:
        ConversionError: the model is converted already, so there is no softmax to learn from.
    """
    if any(True for _ in dark_layers(model)):
        raise ConversionError(
            "the model to distil from is converted itself: copy it before `convert`, or load the softmax model again."
        )
    teacher = copy.deepcopy(model)
    return teacher.to(getattr(torch, native_dtype())).eval().requires_grad_(False)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Mean over tokens of (1 - weight)·(-log p(label)) + weight·KL(teacher ‖ p), in nats; differentiable in `logits`.

    A few positions are computed at a time, and again in the backward pass: float32 logits of a large vocabulary are
    large.

    Args:
        logits, teacher_logits: (B, L, V), of the token after each position.
        labels: (B, L) token ids; position t predicts the label at t + 1, so the last position does not count.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for row, teacher, label in zip(logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], strict=True):
        for start in range(0, len(label), LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            total = total + checkpoint(_summed, row[part], teacher[part], label[part], weight, use_reentrant=False)
    return total / labels[:, 1:].numel()


def _summed(logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    loss = weight * F.kl_div(log_p, teacher_logits.float().log_softmax(-1), reduction="sum", log_target=True)
    return loss if weight == 1.0 else loss + (1 - weight) * F.nll_loss(log_p, labels, reduction="sum")
