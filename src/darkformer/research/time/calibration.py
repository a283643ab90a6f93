"""Times small training steps of many shapes on this machine, once, and keeps what they say."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ...config import DarkConfig, has_bfloat16
from ...errors import ConfigError, InputError
from ...hf.convert import convert
from ...records import as_written, check_folder, environment, read_json, write_json
from ...reporting import Reporter, Silent
from ..bench_machine import limits, measure_in_turns
from .copies import FORWARD, Totals, step_operations, totals
from .fit import FITS, Fit, Timing, coefficients_of, fits, predicted, roofline
from .shape import Shape, llama_shape

#: Seconds of repetitions of one step; steps at least and at most.
SECONDS, LEAST, MOST = 0.6, 3, 15
#: Version of the file's layout and of the trials.
LAYOUT = 1
CLIP = 1.0


class Trial(NamedTuple):
    """A step that is timed."""

    name: str
    shape: Shape
    batch: int
    seq_len: int
    features: int = 0  # 0: softmax
    held_out: bool = False

    @property
    def config(self) -> DarkConfig | None:
        """The form of its attention."""
        return DarkConfig(num_features=self.features) if self.features else None


def trials() -> list[Trial]:
    """Shapes to fit, and wider, deeper and longer ones than any of them, held out."""
    chosen = []
    for hidden, head_dim in ((96, 32), (192, 64), (320, 64)):
        for layers, vocabulary, kv_heads in ((2, 8192, 1), (4, 1024, None)):
            shape = llama_shape(layers, hidden, vocabulary=vocabulary, head_dim=head_dim, kv_heads=kv_heads)
            for batch, seq_len in ((2, 128), (8, 128), (2, 512), (1, 1024)):
                chosen.append(Trial(f"{hidden} wide, {layers} deep", shape, batch, seq_len))
            chosen.append(Trial(f"{hidden} wide, {layers} deep, features", shape, 1, 1024, 64 if layers == 2 else 128))
    for hidden in (448, 640):
        shape = llama_shape(2, hidden, vocabulary=1024)
        chosen.append(Trial(f"wider: {hidden}", shape, 2, 512, held_out=True))
    chosen.append(Trial("wider: 512, features", llama_shape(2, 512, vocabulary=1024), 1, 1024, 128, True))
    for layers in (8, 12):
        shape = llama_shape(layers, 192, vocabulary=1024, kv_heads=1)
        chosen.append(Trial(f"deeper: {layers}", shape, 2, 512, held_out=True))
    chosen.append(Trial("deeper: 10, features", llama_shape(10, 192, vocabulary=1024), 1, 1024, 128, True))
    shape = llama_shape(2, 192, vocabulary=1024)
    for seq_len in (2048, 4096):
        chosen.append(Trial(f"longer: {seq_len}", shape, 1, seq_len, held_out=True))
    chosen.append(Trial("longer: 4096, features", shape, 1, 4096, 128, True))
    return chosen


def training_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, *, autocast: bool = False) -> Tensor:
    """One optimizer step on token ids (B, L), clipped; the loss, detached."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def adamw(model: Any, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `finetune`, one rate for all."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def model_of(shape: Shape, positions: int, config: DarkConfig | None = None) -> Any:
    """A model of this shape with random weights, in float32, converted where there is a configuration."""
    model = LlamaForCausalLM(shape.config(positions)).train()
    if config is not None:
        convert(model, config)
    return model


def measured(trial: Trial, dtype: str, seconds: float) -> dict[str, Any]:
    """Seconds of the trial's step and of its forward pass with the loss; medians, in turns of `seconds` each."""
    torch.manual_seed(0)
    model, autocast = model_of(trial.shape, trial.seq_len, trial.config), dtype == "bfloat16"
    optimizer = adamw(model, 1e-4)
    ids = torch.randint(5, trial.shape.vocabulary, (trial.batch, trial.seq_len))

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids, use_cache=False)

    def step() -> None:
        training_step(model, optimizer, ids, autocast=autocast)

    whole, alone = measure_in_turns([step, forward], seconds=seconds, least=LEAST, most=MOST)
    return {
        "name": trial.name, "batch": trial.batch, "seq_len": trial.seq_len, "features": trial.features,
        "held_out": trial.held_out, "shape": vars(trial.shape), "dtype": dtype, "seconds": whole["median"],
        "iqr": whole["iqr"], "forward_seconds": alone["median"],
    }  # fmt: skip


def _row_totals(row: Mapping[str, Any], phases: Sequence[str] = ()) -> Totals:
    shape = Shape(**{**row["shape"], "sliding": tuple(row["shape"]["sliding"])})
    config = DarkConfig(num_features=row["features"]) if row["features"] else None
    rows = step_operations(shape, row["batch"], row["seq_len"], config, autocast=row["dtype"] == "bfloat16")
    return totals(line for line in rows if not phases or line.phase in phases)


def timings(rows: Sequence[Mapping[str, Any]], dtype: str) -> list[Timing]:
    """The steps of one precision, with what the account says of them."""
    return [
        Timing(_row_totals(row), row["seconds"], row["held_out"], not row["features"])
        for row in rows
        if row["dtype"] == dtype
    ]


def forward_timings(rows: Sequence[Mapping[str, Any]], dtype: str) -> list[Timing]:
    """Their forward passes."""
    return [
        Timing(_row_totals(row, (FORWARD,)), row["forward_seconds"], row["held_out"], not row["features"])
        for row in rows
        if row["dtype"] == dtype
    ]


