"""What `reproduce width` runs. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .networks import Recipe
from .tasks import Sizes

#: Model → how it stands in tables and pictures. The first two are infinitely wide.
MODELS = {
    "ntk": "infinite, gradient descent (NTK)",
    "adam-like": "infinite, Adam-like (ours)",
    "sgd-frozen": "finite, SGD, features frozen",
    "adam-frozen": "finite, Adam, features frozen",
    "sgd-learned": "finite, SGD, features learned",
    "adam-learned": "finite, Adam, features learned",
}
FINITE = tuple(name for name in MODELS if "-" in name and name != "adam-like")
#: Ridges tried, over the mean of the kernel's diagonal: for a kernel, what the time of training is for a network.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Setting:
    """A task and a depth."""

    task: str
    depth: int

    @property
    def name(self) -> str:
        """Its name in records and files."""
        return f"{self.task}, {self.depth} hidden"


@dataclass(frozen=True)
class Job:
    """What is finished or not: one seed of a setting, or one depth of the comparison with finite networks."""

    name: str
    setting: Setting | None
    seed: int
    depth: int


@dataclass(frozen=True)
class Plan:
    """Everything a run depends on; saved whole, and compared when it is resumed. Defaults: minutes on two cores."""

    settings: tuple[Setting, ...] = (
        Setting("digits", 1),
        Setting("digits", 2),
        Setting("text", 1),
        Setting("text", 2),
        Setting("sparse", 1),
    )
    seeds: int = 5
    data: tuple[str, ...] = ("pydoc",)
    sizes: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"digits": (300, 200, 1297), "text": (600, 300, 1000), "sparse": (300, 200, 1297)}
    )
    width: int = 256
    steps: int = 1000
    batch: int = 32
    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"sgd": (0.3, 1.0, 3.0), "adam": (0.03, 0.1, 0.3)}
    )
    units: int = 1024  # drawn for the Adam-like limit
    # The comparison with finite networks: widths of one and of two hidden layers, inputs trained on and compared at,
    # units drawn for the limit (its own error adds to the distance), and the greatest width that Adam is run at.
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    widths_of_two: tuple[int, ...] = (64, 256, 1024)
    width_seeds: int = 3
    width_sizes: tuple[int, int] = (48, 64)
    width_units: int = 65536
    most_adam: int = 256

    def described(self) -> dict[str, Any]:
        """Plain values for the run folder."""
        return {"command": "reproduce width", **asdict(self)}

    def shortened(self, steps: int) -> Plan:
        """At most so many steps a network, to try it out."""
        return replace(self, steps=min(self.steps, steps))

    def sizes_of(self, setting: Setting) -> Sizes:
        """Inputs to train on, to choose with and to score."""
        return Sizes(*self.sizes[setting.task])

    def recipe(self, model: str, rate: float) -> Recipe:
        """How a finite model is trained."""
        optimizer, features = model.split("-")
        return Recipe(optimizer, features == "frozen", rate, self.steps, self.batch)

    def jobs(self) -> list[Job]:
        """In order: of every setting the first seed, which chooses the rates of the others, then the next one."""
        compared = [Job(f"distance.depth{depth}", None, 0, depth) for depth in (1, 2)]
        return [
            Job(f"{setting.task}.depth{setting.depth}.seed{seed}", setting, seed, setting.depth)
            for seed in range(self.seeds)
            for setting in self.settings
        ] + compared
