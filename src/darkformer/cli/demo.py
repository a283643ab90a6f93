"""The verb `demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import DarkConfig, TrainConfig
from ..console import RichReporter
from ..evaluation.settings import DemoConfig
from .options import WITHOUT_CHOSEN, Fields, Overwrite
from .terminal import console


def demo(
    demo: DemoConfig,
    config: Annotated[DarkConfig, WITHOUT_CHOSEN],
    train: Annotated[TrainConfig, Fields(defaults={"steps": 0})],
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Linearize a real pretrained model within budgets and compare with softmax: table, plots, report, saved model.

    Nothing trains unless --steps says so. Ctrl-C stops at the next step; running it again continues there.
    """
    from ..evaluation.demo import Demo
    from ..evaluation.demo_report import print_demo

    record = Demo(demo, config, train, out, RichReporter()).run(overwrite=overwrite)
    print_demo(record, console)
    console.print(f"Report: {out / 'report.html'}   record: {out / 'record.json'}   model: {out / 'model'}")


def recipe_of(record: dict[str, Any]) -> dict[str, Any]:
    """The options that a record of `demo` was made with; of a model it has only the last name, --model says where."""
    from ..hf.load import DEMO_FILE

    options = {f.name: record[f.name] for f in dataclasses.fields(DemoConfig)}
    if options["model"] == Path(DEMO_FILE).name:  # the default: records do not say where its package is installed
        options["model"] = DemoConfig.model
    return {**options, "config": record["config"], "train": record["train"]}
