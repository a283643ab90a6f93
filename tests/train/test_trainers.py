"""Other people's trainers need nothing but `convert` before them: HF's Trainer and trl's SFTTrainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hf.families import DARK, disturb, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from darkformer import calibrate, convert
from darkformer.hf.added import added_values

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", "red", "blue", "green", "one", "two", "three"]
WORDS += ["what", "is", "the"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<bot> "
    "{% generation %}{{ m.content }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
QUICK = dict(
    per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, report_to="none",
    use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", chat_template=TEMPLATE
    )


def _model(vocabulary: int = 99) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.15, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _chats() -> Dataset:
    """Answers follow from the question, which lies beyond the window of 4."""
    rows = []
    for colour, number in (("red", "one"), ("blue", "two"), ("green", "three")):
        for length in (1, 4, 9):
            user = {"role": "user", "content": f"{colour} " + "what is the " * length}
            rows.append({"messages": [user, {"role": "assistant", "content": number}]})
    return Dataset.from_list(rows * 4)


def test_trainer_with_nothing_but_convert(tmp_path: Path) -> None:
    model = convert(_model(), DARK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 8).repeat(8, 4)]
    trainer = Trainer(
        model=model, train_dataset=rows, eval_dataset=rows[:2],
        args=TrainingArguments(str(tmp_path), max_steps=20, save_steps=10, eval_strategy="no", **QUICK),
    )  # fmt: skip
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < 0.2 * losses[0]
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged  # every weight and everything that conversion added
    assert trainer.evaluate()["eval_loss"] < 0.2 * losses[0]

    resumed = Trainer(
        model=convert(_model(), DARK), train_dataset=rows,
        args=TrainingArguments(str(tmp_path), max_steps=20, save_strategy="no", **QUICK),
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert _losses(resumed) == losses
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_weight_decay_pulls_nothing_that_conversion_added_to_zero(tmp_path: Path) -> None:
    model = convert(_model(), DARK)
    calibrate(model, [tokens(2, 60)])
    before = {name: x.clone() for name, x in added_values(model).items()}
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, **QUICK)
    by_trainer = Trainer(model=model, args=arguments, train_dataset=[]).create_optimizer()
    decayed = {id(p) for group in by_trainer.param_groups if group["weight_decay"] for p in group["params"]}
    for optimizer in (by_trainer, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        norm = model.lm_head.weight.norm().item()
        for _ in range(1000):
            optimizer.step()
        assert model.lm_head.weight.norm() < 0.95 * norm  # the decay acts
        assert all(torch.equal(x, before[name]) for name, x in added_values(model).items())
    assert any(id(p) in decayed for name, p in model.named_parameters() if name.endswith("dark.geometry_offset"))


def test_ragged_rows_through_the_collator_of_language_modelling(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # The amount of padding changes nothing: the same loss curve.
    curves = []
    for multiple in (1, 64):
        lengths = (5, 17, 30, 31, 8, 12, 26, 9)
        rows = [{"input_ids": tokens(1, length, seed=length)[0] % len(WORDS)} for length in lengths]
        trainer = Trainer(
            model=convert(_model(), DARK), train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(chat_tokenizer, mlm=False, pad_to_multiple_of=multiple),
            args=TrainingArguments(str(tmp_path / str(multiple)), max_steps=4, save_strategy="no", **QUICK),
        )  # fmt: skip
        trainer.train()
        curves.append(_losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][0] > 1


def _sft_losses(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: object) -> list[float]:
    tokenizer.padding_side = "right"
    trainer = SFTTrainer(
        model=disturb(convert(_model(len(WORDS)), DARK)), train_dataset=_chats(), processing_class=tokenizer,
        args=SFTConfig(str(folder), max_steps=4, save_strategy="no", bf16=False, **options, **QUICK),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    return _losses(trainer)


def test_chats_that_share_a_row_stay_separate(chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Without padding all chats of a batch come in one row, with position_ids that restart and cu_seq_lens: the same
    # loss curve. Packed by length (trl's default) rows hold other chats together, and the model learns as well.
    padded = _sft_losses(tmp_path / "padded", chat_tokenizer, max_length=None)
    free = _sft_losses(tmp_path / "free", chat_tokenizer, max_length=None, padding_free=True)
    assert free == pytest.approx(padded, rel=1e-5)
    packed = _sft_losses(tmp_path / "packed", chat_tokenizer, max_length=64, packing=True)
    assert packed[-1] < 0.5 * packed[0]


@pytest.mark.parametrize("assistant_only", [False, True], ids=["all tokens", "answers only"])
def test_sft_trainer_on_chats(assistant_only: bool, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat_tokenizer.padding_side = "right"
    model = disturb(convert(_model(len(WORDS)), DARK))
    trainer = SFTTrainer(
        model=model, train_dataset=_chats(), processing_class=chat_tokenizer,
        args=SFTConfig(
            str(tmp_path), max_steps=25, save_strategy="no", max_length=64, assistant_only_loss=assistant_only,
            bf16=False, **QUICK,
        ),
    )  # fmt: skip
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    chat_tokenizer.padding_side = "left"
    asked = ("green what is the what is the", "red is")
    questions = [[{"role": "user", "content": text}] for text in asked]
    prompt = chat_tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    answers = model.generate(**prompt, max_new_tokens=2, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    assert chat_tokenizer.batch_decode(answers) == ["three <eos>", "one <eos>"]
