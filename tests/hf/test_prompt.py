"""A prompt that was read once: the same tokens come of it as of the whole text, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from darkformer import ConfigError, ConversionError, InputError, load_cache, save_cache
from darkformer.hf import prompt as prompts
from darkformer.hf import saved_cache
from darkformer.hf.prompt import (
    OPEN_END,
    StoredPrompt,
    load_prompt,
    longest,
    prompt_of,
    read_prompt,
    save_prompt,
    text_ids,
)
from darkformer.hf.saved_cache import Prompt
from darkformer.hf.sealed import write_sealed
from hf.families import linear, tiny, tokens

CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = CHAT
    return tokenizer


def _generated(model: PreTrainedModel, ids: Tensor, **options: object) -> list[int]:
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )
    return answer[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "llama-mixed", "gemma3", "gpt2"])
def test_equal_tokens_with_and_without(family: str, tmp_path: Path) -> None:
    model = linear(family)
    ids = tokens(1, 40)
    seen: list[tuple[int, int]] = []
    stored = read_prompt(model, Prompt(ids[0, :30], "text"), progress=lambda *counts: seen.append(counts))
    assert seen == [(30, 30)]
    loaded = load_prompt(save_prompt(stored, model, tmp_path / "state.safetensors"), model)
    assert loaded.prompt.text == "text" and loaded.prompt.tokens.equal(ids[0, :30])
    for other in (ids, torch.cat([ids[:, :30], tokens(1, 9, seed=1)], dim=1)):
        wanted = _generated(model, other)
        assert loaded.begins(other)
        for _ in range(2):  # a state is copied: requests do not add to it
            assert _generated(model, other, past_key_values=loaded.state()) == wanted
    assert load_cache(tmp_path / "state.safetensors", model).get_seq_length() == 30


def test_a_long_prompt_is_read_in_pieces_and_saved_on_the_way() -> None:
    model = linear("llama")
    length = prompts.CHUNK * (prompts.SAVED_EVERY + 1) + 5
    ids = tokens(1, 64)[0].repeat(length // 64 + 1)[:length]
    kept: list[int] = []
    seen: list[int] = []
    parts: list[StoredPrompt] = []

    def save(stored: StoredPrompt) -> None:
        kept.append(len(stored.prompt.tokens))
        parts.append(StoredPrompt(stored.prompt, stored.state()))

    whole = read_prompt(model, Prompt(ids, "t"), progress=lambda done, total: seen.append(done), save=save)
    assert kept == [prompts.CHUNK * prompts.SAVED_EVERY] and seen[-1] == length and len(seen) == 18
    assert whole.cache.get_seq_length() == length
    goes_on = read_prompt(model, Prompt(ids, "t"), begin=parts[0])
    more = torch.cat([ids, tokens(1, 3, seed=2)[0]])[None]
    found = [_generated(model, more, past_key_values=one.state()) for one in (whole, goes_on)]
    assert found[0] == found[1]


class TestTokens:
    """What is kept of a prompt is the beginning of every text that goes on with it."""

    TEXT = "The with statement wraps a block.\nIt is used for files.\n\n"

    @pytest.mark.parametrize("more", ["", "x", " x", "\n\n x", "Why is it used? " * 5])
    def test_plain_text(self, more: str, tokenizer: PreTrainedTokenizerBase) -> None:
        prompt = prompt_of(tokenizer, self.TEXT)
        whole = text_ids(tokenizer, self.TEXT)
        assert prompt.tokens.equal(whole[0, : whole.shape[1] - OPEN_END])
        ids = StoredPrompt(prompt, DynamicCache()).continued(tokenizer, more)
        assert ids.equal(text_ids(tokenizer, self.TEXT + more))

    def test_a_role_that_no_chat_begins_with(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(ConfigError, match=r"role='pirate': chats begin with a message by one of system, dev"):
            prompt_of(tokenizer, self.TEXT, "pirate")

    @pytest.mark.parametrize("role", ["system", "user"])
    def test_a_chats_first_message(self, role: str, tokenizer: PreTrainedTokenizerBase) -> None:
        prompt = prompt_of(tokenizer, self.TEXT, role)
        stored = StoredPrompt(prompt, DynamicCache())
        for question in ("Why?", "When is it used, and by whom?"):
            messages = [{"role": role, "content": self.TEXT}, {"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            assert stored.continued(tokenizer, question).equal(ids) and stored.begins(ids)
        assert tokenizer.decode(prompt.tokens).startswith(f"[{role}]The with statement wraps")

    def test_what_does_not_continue(self, tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> None:
        prompt = prompt_of(tokenizer, self.TEXT)
        stored = StoredPrompt(prompt, DynamicCache())
        assert not stored.begins(prompt.tokens[None])  # nothing is left to read
        assert not stored.begins(prompt.tokens[None, 1:])
        other = AutoTokenizer.from_pretrained(model_folder)
        other.add_tokens(["statement"])
        with pytest.raises(InputError, match=r"the prompt 'Why\?' does not continue the stored one"):
            stored.continued(other, "Why?")

    @pytest.mark.parametrize("text", ["", "The"])
    def test_too_short(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(InputError, match=r"the last 8 are never kept"):
            prompt_of(tokenizer, text)

    def test_no_template_or_one_that_refuses(self, tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> None:
        with pytest.raises(InputError, match="no chat template"):
            prompt_of(AutoTokenizer.from_pretrained(model_folder), self.TEXT, "system")
        refusing = AutoTokenizer.from_pretrained(model_folder)
        refusing.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(InputError, match=r"refuses a first message of role 'system'.*no system role"):
            prompt_of(refusing, self.TEXT, "system")

    def test_the_longest_is_taken(self) -> None:
        model, ids = linear("llama"), tokens(1, 30)
        stored = [
            StoredPrompt(Prompt(ids[0, :n], ""), read_prompt(model, Prompt(ids[0, :n], "")).cache) for n in (5, 20, 9)
        ]
        assert longest(stored, ids) is stored[1]
        assert longest(stored, ids[:, :15]) is stored[2]
        assert longest(stored, ids[:, :5]) is None and longest([], ids) is None


class TestRefusals:
    """A state under another model, or a file that is not what it says."""

    @staticmethod
    def _saved(folder: Path, family: str = "llama") -> tuple[Path, PreTrainedModel]:
        model = linear(family)
        stored = read_prompt(model, Prompt(tokens(1, 20)[0], "text"))
        return save_prompt(stored, model, folder / "state.safetensors"), model

    def test_other_exact_heads_and_softmax(self, tmp_path: Path) -> None:
        file, _ = self._saved(tmp_path)
        with pytest.raises(InputError, match=r"another model.*keep_exact"):
            load_prompt(file, linear("llama-mixed"))
        with pytest.raises(ConversionError, match="not converted"):
            load_prompt(file, tiny("llama"))

    def test_damaged(self, tmp_path: Path) -> None:
        file, model = self._saved(tmp_path)
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_prompt(file, model)

    def test_a_file_without_a_prompt(self, tmp_path: Path) -> None:
        model = linear("llama")
        cache = read_prompt(model, Prompt(tokens(1, 20)[0], "")).cache
        file = save_cache(cache, model, tmp_path / "plain.safetensors")
        with pytest.raises(InputError, match="does not say which prompt it is of"):
            load_prompt(file, model)
        assert saved_cache._read(file)[0]["layout"] == 1  # versions before this one read it

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"tokens": torch.zeros(19, dtype=torch.int64)}, "after 20 tokens of 1 rows"),
            ({"tokens": torch.zeros(20)}, r"tokens is torch\.float32"),
            ({"text": 3}, "lacks the text"),
            ({"role": None}, "lacks the text"),
        ],
    )
    def test_crafted(self, change: dict[str, object], match: str, tmp_path: Path) -> None:
        file, model = self._saved(tmp_path)
        header, content = saved_cache._read(file)
        for name, value in change.items():
            (content if isinstance(value, Tensor) else header)[name] = value
        write_sealed(file, "darkformer_cache", header, content)
        with pytest.raises(InputError, match=rf"its prompt is not one that save_cache wrote: .*{match}"):
            load_prompt(file, model)
