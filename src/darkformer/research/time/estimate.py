"""What a run of `linearize` takes on this machine, stage by stage, before anything of it runs."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from ...calibration.budget import (
    CONSTANT_WINDOW,
    USUAL_LENGTH,
    WINDOWS,
    Budget,
    check_budget_config,
    counts_features,
    settled,
    too_small,
)
from ...calibration.calibrate import SEARCH_QUERIES
from ...calibration.probe import SCALES
from ...calibration.sensitivity import EVERY_ROW_FROM, ROUNDS, ROWS_A_ROUND
from ...config import EVALUATION_TOKENS, NO_BUDGET, DarkConfig, TrainConfig
from ...cost import kv_cache_bytes, layer_bytes, memory_bytes
from ...errors import ConfigError, InputError
from ...train.linearize import CALIBRATION_TOKENS, CHOICE_TOKENS
from ...train.transfer import CHECKS
from .calibration import Calibration
from .copies import (
    BACKWARD,
    OPTIMIZER,
    PRODUCT,
    SOFTMAX,
    Operation,
    attention,
    forward_operations,
    step_operations,
    totals,
    training_bytes,
)
from .fit import CONSTANT, predicted
from .settings import PlanTask
from .shape import Shape

#: Prompts of recall that heads are chosen on beside the text; rows of text of which a choice takes first-order losses.
PROMPTS, CHANGE_ROWS = 4, 2
#: Candidates that a budget's windows are compared by: a middle one, its neighbours, and one with windows by layer.
CANDIDATES = 4
#: What heads compute that are not exact while heads and windows are chosen.
WINDOWS_ALONE = DarkConfig(method="local", window=CONSTANT_WINDOW)
#: Contexts between which the crossover with softmax is looked for.
SHORTEST, LONGEST = 64, 2**20
#: Rows of the last batch of a calibration, on which scales and biases are searched; how often a weight of the search
#: is written and read.
SEARCH_ROWS, SEARCH_COPIES = 2, 6


class Stage(NamedTuple):
    """One stage of `linearize`, under the title that its progress has."""

    title: str
    seconds: float
    detail: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A planned run.

    Attributes:
        config: what it would be converted to; with a budget its heads are placeholders, as many as fit.
        stages: in order. step, softmax_step: seconds of an optimizer step converted, and as softmax.
        memory: bytes that training holds at its peak. available: those of the machine; None where it does not say.
        crossover: tokens of a sequence from which a converted step is faster; None: not up to `LONGEST`.
        fitting: tokens that fit into the task's hours; None where the task has none.
        notes: what else there is to say.
    """

    task: PlanTask
    shape: Shape
    config: DarkConfig
    stages: tuple[Stage, ...]
    step: float
    softmax_step: float
    memory: float
    available: int | None
    crossover: int | None
    fitting: int | None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(stage.seconds for stage in self.stages)


def budget_config(
    shape: Shape, config: DarkConfig, text: str, length: int, dtype: str, *, count_features: bool = True
) -> DarkConfig:
    """A configuration that keeps what a budget allows: windows of 256 or, where those do not fit, narrower ones, and as
    many exact heads as fit beside them.

    `linearize` chooses by measuring the model; what its choice costs differs little, as heads and windows trade bytes
    for bytes. Which heads they are does not matter for the cost, so they are spread over the layers.

    Args:
        count_features: every head has features; False: none, as few pay in a budget.

    Raises:
        ConfigError: no budget, or one that the smallest windows exceed.
    """
    budget = Budget.parse(text, length)
    element_bytes = 2 if dtype == "bfloat16" else 4
    sizes: dict[str, Any] = dict(num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=element_bytes)
    layers = [i for i in range(shape.layers) if i not in shape.sliding]
    names = [f"{layer}.{head}" for head in range(shape.kv_heads) for layer in layers]
    # Layers that stay as they are keep the keys of their window, whatever is chosen.
    others = shape.layers - len(layers)
    rest = others * kv_cache_bytes(min(length, shape.sliding_window or length), **sizes)
    softmax = len(layers) * kv_cache_bytes(length, **sizes) + rest
    dropped = config.no_features if count_features else tuple(layers)
    base = dataclasses.replace(config, window=CONSTANT_WINDOW, no_features=dropped)
    if budget.constant:
        return base

    def kept(candidate: DarkConfig) -> int:
        return sum(layer_bytes(candidate, layer, length, **sizes) for layer in layers) + rest

    def candidate(window: int, count: int) -> DarkConfig:
        return dataclasses.replace(base, window=window, keep_exact=tuple(names[:count]))

    size = budget.bytes_of(softmax)
    if size >= softmax:
        return dataclasses.replace(config, method="exact")
    windows = [window for window in WINDOWS if window <= CONSTANT_WINDOW and kept(candidate(window, 0)) <= size]
    if not windows:
        least = candidate(min(WINDOWS), 0)
        raise too_small(budget, least, kept(least), softmax, count_features)
    at = lambda count: kept(candidate(windows[-1], count))  # noqa: E731
    return candidate(windows[-1], bisect.bisect_right(range(len(names) + 1), size, key=at) - 1)


