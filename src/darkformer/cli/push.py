"""The verb `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import console


def push(
    run: Annotated[Path, typer.Argument(help="Run folder of linearize.", metavar="RUN")],
    repo: Annotated[str, typer.Argument(help="Name on the hub: ACCOUNT/NAME.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a run's model to the Hugging Face hub, with a model card written from its record."""
    from ..train.card import push_run

    console.print(push_run(run, repo, private=private))
