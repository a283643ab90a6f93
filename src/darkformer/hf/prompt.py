"""Prompts whose state is kept in a file: a long document is read once, and texts that begin with it go on from there.

A state cannot be cut, so what is kept must be the beginning of every text that is to use it, token by token. But the
last tokens of a prompt may become others once text follows (a word goes on, two line ends are one token). The last
`OPEN_END` tokens are therefore not kept: they are read again with what follows, and the prompt alone is a text to
continue too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ..errors import ConfigError, InputError
from .saved_cache import Prompt, load_with_prompt, save_cache

#: Tokens at the end of a prompt that are not kept.
OPEN_END = 8
#: Who may speak first in a chat.
ROLES = ("system", "developer", "user")
#: Tokens read in one forward pass, and passes after which a prompt that is being read is saved.
CHUNK, SAVED_EVERY = 1024, 16


@dataclass(frozen=True, eq=False)
class StoredPrompt:
    """A prompt and the cache of a model that has read it.

    Attributes:
        prompt: what was read.
        cache: never passed to a model: `state` copies it.
    """

    prompt: Prompt
    cache: DynamicCache

    def begins(self, ids: Tensor) -> bool:
        """Whether ids (1, L) begin with the prompt and go on after it."""
        length = len(self.prompt.tokens)
        return ids.shape[1] > length and torch.equal(ids[0, :length].cpu(), self.prompt.tokens.cpu())

    def state(self) -> DynamicCache:
        """A cache to pass as `past_key_values`."""
        return copy.deepcopy(self.cache)

    def continued(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
        """Ids (1, L) of the stored text and `text` after it; after a chat's message, `text` is what the user says.

        Raises:
            InputError: they do not begin with the tokens that were read.
        """
        own = self.prompt
        ids = chat_ids(tokenizer, own.text, own.role, text) if own.role else text_ids(tokenizer, own.text + text)
        if not self.begins(ids):
            advice = "with the tokenizer of this model, and let it end after a whole line"
            if own.role and "strftime_now" in str(tokenizer.chat_template):
                advice = "today: this model's chat template writes the date"
            raise InputError(
                f"the prompt {text[:40]!r} does not continue the stored one ({len(own.tokens)} tokens, …"
                f"{own.text[-40:]!r}): this tokenizer makes other tokens of both together. Store the prompt again "
                f"{advice}."
            )
        return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids (1, L) of plain text, with the special tokens that the tokenizer adds."""
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids.to(torch.int64)  # of no tokens at all they would be floats


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, role: str, question: str) -> Tensor:
    """Ids (1, L) of a chat whose first message is `text`, whose user asks `question`, and that the model answers.

    Raises:
        ConfigError: a role that no request begins with. InputError: the tokenizer has no chat template, or not one for
        that.
    """
    if role not in ROLES:
        raise ConfigError(f"role={role!r}: chats begin with a message by one of {', '.join(ROLES)}.")
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template: store the prompt as plain text.")
    messages = [{"role": role, "content": text}, {"role": "user", "content": question}]
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # templates raise their own ones
        raise InputError(f"the model's chat template refuses a first message of role {role!r}: {error}") from error
    ids: Tensor = encoded["input_ids"]
    return ids


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str, role: str = "") -> Prompt:
    """The tokens of `text` that are worth keeping: those that stay the same whatever follows.

    Raises:
        InputError: there are none.
    """
    if role:  # what two different questions have in common
        first, second = (chat_ids(tokenizer, text, role, question)[0] for question in ("a", "Why? 1"))
        length = min(len(first), len(second))
        different = (first[:length] != second[:length]).nonzero()
        ids = first[: int(different[0]) if len(different) else length]
    else:
        ids = text_ids(tokenizer, text)[0]
    if len(ids) <= OPEN_END:
        raise InputError(
            f"the prompt has {len(ids)} tokens: the last {OPEN_END} are never kept, as text that follows can make "
            "others of them. There is nothing to store."
        )
    return Prompt(ids[:-OPEN_END].clone(), text, role)


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    begin: StoredPrompt | None = None,
    progress: Callable[[int, int], None] | None = None,
    save: Callable[[StoredPrompt], None] | None = None,
) -> StoredPrompt:
    """The prompt with the cache of a model that has read it.

    Args:
        begin: a stored beginning of it, from where the model goes on.
        progress: called with the tokens that are read and with all of them.
        save: called now and then with what is read so far.
    """
    total = len(prompt.tokens)
    done, cache = (0, None) if begin is None else (len(begin.prompt.tokens), begin.state())
    # A prompt's logits are of no use, and those of all tokens would be the largest tensor by far.
    last: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    for number, start in enumerate(range(done, total, CHUNK), 1):
        done = min(start + CHUNK, total)
        piece = prompt.tokens[None, start:done].to(model.device)
        cache = model(piece, past_key_values=cache, use_cache=True, **last).past_key_values
        if progress is not None:
            progress(done, total)
        if save is not None and number % SAVED_EVERY == 0 and done < total:
            save(StoredPrompt(Prompt(prompt.tokens[:done], prompt.text, prompt.role), cache))
    assert cache is not None  # a prompt has tokens
    return StoredPrompt(prompt, cache)


def save_prompt(stored: StoredPrompt, model: PreTrainedModel, file: str | Path) -> Path:
    """Saves a prompt and its cache; the file is one of `darkformer.save_cache`. Returns its path."""
    return save_cache(stored.cache, model, file, prompt=stored.prompt)


def load_prompt(file: str | Path, model: PreTrainedModel) -> StoredPrompt:
    """What `save_prompt` saved.

    Raises:
        InputError: as `darkformer.load_cache`, or a file of `save_cache` that does not say what was read.
    """
    cache, prompt = load_with_prompt(file, model)
    if prompt is None:
        raise InputError(f"{file}: does not say which prompt it is of. `darkformer cache` writes files that do.")
    return StoredPrompt(prompt, cache)


def longest(stored: Sequence[StoredPrompt], ids: Tensor) -> StoredPrompt | None:
    """Of the prompts that ids (1, L) begin with, the longest; None if there is none."""
    fitting = (one for one in stored if one.begins(ids))
    return max(fitting, key=lambda one: len(one.prompt.tokens), default=None)
