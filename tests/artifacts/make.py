"""Writes what this version saves, and the logits it computes: `python tests/artifacts/make.py`, once a release.

A folder that is there is never written again: later versions must load it as it is (tests/hf/test_artifacts.py).
"""

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import darkformer

HERE = Path(__file__).parent
PROMPT = 32


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def write_cache(model: LlamaForCausalLM, ids: torch.Tensor, folder: Path) -> None:
    """The state after `PROMPT` tokens; the recorded logits of the others say what must come out of it."""
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    darkformer.save_cache(cache, model, folder / "prompt.safetensors")


def write(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there: what a version has written stays as it is.")
    ids = torch.randint(3, 40, (2, 48), generator=torch.Generator().manual_seed(1))
    softmax = base()
    softmax.save_pretrained(folder / "base")
    recorded = {"input_ids": ids}
    for name, config in {
        "default": darkformer.DarkConfig(num_features=8, window=4, sinks=2),
        "paper": darkformer.DarkConfig.paper(num_features=8),
    }.items():
        model = darkformer.convert(copy.deepcopy(softmax), config)
        darkformer.calibrate(model, [ids])
        darkformer.save_light(model, folder / name / "light")
        model.save_pretrained(folder / name / "full")
        with torch.no_grad():
            recorded[name] = model(ids, use_cache=False).logits
        write_cache(model, ids, folder / name)
    save_file(recorded, folder / "recorded.safetensors")


if __name__ == "__main__":
    write(HERE / darkformer.__version__)
