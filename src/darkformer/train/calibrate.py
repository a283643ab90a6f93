"""Closed-form calibration of a converted model: centres, balance, proposal, and the starting scale of each head.

Statistics come from one pass of the *softmax* model; queries and keys are never stored, only their moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ConversionError, InputError
from ..diagnostics.probe import Probe, real_tokens
from ..features.maps import FeatureMap
from ..features.moments import HeadProposals, Moments, set_transforms
from ..hf.convert import dark_layers, observing
from .evaluate import Progress

#: Scales of the starting geometry that the line search tries: a colder kernel is biased but far less noisy.
SCALES = (1.0, 0.84, 0.7, 0.59, 0.5, 0.42, 0.35, 0.25)
#: Tokens of a sequence the line search looks at; it compares with quadratic attention.
SEARCH_TOKENS = 512


@dataclass(frozen=True)
class HeadChoice:
    """What the line search chose for one layer, per kv head, and the relative output errors it measured."""

    layer: int
    scale: list[float]
    far_bias: list[float]
    error: list[float]  # relative error of the attention output at the choice
    error_unscaled: list[float]  # the same at scale 1 without bias (isotropic if the proposal does not exist there)
    error_exact_part: list[float]  # the same without any features


def _inputs(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        raise InputError(f"a calibration batch is a {type(batch).__name__}: give input_ids (B, L) or a dict with them.")
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def _forward(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device
    model(**{name: x.to(device) for name, x in _inputs(batch).items()}, use_cache=False)


def _collect(model: nn.Module, batches: list[Any], tick: Any) -> dict[int, Moments]:
    moments: dict[int, Moments] = {}

    def observer(
        fm: FeatureMap, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, _: Tensor
    ) -> None:
        layer = moments.setdefault(fm.layer, Moments(fm.num_kv_heads, fm.head_dim))
        layer.add_layer(query, key, scaling, real_tokens(mask, query), fm.config.sinks)

    with observing(model, observer):
        for batch in batches:
            _forward(model, batch)
            tick()
    return moments


class _Try(NamedTuple):
    """One candidate of the line search; all per kv head."""

    scale: float
    bias: Tensor
    error: Tensor
    allowed: Tensor


def _scales(fm: FeatureMap) -> tuple[float, ...]:
    return SCALES if fm.scalable and fm.config.cold_start else SCALES[:1]


def _try_scale(fm: FeatureMap, probe: Probe, proposals: HeadProposals | None, scale: float) -> list[_Try]:
    """Every bias at one scale of the maps, with the proposal that belongs to this scale."""
    allowed = torch.ones(fm.num_kv_heads, dtype=torch.bool)
    if proposals is not None:
        every = torch.full((fm.num_kv_heads,), scale)
        allowed = proposals.exists(every)
        proposals.set_(every)
    far = probe.features(fm.parameters_for(torch.float32)._replace(far_bias=None).scaled(scale))
    biases = probe.biases(far) if fm.far_bias is not None else [far.normaliser.new_zeros(fm.num_kv_heads)]
    return [_Try(scale, bias, probe.error(far, bias), allowed) for bias in biases]


@torch.no_grad()
def _search_layer(fm: FeatureMap, probe: Probe, proposals: HeadProposals | None) -> HeadChoice:
    tried = [candidate for scale in _scales(fm) for candidate in _try_scale(fm, probe, proposals, scale)]
    errors = torch.stack([t.error for t in tried]).nan_to_num(nan=torch.inf)  # argmin would prefer NaN
    allowed = torch.stack([t.allowed for t in tried]).to(errors.device)
    best, groups = errors.masked_fill(~allowed, torch.inf).argmin(0), torch.arange(fm.num_kv_heads)
    # If every error is infinite argmin takes the first, which may not be allowed.
    best = torch.where(allowed[best, groups], best, allowed.int().argmax(0))
    chosen = torch.tensor([tried[i].scale for i in best])
    bias = torch.stack([t.bias for t in tried])[best, groups]
    fm.scale_(chosen)
    if proposals is not None:
        proposals.set_(chosen)
    if fm.far_bias is not None:
        fm.set_("far_bias", bias)
    columns = (chosen, bias, errors[best, groups].sqrt(), errors[0].sqrt(), probe.error_exact_part().sqrt())
    return HeadChoice(fm.layer, *(column.tolist() for column in columns))


def _set_closed_forms(
    model: nn.Module, layers: list[FeatureMap], batches: list[Any], tick: Any
) -> dict[int, HeadProposals]:
    """Centres, balance and proposals (at scale 1) of the layers that have any; the proposals by the layer's id."""
    gaussian = [
        fm for fm in layers if any(x is not None for x in (fm.query_center, fm.query_balance, fm.proposal_root))
    ]
    proposals: dict[int, HeadProposals] = {}
    moments = _collect(model, batches, tick) if gaussian else {}
    for fm in gaussian:
        set_transforms(fm, moments[fm.layer])
        if fm.proposal_root is not None:
            proposals[id(fm)] = proposal = HeadProposals(fm, moments[fm.layer])
            proposal.check(_scales(fm)[-1])
            proposal.set_(torch.ones(fm.num_kv_heads))
    return proposals


