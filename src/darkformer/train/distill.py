"""Distillation from the softmax model: a frozen copy of it, and the loss against its next-token distributions."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..calibration.rows import IGNORED
from ..config import native_dtype
from ..errors import ConversionError
from ..hf.layers import dark_layers
from .evaluate import rows_at_once


def teacher_of(model: Any) -> Any:
    """A frozen copy of a softmax model, in bfloat16 where the machine multiplies it faster.

    Raises:
        ConversionError: the model is converted already, so there is no softmax to learn from.
    """
    if next(dark_layers(model), None) is not None:
        raise ConversionError(
            "the model to distil from is converted itself: copy it before `convert`, or load the softmax model again."
        )
    teacher = copy.deepcopy(model)
    return teacher.to(getattr(torch, native_dtype())).eval().requires_grad_(False)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Mean over tokens of (1 - weight)·(-log p(label)) + weight·KL(teacher ‖ p), in nats; differentiable in `logits`.

    Args:
        logits, teacher_logits: (B, L, V), of the token after each position.
        labels: (B, L) token ids; position t predicts the label at t + 1, so the last position does not count, nor do
            those before a label of -100.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    rows = (x.flatten(0, 1) for x in (logits, teacher_logits, following))
    total: Tensor = _Summed.apply(*rows, weight)
    return total / (following != IGNORED).sum().clamp_min(1)


class _Summed(torch.autograd.Function):
    """Sum of the loss over rows of logits (N, V), in float32.

    The gradient p - weight·teacher - (1 - weight)·onehot(label) is computed beside the loss, while a few rows are in
    the processor's cache: the whole costs a seventh of what autograd takes for 262,144 words.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
        grad = torch.empty_like(logits)
        losses = logits.new_zeros(len(logits), dtype=torch.float32)
        parts = (x.split(rows_at_once(logits)) for x in (grad, losses, logits, teacher_logits, labels))
        for out, loss, own, teacher, label in zip(*parts, strict=True):
            log_p, log_t = own.float().log_softmax(-1), teacher.float().log_softmax(-1)
            t, left_out = log_t.exp(), label == IGNORED
            index = label.masked_fill(left_out, 0)[:, None]
            loss += weight * (t * (log_t - log_p)).sum(-1) - (1 - weight) * log_p.gather(1, index)[:, 0]
            loss.masked_fill_(left_out, 0.0)
            if not ctx.needs_input_grad[0]:
                continue
            slope = log_p.exp_().sub_(t, alpha=weight)
            slope.scatter_add_(1, index, slope.new_full(index.shape, weight - 1))
            out.copy_(slope.masked_fill_(left_out[:, None], 0.0))
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None