class _Clock:
    """Seconds of parts of a run on one machine, for sequences of one length."""

    def __init__(self, calibration: Calibration, shape: Shape, seq_len: int, dtype: str) -> None:
        self.calibration, self.shape, self.seq_len, self.dtype = calibration, shape, seq_len, dtype
        self.autocast = dtype == "bfloat16"

    def step(self, config: DarkConfig | None) -> float:
        """An optimizer step."""
        rows = step_operations(self.shape, 1, self.seq_len, config, autocast=self.autocast)
        return self.calibration.seconds(self.dtype, totals(rows))

    def forward(self, config: DarkConfig | None) -> float:
        """A forward pass with its loss."""
        rows = forward_operations(self.shape, 1, self.seq_len, config, autocast=self.autocast)
        return self.calibration.forward_seconds(self.dtype, totals(rows))

    def observed(self, dtype: str) -> float:
        """A forward pass of the softmax model for what its layers see, without logits."""
        rows = forward_operations(self.shape, 1, self.seq_len, autocast=dtype == "bfloat16", logits=False)
        return self.calibration.forward_seconds(dtype, totals(rows))

    def slopes(self, exact: float) -> float:
        """A forward and a backward pass, no gradients of weights: windows in every head, softmax in a share `exact`."""
        rows = step_operations(self.shape, 1, self.seq_len, autocast=self.autocast)

        def share(row: Operation) -> float:
            if row.kind == SOFTMAX:
                return exact
            # Of a product's backward pass only dx is needed, half of its work.
            return 0.5 if row.kind == PRODUCT and row.phase == BACKWARD else 1.0

        rows = [row.times(share(row)) for row in rows if row.phase != OPTIMIZER]
        return self.calibration.seconds(self.dtype, totals(rows + self.attentions(WINDOWS_ALONE)))

    def attentions(self, config: DarkConfig) -> list[Operation]:
        """Attention of every layer, both directions."""
        layers = range(self.shape.layers)
        return [row for layer in layers for row in attention(self.shape, 1, self.seq_len, config, layer)]

    def transfer(self, config: DarkConfig) -> float:
        """A step of transfer: a pass of the softmax model, then attention alone, forward and backward."""
        inner = self.calibration.step_speed[self.dtype] | {CONSTANT: 0.0}
        return self.observed(self.dtype) + predicted(inner, totals(self.attentions(config)))

    def search(self, config: DarkConfig) -> float:
        """The search for scale and bias: at each scale the features of all keys, and a few queries against them."""
        shape, m, d = self.shape, config.feature_count, self.shape.head_dim
        weights = SEARCH_ROWS * shape.heads * SEARCH_QUERIES * self.seq_len
        features = SEARCH_ROWS * shape.kv_heads * self.seq_len * 2 * d * m
        line = Operation(
            "search", BACKWARD, PRODUCT, SEARCH_COPIES / 2 * weights, SEARCH_COPIES / 2 * weights,
            features + 2 * weights * (m + d), kernels=20,
        )  # fmt: skip
        inner = self.calibration.forward_speed["float32"] | {CONSTANT: 0.0}
        return predicted(inner, totals([line.times(len(SCALES) * shape.layers)]))


