"""End to end on SmolLM2-135M: prefill, training step and generation, linear against its softmax original."""

from __future__ import annotations

from typing import Any

import torch

from ..config import DarkConfig, MissingExtraError
from ..hf.convert import convert, revert
from ..hf.load import demo_model_path, load_model
from ..train.report import Reporter
from .bench_machine import measure
from .bench_paths import DTYPES

#: Tokens of the prefill, of the training step and of the generation's prompt (softmax: the shorter prompt).
PREFILL, TRAINING, PROMPTS, NEW_TOKENS = 8192, 4096, {"linear": 8192, "softmax": 512}, 16


def model_points(reporter: Reporter, dtype: str) -> list[dict[str, Any]]:
    """Rows of (task, model, dtype, tokens, median, iqr, runs); empty, with a line said, where no model is installed."""
    try:
        model: Any = load_model(str(demo_model_path()))
    except MissingExtraError as error:
        reporter.say(f"end to end left out: {error}")
        return []
    model = model.to(DTYPES[dtype])
    rows: list[dict[str, Any]] = []
    for name in ("softmax", "linear"):
        if name == "linear":
            convert(model, DarkConfig(num_features=128, window=64, sinks=4))
        tasks(model, 64, 64, 64)  # warms up: the long calls are timed once
        rows += [row | {"model": name, "dtype": dtype} for row in tasks(model, PREFILL, TRAINING, PROMPTS[name])]
    revert(model)
    return rows


def tasks(model: Any, prefill: int, training: int, prompt: int) -> list[dict[str, Any]]:
    """Seconds of a prefill and of a training step (forward + backward), and seconds a token of generation."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, min(model.config.vocab_size, 10000), (1, length), generator=generator)

    rows = []
    with torch.no_grad():
        tokens = ids(prefill)
        took = measure(lambda: model(tokens, logits_to_keep=1, use_cache=True), seconds=1.0, most=2, least=1)
        rows.append({"task": "prefill", "tokens": prefill, **took})
        start = ids(prompt)
        first = model(start, logits_to_keep=1, use_cache=True)
        token, cache = first.logits[:, -1:].argmax(-1), first.past_key_values
        step = measure(lambda: model(token, past_key_values=cache, use_cache=True), seconds=2.0, most=NEW_TOKENS)
        rows.append({"task": "generation, one token", "tokens": prompt, **step})
    batch = ids(training)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(batch, labels=batch, use_cache=False).loss.backward()

    rows.append({"task": "training step", "tokens": training, **measure(train, seconds=1.0, most=2, least=1)})
    model.zero_grad(set_to_none=True)
    return rows
