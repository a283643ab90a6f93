"""The main job: a pretrained decoder in, a linearized one out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.budget import (  # fmt: skip
    Budget,
    Choice,
    Chooser,
    cache_element_bytes,
    calibrate_within,
    check_asked_budget,
    check_budget,
    check_budget_config,
    converted_bytes,
    counts_features,
    full_context,
    settled,
)
from ..calibration.calibrate import calibrate
from ..calibration.sensitivity import sensitivity
from ..config import CONTEXT, EVALUATION_TOKENS, DarkConfig, TrainConfig
from ..errors import InputError, RunFolderError
from ..hf.convert import convert
from ..hf.layers import config_of
from ..hf.load import load_config, load_model, load_tokenizer, save_model
from ..hf.plan import plan_conversion
from ..hf.saved_config import is_converted
from ..records import (  # fmt: skip
    RECORD_FILE,
    check_folder,
    environment,
    finish_run,
    finished_record,
    open_run,
    read_kept,
    write_json,
    write_kept,
)
from ..reporting import Reporter, Silent
from .card import model_card
from .data import blocks_of, load_documents, prefix_of, split_documents, text_size, tokens_of
from .distill import teacher_of
from .evaluate import evaluate
from .finetune import finetune, trainable_parameters
from .transfer import transfer

#: Reports of the stages so far, beside the model that they left.
STAGES_FILE = "stages.json"
#: Scores of the softmax model, among the checkpoints.
SOFTMAX_FILE = "softmax.json"
#: Heads and windows of a budget, beside the scores that they were chosen by.
CHOICE_FILE = "choice.json"
#: Tokens of the calibration pass, and of the text that heads are chosen on.
CALIBRATION_TOKENS, CHOICE_TOKENS = 12288, 8192


class _Inputs(NamedTuple):
    """What a run begins with: the softmax model, and its text in blocks of token ids."""

    model: Any
    tokenizer: Any
    blocks: Tensor  # (N, seq_len), to train on
    long_blocks: Tensor  # (N, context), the same text, to choose heads and calibrate on
    validation: Tensor  # (N, context), what scores are measured on


class Within(NamedTuple):
    """Bytes that a calibrated model has to keep within: the arguments of `calibrate_within`."""

    limit: int | None
    length: int
    element_bytes: int


def calibration_batches(blocks: Tensor) -> list[Tensor]:
    """The first `CALIBRATION_TOKENS` of the training text, two blocks a batch; long blocks alone, but the last two."""
    chosen = blocks[: max(2, CALIBRATION_TOKENS // blocks.shape[1])]
    if blocks.shape[1] <= CONTEXT // 2:
        return list(chosen.split(2))
    return [*chosen[:-2].split(1), chosen[-2:]] if len(chosen) > 2 else [chosen]


def choice_batches(blocks: Tensor) -> list[Tensor]:
    """The first `CHOICE_TOKENS` of the training text, one block a batch."""
    return list(blocks[: max(2, CHOICE_TOKENS // blocks.shape[1])].split(1))


def convert_and_calibrate(
    model: Any, config: DarkConfig, blocks: Tensor, reporter: Reporter, title: str, within: Within | None = None,
    *, drop: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Converts `model` in place and calibrates it, within bytes if there are any; the heads' choices as plain dicts.

    Args:
        drop: see `calibrate`.
    """
    convert(model, config)
    batches = calibration_batches(blocks)
    with reporter.stage(f"{title}: calibrate", len(batches)) as advance:
        if within is None:
            return [asdict(choice) for choice in calibrate(model, batches, drop=drop, progress=advance)]
        choices = calibrate_within(model, batches, **within._asdict(), progress=advance)
        return [asdict(choice) for choice in choices]


def scored(model: nn.Module, blocks: Tensor, dtype: str, reporter: Reporter, title: str) -> dict[str, Any]:
    """`evaluate` as a stage; plain values."""
    with reporter.stage(f"{title}: evaluate", len(blocks)) as advance:
        return evaluate(model, blocks, dtype=dtype, progress=advance).to_dict()


def trained(
    model: nn.Module, blocks: Tensor, training: TrainConfig, folder: Path, reporter: Reporter, title: str,
    teacher: Any = None,
) -> list[float]:  # fmt: skip
    """`finetune` as a stage, if there is anything to do; resumes at the last checkpoint in `folder`."""
    if not training.trains:
        return []
    with reporter.stage(f"{title}: finetune", training.steps) as advance:
        return finetune(
            model, blocks, training, folder, resume=True, teacher=teacher,
            on_step=lambda step, loss: advance(step, training.steps, loss),
        )  # fmt: skip


