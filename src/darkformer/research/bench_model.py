"""End to end on SmolLM2-135M: prefill, training step and generation, linear against its softmax original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..config import DarkConfig
from ..errors import MissingExtraError
from ..hf.convert import convert
from ..hf.load import demo_model_path, load_model
from ..reporting import Reporter
from .bench_machine import measure_in_turns
from .bench_paths import DTYPES

#: Tokens of the prefill, of the training step and of the generation's prompt (softmax: the shorter prompt).
PREFILL, TRAINING, PROMPTS, NEW_TOKENS = 8192, 4096, {"softmax": 512, "linear": 8192}, 48


def model_points(reporter: Reporter, dtype: str) -> list[dict[str, Any]]:
    """Rows of (task, model, dtype, tokens, median, iqr, runs); empty, with a line said, where no model is installed."""
    try:
        path = str(demo_model_path())
    except MissingExtraError as error:
        reporter.say(f"end to end left out: {error}")
        return []
    with reporter.stage("end to end", 1):
        models: dict[str, Any] = {name: load_model(path) for name in PROMPTS}
        for model in models.values():
            model.to(DTYPES[dtype])
        convert(models["linear"], DarkConfig(num_features=128, window=64, sinks=4))
        tasks(models, 64, 64, dict.fromkeys(PROMPTS, 64))  # warms up
        return [row | {"dtype": dtype} for row in tasks(models, PREFILL, TRAINING, PROMPTS)]


def tasks(models: Mapping[str, Any], prefill: int, training: int, prompts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Seconds of a prefill and of a training step (forward + backward), and seconds a token of generation, in turns."""
    generator = torch.Generator().manual_seed(0)
    words = min(min(model.config.vocab_size for model in models.values()), 10000)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, words, (1, length), generator=generator)

    def step(model: Any, prompt: int) -> Callable[[], Any]:
        first = model(ids(prompt), logits_to_keep=1, use_cache=True)
        token, cache = first.logits[:, -1:].argmax(-1), first.past_key_values
        return lambda: model(token, past_key_values=cache, use_cache=True)

    def train(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(batch, labels=batch, use_cache=False).loss.backward()

    tokens, batch = ids(prefill), ids(training)
    with torch.no_grad():
        steps = [step(model, prompts[name]) for name, model in models.items()]
        done = {
            "prefill": measure_in_turns([partial(m, tokens, logits_to_keep=1, use_cache=True) for m in models.values()],
                                        seconds=1.0, most=3, least=3),
            "generation, one token": measure_in_turns(steps, seconds=2.0, most=NEW_TOKENS),
        }  # fmt: skip
    done["training step"] = measure_in_turns([partial(train, m) for m in models.values()], seconds=1.0, most=3, least=3)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    lengths = {"prefill": dict.fromkeys(models, prefill), "training step": dict.fromkeys(models, training)}
    return [
        {"task": task, "model": name, "tokens": lengths.get(task, prompts)[name], **timing}
        for task, timings in done.items()
        for name, timing in zip(models, timings, strict=True)
    ]
