"""The demo: one real pretrained model, linearized three ways, compared with softmax under the same budget."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError, DarkConfig, DemoConfig, TrainConfig
from ..cost import kv_cache_bytes, state_bytes
from ..hf.convert import dark_layers
from ..hf.load import demo_model_path, load_model, load_tokenizer, save_model
from ..train.linearize import calibrated, load_text, scored, trained
from ..train.record import RUN_FILE, environment, open_run, read_json, write_json
from .console import RichReporter
from .generation import generate_text
from .report import write_report

#: Length at which state and key/value cache are compared.
CACHE_TOKENS = 8192
#: Rough work of one unit on two cores, seconds: only the ratios matter, for the bar over everything.
WORK = {"step": 3.5, "evaluate": 4.0, "calibrate": 15.0, "generate": 6.0}


@dataclass(frozen=True)
class Variant:
    """One row of the table. `config` None is softmax attention."""

    name: str
    title: str
    config: DarkConfig | None


def variants(default: DarkConfig) -> tuple[Variant, ...]:
    """Softmax, the paper's two forms at the same m, the default, and the default's two parts alone."""
    paper = DarkConfig.paper(default.num_features, seed=default.seed)
    return (
        Variant("softmax", "softmax", None),
        Variant("performer", "Performer, paper form", replace(paper, method="performer")),
        Variant("dark-paper", "DARK, paper form", paper),
        Variant("default", "default, both parts", default),
        Variant("exact-part", "default, exact part", replace(default, method="local")),
        Variant("features-only", "default, features", replace(default, window=0, sinks=0)),
    )


def _bytes(config: DarkConfig | None, model: Any) -> dict[str, int]:
    """Bytes that decoding one sequence keeps at `CACHE_TOKENS` tokens: key/value cache, and what this variant keeps.

    Layers that stay as they are (sliding windows) keep at most their window, in both columns.
    """
    settings = model.config
    heads = settings.num_attention_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    shape = {"num_kv_heads": getattr(settings, "num_key_value_heads", None) or heads, "head_dim": head_dim}
    kinds = getattr(settings, "layer_types", None) or ["full_attention"] * settings.num_hidden_layers
    converted = {fm.layer for fm in dark_layers(model) if fm.config.method != "exact"}
    own = cache = 0
    for layer, kind in enumerate(kinds):
        sliding = kind == "sliding_attention" and getattr(settings, "sliding_window", None)
        kept = kv_cache_bytes(min(CACHE_TOKENS, sliding or CACHE_TOKENS), **shape)
        cache += kept
        own += state_bytes(config, **shape) if config is not None and layer in converted else kept
    return {"state_bytes": own, "kv_cache_bytes": cache}


class Demo:
    """Runs the variants one after the other; each finished one is a JSON file that a later run starts from."""

    def __init__(
        self, demo: DemoConfig, default: DarkConfig, budget: TrainConfig, out: Path, reporter: RichReporter
    ) -> None:
        if budget.train == "geometry":
            raise ConfigError(
                "train='geometry': the demo trains softmax and Performer alike, and they have no geometry. "
                "Use all, qkv or none here; darkformer linearize trains the geometry of one model."
            )
        if default.window == 0:
            raise ConfigError(
                "window=0: the demo also measures the exact part alone, so it needs a window of at least 1."
            )
        self.demo, self.budget, self.out, self.reporter = demo, budget, out, reporter
        self.variants = variants(default)
        self.model_name = demo.model or str(demo_model_path())
        # The package's path differs from machine to machine; its file's name says which model it is.
        shown = demo.model or Path(self.model_name).name
        self.settings = {
            "command": "demo", **asdict(demo), "model": shown,
            "data": list(demo.data), "config": default.to_dict(), "budget": asdict(budget),
        }  # fmt: skip

    def run(self, *, overwrite: bool = False) -> dict[str, Any]:
        """All variants, then table, plots, report and record. Returns the record."""
        if open_run(self.out, self.settings, resume=True, overwrite=overwrite):
            if read_json(self.out / RUN_FILE)["finished"]:
                self.reporter.say(f"{self.out} holds this run, finished: here is its record. --overwrite runs again.")
                return read_json(self.out / "record.json")
            self.reporter.say(f"continuing the run in {self.out}")
        with self.reporter.stage(f"load text and {self.settings['model']}", 1):
            tokenizer = load_tokenizer(self.model_name)
            blocks, validation = load_text(self.demo.data, (), tokenizer, self.budget.seq_len)
            validation = validation[: max(1, self.demo.eval_tokens // self.budget.seq_len)]
            base = load_model(self.model_name)
        rows = {}
        with self.reporter.whole("everything", *self._work()):
            for variant in self.variants:
                rows[variant.name] = self._row(variant, base, tokenizer, blocks, validation)
        record = {
            **self.settings, "environment": environment(), "rows": list(rows.values()),
            "train_blocks": len(blocks), "validation_blocks": len(validation), "cache_tokens": CACHE_TOKENS,
            "seconds": round(sum(row["seconds"] for row in rows.values()), 1),
        }  # fmt: skip
        write_json(self.out / "record.json", record)
        write_report(record, self.out)
        write_json(self.out / RUN_FILE, {"settings": self.settings, "finished": True})
        return record

    def _variant_work(self, variant: Variant) -> float:
        steps = self.budget.steps if self.budget.train != "none" else 0
        work = WORK["step"] * steps + (3 if steps else 1) * WORK["evaluate"]
        work += WORK["calibrate"] if variant.config and variant.config.cold_start else 0.0
        return work + (WORK["generate"] if variant.name in ("softmax", "default") else 0.0)

    def _work(self) -> tuple[float, float]:
        """(all, done already) for the bar over everything."""
        done = [v for v in self.variants if self._stage_file(v).is_file()]
        return sum(map(self._variant_work, self.variants)), sum(map(self._variant_work, done))

    def _stage_file(self, variant: Variant) -> Path:
        return self.out / "stages" / f"{variant.name}.json"

    def _row(self, variant: Variant, base: Any, tokenizer: Any, blocks: Tensor, validation: Tensor) -> dict[str, Any]:
        """One variant: convert, calibrate, score, finetune, score. Skipped if its file is there."""
        file = self._stage_file(variant)
        if file.is_file():
            return read_json(file)
        started, resumed = time.perf_counter(), (self.out / "checkpoints" / variant.name).is_dir()
        reporter, title = self.reporter, variant.title
        model = copy.deepcopy(base)
        row: dict[str, Any] = {"name": variant.name, "title": title, "calibration": [], "resumed": resumed}
        if variant.name == "softmax":
            row["generation"] = self._generation(model, tokenizer)
        if variant.config is not None:
            reporter.weigh(WORK["calibrate"] if variant.config.cold_start else 0.0)
            row["calibration"] = calibrated(model, variant.config, blocks, reporter, title)
        row["curve"] = self._curve(variant, model, blocks, validation)
        row["before"], row["after"] = row["curve"][0], row["curve"][-1]
        row |= _bytes(variant.config, model)
        if variant.name == "default":
            row["generation"] = self._generation(model, tokenizer)
            save_model(model, tokenizer, self.out / "model")
        row["seconds"] = round(time.perf_counter() - started, 1)
        write_json(file, row)
        shutil.rmtree(self.out / "checkpoints" / variant.name, ignore_errors=True)
        after = row["after"]
        reporter.say(
            f"  {title:<22} loss {after['loss']:.3f}  accuracy {after['accuracy']:.1%}  {row['seconds']:.0f} s"
        )
        return row

    def _curve(self, variant: Variant, model: Any, blocks: Tensor, validation: Tensor) -> list[dict[str, Any]]:
        """Scores before, halfway and after finetuning; kept on disk, for a run that is interrupted in between."""
        file = self.out / "checkpoints" / variant.name / "curve.json"
        curve: list[dict[str, Any]] = read_json(file) if file.is_file() else []
        budget, title = self.budget, variant.title

        def score(step: int) -> None:
            if all(point["step"] != step for point in curve):
                self.reporter.weigh(WORK["evaluate"])
                curve.append({"step": step, **scored(model, validation, budget, self.reporter, title)})
                write_json(file, curve)

        score(0)
        self.reporter.weigh(WORK["step"] * budget.steps)
        halfway = budget.steps // 2
        trained(
            model, blocks, budget, file.parent, self.reporter, title,
            after_step={halfway: lambda: score(halfway)} if halfway else {},
        )  # fmt: skip
        score(budget.steps if budget.train != "none" else 0)
        return sorted(curve, key=lambda point: point["step"])

    def _generation(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        self.reporter.weigh(WORK["generate"])
        with self.reporter.stage("generate", 1) as advance:
            result = generate_text(model, tokenizer, self.demo.prompt, self.demo.new_tokens)
            advance(1, 1)
        return result
