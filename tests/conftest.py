"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples every time.

No test, and no process that one starts, asks the network: a name on a hub is one that cannot be reached.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the workers of pytest-xdist would otherwise fight for the cores
settings.register_profile("darkformer", deadline=None, derandomize=True, database=None)
settings.load_profile("darkformer")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    from darkformer.train.data import pydoc_documents

    return pydoc_documents()[:16]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A tiny decoder with a real tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_glob(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i, document in enumerate(documents):
        (folder / f"{i:02d}.txt").write_text(document, encoding="utf-8")
    return str(folder / "*.txt")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, which must refuse with one line; returns it."""

    def run(*words: str) -> str:
        from darkformer.cli import main

        monkeypatch.setattr(sys, "argv", ["darkformer", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert caught.value.code == 1 and len(said) == 1, said
        return said[0]

    return run