def _say_if_worse(scores: Mapping[str, Mapping[str, Any]], training: TrainConfig, reporter: Reporter) -> None:
    """Warns where finetuning raised the held-out loss."""
    before, after = scores.get("transferred", scores["converted"])["loss"], scores["finetuned"]["loss"]
    if after > before:
        reporter.say(
            f"Finetuning made it worse on held-out text, {before:.3f} → {after:.3f} nats a token: --lr {training.lr:g} "
            "may be too much for this model. Give a quarter of it, or --train qkv."
        )


def transferred(
    model: Any, blocks: Tensor, training: TrainConfig, folder: Path, reporter: Reporter, title: str
) -> list[dict[str, Any]]:
    """`transfer` as a stage, if there are steps for it; continues where a checkpoint in `folder` stops."""
    if not training.transfer_steps:
        return []
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(training.seed))
    batches = list(blocks[order[: training.transfer_steps + 1]].split(1))
    with reporter.stage(f"{title}: transfer", training.transfer_steps) as advance:
        layers = transfer(
            model, batches, steps=training.transfer_steps, lr=training.transfer_lr, dtype=training.dtype, folder=folder,
            progress=advance,
        )  # fmt: skip
    for layer in layers:
        if layer.stopped:
            reporter.say(f"transfer, layer {layer.layer}: {layer.stopped}; kept as of step {layer.kept_step}.")
    return [asdict(layer) for layer in layers]


def _once(file: Path, make: Callable[[], Mapping[str, Any]], read: Callable[[Any], Any]) -> Any:
    """What `read` gives of what `make` gave: made once a run, and kept in the file."""
    if not file.is_file():
        write_kept(file, make())
    return read_kept(file, read)


def _score(kept: Any) -> dict[str, Any]:
    """A score as it was kept; fails before anything is trained if it is none."""
    return {**kept, **{name: kept[name] + 0 for name in ("loss", "perplexity", "accuracy", "tokens")}}


def _stages(kept: Any) -> dict[str, Any]:
    """The reports of the stages as they were kept."""
    return {
        "calibration": list(kept["calibration"]),
        "transfer": list(kept["transfer"]),
        "scores": dict(kept["scores"]),
    }


