"""What reaches the terminal. Progress of long work: bars; in a file, a pipe or a CI log, a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .reporting import Advance, printable

#: Seconds between two lines about a stage, where there is no terminal.
LINE_EVERY = 30.0
#: Seconds over which the speed is measured for the time left: long enough for steps that take minutes.
SPEED_PERIOD = 600.0


class PlainConsole(Console):
    """A console for names and texts that are not ours: it takes nothing in a string for markup, an emoji or a control.

    A `rich.text.Text` is printed as it is: make it of `printable` text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, which calls it for every string that is printed, of cells and titles too."""
        return super().render_str(printable(text), **options)


class Clock:
    """The time, and waiting for it. Tests bring one that stands still."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Waits until `stop` is set, at most so many seconds. Returns whether it is set."""
        return stop.wait(seconds)


class RichReporter:
    """Progress of the current stage and, within `whole`, of everything, with the time left of each.

    In a terminal these are bars. Without one, lines: at a stage's start, at its end and every `LINE_EVERY` seconds,
    even while one step lasts longer. All of it goes to standard error: standard output is for results.
    """

    def __init__(self, console: Console | None = None, clock: Clock | None = None) -> None:
        self.console, self.clock = console or PlainConsole(stderr=True), clock or Clock()
        # rich takes FORCE_COLOR for a terminal; a CI log that sets it has no place for bars all the same.
        self.bars: bool = self.console.is_interactive and self.console.file.isatty()
        self._progress: Progress | None = None
        self._whole: Task | None = None
        self._work = 0.0  # of the next stage, within the whole
        self._logs: list[_StageLog] = []  # of the open stages, the innermost last; empty with bars

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        work, self._work = self._work, 0.0
        with self._tasks() as progress:
            task = _task(progress, progress.add_task(printable(title), total=total))
            before = 0

            def advance(done: int, total: int, loss: float | None = None) -> None:
                nonlocal before
                progress.update(task.id, completed=done, total=total)
                if self._whole is not None:
                    progress.advance(self._whole.id, work * (done - before) / max(total, 1))
                before = done
                if log is not None:
                    log.advanced(loss)

            try:
                with contextlib.nullcontext() if self.bars else self._logged(task) as log:
                    yield advance
            finally:
                progress.remove_task(task.id)

    @contextlib.contextmanager
    def _logged(self, task: Task) -> Iterator[_StageLog]:
        log = _StageLog(task, self._whole, self.clock, self.say, lambda: self._logs[-1] is log)
        self._logs.append(log)
        stop = threading.Event()
        thread = threading.Thread(target=log.repeat, args=(stop,), daemon=True)
        log.write("started")
        thread.start()
        outcome = "stopped"
        try:
            yield log
            outcome = "done"
        finally:
            stop.set()
            thread.join()
            log.write(outcome)
            self._logs.pop()

    @contextlib.contextmanager
    def _tasks(self) -> Iterator[Progress]:
        """rich's progress: what it displays, or without a terminal only what it counts."""
        if self._progress is not None:
            yield self._progress
            return
        columns = (
            TextColumn("{task.description:<44}", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._progress = Progress(
            *columns, console=self.console, transient=True, get_time=self.clock.now, disable=not self.bars,
            speed_estimate_period=SPEED_PERIOD, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        try:
            with self._progress if self.bars else contextlib.nullcontext():
                yield self._progress
        finally:
            self._progress = None

    @contextlib.contextmanager
    def whole(self, title: str, total: float, done: float = 0.0) -> Iterator[None]:
        """Progress over several stages; `weigh` says what the next stage is worth."""
        with self._tasks() as progress:
            self._whole = _task(
                progress, progress.add_task(printable(title), total=round(total), completed=round(done))
            )
            try:
                yield
            finally:
                progress.remove_task(self._whole.id)
                self._whole = None

    def weigh(self, work: float) -> None:
        """The next stage is worth `work` of the whole; one that is not weighed is worth nothing."""
        self._work = work

    def say(self, text: str) -> None:
        self.console.print(Text(printable(text)), soft_wrap=True)


class _StageLog:
    """The lines about one stage. The stage's own thread and the one that repeats them both write."""

    def __init__(
        self, task: Task, whole: Task | None, clock: Clock, say: Callable[[str], None], innermost: Callable[[], bool]
    ) -> None:
        self.task, self.whole, self.clock, self.say, self.innermost = task, whole, clock, say, innermost
        self.loss: float | None = None
        self.due = clock.now() + LINE_EVERY
        self._lock = threading.Lock()

    def advanced(self, loss: float | None) -> None:
        """The stage has come further."""
        if loss is not None:
            self.loss = loss
        self.write_if_due()

    def repeat(self, stop: threading.Event) -> None:
        """Writes whenever a line is due, until `stop` is set."""
        while not self.clock.wait(stop, max(0.0, self.due - self.clock.now())):
            self.write_if_due()

    def write_if_due(self) -> None:
        """One line, if the last one is old enough; none while a stage within this one writes its own."""
        with self._lock:
            if self.clock.now() < self.due:
                return
            self.due = self.clock.now() + LINE_EVERY
        if self.innermost():
            self.write()

    def write(self, event: str = "") -> None:
        """The stage, where it stands, and the time; `event` is what has happened to it, if anything."""
        task, parts = self.task, [event] if event else []
        if task.total and task.total > 1:
            parts.append(f"{task.completed:.0f}/{task.total:.0f}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if event != "started":
            parts.append(f"{_duration(task.elapsed)} elapsed")
        if not event and task.time_remaining is not None:
            parts.append(f"about {_duration(task.time_remaining)} left")
        line = f"{task.description}: {', '.join(parts)}"
        if not event and self.whole is not None:
            left = self.whole.time_remaining
            line += f"; {self.whole.description} {self.whole.percentage:.0f} %"
            line += "" if left is None else f", about {_duration(left)} left"
        self.say(line)


def _task(progress: Progress, number: TaskID) -> Task:
    return next(task for task in progress.tasks if task.id == number)


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0.0)))
