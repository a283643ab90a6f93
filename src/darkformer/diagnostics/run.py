"""The diagnosis of a softmax model: one pass over real text, every layer and head measured, a record, pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.budget import Budget, Chooser, full_context
from ..calibration.moments import Moments, tokens_needed
from ..calibration.probe import real_tokens
from ..calibration.sensitivity import sensitivity
from ..config import CONTEXT, DarkConfig
from ..errors import ConfigError, InputError, NonFiniteError, RunFolderError
from ..features.feature_map import FeatureMap
from ..hf.convert import convert, revert
from ..hf.interface import observing
from ..hf.layers import dark_layers
from ..hf.load import load_model, load_tokenizer
from ..records import check_folder, environment, write_json
from ..reporting import Reporter, Silent
from ..train.data import load_documents, token_blocks
from ..train.linearize import check_context, choice_batches
from .estimators import ESTIMATORS
from .layer import Effort, Layer, diagnose_layer
from .report import write_diagnosis
from .summary import agreement, measured_rows, recommendations

#: Tokens whose moments are collected, in sequences of `Effort.tokens`, before the probe sequence.
MOMENT_TOKENS = 4096


class Collector:
    """Streams moments of every layer: of all keys, and of the keys behind the sinks."""

    def __init__(self) -> None:
        self.every: dict[int, Moments] = {}
        self.far: dict[int, Moments] = {}

    def __call__(
        self, fm: FeatureMap, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, _: Tensor
    ) -> None:
        real = real_tokens(mask, query)
        for store, sinks in ((self.every, 0), (self.far, fm.config.sinks)):
            moments = store.setdefault(fm.layer, Moments(fm.num_kv_heads, fm.head_dim))
            moments.add_layer(query, key, scaling, real, sinks)


def dead_heads(moments: Moments) -> list[int]:
    """Heads whose queries or keys have no variance: nothing can be estimated about them."""
    alive = torch.ones(moments.total["key"].shape[0], dtype=torch.bool)
    for side in ("query", "key"):
        spread = moments.covariance(side, True).diagonal(dim1=-2, dim2=-1).mean(-1)
        size = moments.covariance(side, False).diagonal(dim1=-2, dim2=-1).mean(-1)
        alive &= spread > 1e-12 * size.clamp_min(1e-30)
    return [g for g, good in enumerate(alive) if not good]


def _marked(layer: int, head: int, problem: str) -> dict[str, Any]:
    return {"layer": layer, "head": head, "problem": problem}


def _give_variance(moments: Moments, heads: Sequence[int]) -> None:
    """Unit covariance in place of none, so that the layer's other heads can go through the same products."""
    dim = moments.total["key"].shape[1]
    for side in ("query", "key"):
        for g in heads:
            moments.square[side][g] += moments.count[side] * torch.eye(dim, dtype=torch.float64)


class Diagnosis:
    """The second part of the pass: on the probe sequence every layer is analysed as its tensors come by."""

    def __init__(
        self, collected: Collector, config: DarkConfig, effort: Effort, layers: Sequence[int], advance: Any
    ) -> None:
        self.collected, self.config, self.effort, self.advance = collected, config, effort, advance
        self.layers, self.done = layers, 0
        self.rows: list[dict[str, Any]] = []

    def __call__(self, fm: FeatureMap, *captured: Any) -> None:
        if fm.layer not in self.layers:
            return
        every, far = self.collected.every[fm.layer], self.collected.far[fm.layer]
        dead = dead_heads(far)
        for moments in (every, far):
            _give_variance(moments, dead)
        try:
            rows = diagnose_layer(Layer(fm.layer, every, far, captured[:-1], self.config, self.effort))
        except (InputError, torch.linalg.LinAlgError) as error:
            rows = [_marked(fm.layer, g, str(error)) for g in range(fm.num_kv_heads)]
        for g in dead:
            rows[g] = _marked(fm.layer, g, "its queries or keys have no variance")
        self.rows += rows
        self.done += 1
        self.advance(self.done, len(self.layers))


def _chosen_layers(model: Any, wanted: Sequence[int]) -> list[int]:
    present = [fm.layer for fm in dark_layers(model)]
    if unknown := [layer for layer in wanted if layer not in present]:
        raise ConfigError(
            f"--layer {', '.join(map(str, unknown))}: no such attention layer; this model has "
            f"{present[0]} to {present[-1]} ({len(present)} layers)."
        )
    return sorted(set(wanted)) or present


def _check_tokens(blocks: Tensor, dim: int) -> None:
    tokens = (len(blocks) - 1) * blocks.shape[1]
    if tokens < tokens_needed(dim):
        raise InputError(
            f"the text gives {tokens} tokens besides the probe sequence, a covariance of dimension {dim} needs "
            f"{tokens_needed(dim)} at the least: give more text with --data."
        )


