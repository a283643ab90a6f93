"""How long a plan takes here: real training steps of each base with few layers, and a line through them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, LlamaConfig

from ...config import DarkConfig
from ...hf.convert import convert
from .plan import Base, Run, Scale

#: The shapes of the pretrained models, so that nothing has to be loaded for a plan.
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
GEMMA3 = Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256,
)  # fmt: skip
#: Layers of the models that are timed, as far as there are so many; the rest is a straight line.
FEW = (1, 6)
#: Loading, converting, checkpoints and writing of a run: this many steps' time, and this many seconds.
OVERHEAD_STEPS, OVERHEAD_SECONDS = 2.0, 2.0
#: A token that is only scored, beside one that is trained on; calibration of the library's form, in steps' time.
EVALUATION, CALIBRATION = 0.35, 10.0


class Speed(NamedTuple):
    """One base on this machine."""

    step: float  # seconds of an optimizer step
    tokens: int  # in it


def _config(base: Base, scale: Scale) -> Any:
    if base.source in ("small", "grown"):
        return GemmaConfig(vocab_size=scale.vocabulary, **scale.small)
    return copy.deepcopy({"smollm2": SMOLLM2, "gemma3-270m": GEMMA3}[base.source])


def _step_seconds(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, dtype: str) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def measure_base(base: Base, scale: Scale) -> Speed:
    """Seconds of a training step of DARK on this base, from `FEW` of its layers with random weights."""
    config = _config(base, scale)
    layers, timed = config.num_hidden_layers, min(FEW[1], config.num_hidden_layers)
    config.num_hidden_layers = timed
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:timed]
    model = AutoModelForCausalLM.from_config(config)
    convert(model, DarkConfig.paper(base.num_features, convert_sliding=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, config.vocab_size, (base.batch_size, base.seq_len))
    _step_seconds(model, optimizer, ids, scale.dtype)  # makes the optimizer's state
    more = _step_seconds(model, optimizer, ids, scale.dtype)
    if layers == timed:
        return Speed(more, ids.numel())
    model.config.num_hidden_layers = FEW[0]
    model.model.layers = model.model.layers[: FEW[0]]
    fewer = _step_seconds(model, optimizer, ids, scale.dtype)
    layer = max(0.0, more - fewer) / (timed - FEW[0])
    return Speed(more + layer * (layers - timed), ids.numel())


def measure(scale: Scale, runs: Iterable[Run]) -> dict[str, Speed]:
    """Base → its speed, for the bases of `runs` that fit a machine like this one (the laptop scale's)."""
    speeds: dict[tuple[str, int], Speed] = {}
    found = {}
    for name in dict.fromkeys(run.experiment.base for run in runs):
        base = scale.bases[name]
        shape = ("small" if base.source == "grown" else base.source, base.seq_len * base.batch_size)
        if shape not in speeds:
            speeds[shape] = measure_base(base, scale)
        found[name] = speeds[shape]
    return found


def seconds(run: Run, scale: Scale, speeds: Mapping[str, Speed]) -> float:
    """Estimated seconds of a run."""
    speed = speeds[run.experiment.base]
    scored = 1 if run.grid else 1 + len(run.experiment.evaluated())
    work = run.steps + OVERHEAD_STEPS + EVALUATION * scored * scale.eval_tokens / speed.tokens
    if run.method == "ours" and scale.bases[run.experiment.base].pretrained:
        work += CALIBRATION
    return work * speed.step + OVERHEAD_SECONDS


def figure1_seconds(scale: Scale) -> float:
    """Rough: softmax at the longest length is nearly all of it (64k: 100 s on two cores), and grows with the square."""
    return 20.0 + 100.0 * (max(scale.lengths, default=0) / 65536) ** 2
