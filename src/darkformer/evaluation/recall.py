"""Recall of numbers: what a model still knows of a number it read long ago. Needs no download.

A number is told, text follows, then it is asked for. A window of W keys sees it up to a distance of W tokens;
beyond, only the features or exact heads (or full softmax attention) can.

Two forms. One pass key a prompt, between repeated sentences, is the short one. With `RecallTask.numbers` a prompt tells
several numbers under different names, in several wordings and within real text if there is any, and asks for all of
them at its end, each at its own exact distance: dozens of numbers a distance for a few long forward passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration.rows import prompt_start, without_start
from ..config import option
from ..errors import InputError
from ..reporting import Progress

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

#: (told, asked) of prompts with several numbers, each once in a prompt at most. What stands right before the number
#: differs between any two: a small softmax model binds number and name only loosely, and would mix alike sentences up.
#: They score only: no choice of heads is ever made on them.
WORDINGS = (
    (" Call {name} under{key} at noon.", " Who was it? Call {name} under"),
    (" Ship {name} left port{key}, then sailed.", " And where from? Ship {name} left port"),
    (" Choir {name} sang hymn{key} twice.", " Which one again? Choir {name} sang hymn"),
    (" Book {name} has page{key} missing.", " Which is gone? Book {name} has page"),
    (" Train {name} waits on track{key} tonight.", " Where is it now? Train {name} waits on track"),
    (" Star {name} lies at distance{key} from us.", " How far is it? Star {name} lies at distance"),
    (" Farm {name} sold apples worth{key} coins.", " What did they earn? Farm {name} sold apples worth"),
    (" Museum {name} bought painting{key} today.", " Which one came? Museum {name} bought painting"),
    (" Doctor {name} saw patient{key} last.", " Who came then? Doctor {name} saw patient"),
    (" Bank {name} froze account{key} at once.", " Which was it? Bank {name} froze account"),
)
#: Whose numbers they are, each once in a prompt at most.
NAMES = (
    "Amsterdam", "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Denver", "Dublin", "Geneva", "Havana", "Kyoto",
    "Lima", "Lisbon", "London", "Madrid", "Milan", "Moscow", "Naples", "Oslo", "Paris", "Prague", "Rome", "Seoul",
    "Sydney", "Tokyo", "Toronto", "Venice", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip


@dataclass(frozen=True)
class RecallTask:
    """How recall is measured.

    Attributes:
        distances: tokens between a number's end and the place where it is asked for.
        trials: numbers at each distance.
        batch_size: prompts in one forward pass.
        numbers: numbers told and asked for in one prompt, each in a wording and under a name of its own; 0: one pass
            key a prompt.

    Raises:
        InputError: no trials, no positive distances, or more numbers in a prompt than there are wordings.
    """

    distances: tuple[int, ...] = option(DISTANCES, "Tokens from the number to its question. Repeat.", "--distance")
    trials: int = option(20, "Numbers asked for at each distance.", minimum=1)
    seed: int = 0
    batch_size: int = option(4, "Prompts in one forward pass.", minimum=1)
    numbers: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1 or self.batch_size < 1 or not self.distances or min(self.distances) < 1:
            raise InputError(
                f"trials={self.trials}, batch_size={self.batch_size}, distances={list(self.distances)}: "
                "give at least one trial, and distances of at least one token."
            )
        if not 0 <= self.numbers <= len(WORDINGS):
            raise InputError(
                f"numbers={self.numbers}: a prompt tells up to {len(WORDINGS)} numbers, or 0 for one pass key."
            )


class Asked(NamedTuple):
    """One number of a prompt."""

    distance: int  # as the task has it
    told: int  # index of the number's last token
    at: int  # index of its first token where it is asked for
    answer: list[int]  # its tokens, which the prompt has at `at`

    @property
    def tokens_between(self) -> int:
        """The distance as it is."""
        return self.at - self.told - 1


class _Prompts:
    """Token rows for one tokenizer, one pass key each."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.ids: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.generator = torch.Generator().manual_seed(seed)
        self.start = prompt_start(tokenizer)
        self.filler, self.question = self.ids(FILLER), self.ids(QUESTION)
        self.before = self.start + self.ids(BEFORE) + self._fill(LEAD, 0)

    def _fill(self, length: int, offset: int) -> list[int]:
        """`length` tokens of the endless filler from `offset` on."""
        return [self.filler[(offset + i) % len(self.filler)] for i in range(length)]

    def key(self) -> str:
        """A number that is not told yet, with the space before it."""
        return " " + "".join(map(str, torch.randint(0, 10, (DIGITS,), generator=self.generator).tolist()))

    def row(self, distance: int) -> tuple[list[int], list[int]]:
        """(prompt, the number's tokens): in the prompt `distance` tokens lie between the number and what follows.

        Less if the sentences between are longer than that; `shortest` says how long they are.
        """
        key = self.key()
        head, tail = NEEDLE.split(" {key}")
        offset = int(torch.randint(len(self.filler), (1,), generator=self.generator))
        after = self.ids(tail)
        between = after + self._fill(distance - len(after) - len(self.question), offset) + self.question
        return self.before + self.ids(head) + self.ids(key) + between, self.ids(key)

    @property
    def shortest(self) -> int:
        """Tokens of the sentences between the number and its question."""
        return len(self.ids(NEEDLE.split(" {key}")[1])) + len(self.question)


