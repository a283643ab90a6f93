"""Text generation with what it cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TextStreamer

from ..errors import InputError
from ..hf.cache import cache_bytes
from ..hf.prompt import StoredPrompt
from ..reporting import printable


class PrintableStreamer(TextStreamer):
    """transformers' `TextStreamer`; control characters of the text are written out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def prompt_inputs(tokenizer: Any, prompt: str) -> Any:
    """A prompt as the tokenizer gives it to a model: `input_ids` (1, L) and what else it makes.

    Raises:
        InputError: it has no token (the tokenizer adds none to an empty text), or is not Unicode text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {prompt!r} is not UTF-8 text.") from error
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        raise InputError(f"the prompt {prompt!r} has no tokens, and a model continues one at least: give some text.")
    return inputs


@torch.no_grad()
def generate_text(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, *, stored: StoredPrompt | None = None, **options: Any
) -> dict[str, Any]:
    """Greedy continuation of `prompt` (unless `options` say otherwise), with speed and cache size.

    Args:
        stored: what stands before the prompt, from whose state the model goes on.
        options: passed to transformers' `generate` (a streamer, sampling).

    Returns:
        text, tokens, seconds, tokens_per_second, cache_bytes (after the last token).

    Raises:
        InputError: the prompt has no tokens, or does not continue the stored one.
    """
    settings: dict[str, Any] = {"do_sample": False, **options}
    device = next(model.parameters()).device
    if stored is None:
        inputs = dict(prompt_inputs(tokenizer, prompt).to(device))
    else:
        ids = stored.continued(tokenizer, prompt).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings["past_key_values"] = stored.state()
    started = time.perf_counter()
    result = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        return_dict_in_generate=True,
        **settings,
    )
    seconds = time.perf_counter() - started
    new = result.sequences[0, inputs["input_ids"].shape[1] :]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(len(new) / seconds, 2),
        "cache_bytes": cache_bytes(result.past_key_values),
    }
