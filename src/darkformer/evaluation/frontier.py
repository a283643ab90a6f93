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
from torch import Tensor

from ..calibration.budget import kept_bytes
from ..config import DarkConfig
from ..errors import ConfigError, InputError
from ..hf.cache import cache_bytes
from ..hf.convert import convert, revert
from ..hf.layers import config_of, converted_modules, dark_layers
from ..records import environment, read_kept, write_json, write_kept
from ..reporting import Reporter, Silent
from ..train.evaluate import evaluate
from .recall import recall
from .settings import FrontierSettings

#: The record's file in the run's folder.
RECORD = "frontier.json"
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


#: What a caller measures beside the rest.
Also = Callable[[FrontierRow, Any], dict[str, Any]]


def sequence_bytes(model: Any, seq_len: int, *, element_bytes: int) -> tuple[int, int]:
    """(bytes one sequence of `seq_len` tokens keeps in this model, bytes of its softmax cache)."""
    cache = kept_bytes(model, None, seq_len, element_bytes)
    own = kept_bytes(model, config_of(model), seq_len, element_bytes) if converted_modules(model) else cache
    return own, cache


def measure_frontier(
    model: Any, tokenizer: Any, rows: Sequence[FrontierRow], blocks: Tensor, folder: Path, *,
    settings: FrontierSettings | None = None, calibrate: Callable[[Any], Any] | None = None,
    filler: Tensor | None = None, reporter: Reporter | None = None, also: Also | None = None,
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
        also: called with each row and its model, scored and still converted; what it returns joins the row.

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
    filler = blocks if filler is None else filler
    run = _Run(model, tokenizer, blocks, folder, settings, calibrate, filler, reporter, also)
    results = [run.quality(row) for row in rows]
    if settings.prefill:
        run.speed(rows, results)
    record = {
        "benchmark": "frontier", "model": Path(model.config.name_or_path or type(model).__name__).name,
        "context": blocks.shape[1], "settings": _plain(settings), "rows": results, "environment": environment(),
    }  # fmt: skip
    write_json(folder / RECORD, record)
    return record


def measure_quality(
    model: Any, tokenizer: Any, blocks: Tensor, settings: FrontierSettings, result: dict[str, Any], *,
    filler: Tensor, reporter: Reporter, title: str,
) -> None:  # fmt: skip
    """Adds bytes, score and recall of a model as it is to `result`, each as soon as it is known."""
    work = row_work(None, blocks, settings)
    for n in settings.lengths:
        own, cache = sequence_bytes(model, n, element_bytes=settings.element_bytes)
        result.setdefault("bytes", {})[str(n)], result.setdefault("kv_cache_bytes", {})[str(n)] = own, cache
    reporter.weigh(work["evaluate"])
    with reporter.stage(f"{title}: evaluate", len(blocks)) as advance:
        result["score"] = evaluate(model, blocks, dtype=settings.dtype, progress=advance).to_dict()
    if settings.recall is not None:
        reporter.weigh(work["recall"])
        with reporter.stage(f"{title}: recall", 1) as advance:
            result["recall"] = recall(
                model, tokenizer, settings.recall, filler=filler, dtype=settings.dtype, progress=advance
            )


#: Rough seconds of 1,000 tokens of SmolLM2 on two cores, and of one calibration: for shares of a progress bar only.
THOUSAND_TOKENS, CALIBRATION = 1.0, 15.0


def row_work(row: FrontierRow | None, blocks: Tensor, settings: FrontierSettings) -> dict[str, float]:
    """Rough seconds of each stage of a row's quality; None stands for a softmax row."""
    asked = settings.recall
    prompts = 0 if asked is None else len(asked.distances) * asked.trials / max(asked.numbers, 1)
    return {
        "calibrate": CALIBRATION if row is not None and row.config is not None else 0.0,
        "evaluate": THOUSAND_TOKENS * blocks.numel() / 1000,
        "recall": THOUSAND_TOKENS * prompts * max(asked.distances) / 1000 if asked is not None else 0.0,
    }


def speed_work(rows: int, settings: FrontierSettings) -> float:
    """Rough seconds of timing so many rows."""
    return THOUSAND_TOKENS * rows * settings.repeats * settings.prefill / 1000


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


class _Run:
    """The measurements of one model, each kept in a file."""

    def __init__(
        self, model: Any, tokenizer: Any, blocks: Tensor, folder: Path, settings: FrontierSettings,
        calibrate: Callable[[Any], Any] | None, filler: Tensor, reporter: Reporter, also: Also | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.blocks, self.folder = model, tokenizer, blocks, folder
        self.settings, self.filler, self.reporter = settings, filler, reporter
        self.calibrate, self.also = calibrate, also
        self.text = [list(blocks.shape), zlib.crc32(blocks.cpu().numpy().tobytes())]

    def _kept(self, name: str, inputs: Any) -> Any:
        """What the file of a stage holds, if it was measured from the same inputs; else None."""
        file = self.folder / "stages" / f"{name}.json"
        if not file.is_file():
            return None
        return read_kept(file, lambda stage: stage["result"] if stage["inputs"] == _plain(inputs) else None)

    def _keep(self, name: str, inputs: Any, result: Any) -> None:
        write_kept(self.folder / "stages" / f"{name}.json", {"inputs": _plain(inputs), "result": result})

    def quality(self, row: FrontierRow) -> dict[str, Any]:
        """Calibration, score, recall and bytes of one row."""
        s = self.settings
        inputs = {
            "config": row.config, "text": self.text, "dtype": s.dtype, "recall": s.recall, "lengths": s.lengths,
            "element_bytes": s.element_bytes, "calibrated": self.calibrate is not None,
        }  # fmt: skip
        label = {"name": row.name, "title": row.title, "budget": row.budget}
        if (kept := self._kept(row.name, inputs)) is not None:
            return label | kept
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
        return label | result

    def _measure_quality(self, row: FrontierRow, result: dict[str, Any]) -> None:
        s, model, title = self.settings, self.model, row.title
        if row.config is not None:
            self.reporter.weigh(row_work(row, self.blocks, s)["calibrate"])
            with self.reporter.stage(f"{title}: convert and calibrate", 1) as advance:
                convert(model, row.config)
                if self.calibrate is not None:
                    result["calibration"] = _plain(self.calibrate(model))
                result["config"] = _plain(config_of(model))
                advance(1, 1)
        measure_quality(
            model, self.tokenizer, self.blocks, s, result, filler=self.filler, reporter=self.reporter, title=title
        )
        if self.also is not None:
            result |= _plain(self.also(row, model))

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
            # Copies share their weights. What calibration found does not change the time, but for heads that it left
            # without features, which the configuration says.
            dtype = getattr(torch, s.dtype)
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
        self.reporter.weigh(speed_work(len(alive), s))
        with self.reporter.stage(f"speed after {s.prefill:,} tokens, in turns", len(turns)) as advance:
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
            own = cache if i == len(self.settings.batches) - 1 else copy.deepcopy(cache)
            if batch > 1:
                own.batch_repeat_interleave(batch)
            token = torch.full((batch, 1), int(self.blocks[0, 0]), device=device)
            steps = []
            for _ in range(self.settings.new_tokens + 1):
                started = time.perf_counter()
                logits = model(token, past_key_values=own, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
                _wait(device)
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prefill(model: Any, prompt: Tensor) -> tuple[float, Any]:
    """Seconds of one pass over a prompt (1, L), and its cache."""
    started = time.perf_counter()
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    _wait(prompt.device)
    return time.perf_counter() - started, cache
