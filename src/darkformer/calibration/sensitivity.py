"""Which heads need their far field: what is lost when a kv head sees the window and the sinks only.

Two things may be lost. `text`: how far the loss of ordinary text rises (nats per token). `recall`: how far the
log-probability of numbers falls that were told long ago (nats per token of the number). They rank heads differently.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import native_dtype
from ..errors import ConfigError, InputError, NonFiniteError, RunFolderError
from ..hf.fingerprint import describe_base
from ..records import read_json, write_json
from ..reporting import Progress
from .mixed import EXACT, MixedAttention, checkpointed, decoder_layers, replaced_forward
from .rows import Rows, recall_rows, row_losses, text_rows

METHODS: dict[str, str] = {
    "elimination": "first-order losses measured again and again while the least needed heads are cut, round by round",
    "gradient": "first-order losses from one pass at the middle of the way, every head half cut",
    "ablation": "the true loss with one head cut at a time: the slowest, blind to heads that stand in for one another",
}
#: Shares of the heads that are still exact after each round of the elimination.
ROUNDS = (0.4, 0.22, 0.15, 0.1, 0.07, 0.045)
#: Where between exact (0) and cut (1) the first-order loss is taken. At 0 a trained model's loss is nearly stationary
#: and at 1 it is steep: the slope in the middle is exact for a quadratic.
MIDDLE = 0.5
#: Rows of one ablation that run together: bounds its memory.
ROWS_AT_ONCE = 4
#: Rows of text, and as many of recall, that one round of the elimination looks at; they take turns. Once no more than
#: this share of the heads is exact, every row: one head more or less decides there.
ROWS_A_ROUND, EVERY_ROW_FROM = 2, 0.15
#: Bytes that one backward pass may keep; above, layers compute again in it (a third more time). What a layer keeps of
#: a token for each number of its hidden state, in bytes.
KEPT_BYTES, BYTES_A_NUMBER = 4 << 30, 80
#: Nats per token of all heads together below which a loss needs no far field: shares of it would be noise.
SMALLEST_TOTAL = 0.01
FILE = "sensitivity.json"


@dataclass(frozen=True)
class HeadSensitivity:
    """What one kv head's far field is worth.

    Attributes:
        layer, head: numbers of the layer and of the kv head in it.
        text: rise of the loss in nats per token. recall: the same over the recalled numbers' tokens, None if not asked.
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
        order: (layer, head) in the order in which they deserve softmax.
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


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode, and no gradients of weights: the backward pass then costs no more than a forward pass."""
    training = model.training
    learning = [x for x in model.parameters() if x.requires_grad]
    try:
        model.eval()
        for x in learning:
            x.requires_grad_(False)
        yield
    finally:
        for x in learning:
            x.requires_grad_(True)
        model.train(training)


class Measure:
    """Losses of a softmax model under windows per kv head, and their first-order changes.

    Args:
        rows: name (`text`, `recall`) → what is scored.
        dtype: float32 or bfloat16 (autocast).
    """

    def __init__(self, model: Any, mixed: MixedAttention, rows: Mapping[str, Rows], dtype: str) -> None:
        self.model, self.mixed, self.rows, self.dtype = model, mixed, rows, dtype
        self.blocks = decoder_layers(model, mixed.modules)

    def _finite(self, loss: float) -> float:
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise NonFiniteError(f"the loss of a calibration row is {loss}: the model or the text holds NaN.")
        return loss

    @torch.no_grad()
    def losses(self, windows: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
        """Nats per scored token with these windows (layers × kv heads), everything exact without."""
        self.mixed.reset(windows)
        found = {}
        with self.mixed.active():
            for name, rows in self.rows.items():
                total = sum(float(row_losses(self.model, rows[i : i + 1], self.dtype)) for i in range(len(rows)))
                found[name] = self._finite(total / max(1, rows.count))
        return found

    def slopes(
        self, name: str, windows: Sequence[Sequence[int]], others: Mapping[int, Sequence[tuple[int, int]]], *,
        at: float = 0.0, part: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:  # fmt: skip
        """First-order changes of a loss when heads go over to another window, from one backward pass a row.

        Args:
            name: which loss.
            windows: the state, layers × kv heads.
            others: another window → (index of the layer, kv head) of the heads that may go over to it.
            at: where between the two the slope is taken, for all of them at once: 0 at the state, 1 at the other.
            part: which rows are used; default all.

        Returns:
            window → one number a head (float64), in the order given, in nats per scored token.
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
                self._finite(float(loss.detach()))
                loss.backward()
                count += row.count
        found = {}
        for other, heads in others.items():
            values = []
            for index, g in heads:
                state = mixed.states[index]
                gradient = state.gates[other].grad
                assert gradient is not None
                values.append(float(gradient[state.others[other].index(g)]))
            found[other] = torch.tensor(values, dtype=torch.float64) / max(1, count)
        mixed.reset()
        return found

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
            skips, _ = self._skipping(row)
        for index, layer in list(enumerate(mixed.layers))[start:]:
            found: list[float] = []
            for heads in torch.arange(layer.num_kv_heads).split(ROWS_AT_ONCE):
                gates = torch.zeros(len(heads), layer.num_kv_heads, dtype=torch.bool)
                gates[torch.arange(len(heads)), heads] = True
                mixed.reset()
                mixed.states[index].others[window] = list(range(layer.num_kv_heads))
                mixed.states[index].gates[window] = gates.to(self._device(index))
                with mixed.active(), skips(index, len(heads)):
                    losses = row_losses(self.model, _repeated(row, len(heads)), self.dtype)
                found += [self._finite(float(x)) for x in losses]
            mixed.reset()
            yield found

    def _skipping(self, row: Rows) -> tuple[Any, bool]:
        """A context for (layer, rows) in which the layers below are not computed again, and whether it does that.

        Whether the model's structure allows it is tried in its middle: the loss must be the same.
        """
        nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
        blocks = self.blocks
        if blocks is None:
            row_losses(self.model, row, self.dtype)
            return nothing, False
        outputs: list[Any] = [None] * len(blocks)
        attending = {id(m): i for i, m in enumerate(self.mixed.modules)}
        place = {
            attending[id(m)]: b for b, block in enumerate(blocks) for m in block.modules() if id(m) in attending
        }  # fmt: skip

        def recording(i: int, module: Any, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                outputs[i] = forward(*args, **kwargs)
                return outputs[i]

            return run

        with replaced_forward(blocks, recording):
            wanted = float(row_losses(self.model, row, self.dtype))

        def skips(index: int, count: int) -> contextlib.AbstractContextManager[None]:
            below = place[index]

            def skipping(i: int, module: Any, forward: Any) -> Any:
                return lambda *args, **kwargs: _expanded(outputs[i], count)

            return replaced_forward(blocks[:below], skipping)

        try:
            with skips(len(self.mixed.layers) // 2, 1):
                same = abs(float(row_losses(self.model, row, self.dtype)) - wanted) <= 1e-5 * abs(wanted)
        except Exception:  # a model that looks at what its layers leave behind
            same = False
        return (skips, True) if same else (nothing, False)


def _repeated(row: Rows, count: int) -> Rows:
    mask = None if row.mask is None else row.mask.expand(count, -1)
    return Rows(row.ids.expand(count, -1), mask, row.labels.expand(count, -1))


def _expanded(output: Any, count: int) -> Any:
    """What a layer gave for one row, for several equal rows."""
    if isinstance(output, Tensor):
        return output.expand(count, *output.shape[1:])
    return tuple(_expanded(x, count) if isinstance(x, Tensor) else x for x in output)


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
    """What each kv head of a softmax model loses without its far field, and in which order heads deserve softmax.

    The model is not converted and stays as it is. Layers that are sliding-window already are left out.

    Args:
        model: a causal language model of transformers with softmax attention.
        batches: token ids (B, L), or dicts with input_ids and attention_mask. Two to eight rows of the length the model
            is used at: a head whose window reaches over the whole text loses nothing.
        tokenizer: the model's own; numbers to be recalled are then judged as well. Without, text alone.
        method: one of `METHODS`.
        window, sinks: what a head sees whose far field is cut.
        context: tokens of a recall prompt; default L. prompts: how many; each asks for several numbers.
        seed: of the prompts. Score the choice with others.
        dtype: `bfloat16` runs under autocast, `auto` where the machine multiplies it natively.
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
    dtype = native_dtype() if dtype == "auto" else dtype
    measure = measurement(
        model, batches, tokenizer=tokenizer, sinks=sinks, longest=window, context=context, prompts=prompts, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    settings = {
        "method": method, "window": window, "sinks": sinks, "dtype": dtype, "model": describe_base(model),
        "rows": {name: _digest(rows) for name, rows in measure.rows.items()},
        "rounds": [list(ROUNDS), ROWS_A_ROUND, EVERY_ROW_FROM] if method == "elimination" else None,
    }  # fmt: skip
    store = _Store(None if folder is None else Path(folder) / FILE, settings)
    if "result" in store.content:
        return Sensitivity.from_dict(store.content["result"])
    with frozen(model):
        result = _Run(measure, window, store, progress).run(method, max(x.ids.shape[1] for x in measure.rows.values()))
    store.put("result", result.to_dict())
    return result


@dataclass(frozen=True)
class WindowChange:
    """What changes, to first order, when one kv head goes over from its window to another.

    Attributes:
        layer, head: numbers of the layer and of the kv head in it.
        window: the other window, EXACT (0) for softmax.
        text, recall: change of the loss in nats per token, below 0 where it falls; recall None if not asked.
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
    """What a budget trades: first-order losses of other windows, at a state where some heads are exact already.

    The slopes are taken halfway, all heads at once, for one of `others` after the other: their sum over many heads says
    little, their order and their ratio to bytes say where to spend next.

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
        dtype=native_dtype() if dtype == "auto" else dtype,
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
    if lacking := sorted({x.layer for x in layers} - set(by_layer)):
        raise ConfigError(f"windows has no entry for layer {', '.join(map(str, lacking))}.")
    state = [[EXACT if (x.layer, g) in exact else by_layer[x.layer] for g in range(x.num_kv_heads)] for x in layers]
    total, done = len(others) * sum(map(len, measure.rows.values())), 0
    changes: list[WindowChange] = []
    with frozen(model):
        for other in others:
            heads = [(i, g) for i, g in measure.mixed.heads if state[i][g] not in (EXACT, other)]
            values: dict[str, Tensor] = {}
            for name, rows in measure.rows.items():
                summed = torch.zeros(len(heads), dtype=torch.float64)
                for i in range(len(rows)):
                    summed += (
                        measure.slopes(name, state, {other: heads}, at=MIDDLE, part=[i])[other] * rows[i : i + 1].count
                    )
                    done += 1
                    if progress:
                        progress(done, total)
                values[name] = summed / max(1, rows.count)
            recall = values.get("recall")
            changes += [
                WindowChange(
                    layers[i].layer, g, other, float(values["text"][n]), None if recall is None else float(recall[n])
                )
                for n, (i, g) in enumerate(heads)
            ]
    return changes


def measurement(
    model: Any, batches: Iterable[Any], *, tokenizer: Any, sinks: int, longest: int, context: int | None, prompts: int,
    seed: int, dtype: str,
) -> Measure:  # fmt: skip
    """What `sensitivity` measures with: its checks, and its rows.

    Args:
        longest: the largest window there will be, which the rows must exceed.

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
    return Measure(model, mixed, rows, dtype)


def _digest(rows: Rows) -> str:
    total = hashlib.sha256()
    for x in (rows.ids, rows.labels):
        total.update(x.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


class _Store:
    """Partial results by name, in a file that is written as they come; in memory without one.

    Raises:
        RunFolderError: the file holds results of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings}
        if path is None or not path.is_file():
            return
        found = read_json(path)
        before = found.get("settings", {})
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            raise RunFolderError(
                f"{path} holds a sensitivity with another {' and '.join(changed)}: choose another folder or delete it."
            )
        self.content = found

    def put(self, name: str, value: Any) -> None:
        self.content[name] = value
        if self.path is not None:
            write_json(self.path, self.content)


def _totals(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What all heads lose together, by kind; heads that gain do not pay for others."""
    return {name: max(sum(max(x, 0.0) for x in of_heads), SMALLEST_TOTAL) for name, of_heads in values.items()}


def _ranked(heads: Iterable[int], values: Mapping[str, Sequence[float]], totals: Mapping[str, float]) -> list[int]:
    """Heads by their share of the totals, text and recall counting alike; the largest first.

    Shares of what is really lost when all heads are cut would count recall three times as much: its slopes in the
    middle add up to three times that.
    """
    return sorted(heads, key=lambda n: (-sum(values[name][n] / totals[name] for name in totals), n))


class _Run:
    """One measurement: its steps, which are not repeated when the store has them, and their progress."""

    def __init__(self, measure: Measure, window: int, store: _Store, progress: Progress | None) -> None:
        self.measure, self.window, self.store, self.progress = measure, window, store, progress
        self.heads = measure.mixed.heads
        self.done = self.total = 0

    def _tick(self, fresh: bool) -> None:
        self.done += 1
        if fresh and self.progress:
            self.progress(self.done, self.total)

    def _step(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns (plain values), now or in an earlier run."""
        fresh = name not in self.store.content
        if fresh:
            self.store.put(name, compute())
        self._tick(fresh)
        return self.store.content[name]

    def run(self, method: str, context: int) -> Sensitivity:
        """Measures by one of `METHODS`."""
        layers = self.measure.mixed.layers
        rounds = self._rounds()
        rows = sum(map(len, self.measure.rows.values()))
        self.total = 2 + {"ablation": rows * len(layers), "gradient": rows, "elimination": len(rounds)}[method]
        exact = self._step("exact", self.measure.losses)
        cut = self._step("cut", lambda: self.measure.losses([[self.window] * x.num_kv_heads for x in layers]))
        if method == "elimination":
            values, order = self._eliminate(rounds)
        else:
            values = self._ablate(exact) if method == "ablation" else self._gradients()
            order = _ranked(range(len(self.heads)), values, _totals(values))
        numbers = [(layers[i].layer, g) for i, g in self.heads]
        recall = values.get("recall")
        return Sensitivity(
            rows=tuple(
                HeadSensitivity(layer, g, values["text"][n], None if recall is None else recall[n])
                for n, (layer, g) in enumerate(numbers)
            ),
            order=tuple(numbers[n] for n in order),
            method=method, window=self.window, sinks=self.measure.mixed.sinks, context=context, exact=exact, cut=cut,
        )  # fmt: skip

    def _rounds(self) -> list[int]:
        """How many heads are still exact after each round."""
        sizes = sorted({round(share * len(self.heads)) for share in ROUNDS} | {0}, reverse=True)
        return [size for size in sizes if size < len(self.heads)]

    def _eliminate(self, rounds: Sequence[int]) -> tuple[dict[str, list[float]], list[int]]:
        kept, order = list(range(len(self.heads))), list[int]()
        values = {name: [0.0] * len(self.heads) for name in self.measure.rows}
        totals: dict[str, float] = {}
        for turn, size in enumerate(rounds):
            found = self._step(f"round {turn}", lambda turn=turn, kept=kept: self._round(turn, kept))  # type: ignore[misc]
            totals = totals or _totals(found)
            for name in values:
                for n, value in zip(kept, found[name], strict=True):
                    values[name][n] = value
            ranked = _ranked(kept, values, totals)
            order = ranked[size:] + order
            kept = sorted(ranked[:size])
        return values, order

    def _round(self, turn: int, kept: Sequence[int]) -> dict[str, list[float]]:
        """Slopes of the heads that are still exact; rows take turns, so that no few of them decide everything."""
        state = [[self.window] * layer.num_kv_heads for layer in self.measure.mixed.layers]
        for index, g in (self.heads[n] for n in kept):
            state[index][g] = EXACT
        found = {}
        for name, rows in self.measure.rows.items():
            few = len(kept) > EVERY_ROW_FROM * len(self.heads)
            part = sorted({(ROWS_A_ROUND * turn + i) % len(rows) for i in range(ROWS_A_ROUND if few else len(rows))})
            others = {self.window: [self.heads[n] for n in kept]}
            found[name] = self.measure.slopes(name, state, others, at=MIDDLE, part=part)[self.window].tolist()
        return found

    def _gradients(self) -> dict[str, list[float]]:
        exact = [[EXACT] * layer.num_kv_heads for layer in self.measure.mixed.layers]
        found = {}
        for name, rows in self.measure.rows.items():
            total = torch.zeros(len(self.heads), dtype=torch.float64)
            for i in range(len(rows)):
                compute = lambda name=name, i=i: self.measure.slopes(  # noqa: E731
                    name, exact, {self.window: self.heads}, at=MIDDLE, part=[i]
                )[self.window].tolist()
                total += torch.tensor(self._step(f"{name} {i}", compute), dtype=torch.float64) * rows[i : i + 1].count
            found[name] = (total / max(1, rows.count)).tolist()
        return found

    def _ablate(self, exact: Mapping[str, float]) -> dict[str, list[float]]:
        found = {}
        for name, rows in self.measure.rows.items():
            total = torch.zeros(len(self.heads), dtype=torch.float64)
            for i in range(len(rows)):
                key = f"{name} {i}"
                losses: list[list[float]] = list(self.store.content.get(key, []))
                for _ in losses:
                    self._tick(False)
                if len(losses) < len(self.measure.mixed.layers):
                    for of_layer in self.measure.ablated(self.window, rows[i : i + 1], len(losses)):
                        losses.append(of_layer)
                        self.store.put(key, losses)
                        self._tick(True)
                total += torch.tensor([x for of_layer in losses for x in of_layer], dtype=torch.float64)
            found[name] = (total / max(1, rows.count) - exact[name]).tolist()
        return found
