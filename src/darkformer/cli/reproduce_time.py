"""`darkformer reproduce time`: the loss law in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..console import RichReporter
from .terminal import console


def reproduce_time(
    out: Path, data: Sequence[str], steps: int, *, resume: bool, overwrite: bool, plot_only: bool, dry_run: bool
) -> None:
    """The study in `out`; the options are those of `reproduce`."""
    from ..research.time.report import write_study
    from ..research.time.study import TimeStudy, laptop_study
    from .reproduce import print_rows, print_tables

    if not plot_only:
        study = laptop_study()
        study = replace(study, data=tuple(data)) if data else study
        work = TimeStudy(study.shortened(steps) if steps else study, out, RichReporter())
        if dry_run:
            print_rows(work.plan(), "plan", console)
            return
        work.run(resume=resume, overwrite=overwrite)
    print_tables(write_study(out), console)
    console.print(f"Records: {out / 'records'}   plots: {out / 'plots'}   tables: {out / 'tables'}")
