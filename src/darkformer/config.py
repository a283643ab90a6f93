"""The one configuration (`DarkConfig`) and how a model is trained (`TrainConfig`).

Every field carries its help text and, where it is not its own name, its flag: the command line is made from them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ConfigError

METHODS: dict[str, str] = {
    "dark": "positive random features of the learned kernel exp(q'Σk), Σ = MᵀM (the paper's method)",
    "performer": "isotropic positive random features, M = I, fixed draws (FAVOR+)",
    "lfk": "learned feature kernel: the projection's rows are parameters, started from a Gaussian draw",
    "random": "positive features drawn independently of the token (baseline)",
    "constant": "all features equal 1: the causal mean of the values (baseline)",
    "local": "no features at all: only the window and the sinks, exact (the baseline features must beat)",
    "exact": "softmax attention through the same door (the reference)",
}
DRAWS: dict[str, str] = {
    "orthogonal": "blocks of Haar-orthogonal directions with chi-distributed norms",
    "iid": "independent Gaussian rows",
    "simplex": "blocks of randomly rotated regular simplices with chi-distributed norms (SimRF of FAVOR++)",
    "sobol": "scrambled Sobol' points through the normal quantile",
}
PROPOSALS: dict[str, str] = {
    "isotropic": "ω ~ N(0, I) (FAVOR+)",
    "oprf": "the best multiple of I (OPRF of FAVOR++)",
    "optimal": "the best Gaussian for the measured second moments; always exists",
    "theorem32": "the paper's (I+2Λ)(I-2Λ)⁻¹; exists while every eigenvalue of Λ is below ½",
}
TRAIN_GROUPS: dict[str, str] = {
    "all": "every weight of the model",
    "qkv": "the query, key and value projections and what conversion added",
    "geometry": "only what conversion added (M, balance, centres, bias; the projection for lfk)",
    "none": "nothing: calibrate and stop",
}
DTYPES: dict[str, str] = {
    "auto": "bfloat16 where the processor or GPU multiplies it faster, float32 elsewhere",
    "float32": "float32 throughout",
    "bfloat16": "float32 weights, bfloat16 autocast for the matrix products of training and evaluation",
}

#: Tokens of a sequence that a model is calibrated, chosen and scored at.
CONTEXT = 2048
#: Tokens of text that scores are measured on.
EVALUATION_TOKENS = 8192

#: Budgets that are words: `USUAL_SHARE` where that is possible, and no budget at all.
USUAL_BUDGET, NO_BUDGET, USUAL_SHARE = "usual", "none", "10%"

#: Seeds end here in numpy, and no count of a run comes near it.
_LARGEST = 2**32 - 1

#: Capabilities of processors that multiply bfloat16: x86 twice, ARM.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 natively: emulated it is many times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in BFLOAT16)


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 clearly faster than float32; measured once a process, in 0.2 s.

    Having the instructions does not say so: without AMX an AMD Zen 4 does 2.2 times as many products a second in
    bfloat16, an Intel Sapphire Rapids half as many.
    """
    operands = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for _ in range(6):  # in turns, and the best of each: others may use the processor
        for i, x in enumerate(operands):
            started = time.perf_counter()
            torch.nn.functional.linear(x, x)
            best[i] = min(best[i], time.perf_counter() - started)
    return best[1] < 0.8 * best[0]


def native_dtype() -> str:
    """What `auto` stands for on this machine: `bfloat16` or `float32`, whichever multiplies faster."""
    if not has_bfloat16():
        return "float32"
    if torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16"):
        return "bfloat16"
    return "bfloat16" if bfloat16_is_faster() else "float32"


def option(default: Any, text: str, flag: str = "", minimum: int | None = None) -> Any:
    """A dataclass field that is an option of the command line: the only place where its help text is written.

    Args:
        flag: as typer reads it, such as `--tied/--untied`; without, the field's name (`--geometry-lr`, `--a/--no-a`).
        minimum: smallest number that the command line takes, for fields whose class checks none itself.
    """
    return field(default=default, metadata={"help": text, "flag": flag, "minimum": minimum})


def _choices(table: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in table.items())


def _check_integer(name: str, value: object, minimum: int, maximum: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r}: must be an integer of at least {minimum}.")
    if value > maximum:
        raise ConfigError(f"{name}={value!r}: must be {maximum} at most.")


def _check_choice(name: str, value: object, table: dict[str, str]) -> None:
    if not isinstance(value, str) or value not in table:
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(table)}.")


#: A layer (`6`) or one key/value head of it (`"18.2"`), as options name them.
HeadName = int | str
#: A number within a name: digits of ASCII, no more than any size needs.
_NUMBER = r"[0-9]{1,18}"


