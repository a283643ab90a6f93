"""What `darkformer plan` is asked for. Imports no transformers: the command line reads it before any verb runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...config import USUAL_BUDGET, TrainConfig, field_help, option
from ...errors import ConfigError

#: The verb's argument that stands for a calibration in place of a model.
CALIBRATE = "calibrate"
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKMG]?)")


def count(text: str, name: str, kilo: int, least: int = 1) -> int:
    """A number of tokens such as 8192, 8k or 2M.

    Args:
        name: of the option, for the message. kilo: what a k stands for. least: the smallest one.

    Raises:
        ConfigError: it is none, or smaller.

    >>> count("8k", "--context", 1024), count("1.5M", "--tokens", 1000)
    (8192, 1500000)
    """
    match = _COUNT.fullmatch(text.strip().replace(",", ""))
    number = round(float(match[1]) * kilo ** " KMG".index(match[2].upper() or " ")) if match else -1
    if number < least:
        raise ConfigError(f"{name} {text}: give a number of tokens from {least} on, such as 8192, 8k or 2M.")
    return number


@dataclass(frozen=True)
class PlanTask:
    """A run of `linearize` that is planned.

    Raises:
        ConfigError: a count that is none, or hours below zero.
    """

    context: str = option("2k", "Tokens of a sequence, in training as in calibration; 8k is 8,192.")
    tokens: str = option("100k", "Tokens to train on; 2M is two million. 0 calibrates and stops.")
    budget: str = option(
        USUAL_BUDGET,
        "Bytes one sequence may keep, as `linearize --budget`: 10%, 64MB, 0; none: one window everywhere; usual: 10% "
        "where that is possible, and none beside --method, --window or --keep-exact.",
    )
    hours: float = option(0.0, "Says how many tokens fit into so many hours; 0 does not.")
    transfer_steps: int = option(0, field_help(TrainConfig, "transfer_steps"), minimum=0)
    dtype: str = option("auto", field_help(TrainConfig, "dtype"))

    def __post_init__(self) -> None:
        count(self.context, "--context", 1024, least=2)
        if not 0 <= self.hours < float("inf"):
            raise ConfigError(f"--hours {self.hours:g}: give a number of hours above 0, or 0 for none.")
        count(self.tokens, "--tokens", 1000, least=0)
        TrainConfig(dtype=self.dtype)  # checks it

    @property
    def sequence(self) -> int:
        """Tokens of a sequence."""
        return count(self.context, "--context", 1024)

    @property
    def steps(self) -> int:
        """Optimizer steps of one sequence each."""
        return -(-count(self.tokens, "--tokens", 1000, least=0) // self.sequence)

    @property
    def precision(self) -> str:
        """`dtype`, with `auto` settled."""
        return TrainConfig(dtype=self.dtype).dtype