def _line_search(
    model: nn.Module, layers: list[FeatureMap], batch: Any, proposals: dict[int, HeadProposals]
) -> list[HeadChoice]:
    """Scale and bias of the layers that have one to choose, measured on `batch`."""
    choices: list[HeadChoice] = []
    searched = {id(fm) for fm in layers if fm.far_bias is not None or (fm.config.cold_start and fm.scalable)}

    def observer(fm: FeatureMap, *captured: Any) -> None:
        if id(fm) in searched:
            probe = Probe(*captured[:-1], config=fm.config, tokens=SEARCH_TOKENS)
            choices.append(_search_layer(fm, probe, proposals.get(id(fm))))

    if searched:
        with observing(model, observer):
            _forward(model, batch)
    return choices


def calibrate(model: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None) -> list[HeadChoice]:
    """Sets centres, balance, proposal, scale and bias of every layer from the softmax model's own queries and keys.

    One pass over `batches`. All but the last give the moments, from which centres and balance follow in closed form;
    on the last, held back, a line search over `SCALES` picks each head's scale by the measured error of the attention
    output (bias² + variance), and with it the bias of the features against the exact part, from a few offsets around
    the median log-ratio of far masses. The proposal follows the scale: its moments are those of the scaled inputs.
    With `cold_start` M starts at scale × identity: an earlier calibration or training of M is forgotten.
    What the configuration turns off (`center`, `balance`, `cold_start`, `far_bias`) is left alone;
    `DarkConfig.paper()` turns everything off, so there this does nothing.

    Args:
        batches: input_ids (B, L), or dicts with input_ids and attention_mask. A single batch serves both purposes.
        progress: called with (batches done, batches in all).

    Returns:
        One `HeadChoice` per layer (empty if there was nothing to choose).

    Raises:
        ConversionError: the model is not converted. InputError: too few tokens, or a batch that is none.
        ConfigError: `theorem32` has no proposal for a head at any scale that may be chosen (names layer and head).
    """
    layers = list(dark_layers(model))
    if not layers:
        raise ConversionError("the model is not converted: call darkformer.convert(model, config) first.")
    every = list(batches)
    if not every:
        raise InputError("no calibration batches: give at least one.")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(every))

    was_training = model.training
    model.eval()
    try:
        for fm in layers:
            if fm.config.cold_start:
                fm.reset_geometry_()
        proposals = _set_closed_forms(model, layers, every[:-1] or every, tick)
        choices = _line_search(model, layers, every[-1], proposals)
    finally:
        model.train(was_training)
    if progress:
        progress(len(every), len(every))
    return choices
