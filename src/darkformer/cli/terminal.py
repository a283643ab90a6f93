"""Where results and errors are printed."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True, highlight=False, markup=False)  # messages may hold brackets
