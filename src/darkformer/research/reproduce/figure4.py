"""Figure 4: only the projections of queries, keys and values and what conversion added are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .curves import accuracy_panel, score_table
from .figure2 import BOTTOM, FULL_BOTTOM
from .panels import draw_panels

FIGURES = ("4",)
QUESTION = "Is DARK's advantage larger when only q, k, v and M learn?"

SMOLLM2 = replace(BOTTOM, figure="4", train="qkv")
FULL = replace(FULL_BOTTOM, figure="4", train="qkv")


def draw(lines: Sequence[Mapping[str, Any]], plots: Path) -> list[Path]:
    """One panel a base."""
    bases = dict.fromkeys(line["base"] for line in lines)
    return [draw_panels([accuracy_panel(lines, base) for base in bases], plots / "figure4.png")]


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row a base and method."""
    return score_table(lines)
