"""Errors of a head's attention output predicted from its queries and keys, without drawing any feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calibration.probe import Probe
from ..features.affine import FeatureParameters
from .colder import best_scale, colder_error
from .noise import Draws, OutputNoise, output_noise, sample_draws, typical_noise


class Predictor:
    """Predictions at a few queries of a probe's first sequence, for the centred and balanced features.

    Args:
        queries: how many a query head, evenly spaced over the sequence. draws: samples for every integral.
    """

    def __init__(self, probe: Probe, *, queries: int, draws: int, seed: int) -> None:
        self.probe, self.draws = probe, draws
        self.length = int(probe.real[0].sum())
        first = min(8, self.length - 1)
        self.positions = torch.linspace(first, self.length - 1, min(queries, self.length)).long()
        self.generator = torch.Generator().manual_seed(seed)

    def _sampled(self, parameters: FeatureParameters, at: Tensor) -> list[list[Draws]]:
        """For every kv head and query head of its group, seen from the queries `at`, which all have far keys."""
        query, key = (x[0] for x in self.probe.mapped(parameters))
        assert parameters.query_center is not None
        far, keep = self.probe.far_mask[0, 0, 0, at, : self.length], slice(0, self.length)
        return [
            [
                sample_draws(
                    query[g, r, at], key[g, keep], self.probe.v[0, g, keep],
                    self.probe.k[0, g, keep] @ parameters.query_center[g], far,
                    draws=self.draws, generator=self.generator,
                )
                for r in range(query.shape[1])
            ]
            for g in range(query.shape[0])
        ]  # fmt: skip

    def noise(self, parameters: FeatureParameters) -> list[tuple[list[OutputNoise], Tensor]]:
        """Per kv head: first-order noise of every query head, divergences (R·T,); features do all of attention."""
        exact = self.probe.target[0][:, :, self.positions]
        return [
            (
                [output_noise(draws, exact[g, r]) for r, draws in enumerate(sampled)],
                torch.cat([draws.divergence for draws in sampled]),
            )
            for g, sampled in enumerate(self._sampled(parameters, self.positions))
        ]

    @torch.no_grad()
    def errors(self, parameters: FeatureParameters, counts: Sequence[int], *, biased: bool) -> Tensor:
        """Predicted relative errors (len(counts), G) with m in `counts` features, in the probe's present split.

        Bias of the kernel (exactly, on this sequence) plus typical noise; `biased`: the least over the log-biases
        that calibration tries. The kernel's scale is in the parameters.
        """
        far = self.probe.far_part(self.probe.expected_kernel(parameters))
        none = far.normaliser.new_zeros(far.normaliser.shape[1])
        # Rows without far keys are exact: neither bias nor noise.
        at = self.positions[self.probe.far_mask[0, 0, 0, self.positions].any(-1)]
        target = self.probe.target[0][:, :, at]
        sampled = self._sampled(parameters, at) if len(at) else []
        totals = []
        for bias in self.probe.biases(far) if biased else [none]:
            part = self.probe.biased(far, bias)
            expected, share = self.probe.output(part)[0][:, :, at], self.probe.share(part)[0][:, :, at, 0]
            square = (expected - target).square().sum((1, 2, 3)).expand(len(counts), -1).clone()
            for g, heads in enumerate(sampled):
                for r, draws in enumerate(heads):
                    square[:, g] += typical_noise(draws, expected[g, r], share[g, r], counts).sum(-1)
            totals.append(square)
        scale = self.probe.target[0][:, :, self.positions].square().sum((1, 2, 3))
        return (torch.stack(totals).amin(0) / scale).sqrt()

    def moment_scale(self, parameters: FeatureParameters, scales: Sequence[float], num_features: int) -> list[float]:
        """Per kv head the best scale of features alone by `colder.colder_error`: Gaussian keys, values unknown."""
        query, key = self.probe.mapped(parameters)
        chosen = []
        for g in range(query.shape[1]):
            keys = key[0, g, : self.length]
            found = colder_error(
                query[0, g][:, self.positions].flatten(0, 1), torch.cov(keys.mT), scales, num_keys=self.length
            )
            chosen.append(best_scale(found, scales, num_features))
        return chosen