def dtypes() -> tuple[str, ...]:
    """Precisions this machine multiplies natively."""
    return ("float32", "bfloat16") if has_bfloat16() else ("float32",)


def machine() -> dict[str, Any]:
    """What a calibration holds for."""
    facts = environment()
    versions = {name: facts["versions"][name] for name in ("torch", "transformers")}
    return {"device": facts["device"], "cores": facts["cores"], "threads": facts["threads"], **versions}


def calibration_file() -> Path:
    """Where this machine's calibration is kept: darkformer/plan in $XDG_CACHE_HOME or ~/.cache.

    Another processor, number of threads or version of torch or transformers is another machine.

    Raises:
        ConfigError: the user has no home directory.
    """
    digest = hashlib.sha256(repr(sorted(machine().items())).encode()).hexdigest()[:12]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ConfigError("the user has no home directory: XDG_CACHE_HOME names another folder.") from error
    return cache / "darkformer" / "plan" / f"{digest}.json"


class Calibration(NamedTuple):
    """What this machine's times say.

    Attributes:
        record: as stored. steps: fits by precision and name, tested on the shapes held out.
        step_speed, forward_speed: by precision, the coefficients of `plan` from every shape, those held out included:
            a long sequence says most of attention.
    """

    record: dict[str, Any]
    steps: dict[str, dict[str, Fit]]
    step_speed: dict[str, dict[str, float]]
    forward_speed: dict[str, dict[str, float]]

    def seconds(self, dtype: str, totals: Totals) -> float:
        """Of a training step with these totals."""
        return predicted(self.step_speed[dtype], totals)

    def forward_seconds(self, dtype: str, totals: Totals) -> float:
        """Of a forward pass with these totals."""
        return predicted(self.forward_speed[dtype], totals)


def analysed(record: dict[str, Any]) -> Calibration:
    """Fits a finished record."""
    steps = {dtype: timings(record["rows"], dtype) for dtype in record["dtypes"]}
    forwards = {dtype: forward_timings(record["rows"], dtype) for dtype in record["dtypes"]}
    return Calibration(
        record,
        {dtype: fits(rows) for dtype, rows in steps.items()},
        {dtype: coefficients_of(FITS["plan"], rows) for dtype, rows in steps.items()},
        {dtype: coefficients_of(FITS["plan"], rows) for dtype, rows in forwards.items()},
    )


def read_calibration(file: Path) -> Calibration:
    """A finished record from a file.

    Raises:
        RunFolderError: it is missing, damaged or altered.
    """
    record = read_json(file)
    with as_written(file):
        return analysed(record)


def is_calibrated(file: Path) -> bool:
    """Whether there is a finished calibration of this version.

    Raises:
        RunFolderError: the file is damaged or altered.
    """
    record = read_json(file) if file.is_file() else {}
    with as_written(file):
        return record.get("finished", False) and record.get("layout") == LAYOUT


def load_calibration(file: Path | None = None) -> Calibration:
    """This machine's calibration.

    Raises:
        InputError: it was never calibrated, or not to the end.
    """
    file = calibration_file() if file is None else file
    if not is_calibrated(file):
        state = "is not calibrated to the end" if file.is_file() else "was never calibrated"
        raise InputError(
            f"this machine ({machine()['device']}, {machine()['threads']} threads) {state}: `darkformer plan "
            f"calibrate` times training steps of small models for a few minutes and keeps them in {file}."
        )
    return read_calibration(file)


def calibrate_machine(
    plan: Sequence[Trial], precisions: Sequence[str], file: Path, *, seconds: float = SECONDS, overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Calibration:  # fmt: skip
    """Times every trial in every precision; after an interrupt it continues with the next one.

    Args:
        file: of the results. seconds: of repetitions of one step, after a warm-up; three steps at least.
        overwrite: measure anew what is there.

    Raises:
        RunFolderError: it cannot be written, or read.
    """
    reporter = reporter or Silent()
    check_folder(file.parent)
    record = read_json(file) if file.is_file() and not overwrite else {}
    digest = hashlib.sha256(repr(list(plan)).encode()).hexdigest()[:12]
    settings = {"layout": LAYOUT, "dtypes": list(precisions), "trials": digest}
    with as_written(file):
        if any(record.get(name) != value for name, value in settings.items()):
            record = {**settings, "machine": machine(), "rows": [], "seconds": 0.0, "finished": False}
        if record["finished"]:
            return analysed(record)
    work = [(trial, dtype) for trial in plan for dtype in precisions]
    with reporter.stage("time training steps", len(work)) as advance:
        for i, (trial, dtype) in enumerate(work):
            if i >= len(record["rows"]):
                started = time.perf_counter()
                record["rows"].append(measured(trial, dtype, seconds))
                record["seconds"] += time.perf_counter() - started
                write_json(file, record)
            advance(i + 1, len(work))
    record["limits"] = limits(seconds, precisions)
    record |= {"environment": environment(), "finished": True}
    write_json(file, record)
    return analysed(record)


def explained(calibration: Calibration, dtype: str) -> dict[str, float]:
    """`roofline` of one precision."""
    bounds = calibration.record["limits"]
    size = 4 if dtype == "float32" else 2
    return roofline(
        timings(calibration.record["rows"], dtype), bounds["gemm_flops"][dtype], bounds["bytes_per_second"] / size
    )
