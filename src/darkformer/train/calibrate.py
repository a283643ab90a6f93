"""Closed-form calibration of a converted model: centres, balance, proposal, and the starting scale of each head.

Statistics come from one pass of the *softmax* model; queries and keys are never stored, only their moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ConfigError, ConversionError, InputError
from ..features.maps import FeatureMap, FeatureParameters, key_log_features, query_log_features
from ..features.proposals import (
    PairMoments,
    inadmissible,
    pair_moments,
    proposal_covariance,
    shared_covariance,
)
from ..features.transforms import balance
from ..hf.convert import dark_layers, observing
from .evaluate import Progress

#: Scales of the starting geometry that the line search tries: a colder kernel is biased but far less noisy.
SCALES = (1.0, 0.84, 0.7, 0.59, 0.5, 0.42, 0.35, 0.25)
#: Offsets tried around the bias that matches the far mass; a noisy head is better off with less of its features.
BIAS_OFFSETS = (0.0, -0.5, -1.0, -2.0, -4.0, -8.0)
#: Tokens of a sequence the line search looks at; it compares with quadratic attention.
SEARCH_TOKENS = 512


class Moments:
    """Streaming first and second moments of a layer's scaled queries and keys, in float64."""

    def __init__(self, groups: int, dim: int) -> None:
        self.count = {"query": 0, "key": 0}
        self.total = {side: torch.zeros(groups, dim, dtype=torch.float64) for side in self.count}
        self.square = {side: torch.zeros(groups, dim, dim, dtype=torch.float64) for side in self.count}

    def add(self, side: str, x: Tensor, keep: Tensor) -> None:
        """x (B, G, …, L, d) of which the tokens keep (B, L) count."""
        rows = x.movedim(1, 0).flatten(1, -2)[:, keep_rows(x, keep)].double().cpu()
        self.count[side] += rows.shape[1]
        self.total[side] += rows.sum(1)
        self.square[side] += rows.mT @ rows

    def mean(self, side: str) -> Tensor:
        """(G, d)."""
        return self.total[side] / self.count[side]

    def covariance(self, side: str, centered: bool) -> Tensor:
        """(G, d, d): the covariance, or the second moment about zero."""
        second = self.square[side] / self.count[side]
        mean = self.mean(side)
        return second - mean[:, :, None] * mean[:, None, :] if centered else second


