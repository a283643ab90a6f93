"""Which heads need their far field: what is lost when a kv head sees the window and the sinks only.

Two losses are measured. `text`: the rise of the loss of ordinary text (nats per token). `recall`: the fall of the
log-probability of numbers that the prompt stated long before (nats per token of the number). They rank heads
differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, RunFolderError
from ..hf.fingerprint import describe_base
from ..records import as_written, read_kept, write_kept
from ..reporting import Progress
from .measure import Measure, frozen, measurement
from .mixed import EXACT
from .rows import Rows

METHODS: dict[str, str] = {
    "elimination": "first-order losses measured again and again while the least needed heads are cut, round by round",
    "gradient": "first-order losses from one pass at the middle of the way, every head half cut",
    "ablation": "the true loss with one head cut at a time: the slowest, blind to heads that stand in for one another",
}
#: Shares of the heads that are still exact after each round of the elimination.
ROUNDS = (0.4, 0.22, 0.15, 0.1, 0.07, 0.045)
#: Rows of text, and as many of recall, that one round of the elimination looks at; they take turns.
ROWS_A_ROUND = 2
#: Once no more than this share of the heads is exact, a round looks at every row: every head counts there.
EVERY_ROW_FROM = 0.15
#: Nats per token of all heads together below which a loss needs no far field: shares of it would be noise.
SMALLEST_TOTAL = 0.01
FILE = "sensitivity.json"
#: A loss (`text`, `recall`) → its rise for each head, in the order of `MixedAttention.heads`.
Values = dict[str, list[float]]


@dataclass(frozen=True)
class HeadSensitivity:
    """What one kv head's far field is worth.

    Attributes:
        layer, head: numbers of the layer and of the kv head in it.
        text: rise of the loss in nats per token.
        recall: the same over the recalled numbers' tokens, None if it was not asked.
    """

    layer: int
    head: int
    text: float
    recall: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Every kv head of a model's full layers.

    Attributes:
        rows: one a head, in the order of the model.
        order: (layer, head), the one that needs softmax most first.
        method, window, sinks, context: how it was measured; `context` in tokens.
        exact, cut: loss of `text` and `recall` with every head exact, and with every head cut.
    """

    rows: tuple[HeadSensitivity, ...]
    order: tuple[tuple[int, int], ...]
    method: str
    window: int
    sinks: int
    context: int
    exact: dict[str, float]
    cut: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows], "order": [list(head) for head in self.order]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Inverse of `to_dict`."""
        rows = tuple(HeadSensitivity(**row) for row in values["rows"])
        return cls(**{**values, "rows": rows, "order": tuple((layer, head) for layer, head in values["order"])})


def sensitivity(
    model: Any,
    batches: Iterable[Any],
    *,
    tokenizer: Any = None,
    method: str = "elimination",
    window: int = 256,
    sinks: int = 4,
    context: int | None = None,
    prompts: int = 4,
    seed: int = 0,
    dtype: str = "auto",
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """What each kv head of a softmax model loses without its far field, and in which order heads need softmax.

    The model is not converted and stays as it is. Layers that are sliding-window already are left out.

    Args:
        model: a causal language model of transformers with softmax attention.
        batches: token ids (B, L), or dicts with input_ids and attention_mask. Two to eight rows of the length the model
            is used at: a head whose window reaches over the whole text loses nothing.
        tokenizer: the model's own, for the prompts whose numbers are to be recalled. Without it, text alone counts.
        method: one of `METHODS`.
        window, sinks: what a head sees whose far field is cut.
        context: tokens of a recall prompt; default L. prompts: how many; each asks for several numbers.
        seed: of the prompts. Score the choice with others.
        dtype: `bfloat16` runs under autocast, `auto` where the machine multiplies it faster.
        folder: where partial results are kept (`sensitivity.json`); a later call with the same settings goes on there.
        progress: called with (steps done, steps in all).

    Returns:
        One `HeadSensitivity` a head, their order, and the losses with all and with no far field. With `elimination` a
        head's numbers are those of the round in which it was cut; those never cut have the last round's.

    Raises:
        ConversionError: the model is converted already (call `darkformer.revert`), an encoder, or has no full layer.
        InputError: rows shorter than the window and the sinks, or text shorter than the context.
        ConfigError: an unknown method. RunFolderError: the folder holds another measurement.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}.")
    measure = measurement(
        model, batches, tokenizer=tokenizer, sinks=sinks, longest=window, context=context, prompts=prompts, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    settings = {
        "method": method, "window": window, "sinks": sinks, "dtype": measure.dtype, "model": describe_base(model),
        "rows": {name: _digest(rows) for name, rows in measure.rows.items()},
        "rounds": [list(ROUNDS), ROWS_A_ROUND, EVERY_ROW_FROM] if method == "elimination" else None,
    }  # fmt: skip
    steps = _Steps(None if folder is None else Path(folder) / FILE, settings, progress)
    if "result" in steps.content and steps.path is not None:
        with as_written(steps.path):
            return Sensitivity.from_dict(steps.content["result"])
    layers, heads = measure.mixed.layers, measure.mixed.heads
    rows, rounds = sum(map(len, measure.rows.values())), _rounds(len(heads))
    steps.total = 2 + {"ablation": rows * len(layers), "gradient": rows, "elimination": len(rounds)}[method]
    with frozen(model):
        exact = steps.step("exact", measure.losses)
        cut = steps.step("cut", lambda: measure.losses([[window] * x.num_kv_heads for x in layers]))
        if method == "elimination":
            values, order = _eliminate(measure, window, rounds, steps)
        else:
            values = _ablate(measure, window, exact, steps) if method == "ablation" else _slopes(measure, window, steps)
            order = _ranked(range(len(heads)), values, _totals(values))
    numbers = [(layers[i].layer, g) for i, g in heads]
    recall = values.get("recall")
    result = Sensitivity(
        rows=tuple(
            HeadSensitivity(layer, g, values["text"][n], None if recall is None else recall[n])
            for n, (layer, g) in enumerate(numbers)
        ),
        order=tuple(numbers[n] for n in order),
        method=method,
        window=window,
        sinks=sinks,
        context=max(x.ids.shape[1] for x in measure.rows.values()),
        exact=exact,
        cut=cut,
    )
    steps.put("result", result.to_dict())
    return result


def _digest(rows: Rows) -> str:
    total = hashlib.sha256()
    for x in (rows.ids, rows.labels):
        total.update(x.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


class _Steps:
    """The steps of one measurement: their results by name, and their progress.

    Results are written as they come, and steps whose result is in the file already are not computed again.

    Args:
        path: of the file; None keeps results in memory.
        settings: what the results depend on.
        progress: called with (steps done, `total`).

    Raises:
        RunFolderError: the file holds results of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], progress: Progress | None) -> None:
        self.path, self.progress = path, progress
        self.done = self.total = 0
        self.content: dict[str, Any] = {"settings": settings}
        if path is None or not path.is_file():
            return
        content = read_kept(path, lambda kept: {**kept, "settings": dict(kept["settings"])})
        before = content["settings"]
        if different := [name for name in settings if before.get(name) != settings[name]]:
            raise RunFolderError(
                f"{path} holds a sensitivity with another {' and '.join(different)}: choose another folder or "
                "delete it."
            )
        self.content = content

    def put(self, name: str, value: Any) -> None:
        """Keeps a result (plain values)."""
        self.content[name] = value
        if self.path is not None:
            write_kept(self.path, self.content)

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute` (plain values), from now or from an earlier run."""
        if name in self.content:
            self.done += 1
        else:
            self.put(name, compute())
            self._advance()
        return self.content[name]

    def sequence(self, name: str, length: int, compute: Callable[[int], Iterator[Any]]) -> list[Any]:
        """`length` results, each of them one step; `compute` yields those from a place on."""
        values = list(self.content.get(name, []))
        self.done += len(values)
        if len(values) < length:
            for value in compute(len(values)):
                values.append(value)
                self.put(name, values)
                self._advance()
        return values

    def _advance(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)


def _totals(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What all heads lose together, by kind of loss; heads that gain do not make up for others."""
    return {name: max(sum(max(x, 0.0) for x in of_heads), SMALLEST_TOTAL) for name, of_heads in values.items()}


def _ranked(heads: Iterable[int], values: Mapping[str, Sequence[float]], totals: Mapping[str, float]) -> list[int]:
    """Heads by their share of the totals, text and recall counting alike; the largest first.

    Shares of what is really lost when all heads are cut would count recall three times as much: its slopes in the
    middle add up to three times that.
    """
    return sorted(heads, key=lambda n: (-sum(values[name][n] / totals[name] for name in totals), n))


def _rounds(heads: int) -> list[int]:
    """How many heads are still exact after each round of the elimination."""
    sizes = sorted({round(share * heads) for share in ROUNDS} | {0}, reverse=True)
    return [size for size in sizes if size < heads]


def _eliminate(measure: Measure, window: int, rounds: Sequence[int], steps: _Steps) -> tuple[Values, list[int]]:
    """Cuts the heads with the smallest slopes, round by round.

    Returns:
        Each head's slopes in the last round it was part of, and the heads in reverse order of their going.
    """
    heads = measure.mixed.heads
    exact, order = list(range(len(heads))), list[int]()
    values = {name: [0.0] * len(heads) for name in measure.rows}
    totals: dict[str, float] = {}

    def one_round(number: int, exact: Sequence[int]) -> Values:
        """Slopes of the heads that are still exact. Rows take turns, so that no two of them decide everything."""
        windows = [[window] * layer.num_kv_heads for layer in measure.mixed.layers]
        for index, g in (heads[n] for n in exact):
            windows[index][g] = EXACT
        slopes = {}
        for name, rows in measure.rows.items():
            count = ROWS_A_ROUND if len(exact) > EVERY_ROW_FROM * len(heads) else len(rows)
            part = sorted({(ROWS_A_ROUND * number + i) % len(rows) for i in range(count)})
            others = {window: [heads[n] for n in exact]}
            slopes[name] = measure.slopes(name, windows, others, part=part)[window].tolist()
        return slopes

    for number, size in enumerate(rounds):
        slopes = steps.step(f"round {number}", partial(one_round, number, exact))
        totals = totals or _totals(slopes)
        for name in values:
            for n, value in zip(exact, slopes[name], strict=True):
                values[name][n] = value
        ranked = _ranked(exact, values, totals)
        order = ranked[size:] + order
        exact = sorted(ranked[:size])
    return values, order


def _slopes(measure: Measure, window: int, steps: _Steps) -> Values:
    """Every head's slope from everything exact to everything cut, one step a row."""
    mixed = measure.mixed
    exact = [[EXACT] * layer.num_kv_heads for layer in mixed.layers]

    def of_row(name: str, i: int) -> list[float]:
        return measure.slopes(name, exact, {window: mixed.heads}, part=[i])[window].tolist()

    values = {}
    for name, rows in measure.rows.items():
        total = torch.zeros(len(mixed.heads), dtype=torch.float64)
        for i in range(len(rows)):
            slopes = torch.tensor(steps.step(f"{name} {i}", partial(of_row, name, i)), dtype=torch.float64)
            total += slopes * rows[i : i + 1].count
        values[name] = (total / max(1, rows.count)).tolist()
    return values


def _ablate(measure: Measure, window: int, exact: Mapping[str, float], steps: _Steps) -> Values:
    """The rise of the loss with each head cut alone, one step a row and layer."""
    values = {}
    for name, rows in measure.rows.items():
        total = torch.zeros(len(measure.mixed.heads), dtype=torch.float64)
        for i in range(len(rows)):
            of_row = partial(measure.ablated, window, rows[i : i + 1])
            losses = steps.sequence(f"{name} {i}", len(measure.mixed.layers), of_row)
            total += torch.tensor([x for of_layer in losses for x in of_layer], dtype=torch.float64)
        values[name] = (total / max(1, rows.count) - exact[name]).tolist()
    return values
