"""Converted models in vLLM: the tokens of `generate`, whatever vLLM does with the requests.

`make test-vllm` runs these in vLLM's environment, with the models that `make_models.py` wrote.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from hang import HANG_SECONDS

# Where vLLM is not installed `vllm` alone would be this folder.
pytest.importorskip("vllm.entrypoints", reason="needs vLLM: make test-vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: a third of the start-up
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

MODELS = Path(__file__).parents[2] / "build" / "vllm-models"
NAMES = ("llama", "llama-heads", "qwen3-layer", "gemma3", "gpt-bigcode")
#: Prompts are read in pieces, beside requests that decode, four at a time.
MIXED: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
PAGES = 64 << 20
#: New tokens of the answers in `expected.json`.
NEW = 24
#: Blocks, of 64 tokens or one state: enough for eight requests with prompts of 64 and 120 tokens and their states, and
#: for two of the eight more that the answers need.
PREEMPTING = (1 + 4 * (3 + 4) + 2) * 32768


@dataclass
class Served:
    """The only reference to an engine: one that lives on takes the next one's process groups along when it ends."""

    llm: Any

    @property
    def engine(self) -> Any:
        return self.llm.llm_engine

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def greedy(self, prompts: list[list[int]], new: int, **options: Any) -> list[Any]:
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **options)
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)

    def tokens(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return tokens(self.greedy(prompts, new))


@contextmanager
def engine(name: str, **options: Any) -> Iterator[Served]:
    settings = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": PAGES,
        "enable_prefix_caching": False,
    }  # fmt: skip
    served = Served(LLM(model=str(MODELS / name), **{**settings, **options}))
    try:
        yield served
    finally:
        served.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def expected(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "expected.json").read_text())


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(x.outputs[0].token_ids) for x in outputs]


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.smoke] * (x == "llama-heads")) for x in NAMES])
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    want = expected(name)
    assert want["tokens"] != want["softmax"], "the conversion changes nothing, so this test would show nothing"
    with engine(name, **MIXED) as served:
        before = served.free_blocks
        for _ in range(2):  # the second time in slots that hold other requests' numbers
            assert served.tokens(want["prompts"], NEW) == want["tokens"]
        assert served.free_blocks == before


def test_a_traced_model_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `enforce_eager` vLLM traces the model; the variable is vLLM's own for tests, and spares the compiler."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    want = expected("llama-heads")
    with engine("llama-heads", **MIXED, enforce_eager=False) as served:
        assert served.tokens(want["prompts"], NEW) == want["tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_that_was_read_before_is_not_read_again(name: str) -> None:
    """States are copied at the ends of blocks; requests that share a prefix go on from a copy each."""
    want = expected(name)
    longest = max(want["prompts"], key=len)
    answer = want["tokens"][want["prompts"].index(longest)]
    other = [*longest[:-1], longest[-1] ^ 1]  # must not find the state after the whole prompt
    with engine(name, **MIXED, enable_prefix_caching=True) as served:
        (alone,) = served.tokens([other], 4)
        assert served.tokens(want["prompts"], NEW) == want["tokens"]
        again = served.greedy([*want["prompts"], longest, longest], NEW)
        assert tokens(again) == [*want["tokens"], answer, answer]
        assert again[-1].num_cached_tokens > 0
        assert served.tokens([other], 4) == [alone]


def test_requests_that_are_thrown_out_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few blocks for all: vLLM takes a request's blocks away while it decodes, and later reads it again."""
    want, thrown = expected("qwen3-layer"), []
    pairs = [(p, a) for p, a in zip(want["prompts"], want["tokens"], strict=True) if len(p) in (64, 120)] * 4
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}
    with engine("qwen3-layer", **options, kv_cache_memory_bytes=PREEMPTING) as served:
        preempt = served.scheduler._preempt_request

        def counting(request: Any, *args: Any, **options: Any) -> None:
            thrown.append(request.request_id)
            preempt(request, *args, **options)

        monkeypatch.setattr(served.scheduler, "_preempt_request", counting)
        assert served.tokens([p for p, _ in pairs], NEW) == [answer for _, answer in pairs]
        monkeypatch.undo()
    assert thrown, "no request was thrown out: this showed nothing"


def test_aborted_requests_leave_nothing_behind() -> None:
    want = expected("llama-heads")
    settings = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with engine("llama-heads", **MIXED) as served:
        before, aborted = served.free_blocks, ["1", "3", "5", "6"]
        to_abort = list(aborted)
        kept = {str(i): x for i, x in enumerate(want["tokens"]) if str(i) not in aborted}
        answers = {}
        for i, p in enumerate(want["prompts"]):
            served.engine.add_request(str(i), {"prompt_token_ids": p}, settings)
        step = 0
        while served.engine.has_unfinished_requests():
            for output in served.engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
            if step % 2 == 0 and to_abort:
                served.engine.abort_request([to_abort.pop(0)])
        assert {i: answers[i] for i in kept} == kept
        assert all(len(answers.get(i, [])) < NEW for i in aborted)
        assert served.free_blocks == before


