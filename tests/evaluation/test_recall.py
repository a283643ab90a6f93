"""Passkey recall: distances are what they say, and a model that knows gets it right exactly as far as it sees."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from darkformer import InputError
from darkformer.cli import app
from darkformer.evaluation.recall import DIGITS, LEAD, NAMES, WORDINGS, RecallTask, _Prompts, many_numbers, recall
from darkformer.hf.load import load_model, load_tokenizer


class Induction(nn.Module):
    """Writes what followed the last three tokens when they stood within the last `window` tokens before."""

    def __init__(self, window: int, vocabulary: int = 500) -> None:
        super().__init__()
        self.window, self.vocabulary = window, vocabulary
        self.device_of = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        self.seen.append((input_ids, attention_mask))
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for t in range(3, len(ids)):
                for s in range(t - 1, max(3, t - self.window + 1), -1):  # s + 1 is within the window of t
                    if ids[s - 2 : s + 1] == ids[t - 2 : t + 1]:
                        logits[row, t, ids[s + 1]] = 1
                        break
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(str(model_folder))


@pytest.mark.parametrize("distance", [60, 100, 300])
def test_the_distance_is_counted_in_tokens(distance: int, tokenizer: Any) -> None:
    prompt, key = _Prompts(tokenizer, 3).row(distance)
    text = tokenizer.decode(key)
    assert len(text.strip()) == DIGITS and text.strip().isdigit()
    ends = [i for i in range(len(prompt)) if prompt[i - len(key) + 1 : i + 1] == key]
    assert len(ends) == 1 and len(prompt) - 1 - ends[0] == distance
    whole = tokenizer.decode(prompt)
    assert whole.count(text.strip()) == 1 and whole.endswith("What is the pass key? The pass key is")


def test_accuracy_ends_where_the_window_ends(tokenizer: Any) -> None:
    shortest = _Prompts(tokenizer, 0).shortest
    key = len(_Prompts(tokenizer, 0).row(shortest)[1])
    window = shortest + 120
    task = RecallTask((shortest, window - key - 3, window - key + 1, window + 200), trials=5, batch_size=2)
    points = recall(Induction(window), tokenizer, task)
    assert [point["distance"] for point in points] == list(task.distances)
    assert [point["accuracy"] for point in points] == [1, 1, 0, 0]
    assert points[0]["token_accuracy"] == 1 > points[-1]["token_accuracy"]
    assert all(point["accuracy"] == 1 for point in recall(Induction(10**6), tokenizer, task))


def test_the_seed_and_nothing_else_decides(tokenizer: Any) -> None:
    def asked(**options: Any) -> list[Tensor]:
        model = Induction(10)
        recall(model, tokenizer, RecallTask((150,), trials=4, batch_size=4, **options))
        return [ids for ids, _ in model.seen]

    torch.manual_seed(9)
    assert torch.equal(asked()[0], asked()[0]) and not torch.equal(asked()[0], asked(seed=1)[0])


def test_distances_below_the_question_become_the_question(tokenizer: Any) -> None:
    shortest = _Prompts(tokenizer, 0).shortest
    points = recall(Induction(10), tokenizer, RecallTask((1, 2, shortest + 5), trials=1))
    assert [point["distance"] for point in points] == [shortest, shortest + 5]


@pytest.mark.parametrize("options", [{"trials": 0}, {"distances": ()}, {"distances": (0,)}, {"batch_size": 0}])
def test_refusals(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one trial"):
        RecallTask(**options)


def test_the_command_writes_a_record_and_a_plot(model_folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(model_folder), "--recall", "--distance", "90", "--distance", "150", "--trials", "2"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0 and "recall at 90 tokens" in result.output
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (row,) = record["models"].values()
    assert [point["distance"] for point in row["recall"]] == [90, 150] and row["window"] is None
    assert record["recall_task"]["trials"] == 2 and record["environment"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_lm_eval_tasks(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Path(__file__).parent / "tasks"
    monkeypatch.chdir(tasks)
    words = ["evaluate", str(model_folder), "--tasks", "local_choice", "--include-path", str(tasks), "--limit", "3"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and "local_choice acc" in result.output
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["models"].values()
    assert set(row["tasks"]["local_choice"]) >= {"acc,none", "acc_norm,none"}
    assert not (tmp_path / "recall.png").exists()


class TestManyNumbers:
    TASK = RecallTask((200, 260, 600), trials=4, numbers=5, batch_size=2)

    def test_every_number_lies_where_it_says(self, tokenizer: Any) -> None:
        prompts = many_numbers(tokenizer, self.TASK)
        counts = Counter(one.distance for _, asked in prompts for one in asked)
        assert counts == dict.fromkeys(self.TASK.distances, 4) and len(prompts) == 3
        for ids, asked in prompts:
            text = tokenizer.decode(ids)
            for one in asked:
                key = one.answer
                assert ids[one.told - len(key) + 1 : one.told + 1] == key == ids[one.at : one.at + len(key)]
                assert tokenizer.decode(key).isdigit() and len(tokenizer.decode(key)) == DIGITS
                assert text.count(tokenizer.decode(key)) == 2  # told once, and answered
                assert 0 <= one.tokens_between - one.distance <= 40
                # Right before both stand the same words.
                assert ids[one.told - len(key) - 3 : one.told - len(key)] == ids[one.at - 4 : one.at - 1]
            assert [one.at for one in asked] == sorted(one.at for one in asked)
            assert min(one.told for one in asked) >= LEAD

    def test_distances_are_exact_where_nothing_overlaps(self, tokenizer: Any) -> None:
        for _, asked in many_numbers(tokenizer, RecallTask((300, 900, 2100), trials=3, numbers=3)):
            assert [one.tokens_between for one in asked] == [300, 900, 2100]

    def test_wordings_and_names_come_once_a_prompt(self, tokenizer: Any) -> None:
        (prompt, _), *_ = many_numbers(tokenizer, RecallTask((1500,), trials=len(WORDINGS), numbers=len(WORDINGS)))
        text = tokenizer.decode(prompt)
        assert all(text.count(told.split("{")[0]) == 2 for told, _ in WORDINGS)  # told, and in the question
        assert all(text.count(f" {name} ") in (0, 2) for name in NAMES)

    def test_wordings_end_alike_and_apart(self) -> None:
        for told, asked in WORDINGS:
            assert asked.endswith(told.split("{key}")[0])  # what induction copies from
        assert len({told.split("{key}")[0].split()[-1] for told, _ in WORDINGS}) == len(WORDINGS)

    def test_recall_ends_where_the_window_ends(self, tokenizer: Any) -> None:
        window = 400  # more than 260 and a number further, less than 600
        points = recall(Induction(window), tokenizer, self.TASK)
        assert [point["distance"] for point in points] == [200, 260, 600]
        assert [point["accuracy"] for point in points] == [1, 1, 0]
        assert [point["digit_accuracy"] for point in points][:2] == [1, 1] and points[2]["digit_accuracy"] < 1
        assert all(point["trials"] == 4 for point in points)
        assert all(point["accuracy"] == 1 for point in recall(Induction(10**6), tokenizer, self.TASK))

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_batches_do_not_matter(self, tokenizer: Any, batch_size: int) -> None:
        model = load_model(tokenizer.name_or_path)
        task = replace(self.TASK, batch_size=batch_size)
        seen: list[tuple[int, int]] = []
        points = recall(model, tokenizer, task, progress=lambda done, total: seen.append((done, total)))
        assert points == recall(model, tokenizer, self.TASK) and seen[-1] == (3, 3)

    def test_text_of_the_callers_lies_between(self, tokenizer: Any) -> None:
        filler = torch.full((2, 50), 7)
        ((ids, asked),) = many_numbers(tokenizer, RecallTask((700,), trials=1, numbers=1), filler)
        assert ids[asked[0].told + 20 : asked[0].told + 600] == [7] * 580
        with pytest.raises(InputError, match="filler holds no tokens"):
            many_numbers(tokenizer, RecallTask(numbers=1), filler[:0])

    def test_the_seed_decides(self, tokenizer: Any) -> None:
        assert many_numbers(tokenizer, self.TASK) == many_numbers(tokenizer, self.TASK)
        assert many_numbers(tokenizer, self.TASK) != many_numbers(tokenizer, replace(self.TASK, seed=1))

    def test_refusals(self, tokenizer: Any) -> None:
        with pytest.raises(InputError, match="one pass key a prompt"):
            many_numbers(tokenizer, RecallTask())
        with pytest.raises(InputError, match="would stand among them"):
            many_numbers(tokenizer, RecallTask((16,), trials=5, numbers=5))
        with pytest.raises(InputError, match=f"up to {len(WORDINGS)} numbers"):
            RecallTask(numbers=len(WORDINGS) + 1)
