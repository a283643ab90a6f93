"""Rows of tokens with labels, on which heads are judged: text, and numbers to be recalled."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError

#: The label of a token that is not scored, as in torch's cross-entropy.
IGNORED = -100
#: (statement of a number, question for it); the number follows the question.
WORDINGS: tuple[tuple[str, str], ...] = (
    ("The access code of the {name} is {number}.", "Question: what is the access code of the {name}?\nAnswer:"),
    ("Note: {name} has the number {number}.", "As noted above, {name} has the number"),
    ("Please remember that the {name} weighs {number} grams.", "We were told that the {name} weighs"),
    ("{name} = {number}", "{name} ="),
)
#: Tokens whose logits are in memory in float32 at a time: 256 MB for a vocabulary of 256 thousand.
LOGITS_AT_ONCE = 256
#: What the numbers belong to.
NAMES = (
    "harbor", "library", "garden", "station", "museum", "bridge", "castle", "market", "forest", "river", "school",
    "hotel", "temple", "factory", "island", "mountain", "theater", "hospital", "airport", "village", "bakery", "tower",
    "stadium", "church", "office", "farm", "prison", "palace", "tunnel", "canal",
)  # fmt: skip
DIGITS = 5
#: Numbers stated in one row.
FACTS = 6


@dataclass(frozen=True)
class Rows:
    """Rows of tokens of which some are scored.

    Attributes:
        ids: (N, L).
        mask: (N, L) booleans, True for real tokens; None where all are.
        labels: (N, L), the token itself where its loss counts, else IGNORED.
    """

    ids: Tensor
    mask: Tensor | None
    labels: Tensor

    @property
    def count(self) -> int:
        """Tokens whose loss counts."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def __getitem__(self, chosen: slice) -> Rows:
        return Rows(self.ids[chosen], None if self.mask is None else self.mask[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.ids)


def inputs_of(batch: Any) -> dict[str, Tensor]:
    """Keyword arguments for a model from a batch: token ids (B, L), or a dict with them and maybe a padding mask.

    Raises:
        InputError: it is something else.
    """
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        raise InputError(f"a batch is a {type(batch).__name__}: give input_ids (B, L) or a dict with them.")
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def run(model: Any, inputs: dict[str, Tensor]) -> None:
    """One pass for what its layers see; the logits, the largest tensor of it, are not computed where that can be."""
    device = next(model.parameters()).device
    fewest = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(**{name: x.to(device) for name, x in inputs.items()}, **fewest, use_cache=False)


def text_rows(batches: Iterable[Any]) -> Rows:
    """All rows of the batches: token ids (B, L), or dicts with input_ids and attention_mask; of one length.

    Raises:
        InputError: no batch, something else than a batch, or batches of several lengths.
    """
    ids: list[Tensor] = []
    masks: list[Tensor] = []
    for batch in batches:
        inputs = inputs_of(batch)
        if inputs["input_ids"].dim() != 2:
            raise InputError("a batch has no input_ids of shape (B, L): give token ids, or a dict with them.")
        ids.append(inputs["input_ids"].cpu())
        mask = inputs.get("attention_mask")
        masks.append(torch.ones_like(ids[-1], dtype=torch.bool) if mask is None else mask.cpu().bool())
    if not ids:
        raise InputError("no batches: give at least one of token ids (B, L).")
    if len(lengths := {x.shape[1] for x in ids}) > 1:
        raise InputError(f"batches of {sorted(lengths)} tokens: give all of them one length, padded with a mask.")
    tokens, mask = torch.cat(ids), torch.cat(masks)
    labels = tokens.masked_fill(~mask, IGNORED)
    labels[:, 1:][~mask[:, :-1]] = IGNORED  # nothing predicts the first token after padding
    return Rows(tokens, None if bool(mask.all()) else mask, labels)


def prefix_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as the token that says where it begins (BOS).

    Many models are at a loss without it: Gemma 3 270M loses 0.4 nats a token over 2,048 of them.
    """
    for text in ("a", "A", "1", "."):  # one of which the vocabulary has
        plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        whole: list[int] = tokenizer(text).input_ids
        for i in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[i : i + len(plain)] == plain:
                return whole[:i]
    return []


def prompt_start(tokenizer: Any) -> list[int]:
    """What prompts begin with: `prefix_of`, or the token for it of a tokenizer that does not put it there itself."""
    return prefix_of(tokenizer) or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])


def without_start(start: Sequence[int], ids: Tensor) -> Tensor:
    """Rows (N, L) without `start`, if every row begins with it: text between other text begins with nothing."""
    n = len(start)
    begun = n > 0 and ids.shape[1] > n and bool((ids[:, :n] == torch.tensor(start, device=ids.device)).all())
    return ids[:, n:] if begun else ids


def recall_rows(
    tokenizer: Any, text: Rows, context: int, count: int, *, seed: int = 0, facts: int = FACTS,
    wordings: tuple[tuple[str, str], ...] = WORDINGS, names: tuple[str, ...] = NAMES,
) -> Rows:  # fmt: skip
    """Prompts that fill the context: numbers stated at different places of the text, all asked for at the end.

    The statements are spread over the row, the first right after the sinks, so that the distances between a number and
    its question range from the questions' own length to nearly the context. Their order, names, wordings and digits
    follow from the seed.

    Args:
        text: contiguous pieces of its real tokens fill the rows.
        context: L, tokens of a row. count: N, rows. facts: numbers in a row.

    Returns:
        Rows whose labels are the numbers' tokens where they are asked for.

    Raises:
        InputError: the text is shorter than the context, or the context too short for a number and its question.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    def ids_of(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False).input_ids)

    start = prompt_start(tokenizer)
    ids = without_start(start, text.ids)
    stream = ids.flatten() if text.mask is None else ids[text.mask[:, -ids.shape[1] :]]
    if len(stream) < context - len(start):
        raise InputError(
            f"the text has {len(stream)} tokens, prompts of {context} are to be made of it: give more text or a "
            "smaller context."
        )
    rows, labels = [], []
    for _ in range(count):
        statements: list[list[int]] = []
        asked: list[tuple[list[int], list[int]]] = []
        chosen = torch.randperm(len(names), generator=generator).tolist()
        for name in [names[i] for i in chosen[:facts]]:
            telling, asking = wordings[random_below(len(wordings))]
            number = ids_of(" " + "".join(str(random_below(10)) for _ in range(DIGITS)))
            before, after = telling.format(name=name, number="\0").split(" \0")
            question, full = ids_of("\n\n" + asking.format(name=name)), [*ids_of("\n\n" + before), *number]
            statement, question_and_answer = [*full, *ids_of(after + "\n\n")], len(question) + len(number)
            used = len(start) + sum(map(len, statements)) + sum(len(q) + len(n) for q, n in asked)
            if used + len(statement) + question_and_answer > context * 3 // 4 and statements:
                break  # a short context has fewer of them
            statements.append(statement)
            asked.append((question, number))
        room = context - len(start) - sum(map(len, statements)) - sum(len(q) + len(n) for q, n in asked)
        if room < len(statements):
            raise InputError(f"context={context}: a number and its question do not fit, give at least {context * 4}.")
        filler = stream[(first := random_below(len(stream) - room + 1)) : first + room].tolist()
        row, label = list(start), [IGNORED] * len(start)
        cuts = [room * i // len(statements) for i in range(len(statements) + 1)]
        for i, statement in enumerate(statements):
            lead = min(16, cuts[1] // 2) if i == 0 else 0  # so that no number is among the sinks
            row += [*filler[cuts[i] : cuts[i] + lead], *statement, *filler[cuts[i] + lead : cuts[i + 1]]]
        label += [IGNORED] * (len(row) - len(label))
        for i in torch.randperm(len(asked), generator=generator).tolist():
            question, number = asked[i]
            row += question + number
            label += [IGNORED] * len(question) + number
        rows.append(row)
        labels.append(label)
    return Rows(torch.tensor(rows), None, torch.tensor(labels))


def row_losses(model: Any, rows: Rows, dtype: str) -> Tensor:
    """The summed loss of each row's labels (N,), in nats; differentiable."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"input_ids": rows.ids.to(device), "use_cache": False}
    if rows.mask is not None:
        mask = rows.mask.to(device)
        arguments |= {"attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    accepted = inspect.signature(model.forward).parameters
    scored = (rows.labels[:, 1:] != IGNORED).any(0).nonzero()
    first = int(scored[0]) if len(scored) else 0
    if "logits_to_keep" in accepted:  # logits are needed from the first scored token on
        arguments["logits_to_keep"] = rows.ids.shape[1] - first
    arguments = {name: x for name, x in arguments.items() if name in accepted or "kwargs" in accepted}
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(**arguments).logits
    logits = logits[:, -(rows.ids.shape[1] - first) : -1]
    labels = rows.labels[:, first + 1 :].to(device)
    losses = []
    for row, label in zip(logits, labels, strict=True):
        places = (label != IGNORED).nonzero()[:, 0].split(LOGITS_AT_ONCE)
        parts = [checkpoint(_summed_loss, row, label, place, use_reentrant=False) for place in places]
        losses.append(torch.stack(parts).sum())
    return torch.stack(losses)


def _summed_loss(logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy at the places of a row, in float32 or float64."""
    scored = logits[places]
    scored = scored.float() if scored.dtype.itemsize < 4 else scored
    return F.cross_entropy(scored, labels[places], reduction="sum")
