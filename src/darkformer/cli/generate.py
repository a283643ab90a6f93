"""The verb `generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import Model, model_folder
from .terminal import console

#: Below it, logits of a model in float32 divided by the temperature come near the end of the dtype's range.
LOWEST_TEMPERATURE = 1e-30


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=-(2**63), max=2**64 - 1)] = 0,
) -> None:
    """Continue a prompt, token by token as they come; only softmax that was kept makes the state grow."""
    import torch

    from ..evaluation.generation import PrintableStreamer, generate_text
    from ..hf.load import load_model, load_tokenizer

    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ConfigError(f"--temperature {temperature}: logits divided by it overflow; 0 takes the likeliest token.")
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    network = load_model(folder)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    streamer = PrintableStreamer(tokenizer, skip_special_tokens=True)
    done = generate_text(network, tokenizer, prompt, max_new_tokens, streamer=streamer, **sampling)
    console.print(
        f"{done['tokens']} tokens, {done['tokens_per_second']:.1f} tokens/s, cache {done['cache_bytes'] / 1e6:.2f} MB",
        style="dim",
    )
