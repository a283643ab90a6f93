"""The verb `generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Model, model_folder
from .terminal import console


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt, token by token as they come; only softmax that was kept makes the state grow."""
    import torch
    from transformers import TextStreamer

    from ..evaluation.generation import generate_text
    from ..hf.load import load_model, load_tokenizer

    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    network = load_model(folder)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    done = generate_text(network, tokenizer, prompt, max_new_tokens, streamer=streamer, **sampling)
    console.print(
        f"[dim]{done['tokens']} tokens, {done['tokens_per_second']:.1f} tokens/s, "
        f"cache {done['cache_bytes'] / 1e6:.2f} MB[/dim]"
    )