def _calibrated_and_transferred(
    model: Any, tokenizer: Any, config: DarkConfig, blocks: Tensor, validation: Tensor, training: TrainConfig,
    within: Within | None, folder: Path, reporter: Reporter,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The stages before finetuning: the model, and their reports `calibration` and `transfer`, and `scores`.

    What each leaves is kept in the folder, from where a run that goes on takes it, as long as anything is left to do.
    """
    title, files = config.method, {name: folder / name / STAGES_FILE for name in ("calibrated", "transferred")}

    def keep(name: str) -> None:
        save_model(model, tokenizer, files[name].parent)
        write_kept(files[name], stages)  # last: it says that the model is complete

    done = next((name for name in ("transferred", "calibrated") if files[name].is_file()), None)
    if done is not None:
        stages: dict[str, Any] = read_kept(files[done], _stages)
        model = load_model(str(files[done].parent))
    else:
        # Transfer decides itself, later, which features pay.
        choices = convert_and_calibrate(
            model, config, blocks, reporter, title, within, drop=not training.transfer_steps
        )
        scores = {"converted": scored(model, validation, training.dtype, reporter, "converted")}
        stages = {"calibration": choices, "transfer": [], "scores": scores}
        if training.learns:
            keep("calibrated")
    if training.transfer_steps and done != "transferred":
        stages["transfer"] = transferred(model, blocks, training, folder, reporter, title)
        stages["scores"]["transferred"] = scored(model, validation, training.dtype, reporter, "transferred")
        keep("transferred")
        shutil.rmtree(files["calibrated"].parent)
    return model, stages


def load_tokens(
    sources: Sequence[str], held_out: Sequence[str], tokenizer: Any, reporter: Reporter | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens to train and to validate on; without `held_out` sources, every eighth document is held out."""
    reporter = reporter or Silent()
    with reporter.stage("read the text", 1):
        texts = load_documents(sources)
        documents = (texts, load_documents(held_out)) if held_out else split_documents(texts)
    first, rest = map(text_size, documents)
    with reporter.stage("tokenize the text", first + rest) as advance:
        train = tokens_of(tokenizer, documents[0], progress=lambda done, _: advance(done, first + rest))
        return train, tokens_of(tokenizer, documents[1], progress=lambda done, _: advance(first + done, first + rest))


def load_context_text(
    sources: Sequence[str], held_out: Sequence[str], tokenizer: Any, context: int, reporter: Reporter | None = None
) -> tuple[Tensor, Tensor]:
    """`load_tokens` in blocks (N, context) of the context a model is used at.

    Raises:
        InputError: less text than one such block (says how much there is).
    """
    return _in_context(load_tokens(sources, held_out, tokenizer, reporter), context, prefix_of(tokenizer))


def begins(tokenizer: Any) -> dict[str, list[int]]:
    """A run's setting for what each sequence begins with; none for tokenizers that begin texts with nothing.

    Earlier versions left it out, so that scores of their unfinished runs must not stand beside new ones.
    """
    prefix = prefix_of(tokenizer)
    return {"begins": prefix} if prefix else {}


def _in_context(tokens: tuple[Tensor, Tensor], context: int, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
    advice = "give more text, or a smaller --context"
    first, rest = (
        blocks_of(some, context, prefix, part, advice)
        for some, part in zip(tokens, ("the calibration", "the held-out"), strict=True)
    )
    return first, rest


def check_context(model_config: Any, context: int) -> None:
    """Sequences of `context` tokens must find their positions: a model with an embedding of each has no more.

    Args:
        model_config: transformers' configuration of the model.

    Raises:
        InputError: they do not.
    """
    settings = model_config.get_text_config(decoder=True)
    most = getattr(settings, "max_position_embeddings", None)
    if most and context > most and not getattr(settings, "rope_parameters", None):
        raise InputError(f"context={context}: this model has positions for {most} tokens. Give a smaller --context.")


def check_not_converted(model_name: str) -> None:
    """Refuses a converted model before its weights are read. GGUF files hold none.

    Raises:
        InputError: it is converted.
    """
    if not model_name.lower().endswith(".gguf") and is_converted(load_config(model_name).to_dict()):
        raise InputError(f"{model_name} is converted already: give the softmax model that it was made from.")


def chosen(
    model: Any, tokenizer: Any, blocks: Tensor, limit: Budget, config: DarkConfig, reporter: Reporter, folder: Path,
    dtype: str, count_features: bool,
) -> Choice:  # fmt: skip
    """Exact heads and windows for one budget, from the first blocks (N, context) of the training text."""

    def choice() -> dict[str, Any]:
        batches = choice_batches(blocks)
        with reporter.stage("which heads need softmax", 1) as advance:
            found = sensitivity(
                model, batches, tokenizer=tokenizer, sinks=config.sinks, folder=folder, dtype=dtype, progress=advance
            )  # fmt: skip
        with reporter.stage("heads and windows for the budget", 1):
            chooser = Chooser(
                model, batches, found, tokenizer=tokenizer, config=config, dtype=dtype, count_features=count_features,
                folder=folder,
            )  # fmt: skip
            return chooser.choose(limit).to_dict()

    found: Choice = _once(folder / CHOICE_FILE, choice, Choice.from_dict)
    return found


def _inputs(
    model_name: str, data: Sequence[str], held_out: Sequence[str], context: int, seq_len: int, reporter: Reporter
) -> _Inputs:
    """Reads model and text, and checks that they fit together."""
    tokenizer = load_tokenizer(model_name)
    check_not_converted(model_name)
    tokens = load_tokens(data, held_out, tokenizer, reporter)
    prefix = prefix_of(tokenizer)
    long_blocks, validation = _in_context(tokens, context, prefix)
    blocks = blocks_of(tokens[0], seq_len, prefix, "the training")
    with reporter.stage("load the model", 1):
        model = load_model(model_name)
    check_context(model.config, context)
    return _Inputs(model, tokenizer, blocks, long_blocks, validation[: max(1, EVALUATION_TOKENS // context)])


def linearize(
    model_name: str,
    out: str | Path,
    *,
    data: Sequence[str],
    held_out: Sequence[str] = (),
    config: DarkConfig,
    training: TrainConfig,
    context: int = CONTEXT,
    budget: str | None = None,
    budget_at: int | None = None,
    measure_frontier: Callable[[Any, Any, Tensor, Tensor, Path], dict[str, Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Converts, calibrates, finetunes and saves a pretrained decoder.

    Args:
        model_name: hub id, folder or `.gguf` file.
        out: run folder: `model/` (weights, tokenizer and card, loadable by transformers after `import darkformer`),
            `record.json`, `checkpoints/` while training.
        data, held_out: text files, globs, `pydoc`, or dataset names.
        context: tokens of the sequences that calibration, the choice of heads and scores use; training has its own
            (`training.seq_len`).
        budget: bytes a sequence may keep, as `calibration.budget.Budget.parse` reads them (`10%`, `64MB`, `0`): exact
            heads and windows are chosen for it, in place of those of `config`. None, or `none`: `config` as it is.
            `usual`: 10 % where that is possible, else none.
        budget_at: tokens it is counted at; the most that the model reads without.
        measure_frontier: called once a budget's heads are chosen and before anything else happens to the model, with
            the softmax model, the tokenizer, blocks (N, context) to choose and calibrate on, others that scores use,
            and the run's folder; what it returns goes into the record as `frontier`.

    Returns:
        The record, as written to `record.json`.

    Raises:
        DarkformerError: bad input, a folder that holds another run, a diverging loss.
    """
    out, reporter = Path(out), reporter or Silent()
    checkpoints = out / "checkpoints"
    if resume and overwrite:
        raise RunFolderError("--resume and --overwrite contradict each other: give one of them.")
    check_asked_budget(budget, config, context)
    check_folder(out)
    started = time.perf_counter()
    model, tokenizer, blocks, long_blocks, validation = _inputs(
        model_name, data, held_out, context, training.seq_len, reporter
    )
    at = budget_at or full_context(model)

    def possible(text: str) -> tuple[str, Budget, bool]:
        limit = Budget.parse(text, at)
        check_budget_config(config, context)
        count_features = counts_features(limit, config, training)
        check_budget(model, limit, config, dtype=training.dtype, count_features=count_features)
        return text, limit, count_features

    budget, limit, count_features = settled(budget, possible, reporter.say) or (None, None, False)
    # Records of version 0.1 began it: `budget` is the TrainConfig, `memory` what this file calls budget.
    settings = {
        "command": "linearize", "model": model_name, "data": list(data), "held_out": list(held_out),
        "config": config.to_dict(), "budget": asdict(training), "context": context, "memory": budget,
        "memory_at": budget_at,
    }  # fmt: skip
    settings |= begins(tokenizer)
    element_bytes = cache_element_bytes(model, training.dtype)
    number = training.dtype if training.dtype == "bfloat16" else str(model.dtype).removeprefix("torch.")
    counted = f"counted at {element_bytes} bytes a number ({number})"
    reporter.say(str(plan_conversion(model, config)))  # before the folder is claimed
    if training.trains and training.train == "qkv":
        trainable_parameters(model, training.train)
    continues = open_run(out, settings, resume=resume, overwrite=overwrite)
    if continues and (record := finished_record(out)) is not None:
        reporter.say(f"{out} is finished: nothing left to do.")
        return record
    softmax = _once(
        checkpoints / SOFTMAX_FILE, lambda: scored(model, validation, training.dtype, reporter, "softmax"), _score
    )
    scores = {"softmax": softmax}
    choice, within, frontier, kept = None, None, None, None
    if limit is not None:
        choice = chosen(
            model, tokenizer, long_blocks, limit, config, reporter, out / "sensitivity", training.dtype, count_features
        )  # fmt: skip
        reporter.say(f"a budget of {limit}, {counted}: {choice}")
        config = choice.config
        if measure_frontier is not None:
            frontier = measure_frontier(model, tokenizer, long_blocks, validation, out)
        if not count_features:
            within = Within(limit.limit(choice.softmax), limit.length, element_bytes)
    teacher = teacher_of(model) if training.trains and training.distill else None
    model, stages = _calibrated_and_transferred(
        model, tokenizer, config, long_blocks, validation, training, within, checkpoints, reporter
    )
    scores |= stages["scores"]
    if limit is not None:
        kept = converted_bytes(model, limit.length, element_bytes)
        reporter.say(
            f"after calibration: {kept / 1e6:.1f} MB at {limit.length:,} tokens, {counted}, with the features left on."
        )
    losses = trained(model, blocks, training, checkpoints, reporter, config.method, teacher=teacher)
    if training.trains:
        scores["finetuned"] = scored(model, validation, training.dtype, reporter, "finetuned")
        _say_if_worse(scores, training, reporter)
    with reporter.stage("save the model", 1):
        save_model(model, tokenizer, out / "model")
    record = {
        **settings, "environment": environment(), "scores": scores, "losses": losses,
        "calibration": stages["calibration"], "transfer": stages["transfer"],
        "seconds": round(time.perf_counter() - started, 1), "train_blocks": len(blocks),
        "choice": None if choice is None else choice.to_dict(), "converted_config": config_of(model).to_dict(),
        "kept_bytes": kept, "frontier": frontier,
    }  # fmt: skip
    write_json(out / RECORD_FILE, record)
    model_card(record).save(out / "model" / "README.md")
    finish_run(out, settings)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record
