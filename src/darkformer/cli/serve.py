"""The verb `serve`."""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import CONTEXT, DarkConfig, TrainConfig
from ..console import RichReporter
from ..errors import InputError, MissingExtraError
from .linearize import BudgetAt
from .options import Base, Context, Data, Device, Model, Weights, model_folder
from .terminal import console


def serve(
    model: Model,
    name: Annotated[str, typer.Option("--name", help="What requests call the model; DIR as it is given without.")] = "",
    cache: Annotated[
        list[Path],
        typer.Option(
            "--cache",
            help="State that `darkformer cache` stored: requests that begin with its prompt go on from there. Repeat "
            "for more; the longest that fits is taken.",
            metavar="FILE",
        ),
    ] = [],  # noqa: B006 - typer copies it
    keep: Annotated[
        int,
        typer.Option(
            help="Requests whose states are kept after their answers, so that a chat that goes on reads its new "
            "messages alone. 0 keeps none.",
            min=0,
        ),
    ] = 8,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    cors: Annotated[bool, typer.Option("--cors", help="Let web pages of any origin send requests.")] = False,
    base: Base = "",
    dtype: Weights = "float32",
    device: Device = "cpu",
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            help="Converts a softmax model first, within these bytes a sequence, as `darkformer linearize --budget` "
            "takes them: 10%, 64MB, 0.",
        ),
    ] = "",
    budget_at: BudgetAt = 0,
    data: Data = ["pydoc"],  # noqa: B006
    context: Context = CONTEXT,
    out: Annotated[
        Path, typer.Option("--out", help="With --budget: run folder of the conversion, which is done once.")
    ] = Path("runs/serve"),
) -> None:
    """Serve a converted model: transformers' server with its OpenAI-compatible endpoints, streaming and chat templates.

    With --budget a softmax model is converted first, without training, as `linearize --steps 0` does.

    Examples: darkformer serve runs/smol --port 8000

    darkformer serve model.gguf --budget 10% --data 'books/*.txt' --out runs/tenth
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MissingExtraError("darkformer serve needs fastapi, uvicorn and openai: pip install 'darkformer[serve]'.")
    import uvicorn

    from ..hf.load import check_converted, load_with_tokenizer
    from ..hf.prompt import load_prompt
    from ..hf.server import build_app

    _check_port(host, port)
    reporter, folder = RichReporter(), model_folder(model)
    if budget:
        from ..train.linearize import linearize

        linearize(
            model, out, data=data, config=DarkConfig(), training=replace(TrainConfig(), steps=0), context=context,
            budget=budget, budget_at=budget_at or None, resume=True, reporter=reporter,
        )  # fmt: skip
        folder = model_folder(str(out))
    with reporter.stage("load the model", 1):
        network, tokenizer = load_with_tokenizer(folder, base, dtype=dtype, device=device)
    check_converted(network, model)
    stored = [load_prompt(file, network) for file in cache]
    for file, one in zip(cache, stored, strict=True):
        console.print(f"{file}: requests that begin with its {len(one.prompt.tokens):,} tokens go on from its state.")
    # uvicorn's own format has no place for other loggers' lines
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("darkformer").setLevel(logging.INFO)
    app: Any = build_app(network, tokenizer, name or model, stored=stored, kept=keep, cors=cors)
    console.print(f"Requests call the model {name or model!r}.")
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to stop it
        uvicorn.run(app, host=host, port=port, log_level="info")


def _check_port(host: str, port: int) -> None:
    """Refuses an address that nothing can listen on, before a model is loaded for it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            trial.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port} ({error}): choose another --port or --host.") from error
