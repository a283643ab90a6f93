"""Two processes (gloo, CPU) train as one with the same global batch: DDP by HF's Trainer and `finetune`, and FSDP2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hang import HANG_SECONDS
from hf.families import linear

import darkformer
from darkformer import ConfigError, TrainConfig, finetune, redraw
from train import distributed

SCRIPT = Path(distributed.__file__)
#: Relative difference of two float32 losses whose gradients were added in another order, after a few AdamW steps.
FLOAT32 = 1e-5
#: The same of bfloat16 weights, whose gradients are rounded to 2^-9 before they are added.
BFLOAT16 = 1e-2


def _launch(mode: str, folder: Path, *flags: str) -> dict[str, Any]:
    """`accelerate launch` with two processes on this machine; what the first one wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(darkformer.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", str(port), *flags, str(SCRIPT), mode, str(folder / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def _first_draw_and_last() -> tuple[str, str]:
    model = linear("llama")
    first = distributed.omega(model)
    redraw(model, distributed.STEPS)
    return first, distributed.omega(model)


def _same_run(run: dict[str, Any], alone: dict[str, Any]) -> None:
    assert run["losses"] == pytest.approx(alone["losses"], rel=FLOAT32)
    assert len(set(run["losses"])) == distributed.STEPS
    first, last = _first_draw_and_last()
    assert alone["omegas"] == [last] and run["omegas"] == [last, last] and first != last


# `--multi_gpu` is accelerate's name for several processes by torch's launcher; the script says use_cpu.
def test_ddp_is_one_process(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    run = _launch("trainer", tmp_path, "--multi_gpu")
    assert run["trainer"]["wrapper"] == "DistributedDataParallel" and run["trainer"]["world"] == 2
    _same_run(run["trainer"], distributed.by_trainer())
    _same_run(run["finetune"], distributed.by_finetune(tmp_path / "alone"))


def test_fsdp2_is_one_process(tmp_path: Path) -> None:
    run = _launch("fsdp2", tmp_path, "--multi_gpu")
    assert run["wrapper"] == "DTensor 1"  # M of two key/value heads, one on each process
    _same_run(run, distributed.by_loop())


def test_fsdp_of_a_bfloat16_model_is_one_process(tmp_path: Path) -> None:
    run, alone = _launch("half", tmp_path, "--multi_gpu"), distributed.by_loop(dtype=torch.bfloat16)
    assert run["fsdp2"]["wrapper"] == "DTensor 1"
    for sharded in run.values():
        assert sharded["losses"] == pytest.approx(alone["losses"], rel=BFLOAT16)
        assert sharded["omegas"] == alone["omegas"] * 2
        assert len(set(sharded["losses"])) == distributed.STEPS


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"batch_size=3 does not divide among 2 processes"):
        finetune(linear("llama"), distributed.ROWS, TrainConfig(steps=1, batch_size=3, seq_len=24), tmp_path)