def keep_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Flattens keep (B, L) to the row order of x (B, G, [R,] L, d) with G moved out."""
    if x.dim() == 5:
        keep = keep[:, None].expand(-1, x.shape[2], -1)
    return keep.flatten()


def _real(mask: Tensor | None, query: Tensor) -> Tensor:
    """(B, L) which tokens are real."""
    shape = (query.shape[0], query.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device) if mask is None else mask[:, -shape[1] :].bool()


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
        real = _real(mask, query)
        grouped = query.unflatten(1, (fm.num_kv_heads, -1))
        layer.add("query", grouped * scaling**0.5, real)
        # The sinks stay exact, and they are the outliers: the features' statistics leave them out.
        layer.add("key", key * scaling**0.5, real & (real.cumsum(1) > fm.config.sinks))

    with observing(model, observer):
        for batch in batches:
            _forward(model, batch)
            tick()
    return moments


@torch.no_grad()
def _set_transforms(fm: FeatureMap, moments: Moments) -> None:
    needed = 2 * fm.head_dim
    if moments.count["key"] < needed:
        raise InputError(
            f"calibration saw {moments.count['key']} tokens per head, a covariance of dimension {fm.head_dim} "
            f"needs {needed} at the least: give longer or more batches."
        )
    if fm.query_center is not None and fm.key_center is not None:
        fm.query_center.copy_(moments.mean("query"))
        fm.key_center.copy_(moments.mean("key"))
    if fm.query_balance is not None and fm.key_balance is not None:
        centered = fm.query_center is not None
        pair = balance(moments.covariance("query", centered), moments.covariance("key", centered))
        fm.query_balance.copy_(pair.query)
        fm.key_balance.copy_(pair.key)


def _feature_moments(fm: FeatureMap, moments: Moments) -> PairMoments:
    """Moments of queries and keys as the features see them at scale 1 (M = I): centred, balanced."""
    sides = []
    for side, center, map_ in (
        ("query", fm.query_center, fm.query_balance),
        ("key", fm.key_center, fm.key_balance),
    ):
        mean, second = moments.mean(side), moments.covariance(side, center is not None)
        if center is not None:
            mean = torch.zeros_like(mean)
        if map_ is not None:
            linear = map_.detach().double().cpu()
            mean, second = (linear @ mean[..., None])[..., 0], linear @ second @ linear.mT
        sides.append((second, mean))
    (query, query_mean), (key, key_mean) = sides
    return pair_moments(query, key, query_mean, key_mean)


class _Proposals:
    """Sets one layer's proposal for any scale of its heads."""

    def __init__(self, fm: FeatureMap, moments: Moments) -> None:
        self.fm, self.moments = fm, _feature_moments(fm, moments)

    def _bad(self, scale: Tensor) -> list[list[float]]:
        """Per head the eigenvalues that Theorem 3.2 refuses at scale (G,); none for the other proposals."""
        if self.fm.config.proposal != "theorem32":
            return [[] for _ in range(self.fm.num_kv_heads)]
        scaled = self.moments.scaled(scale)
        return inadmissible(shared_covariance(scaled.query, scaled.key))

    def exists(self, scale: Tensor) -> Tensor:
        """(G,) bool, for scale (G,)."""
        return torch.tensor([not bad for bad in self._bad(scale)])

    def set_(self, scale: Tensor) -> None:
        """The proposal at scale (G,), isotropic where it does not exist."""
        shrunk = torch.where(self.exists(scale), scale, 0.0)  # every proposal of zero moments is the identity
        self.fm.propose_(proposal_covariance(self.fm.config.proposal, self.moments.scaled(shrunk)))

    def check(self, coldest: float) -> None:
        """Raises ConfigError for heads without a proposal even at the coldest scale that may be chosen."""
        bad = self._bad(torch.full((self.fm.num_kv_heads,), coldest))
        if any(bad):
            shown = "; ".join(
                f"head {g}: {', '.join(f'{v:.3g}' for v in row[::-1])}" for g, row in enumerate(bad) if row
            )
            raise ConfigError(
                f"layer {self.fm.layer}: proposal='theorem32' needs every eigenvalue of Λ below 1/2; "
                f"at scale {coldest} these are not: {shown}. "
                "proposal='optimal' exists for every Λ; cold_start=True and balance=True help."
            )


class _Part(NamedTuple):
    """One part of attention: Σ w·v (B, G, R, L, d_v) and Σ w (B, G, R, L, 1), on the exact weights' scale."""

    numerator: Tensor
    normaliser: Tensor


class _Search:
    """Quadratic attention of one layer on held-back tokens: the exact parts, and the features' part at any scale."""

    def __init__(self, fm: FeatureMap, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float):
        keep = slice(0, SEARCH_TOKENS)
        real = _real(mask, query)[:, keep]
        self.q = query[:, :, keep].unflatten(1, (fm.num_kv_heads, -1)).float() * scaling**0.5
        self.k, self.v = key[:, :, keep].float() * scaling**0.5, value[:, :, keep].float()
        self.position = (real.cumsum(1) - 1).clamp_min(0)
        offset = self.position[:, :, None] - self.position[:, None, :]
        seen = (offset >= 0) & real[:, None, :] & real[:, :, None]
        near = seen & ((offset < fm.config.window) | (self.position < fm.config.sinks)[:, None, :])
        self.far_mask = (seen & ~near)[:, None, None]
        logits = (self.q @ self.k[:, :, None].mT).masked_fill(~seen[:, None, None], -torch.inf)
        self.top = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = (logits - self.top).exp()
        self.near = self._part(weights * near[:, None, None])
        self.far = self._part(weights * self.far_mask)
        self.rows = real[:, None, None, :, None]
        self.target = self._output(self.far)

    def _part(self, weights: Tensor) -> _Part:
        return _Part(weights @ self.v[:, :, None], weights.sum(-1, keepdim=True))

    def _output(self, far: _Part) -> Tensor:
        normaliser = (self.near.normaliser + far.normaliser).clamp_min(1e-30)
        return (self.near.numerator + far.numerator) / normaliser * self.rows

    def features(self, parameters: FeatureParameters) -> _Part:
        """The far part by the features of `parameters`."""
        heads, length = self.q.shape[2:4]
        lq = query_log_features(parameters, self.q.flatten(2, 3), self.position.repeat(1, heads))
        lk = key_log_features(parameters, self.k, self.position)[:, :, None]
        lq = lq.unflatten(2, (heads, length))
        high_q, high_k = lq.amax(-1, keepdim=True), lk.amax((-2, -1), keepdim=True)
        kernel = (lq - high_q).exp() @ (lk - high_k).exp().mT
        return self._part(kernel * (high_q + high_k - self.top).clamp_max(80.0).exp() * self.far_mask)

    def bias(self, far: _Part) -> Tensor:
        """Per kv head: the median over queries of log(exact far mass / the features' far mass)."""
        exact, ours = self.far.normaliser, far.normaliser
        ratio = torch.where((exact > 0) & (ours > 0), exact.log() - ours.log(), torch.nan)
        return ratio.transpose(0, 1).flatten(1).nanmedian(dim=1).values.nan_to_num()

    def error(self, far: _Part, bias: Tensor) -> Tensor:
        """Per kv head: ‖output - exact output‖² / ‖exact output‖² over real tokens, the features times exp(bias)."""
        factor = bias.exp()[:, None, None, None]
        output = self._output(_Part(far.numerator * factor, far.normaliser * factor))
        return (output - self.target).square().sum((0, 2, 3, 4)) / self.target.square().sum((0, 2, 3, 4))


