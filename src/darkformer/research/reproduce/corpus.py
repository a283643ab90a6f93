"""Text, tokenizers and blocks: what is shared by every run of a base, and never changes once a folder has it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...errors import InputError
from ...hf.load import load_tokenizer
from ...records import read_json, write_json
from ...train.data import load_texts, split_documents, token_blocks
from .bases import model_folder
from .plan import Base, Scale
from .records import is_writer


class Blocks(NamedTuple):
    """Token blocks (N, seq_len): training text, and two halves of the held-out documents."""

    train: Tensor
    tuning: Tensor  # chooses learning rates
    evaluation: Tensor  # what the figures show


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, the first of them the end of a document."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def fingerprint(documents: list[str]) -> str:
    """SHA-256 of the documents in their order, the first 16 digits."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


class Corpus:
    """The text of a run folder: gathered once, kept in `text/`, so that a later session trains on the same.

    Raises:
        InputError: less text than the scale needs.
    """

    def __init__(self, scale: Scale, out: Path) -> None:
        self.scale, self.out = scale, out
        file = out / "text" / "documents.json"
        documents = read_json(file) if file.is_file() else load_texts(scale.data, scale.documents)
        size = sum(map(len, documents))
        if size < scale.least_text:
            raise InputError(
                f"--data {' '.join(scale.data)}: {size:,} characters, scale {scale.name!r} needs {scale.least_text:,}. "
                "Give more text; on Debian `apt install perl-doc` brings 8.8 MB: --data '/usr/share/perl/*/pod/*.pod'."
            )
        if is_writer() and not file.is_file():
            write_json(file, documents)
        self.train, self.held_out = split_documents(documents)
        self.facts: dict[str, Any] = {
            "sources": list(scale.data), "documents": len(documents), "characters": size,
            "fingerprint": fingerprint(documents),
        }  # fmt: skip
        self._blocks: dict[tuple[str, int], Blocks] = {}

    def tokenizer(self, base: Base) -> Any:
        """The base's tokenizer; for the small model one trained on the training text, kept in `model/tokenizer`."""
        if base.tokenizer != "small":
            return load_tokenizer(model_folder(base.tokenizer, self.out))
        folder = self.out / "model" / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():  # written last
            tokenizer = train_tokenizer(self.train, self.scale.vocabulary)
            if not is_writer():
                return tokenizer
            tokenizer.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def blocks(self, base: Base) -> Blocks:
        """Blocks of the base's length; the held-out ones in a fixed random order, so that both halves see all kinds."""
        key = (base.tokenizer, base.seq_len)
        if key not in self._blocks:
            tokenizer = self.tokenizer(base)
            train = token_blocks(tokenizer, self.train, base.seq_len, "the training")
            held_out = token_blocks(tokenizer, self.held_out, base.seq_len, "the held-out")
            held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
            count = max(1, min(self.scale.eval_tokens // base.seq_len, len(held_out) // 2))
            self._blocks[key] = Blocks(train, held_out[:count], held_out[count : 2 * count])
        return self._blocks[key]