def test_bfloat16_is_near_float32() -> None:
    """Of random weights a token may change; the distribution of the next one may not, by much."""
    want, found = expected("llama-heads"), {}
    for dtype in ("float32", "bfloat16"):
        with engine("llama-heads", **MIXED, dtype=dtype) as served:
            outputs = served.greedy(want["prompts"], 1, logprobs=5)
        found[dtype] = [{k: x.logprob for k, x in out.outputs[0].logprobs[0].items()} for out in outputs]
    for exact, rounded in zip(found["float32"], found["bfloat16"], strict=True):
        both = set(exact) & set(rounded)
        assert len(both) >= 3 and max(abs(exact[k] - rounded[k]) for k in both) < 0.25


def test_models_of_others_are_left_alone() -> None:
    want = expected("llama")
    with engine("softmax", **MIXED) as served:
        assert served.engine.model_config.architecture == "LlamaForCausalLM"
        assert served.tokens(want["prompts"], NEW) == want["softmax"]


def test_what_states_do_not_follow_is_refused() -> None:
    with pytest.raises(Exception, match="tensor_parallel_size=2: the heads of a converted layer"):
        LLM(model=str(MODELS / "llama"), tensor_parallel_size=2, enforce_eager=True)


def test_the_server_answers(tmp_path: Path) -> None:
    """`vllm serve FOLDER` with no option about darkformer, and a request as curl sends it."""
    want = expected("qwen3-layer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODELS / "qwen3-layer")]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(PAGES), "--served-model-name", "small"]
    environment = {k: x for k, x in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        body = {"model": "small", "prompt": want["prompts"][1], "max_tokens": NEW, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        request = Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = None
        for _ in range(HANG_SECONDS):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urlopen(request, timeout=HANG_SECONDS) as response:
                    answer = json.load(response)
                break
            except URLError:
                time.sleep(1)
        assert answer is not None, log.read_text()[-3000:]
        assert answer["choices"][0]["token_ids"] == want["tokens"][1]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(HANG_SECONDS)


@pytest.mark.full
@pytest.mark.skipif(not (MODELS / "smollm2").is_dir(), reason="make_models.py --real 200 was not run")
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 16, "max_num_batched_tokens": 512},
        {"max_num_seqs": 4, "max_num_batched_tokens": 2048, "enable_prefix_caching": True},
    ],
    ids=["mixed", "prefixes"],
)
def test_a_real_model_answers_as_generate_does(options: dict[str, Any]) -> None:
    want = expected("smollm2")
    with engine("smollm2", **options, max_model_len=4096, kv_cache_memory_bytes=4 << 30) as served:
        found = served.tokens(want["prompts"], NEW)
    wrong = [len(p) for p, a, b in zip(want["prompts"], found, want["tokens"], strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(found)} answers differ, after prompts of {wrong} tokens"


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def under_load(name: str, total: int) -> tuple[int, int, int]:
    """Requests of random lengths, every tenth aborted at some time, 100 of them kept to ask again alone.

    Returns:
        Blocks that are missing afterwards, bytes that the process grew by after the first tenth, and wrong answers.
    """
    chance = random.Random(0)
    sampled: dict[str, tuple[list[int], int]] = {}
    answers: dict[str, list[int]] = {}
    with engine(name, max_num_seqs=32, max_num_batched_tokens=256) as served:
        free, started, running = served.free_blocks, 0, set()
        after_a_tenth = 0
        while started < total or running:
            while started < total and len(running) < 40:
                prompt, new = [chance.randint(2, 383) for _ in range(chance.randint(1, 150))], chance.randint(1, 16)
                settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
                served.engine.add_request(str(started), {"prompt_token_ids": prompt}, settings)
                running.add(str(started))
                if started % max(1, total // 100) == 0:
                    sampled[str(started)] = prompt, new
                started += 1
                if started == total // 10:
                    after_a_tenth = resident()
            if chance.random() < 0.01 * len(running) and (others := sorted(running - set(sampled))):
                aborted = chance.choice(others)
                served.engine.abort_request([aborted])
                running.discard(aborted)
            for output in served.engine.step():
                if output.finished:
                    running.discard(output.request_id)
                    answers[output.request_id] = list(output.outputs[0].token_ids)
        grown = resident() - after_a_tenth
        wrong = sum([answers[x]] != served.tokens([prompt], new) for x, (prompt, new) in sampled.items())
        return free - served.free_blocks, grown, wrong


@pytest.mark.full
def test_ten_thousand_requests_leave_no_trace() -> None:
    """Blocks as before, and 100 answers are right; memory grows as vLLM's own softmax does, which is not by nothing."""
    grown = {}
    for name in ("softmax", "llama-heads"):  # a process each: what one gave back the other would take
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            missing, grown[name], wrong = pool.submit(
                under_load, name, int(os.environ.get("REQUESTS", "10000"))
            ).result()
        assert (missing, wrong) == (0, 0)
    assert grown["llama-heads"] - grown["softmax"] < 16 << 20, grown