class _Try(NamedTuple):
    """One candidate of the line search; all per kv head."""

    scale: float
    bias: Tensor
    error: Tensor
    allowed: Tensor


def _scales(fm: FeatureMap) -> tuple[float, ...]:
    return SCALES if fm.scalable and fm.config.cold_start else SCALES[:1]


def _try_scale(fm: FeatureMap, search: _Search, proposals: _Proposals | None, scale: float) -> list[_Try]:
    """Every bias at one scale of the maps, with the proposal that belongs to this scale."""
    allowed = torch.ones(fm.num_kv_heads, dtype=torch.bool)
    if proposals is not None:
        every = torch.full((fm.num_kv_heads,), scale)
        allowed = proposals.exists(every)
        proposals.set_(every)
    start = fm.parameters_for(torch.float32)
    scaled = start._replace(
        far_bias=None,
        query_map=None if start.query_map is None else start.query_map * scale,
        key_map=None if start.key_map is None else start.key_map * scale,
    )
    far = search.features(scaled)
    biases = [far.normaliser.new_zeros(fm.num_kv_heads)]
    if fm.far_bias is not None:
        matched = search.bias(far)
        biases += [matched + offset for offset in BIAS_OFFSETS]
    return [_Try(scale, bias, search.error(far, bias), allowed) for bias in biases]


@torch.no_grad()
def _search_layer(fm: FeatureMap, search: _Search, proposals: _Proposals | None) -> HeadChoice:
    tried = [candidate for scale in _scales(fm) for candidate in _try_scale(fm, search, proposals, scale)]
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
        fm.far_bias.copy_(bias)
    only_exact = search.error(search.far, torch.full_like(bias, -torch.inf))
    columns = (chosen, bias, errors[best, groups].sqrt(), errors[0].sqrt(), only_exact.sqrt())
    return HeadChoice(fm.layer, *(column.tolist() for column in columns))


def _set_closed_forms(
    model: nn.Module, layers: list[FeatureMap], batches: list[Any], tick: Any
) -> dict[int, _Proposals]:
    """Centres, balance and proposals (at scale 1) of the layers that have any; the proposals by the layer's id."""
    gaussian = [
        fm for fm in layers if any(x is not None for x in (fm.query_center, fm.query_balance, fm.proposal_root))
    ]
    proposals: dict[int, _Proposals] = {}
    moments = _collect(model, batches, tick) if gaussian else {}
    for fm in gaussian:
        _set_transforms(fm, moments[fm.layer])
        if fm.proposal_root is not None:
            proposals[id(fm)] = proposal = _Proposals(fm, moments[fm.layer])
            proposal.check(_scales(fm)[-1])
            proposal.set_(torch.ones(fm.num_kv_heads))
    return proposals


def _line_search(
    model: nn.Module, layers: list[FeatureMap], batch: Any, proposals: dict[int, _Proposals]
) -> list[HeadChoice]:
    """Scale and bias of the layers that have one to choose, measured on `batch`."""
    choices: list[HeadChoice] = []
    searched = {id(fm) for fm in layers if fm.far_bias is not None or (fm.config.cold_start and fm.scalable)}

    def observer(fm: FeatureMap, *captured: Any) -> None:
        if id(fm) in searched:
            choices.append(_search_layer(fm, _Search(fm, *captured[:-1]), proposals.get(id(fm))))

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