def _layer_and_head(name: str, value: object) -> tuple[int, int | None]:
    """(layer, kv head) of a `HeadName`, or of a pair; the head is None for a whole layer."""
    if isinstance(value, tuple | list) and len(value) == 2 and all(type(x) is int for x in value):
        value = f"{value[0]}.{value[1]}"
    if isinstance(value, str) and re.fullmatch(rf"{_NUMBER}(\.{_NUMBER})?", value):
        layer, _, head = value.partition(".")
        return int(layer), int(head) if head else None
    if type(value) is int and value >= 0:
        return value, None
    hint = " In quotes: as a number 18.10 would be 18.1." if isinstance(value, float) else ""
    raise ConfigError(f"{name}={value!r}: name a layer (6) or a key/value head of one ('18.2'), from 0.{hint}")


def _head_names(name: str, values: Iterable[object]) -> tuple[HeadName, ...]:
    """Layers and heads in order, each once; heads of a layer that is named itself go."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}={values!r}: give a list of layers and heads, such as (6, '18.2').")
    pairs = {_layer_and_head(name, value) for value in values}
    kept = sorted((a, -1 if b is None else b) for a, b in pairs if b is None or (a, None) not in pairs)
    return tuple(a if b < 0 else f"{a}.{b}" for a, b in kept)


def _layer_windows(values: Iterable[object]) -> tuple[tuple[int, int], ...]:
    """Pairs (layer, window), in order, from pairs or `LAYER=WINDOW`."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"layer_windows={values!r}: give a list of pairs, such as ((3, 256),).")
    windows: dict[int, int] = {}
    for value in values:
        pair = (
            tuple(value.split("="))
            if isinstance(value, str)
            else tuple(value)
            if isinstance(value, list | tuple)
            else ()
        )
        if len(pair) != 2 or not all(type(x) is int or (type(x) is str and re.fullmatch(_NUMBER, x)) for x in pair):
            raise ConfigError(f"layer_windows={value!r}: give LAYER=WINDOW, such as 3=256, or a pair (3, 256).")
        layer, window = map(int, pair)
        _check_integer("layer_windows: the layer", layer, 0)
        _check_integer(f"layer_windows: the window of layer {layer}", window, 0)
        if windows.setdefault(layer, window) != window:
            raise ConfigError(f"layer_windows gives layer {layer} two windows, {windows[layer]} and {window}.")
    return tuple(sorted(windows.items()))


@dataclass(frozen=True)
class HeadKinds:
    """What each key/value head of one layer computes, by its number; every head is in one of the three.

    Attributes:
        exact: softmax over everything, with keys and values that grow.
        local: the window and the sinks alone.
        features: the configuration's method.
    """

    exact: tuple[int, ...]
    local: tuple[int, ...]
    features: tuple[int, ...]


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r}: must be a finite number above 0.")


