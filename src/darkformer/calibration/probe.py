"""Attention of one layer in two parts, exact and far, where the far part can come from any feature map.

`Probe` is quadratic in its tokens and keeps every weight. `SpreadProbe` takes a few queries of a long context, against
all their keys, and keeps only sums over the keys.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DarkConfig
from ..features.affine import FeatureParameters, affine, key_log_features, query_log_features
from .projections import squared_lengths

#: Scales of the starting geometry that calibration tries: a colder kernel is biased but far less noisy. A diagnosis
#: shows every second one.
SCALES = (1.0, 0.84, 0.7, 0.59, 0.5, 0.42, 0.35, 0.25)
#: Offsets tried around the bias that matches the far mass; a noisy head is better off with less of its features.
BIAS_OFFSETS = (1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0, -5.0, -6.0, -8.0)


class Part(NamedTuple):
    """One part of attention at Q queries: Σ w·v (B, G, R, Q, d_v), Σ w (B, G, R, Q, 1), on the exact weights' scale."""

    numerator: Tensor
    normaliser: Tensor


def real_tokens(mask: Tensor | None, query: Tensor) -> Tensor:
    """(B, L) which tokens are real, from a padding mask (B, ≥ L) or None and the queries (B, H, L, d)."""
    shape = (query.shape[0], query.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device) if mask is None else mask[:, -shape[1] :].bool()


class FarField:
    """Softmax attention at some queries, in two parts, and the errors of feature maps that replace the far one.

    Attributes:
        exact, far: the part of window and sinks, and the rest.
        rows: (B, Q) which of the queries count.
        target: softmax's output, (B, G, R, Q, d_v).
        output_gram: (G, R·d_v, R·d_v) WᵀW of the output projection's columns of each kv head: errors are then those
            of what the layer adds to the residual stream. None: those of the attention output itself.
    """

    exact: Part
    far: Part
    rows: Tensor
    target: Tensor
    output_gram: Tensor | None = None

    def output(self, far: Part) -> Tensor:
        """(B, G, R, Q, d_v) with `far` as the far part."""
        normaliser = (self.exact.normaliser + far.normaliser).clamp_min(1e-30)
        return (self.exact.numerator + far.numerator) / normaliser * self.rows[:, None, None, :, None]

    def share(self, far: Part) -> Tensor:
        """(B, G, R, Q, 1) share of `far` in the normaliser."""
        return far.normaliser / (self.exact.normaliser + far.normaliser).clamp_min(1e-30)

    def biased(self, far: Part, bias: Tensor) -> Part:
        """`far` times exp(bias), bias (G,)."""
        factor = bias.exp()[:, None, None, None]
        return Part(far.numerator * factor, far.normaliser * factor)

    def bias(self, far: Part) -> Tensor:
        """Per kv head: the median over queries of log(exact far mass / the features' far mass)."""
        exact, ours = self.far.normaliser, far.normaliser
        ratio = torch.where((exact > 0) & (ours > 0), exact.log() - ours.log(), torch.nan)
        return ratio.transpose(0, 1).flatten(1).nanmedian(dim=1).values.nan_to_num()

    def squares(self, output: Tensor) -> Tensor:
        """(B, G, Q) squared length of outputs (B, G, R, Q, d_v), after the output projection if there is one."""
        return squared_lengths(output, self.output_gram)

    @functools.cached_property
    def target_squares(self) -> Tensor:
        """`squares` of the target, which every error is relative to."""
        return self.squares(self.target)

    def errors(self, far: Part, bias: Tensor, at: Sequence[Tensor]) -> Tensor:
        """(S, G) `error` over each of S sets of queries (B, Q); NaN where there are none."""
        return self._relative_errors(self.output(self.biased(far, bias)), at)

    def _relative_errors(self, output: Tensor, at: Sequence[Tensor]) -> Tensor:
        missed, size = self.squares(output - self.target), self.target_squares
        return torch.stack([(missed * x[:, None]).sum((0, 2)) / (size * x[:, None]).sum((0, 2)) for x in at])

    def error(self, far: Part, bias: Tensor) -> Tensor:
        """Per kv head: ‖output - exact output‖² / ‖exact output‖² over queries, the features times exp(bias)."""
        return self.errors(far, bias, [self.rows])[0]

    def biases(self, far: Part) -> list[Tensor]:
        """Biases to try, per kv head: zero, and `BIAS_OFFSETS` around the one that matches the far mass."""
        zero, matched = far.normaliser.new_zeros(far.normaliser.shape[1]), self.bias(far)
        return [zero, *(matched + offset for offset in BIAS_OFFSETS)]

    def least_error(self, far: Part) -> Tensor:
        """Per kv head, `error` at the best of `biases`, as calibration chooses it."""
        return torch.stack([self.error(far, bias) for bias in self.biases(far)]).nan_to_num(nan=torch.inf).amin(0)

    def errors_exact_part(self, at: Sequence[Tensor]) -> Tensor:
        """As `errors`, with no features at all."""
        return self.errors(self.far, self.far.normaliser.new_full((self.far.normaliser.shape[1],), -math.inf), at)

    def error_exact_part(self) -> Tensor:
        """Per kv head, as `error`, with no features at all."""
        return self.errors_exact_part([self.rows])[0]


