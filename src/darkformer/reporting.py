"""How long work tells its progress: a protocol, and the silent default."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

#: What a function takes that has one number to show: called with (done, total) units.
Progress = Callable[[int, int], None]


class Advance(Protocol):
    """Called with (done, total) and, where something is trained, its loss; total stays the same within a stage."""

    def __call__(self, done: int, total: int, loss: float | None = None) -> None: ...


class Reporter(Protocol):
    """What a front end offers to long work."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Shows the progress of `total` units for the time of the block."""
        ...

    def weigh(self, work: float) -> None:
        """The next stage is worth `work` of everything, where the front end shows that as well."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...


class Silent:
    """A reporter that says nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda done, total, loss=None: None

    def weigh(self, work: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass
