"""Chooses which heads keep softmax, and how wide the windows of the others are, within a number of bytes."""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import NO_BUDGET, USUAL_BUDGET, USUAL_SHARE, DarkConfig, TrainConfig
from ..cost import model_bytes
from ..errors import ConfigError
from ..hf.convert import drop_features
from ..hf.layers import config_of, converted_modules, layer_of
from ..records import read_kept, write_kept
from ..reporting import Progress
from .calibrate import HeadChoice, calibrate
from .measure import frozen, measurement
from .mixed import EXACT, MixedAttention
from .sensitivity import Sensitivity
from .window_changes import WindowChange, window_changes

T = TypeVar("T")

#: Windows that a budget chooses from.
WINDOWS = (64, 128, 256, 512)
#: The window of constant state alone (budget 0).
CONSTANT_WINDOW = 256
#: The measured share of a first-order loss of recall: halfway between two windows its slope is too steep (SmolLM2:
#: about three-fold).
RECALL_SLOPE = 1 / 3
#: The length in tokens at which budgets count bytes, if the model's configuration has no maximum.
USUAL_LENGTH = 8192


@dataclass(frozen=True)
class Budget:
    """How much a model may keep for one sequence.

    Attributes:
        share: of the softmax model's cache at `length` tokens, or None where `size` is given.
        size: bytes, or None.
        length: tokens.
    """

    share: float | None
    size: int | None
    length: int

    @classmethod
    def parse(cls, text: str, length: int) -> Budget:
        """From `10%`, `64MB` (or kB, GB; MiB and its kin by 1,024) or `0`, at a length in tokens.

        Raises:
            ConfigError: none of these, or a share above 100 %.

        >>> Budget.parse("10%", 8192).share
        0.1
        """
        if text.strip() in ("0", "0%"):
            return cls(0.0, None, length)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kKMG]?i?B)\s*", text)
        if match is None:
            raise ConfigError(f"budget={text!r}: give a share of the softmax cache (10%), bytes (64MB), or 0.")
        number, unit = float(match[1]), match[2]
        if unit == "%":
            if number > 100:
                raise ConfigError(f"budget={text!r}: the whole softmax cache is 100%.")
            return cls(number / 100, None, length)
        power = "BKMG".index(unit[0].upper())
        return cls(None, int(number * (1024 if "i" in unit else 1000) ** power), length)

    @property
    def constant(self) -> bool:
        """Constant state: no exact head, however many bytes the rest takes."""
        return self.share == 0.0

    def bytes_of(self, softmax: int) -> int:
        """The budget in bytes, of a model whose softmax cache has `softmax` bytes."""
        return self.size if self.size is not None else int((self.share or 0.0) * softmax)

    def limit(self, softmax: int) -> int | None:
        """The most bytes that a model may keep whose softmax cache has `softmax`; None in constant state."""
        return None if self.constant else self.bytes_of(softmax)

    def __str__(self) -> str:
        kept = f"{self.size / 1e6:g} MB" if self.size is not None else f"{100 * (self.share or 0.0):g}%"
        return f"{kept} at {self.length:,} tokens"


@dataclass(frozen=True)
class Choice:
    """What a budget allows for.

    Attributes:
        config: the configuration to convert with.
        size, softmax: bytes one sequence of `length` tokens keeps with it and with softmax. Features that were not
            counted (`Chooser`) add to `size` where calibration leaves them on.
        tried: the candidates, one a row: window, heads (exact ones), size; text, recall (losses in nats per token with
            window and sinks beside the exact heads, no features); score (the share of a token's probability that is
            lost against softmax, as a geometric mean, of text and of recall added up).
    """

    config: DarkConfig
    size: int
    softmax: int
    length: int
    tried: tuple[dict[str, Any], ...] = ()

    @property
    def share(self) -> float:
        """Of the softmax cache."""
        return self.size / self.softmax

    def __str__(self) -> str:
        """One or two lines for the user."""
        config = self.config
        if config.method == "exact":
            return f"softmax everywhere: {self.softmax / 1e6:.1f} MB at {self.length:,} tokens."
        names = ", ".join(map(str, config.keep_exact)) or "none"
        windows = f"window {config.window}" + (" (some layers differ)" if config.layer_windows else "")
        return (
            f"exact heads: {names} ({len(config.keep_exact)}); the others: {windows}, {config.sinks} sinks. "
            f"{self.size / 1e6:.1f} MB at {self.length:,} tokens, {self.share:.1%} of softmax's "
            f"{self.softmax / 1e6:.1f} MB."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict(), "tried": list(self.tried)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """Inverse of `to_dict`."""
        return cls(**{**values, "config": DarkConfig.from_dict(values["config"]), "tried": tuple(values["tried"])})


def full_context(model: Any) -> int:
    """The most tokens that the model can read by its configuration, else `USUAL_LENGTH`."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or USUAL_LENGTH


def cache_element_bytes(model: Any, dtype: str) -> int:
    """Bytes of a number in keys and values: 2 if `dtype` (float32 or bfloat16) is bfloat16, else those of a weight."""
    return 2 if dtype == "bfloat16" else int(next(model.parameters()).element_size())


def kept_bytes(model: Any, config: DarkConfig | None, length: int, element_bytes: int) -> int:
    """Bytes one sequence of `length` tokens keeps in a converted model, if it had `config`; None: softmax."""
    layers = list(map(layer_of, converted_modules(model)))
    settings = model.config.get_text_config(decoder=True)
    return model_bytes(settings, layers, config, length, element_bytes=element_bytes)


def converted_bytes(model: Any, length: int, element_bytes: int) -> int:
    """Bytes that one sequence of `length` tokens keeps in a converted model."""
    return kept_bytes(model, config_of(model), length, element_bytes)


def calibrate_within(
    model: Any, batches: Iterable[Any], limit: int | None, *, length: int, element_bytes: int,
    progress: Progress | None = None,
) -> list[HeadChoice]:  # fmt: skip
    """`calibrate` for a budget: features stay where they beat a wider window of as many bytes.

    Args:
        limit: bytes one sequence of `length` tokens may keep; None: no limit. Above it features are dropped, those that
            gain least first, with `drop_features=False` too.
        element_bytes: of a number in keys and values.

    Raises:
        As `calibrate`.
    """
    choices = calibrate(model, batches, equal_bytes=True, element_bytes=element_bytes, progress=progress)
    if limit is None:
        return choices
    measured = {(choice.layer, head): (choice, i) for choice in choices for i, head in enumerate(choice.heads)}

    def gain(at: tuple[int, int]) -> float:
        if at not in measured:
            return -math.inf  # a form of features without scale or bias has no line search
        choice, i = measured[at]
        return choice.error_equal_bytes[i] - choice.error[i]

    config, layers = config_of(model), list(map(layer_of, converted_modules(model)))
    left = {(x.layer, g) for x in layers for g in config.head_kinds(x.layer, x.num_kv_heads).features}
    for at in sorted(left, key=lambda at: (gain(at), at)):
        if converted_bytes(model, length, element_bytes) <= limit:
            break
        drop_features(model, [at])
        if at in measured:
            choice, i = measured[at]
            choice.features[i] = False
    return choices


def _without_features(config: DarkConfig) -> DarkConfig:
    return config if config.method == "exact" else dataclasses.replace(config, method="local")


def too_small(budget: Budget, least: DarkConfig, least_bytes: int, softmax: int, count_features: bool) -> ConfigError:
    """The error of a budget that not even `least` keeps, whose bytes are `least_bytes` of softmax's `softmax`."""
    features = least.feature_count if count_features else 0
    return ConfigError(
        f"a budget of {budget} is {budget.bytes_of(softmax) / 1e6:.2f} MB, and windows of {least.window}, sinks and "
        f"{features} features everywhere take {least_bytes / 1e6:.2f} MB ({least_bytes / softmax:.1%}) without any "
        "exact head: give at least that, or 0 for constant state."
    )


def check_budget_config(config: DarkConfig, context: int | None = None) -> None:
    """What a budget chooses must be open in the configuration that it starts from, and there must be a far field.

    Args:
        context: tokens of the sequences that heads are chosen on, cut to a window of `CONSTANT_WINDOW`.

    Raises:
        ConfigError: exact heads, windows of layers or softmax everywhere are chosen already; sliding layers are to be
            converted, whose heads are not measured; or the window sees all of the context.
    """
    if config.keep_exact:
        raise ConfigError("--keep-exact beside --budget: a budget chooses the exact heads itself. Give one of them.")
    if config.layer_windows:
        raise ConfigError("--layer-window beside --budget: a budget chooses the windows itself. Give one of them.")
    if config.method == "exact":
        raise ConfigError("--method exact beside --budget: softmax everywhere is a budget of 100%. Give one of them.")
    if config.convert_sliding:
        raise ConfigError(
            "--convert-sliding beside --budget: heads are chosen in layers that attend to everything. Give one of them."
        )
    if context is not None and context <= CONSTANT_WINDOW + config.sinks + 1:
        raise ConfigError(
            f"--context {context} beside --budget: a window of {CONSTANT_WINDOW} and {config.sinks} sinks see all of "
            "it, so there is no far field to choose heads by. Give a longer context."
        )


def counts_features(budget: Budget, config: DarkConfig, training: TrainConfig) -> bool:
    """Whether the features of every head count against a budget.

    They do where they are all asked for, or may learn what they do not do yet: because something is trained for their
    sake, or because in constant state there is nothing else for the far field. Else they stay only where they beat a
    wider window of as many bytes.
    """
    return (budget.constant and training.trains) or training.trains_features or not config.drop_features


def settled(budget: str | None, make: Callable[[str], T], say: Callable[[str], None]) -> T | None:
    """What `make` gives of a budget (`10%`, `64MB`, `0`); None where there is none.

    Args:
        budget: `usual` is `USUAL_SHARE`, and none where that is not possible; None and `none` are none.
        make: raises ConfigError for a budget that is not possible.
        say: is told why the usual one is not.

    Raises:
        ConfigError: of `make`, for a budget that was asked for.
    """
    if budget is None or budget == NO_BUDGET:
        return None
    if budget != USUAL_BUDGET:
        return make(budget)
    try:
        return make(USUAL_SHARE)
    except ConfigError as problem:
        say(f"No budget, as the usual one is not possible: {problem}")
        return None


def check_asked_budget(budget: str | None, config: DarkConfig, context: int) -> None:
    """What can be said of a budget before anything is read; nothing of the usual one, which may turn out to be none.

    Raises:
        ConfigError: as `check_budget_config` and `Budget.parse`.
    """
    if budget not in (None, USUAL_BUDGET, NO_BUDGET):
        check_budget_config(config, context)
        Budget.parse(str(budget), 1)


def check_budget(model: Any, budget: Budget, config: DarkConfig, *, dtype: str, count_features: bool) -> None:
    """Refuses a budget that no choice can keep, before minutes of measuring.

    Args:
        model: the softmax model, not converted. config, dtype, count_features: as for `Chooser`.

    Raises:
        ConfigError: not even the smallest windows fit (the message has the least budget).
        ConversionError: as `sensitivity`.
    """
    settings, layers = model.config.get_text_config(decoder=True), MixedAttention(model, config.sinks).layers
    least = dataclasses.replace(config, window=WINDOWS[0], keep_exact=(), layer_windows=())
    forms = None, least if count_features else _without_features(least)
    softmax, size = (
        model_bytes(settings, layers, form, budget.length, element_bytes=cache_element_bytes(model, dtype))
        for form in forms
    )
    if not budget.constant and budget.bytes_of(softmax) < min(size, softmax):
        raise too_small(budget, least, size, softmax, count_features)


class Chooser:
    """Chooses exact heads and windows that lose least for each budget; what it measures for one serves the others.

    Heads are taken in the order of their sensitivity. For each window as many of them stay exact as the budget allows,
    and the losses of such a model (window and sinks elsewhere) are measured on the text and on numbers to be recalled.
    The candidate that loses least is chosen. Then windows may differ by layer: twice as wide where that gains most,
    half where it costs least, if that loses less when measured.

    Args:
        model: the softmax model, not converted; it stays as it is.
        batches: token ids (B, L) or dicts, as for `sensitivity`; L is the context it is chosen at.
        measured: the `sensitivity` of its heads.
        tokenizer: the model's own, for recall.
        config: everything but heads and windows.
        dtype: as for `sensitivity`; keys and values are counted at 2 bytes a number where it is bfloat16, else at those
            of the model's weights.
        count_features: features count against the budget. False: heads and windows use all of it, and features stay
            only where they beat a wider window, within what is left: see `calibrate_within`.
        prompts: as for `sensitivity`.
        folder: of the `sensitivity`. Measurements of windows are kept there too, so that a chooser that continues an
            interrupted one makes the same choices.

    Raises:
        ConversionError, InputError: as `sensitivity`.
    """

    def __init__(
        self, model: Any, batches: Iterable[Any], measured: Sensitivity, *, tokenizer: Any = None,
        config: DarkConfig, dtype: str = "auto", count_features: bool = True, prompts: int = 4,
        folder: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.order = model, list(batches), measured.order
        self.config, self.count_features = config, count_features
        self.options: dict[str, Any] = dict(tokenizer=tokenizer, sinks=config.sinks, seed=0, dtype=dtype)
        self.measure = measurement(
            model, self.batches, longest=WINDOWS[0], context=None, prompts=prompts, **self.options
        )
        self.context = max(rows.ids.shape[1] for rows in self.measure.rows.values())
        self.windows = [w for w in WINDOWS if w + self.config.sinks < self.context // 2] or [WINDOWS[0]]
        self.layers, self.element_bytes = self.measure.mixed.layers, cache_element_bytes(model, self.measure.dtype)
        self.settings = model.config.get_text_config(decoder=True)
        self.exact = measured.exact
        self.folder = None if folder is None else Path(folder)
        self._known: dict[DarkConfig, dict[str, Any]] = {}
        # window → the exact heads at which changes were measured, and the changes
        self._changes: dict[int, tuple[set[str], list[WindowChange]]] = {}

    def choose(self, budget: Budget) -> Choice:
        """The configuration within a budget that loses least.

        Raises:
            ConfigError: not even the smallest windows fit (the message has the least budget).
        """
        length, softmax = budget.length, self.bytes_of(None, budget.length)
        size = budget.bytes_of(softmax)
        if size >= softmax:
            return Choice(dataclasses.replace(self.config, method="exact"), softmax, softmax, length)
        if budget.constant:
            constant = self.candidate(min(CONSTANT_WINDOW, max(self.windows)), 0)
            return Choice(constant, self.bytes_of(constant, length), softmax, length)
        possible = [x for x in (self.filled(window, size, length) for window in self.windows) if x is not None]
        if not possible:
            least = self.candidate(self.windows[0], 0)
            raise too_small(budget, least, self.bytes_of(least, length), softmax, self.count_features)
        with frozen(self.model):
            best, tried = self._climbed(possible, length)
            if best.keep_exact and 2 * best.window + best.sinks + 1 < self.context:
                refined = self.refined(best, self._changes_at(best), size - self.bytes_of(best, length))
                if refined.layer_windows and self.bytes_of(refined, length) <= size:
                    tried.append(self.row(refined, length))
                    best = refined if tried[-1]["score"] < self.row(best, length)["score"] else best
        return Choice(best, self.bytes_of(best, length), softmax, length, tuple(tried))

    def _climbed(self, possible: Sequence[DarkConfig], length: int) -> tuple[DarkConfig, list[dict[str, Any]]]:
        """The best of candidates with ascending windows by hill climbing, and the rows of those that were measured."""
        at = min(range(len(possible)), key=lambda i: abs(possible[i].window - CONSTANT_WINDOW))
        score = lambda i: self.row(possible[i], length)["score"]  # noqa: E731
        seen = {at}
        while True:
            neighbours = [i for i in (at - 1, at + 1) if 0 <= i < len(possible)]
            seen |= set(neighbours)
            best = min([at, *neighbours], key=score)
            if best == at:
                return possible[at], [self.row(possible[i], length) for i in sorted(seen)]
            at = best

    def _changes_at(self, config: DarkConfig) -> list[WindowChange]:
        """First-order losses of half and twice the window for the heads that are not exact.

        They are cached by window, as a few exact heads change them little, and measured again if a head that was exact
        then is not exact now.
        """
        window, exact = config.window, set(map(str, config.keep_exact))
        file = None if self.folder is None else self.folder / f"windows-{window}.json"
        if window not in self._changes and file is not None and file.is_file():
            self._changes[window] = read_kept(
                file, lambda kept: (set(kept["exact"]), [WindowChange(**values) for values in kept["changes"]])
            )
        if window not in self._changes or not self._changes[window][0] <= exact:
            heads = [(layer, head) for layer, head in self.order if f"{layer}.{head}" in exact]
            changes = window_changes(
                self.model, self.batches[:2], exact=heads, windows=window, others=(window // 2, 2 * window),
                **self.options,
            )  # fmt: skip
            self._changes[window] = exact, changes
            if file is not None:
                write_kept(file, {"exact": sorted(exact), "changes": list(map(dataclasses.asdict, changes))})
        return [change for change in self._changes[window][1] if f"{change.layer}.{change.head}" not in exact]

    def bytes_of(self, config: DarkConfig | None, length: int) -> int:
        """Bytes one sequence of `length` tokens keeps with a configuration, or with softmax (None)."""
        if config is not None and not self.count_features:
            config = _without_features(config)
        return model_bytes(self.settings, self.layers, config, length, element_bytes=self.element_bytes)

    def candidate(self, window: int, heads: int) -> DarkConfig:
        """The first `heads` heads of the order exact, one window for the others."""
        names = tuple(f"{layer}.{head}" for layer, head in self.order[:heads])
        return dataclasses.replace(self.config, window=window, keep_exact=names)

    def filled(self, window: int, size: int, length: int) -> DarkConfig | None:
        """As many exact heads as fit into `size` bytes beside this window; None if not even the windows fit."""
        size_of = lambda heads: self.bytes_of(self.candidate(window, heads), length)  # noqa: E731
        heads = bisect.bisect_right(range(len(self.order) + 1), size, key=size_of) - 1
        return None if heads < 0 else self.candidate(window, heads)

    def windows_of(self, config: DarkConfig) -> list[list[int]]:
        """The window of each kv head, layer by layer; EXACT for softmax."""
        rows = []
        for layer in self.layers:
            exact = config.head_kinds(layer.layer, layer.num_kv_heads).exact
            rows.append([EXACT if g in exact else config.window_of(layer.layer) for g in range(layer.num_kv_heads)])
        return rows

    def refined(self, config: DarkConfig, changes: Sequence[WindowChange], spare: int = 0) -> DarkConfig:
        """`config` with wider windows in the layers that gain most, paid for by narrower ones where that costs least.

        Args:
            spare: bytes that the budget has left.
            changes: first-order losses of twice and of half the window, of every head that is not exact.
        """
        window = config.window
        values: dict[tuple[int, int], float] = {}
        for change in changes:
            value = change.text
            if change.recall is not None:
                value += RECALL_SLOPE * change.recall
            key = (change.layer, change.window)
            values[key] = values.get(key, 0.0) + value
        heads = {x.layer: x.num_kv_heads - len(config.head_kinds(x.layer, x.num_kv_heads).exact) for x in self.layers}
        open_layers = [layer for layer, count in heads.items() if count]
        wider = sorted(open_layers, key=lambda x: values.get((x, 2 * window), 0.0) / heads[x])
        narrower = sorted(open_layers, key=lambda x: values.get((x, window // 2), 0.0) / heads[x])
        windows: dict[int, int] = {}
        # Keys that are free for wider windows: what the budget has left, and what narrowed windows have saved.
        saved = spare // (2 * self.element_bytes * max(layer.head_dim for layer in self.layers))
        for layer in wider:
            gain, cost, narrowed = -values.get((layer, 2 * window), 0.0), 0.0, list[int]()
            for other in narrower:
                if saved + sum(heads[x] for x in narrowed) * window // 2 >= heads[layer] * window:
                    break
                if other != layer and other not in windows:
                    narrowed.append(other)
                    cost += values.get((other, window // 2), 0.0)
            paid = saved + sum(heads[x] for x in narrowed) * window // 2 - heads[layer] * window
            if layer in windows or paid < 0 or gain <= max(cost, 0.0):
                continue
            windows |= {layer: 2 * window, **dict.fromkeys(narrowed, window // 2)}
            saved = paid
        return dataclasses.replace(config, layer_windows=tuple(windows.items()))

    def row(self, config: DarkConfig, length: int) -> dict[str, Any]:
        """A candidate as a row of `Choice.tried`."""
        if config not in self._known:
            losses = self.measure.losses(self.windows_of(config))
            score = sum(1 - math.exp(self.exact[name] - losses[name]) for name in losses)
            self._known[config] = {
                "window": config.window, "heads": len(config.keep_exact), "layer_windows": len(config.layer_windows),
                **losses, "score": score,
            }  # fmt: skip
        return self._known[config] | {"size": self.bytes_of(config, length)}  # budgets differ in length