class Probe(FarField):
    """One layer's queries, keys and values with their softmax attention, for comparison with feature maps.

    Args:
        query (B, H, L, d), key (B, G, L, d), value (B, G, L, d_v): as the attention function receives them.
        mask: padding mask (B, L) or None. scaling: the model's s.
        config: its window and sinks define the exact part.
        tokens: how many of each sequence are used, from its start; the cost is quadratic in them.
        dtype: float64 for estimators whose weights leave float32's range.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
        *, config: DarkConfig, tokens: int, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        keep, groups = slice(0, tokens), key.shape[1]
        self.real = real_tokens(mask, query)[:, keep]
        self.q = query[:, :, keep].unflatten(1, (groups, -1)).to(dtype) * scaling**0.5
        self.k, self.v = key[:, :, keep].to(dtype) * scaling**0.5, value[:, :, keep].to(dtype)
        self.position = (self.real.cumsum(1) - 1).clamp_min(0)
        self.offset = self.position[:, :, None] - self.position[:, None, :]
        self.seen = (self.offset >= 0) & self.real[:, None, :] & self.real[:, :, None]
        logits = (self.q @ self.k[:, :, None].mT).masked_fill(~self.seen[:, None, None], -torch.inf)
        self.top = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        self.weights = (logits - self.top).exp()
        self.rows = self.real
        self._splits: dict[tuple[int, int], tuple[Tensor, Part, Part]] = {}
        self.split(config)
        self.target = self.output(self.far)

    def split(self, config: DarkConfig) -> None:
        """Sets `exact` and `far` by the window and sinks of a configuration; divisions are cached."""
        form = (config.window, config.sinks)
        if form not in self._splits:
            exact = self.seen & ((self.offset < config.window) | (self.position < config.sinks)[:, None, :])
            far = (self.seen & ~exact)[:, None, None]
            parts = self._part(self.weights * exact[:, None, None]), self._part(self.weights * far)
            self._splits[form] = (far, *parts)
        self.far_mask, self.exact, self.far = self._splits[form]

    def _part(self, weights: Tensor) -> Part:
        return Part(weights @ self.v[:, :, None], weights.sum(-1, keepdim=True))

    def log_features(self, parameters: FeatureParameters) -> tuple[Tensor, Tensor]:
        """ℓ_q (B, G, R, L, m) and ℓ_k (B, G, L, m)."""
        heads, length = self.q.shape[2:4]
        lq = query_log_features(parameters, self.q.flatten(2, 3), self.position.repeat(1, heads))
        return lq.unflatten(2, (heads, length)), key_log_features(parameters, self.k, self.position)

    def mapped(self, parameters: FeatureParameters) -> tuple[Tensor, Tensor]:
        """Queries (B, G, R, L, d) and keys (B, G, L, d) as the features see them: centred, balanced, scaled."""
        query, key = affine(parameters)
        return query.mapped(self.q.transpose(1, 2)).transpose(1, 2), key.mapped(self.k)

    def expected_kernel(self, parameters: FeatureParameters) -> Tensor:
        """The limit of `kernels` as m grows, (B, G, R, L, L): the colder kernel at scales below 1."""
        query, key = self.mapped(parameters)
        logits = query @ key[:, :, None].mT
        of_query, of_key = (form.linear for form in affine(parameters))
        if of_key is not None:
            logits = logits + (self.k @ of_key[..., None]).mT[:, :, None]
        if of_query is not None:
            logits = logits + self.q @ of_query[:, None, :, None]
        if (b := parameters.query_center) is not None and (c := parameters.key_center) is not None:
            logits = logits - (b * c).sum(-1)[:, None, None, None]
        return (logits - self.top).clamp_max(80.0).exp()

    def features(self, parameters: FeatureParameters) -> Part:
        """The far part by the features of `parameters`."""
        (kernel,) = self.kernels(parameters, (parameters.config.num_features,))
        return self.far_part(kernel)

    def far_part(self, kernel: Tensor) -> Part:
        """The far part of a kernel from `kernels`."""
        return self._part(kernel * self.far_mask)

    def kernels(self, parameters: FeatureParameters, counts: Sequence[int]) -> Iterator[Tensor]:
        """Estimated weights (B, G, R, L, L) by the first `counts` (ascending) features, on the exact ones' scale."""
        lq, lk = self.log_features(parameters)
        high_q, high_k = lq.amax(-1, keepdim=True), lk.amax((-2, -1), keepdim=True)[:, :, None]
        query, key = (lq - high_q).exp(), (lk[:, :, None] - high_k).exp()
        factor = (high_q + high_k - self.top).clamp_max(80.0).exp()
        kernel = query[..., : counts[0]] @ key[..., : counts[0]].mT
        yield kernel * (factor * (parameters.config.num_features / counts[0]))
        for start, count in itertools.pairwise(counts):
            kernel += query[..., start:count] @ key[..., start:count].mT
            yield kernel * (factor * (parameters.config.num_features / count))


