"""`darkformer native`: whether the compiled attention is there, and how to make it ahead of its first use."""

from __future__ import annotations

import typer

from ..errors import ConfigError
from ..ops import native

app = typer.Typer(no_args_is_help=True, help="The compiled CPU attention: status, build.")


@app.command()
def status() -> None:
    """Say whether the compiled attention can run here, and if not, why. Builds nothing."""
    status = native.status()
    reason, built = status.pop("reason"), status.pop("built")
    if reason:
        summary = f"not available: {reason}"
    else:
        summary = "ready" if built else "not built yet: the first use builds it (or: darkformer native build)"
    for name, value in {"native": summary, **status}.items():
        typer.echo(f"{name.replace('_', ' ') + ':':17}{value}")


@app.command()
def build() -> None:
    """Compile now, load and test the result."""
    path = native.build(force=True)
    if reason := native.unavailable():
        raise ConfigError(f"the native attention is built ({path}) and not usable: {reason}.")
    typer.echo(f"{path} is ready.")
