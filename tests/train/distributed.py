"""What tests/train/test_distributed.py starts on several processes: `distributed.py MODE OUT.json`.

`trainer` is HF's Trainer after `convert`, then `darkformer.finetune` (DDP when there is more than one process);
`fsdp2` is torch's `fully_shard` with a plain loop, as in torch's own tutorial; `half` is that of a bfloat16 model, then
FSDP1 of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from hf.families import linear, tokens

from darkformer import Redraw, TrainConfig, dark_layers, finetune, redraw

STEPS, GLOBAL_BATCH, REDRAW_EVERY, LR = 6, 4, 2, 3e-3
ROWS = tokens(STEPS * GLOBAL_BATCH, 24)


def omega(model: Any) -> str:
    """A fingerprint of every layer's Ω."""
    rows = b"".join(layer.projection.numpy().tobytes() for layer in dark_layers(model))
    return hashlib.sha256(rows).hexdigest()


def _everywhere(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def by_trainer() -> dict[str, Any]:
    model = linear("llama")
    world = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world, learning_rate=LR,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, seed=3, data_seed=3, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ROWS]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Redraw(REDRAW_EVERY)])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    wrapper = type(trainer.model_wrapped).__name__
    return {"losses": losses, "omegas": _everywhere(omega(model)), "wrapper": wrapper, "world": world}


def by_finetune(folder: Path) -> dict[str, Any]:
    """The same through `finetune`, whose batch size counts the sequences of all processes, with checkpoints."""
    model = linear("llama")
    budget = TrainConfig(
        steps=STEPS, batch_size=GLOBAL_BATCH, seq_len=24, lr=LR, geometry_lr=LR, warmup=0, dtype="float32",
        redraw_every=REDRAW_EVERY, save_every=4,
    )  # fmt: skip
    losses = finetune(model, ROWS, budget, folder)
    assert (folder / "checkpoint-4" / "model.safetensors").is_file()
    return {"losses": losses, "omegas": _everywhere(omega(model))}


def by_loop(shard: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """`shard`: "fsdp2", "fsdp1", or one process without."""
    model: Any = linear("llama").to(dtype).train()
    world, rank = (dist.get_world_size(), dist.get_rank()) if shard else (1, 0)
    if shard == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if shard == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, here = [], GLOBAL_BATCH // world
    for step, batch in enumerate(ROWS.split(GLOBAL_BATCH), start=1):
        mine = batch[rank * here : (rank + 1) * here]
        loss: Tensor = model(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(_everywhere(loss.item())) / world)
        if step % REDRAW_EVERY == 0:
            redraw(model, step)
    learned = next(dark_layers(model)).geometry_offset
    shards = type(learned).__name__
    if shard == "fsdp2":
        shards = f"{type(learned.data).__name__} {learned.to_local().shape[0]}"
    return {"losses": losses, "omegas": _everywhere(omega(model)), "wrapper": shards, "world": world}


def main(mode: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if mode in ("fsdp2", "half"):
        dist.init_process_group("gloo")
    if mode == "fsdp2":
        result = by_loop("fsdp2")
    elif mode == "half":
        result = {shard: by_loop(shard, torch.bfloat16) for shard in ("fsdp2", "fsdp1")}
    else:
        result = {"trainer": by_trainer(), "finetune": by_finetune(Path(out).parent / "finetune")}
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
