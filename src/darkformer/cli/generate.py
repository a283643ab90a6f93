"""The verb `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import Base, Device, Model, Weights, model_folder
from .terminal import console

#: Below it, logits of a model in float32 divided by the temperature come near the end of the dtype's range.
LOWEST_TEMPERATURE = 1e-30


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=-(2**63), max=2**64 - 1)] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="State that `darkformer cache` stored: --prompt goes on after its text, which is not read again.",
            metavar="FILE",
        ),
    ] = None,
    base: Base = "",
    dtype: Weights = "float32",
    device: Device = "cpu",
) -> None:
    """Continue a prompt, token by token as they come; only softmax that was kept makes the state grow.

    Example: darkformer generate runs/smol --cache book.safetensors --prompt 'The author of this book is'
    """
    import torch

    from ..evaluation.generation import PrintableStreamer, generate_text
    from ..hf.load import load_with_tokenizer
    from ..hf.prompt import load_prompt

    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ConfigError(f"--temperature {temperature}: logits divided by it overflow; 0 takes the likeliest token.")
    network, tokenizer = load_with_tokenizer(model_folder(model), base, dtype=dtype, device=device)
    stored = None if cache is None else load_prompt(cache, network)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    # A stored prompt is long, and a chat's is not for reading.
    streamer = PrintableStreamer(tokenizer, skip_prompt=stored is not None, skip_special_tokens=True)
    done = generate_text(network, tokenizer, prompt, max_new_tokens, stored=stored, streamer=streamer, **sampling)
    console.print(
        f"{done['tokens']} tokens, {done['tokens_per_second']:.1f} tokens/s, cache {done['cache_bytes'] / 1e6:.2f} MB",
        style="dim",
    )
