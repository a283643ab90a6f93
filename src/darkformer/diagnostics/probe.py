"""Quadratic attention of one layer on a few tokens: the exact parts, and the features' part for any feature map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DarkConfig
from ..features.log_features import FeatureParameters, key_log_features, query_log_features

#: Offsets tried around the bias that matches the far mass; a noisy head is better off with less of its features.
BIAS_OFFSETS = (0.0, -0.5, -1.0, -2.0, -4.0, -8.0)


class Part(NamedTuple):
    """One part of attention: Σ w·v (B, G, R, L, d_v) and Σ w (B, G, R, L, 1), on the exact weights' scale."""

    numerator: Tensor
    normaliser: Tensor


def real_tokens(mask: Tensor | None, query: Tensor) -> Tensor:
    """(B, L) which tokens are real, from a padding mask (B, ≥ L) or None and the queries (B, H, L, d)."""
    shape = (query.shape[0], query.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device) if mask is None else mask[:, -shape[1] :].bool()


class Probe:
    """One layer's queries, keys and values with softmax's answer, against which feature maps are held.

    Args:
        query (B, H, L, d), key (B, G, L, d), value (B, G, L, d_v): as the attention function receives them.
        mask: padding mask (B, L) or None. scaling: the model's s.
        config: its window and sinks say what is exact.
        tokens: only the first ones of each sequence are looked at; the cost is quadratic.
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
        self.rows = self.real[:, None, None, :, None]
        self._splits: dict[tuple[int, int], tuple[Tensor, Part, Part]] = {}
        self.split(config)
        self.target = self.output(self.far)

    def split(self, config: DarkConfig) -> None:
        """Another division into the exact part and the far one; what was made once is kept."""
        form = (config.window, config.sinks)
        if form not in self._splits:
            near = self.seen & ((self.offset < config.window) | (self.position < config.sinks)[:, None, :])
            far = (self.seen & ~near)[:, None, None]
            self._splits[form] = (far, self._part(self.weights * near[:, None, None]), self._part(self.weights * far))
        self.far_mask, self.near, self.far = self._splits[form]

    def _part(self, weights: Tensor) -> Part:
        return Part(weights @ self.v[:, :, None], weights.sum(-1, keepdim=True))

    def output(self, far: Part) -> Tensor:
        """(B, G, R, L, d_v) with `far` as the far part."""
        normaliser = (self.near.normaliser + far.normaliser).clamp_min(1e-30)
        return (self.near.numerator + far.numerator) / normaliser * self.rows

    def share(self, far: Part) -> Tensor:
        """(B, G, R, L, 1) share of `far` in the normaliser."""
        return far.normaliser / (self.near.normaliser + far.normaliser).clamp_min(1e-30)

    def biased(self, far: Part, bias: Tensor) -> Part:
        """`far` times exp(bias), bias (G,)."""
        factor = bias.exp()[:, None, None, None]
        return Part(far.numerator * factor, far.normaliser * factor)

    def log_features(self, parameters: FeatureParameters) -> tuple[Tensor, Tensor]:
        """ℓ_q (B, G, R, L, m) and ℓ_k (B, G, L, m)."""
        heads, length = self.q.shape[2:4]
        lq = query_log_features(parameters, self.q.flatten(2, 3), self.position.repeat(1, heads))
        return lq.unflatten(2, (heads, length)), key_log_features(parameters, self.k, self.position)

    def mapped(self, parameters: FeatureParameters) -> tuple[Tensor, Tensor]:
        """Queries (B, G, R, L, d) and keys (B, G, L, d) as the features see them: centred, balanced, scaled."""
        p, query, key = parameters, self.q, self.k
        if p.query_center is not None and p.key_center is not None:
            query, key = query - p.query_center[:, None, None], key - p.key_center[:, None]
        if p.query_map is not None and p.key_map is not None:
            query, key = query @ p.query_map[:, None].mT, key @ p.key_map.mT
        return query, key

    def expected_kernel(self, parameters: FeatureParameters) -> Tensor:
        """What `kernels` tends to as m grows, (B, G, R, L, L): the colder kernel at scales below 1."""
        query, key = self.mapped(parameters)
        logits = query @ key[:, :, None].mT
        b, c = parameters.query_center, parameters.key_center
        if b is not None and c is not None:
            constant = (b * c).sum(-1)[:, None, None, None]
            logits = logits + (self.k @ b[..., None]).mT[:, :, None] + self.q @ c[:, None, :, None] - constant
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
        shift = (high_q + high_k - self.top).clamp_max(80.0).exp()
        kernel = query[..., : counts[0]] @ key[..., : counts[0]].mT
        yield kernel * (shift * (parameters.config.num_features / counts[0]))
        for start, count in itertools.pairwise(counts):
            kernel += query[..., start:count] @ key[..., start:count].mT
            yield kernel * (shift * (parameters.config.num_features / count))

    def bias(self, far: Part) -> Tensor:
        """Per kv head: the median over queries of log(exact far mass / the features' far mass)."""
        exact, ours = self.far.normaliser, far.normaliser
        ratio = torch.where((exact > 0) & (ours > 0), exact.log() - ours.log(), torch.nan)
        return ratio.transpose(0, 1).flatten(1).nanmedian(dim=1).values.nan_to_num()

    def error(self, far: Part, bias: Tensor) -> Tensor:
        """Per kv head: ‖output - exact output‖² / ‖exact output‖² over real tokens, the features times exp(bias)."""
        output = self.output(self.biased(far, bias))
        return (output - self.target).square().sum((0, 2, 3, 4)) / self.target.square().sum((0, 2, 3, 4))

    def biases(self, far: Part) -> list[Tensor]:
        """Biases worth trying, per kv head: none, and `BIAS_OFFSETS` around the one that matches the far mass."""
        none = far.normaliser.new_zeros(self.k.shape[1])
        matched = self.bias(far)
        return [none, *(matched + offset for offset in BIAS_OFFSETS)]

    def least_error(self, far: Part) -> Tensor:
        """Per kv head, `error` at the best of `biases`, as calibration chooses it."""
        return torch.stack([self.error(far, bias) for bias in self.biases(far)]).nan_to_num(nan=torch.inf).amin(0)

    def error_exact_part(self) -> Tensor:
        """Per kv head, as `error`, with no features at all."""
        return self.error(self.far, self.far.normaliser.new_full((self.k.shape[1],), -math.inf))
