"""Closed-form calibration of a converted model: centres, balance, proposal, and the starting scale of each head.

Statistics are taken in one pass of the *softmax* model; only moments of queries and keys are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..features.feature_map import FeatureMap
from ..hf.convert import drop_features
from ..hf.interface import observing
from ..hf.layers import required_maps
from ..reporting import Progress
from .moments import HeadProposals, Moments, set_transforms
from .probe import SCALES, SpreadProbe, real_tokens
from .projections import output_grams
from .rows import inputs_of, run

#: Queries of a sequence that the line search uses, spread over its context; each is compared over all its keys.
SEARCH_QUERIES = 128
#: Added to the bias of least error where there is a window: least error gives the features too much weight for the
#: loss, and for texts of another kind.
CAUTION = -1.0
#: Features are dropped unless they save this share of the squared output error on tokens held back …
MARGIN = 0.02
#: … and this share of the squared output.
NEGLIGIBLE = 1e-3
#: Where features must beat a wider window of as many bytes, their error is at most this share of the window's. The loss
#: follows such errors loosely: at window 256 features that saved less did not lower it.
BYTES_MARGIN = 0.8


@dataclass(frozen=True)
class HeadChoice:
    """What the line search chose for one layer, per kv head, and the relative output errors it measured.

    Errors are those of what the head adds to the residual stream (after the output projection, if that was identified),
    on tokens that took no part in the choice.
    """

    layer: int
    heads: list[int]  # numbers of the kv heads in the layer
    scale: list[float]
    far_bias: list[float]
    features: list[bool]  # whether they are left on: they lower the error enough, or the configuration keeps them
    error: list[float]  # with features, at the choice
    error_unscaled: list[float]  # the same at scale 1 without bias (isotropic if the proposal does not exist there)
    error_exact_part: list[float]  # the same without any features
    error_equal_bytes: list[float]  # without features, the window wider by as many keys as they take bytes


def _collect(model: nn.Module, batches: list[Any], tick: Any) -> dict[int, Moments]:
    moments: dict[int, Moments] = {}

    def observer(
        fm: FeatureMap, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, _: Tensor
    ) -> None:
        layer = moments.setdefault(fm.layer, Moments(fm.num_kv_heads, fm.head_dim))
        layer.add_layer(query, key, scaling, real_tokens(mask, query), fm.config.sinks)

    with observing(model, observer, softmax=True):
        for batch in batches:
            run(model, inputs_of(batch))
            tick()
    return moments


class _Candidate(NamedTuple):
    """A scale and bias of the line search; all tensors per kv head."""

    scale: float
    bias: Tensor
    error: Tensor  # on the tokens that decide
    error_held_back: Tensor  # on the others
    allowed: Tensor  # booleans: whether the proposal exists at this scale


def _scales(fm: FeatureMap) -> tuple[float, ...]:
    return SCALES if fm.scalable and fm.config.cold_start else SCALES[:1]


def _split_queries(rows: Tensor) -> list[Tensor]:
    """(B, Q) booleans: the queries that decide, and those that check the choice.

    The latter are in the later half of the rows or, if there is only one row, in every other stretch of it.
    """
    batch, count = rows.shape
    if batch > 1:
        held_back = (torch.arange(batch, device=rows.device) >= batch // 2)[:, None]
    else:
        held_back = (torch.arange(count, device=rows.device) // max(1, count // 8) % 2 == 1)[None]
    return [~held_back & rows, held_back & rows]


def _candidates_at(
    fm: FeatureMap, probe: SpreadProbe, at: list[Tensor], proposals: HeadProposals | None, scale: float
) -> list[_Candidate]:
    """Every bias at one scale of the maps, with the proposal that belongs to this scale."""
    allowed = torch.ones(fm.num_kv_heads, dtype=torch.bool)
    if proposals is not None:
        every = torch.full((fm.num_kv_heads,), scale)
        allowed = proposals.exists(every)
        proposals.set_(every)
    far = probe.features(fm.parameters_for(torch.float32)._replace(far_bias=None).scaled(scale))
    biases = probe.biases(far) if fm.far_bias is not None else [far.normaliser.new_zeros(fm.num_kv_heads)]
    errors = [probe.errors(far, bias, at) for bias in biases]
    return [_Candidate(scale, bias, e[0], e[1], allowed) for bias, e in zip(biases, errors, strict=True)]


@torch.no_grad()
def _search_layer(fm: FeatureMap, probe: SpreadProbe, proposals: HeadProposals | None, key_bytes: int) -> HeadChoice:
    at = _split_queries(probe.rows)
    candidates = [candidate for scale in _scales(fm) for candidate in _candidates_at(fm, probe, at, proposals, scale)]
    errors = torch.stack([t.error for t in candidates]).nan_to_num(nan=torch.inf)  # argmin would prefer NaN
    allowed = torch.stack([t.allowed for t in candidates]).to(errors.device)
    best, groups = errors.masked_fill(~allowed, torch.inf).argmin(0), torch.arange(fm.num_kv_heads)
    # If every error is infinite argmin takes the first, which may not be allowed.
    best = torch.where(allowed[best, groups], best, allowed.int().argmax(0))
    chosen = torch.tensor([candidates[i].scale for i in best])
    bias = torch.stack([t.bias for t in candidates])[best, groups]
    fm.scale_(chosen)
    if proposals is not None:
        proposals.set_(chosen)
    if fm.far_bias is not None:
        bias = bias + CAUTION if fm.config.window else bias
        fm.set_("far_bias", bias)
    far = probe.features(fm.parameters_for(torch.float32)._replace(far_bias=None))
    check, without = probe.errors(far, bias, at[1:])[0].nan_to_num(nan=torch.inf), probe.errors_exact_part(at[1:])[0]
    wider = probe.errors_of_window(fm.config.window + keys_of_features(fm, key_bytes), at[1:])[0]
    columns = (check.sqrt(), candidates[0].error_held_back.sqrt(), without.sqrt(), wider.sqrt())
    return HeadChoice(
        fm.layer, list(fm.heads), chosen.tolist(), bias.tolist(), pays(check, without).tolist(),
        *(x.tolist() for x in columns),
    )  # fmt: skip


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


def keys_of_features(fm: FeatureMap, key_bytes: int) -> int:
    """The number of keys that take as many bytes as a head's features, at `key_bytes` for a key and its value."""
    return math.ceil(4 * fm.config.feature_count * (fm.head_dim + 2) / key_bytes)


