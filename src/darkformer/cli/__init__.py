"""The command line: a table of verbs, each in a file of its own."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, Any

from .._version import __version__
from ..errors import DarkformerError, import_problem

try:
    import typer
    from typer.core import TyperGroup

    from .terminal import errors  # imports rich
except Exception as error:  # pragma: no cover - exercised in a bare environment
    if problem := import_problem(error, "the command line needs", "pip install 'darkformer[all]'"):
        raise problem from error
    raise

from . import bench, budget, cache, demo, diagnose, evaluate, generate, linearize, native, plan, push, reproduce, serve
from .options import command


class _Verbs(TyperGroup):
    """Says how to go on after Ctrl-C, where typer alone would end without a word, and with --debug where it failed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            errors.print(f"{str(interrupt) or 'interrupted'}")
            errors.print("Run the same command again to continue (budget, linearize and reproduce: with --resume).")
            raise typer.Exit(130) from interrupt
        except Exception:
            if ctx.params["debug"]:
                errors.print(traceback.format_exc())
            raise


app = typer.Typer(
    name="darkformer",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkformer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Before the verb: show where an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Linear attention for pretrained transformers: convert, finetune, generate with constant-size state."""


for verb in (
    command(linearize.linearize, linearize.recipe_of),
    command(evaluate.evaluate),
    command(generate.generate),
    command(cache.cache),
    command(serve.serve),
    command(push.push),
    command(demo.demo, demo.recipe_of),
    command(bench.bench),
    command(budget.budget, budget.recipe_of),
    command(diagnose.diagnose),
    command(plan.plan),
    command(reproduce.reproduce),
):
    app.command()(verb)
app.add_typer(native.app, name="native")


def _message(error: Exception) -> str:
    """What is said of an error: what it is about, if it is one of this library or of the system, else its kind too."""
    if isinstance(error, ImportError) and not isinstance(error, DarkformerError):
        error = import_problem(error, "this command needs the package", "pip install 'darkformer[all]'") or error
    if isinstance(error, DarkformerError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return f"{type(error).__name__}: {error} (darkformer --debug VERB … shows where)"


def main() -> None:
    """Entry point: whatever goes wrong is one line on standard error, and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not stop the work
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception as error:
        errors.print(f"error: {' '.join(_message(error).split())}")
        sys.exit(1)
