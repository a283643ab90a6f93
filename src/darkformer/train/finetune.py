"""Finetuning through Hugging Face's Trainer: parameter groups, checkpoints by step, clean interrupts."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import TrainConfig
from ..errors import ConfigError, NonFiniteError, RunFolderError
from ..hf.layers import dark_layers
from ..hf.load import without_bars
from .distill import distillation_loss
from .redraw import Redraw
from .window_dropout import WindowDropout

#: Projections of queries, keys and values, by the names transformers' families use (fused ones included).
QKV = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv)\.(weight|bias)$")
#: Called with (step, loss) after each optimizer step.
StepHook = Callable[[int, float], None]


class Interrupted(KeyboardInterrupt):
    """Training was interrupted; a checkpoint of the last complete step was written, so it can be resumed."""


def trainable_parameters(model: nn.Module, group: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(the model's own parameters, what conversion added) that learn under `group`.

    Raises:
        ConfigError: nothing would learn, or of `qkv` no projection.
    """
    added = [p for fm in dark_layers(model) for p in fm.parameters()]
    ids = {id(p) for p in added}
    own = [
        p
        for name, p in model.named_parameters()
        if id(p) not in ids and (group == "all" or (group == "qkv" and QKV.search("." + name)))
    ]
    if group == "qkv" and not own:
        raise ConfigError(
            f"train={group!r}: no parameter of this model has a name that queries, keys and values usually have "
            "(q_proj, c_attn, …): use train='all'."
        )
    if not own and not added:
        raise ConfigError(
            f"train={group!r}: conversion added nothing to this model that learns (the paper's performer, window and "
            "sinks alone, and heads whose features calibration dropped have nothing): use train='qkv' or 'all'."
        )
    return own, added


def _bad_gradient(model: Any) -> str | None:
    """Name of the first parameter whose gradient is not finite."""
    grads = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, grad in grads if not bool(torch.isfinite(grad.sum()))), None)


