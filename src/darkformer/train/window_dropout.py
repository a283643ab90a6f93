"""Narrower windows while a model trains, so that it cannot hide behind its exact part."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import ConfigError
from ..features.feature_map import FeatureMap
from ..hf.layers import dark_layers

#: The narrowest window that is drawn.
NARROWEST = 16


def drawn_window(window: int, seed: int, step: int) -> int:
    """A window of `NARROWEST` to `window` keys, uniform in its logarithm; nothing but (seed, step) enters.

    >>> drawn_window(8, 0, 1)
    8
    """
    if window <= NARROWEST:
        return window
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    share = float(torch.rand((), generator=generator))
    return round(math.exp(math.log(NARROWEST) + share * math.log(window / NARROWEST)))


class WindowDropout(TrainerCallback):
    """Draws the window of each optimizer step, the same for all layers with features, until `share` of the steps.

    Between steps, and so in checkpoints and evaluations, every layer has its own window. Hybrids that are trained with
    their window in place learn to do without the rest (arXiv 2510.05901).

    Raises:
        ConfigError: `share` is not above 0 and at most 1.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"window_dropout={share!r}: must be above 0 and at most 1.")
        self.share, self.seed = share, seed
        self.own: list[tuple[FeatureMap, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is None or state.global_step >= self.share * state.max_steps:
            return
        self.own = [(fm, fm.config.window) for fm in dark_layers(model) if fm.config.feature_count]
        for fm, window in self.own:
            fm.config = replace(fm.config, window=drawn_window(window, self.seed, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for fm, window in self.own:
            fm.config = replace(fm.config, window=window)
        self.own = []

    on_train_end = on_step_end
