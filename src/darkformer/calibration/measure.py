"""Losses of a softmax model whose kv heads see different windows, and their slopes when heads change windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import native_dtype
from ..errors import InputError, NonFiniteError
from .mixed import MixedAttention, checkpointed, decoder_layers, replaced_forward
from .rows import Rows, recall_rows, row_losses, text_rows

#: Where between a head's window (0) and another (1) slopes are taken. At 0 a trained model's loss is nearly stationary
#: and at 1 it is steep; the slope in the middle is exact for a quadratic.
MIDDLE = 0.5
#: Rows of one ablation that run together: bounds its memory.
ROWS_AT_ONCE = 4
#: Bytes that one backward pass may keep. Beyond them layers are computed again in it, a third more time.
KEPT_BYTES = 4 << 30
#: Estimate of the bytes that a layer keeps for its backward pass, for each number of a token's hidden state.
BYTES_A_NUMBER = 80


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode, and no gradients of weights: the backward pass then costs no more than a forward pass."""
    training = model.training
    trainable = [x for x in model.parameters() if x.requires_grad]
    try:
        model.eval()
        for x in trainable:
            x.requires_grad_(False)
        yield
    finally:
        for x in trainable:
            x.requires_grad_(True)
        model.train(training)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss of a calibration row is {loss}: the model or the text holds NaN.")
    return loss