def _choice_stages(clock: _Clock, heads: int) -> list[Stage]:
    """The choice of heads and windows: passes over rows of text and as many kinds of recall."""
    rows, windows = max(2, CHOICE_TOKENS // clock.seq_len) + PROMPTS, clock.forward(WINDOWS_ALONE)
    sizes = sorted({round(share * heads) for share in ROUNDS} | {0}, reverse=True)
    # Heads that are still exact, and the rows of that round.
    rounds = [
        (exact, 2 * ROWS_A_ROUND if exact > EVERY_ROW_FROM * heads else rows) for exact in (heads, *sizes[:-1]) if exact
    ]
    looked, changed = sum(number for _, number in rounds), 2 * (CHANGE_ROWS + PROMPTS)
    return [
        Stage("which heads need softmax",
              rows * (clock.forward(None) + windows) + sum(n * clock.slopes(exact / heads) for exact, n in rounds),
              f"{2 * rows} passes, {looked} with gradients"),
        # Few heads are exact there: they are not counted.
        Stage("heads and windows for the budget", CANDIDATES * rows * windows + changed * clock.slopes(0.0),
              f"about {CANDIDATES * rows} passes, {changed} with gradients"),
    ]  # fmt: skip


def planned_stages(clock: _Clock, config: DarkConfig, task: PlanTask) -> list[Stage]:
    """The stages of `linearize` in its order. Loading, tokenizing and saving are not among them."""
    scored, blocks = max(1, EVALUATION_TOKENS // task.sequence), max(2, CALIBRATION_TOKENS // task.sequence)
    passes = f"{scored} × {task.sequence:,} tokens"
    method = config.method

    def score(title: str, form: DarkConfig | None) -> Stage:
        return Stage(f"{title}: evaluate", scored * clock.forward(form), passes)

    stages = [score("softmax", None)]
    if task.budget != NO_BUDGET:
        full = [i for i in range(clock.shape.layers) if i not in clock.shape.sliding]
        chosen = _choice_stages(clock, len(full) * clock.shape.kv_heads)
        # Constant state has nothing to choose, but the heads are measured all the same.
        stages += chosen[:1] if Budget.parse(task.budget, 1).constant else chosen
    # Calibration runs in float32, whatever the training does.
    calibrated = blocks * clock.observed("float32") + clock.search(config)
    stages += [Stage(f"{method}: calibrate", calibrated, f"{blocks} × {task.sequence:,} tokens, float32")]
    stages += [score("converted", config)]
    if task.transfer_steps:
        seconds = (task.transfer_steps + CHECKS) * clock.transfer(config)
        stages += [Stage(f"{method}: transfer", seconds, f"{task.transfer_steps} steps"), score("transferred", config)]
    if task.steps:
        step = clock.step(config)
        stages += [
            Stage(f"{method}: finetune", task.steps * step, f"{task.steps:,} steps of {step:.3g} s"),
            score("finetuned", config),
        ]
    return stages


def crossover(faster: Callable[[int], bool]) -> int | None:
    """The least length between `SHORTEST` and `LONGEST` from which on `faster` holds; None if it never does."""
    lengths = range(SHORTEST, LONGEST + 1)
    if not faster(LONGEST):
        return None
    return lengths[bisect.bisect_left(lengths, True, key=faster)]


def estimate(
    shape: Shape, task: PlanTask, config: DarkConfig, calibration: Calibration, *, positions: int | None, name: str
) -> Estimate:
    """Time and memory of a run of `linearize`, and where its form of attention begins to pay.

    Args:
        config: everything but what a budget chooses.
        positions: the most tokens that the model reads by its configuration, where it says.
        name: of the model, for messages.

    Raises:
        ConfigError: a budget too small. InputError: the machine was not calibrated in the task's precision.
    """
    dtype = task.precision
    if dtype not in calibration.step_speed:
        raise InputError(
            f"--dtype {dtype}: this machine is calibrated in {', '.join(calibration.step_speed)}, which it multiplies "
            "natively. Give one of them."
        )
    length, notes = positions or USUAL_LENGTH, list[str]()
    training = TrainConfig(steps=task.steps, transfer_steps=task.transfer_steps)

    def within(text: str) -> tuple[PlanTask, DarkConfig]:
        check_budget_config(config, task.sequence)
        count_features = counts_features(Budget.parse(text, length), config, training)
        form = budget_config(shape, config, text, length, dtype, count_features=count_features)
        return dataclasses.replace(task, budget=text), form

    task, config = settled(task.budget, within, notes.append) or (dataclasses.replace(task, budget=NO_BUDGET), config)
    if config.method == "exact":
        raise ConfigError(
            f"{name}: --method exact, or a budget of the whole cache, leaves softmax everywhere. There is nothing "
            "to convert: give another method or a smaller budget."
        )
    clock = _Clock(calibration, shape, task.sequence, dtype)

    def faster(length: int) -> bool:
        at = _Clock(calibration, shape, length, dtype)
        return at.step(config) <= at.step(None)

    stages = planned_stages(clock, config, task)
    step, fitting = clock.step(config), None
    if task.hours:
        rest = sum(stage.seconds for stage in stages if not stage.title.endswith("finetune"))
        fitting = max(0, int((3600 * task.hours - rest) / step)) * task.sequence
    return Estimate(
        task, shape, config, tuple(stages), step, clock.step(None),
        training_bytes(shape, 1, task.sequence, autocast=dtype == "bfloat16"), memory_bytes(), crossover(faster),
        fitting, tuple(notes),
    )  # fmt: skip
