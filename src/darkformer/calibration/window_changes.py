"""What kv heads gain or lose with other windows, to first order, around a state where some are exact already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..reporting import Progress
from .measure import frozen, measurement
from .mixed import EXACT


@dataclass(frozen=True)
class WindowChange:
    """What changes, to first order, when one kv head goes over from its window to another.

    Attributes:
        layer, head: numbers of the layer and of the kv head in it.
        window: the other window, EXACT (0) for softmax.
        text, recall: change of the loss in nats per token, below 0 where it falls; recall is None if it was not asked.
    """

    layer: int
    head: int
    window: int
    text: float
    recall: float | None


def window_changes(
    model: Any,
    batches: Iterable[Any],
    *,
    exact: Iterable[tuple[int, int]],
    windows: int | Mapping[int, int],
    others: Sequence[int],
    tokenizer: Any = None,
    sinks: int = 4,
    context: int | None = None,
    prompts: int = 2,
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> list[WindowChange]:
    """First-order changes of the losses when heads get other windows, at a state where some heads are exact already.

    The slopes are taken halfway, all heads at once, for one of `others` after the other. Their sum over many heads
    means little; their order and their ratio to bytes show where a budget is best spent next.

    Args:
        exact: (layer, kv head) with softmax, such as the first of `Sensitivity.order`.
        windows: of all other heads, one number, or layer → window.
        others: windows to compare with, EXACT (0) for softmax. A head is left out where it has that window, or is
            exact.
        progress: called with (rows done, rows in all).
        model, batches, tokenizer, sinks, context, prompts, seed, dtype: as in `sensitivity`.

    Returns:
        One `WindowChange` a head and other window, in the order of `others`, then of the model.

    Raises:
        ConfigError: a head or layer that does not exist. ConversionError, InputError: as in `sensitivity`.
    """
    exact = set(exact)
    longest = max(*others, *([windows] if isinstance(windows, int) else windows.values()))
    measure = measurement(
        model, batches, tokenizer=tokenizer, sinks=sinks, longest=longest, context=context, prompts=prompts, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    layers = measure.mixed.layers
    present = {(layer.layer, g) for layer in layers for g in range(layer.num_kv_heads)}
    if unknown := sorted(exact - present):
        names = ", ".join(f"{layer}.{head}" for layer, head in unknown)
        raise ConfigError(
            f"exact names {names}, which is no kv head of a full layer: "
            f"layers are {', '.join(str(x.layer) for x in layers)}."
        )
    by_layer = {x.layer: windows for x in layers} if isinstance(windows, int) else dict(windows)
    if missing := sorted({x.layer for x in layers} - set(by_layer)):
        raise ConfigError(f"windows has no entry for layer {', '.join(map(str, missing))}.")
    state = [[EXACT if (x.layer, g) in exact else by_layer[x.layer] for g in range(x.num_kv_heads)] for x in layers]
    done, total = 0, len(others) * sum(map(len, measure.rows.values()))
    changes: list[WindowChange] = []
    with frozen(model):
        for other in others:
            heads = [(i, g) for i, g in measure.mixed.heads if state[i][g] not in (EXACT, other)]
            values: dict[str, Tensor] = {}
            for name, rows in measure.rows.items():
                summed = torch.zeros(len(heads), dtype=torch.float64)
                for i in range(len(rows)):
                    slopes = measure.slopes(name, state, {other: heads}, part=[i])[other]
                    summed += slopes * rows[i : i + 1].count
                    done += 1
                    if progress:
                        progress(done, total)
                values[name] = summed / max(1, rows.count)
            text, recall = values["text"].tolist(), values["recall"].tolist() if "recall" in values else None
            changes += [
                WindowChange(layers[i].layer, g, other, text[n], None if recall is None else recall[n])
                for n, (i, g) in enumerate(heads)
            ]
    return changes
