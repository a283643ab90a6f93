"""Figure 3: long finetuning, the x axis logarithmic. Does DARK stay above Performer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import accuracy_panel, score_table
from .figure2 import PRETRAIN_RATES
from .panels import draw_panels
from .plan import Experiment

FIGURES = ("3",)
QUESTION = "Does DARK stay ahead of Performer in a long finetuning?"
THREE = ("exact", "dark", "performer")

GROWN = Experiment(
    "3", "grown", (*THREE, "ours"), 2000, PRETRAIN_RATES, grid_steps=60, points=12, spacing="log", mechanism=True
)
SMOLLM2 = Experiment(
    "3", "smollm2", THREE, 600, (), rates_of="2-bottom.smollm2", points=8, spacing="log", mechanism=True
)
FULL = Experiment("3", "gemma", THREE, 20_000, (), rates_of="2-bottom.gemma", points=24, spacing="log", mechanism=True)


def draw(lines: Sequence[Mapping[str, Any]], plots: Path) -> list[Path]:
    """One panel a base, against the logarithm of the step."""
    bases = dict.fromkeys(line["base"] for line in lines)
    return [draw_panels([accuracy_panel(lines, base, log_x=True) for base in bases], plots / "figure3.png")]


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row a base and method."""
    return score_table(lines)
