"""What is run: bases, experiments and the runs they consist of. Plain data; nothing here computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...config import DarkConfig, TrainConfig
from ...errors import ConfigError

#: The paper's six methods, and the library's own form as a curve of its own.
METHODS: dict[str, str] = {
    "exact": "exact softmax",
    "dark": "DARK",
    "performer": "Performer",
    "lfk": "LFK",
    "random": "random",
    "constant": "constant",
    "ours": "ours: library default (not in the paper)",
}
#: What conversion added learns at the model's own rate, or at this one where that is lower: in a few hundred steps a
#: geometry could not leave the identity at the rates a pretrained model stands.
LEAST_GEOMETRY_LR = TrainConfig().geometry_lr


@dataclass(frozen=True)
class Base:
    """A model that runs start from, and the sequences it is trained on."""

    source: str  # "small", "grown" (figure 2 top made it of that), "smollm2", "gemma3-270m", a hub id, "random:HUB_ID"
    seq_len: int
    batch_size: int
    num_features: int
    save_every: int = 1000

    @property
    def pretrained(self) -> bool:
        """Whether its weights mean something: else there is nothing to calibrate on."""
        return self.source != "small" and not self.source.startswith("random:")

    @property
    def tokenizer(self) -> str:
        """The base whose tokenizer this one uses."""
        return "small" if self.source == "grown" else self.source.removeprefix("random:")


@dataclass(frozen=True)
class Experiment:
    """Methods × seeds on one base, one budget. With `grid_steps` each method first picks its rate by short runs."""

    figure: str
    base: str
    methods: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    grid_steps: int = 0
    rates_of: str = ""  # key of the experiment whose grid chose the rates, if not its own
    every_rate: bool = False  # no choice: each rate is a run (figure 5)
    seeds: tuple[int, ...] = (0,)
    train: str = "all"
    points: int = 6  # evaluations after the first step
    spacing: str = "even"  # or "log"
    mechanism: bool = False

    @property
    def key(self) -> str:
        """Names it in files and records."""
        return f"{self.figure}.{self.base}"

    def evaluated(self) -> tuple[int, ...]:
        """Steps after which held-out text is scored, the last one included, 0 not."""
        count = min(self.points, self.steps)
        if self.spacing == "log":
            spaced = {round(math.exp(math.log(self.steps) * (i + 1) / count)) for i in range(count)}
        else:
            spaced = {round(self.steps * (i + 1) / count) for i in range(count)}
        return tuple(sorted(spaced))


@dataclass(frozen=True)
class Run:
    """One model trained once."""

    experiment: Experiment
    method: str
    seed: int
    lr: float | None  # None: what the grid chose
    grid: bool = False

    @property
    def steps(self) -> int:
        return self.experiment.grid_steps if self.grid else self.experiment.steps

    @property
    def name(self) -> str:
        """Its folder."""
        rate = "" if self.lr is None else f".lr{self.lr:g}"
        return f"{self.experiment.key}.{self.method}.seed{self.seed}{'.grid' if self.grid else ''}{rate}"

    @property
    def title(self) -> str:
        """For progress bars."""
        rate = "" if self.lr is None else f" at {self.lr:g}"
        return f"{self.experiment.figure} {self.experiment.base}: {self.method} seed {self.seed}{rate}"


@dataclass(frozen=True)
class Scale:
    """Everything a reproduction depends on; saved whole, and compared when it is resumed."""

    name: str
    data: tuple[str, ...]
    bases: dict[str, Base]
    experiments: tuple[Experiment, ...]
    lengths: tuple[int, ...] = ()  # of figure 1; empty: not measured at this scale
    dtype: str = "float32"  # the same on every machine: runs of one experiment may come from several
    documents: int = 20_000  # of a streamed dataset
    least_text: int = 5_000_000  # characters
    vocabulary: int = 4096
    eval_tokens: int = 4096
    small: dict[str, Any] = field(default_factory=dict)  # fields of the small model's configuration

    def settings(self) -> dict[str, Any]:
        """Plain values for the run folder, one a field, so that a change can be named: `2-top.small.steps`."""
        plain = asdict(self)
        parts = {e.key: asdict(e) for e in self.experiments} | {f"base {n}": asdict(b) for n, b in self.bases.items()}
        for name in ("experiments", "bases"):
            del plain[name]
        inner = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
        return {"command": "reproduce", **plain, **inner}

    def shortened(self, steps: int) -> Scale:
        """At most `steps` steps a run, grids a quarter of that, figure 1 up to 4,096 tokens."""
        short = tuple(
            replace(
                e, steps=min(e.steps, steps), grid_steps=min(e.grid_steps, max(1, steps // 4)),
                points=min(e.points, 3),
            )
            for e in self.experiments
        )  # fmt: skip
        return replace(self, experiments=short, lengths=tuple(n for n in self.lengths if n <= 4096))


def form(run: Run, num_features: int) -> DarkConfig | None:
    """The attention of a run; None leaves the model's own softmax."""
    if run.method == "exact":
        return None
    if run.method == "ours":
        return DarkConfig(num_features=num_features, seed=run.seed, convert_sliding=True)
    return DarkConfig.paper(num_features, method=run.method, seed=run.seed, convert_sliding=True)


