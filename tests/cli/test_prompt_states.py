"""`darkformer cache`, `generate --cache` and light forms: the same tokens at every turn, and refusals that say why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import darkformer
from darkformer import DarkConfig, InputError, RunFolderError
from darkformer.cli import app
from darkformer.hf import prompt as prompts
from darkformer.hf.load import load_tokenizer, save_model

TEXT = "The with statement is used to wrap the execution of a block with methods.\n" * 20
QUESTION = "A context manager is"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _converted(model_folder: Path, out: Path, **options: object) -> Path:
    model = darkformer.load_model(str(model_folder))
    darkformer.convert(model, DarkConfig(num_features=16, window=8, **options))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(model_folder))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
    save_model(model, tokenizer, out / "model")
    darkformer.save_light(model, out / "light")
    return out


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny model with an exact head, with its light form beside it."""
    return _converted(model_folder, tmp_path_factory.mktemp("prompts") / "run", keep_exact=("0.1",))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def _answer(*words: str) -> str:
    """What was generated, without the line of numbers after it."""
    return run("generate", *words, "--max-new-tokens", "12").rsplit("\n12 tokens", 1)[0].rstrip("\n")


def test_the_same_answer_with_and_without(folder: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "states" / "book.safetensors"
    said = run("cache", str(folder), "--prompt", str(book), "--out", str(state))
    length = len(load_tokenizer(str(folder / "model"))(TEXT).input_ids)
    assert f"{length - prompts.OPEN_END:,} tokens" in said and "MB" in said
    whole = _answer(str(folder), "--prompt", TEXT + QUESTION)
    short = _answer(str(folder), "--prompt", QUESTION, "--cache", str(state))
    assert short and whole == f"{TEXT}{QUESTION}{short}"
    assert "nothing left to do" in run("cache", str(folder), "--prompt", str(book), "--out", str(state))


def test_a_chats_first_message(folder: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "chat.safetensors"
    run("cache", str(folder), "--prompt", str(book), "--out", str(state), "--role", "system")
    template = f"[system]{TEXT}\n[user]{QUESTION}\n[assistant]"
    whole = _answer(str(folder), "--prompt", template)
    assert whole == template + _answer(str(folder), "--prompt", QUESTION, "--cache", str(state))


def test_a_light_form_with_its_base(folder: Path, model_folder: Path, book: Path, tmp_path: Path) -> None:
    state, light = tmp_path / "state.safetensors", [str(folder / "light"), "--base", str(model_folder)]
    run("cache", *light, "--prompt", str(book), "--out", str(state))
    # The full form has the same weights, so the state is its state too.
    both = {_answer(*model, "--prompt", QUESTION, "--cache", str(state)) for model in (light, [str(folder)])}
    assert len(both) == 1
    with pytest.raises(InputError, match=r"holds the light form.*--base"):
        run("generate", str(folder / "light"), "--prompt", "x")


def test_a_longer_prompt_goes_on_from_a_shorter_one(
    folder: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, fresh = tmp_path / "state.safetensors", tmp_path / "fresh.safetensors"
    run("cache", str(folder), "--prompt", str(book), "--out", str(state))
    book.write_text(TEXT + "And more of it. " * 5, encoding="utf-8")
    begun: list[int] = []
    read = prompts.read_prompt

    def watched(*args: object, begin: prompts.StoredPrompt | None, **kwargs: object) -> prompts.StoredPrompt:
        begun.append(0 if begin is None else len(begin.prompt.tokens))
        return read(*args, begin=begin, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(prompts, "read_prompt", watched)
    for out in (state, fresh):
        run("cache", str(folder), "--prompt", str(book), "--out", str(out))
    assert begun[0] > 300 and begun[1] == 0
    answers = {_answer(str(folder), "--prompt", QUESTION, "--cache", str(out)) for out in (state, fresh)}
    assert len(answers) == 1


def test_a_prompt_that_ends_otherwise_has_the_same_state(folder: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    words = ["cache", str(folder), "--prompt", str(book), "--out", str(state)]
    run(*words)
    other = TEXT[:-1] + "!"  # in place of the last line's end, which is not kept
    book.write_text(other, encoding="utf-8")
    assert "nothing left to do" not in run(*words)
    whole = _answer(str(folder), "--prompt", other + " Then")
    assert whole == other + " Then" + _answer(str(folder), "--prompt", " Then", "--cache", str(state))


def test_another_prompt_is_not_replaced_unasked(folder: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    words = ["cache", str(folder), "--prompt", str(book), "--out", str(state)]
    run(*words)
    before = state.read_bytes()
    book.write_text("Something else. " * 30, encoding="utf-8")
    with pytest.raises(RunFolderError, match="state of another prompt: --overwrite replaces it"):
        run(*words)
    assert state.read_bytes() == before
    run(*words, "--overwrite")
    assert state.read_bytes() != before


class TestRefusals:
    def test_another_model_and_other_exact_heads(
        self, folder: Path, model_folder: Path, book: Path, tmp_path: Path
    ) -> None:
        state = tmp_path / "state.safetensors"
        run("cache", str(folder), "--prompt", str(book), "--out", str(state))
        other = _converted(model_folder, tmp_path / "other", keep_exact=("1.0",))
        with pytest.raises(InputError, match=r"belongs to another model.*keep_exact: \['0\.1'\] there"):
            run("generate", str(other), "--prompt", QUESTION, "--cache", str(state))
        with pytest.raises(InputError, match=r"belongs to another model.*its weights are others"):
            run("generate", str(folder), "--prompt", QUESTION, "--cache", str(state), "--dtype", "bfloat16")

    def test_softmax(self, model_folder: Path, book: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"computes softmax attention: it is not converted. `darkformer linearize"):
            run("cache", str(model_folder), "--prompt", str(book), "--out", str(tmp_path / "x"))

    def test_a_damaged_file(self, folder: Path, book: Path, tmp_path: Path) -> None:
        state = tmp_path / "state.safetensors"
        words = ["cache", str(folder), "--prompt", str(book), "--out", str(state)]
        run(*words)
        state.write_bytes(state.read_bytes()[:-100])
        for command in (words, ["generate", str(folder), "--prompt", QUESTION, "--cache", str(state)]):
            with pytest.raises(InputError, match="damaged"):
                run(*command)

    def test_a_prompt_that_does_not_continue(self, folder: Path, book: Path, tmp_path: Path) -> None:
        state = tmp_path / "state.safetensors"
        run("cache", str(folder), "--prompt", str(book), "--out", str(state))
        other = Path(shutil.copytree(folder / "model", tmp_path / "other"))
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["execution"])
        tokenizer.save_pretrained(other)
        with pytest.raises(InputError, match="does not continue the stored one"):
            run("generate", str(other), "--prompt", QUESTION, "--cache", str(state))

    def test_files_and_values(self, folder: Path, book: Path, tmp_path: Path) -> None:
        out = str(tmp_path / "x")
        for where in (tmp_path, book / "below", "", "/dev/null/x", "/dev/full", "."):
            for flag in ([], ["--overwrite"]):
                with pytest.raises(RunFolderError, match=r"is a folder or a device|is a file, not a folder"):
                    run("cache", "nosuchmodel", "--prompt", "nosuchprompt", "--out", str(where), *flag)
        with pytest.raises(RunFolderError, match="is the prompt itself"):
            run("cache", "nosuchmodel", "--prompt", str(book), "--out", str(book), "--overwrite")
        assert book.read_text() == TEXT
        book.write_bytes(b"\xff\xfe\xff" * 100)
        with pytest.raises(InputError, match="is not UTF-8 text"):
            run("cache", str(folder), "--prompt", str(book), "--out", out)
        with pytest.raises(InputError, match="no such file"):
            run("generate", str(folder), "--prompt", "x", "--cache", out)
        for option, value in (("--dtype", "float8"), ("--device", "nowhere")):
            with pytest.raises(darkformer.ConfigError, match=value):
                run("generate", str(folder), "--prompt", "x", option, value)
