"""Streaming first and second moments of queries and keys, and what follows from them in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..features.feature_map import FeatureMap
from ..features.proposals import PairMoments, inadmissible, pair_moments, proposal_covariance, shared_covariance
from ..features.transforms import balance


def tokens_needed(dim: int) -> int:
    """The fewest tokens from which a covariance of this dimension is taken."""
    return 2 * dim


class Moments:
    """Streaming first and second moments of a layer's scaled queries and keys, in float64."""

    def __init__(self, groups: int, dim: int) -> None:
        self.count = {"query": 0, "key": 0}
        self.total = {side: torch.zeros(groups, dim, dtype=torch.float64) for side in self.count}
        self.square = {side: torch.zeros(groups, dim, dim, dtype=torch.float64) for side in self.count}

    def add(self, side: str, x: Tensor, keep: Tensor) -> None:
        """Adds x (B, G, …, L, d) at the tokens keep (B, L)."""
        rows = head_rows(x, keep).double().cpu()
        self.count[side] += rows.shape[1]
        self.total[side] += rows.sum(1)
        self.square[side] += rows.mT @ rows

    def add_layer(self, query: Tensor, key: Tensor, scaling: float, real: Tensor, sinks: int) -> None:
        """Adds one call's queries (B, H, L, d) and keys (B, G, L, d), times √scaling, at the real tokens (B, L).

        The first `sinks` keys of a row are left out: they stay exact, and they are outliers.
        """
        self.add("query", query.unflatten(1, (key.shape[1], -1)) * scaling**0.5, real)
        self.add("key", key * scaling**0.5, real & (real.cumsum(1) > sinks))

    def mean(self, side: str) -> Tensor:
        """(G, d)."""
        return self.total[side] / self.count[side]

    def covariance(self, side: str, centered: bool) -> Tensor:
        """(G, d, d): the covariance, or the second moment about zero."""
        second = self.square[side] / self.count[side]
        mean = self.mean(side)
        return second - mean[:, :, None] * mean[:, None, :] if centered else second

    def check(self, purpose: str) -> None:
        """Raises InputError if there are fewer tokens than a covariance needs."""
        dim = self.total["key"].shape[1]
        needed = tokens_needed(dim)
        if self.count["key"] < needed:
            raise InputError(
                f"{purpose} saw {self.count['key']} tokens per head, a covariance of dimension {dim} "
                f"needs {needed} at the least: give longer or more batches."
            )


def head_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Vectors of x (B, G, [R,] L, d) at the tokens keep (B, L), per head: (G, N, d)."""
    if x.dim() == 5:
        keep = keep[:, None].expand(-1, x.shape[2], -1)
    return x.movedim(1, 0).flatten(1, -2)[:, keep.flatten()]


@torch.no_grad()
def set_transforms(fm: FeatureMap, moments: Moments) -> None:
    """Sets the centres and the balance of `fm` that its configuration has, from `moments`.

    Raises:
        InputError: too few tokens, or a head without any variance.
    """
    moments.check("calibration")
    if fm.query_center is not None and fm.key_center is not None:
        fm.set_("query_center", moments.mean("query"))
        fm.set_("key_center", moments.mean("key"))
    if fm.query_balance is not None and fm.key_balance is not None:
        centered = fm.query_center is not None
        pair = balance(moments.covariance("query", centered), moments.covariance("key", centered))
        fm.set_("query_balance", pair.query)
        fm.set_("key_balance", pair.key)


def feature_moments(fm: FeatureMap, moments: Moments) -> PairMoments:
    """Moments of queries and keys as the features see them at scale 1 (M = I): centred, balanced."""
    sides = []
    for side, center, balanced in (
        ("query", fm.query_center, fm.learned("query_balance")),
        ("key", fm.key_center, fm.learned("key_balance")),
    ):
        mean, second = moments.mean(side), moments.covariance(side, center is not None)
        if center is not None:
            mean = torch.zeros_like(mean)
        if balanced is not None:
            linear = balanced.detach().double().cpu()
            mean, second = (linear @ mean[..., None])[..., 0], linear @ second @ linear.mT
        sides.append((second, mean))
    (query, query_mean), (key, key_mean) = sides
    return pair_moments(query, key, query_mean, key_mean)


class HeadProposals:
    """Sets one layer's proposal for any scale of its heads."""

    def __init__(self, fm: FeatureMap, moments: Moments) -> None:
        self.fm, self.moments = fm, feature_moments(fm, moments)

    def _inadmissible(self, scale: Tensor) -> list[list[float]]:
        """Per head, the eigenvalues at scale (G,) that Theorem 3.2 does not admit; none for other proposals."""
        if self.fm.config.proposal != "theorem32":
            return [[] for _ in range(self.fm.num_kv_heads)]
        scaled = self.moments.scaled(scale)
        return inadmissible(shared_covariance(scaled.query, scaled.key))

    def exists(self, scale: Tensor) -> Tensor:
        """(G,) bool, for scale (G,)."""
        return torch.tensor([not eigenvalues for eigenvalues in self._inadmissible(scale)])

    def set_(self, scale: Tensor) -> None:
        """Sets the proposal at scale (G,), isotropic where it does not exist."""
        shrunk = torch.where(self.exists(scale), scale, 0.0)  # every proposal of zero moments is the identity
        self.fm.propose_(proposal_covariance(self.fm.config.proposal, self.moments.scaled(shrunk)))

    def check(self, coldest: float) -> None:
        """Raises ConfigError for heads without a proposal even at the coldest scale that may be chosen."""
        eigenvalues = self._inadmissible(torch.full((self.fm.num_kv_heads,), coldest))
        if any(eigenvalues):
            listed = "; ".join(
                f"head {g}: {', '.join(f'{v:.3g}' for v in row[::-1])}" for g, row in enumerate(eigenvalues) if row
            )
            raise ConfigError(
                f"layer {self.fm.layer}: proposal='theorem32' needs every eigenvalue of Λ below 1/2; "
                f"at scale {coldest} these are not: {listed}. "
                "proposal='optimal' exists for every Λ; cold_start=True and balance=True help."
            )
