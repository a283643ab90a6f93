"""The verb `diagnose`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..config import CONTEXT, DarkConfig
from ..console import RichReporter
from ..diagnostics.layer import COUNTS, Effort
from .options import Data, Decoder, Fields
from .terminal import console


def diagnose(
    model: Decoder,
    config: Annotated[DarkConfig, Fields(only=("num_features", "window", "sinks"), minimum={"window": 1})],
    effort: Effort,
    data: Data = ["pydoc"],  # noqa: B006 - typer copies it
    out: Annotated[Path, typer.Option("--out", help="Folder of record, pictures and report.")] = Path("runs/diagnose"),
    layer: Annotated[list[int], typer.Option("--layer", help="Only this layer. Repeat for more; all without.")] = [],  # noqa: B006
    exact_share: Annotated[
        float, typer.Option("--exact-share", help="Share of the layers that may stay exact.", min=0.0, max=1.0)
    ] = 0.1,
    context: Annotated[
        int, typer.Option("--context", help="Tokens of the text on which heads lose their far field; 0: none.", min=0)
    ] = CONTEXT,
    budget: Annotated[
        str, typer.Option("--budget", help="Bytes to say exact heads for: a share of the softmax cache, or a size.")
    ] = "10%",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """See why linear attention works or fails in each head of a softmax model, before converting it.

    Real text, no training: anisotropy, where attention goes, predicted and measured noise of every estimator, what
    text and recall lose without a head's far field, what to choose. SmolLM2-135M takes minutes on two cores.
    """
    from ..diagnostics.report import print_diagnosis
    from ..diagnostics.run import run_diagnosis

    effort = replace(effort, counts=tuple(sorted({*COUNTS, config.num_features})))
    record = run_diagnosis(
        model, out, data=data, config=config, effort=effort, layers=layer, exact_share=exact_share, context=context,
        budget=budget, overwrite=overwrite, reporter=RichReporter(),
    )  # fmt: skip
    print_diagnosis(record, console)
    console.print(f"Report: {out / 'report.html'}   record: {out / 'record.json'}")
