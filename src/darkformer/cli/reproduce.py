"""The verb `reproduce`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..config import TrainConfig, field_help
from ..console import RichReporter
from ..errors import ConfigError
from ..evaluation.settings import BudgetTask
from .studies import STUDIES
from .terminal import console, print_rows, print_tables

Figure = Annotated[
    str,
    typer.Argument(
        help="1, 2-top, 2-bottom, 2 (both), 3, 4, 5 or all; one experiment: 3.grown; time: the loss law in seconds, in "
        "OUT/time; width: what an infinitely wide network becomes under gradient descent and under Adam, in OUT/width.",
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
    if figure in STUDIES:
        if scale != "laptop" or dtype:
            raise ConfigError(f"reproduce {figure} has one scale and one precision: leave out --scale and --dtype.")
        study = STUDIES[figure]
        study(out / figure, data, steps, resume=resume, overwrite=overwrite, plot_only=plot_only, dry_run=dry_run)
        return
    from ..research.reproduce.scales import SCALES
    from ..research.reproduce.session import Reproduction, chosen_figures, draw

    figures = chosen_figures(figure)
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: unknown; choose one of {', '.join(SCALES)}.")
    if plot_only:
        figures = tuple(name.split(".")[0] for name in figures)
        print_tables(draw(out, figures, strict=figure != "all"))
        return
    chosen = SCALES[scale].shortened(steps) if steps else SCALES[scale]
    if data:
        chosen = replace(chosen, data=tuple(data))
    if dtype:
        chosen = replace(chosen, dtype=TrainConfig(dtype=dtype).dtype)  # checked, and `auto` settled for good
    work = Reproduction(chosen, figures, out, RichReporter())
    if dry_run:
        print_rows(work.plan(), f"plan, scale {scale}")
        return
    print_tables(work.run(resume=resume, overwrite=overwrite))
    console.print(f"Records: {out / 'records'}   plots: {out / 'plots'}   tables: {out / 'tables'}")
