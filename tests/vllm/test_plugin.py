"""Converted models in vLLM: the tokens of `generate`, whatever vLLM does with the requests.

`make test-vllm` runs these in vLLM's environment, with the models that `make_models.py` wrote.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: a third of the start-up
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

MODELS = Path(__file__).parents[2] / "build" / "vllm-models"
NAMES = ("llama", "llama-heads", "qwen3-layer", "gemma3")
#: Prompts are read in pieces, beside requests that decode, four at a time.
MIXED: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
PAGES = 64 << 20


@contextmanager
def engine(name: str, **options: Any) -> Iterator[LLM]:
    settings = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": PAGES,
        "enable_prefix_caching": False,
    }  # fmt: skip
    llm = LLM(model=str(MODELS / name), **{**settings, **options})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def expected(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "expected.json").read_text())


def greedy(llm: LLM, prompts: list[list[int]], new: int) -> list[Any]:
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(x.outputs[0].token_ids) for x in outputs]


def free_blocks(llm: LLM) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    want = expected(name)
    assert want["tokens"] != want["softmax"], "the conversion changes nothing, so this test would show nothing"
    with engine(name, **MIXED) as llm:
        before = free_blocks(llm)
        for _ in range(2):  # the second time in slots that hold other requests' numbers
            assert tokens(greedy(llm, want["prompts"], len(want["tokens"][0]))) == want["tokens"]
        assert free_blocks(llm) == before