class _ManyNumbers(_Prompts):
    """Token rows with several numbers each, asked for in turns of the distances."""

    def __init__(self, tokenizer: Any, seed: int, filler: Tensor | None) -> None:
        super().__init__(tokenizer, seed)
        self.has_digit: Callable[[int], bool] = lambda token: any(c.isdigit() for c in tokenizer.decode([token]))
        if filler is not None:
            rows = without_start(self.start, filler) if filler.dim() == 2 else filler
            self.filler = rows.flatten().tolist()
            if not self.filler:
                raise InputError("filler holds no tokens: give ids of some text, or None for the built-in sentences.")

    def _sentences(self, name: str, told: str, asked: str) -> tuple[list[int], list[int], list[int], list[int]]:
        """(told up to the number, the number, what is told after it, the question) of one name.

        A token of the space before the number belongs to what comes before it.
        """
        head, tail = told.format(name=name, key="\0").split("\0")
        key = self.ids(self.key())
        space = next(i for i, token in enumerate(key) if self.has_digit(token))
        before = key[:space]
        return self.ids(head) + before, key[space:], self.ids(tail), self.ids(asked.format(name=name)) + before

    def many(self, distances: Sequence[int]) -> tuple[list[int], list[Asked]]:
        """(prompt with the answers, what it asks): one number a distance, in the order in which they are asked for.

        A number lies exactly as far from its question as its distance says, unless two would overlap: then the earlier
        one lies some tokens further.

        Raises:
            InputError: a distance ends within the questions.
        """
        names = [NAMES[i] for i in torch.randperm(len(NAMES), generator=self.generator)]
        wordings = [WORDINGS[i] for i in torch.randperm(len(WORDINGS), generator=self.generator)]
        sentences = [self._sentences(n, *w) for _, n, w in zip(distances, names, wordings, strict=False)]
        block: list[int] = []
        places: list[int] = []  # of the answers, from the block's start
        for _, key, _, question in sentences:
            block += question
            places.append(len(block))
            block += [*key, *self.ids(".")]
        # From the last number backwards: each ends before the next one's sentence begins. Indices count from the
        # block's start, so they are negative.
        ends = [place - distance - 1 for place, distance in zip(places, distances, strict=True)]
        free = 0
        for i in sorted(range(len(ends)), key=ends.__getitem__, reverse=True):
            head, key, tail, _ = sentences[i]
            if ends[i] + len(tail) >= 0:
                raise InputError(
                    f"distance {distances[i]}: the questions before this one take {places[i]} tokens, so the number "
                    "would stand among them. Ask for fewer numbers a prompt, or at larger distances."
                )
            ends[i] = min(ends[i], free - len(tail) - 1)
            free = ends[i] + 1 - len(key) - len(head)
        before = LEAD - free
        offset = int(torch.randint(len(self.filler), (1,), generator=self.generator))
        text = self._fill(before, offset)
        for end, (head, key, tail, _) in zip(ends, sentences, strict=True):
            stop = before + end + 1
            text[stop - len(key) - len(head) : stop + len(tail)] = head + key + tail
        begin = len(self.start) + before
        asked = [
            Asked(distance, begin + end, begin + place, sentence[1])
            for distance, end, place, sentence in zip(distances, ends, places, sentences, strict=True)
        ]
        return self.start + text + block, asked


def many_numbers(tokenizer: Any, task: RecallTask, filler: Tensor | None = None) -> list[tuple[list[int], list[Asked]]]:
    """The prompts of a task with `numbers`, and what each asks: `trials` numbers at every distance, in turns.

    Args:
        filler: ids of text, any shape, that lies around the numbers; None takes the built-in sentences.

    Raises:
        InputError: no numbers, an empty filler, or a distance that ends within the questions.
    """
    if not task.numbers:
        raise InputError("numbers=0: this task asks for one pass key a prompt.")
    source = _ManyNumbers(tokenizer, task.seed, filler)
    every = sorted(set(task.distances)) * task.trials
    return [source.many(every[i : i + task.numbers]) for i in range(0, len(every), task.numbers)]


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
def _predicted(model: Any, rows: Sequence[list[int]], first: int, dtype: str) -> list[Tensor]:
    """The likeliest next token after each token from the place `first` on, counted from a row's end, (first,) a row.

    Rows of one length go without a mask, which lets attention take its fast paths.
    """
    device, length = next(model.parameters()).device, max(map(len, rows))
    inputs: dict[str, Any] = {"use_cache": False}
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    if len({len(row) for row in rows}) > 1:
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # a vocabulary of logits a token is large
        inputs["logits_to_keep"] = first
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=ids, **inputs).logits
    return list(logits[:, -first:].argmax(-1).cpu())


