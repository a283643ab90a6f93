"""The command line: a table of verbs, each in a file of its own."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import DarkformerError, import_problem

try:
    import typer
    from typer.core import TyperGroup

    from .terminal import errors  # imports rich
except Exception as error:  # pragma: no cover - exercised in a bare environment
    if problem := import_problem(error, "the command line needs", "pip install 'darkformer[all]'"):
        raise problem from error
    raise

from . import bench, budget, demo, diagnose, evaluate, generate, linearize, native, push, reproduce
from .options import command


class _Verbs(TyperGroup):
    """Says how to go on after Ctrl-C; typer alone would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            errors.print(f"{str(interrupt) or 'interrupted'}")
            errors.print("Run the same command again to continue (budget, linearize and reproduce: with --resume).")
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    name="darkformer",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    help="Linear attention for pretrained transformers: convert, finetune, generate with constant-size state.",
    pretty_exceptions_enable=False,
)
for verb in (
    command(linearize.linearize, linearize.recipe_of),
    command(evaluate.evaluate),
    command(generate.generate),
    command(push.push),
    command(demo.demo, demo.recipe_of),
    command(bench.bench),
    command(budget.budget, budget.recipe_of),
    command(diagnose.diagnose),
    command(reproduce.reproduce),
):
    app.command()(verb)
app.add_typer(native.app, name="native")


def main() -> None:
    """Entry point: one clear line for errors of this library."""
    try:
        app()
    except DarkformerError as error:
        errors.print(f"error: {error}")
        sys.exit(1)
    except ImportError as error:
        problem = import_problem(error, "this command needs the package", "pip install 'darkformer[all]'")
        if problem is None:
            raise
        errors.print(f"error: {problem}")
        sys.exit(1)
