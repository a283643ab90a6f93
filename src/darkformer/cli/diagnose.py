"""The verb `diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..config import DarkConfig, DemoConfig, field_help

DARK = DarkConfig()
Features = Annotated[int, typer.Option("--features", help=field_help(DarkConfig, "num_features"))]
Layers = Annotated[list[int], typer.Option("--layer", help="Only this layer. Repeat for more; all without.")]
Data = Annotated[list[str], typer.Option("--data", help=field_help(DemoConfig, "data"))]
Out = Annotated[Path, typer.Option("--out", help="Folder of record, pictures and report.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of a sequence; the cost is quadratic.", min=16)]


def register(app: typer.Typer, console: Console) -> None:
    """Adds `diagnose` to the command line."""

    @app.command()
    def diagnose(
        model: Annotated[str, typer.Argument(help="Hub id, folder, or .gguf file of a decoder.", metavar="MODEL")],
        data: Data = ["pydoc"],  # noqa: B006 - typer copies it
        out: Out = Path("runs/diagnose"),
        features: Features = DARK.num_features,
        window: Annotated[int, typer.Option("--window", help=field_help(DarkConfig, "window"), min=1)] = DARK.window,
        sinks: Annotated[int, typer.Option("--sinks", help=field_help(DarkConfig, "sinks"))] = DARK.sinks,
        layer: Layers = [],  # noqa: B006
        tokens: Tokens = 512,
        exact_share: Annotated[
            float, typer.Option("--exact-share", help="Share of the layers that may stay exact.", min=0.0, max=1.0)
        ] = 0.1,
        context: Annotated[
            int,
            typer.Option("--context", help="Tokens of the text on which heads lose their far field; 0: none.", min=0),
        ] = 2048,
        budget: Annotated[
            str, typer.Option("--budget", help="Bytes to say exact heads for: a share of the softmax cache, or a size.")
        ] = "10%",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    ) -> None:
        """See why linear attention works or fails in each head of a softmax model, before converting it.

        Real text, no training: anisotropy, where attention goes, predicted and measured noise of every estimator, what
        text and recall lose without a head's far field, what to choose. SmolLM2-135M takes minutes on two cores.
        """
        from ..console import RichReporter
        from ..diagnostics.layer import COUNTS, Effort
        from ..diagnostics.report import print_diagnosis
        from ..diagnostics.run import run_diagnosis

        config = DarkConfig(num_features=features, window=window, sinks=sinks)
        effort = Effort(counts=tuple(sorted({*COUNTS, features})), tokens=tokens)
        record = run_diagnosis(
            model, out, data=data, config=config, effort=effort, layers=layer, exact_share=exact_share,
            context=context, budget=budget, overwrite=overwrite, reporter=RichReporter(),
        )  # fmt: skip
        print_diagnosis(record, console)
        console.print(f"Report: {out / 'report.html'}   record: {out / 'record.json'}", markup=False)
