"""Passkey recall: what a model still knows of a number it read long ago. Needs no download.

A number is told once, text follows, then it is asked for. A window of W keys sees it up to a distance of W tokens;
beyond, only the features (or full softmax attention) can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import InputError
from ..train.evaluate import Progress

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
BEFORE, NEEDLE, QUESTION = (
    "Some text follows. ",
    " The pass key is {key}. Remember it.",
    " What is the pass key? The pass key is",
)
#: Tokens between the number's last token and the one that is asked for first.
DISTANCES = (16, 32, 64, 128, 256, 512, 1024)
#: Tokens of filler before the number, so that it never stands among the sinks.
LEAD = 16
DIGITS = 5


@dataclass(frozen=True)
class RecallTask:
    """How recall is measured.

    Raises:
        InputError: no trials, or no positive distances.
    """

    distances: tuple[int, ...] = DISTANCES
    trials: int = 20
    seed: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.trials < 1 or self.batch_size < 1 or not self.distances or min(self.distances) < 1:
            raise InputError(
                f"trials={self.trials}, batch_size={self.batch_size}, distances={list(self.distances)}: "
                "give at least one trial, and distances of at least one token."
            )


class _Prompts:
    """Token rows for one tokenizer."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.ids: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.generator = torch.Generator().manual_seed(seed)
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.filler, self.question = self.ids(FILLER), self.ids(QUESTION)
        self.before = start + self.ids(BEFORE) + self._fill(LEAD, 0)

    def _fill(self, length: int, offset: int) -> list[int]:
        """`length` tokens of the endless filler from `offset` on."""
        return [self.filler[(offset + i) % len(self.filler)] for i in range(length)]

    def row(self, distance: int) -> tuple[list[int], list[int]]:
        """(prompt, the number's tokens): in the prompt `distance` tokens lie between the number and what follows.

        Less if the sentences between are longer than that; `shortest` says how long they are.
        """
        digits = torch.randint(0, 10, (DIGITS,), generator=self.generator).tolist()
        key = " " + "".join(map(str, digits))
        head, tail = NEEDLE.split(" {key}")
        offset = int(torch.randint(len(self.filler), (1,), generator=self.generator))
        after = self.ids(tail)
        between = after + self._fill(distance - len(after) - len(self.question), offset) + self.question
        return self.before + self.ids(head) + self.ids(key) + between, self.ids(key)

    @property
    def shortest(self) -> int:
        """Tokens of the sentences between the number and its question."""
        return len(self.ids(NEEDLE.split(" {key}")[1])) + len(self.question)


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, L), mask (B, L) and answer (B, L), padded on the left; answer is -1 where nothing is asked."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, answers = (torch.full((len(rows), length), value) for value in (0, 0, -1))
    for i, (prompt, answer) in enumerate(rows):
        start = length - len(prompt) - len(answer)
        ids[i, start:] = torch.tensor(prompt + answer)
        mask[i, start:] = 1
        answers[i, length - len(answer) :] = torch.tensor(answer)
    return ids, mask, answers


@torch.no_grad()
def _recalled(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[int, int, int]:
    """(rows recalled whole, tokens recalled, tokens) by the likeliest token at every place of the answer.

    A row is recalled whole exactly if greedy decoding would write the number.
    """
    device = next(model.parameters()).device
    ids, mask, answers = (x.to(device) for x in _batch(rows))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    asked = answers[:, 1:] >= 0
    right = (logits[:, :-1].argmax(-1) == answers[:, 1:]) & asked
    return int((right.sum(1) == asked.sum(1)).sum()), int(right.sum()), int(asked.sum())


def recall(
    model: Any, tokenizer: Any, task: RecallTask | None = None, *, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Accuracy of passkey recall against distance.

    Args:
        task: distances in tokens, trials at each; the numbers and the text between them follow from its seed, so two
            models with one tokenizer are asked the same.
        progress: called with (done, all) distances.

    Returns:
        One point a distance: `distance` (tokens between the number's end and the place it is asked at; raised to what
        the question itself takes), `accuracy` (share of whole numbers), `token_accuracy`, `trials`, `length` (tokens).
    """
    task = task or RecallTask()
    was_training, points = model.training, []
    shortest = _Prompts(tokenizer, 0).shortest
    distances = sorted({max(distance, shortest) for distance in task.distances})
    try:
        model.eval()
        for i, distance in enumerate(distances):
            prompts = _Prompts(tokenizer, task.seed)
            rows = [prompts.row(distance) for _ in range(task.trials)]
            batches = [rows[j : j + task.batch_size] for j in range(0, len(rows), task.batch_size)]
            whole, right, tokens = map(sum, zip(*(_recalled(model, batch) for batch in batches), strict=True))
            points.append({
                "distance": distance, "accuracy": whole / task.trials, "token_accuracy": right / tokens,
                "trials": task.trials, "length": max(len(prompt) + len(answer) for prompt, answer in rows),
            })  # fmt: skip
            if progress:
                progress(i + 1, len(distances))
    finally:
        model.train(was_training)
    return points
