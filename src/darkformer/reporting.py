"""How long work tells its progress: a protocol, and the silent default; and text that a terminal may be sent."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

#: What a function takes that has one number to show: called with (done, total) units.
Progress = Callable[[int, int], None]

#: Control characters but newline and tab, embeddings, overrides and isolates of bidirectional text, lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with control characters written out: prompts, generated text and names of files are not ours.

    A terminal obeys escape sequences, text that is reordered reads as something else, and lone surrogates (bytes of a
    file's name that are not UTF-8) cannot be written.

    >>> printable("\x1b[2J\u202egone")
    '\\x1b[2J\\u202egone'
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


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
