"""lm-eval on local tasks (YAML and JSONL in `tasks/`): no batch size and no padding changes a score."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import disturb
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import PreTrainedModel

from darkformer import DarkConfig, InputError, MissingExtraError, convert, load_model
from darkformer.evaluation.compare import print_benchmark
from darkformer.evaluation.tasks import run_tasks
from darkformer.hf.load import load_tokenizer

TASKS = Path(__file__).parent / "tasks"
ITEMS = [json.loads(line) for line in (TASKS / "items.jsonl").read_text("utf-8").splitlines()]
SIZES = (1, 4, 16)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def softmax(model_folder: Path) -> PreTrainedModel:
    model = load_model(str(model_folder))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # from 0.02: attention that is not a plain mean
    return model


@pytest.fixture(scope="module")
def model(model_folder: Path, softmax: PreTrainedModel) -> PreTrainedModel:
    copy = load_model(str(model_folder))
    copy.load_state_dict(softmax.state_dict())
    return disturb(convert(copy, DarkConfig(num_features=16, window=8, sinks=2)))


def _run(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.chdir(TASKS)  # the data's path stands in the YAML
    return run_tasks(model, tokenizer, ["local_*"], include_path=TASKS, **options)


def test_scores_are_the_same_for_every_batch_size(
    model: PreTrainedModel, softmax: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [_run(model, tokenizer, monkeypatch, batch_size=size) for size in SIZES]
    assert set(scores[0]) == {"local_choice", "local_continuation"}
    for score in scores[1:]:
        assert score["local_choice"] == scores[0]["local_choice"]
        assert score["local_continuation"]["acc,none"] == scores[0]["local_continuation"]["acc,none"]
        found, expected = (s["local_continuation"]["perplexity,none"] for s in (score, scores[0]))
        assert found == pytest.approx(expected, rel=1e-5)
    other = _run(softmax, tokenizer, monkeypatch, batch_size=4)["local_continuation"]["perplexity,none"]
    assert other != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_the_scores_are_those_of_single_forwards(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without lm-eval: each item alone, no padding at all.
    right, total = 0, 0.0
    for item in ITEMS:
        sums = []
        for choice in item["choices"]:
            context = tokenizer(item["context"]).input_ids
            ids = torch.tensor([tokenizer(f"{item['context']} {choice}").input_ids])
            logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(context), ids.shape[1])
            sums.append(logits[places - 1, ids[0, places]].sum().item())
        right += max(range(3), key=sums.__getitem__) == item["answer"]
        total += sums[item["answer"]]
    scores = _run(model, tokenizer, monkeypatch, batch_size=16)
    assert scores["local_choice"]["acc,none"] == pytest.approx(right / len(ITEMS))
    expected = torch.tensor(-total / len(ITEMS)).exp().item()
    assert scores["local_continuation"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)


GENERATIVE = """
task: generative
dataset_path: json
dataset_kwargs: {data_files: {test: generated.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<eos>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.parametrize("size", SIZES)
def test_left_padded_generation_is_that_of_each_prompt_alone(
    size: int, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = []
    for item in ITEMS:
        ids = tokenizer(item["context"], return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        rows.append({"context": item["context"], "answer": tokenizer.decode(new, skip_special_tokens=True)})
    assert len({row["answer"] for row in rows}) > 10
    (tmp_path / "generated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "generative.yaml").write_text(GENERATIVE)
    monkeypatch.chdir(tmp_path)
    scores = run_tasks(model, tokenizer, [str(tmp_path / "generative.yaml")], batch_size=size)
    assert scores["generative"]["exact_match,none"] == 1.0


def test_lm_evals_class_keeps_our_model(model: PreTrainedModel, tokenizer: Any) -> None:
    assert HFLM(pretrained=model, tokenizer=tokenizer).model is model


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "darkformer.evaluation.tasks")
    with pytest.raises(MissingExtraError, match=r"--tasks needs 'lm_eval'.*darkformer\[eval\]"):
        importlib.import_module("darkformer.evaluation.tasks")


def test_limit(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few, all_ = (_run(model, tokenizer, monkeypatch, limit=limit) for limit in (5, 0))
    assert few["local_continuation"] != all_["local_continuation"]


def test_bad_input(model: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--tasks nonsense_task: lm-eval knows no such task"):
        run_tasks(model, tokenizer, ["nonsense_task"])
    monkeypatch.chdir(tmp_path)  # the YAML's data is not here
    with pytest.raises(InputError, match=r"lm-eval stopped \(\w+"):
        run_tasks(model, tokenizer, ["local_choice"], include_path=TASKS)


def test_each_number_stands_under_its_model() -> None:
    """Tokenizers with other shortest questions ask at other distances."""
    point = lambda distance, accuracy: {"distance": distance, "accuracy": accuracy}  # noqa: E731
    models = {"a": {"recall": [point(16, 0.1)]}, "b": {"recall": [point(52, 0.9)], "tasks": {"t": {"acc,none": 0.5}}}}
    console = Console(record=True, width=80, file=io.StringIO())
    print_benchmark({"models": models}, console)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert rows == [["recall at 16 tokens", "10%", ""], ["t acc", "", "0.5000"], ["recall at 52 tokens", "", "90%"]]