def spread_queries(real: Tensor, first: int, count: int) -> Tensor:
    """(B, Q) indices of about `count` tokens a row, spread over its real tokens (B, L): all L where L ≤ count.

    Half of them are spaced evenly and half logarithmically, from the row's token number `first` to its last one. Long
    contexts dominate a mean over them, as they do a loss, and every part of the context is represented. Rows of few
    real tokens repeat some of theirs.
    """
    batch, length = real.shape
    if length <= count:
        return torch.arange(length, device=real.device).expand(batch, -1)
    tokens = real.sum(1, keepdim=True)
    last = (tokens - 1).clamp_min(0).double()
    start = last.clamp_max(first)
    even = start + (last - start) * torch.linspace(0, 1, count - count // 2, device=real.device).double()
    ratio = torch.linspace(0, 1, count // 2, device=real.device).double()
    logarithmic = (start + 1) * ((last + 1) / (start + 1)) ** ratio - 1
    number = torch.cat([even, logarithmic], 1).round().long().sort(1).values
    in_order = torch.argsort((~real).int(), dim=1, stable=True)  # real tokens first
    return in_order.gather(1, number)


class SpreadProbe(FarField):
    """A few queries of each row, spread over its whole context, against all the keys before them.

    Memory is linear in L: weights are computed for a few queries at a time, and only their sums over the keys are kept.

    Args:
        query, key, value, mask, scaling, config: see `Probe`.
        queries: how many a row.
        output_gram: see `FarField`.
    """

    #: Elements of the largest tensor of weights, over all heads and rows.
    WEIGHTS = 1 << 23

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
        *, config: DarkConfig, queries: int, output_gram: Tensor | None = None,
    ) -> None:  # fmt: skip
        groups, length = key.shape[1:3]
        self.config, self.output_gram, self.heads = config, output_gram, query.shape[1] // groups
        self.real = real_tokens(mask, query)
        self.position = (self.real.cumsum(1) - 1).clamp_min(0)
        self.index = spread_queries(self.real, config.window + config.sinks, queries)
        self.rows = self.real.gather(1, self.index)
        grouped = query.unflatten(1, (groups, -1))
        where = self.index[:, None, None, :, None].expand(-1, *grouped.shape[1:3], -1, grouped.shape[-1])
        self.q = grouped.gather(3, where).float() * scaling**0.5
        self.k, self.v = key.float() * scaling**0.5, value.float()
        chunk = max(1, self.WEIGHTS // (query.shape[0] * query.shape[1] * length))
        self.chunks = [slice(start, start + chunk) for start in range(0, self.index.shape[1], chunk)]
        tops, exact, far = zip(*map(self._softmax, self.chunks), strict=True)
        self.top, self.exact, self.far = torch.cat(tops, 3), _joined(exact), _joined(far)
        self.target = self.output(self.far)

    def _split(self, chunk: slice, window: int | None = None) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, Q, L) which keys the chunk's queries see exactly, and which through features."""
        window = self.config.window if window is None else window
        at = self.index[:, chunk]
        offset = self.position.gather(1, at)[:, :, None] - self.position[:, None, :]
        seen = (offset >= 0) & self.real[:, None, :] & self.real.gather(1, at)[:, :, None]
        exact = seen & ((offset < window) | (self.position < self.config.sinks)[:, None, :])
        return exact[:, None, None], (seen & ~exact)[:, None, None]

    def errors_of_window(self, window: int, at: Sequence[Tensor]) -> Tensor:
        """As `errors_exact_part`, (S, G), with another window."""
        parts = []
        for chunk in self.chunks:
            exact, _ = self._split(chunk, window)
            logits = self._against_keys(self.q[:, :, :, chunk], self.k).sub_(self.top[:, :, :, chunk])
            parts.append(self._part(logits.masked_fill_(~exact, -torch.inf).exp_()))
        part = _joined(parts)
        output = part.numerator / part.normaliser.clamp_min(1e-30) * self.rows[:, None, None, :, None]
        return self._relative_errors(output, at)

    def _against_keys(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries (B, G, R, Q, n) times keys (B, G, L, n): (B, G, R, Q, L), without copies of the keys."""
        return (queries.flatten(2, 3) @ keys.mT).unflatten(2, (self.heads, -1))

    def _part(self, weights: Tensor) -> Part:
        numerator = (weights.flatten(2, 3) @ self.v).unflatten(2, (self.heads, -1))
        return Part(numerator, weights.sum(-1, keepdim=True))

    def _softmax(self, chunk: slice) -> tuple[Tensor, Part, Part]:
        exact, far = self._split(chunk)
        logits = self._against_keys(self.q[:, :, :, chunk], self.k).masked_fill_(~(exact | far), -torch.inf)
        top = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = logits.sub_(top).exp_()
        return top, self._part(weights * exact), self._part(weights * far)

    def features(self, parameters: FeatureParameters) -> Part:
        """The far part by the features of `parameters`."""
        place = self.position.gather(1, self.index).repeat(1, self.heads)
        lq = query_log_features(parameters, self.q.flatten(2, 3), place).unflatten(2, (self.heads, -1))
        lk = key_log_features(parameters, self.k, self.position)
        high_q, high_k = lq.amax(-1, keepdim=True), lk.amax((-2, -1), keepdim=True)
        query, key = (lq - high_q).exp(), (lk - high_k).exp()
        factor = (high_q + high_k[:, :, None] - self.top).clamp_max(80.0).exp()

        def part(chunk: slice) -> Part:
            kernel = self._against_keys(query[:, :, :, chunk], key)
            return self._part(kernel.mul_(factor[:, :, :, chunk]).mul_(self._split(chunk)[1]))

        return _joined([part(chunk) for chunk in self.chunks])


def _joined(parts: Sequence[Part]) -> Part:
    """Parts of consecutive queries as one."""
    return Part(*(torch.cat(tensors, 3) for tensors in zip(*parts, strict=True)))
