"""Progress bars and tables in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..train.report import Advance


class RichReporter:
    """A bar for the current stage and, within `whole`, one for everything, with the time left of each."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress: Progress | None = None
        self._whole: tuple[TaskID, float] | None = None  # task, work of the next stage

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        with self._bars() as progress:
            task = progress.add_task(title, total=total)
            work = 0.0 if self._whole is None else self._whole[1]  # a stage inside this one may weigh something else
            before = 0

            def advance(done: int, total: int) -> None:
                nonlocal before
                progress.update(task, completed=done, total=total)
                if self._whole is not None:
                    progress.advance(self._whole[0], work * (done - before) / max(total, 1))
                before = done

            try:
                yield advance
            finally:
                progress.remove_task(task)

    @contextlib.contextmanager
    def _bars(self) -> Iterator[Progress]:
        if self._progress is not None:
            yield self._progress
            return
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            try:
                yield progress
            finally:
                self._progress = None

    @contextlib.contextmanager
    def whole(self, title: str, total: float, done: float = 0.0) -> Iterator[None]:
        """A second bar over several stages; `weigh` says what the next stage is worth."""
        with self._bars() as progress:
            self._whole = (progress.add_task(title, total=round(total), completed=round(done)), 0.0)
            try:
                yield
            finally:
                self._whole = None

    def weigh(self, work: float) -> None:
        """The next stage is worth `work` of the whole."""
        if self._whole is not None:
            self._whole = (self._whole[0], work)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