@dataclass(frozen=True)
class DarkConfig:
    """How attention is approximated. Frozen, passed whole, saved in the model's `config.json`.

    The defaults are the library's own form: centred, balanced, with an exact window and sinks.
    `DarkConfig.paper()` is the paper's form and nothing else.

    Raises:
        ConfigError: a field outside its rule; the message names the field, the value and the rule.

    >>> DarkConfig(num_features=64).window
    64
    >>> DarkConfig.paper(num_features=64).window
    0
    """

    method: str = option("dark", f"Attention method. {_choices(METHODS)}.")
    num_features: int = option(128, "Number of random features m per key/value head.", "--features")
    window: int = option(64, "Keys a query sees exactly: itself and the window-1 before it. 0 is the paper's form.")
    sinks: int = option(4, "First tokens of a document that stay exact for every later query. 0 is the paper's form.")
    center: bool = option(True, "Subtract the mean query and key (exact: a per-key log-weight restores softmax).")
    balance: bool = option(True, "Transform queries by A and keys by its inverse transpose so their covariances match.")
    tied: bool = option(
        True, "One geometry M for queries and keys (the paper). False: one for each.", "--tied/--untied"
    )
    draw: str = option("orthogonal", f"How the projection is drawn. {_choices(DRAWS)}.")
    proposal: str = option("isotropic", f"Distribution of the projection, set by calibrate. {_choices(PROPOSALS)}.")
    proposal_weights: bool = option(
        True, "Weigh the proposal's draws so that the features stay unbiased. False: its covariance joins Σ (DARK)."
    )
    cold_start: bool = option(True, "Let calibration choose the starting scale of M per head by measured output error.")
    far_bias: bool = option(True, "A trained log-weight per head of the features against the exact window and sinks.")
    convert_sliding: bool = option(
        False,
        "Also convert layers that already attend through a sliding window; they then see everything before them.",
        "--convert-sliding/--keep-sliding",
    )
    keep_exact: tuple[HeadName, ...] = option(
        (),
        "Layer (6) or key/value head of a layer (18.2) that keeps softmax attention and a cache that grows "
        "(`darkformer budget` says which). Repeat for more.",
    )
    no_features: tuple[HeadName, ...] = option(
        (),
        "Layer (6) or key/value head (18.2) without features: its window and sinks alone. Calibration adds those whose "
        "features do not pay. Repeat for more.",
    )
    layer_windows: tuple[tuple[int, int], ...] = option(
        (),
        "Window of one layer where it is another than `window`, as LAYER=WINDOW (3=256). Repeat for more.",
        "--layer-window",
    )
    drop_features: bool = option(
        True,
        "Let calibration switch features off in heads where window and sinks alone are nearer to softmax.",
        "--drop-features/--keep-features",
    )
    seed: int = option(0, "Seed of the projections; layer and head are mixed in, so this number alone reproduces them.")

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("draw", self.draw, DRAWS)
        _check_choice("proposal", self.proposal, PROPOSALS)
        _check_integer("num_features", self.num_features, 1)
        _check_integer("window", self.window, 0)
        _check_integer("sinks", self.sinks, 0)
        _check_integer("seed", self.seed, 0)
        for f in dataclasses.fields(self):
            if isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                raise ConfigError(f"{f.name}={getattr(self, f.name)!r}: must be True or False.")
        for name in ("keep_exact", "no_features"):  # JSON gives lists
            object.__setattr__(self, name, _head_names(name, getattr(self, name)))
        object.__setattr__(self, "layer_windows", _layer_windows(self.layer_windows))
        if self.method == "local" and not all((self.window, *dict(self.layer_windows).values())):
            raise ConfigError("method='local' with window=0 leaves nothing to attend to: give window >= 1.")

    @classmethod
    def paper(cls, num_features: int = 128, **changes: Any) -> DarkConfig:
        """Exactly the paper's form: no window, no sinks, no change of variables, M started at the identity."""
        form: dict[str, Any] = dict(
            window=0, sinks=0, center=False, balance=False, tied=True, proposal="isotropic", cold_start=False,
            far_bias=False, drop_features=False,
        )  # fmt: skip
        return cls(num_features=num_features, **{**form, **changes})

    def head_kinds(self, layer: int, num_kv_heads: int) -> HeadKinds:
        """What each key/value head of one layer computes.

        Raises:
            ConfigError: a name of a head that the layer does not have, or a head without features whose window is 0.
        """
        every = tuple(range(num_kv_heads))

        def named(field_name: str) -> tuple[int, ...]:
            pairs = [_layer_and_head(field_name, x) for x in getattr(self, field_name)]
            heads = {b for a, b in pairs if a == layer}
            if unknown := sorted(b for b in heads if b is not None and b >= num_kv_heads):
                raise ConfigError(
                    f"{field_name} names key/value head {layer}.{unknown[0]}, and layer {layer} has {num_kv_heads} of "
                    f"them, {layer}.0 to {layer}.{num_kv_heads - 1}."
                )
            return every if None in heads else tuple(sorted(b for b in heads if b is not None))

        exact = every if self.method == "exact" else named("keep_exact")
        without = every if self.method == "local" else named("no_features")
        local = tuple(g for g in without if g not in exact)
        if local and self.window_of(layer) == 0:
            raise ConfigError(f"layer {layer} has window=0, and a head without features needs one: give it a window.")
        return HeadKinds(exact, local, tuple(g for g in every if g not in exact and g not in local))

    def window_of(self, layer: int) -> int:
        """The window of one layer."""
        return dict(self.layer_windows).get(layer, self.window)

    def constant_parts(self, layer: int, num_kv_heads: int) -> list[tuple[DarkConfig, tuple[int, ...]]]:
        """Configuration and heads of each part of a layer with constant state: heads with features, and without."""
        parts, form = self.head_kinds(layer, num_kv_heads), dataclasses.replace(self, window=self.window_of(layer))
        both = ((self.method, parts.features), ("local", parts.local))
        return [(dataclasses.replace(form, method=method), heads) for method, heads in both if heads]

    def at_layer(self, layer: int, num_kv_heads: int) -> DarkConfig:
        """What this configuration means for the heads of one layer that are not exact: its method and window.

        Where none of them has features the method is `local`; where all heads are exact it is `exact`.
        """
        parts = self.head_kinds(layer, num_kv_heads)
        method = self.method if parts.features else "local" if parts.local else "exact"
        return dataclasses.replace(self, method=method, window=self.window_of(layer))

    def layers_named(self, field_name: str) -> set[int]:
        """Layers that `keep_exact`, `no_features` or `layer_windows` name."""
        if field_name == "layer_windows":
            return set(dict(self.layer_windows))
        return {_layer_and_head(field_name, x)[0] for x in getattr(self, field_name)}

    @property
    def feature_count(self) -> int:
        """Features a head really carries: 0 for the methods without any."""
        return 0 if self.method in ("local", "exact") else self.num_features

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        lists = {
            "keep_exact": list(self.keep_exact),
            "no_features": list(self.no_features),
            "layer_windows": [list(pair) for pair in self.layer_windows],
        }
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DarkConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: no fields at all, one this version does not know (a newer version wrote it), or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{values!r} in place of a saved configuration: it must be the fields of DarkConfig.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(map(str, values)) - known)
        if unknown:
            raise ConfigError(
                f"unknown field(s) {', '.join(unknown)} in a saved configuration: "
                "it was written by a newer darkformer; upgrade this installation."
            )
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """How a converted model is finetuned: steps, rates, what learns, precision.

    Raises:
        ConfigError: a field outside its rule.
    """

    transfer_steps: int = option(
        0,
        "Steps that fit what conversion added to softmax, layer by layer, before the training, each on one sequence "
        "of the context (`darkformer.transfer`).",
    )
    transfer_lr: float = option(1e-2, "Peak learning rate of these steps.")
    train: str = option("all", f"Which parameters learn. {_choices(TRAIN_GROUPS)}.")
    steps: int = option(100, "Optimizer steps.")
    lr: float = option(2e-4, "Peak learning rate of the model's own weights (linear warm-up, cosine decay).")
    geometry_lr: float = option(2e-3, "Peak learning rate of what conversion added (M, balance, centres, bias).")
    warmup: int = option(5, "Warm-up steps; a fifth of all steps at most.")
    weight_decay: float = option(0.0, "AdamW's weight decay on the model's own matrices.")
    max_grad_norm: float = option(1.0, "Gradient norm above which the gradient is scaled down.")
    seq_len: int = option(CONTEXT, "Tokens in one training sequence.")
    batch_size: int = option(1, "Sequences in one optimizer step.")
    save_every: int = option(100, "Steps between checkpoints; an interrupt writes one as well.")
    dtype: str = option("auto", f"Precision. {_choices(DTYPES)}.")
    distill: float = option(
        0.0, "Weight of the softmax model's next-token distribution in the loss, 0 to 1; the rest is the text's."
    )
    window_dropout: float = option(
        0.0,
        "Share of the steps, from the first one, that draw a narrower window (of 16 keys at least), so that the "
        "features must do more.",
    )
    redraw_every: int = option(0, "Optimizer steps between fresh draws of the projection Ω; 0 keeps the first ones.")
    seed: int = option(0, "Seed of the data order.")

    def __post_init__(self) -> None:
        _check_choice("train", self.train, TRAIN_GROUPS)
        _check_choice("dtype", self.dtype, DTYPES)
        if self.dtype == "auto":  # at once: what runs is what the record says, and a resumed run compares
            object.__setattr__(self, "dtype", native_dtype())
        for name in ("transfer_steps", "steps", "warmup", "redraw_every", "seed"):
            _check_integer(name, getattr(self, name), 0, _LARGEST)
        for name in ("seq_len", "batch_size", "save_every"):
            _check_integer(name, getattr(self, name), 2 if name == "seq_len" else 1, _LARGEST)
        for name in ("transfer_lr", "lr", "geometry_lr", "max_grad_norm"):
            _check_positive(name, getattr(self, name))
        for name in ("distill", "window_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name}={value!r}: must be a number from 0 to 1.")
        if not isinstance(self.weight_decay, int | float) or not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay={self.weight_decay!r}: must be a number of at least 0.")

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps really taken: `warmup`, but a fifth of the run at most."""
        return min(self.warmup, self.steps // 5)

    @property
    def trains(self) -> bool:
        """Whether there is a training, after what conversion and transfer do."""
        return self.steps > 0 and self.train != "none"

    @property
    def learns(self) -> bool:
        """Whether anything is fitted after calibration: transfer, training, or both."""
        return self.trains or self.transfer_steps > 0

    @property
    def trains_features(self) -> bool:
        """Whether something is there for the features' sake: transfer, M alone, fresh draws or narrower windows."""
        alone = self.train == "geometry" or self.redraw_every > 0 or self.window_dropout > 0
        return self.transfer_steps > 0 or (self.trains and alone)


def field_help(config_class: type, name: str) -> str:
    """The help text of one field that is an `option`."""
    return next(f.metadata["help"] for f in dataclasses.fields(config_class) if f.name == name)