def _line_search(
    model: nn.Module, layers: list[FeatureMap], batch: Any, proposals: dict[int, HeadProposals], element_bytes: int
) -> list[HeadChoice]:
    """Chooses scale and bias of the layers that have any, by errors measured on `batch`."""
    choices: list[HeadChoice] = []
    searched = {id(fm) for fm in layers if fm.far_bias is not None or (fm.config.cold_start and fm.scalable)}

    def observer(fm: FeatureMap, *captured: Any) -> None:
        if id(fm) in searched:
            gram = grams.get(id(fm))
            probe = SpreadProbe(*captured[:-1], config=fm.config, queries=SEARCH_QUERIES, output_gram=gram)
            key_bytes = element_bytes * (captured[1].shape[-1] + captured[2].shape[-1])
            choices.append(_search_layer(fm, probe, proposals.get(id(fm)), key_bytes))

    if searched:
        grams = output_grams(model, batch)
        with observing(model, observer, softmax=True):
            run(model, inputs_of(batch))
    return choices


def pays(error: Tensor, without: Tensor) -> Tensor:
    """Whether features bring a squared error far enough down, from `without` them; also where there is nothing far."""
    return (without - error > (MARGIN * without).clamp_min(NEGLIGIBLE)) | ~(without > 0)


class Report(Protocol):
    """What was found of one layer: a `HeadChoice`, or a `LayerTransfer`."""

    @property
    def layer(self) -> int: ...
    @property
    def heads(self) -> list[int]: ...
    @property
    def features(self) -> list[bool]: ...


def drop_unpaid(
    model: nn.Module, layers: Iterable[FeatureMap], reports: Iterable[Report], *, drop: bool = True
) -> None:
    """Switches off the features that do not pay, where the configuration allows it and there is a window.

    Args:
        reports: their `features` say on entry which pay, and afterwards which are left on.
        drop: False leaves all of them on.
    """
    droppable = {fm.layer for fm in layers if drop and fm.config.drop_features and fm.config.window > 0}
    heads: set[tuple[int, int]] = set()
    for report in reports:
        if report.layer not in droppable:
            report.features[:] = [True] * len(report.heads)
        heads |= {(report.layer, head) for head, on in zip(report.heads, report.features, strict=True) if not on}
    if heads:
        drop_features(model, heads)


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, equal_bytes: bool = False, element_bytes: int | None = None,
    drop: bool = True, progress: Progress | None = None,
) -> list[HeadChoice]:  # fmt: skip
    """Sets centres, balance, proposal, scale and bias of every layer from the softmax model's own queries and keys.

    All of `batches` but the last give the moments, from which centres and balance follow in closed
    form. On the last, which is held back, a line search over `SCALES` chooses each head's scale by the measured error
    (bias² + variance) of what the head adds to the residual stream, together with the bias of the features against the
    exact part: the best of a few offsets around the median log-ratio of far masses, plus `CAUTION` where there is a
    window. Errors are measured at `SEARCH_QUERIES` positions a row, spread over its whole context, each over all its
    keys, so batches should be as long as the context the model will be used at. The proposal follows the scale, from
    the moments of the scaled inputs. With `cold_start` M starts at scale × identity, and an earlier calibration or
    training of M is lost.

    Half of the last batch (the later rows; of a single row, every other stretch) takes no part in the choice. Where
    features do not lower the error there by `MARGIN`, or lower it by next to nothing (`NEGLIGIBLE`), the head is better
    off with window and sinks alone. With `drop_features` its features are then switched off for good, and cost neither
    time nor bytes. Such layers get new feature maps, so create the optimizer after calibration.

    Whatever the configuration turns off (`center`, `balance`, `cold_start`, `far_bias`, `drop_features`) is left alone.
    `DarkConfig.paper()` turns everything off, so this does nothing there.

    Args:
        batches: input_ids (B, L), or dicts with input_ids and attention_mask. A single batch serves both purposes.
        equal_bytes: features must also beat a window that is wider by as many bytes; for budgets without training.
        drop: False keeps features that do not pay yet whatever the configuration says, for a `transfer` that follows.
        element_bytes: of a number in the keys and values of that window; by default those of the model's weights.
        progress: called with (batches done, batches in all).

    Returns:
        One `HeadChoice` per layer whose scale or bias was chosen.

    Raises:
        ConversionError: the model is not converted. InputError: too few tokens, or something that is no batch.
        ConfigError: `theorem32` has no proposal for a head at any of the scales (the message has layer and head).
    """
    layers = required_maps(model)
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
        element_bytes = element_bytes or next(model.parameters()).element_size()
        choices = _line_search(model, layers, every[-1], proposals, element_bytes)
        if equal_bytes:
            for choice in choices:
                better = [a < BYTES_MARGIN * b for a, b in zip(choice.error, choice.error_equal_bytes, strict=True)]
                choice.features[:] = [on and wins for on, wins in zip(choice.features, better, strict=True)]
        drop_unpaid(model, layers, choices, drop=drop)
    finally:
        model.train(was_training)
    if progress:
        progress(len(every), len(every))
    return choices