class _Trainer(Trainer):
    """HF's Trainer with two learning rates and a loss that is checked at every step."""

    def __init__(
        self, training: TrainConfig, own: list[nn.Parameter], added: list[nn.Parameter], teacher: Any, **options: Any
    ) -> None:
        super().__init__(**options)
        self.training, self.own, self.added, self.teacher = training, own, added, teacher

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        ids = inputs["input_ids"]
        with torch.no_grad():
            expected = self.teacher.to(ids.device)(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids, use_cache=False).logits
        return distillation_loss(logits, expected, inputs["labels"], self.training.distill)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            decay = self.training.weight_decay
            matrices = [p for p in self.own if p.dim() >= 2]
            rest = [p for p in self.own if p.dim() < 2]
            groups = [
                {"params": matrices, "lr": self.training.lr, "weight_decay": decay},
                {"params": rest, "lr": self.training.lr, "weight_decay": 0.0},
                {"params": self.added, "lr": self.training.geometry_lr, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step = self.state.global_step + 1
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        try:
            loss = super().training_step(*args, **kwargs)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step}: {error} ({kept})") from error
        if not math.isfinite(float(loss)):
            raise NonFiniteError(f"step {step}: the loss is {float(loss)}; {kept}. Lower the learning rate.")
        if (name := _bad_gradient(self.model)) is not None:  # before it reaches the weights and the next checkpoint
            raise NonFiniteError(f"step {step}: the gradient of {name} holds NaN or infinity; {kept}.")
        return loss


class _Steps(TrainerCallback):
    """Reports each step's loss, and turns the first Ctrl-C into a checkpoint and a clean stop."""

    def __init__(self, on_step: StepHook | None, after_step: Mapping[int, Callable[[], None]]) -> None:
        self.on_step, self.after_step, self.interrupted = on_step, after_step, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.on_step and logs and "loss" in logs:
            self.on_step(state.global_step, logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hook := self.after_step.get(state.global_step):
            hook()
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        elif state.global_step % args.save_steps:
            control.should_save = False  # Trainer saves after the last step too; the caller of finetune saves the model


@contextlib.contextmanager
def _gentle_interrupt(steps: _Steps) -> Iterator[None]:
    """The first SIGINT finishes the step and saves; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        steps.interrupted = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _sequences_here(training: TrainConfig) -> int:
    """This process's share of a step's sequences; `accelerate launch` and `torchrun` set WORLD_SIZE."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if training.batch_size % processes:
        raise ConfigError(
            f"batch_size={training.batch_size} does not divide among {processes} processes: "
            "it counts the sequences of one optimizer step, so give a multiple of the processes."
        )
    return training.batch_size // processes


def _arguments(training: TrainConfig, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=training.steps,
        per_device_train_batch_size=_sequences_here(training),
        learning_rate=training.lr,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        bf16=training.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def _complete(checkpoint: Path) -> bool:
    """Trainer writes its state last, so a process killed while it saved leaves none, or half of one."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return bool(state["global_step"] == _step_of(str(checkpoint)))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _checkpoint(out: Path, resume: bool) -> str | None:
    """The last complete checkpoint in `out`, which only a resumed run may find there: it would be taken for this run's.

    A resumed run deletes the ones that a kill cut short.
    """
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    while last and resume and not _complete(Path(last)):
        shutil.rmtree(last)
        last = get_last_checkpoint(str(out))
    if last and not resume:
        raise RunFolderError(f"{out} holds {Path(last).name} of another run: resume=True continues it.")
    return last


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rsplit("-", 1)[1])


class _Blocks(Dataset[Tensor]):
    """Rows of a tensor, which may be mapped from a file."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index]


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "labels": ids}


@contextlib.contextmanager
def _learning(model: Any, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Within the block only `chosen` learn; afterwards flags, configs and mode are as a caller expects them."""
    configs = [(fm, fm.config) for fm in dark_layers(model)]  # `WindowDropout` changes them within a step
    before = {p: p.requires_grad for p in model.parameters()}
    use_cache = getattr(model.config, "use_cache", None)  # Trainer turns it off, and save_pretrained would keep that
    ids = {id(p) for p in chosen}
    try:
        for p in before:
            p.requires_grad_(id(p) in ids)
        yield
    finally:
        for fm, config in configs:
            fm.config = config
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()


def _callbacks(training: TrainConfig) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if training.redraw_every:
        callbacks.append(Redraw(training.redraw_every))
    if training.window_dropout:
        callbacks.append(WindowDropout(training.window_dropout, training.seed))
    return callbacks


def _losses(state: TrainerState) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def finetune(
    model: Any,
    blocks: Tensor,
    training: TrainConfig,
    out: str | Path,
    *,
    teacher: Any = None,
    resume: bool = False,
    on_step: StepHook | None = None,
    after_step: Mapping[int, Callable[[], None]] | None = None,
) -> list[float]:
    """Trains `model` in place on token blocks (N, L) with HF's Trainer.

    Args:
        training: steps, rates, which parameters learn, precision.
        teacher: the softmax model whose distributions count `training.distill` in the loss, see `distill.teacher_of`.
        out: folder of the checkpoints (`checkpoint-STEP`, by transformers).
        resume: continue at the last checkpoint in `out`; the losses are those of an uninterrupted run.
        on_step: called with (step, loss).
        after_step: what to call once those steps are done (an evaluation, say).

    Returns:
        The loss of each step, those before an interruption included.

    Raises:
        ConfigError: nothing to train, a batch that does not divide among the processes, or `training.distill` without a
        teacher. RunFolderError: `out` holds
        checkpoints and `resume` is False. NonFiniteError: loss, queries, keys or values stopped being finite (names the
        step, the layer or parameter, the last good checkpoint). Interrupted: Ctrl-C, after a checkpoint was written.
    """
    if not training.trains:
        return []
    if training.distill and teacher is None:
        raise ConfigError(f"distill={training.distill} needs a teacher: the softmax model, by `teacher_of`.")
    own, added = trainable_parameters(model, training.train)
    checkpoint = _checkpoint(Path(out), resume)
    steps = _Steps(on_step, after_step or {})
    with _learning(model, own + added):
        trainer = _Trainer(
            training,
            own,
            added,
            teacher if training.distill else None,
            model=model,
            args=_arguments(training, Path(out)),
            train_dataset=_Blocks(blocks),
            data_collator=_collate,
            # A redraw before what is called after the step: an evaluation there sees what the next step trains.
            callbacks=[*_callbacks(training), steps],
        )
        trainer.remove_callback(PrinterCallback)
        if checkpoint and _step_of(checkpoint) >= training.steps:
            trainer._load_from_checkpoint(checkpoint)  # `train` would take one step too many before it looks
            return _losses(TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")))
        with _gentle_interrupt(steps), without_bars():
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except (EOFError, UnpicklingError) as error:  # an empty or altered file of optimizer, schedule or seeds
                raise RunFolderError(f"{checkpoint} is damaged: delete it, and resume from the one before.") from error
            if steps.interrupted and not (Path(out) / f"checkpoint-{trainer.state.global_step}").is_dir():
                trainer._save_checkpoint(model, trial=None)  # Ctrl-C came after the last step's own chance to save
    losses = _losses(trainer.state)
    interrupted_at = trainer.state.global_step
    del trainer
    gc.collect()  # a Trainer is full of reference cycles, and its optimizer's state is twice the model
    if steps.interrupted:  # also in the last step: whoever called would go on with the next piece of work
        raise Interrupted(f"interrupted at step {interrupted_at} of {training.steps}; resume continues there.")
    return losses
