"""The verb `reproduce`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..config import TrainConfig, field_help
from ..console import RichReporter
from ..errors import ConfigError
from ..evaluation.settings import BudgetTask
from .terminal import console

Figure = Annotated[
    str,
    typer.Argument(
        help="1, 2-top, 2-bottom, 2 (both), 3, 4, 5 or all; or one experiment: 3.grown. width: what an infinitely wide "
        "network becomes under gradient descent and under Adam, in OUT/width.",
        metavar="FIGURE",
    ),
]
ScaleName = Annotated[
    str, typer.Option("--scale", help="laptop: two cores, hours. full: the paper's size, under `accelerate launch`.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of runs, records, plots and tables.")]
Data = Annotated[
    list[str], typer.Option("--data", help=f"Instead of the scale's own text. {field_help(BudgetTask, 'data')}")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the reproduction in the folder; add figures to it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the reproduction in the folder.")]
Steps = Annotated[
    int,
    typer.Option("--steps", help="At most so many steps a run, to try it out; 0: the plan's.", min=0),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Instead of the scale's precision: float32 or bfloat16.")]
PlotOnly = Annotated[bool, typer.Option("--plot-only", help="Only draw, from the records in the folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the plan and its time, after a short calibration.")]


def reproduce(
    figure: Figure,
    scale: ScaleName = "laptop",
    out: Out = Path("runs/reproduce"),
    data: Data = [],  # noqa: B006 - typer copies it
    steps: Steps = 0,
    dtype: Dtype = "",
    resume: Resume = False,
    overwrite: Overwrite = False,
    plot_only: PlotOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Reproduce the paper's Figures 1 to 5: train every method alike, keep records, draw from them.

    Killed at any moment, it continues with --resume where it stopped.
    """
    if figure == "width":
        if scale != "laptop" or dtype:
            raise ConfigError("reproduce width has one scale and one precision: leave out --scale and --dtype.")
        infinite_width(out / "width", data, steps, resume, overwrite, plot_only, dry_run)
        return
    from ..research.reproduce.scales import SCALES
    from ..research.reproduce.session import Reproduction, chosen_figures, draw

    figures = chosen_figures(figure)
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: unknown; choose one of {', '.join(SCALES)}.")
    if plot_only:
        figures = tuple(name.split(".")[0] for name in figures)
        print_tables(draw(out, figures, strict=figure != "all"), console)
        return
    chosen = SCALES[scale].shortened(steps) if steps else SCALES[scale]
    if data:
        chosen = replace(chosen, data=tuple(data))
    if dtype:
        chosen = replace(chosen, dtype=TrainConfig(dtype=dtype).dtype)  # checked, and `auto` settled for good
    work = Reproduction(chosen, figures, out, RichReporter())
    if dry_run:
        print_rows(work.plan(), f"plan, scale {scale}", console)
        return
    print_tables(work.run(resume=resume, overwrite=overwrite), console)
    console.print(f"Records: {out / 'records'}   plots: {out / 'plots'}   tables: {out / 'tables'}")


def infinite_width(
    out: Path, data: list[str], steps: int, resume: bool, overwrite: bool, plot_only: bool, dry_run: bool
) -> None:
    """The experiment on infinite width, minutes on two cores."""
    from ..research.infinite_width.experiment import Experiment
    from ..research.infinite_width.plan import Plan
    from ..research.infinite_width.report import draw

    plan = Plan()
    plan = replace(plan, data=tuple(data)) if data else plan
    plan = plan.shortened(steps) if steps else plan
    work = Experiment(plan, out, RichReporter())
    if dry_run:
        print_rows(work.table(), "plan of reproduce width", console)
        return
    print_tables(draw(out) if plot_only else work.run(resume=resume, overwrite=overwrite), console)
    console.print(f"Record: {out / 'records'}   plot: {out / 'plots'}   tables: {out / 'tables'}")


def print_rows(rows: list[list[str]], title: str, console: Console) -> None:
    """A table whose first row is its header."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def print_tables(tables: dict[str, list[list[str]]], console: Console) -> None:
    """One table a figure, and the claims."""
    for name, rows in tables.items():
        print_rows(rows, name, console)
