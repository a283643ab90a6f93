"""The data: handwritten digits, the next character of a text, and a target that needs few features of the digits."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, MissingExtraError
from ...train.data import load_texts, split_documents
from .kernels import _relu

CONTEXT = 6
ALPHABET = " " + string.ascii_lowercase
#: Units of the sparse target, and the pixels that each of them looks at.
TEACHERS, PIXELS = 4, 4


class Sizes(NamedTuple):
    """Numbers of inputs."""

    train: int
    valid: int
    test: int


class Task(NamedTuple):
    """One split; the training inputs come first, then those that choose rates, then those that are scored."""

    x: Tensor  # (N, d) float32, mean square norm 1
    y: Tensor  # (N, C) float32
    sizes: Sizes
    teachers: Tensor | None = None  # (k, d) of the sparse target

    @property
    def train(self) -> slice:
        return slice(0, self.sizes.train)

    @property
    def valid(self) -> slice:
        return slice(self.sizes.train, self.sizes.train + self.sizes.valid)

    @property
    def test(self) -> slice:
        return slice(self.sizes.train + self.sizes.valid, None)

    def score(self, predicted: Tensor, rows: slice) -> float:
        """Accuracy over the classes, or R² of a single real target; minus infinity for predictions not finite.

        Args:
            predicted: outputs (n, C) at `rows`.
        """
        if not bool(torch.isfinite(predicted).all()):
            return -torch.inf
        target = self.y[rows]
        if target.shape[1] > 1:
            return float((predicted.argmax(-1) == target.argmax(-1)).double().mean())
        return float(1 - (predicted - target).square().mean() / target.var(unbiased=False))


def _normalised(x: Tensor) -> Tensor:
    return (x / x.square().sum(-1).mean().sqrt()).float()


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "`reproduce width` needs 'scikit-learn', which is not installed: pip install 'darkformer[width]'."
        ) from error
    data = load_digits()
    pixels = torch.from_numpy(data.data)
    return _normalised(pixels - pixels.mean(0)), torch.from_numpy(data.target)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """Targets whose mean over the classes is 0: f starts there."""
    return torch.nn.functional.one_hot(labels, classes).float() - 1 / classes


def _shuffled_digits(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, labels = _digits()
    if sum(sizes) > len(x):
        raise InputError(f"{sum(sizes)} digits asked for, the data set has {len(x)}: take fewer.")
    rows = torch.randperm(len(x), generator=generator)[: sum(sizes)]
    return x[rows], labels[rows]


def digits(sizes: Sizes, data: Sequence[str], generator: torch.Generator) -> Task:
    """Which of ten digits: 8 × 8 pixels, centred."""
    x, labels = _shuffled_digits(sizes, generator)
    return Task(x, _one_hot(labels, 10), sizes)


def sparse(sizes: Sizes, data: Sequence[str], generator: torch.Generator) -> Task:
    """Σ of `TEACHERS` units φ(v·x) with `PIXELS` pixels each, of mean 0 and variance 1 over the digits.

    In an infinitely wide network every such unit is among the features: learning means to select it.
    """
    x, _ = _shuffled_digits(sizes, generator)
    alive = (x.std(0) > 0.2 * x.std(0).max()).nonzero()[:, 0]
    teachers = x.new_zeros(TEACHERS, x.shape[1])
    for row in teachers:
        chosen = alive[torch.randperm(len(alive), generator=generator)[:PIXELS]]
        row[chosen] = torch.randn(PIXELS, generator=generator)
    teachers /= (x @ teachers.mT).std(0)[:, None]
    y = _relu(x @ teachers.mT).sum(-1, keepdim=True)
    return Task(x, (y - y.mean()) / y.std(), sizes, teachers)


def text(sizes: Sizes, data: Sequence[str], generator: torch.Generator) -> Task:
    """The next of 27 characters after `CONTEXT` of them, one-hot; documents that are scored are not trained on.

    Raises:
        InputError: less text than the sizes need.
    """
    pieces = []
    for documents, count in zip(
        split_documents(load_texts(data)), (sizes.train + sizes.valid, sizes.test), strict=True
    ):
        letters = " ".join(documents).lower()
        ids = torch.tensor([max(0, ALPHABET.find(c)) for c in letters if c in ALPHABET or c.isspace()])
        places = len(ids) - CONTEXT
        if places < 10 * count:
            raise InputError(f"--data {' '.join(data)}: {max(places, 0):,} places, {10 * count:,} needed: give more.")
        starts = torch.randperm(places, generator=generator)[:count]
        pieces.append(ids[starts[:, None] + torch.arange(CONTEXT + 1)])
    windows = torch.cat(pieces)
    x = torch.nn.functional.one_hot(windows[:, :CONTEXT], len(ALPHABET)).flatten(1)
    return Task(_normalised(x.double()), _one_hot(windows[:, CONTEXT], len(ALPHABET)), sizes)


TASKS = {"digits": digits, "text": text, "sparse": sparse}
