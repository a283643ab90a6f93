"""The verb `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import RichReporter
from ..errors import InputError, RunFolderError
from .options import Base, Device, Model, Weights, model_folder
from .terminal import console


def cache(
    model: Model,
    prompt: Annotated[Path, typer.Option("--prompt", help="Text file with the prompt.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="File of the state, safetensors.", metavar="FILE")],
    role: Annotated[
        str,
        typer.Option(
            "--role",
            help="The prompt is a chat's first message, by this role (system, user), as the model's chat template "
            "writes it: for `serve` and its chats. Without, it is plain text.",
        ),
    ] = "",
    base: Base = "",
    dtype: Weights = "float32",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, whatever it holds.")] = False,
) -> None:
    """Read a long prompt once and keep its state in a file, for `generate --cache` and `serve --cache`.

    The same command goes on where it was interrupted. A file of a beginning of the prompt is continued too.

    Example: darkformer cache runs/smol --prompt book.txt --out book.safetensors
    """
    from ..hf.cache import cache_bytes
    from ..hf.load import check_converted, load_with_tokenizer
    from ..hf.prompt import StoredPrompt, load_prompt, prompt_of, read_prompt, save_prompt
    from ..records import check_file

    check_file(out)
    if out.exists() and prompt.exists() and out.samefile(prompt):
        raise RunFolderError(f"{out} is the prompt itself: give the state another file with --out.")
    try:
        text = prompt.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{prompt} is not UTF-8 text.") from error
    reporter = RichReporter()
    with reporter.stage("load the model", 1):
        network, tokenizer = load_with_tokenizer(model_folder(model), base, dtype=dtype, device=device)
    check_converted(network, model)
    wanted, begin = prompt_of(tokenizer, text, role), None
    if out.exists() and not overwrite:
        begin = load_prompt(out, network)
        read = len(begin.prompt.tokens)
        if not begin.prompt.tokens.cpu().equal(wanted.tokens[:read]):
            raise RunFolderError(f"{out} holds the state of another prompt: --overwrite replaces it, --out avoids it.")
        if begin.prompt.text == text and read == len(wanted.tokens):
            console.print(f"{out} is finished: nothing left to do.")
            return

    def save(stored: StoredPrompt) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_prompt(stored, network, out)

    with reporter.stage("read the prompt", len(wanted.tokens)) as advance:
        stored = read_prompt(network, wanted, begin=begin, progress=advance, save=save)
    save(stored)
    console.print(f"{out}: {len(wanted.tokens):,} tokens, a state of {cache_bytes(stored.cache) / 1e6:.2f} MB.")
    command = f"serve {model} --cache {out}" if role else f"generate {model} --cache {out} --prompt '…'"
    console.print(f"Go on from it: darkformer {command}")
