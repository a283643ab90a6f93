"""What each form of attention is worth for its bytes: quality, recall, memory and speed of named configurations.

Rows are measured one after the other on one softmax model, which is afterwards as it was. What a row has measured is a
file at once, so that an interrupted run goes on there.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..config import ConfigError, DarkConfig, InputError, native_dtype
from ..cost import model_bytes
from ..hf.cache import cache_bytes
from ..hf.convert import convert, converted_modules, dark_layers, revert
from ..train.evaluate import evaluate
from ..train.record import environment, read_json, write_json
from ..train.report import Reporter, Silent
from .bench_paths import DTYPES
from .recall import RecallTask, recall

#: The record's file in the run's folder.
RECORD = "frontier.json"
#: Numbers at four distances, some of them beyond every window; the last is about the context.
RECALL = RecallTask(distances=(256, 512, 1024, 1900), trials=40, numbers=8, batch_size=1)
#: Tokens of the prompt that warms a model up before it is timed.
WARM_UP = 64


@dataclass(frozen=True)
class FrontierRow:
    """One form of attention. `config` None is softmax; `budget` is its label on the picture's line."""

    name: str  # of its file: letters, digits, - and _
    title: str
    config: DarkConfig | None
    budget: str = ""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ConfigError(f"row name {self.name!r}: it names a file, so use letters, digits, '-', '_' and '.'.")


@dataclass(frozen=True)
class FrontierSettings:
    """What is measured of every row.

    Attributes:
        dtype: of scores and recall (autocast) and of the timed model's weights; `auto` is what the machine multiplies.
        element_bytes: of keys and values in the computed bytes; None: of the timed model's.
        lengths: tokens of one sequence whose bytes are computed.
        prefill: tokens of the timed prompt; 0 times nothing. repeats: turns of it, of which the median counts.
        batches: sequences that generate at once after that prompt. new_tokens: timed steps of each.
    """

    dtype: str = "auto"
    element_bytes: int | None = None
    lengths: tuple[int, ...] = (8192, 32768)
    recall: RecallTask | None = RECALL
    prefill: int = 8192
    repeats: int = 3
    batches: tuple[int, ...] = ()
    new_tokens: int = 16

    def __post_init__(self) -> None:
        if self.dtype == "auto":  # at once, so that the record says what ran
            object.__setattr__(self, "dtype", native_dtype())
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r}: choose auto, float32 or bfloat16.")
        if self.element_bytes is None:
            object.__setattr__(self, "element_bytes", DTYPES[self.dtype].itemsize)
        if not self.lengths or min((*self.lengths, *self.batches, self.repeats, self.new_tokens)) < 1:
            raise ConfigError(
                f"lengths={self.lengths}, batches={self.batches}, repeats={self.repeats}, new_tokens={self.new_tokens}:"
                " each must be at least 1, and there must be a length."
            )


def sequence_bytes(model: Any, seq_len: int, *, element_bytes: int) -> tuple[int, int]:
    """(bytes one sequence of `seq_len` tokens keeps in this model, bytes of its softmax cache)."""
    settings = model.config.get_text_config(decoder=True)
    modules = converted_modules(model)
    layers = [module.__dict__["dark_layer"] for module in modules]
    config = DarkConfig.from_dict(dict(modules[0].config.darkformer)) if modules else None
    own, cache = (
        model_bytes(settings, layers, form, seq_len, element_bytes=element_bytes) for form in (config, None)
    )  # fmt: skip
    return own, cache