@torch.no_grad()
def diagnose(
    model: Any,
    blocks: Tensor,
    config: DarkConfig,
    effort: Effort,
    *,
    layers: Sequence[int] = (),
    exact_share: float = 0.1,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measures every head of a softmax model, in place and back.

    Args:
        model: unconverted, with transformers' attention interface. blocks: (N ≥ 2, L) tokens; the last is the probe.
        config: window, sinks and m that are recommended against. layers: numbers; all without.

    Returns:
        A record's part: `rows` (one a layer and kv head; `problem` says why one could not be measured), `problems`,
        and where any head could be measured `estimators` (name → title), `agreement`, `recommendations`.

    Raises:
        InputError: too few tokens. ConfigError: a layer the model does not have.
    """
    reporter = reporter or Silent()
    convert(model, DarkConfig(num_features=1, window=config.window, sinks=config.sinks, convert_sliding=True))
    problems: list[str] = []
    try:
        wanted = _chosen_layers(model, layers)
        first = next(dark_layers(model))
        _check_tokens(blocks, first.head_dim)
        collected = Collector()
        batches = blocks[:-1].split(2)
        stage = reporter.stage("moments of queries and keys", len(batches))
        with stage as advance, observing(model, collected, softmax=True):
            for i, batch in enumerate(batches):
                problems += _forward(model, batch)
                advance(i + 1, len(batches))
        chosen = [layer for layer in wanted if layer in collected.far]
        with reporter.stage("layer by layer", len(chosen)) as advance:
            run = Diagnosis(collected, config, effort, chosen, advance)
            with observing(model, run, softmax=True):
                problems += _forward(model, blocks[-1:])
        groups = {fm.layer: fm.num_kv_heads for fm in dark_layers(model)}
    finally:
        revert(model)
    reached = {row["layer"] for row in run.rows}
    for layer in sorted(set(wanted) - reached):
        why = "not reached: " + (problems[0] if problems else "no tokens came by")
        run.rows += [_marked(layer, g, why) for g in range(groups[layer])]
    result: dict[str, Any] = {"rows": sorted(run.rows, key=lambda r: (r["layer"], r["head"]))}
    result["problems"] = sorted({*problems, *(r["problem"] for r in run.rows if r["problem"])})
    if measured_rows(run.rows):
        result["estimators"] = {name: estimator.title for name, estimator in ESTIMATORS.items()}
        result["agreement"] = agreement(run.rows, config.num_features)
        result["recommendations"] = recommendations(
            run.rows, window=config.window, m=config.num_features, exact_share=exact_share
        )
    return result


def needs(
    model: Any, tokenizer: Any, blocks: Tensor, budget: Budget, config: DarkConfig, reporter: Reporter
) -> dict[str, Any]:
    """What each head of a softmax model loses without its far field, and what a budget would keep exact.

    Args:
        blocks: (N, context) tokens.

    Returns:
        `sensitivity`, `budget` and `choice` as plain values; `problem` says why there is no `choice`, else it is None.
    """
    batches = choice_batches(blocks)
    with reporter.stage("which heads need softmax", 1) as advance:
        found = sensitivity(model, batches, tokenizer=tokenizer, sinks=config.sinks, progress=advance)
    result = {"sensitivity": found.to_dict(), "budget": str(budget), "choice": None, "problem": None}
    with reporter.stage("what a budget would keep", 1):
        try:
            choice = Chooser(
                model, batches, found, tokenizer=tokenizer, config=config, count_features=not config.drop_features
            ).choose(budget)
        except ConfigError as error:  # too small for this model
            return {**result, "problem": str(error)}
    return {**result, "choice": choice.to_dict()}


def _forward(model: Any, batch: Tensor) -> list[str]:
    """One softmax pass; what went wrong, instead of an error: the layers before it are still worth showing."""
    try:
        model(batch.to(next(model.parameters()).device), use_cache=False)
    except NonFiniteError as error:
        return [str(error)]
    return []


def rounded(values: Any, digits: int = 6) -> Any:
    """Nested lists and dicts with every float at `digits` significant digits: half a record's bytes are noise."""
    if isinstance(values, dict):
        return {key: rounded(value, digits) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    return float(f"{values:.{digits}g}") if isinstance(values, float) else values


def run_diagnosis(
    model_name: str,
    out: Path,
    *,
    data: Sequence[str],
    config: DarkConfig,
    effort: Effort,
    layers: Sequence[int] = (),
    exact_share: float = 0.1,
    context: int = CONTEXT,
    budget: str = "10%",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Loads, diagnoses, writes `record.json`, `plots/` and `report.html` to `out`. Returns the record.

    Args:
        context: tokens of the sequences on which each head's far field is cut (`needs`); 0: not done.
        budget: what `needs` says the exact heads for, as `Budget.parse` reads it.

    Raises:
        DarkformerError: bad input, or a folder that is not empty.
    """
    check_folder(out)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise RunFolderError(f"{out} is not empty: --overwrite replaces what a diagnosis wrote, --out avoids it.")
    if context:
        Budget.parse(budget, context)  # refused before minutes of measuring
    started, reporter = time.perf_counter(), reporter or Silent()
    with reporter.stage("load text and model", 1):
        tokenizer, documents = load_tokenizer(model_name), load_documents(data)
        blocks = token_blocks(tokenizer, documents, effort.tokens)
        blocks = blocks[: MOMENT_TOKENS // effort.tokens + 1]
        model = load_model(model_name)
    result = diagnose(model, blocks, config, effort, layers=layers, exact_share=exact_share, reporter=reporter)
    if context:
        try:
            check_context(model.config, context)
            advice = "give more text, or a smaller --context (0 leaves the sensitivity of heads out)"
            long_blocks = token_blocks(tokenizer, documents, context, "the", advice)
            limit = Budget.parse(budget, full_context(model))
            result["needs"] = {"asked": budget, **needs(model, tokenizer, long_blocks, limit, config, reporter)}
        except (InputError, ConfigError) as error:
            result["problems"].append(f"sensitivity of heads: {error}")
    record = {
        "command": "diagnose", "model": Path(model_name).name, "data": list(data), "config": config.to_dict(),
        "effort": asdict(effort), "tokens": int(blocks.numel()), "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1), **rounded(result),
    }  # fmt: skip
    write_json(out / "record.json", record)
    with reporter.stage("draw the report", 1):
        write_diagnosis(record, out)
    return record
