"""Small converted models and what `generate` answers with them: `python make_models.py FOLDER`.

With `--real N` it also writes SmolLM2-135M, converted, and its answers to N prompts of 1 to 3,000 tokens (two seconds
each), for `pytest -m full tests/vllm`. Runs in the environment with transformers as darkformer wants it; the tests of
the plugin run in vLLM's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import darkformer
from darkformer import DarkConfig, dark_layers
from darkformer.hf.load import demo_model_path, load_tokenizer

FRONTIER = Path(__file__).parents[2] / "benchmarks" / "records" / "frontier-smollm2.json"
#: Tokens of the prompts, below and above window, sinks, chunks and blocks; and of the answers.
LENGTHS, NEW = (3, 120, 17, 1, 64, 65, 33, 200), 24
VOCABULARY = 384

#: The head dimension is one that vLLM's attention for processors takes.
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip
FORM: dict[str, Any] = dict(num_features=32, window=16, sinks=2)
#: Class, what differs from SHAPE, and the conversion.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], DarkConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, DarkConfig(**FORM)),
    "llama-heads": (
        LlamaForCausalLM, LlamaConfig, {},
        DarkConfig(**FORM, keep_exact=("0.1", "2.0"), no_features=("1.0", "2.1"), layer_windows=((1, 24),)),
    ),
    "qwen3-layer": (Qwen3ForCausalLM, Qwen3Config, {}, DarkConfig(**FORM, keep_exact=(1,))),
    # Its body is not called `model`.
    "gpt-bigcode": (
        GPTBigCodeForCausalLM, GPTBigCodeConfig, {"hidden_size": 128, "num_key_value_heads": 1, "multi_query": True},
        DarkConfig(**FORM, keep_exact=(1,)),
    ),
    "gemma3": (
        Gemma3ForCausalLM, Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 32,
         "query_pre_attn_scalar": 48},
        DarkConfig(**FORM),
    ),
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    text = [" ".join(f"word{i} the quick brown fox {i} jumps over the lazy dog" for i in range(200))]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    return tokenizer


def make_prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def answer(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=1, eos_token_id=None)
    model.generation_config.eos_token_id = None
    rows = [model.generate(torch.tensor([p]), generation_config=settings)[0, len(p) :] for p in prompts]
    return [row.tolist() for row in rows]


def move(model: Any) -> None:
    """Moves what conversion added away from its start, so that each of its terms counts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for feature_map in dark_layers(model):
            for offset in feature_map.parameters():
                offset.add_(0.05 * torch.randn(offset.shape, generator=generator))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    tokenizer, prompts = make_tokenizer(), make_prompts(LENGTHS, VOCABULARY)
    for name, (model_class, config_class, changes, form) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**{**SHAPE, **changes})).eval()
        softmax = answer(model, prompts)
        if name == "llama":
            model.save_pretrained(root / "softmax")
            tokenizer.save_pretrained(root / "softmax")
        darkformer.convert(model, form)
        move(model)
        converted = answer(model, prompts)
        model.generation_config.eos_token_id = 1
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        expected = {"prompts": prompts, "tokens": converted, "softmax": softmax}
        (root / name / "expected.json").write_text(json.dumps(expected))


def make_real(root: Path, count: int) -> None:
    """SmolLM2-135M in float32, with the heads and windows of the 10 % budget, and answers to random prompts.

    Every tenth prompt has at most 20 tokens, and every third begins as the one before it does.
    """
    source, name = str(demo_model_path()), "smollm2"
    (budget,) = (row for row in json.loads(FRONTIER.read_text())["rows"] if row["name"] == "budget-10")
    model = darkformer.load_model(source)
    darkformer.convert(model, DarkConfig.from_dict(budget["config"]))
    chance = random.Random(0)
    lengths = [chance.randint(1, 3000 if i % 10 else 20) for i in range(count)]
    prompts = make_prompts(lengths, model.config.vocab_size)
    for i in range(2, count, 3):
        shared = min(map(len, prompts[i - 1 : i + 1])) * 3 // 4
        prompts[i][:shared] = prompts[i - 1][:shared]
    answers = []
    for i, prompt in enumerate(prompts, 1):
        answers += answer(model, [prompt])
        print(f"{name}: {i} of {count} answers", flush=True)
    model.save_pretrained(root / name)
    load_tokenizer(source).save_pretrained(root / name)
    (root / name / "expected.json").write_text(json.dumps({"prompts": prompts, "tokens": answers}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=int, default=0, help="Prompts for SmolLM2-135M.")
    options = parser.parse_args()
    main(options.folder)
    if options.real:
        make_real(options.folder, options.real)
