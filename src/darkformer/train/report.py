"""How long work tells its progress: a protocol, and the silent default."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

#: Called with (done, total); total stays the same within a stage.
Advance = Callable[[int, int], None]


class Reporter(Protocol):
    """What a front end offers to long work."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A progress bar of `total` units for the time of the block."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...


class Silent:
    """A reporter that says nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda done, total: None

    def say(self, text: str) -> None:
        pass
