"""`darkformer reproduce time` and `reproduce width`: studies beside the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..console import RichReporter
from .terminal import console, print_rows, print_tables


def reproduce_time(
    out: Path, data: Sequence[str], steps: int, *, resume: bool, overwrite: bool, plot_only: bool, dry_run: bool
) -> None:
    """The study in `out`; the options are those of `reproduce`."""
    from ..research.time.report import write_study
    from ..research.time.study import TimeStudy, laptop_study

    if not plot_only:
        study = laptop_study()
        study = replace(study, data=tuple(data)) if data else study
        work = TimeStudy(study.shortened(steps) if steps else study, out, RichReporter())
        if dry_run:
            print_rows(work.plan(), "plan")
            return
        work.run(resume=resume, overwrite=overwrite)
    print_tables(write_study(out))
    console.print(f"Records: {out / 'records'}   plots: {out / 'plots'}   tables: {out / 'tables'}")


def reproduce_width(
    out: Path, data: Sequence[str], steps: int, *, resume: bool, overwrite: bool, plot_only: bool, dry_run: bool
) -> None:
    """The experiment on infinite width, minutes on two cores; the options are those of `reproduce`."""
    from ..research.infinite_width.experiment import Experiment
    from ..research.infinite_width.plan import Plan
    from ..research.infinite_width.report import draw

    plan = Plan()
    plan = replace(plan, data=tuple(data)) if data else plan
    plan = plan.shortened(steps) if steps else plan
    work = Experiment(plan, out, RichReporter())
    if dry_run:
        print_rows(work.table(), "plan of reproduce width; all of it takes some eight minutes on two cores")
        return
    print_tables(draw(out) if plot_only else work.run(resume=resume, overwrite=overwrite))
    console.print(f"Record: {out / 'records'}   plot: {out / 'plots'}   tables: {out / 'tables'}")


#: By the name that `reproduce` is asked for.
STUDIES: dict[str, Callable[..., None]] = {"time": reproduce_time, "width": reproduce_width}
