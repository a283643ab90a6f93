"""Figure 2: next-token accuracy of the six methods, trained from scratch (top) and from pretrained weights (bottom)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import accuracy_panel, score_table
from .panels import draw_panels
from .plan import METHODS, Experiment

FIGURES = ("2-top", "2-bottom")
QUESTION = "Does DARK close the gap between Performer and softmax, from scratch and from pretrained weights?"
EVERY = tuple(METHODS)
PRETRAIN_RATES, FINETUNE_RATES = (3e-4, 1e-3, 3e-3), (5e-5, 2.5e-4, 1.25e-3)

TOP = Experiment("2-top", "small", EVERY, 1000, PRETRAIN_RATES, grid_steps=100, points=8, mechanism=True)
BOTTOM = Experiment(
    "2-bottom", "smollm2", EVERY, 80, FINETUNE_RATES, grid_steps=16, seeds=(0, 1), points=4, mechanism=True
)
BOTTOM_GEMMA = Experiment(
    "2-bottom", "gemma3", ("exact", "dark", "performer"), 60, FINETUNE_RATES, grid_steps=12, points=3, mechanism=True
)
FULL_TOP = Experiment("2-top", "scratch", EVERY, 10_000, (1e-4, 3e-4, 1e-3), grid_steps=500, points=20, mechanism=True)
FULL_BOTTOM = Experiment(
    "2-bottom", "gemma", EVERY, 2000, (5e-6, 2e-5, 8e-5), grid_steps=200, seeds=(0, 1), points=20, mechanism=True
)


def draw(lines: Sequence[Mapping[str, Any]], plots: Path) -> list[Path]:
    """One panel a base."""
    figure = lines[0]["figure"]
    bases = dict.fromkeys(line["base"] for line in lines)
    return [draw_panels([accuracy_panel(lines, base) for base in bases], plots / f"figure{figure}.png")]


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row a base and method."""
    return score_table(lines)