def measure_frontier(
    model: Any, tokenizer: Any, rows: Sequence[FrontierRow], blocks: Tensor, folder: Path, *,
    settings: FrontierSettings | None = None, calibrate: Callable[[Any], Any] | None = None,
    filler: Tensor | None = None, reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures `rows` on a softmax model, which is softmax again afterwards; writes `frontier.json` into `folder`.

    For each row: convert and calibrate, score at the context, recall, bytes; then the speed of all rows in turns, so
    that a machine that changes its speed changes it for all alike. A row that fails (no memory, a configuration that
    the model cannot have) holds an `error` beside what it has measured, and the next one follows.

    Args:
        blocks: (N, context) tokens of text that nobody calibrated on.
        folder: `stages/NAME.json` holds what is done of each row; measured again if anything it depends on changes.
        calibrate: called with the converted model; what it returns, dataclasses or plain values, goes to the record.
        filler: text around the recalled numbers, see `recall`; None: `blocks`.

    Returns:
        The record: `rows` of name, title, budget, config (after calibration), calibration, score, recall, bytes and
        kv_cache_bytes by length, prefill seconds, generation, error (or None).

    Raises:
        InputError: blocks of the wrong shape, rows without a name of their own. ConversionError: `model` is converted.
    """
    settings, reporter = settings or FrontierSettings(), reporter or Silent()
    names = [row.name for row in rows]
    if blocks.dim() != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise InputError(f"blocks of shape {tuple(blocks.shape)}: give (N, context) tokens, one block at least.")
    if not rows or len(set(names)) < len(names):
        raise InputError(f"rows named {', '.join(names) or '(none)'}: give at least one, each with its own name.")
    if next(dark_layers(model), None) is not None:
        raise InputError("the model is converted: a frontier starts from softmax. Call darkformer.revert(model) first.")
    run = _Run(model, tokenizer, blocks, folder, settings, calibrate, blocks if filler is None else filler, reporter)
    results = [run.quality(row) for row in rows]
    if settings.prefill:
        run.speed(rows, results)
    record = {
        "benchmark": "frontier", "model": Path(model.config.name_or_path or type(model).__name__).name,
        "context": blocks.shape[1], "settings": _plain(settings), "rows": results, "environment": environment(),
    }  # fmt: skip
    write_json(folder / RECORD, record)
    return record


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down: what JSON gives back."""
    if isinstance(value, DarkConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _reason(error: Exception) -> str:
    """One line of an error, for a row."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Run:
    """The measurements of one model, each kept in a file."""

    def __init__(
        self, model: Any, tokenizer: Any, blocks: Tensor, folder: Path, settings: FrontierSettings,
        calibrate: Callable[[Any], Any] | None, filler: Tensor, reporter: Reporter,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.blocks, self.folder = model, tokenizer, blocks, folder
        self.settings, self.calibrate, self.filler, self.reporter = settings, calibrate, filler, reporter
        self.text = [list(blocks.shape), zlib.crc32(blocks.cpu().numpy().tobytes())]

    def _kept(self, name: str, inputs: Any) -> Any:
        """What the file of a stage holds, if it was measured from the same inputs; else None."""
        file = self.folder / "stages" / f"{name}.json"
        stage = read_json(file) if file.is_file() else {}
        return stage.get("result") if stage.get("inputs") == _plain(inputs) else None

    def _keep(self, name: str, inputs: Any, result: Any) -> None:
        write_json(self.folder / "stages" / f"{name}.json", {"inputs": _plain(inputs), "result": result})

    def quality(self, row: FrontierRow) -> dict[str, Any]:
        """Calibration, score, recall and bytes of one row."""
        s = self.settings
        inputs = {
            "config": row.config, "text": self.text, "dtype": s.dtype, "recall": s.recall, "lengths": s.lengths,
            "element_bytes": s.element_bytes, "calibrated": self.calibrate is not None,
        }  # fmt: skip
        label = {"name": row.name, "title": row.title, "budget": row.budget}
        if (kept := self._kept(row.name, inputs)) is not None:
            return {**label, **kept}
        started = time.perf_counter()
        result: dict[str, Any] = {"config": _plain(row.config), "calibration": None, "error": None}
        try:
            self._measure_quality(row, result)
        except Exception as error:  # whatever stops a row must not stop the others
            result["error"] = _reason(error)
            self.reporter.say(f"  {row.title}: {result['error']}")
        finally:
            if converted_modules(self.model):
                revert(self.model)
        result["seconds"] = round(time.perf_counter() - started, 1)
        if result["error"] is None:
            self._keep(row.name, inputs, result)
        return {**label, **result}

    def _measure_quality(self, row: FrontierRow, result: dict[str, Any]) -> None:
        s, model, title = self.settings, self.model, row.title
        if row.config is not None:
            with self.reporter.stage(f"{title}: convert and calibrate", 1) as advance:
                convert(model, row.config)
                if self.calibrate is not None:
                    result["calibration"] = _plain(self.calibrate(model))
                # Calibration may have switched features off.
                result["config"] = _plain(DarkConfig.from_dict(dict(converted_modules(model)[0].config.darkformer)))
                advance(1, 1)
        for name, i in (("bytes", 0), ("kv_cache_bytes", 1)):
            every = {n: sequence_bytes(model, n, element_bytes=s.element_bytes or 4) for n in s.lengths}
            result[name] = {str(n): both[i] for n, both in every.items()}
        with self.reporter.stage(f"{title}: evaluate", len(self.blocks)) as advance:
            result["score"] = evaluate(model, self.blocks, dtype=s.dtype, progress=advance).to_dict()
        if s.recall is not None:
            with self.reporter.stage(f"{title}: recall", 1) as advance:
                result["recall"] = recall(
                    model, self.tokenizer, s.recall, filler=self.filler, dtype=s.dtype, progress=advance
                )

    def speed(self, rows: Sequence[FrontierRow], results: Sequence[dict[str, Any]]) -> None:
        """Adds `prefill` and `generation` to the results of all rows that have not failed."""
        s = self.settings
        inputs = {
            name: getattr(s, name) for name in ("dtype", "prefill", "repeats", "batches", "new_tokens")
        } | {"rows": [result["config"] for result in results if result["error"] is None]}  # fmt: skip
        kept = self._kept("speed", inputs)
        if kept is None:
            alive = [(row, result) for row, result in zip(rows, results, strict=True) if result["error"] is None]
            kept = self._measure_speed(alive)
            if all(result["error"] is None for result in kept.values()):
                self._keep("speed", inputs, kept)
        for result in results:
            result |= kept.get(result["name"], {})

    @torch.inference_mode()
    def _measure_speed(self, alive: Sequence[tuple[FrontierRow, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        s = self.settings
        with torch.inference_mode(False):
            # Copies share their weights: a row costs its feature maps only. What calibration found does not change the
            # time, but for the heads that it left without features, which the configuration says.
            dtype = DTYPES[s.dtype]
            base = self.model if self.model.dtype == dtype else copy.deepcopy(self.model).to(dtype)
            found: dict[str, dict[str, Any]] = {row.name: {"error": None} for row, _ in alive}
            models: dict[str, Any] = {}
            for row, result in alive:
                models[row.name] = sharing_weights(base)
                if result["config"] is not None:
                    convert(models[row.name], DarkConfig.from_dict(result["config"]))
        prompt = self._prompt(s.prefill)
        seconds: dict[str, list[float]] = {row.name: [] for row, _ in alive}
        turns = [(turn, row) for turn in range(s.repeats) for row, _ in alive]
        with self.reporter.stage(f"prefill of {s.prefill:,} tokens, in turns", len(turns)) as advance:
            for i, (turn, row) in enumerate(turns):
                if found[row.name]["error"] is None:
                    try:
                        if turn == 0:
                            _prefill(models[row.name], prompt[:, :WARM_UP])
                        spent, cache = _prefill(models[row.name], prompt)
                        seconds[row.name].append(spent)
                        if turn == s.repeats - 1:
                            found[row.name]["generation"] = self._generation(models[row.name], cache)
                        del cache
                    except Exception as error:  # a row without memory must not stop the others
                        found[row.name]["error"] = _reason(error)
                        self.reporter.say(f"  {row.title}: {found[row.name]['error']}")
                advance(i + 1, len(turns))
        for name, times in seconds.items():
            if times:
                low, high = np.percentile(times, [25, 75])
                found[name]["prefill"] = {
                    "tokens": s.prefill, "median": statistics.median(times), "iqr": float(high - low), "turns": times,
                }  # fmt: skip
        return found

    def _prompt(self, length: int) -> Tensor:
        """(1, length) tokens of the scored text, repeated where it is shorter."""
        ids = self.blocks.flatten().repeat(-(-length // self.blocks.numel()))[:length]
        return ids[None].to(next(self.model.parameters()).device)

    def _generation(self, model: Any, cache: Any) -> list[dict[str, Any]]:
        """Speed of steps after the prompt in `cache` (one sequence), which is used up, and bytes of the cache.

        A larger batch repeats the cache: the prompt is read once.
        """
        device, points = next(model.parameters()).device, []
        for i, batch in enumerate(self.settings.batches):
            last = i == len(self.settings.batches) - 1
            own = cache if last else copy.deepcopy(cache)
            if batch > 1:
                own.batch_repeat_interleave(batch)
            token = torch.full((batch, 1), int(self.blocks[0, 0]), device=device)
            steps = []
            for _ in range(self.settings.new_tokens + 1):
                started = time.perf_counter()
                logits = model(token, past_key_values=own, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
                _synchronize(device)
                steps.append(time.perf_counter() - started)
            step = statistics.median(steps[1:])  # the first one allocates
            points.append({
                "batch": batch, "tokens_per_second": batch / step, "seconds_a_step": step,
                "cache_bytes": cache_bytes(own),
            })  # fmt: skip
            del own
        return points


def sharing_weights(model: Any) -> Any:
    """A copy of a model whose parameters and buffers are the original's own: no memory for weights.

    To convert a model in several ways at once. Neither may be trained.
    """
    own = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, own)


def _prefill(model: Any, prompt: Tensor) -> tuple[float, Any]:
    """Seconds of one pass over a prompt (1, L), and its cache."""
    started = time.perf_counter()
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    _synchronize(prompt.device)
    return time.perf_counter() - started, cache


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def frontier_cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, a row of cells each) of a record; what a row has not measured is empty."""
    settings, context = record["settings"], record["context"]
    distances = settings["recall"]["distances"] if settings["recall"] else []
    columns = ["attention", f"loss at {context:,}", "acc.", "of softmax"]
    columns += [f"recall at {distance:,}" for distance in distances]
    columns += [f"MB at {_thousands(length)}" for length in settings["lengths"]]
    columns += [f"of cache at {_thousands(settings['lengths'][0])}"]
    if settings["prefill"]:
        columns.append(f"prefill {_thousands(settings['prefill'])}, s")
        columns += [f"tokens/s × {batch}" for batch in settings["batches"]]
    softmax = softmax_row(record)
    reference = softmax["score"]["accuracy"] if softmax else 0.0
    rows = []
    for row in record["rows"]:
        score, cells = row.get("score"), [row["title"]]
        cells += [f"{score['loss']:.3f}", f"{score['accuracy']:.1%}"] if score else ["", ""]
        cells.append(f"{score['accuracy'] / reference:.1%}" if score and reference else "")
        points = {point["distance"]: point for point in row.get("recall", [])}
        cells += [f"{points[distance]['accuracy']:.0%}" if distance in points else "" for distance in distances]
        kept, cache = row.get("bytes", {}), row.get("kv_cache_bytes", {})
        cells += [f"{kept[str(length)] / 1e6:.1f}" if kept else "" for length in settings["lengths"]]
        first = str(settings["lengths"][0])
        cells.append(f"{kept[first] / cache[first]:.1%}" if kept else "")
        if settings["prefill"]:
            cells.append(f"{row['prefill']['median']:.2f}" if "prefill" in row else "")
            speeds = {point["batch"]: point["tokens_per_second"] for point in row.get("generation", [])}
            cells += [f"{speeds[batch]:.1f}" if batch in speeds else "" for batch in settings["batches"]]
        rows.append(cells)
    return columns, rows


def softmax_row(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row that the others are compared with, if it was scored."""
    return next((row for row in record["rows"] if row["config"] is None and row.get("score")), None)


def frontier_notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to read the table rightly, and which rows failed."""
    settings, asked = record["settings"], record["settings"]["recall"]
    notes = [
        f"Loss and next-token accuracy at {record['context']:,} tokens; MB: what one sequence keeps, with keys and "
        f"values of {settings['element_bytes']} bytes a number; {settings['dtype']}."
    ]
    if asked:
        notes.append(f"Recall: share of {asked['trials']} numbers a distance that are written whole.")
    return notes + [f"{row['title']} failed: {row['error']}" for row in record["rows"] if row["error"]]


def frontier_markdown(record: Mapping[str, Any]) -> str:
    """The table for a page."""
    columns, rows = frontier_cells(record)
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def frontier_table(record: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    columns, rows = frontier_cells(record)
    table = Table(title=Text(record["model"]), box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table
