"""Where results and errors are printed."""

from __future__ import annotations

from ..console import PlainConsole

console = PlainConsole()
errors = PlainConsole(stderr=True, highlight=False, soft_wrap=True)