class Measure:
    """Losses of a softmax model under windows per kv head, and their first-order changes.

    Args:
        rows: name (`text`, `recall`) → what is scored.
        dtype: float32 or bfloat16 (autocast).
    """

    def __init__(self, model: Any, mixed: MixedAttention, rows: Mapping[str, Rows], dtype: str) -> None:
        self.model, self.mixed, self.rows, self.dtype = model, mixed, rows, dtype
        self.blocks = decoder_layers(model, mixed.modules)

    @torch.no_grad()
    def losses(self, windows: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
        """Nats per scored token with these windows (layers × kv heads); by default every head is exact."""
        self.mixed.reset(windows)
        losses = {}
        with self.mixed.active():
            for name, rows in self.rows.items():
                total = sum(float(row_losses(self.model, rows[i : i + 1], self.dtype)) for i in range(len(rows)))
                losses[name] = _finite(total / max(1, rows.count))
        return losses

    def slopes(
        self, name: str, windows: Sequence[Sequence[int]], others: Mapping[int, Sequence[tuple[int, int]]], *,
        at: float = MIDDLE, part: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:  # fmt: skip
        """First-order changes of a loss when heads go over to another window, from one backward pass a row.

        Args:
            name: which loss.
            windows: the state, layers × kv heads.
            others: another window → (index of the layer, kv head) of the heads that may go over to it.
            at: where between the two the slope is taken, for all of them at once: 0 at the state, 1 at the other.
            part: which rows are used; default all.

        Returns:
            window → one number a head (float64), in the order of `others`, in nats per scored token.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        mixed, rows = self.mixed, self.rows[name]
        mixed.reset(windows)
        for other, heads in others.items():
            for index, g in heads:
                mixed.states[index].others.setdefault(other, []).append(g)
            for index in {index for index, _ in heads}:
                state = mixed.states[index]
                gate = torch.full((len(state.others[other]),), at, device=self._device(index), requires_grad=True)
                state.gates[other] = gate
        count = 0
        blocks = self.blocks if self.blocks is not None and self._needs_checkpoints(rows) else ()
        with mixed.active(), checkpointed(mixed, blocks), torch.enable_grad():
            for i in range(len(rows)) if part is None else part:
                row = rows[i : i + 1]
                loss = row_losses(self.model, row, self.dtype).sum()
                _finite(float(loss.detach()))
                loss.backward()
                count += row.count
        slopes = {}
        for other, heads in others.items():
            values = []
            for index, g in heads:
                state = mixed.states[index]
                gradient = state.gates[other].grad
                assert gradient is not None
                values.append(float(gradient[state.others[other].index(g)]))
            slopes[other] = torch.tensor(values, dtype=torch.float64) / max(1, count)
        mixed.reset()
        return slopes

    def _needs_checkpoints(self, rows: Rows) -> bool:
        """Whether what a backward pass over one row keeps would be more than `KEPT_BYTES`, by a generous estimate."""
        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        return rows.ids.shape[1] * hidden * len(self.mixed.layers) * BYTES_A_NUMBER > KEPT_BYTES

    def _device(self, index: int) -> torch.device:
        weight = next((x for x in self.mixed.modules[index].parameters() if not x.is_meta), None)
        return torch.device("cpu") if weight is None else weight.device

    @torch.no_grad()
    def ablated(self, window: int, row: Rows, start: int = 0) -> Iterator[list[float]]:
        """Summed loss of one row with each kv head cut alone: G numbers a layer, from the layer `start` on."""
        mixed = self.mixed
        mixed.reset()
        with mixed.active():
            reusing = self._reusing_lower_layers(row)
        for index in range(start, len(mixed.layers)):
            groups = mixed.layers[index].num_kv_heads
            losses: list[float] = []
            for heads in torch.arange(groups).split(ROWS_AT_ONCE):
                gates = torch.zeros(len(heads), groups, dtype=torch.bool)
                gates[torch.arange(len(heads)), heads] = True
                mixed.reset()
                mixed.states[index].others[window] = list(range(groups))
                mixed.states[index].gates[window] = gates.to(self._device(index))
                lower = contextlib.nullcontext() if reusing is None else reusing(index, len(heads))
                with mixed.active(), lower:
                    summed = row_losses(self.model, _repeated(row, len(heads)), self.dtype)
                losses += [_finite(float(x)) for x in summed]
            mixed.reset()
            yield losses

    def _reusing_lower_layers(self, row: Rows) -> Callable[[int, int], contextlib.AbstractContextManager[None]] | None:
        """A context for (layer, copies of the row) in which the layers below return what they return for `row` alone.

        None where the model's structure does not allow that, which is tried in its middle: the loss must be the same.
        """
        if (blocks := self.blocks) is None:
            return None
        outputs: list[Any] = [None] * len(blocks)
        holds = [{id(m) for m in block.modules()} for block in blocks]
        block_of = [next(b for b, ids in enumerate(holds) if id(m) in ids) for m in self.mixed.modules]

        def recording(i: int, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                outputs[i] = forward(*args, **kwargs)
                return outputs[i]

            return run

        def reusing(layer: int, count: int) -> contextlib.AbstractContextManager[None]:
            def recorded(i: int, forward: Any) -> Any:
                return lambda *args, **kwargs: _expanded(outputs[i], count)

            return replaced_forward(blocks[: block_of[layer]], recorded)

        with replaced_forward(blocks, recording):
            expected = float(row_losses(self.model, row, self.dtype))
        try:
            with reusing(len(self.mixed.layers) // 2, 1):
                loss = float(row_losses(self.model, row, self.dtype))
        except Exception:  # a model that looks at what its layers leave behind
            return None
        return reusing if abs(loss - expected) <= 1e-5 * abs(expected) else None


def _repeated(row: Rows, count: int) -> Rows:
    mask = None if row.mask is None else row.mask.expand(count, -1)
    return Rows(row.ids.expand(count, -1), mask, row.labels.expand(count, -1))


def _expanded(output: Any, count: int) -> Any:
    """A layer's output for one row, as its output for `count` equal rows."""
    if isinstance(output, Tensor):
        return output.expand(count, *output.shape[1:])
    return tuple(_expanded(x, count) if isinstance(x, Tensor) else x for x in output)


def measurement(
    model: Any, batches: Iterable[Any], *, tokenizer: Any, sinks: int, longest: int, context: int | None, prompts: int,
    seed: int, dtype: str,
) -> Measure:  # fmt: skip
    """Checks a model and its texts, and builds the `Measure` of both.

    Args:
        longest: the largest window there will be, which the rows must exceed.
        dtype: float32, bfloat16, or `auto`: bfloat16 where the machine multiplies it faster.
        model, batches, tokenizer, sinks, context, prompts, seed: as in `sensitivity`.

    Raises:
        ConversionError, InputError: see `sensitivity`.
    """
    mixed = MixedAttention(model, sinks)
    text = text_rows(batches)
    length = text.ids.shape[1]
    for name, tokens in (("the batches have rows of", length), ("context", length if context is None else context)):
        if tokens <= longest + sinks + 1:
            raise InputError(
                f"{name} {tokens} tokens, of which a window of {longest} and {sinks} sinks see everything: there is no "
                "far field to cut. Give longer rows, best of the length the model is used at, or a smaller window."
            )
    rows = {"text": text}
    if tokenizer is not None and prompts:
        rows["recall"] = recall_rows(tokenizer, text, length if context is None else context, prompts, seed=seed)
    return Measure(model, mixed, rows, native_dtype() if dtype == "auto" else dtype)