@torch.no_grad()
def _recalled(model: Any, rows: Sequence[tuple[list[int], list[int]]], dtype: str) -> list[list[bool]]:
    """Which tokens of each row's answer are the likeliest ones at their place.

    A row is recalled whole exactly if greedy decoding would write the number.
    """
    device = next(model.parameters()).device
    ids, mask, answers = (x.to(device) for x in _batch(rows))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    right = logits[:, :-1].argmax(-1) == answers[:, 1:]
    return [r[a >= 0].tolist() for r, a in zip(right, answers[:, 1:], strict=True)]


class _Tally:
    """Counts of one distance."""

    def __init__(self, tokenizer: Any) -> None:
        self.digits_of: Callable[[int], int] = lambda token: sum(c.isdigit() for c in tokenizer.decode([token]))
        self.whole = self.numbers = self.right = self.tokens = self.right_digits = self.digits = 0

    def add(self, answer: Sequence[int], right: Sequence[bool]) -> None:
        """One number: its tokens, and which of them were recalled."""
        weights = [self.digits_of(token) for token in answer]
        self.whole, self.numbers = self.whole + all(right), self.numbers + 1
        self.right, self.tokens = self.right + sum(right), self.tokens + len(right)
        self.right_digits += sum(w for w, yes in zip(weights, right, strict=True) if yes)
        self.digits += sum(weights)

    def point(self, distance: int, length: int, off: int) -> dict[str, Any]:
        """What `recall` returns for one distance."""
        return {
            "distance": distance, "accuracy": self.whole / self.numbers, "token_accuracy": self.right / self.tokens,
            "digit_accuracy": self.right_digits / max(self.digits, 1), "trials": self.numbers, "length": length,
            "off": off,
        }  # fmt: skip


def _pass_keys(model: Any, tokenizer: Any, task: RecallTask, dtype: str, progress: Progress | None) -> list[Any]:
    shortest = _Prompts(tokenizer, 0).shortest
    distances = sorted({max(distance, shortest) for distance in task.distances})
    points = []
    for i, distance in enumerate(distances):
        prompts, tally = _Prompts(tokenizer, task.seed), _Tally(tokenizer)
        rows = [prompts.row(distance) for _ in range(task.trials)]
        for j in range(0, len(rows), task.batch_size):
            batch = rows[j : j + task.batch_size]
            for (_, answer), right in zip(batch, _recalled(model, batch, dtype), strict=True):
                tally.add(answer, right)
        points.append(tally.point(distance, max(len(prompt) + len(answer) for prompt, answer in rows), 0))
        if progress:
            progress(i + 1, len(distances))
    return points


def _many(
    model: Any, tokenizer: Any, task: RecallTask, filler: Tensor | None, dtype: str, progress: Progress | None
) -> list[Any]:
    prompts = many_numbers(tokenizer, task, filler)
    tallies = {distance: _Tally(tokenizer) for distance in sorted(set(task.distances))}
    lengths, offs = dict.fromkeys(tallies, 0), dict.fromkeys(tallies, 0)
    for i in range(0, len(prompts), task.batch_size):
        batch = prompts[i : i + task.batch_size]
        first = max(len(ids) - asked[0].at for ids, asked in batch) + 1
        predicted = _predicted(model, [ids for ids, _ in batch], first, dtype)
        for (ids, asked), tokens in zip(batch, predicted, strict=True):
            for one in asked:
                # The token before a place predicts it.
                place = one.at - 1 - (len(ids) - first)
                right = tokens[place : place + len(one.answer)] == torch.tensor(one.answer)
                tallies[one.distance].add(one.answer, right.tolist())
                lengths[one.distance] = max(lengths[one.distance], len(ids))
                offs[one.distance] = max(offs[one.distance], one.tokens_between - one.distance)
        if progress:
            progress(min(i + task.batch_size, len(prompts)), len(prompts))
    return [tally.point(distance, lengths[distance], offs[distance]) for distance, tally in tallies.items()]


def recall(
    model: Any, tokenizer: Any, task: RecallTask | None = None, *, filler: Tensor | None = None,
    dtype: str = "float32", progress: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Accuracy of recalled numbers against distance.

    Args:
        task: distances in tokens, trials at each; the numbers and the text between them follow from its seed, so two
            models with one tokenizer are asked the same.
        filler: ids of text, any shape, around the numbers of a task with `numbers`; None takes built-in sentences.
        dtype: `bfloat16` runs under autocast.
        progress: called with (done, all) distances, or prompts where one asks at several distances.

    Returns:
        One point a distance: `distance` (tokens between the number's end and the place it is asked at; one pass key a
        prompt raises it to what the question itself takes), `accuracy` (share of whole numbers), `digit_accuracy`,
        `token_accuracy`, `trials`, `length` (tokens of the longest prompt), `off` (tokens that a number lies further
        at most, where two would overlap).

    Raises:
        InputError: see `many_numbers`.
    """
    task = task or RecallTask()
    was_training = model.training
    try:
        model.eval()
        if task.numbers:
            return _many(model, tokenizer, task, filler, dtype, progress)
        return _pass_keys(model, tokenizer, task, dtype, progress)
    finally:
        model.train(was_training)
