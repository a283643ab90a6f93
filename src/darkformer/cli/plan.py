"""The verb `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import DarkConfig
from ..console import RichReporter
from ..research.time.settings import CALIBRATE, PlanTask
from .options import Fields, budget_beside
from .terminal import console, print_rows

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, folder, or .gguf file of a decoder; only its configuration is read. Or the word calibrate: times "
        "training steps of small models on this machine, which every plan rests on (a few minutes, once).",
        metavar="MODEL|calibrate",
    ),
]
#: What of the attention's form changes the cost.
FORM = Fields(only=("method", "num_features", "window", "sinks", "convert_sliding", "keep_exact"))


def plan(
    options: typer.Context,
    model: Model,
    task: PlanTask,
    config: Annotated[DarkConfig, FORM],
    out: Annotated[
        Path | None, typer.Option("--out", help="With calibrate: a folder for the record and its picture as well.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With calibrate: measure again.")] = False,
) -> None:
    """What a run of `linearize` takes on this machine, before anything of it runs: time, memory, stages.

    Examples: darkformer plan calibrate

    darkformer plan HuggingFaceTB/SmolLM2-135M --context 8k --tokens 2M --budget 10% --hours 3
    """
    if model == CALIBRATE:
        _calibrate(out, overwrite)
        return
    from ..calibration.budget import check_asked_budget
    from ..hf.load import load_config
    from ..research.time.calibration import load_calibration
    from ..research.time.estimate import estimate
    from ..research.time.report import estimate_lines, stage_rows
    from ..research.time.shape import shape_of
    from ..train.linearize import check_context

    task = replace(task, budget=budget_beside(options, task.budget))
    check_asked_budget(task.budget, config, task.sequence)
    settings = load_config(model)
    shape = shape_of(settings, model)
    check_context(settings, task.sequence)
    positions = getattr(settings.get_text_config(decoder=True), "max_position_embeddings", None)
    planned = estimate(shape, task, config, load_calibration(), positions=positions, name=model)
    print_rows(stage_rows(planned), f"linearize, {task.sequence:,} tokens a step, {task.precision}")
    for line in estimate_lines(planned, model):
        console.print(line, soft_wrap=True)


def _calibrate(out: Path | None, overwrite: bool) -> None:
    from ..records import check_folder, write_json
    from ..research.time.calibration import calibrate_machine, calibration_file, dtypes, trials
    from ..research.time.report import calibration_tables, draw_calibration, roofline_lines

    if out is not None:
        check_folder(out)
    file = calibration_file()
    calibration = calibrate_machine(trials(), dtypes(), file, overwrite=overwrite, reporter=RichReporter())
    tables: dict[str, Any] = calibration_tables(calibration)
    for name, rows in tables.items():
        print_rows(rows, name)
    for line in roofline_lines(calibration):
        console.print(line, soft_wrap=True)
    if out is not None:
        write_json(out / "calibration.json", calibration.record)
        draw_calibration(calibration, out / "calibration.png")
    console.print(f"Calibration: {file if out is None else out / 'calibration.json'}")