def training(run: Run, scale: Scale, lr: float) -> TrainConfig:
    """The training of a run at the rate `lr`."""
    base = scale.bases[run.experiment.base]
    return TrainConfig(
        train=run.experiment.train, steps=run.steps, lr=lr, geometry_lr=max(lr, LEAST_GEOMETRY_LR),
        warmup=max(5, run.steps // 20), seq_len=base.seq_len, batch_size=base.batch_size, save_every=base.save_every,
        dtype=scale.dtype, seed=run.seed,
    )  # fmt: skip


def runs_of(experiment: Experiment, seed: int) -> Iterator[Run]:
    """Method by method, each one's grid before its run. The grid belongs to the first seed."""
    for method in experiment.methods:
        if experiment.grid_steps and seed == experiment.seeds[0]:
            for rate in experiment.rates:
                yield Run(experiment, method, seed, rate, grid=True)
        chosen: tuple[float | None, ...] = experiment.rates if experiment.every_rate else (None,)
        for lr in chosen:
            yield Run(experiment, method, seed, lr)


def planned(scale: Scale, figures: Sequence[str]) -> list[Run]:
    """Runs that `figures` need, what they depend on first; the first seed of everything before the second of anything.

    Args:
        figures: names of figures, or of one experiment of a figure (`3.grown`).

    Raises:
        ConfigError: a figure this scale has no runs for.
    """
    known = {n for e in scale.experiments for n in (e.figure, e.key)} | ({"1"} if scale.lengths else set())
    if missing := [name for name in figures if name not in known]:
        raise ConfigError(f"figure {', '.join(missing)}: not part of scale {scale.name!r}, which has {sorted(known)}.")
    wanted = [e for e in scale.experiments if e.figure in figures or e.key in figures]
    runs: dict[Run, None] = {}
    for rank in range(max((len(e.seeds) for e in wanted), default=0)):
        for experiment in wanted:
            if rank < len(experiment.seeds):
                runs |= dict.fromkeys([*_before(scale, experiment), *runs_of(experiment, experiment.seeds[rank])])
    return list(runs)


def experiment_of(scale: Scale, key: str) -> Experiment:
    """The experiment with that key."""
    return next(e for e in scale.experiments if e.key == key)


def grower(scale: Scale) -> Run | None:
    """The run whose model is the base `grown`: the exact one of the experiment on `small`."""
    on_small = (e for e in scale.experiments if scale.bases[e.base].source == "small")
    return next((Run(e, "exact", e.seeds[0], None) for e in on_small), None)


def grid_runs(experiment: Experiment, method: str) -> list[Run]:
    """The runs that choose a method's rate."""
    return [Run(experiment, method, experiment.seeds[0], rate, grid=True) for rate in experiment.rates]


def _before(scale: Scale, experiment: Experiment) -> Iterator[Run]:
    """Runs of other experiments this one depends on: the base's training, the grids that chose its rates."""
    if scale.bases[experiment.base].source == "grown":
        grown = grower(scale)
        assert grown is not None
        yield from [*grid_runs(grown.experiment, "exact"), grown]
    if experiment.rates_of:
        for method in experiment.methods:
            yield from grid_runs(experiment_of(scale, experiment.rates_of), method)
