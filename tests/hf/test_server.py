"""The server: its endpoints answer as `generate` does, with and without states of prompts, and it serves one model."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hang import HANG_SECONDS
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import darkformer
from darkformer import DarkConfig, load_light, load_model, save_light
from darkformer.hf.load import load_tokenizer, save_model
from darkformer.hf.prompt import prompt_of, read_prompt

pytest.importorskip("fastapi", reason="needs the extra serve")
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from darkformer.cli import app
from darkformer.hf.server import build_app

TEXT = "The with statement is used to wrap the execution of a block with methods.\n" * 12
NAME = "runs/tiny"


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny converted model with an exact head and a chat template."""
    out = tmp_path_factory.mktemp("server") / "run"
    model = darkformer.convert(
        load_model(str(model_folder)), DarkConfig(num_features=16, window=8, keep_exact=("0.1",))
    )
    tokenizer = load_tokenizer(str(model_folder))
    # A model with random weights says halves of characters, whose text has other tokens: it is left these.
    spoken = set(tokenizer.convert_tokens_to_ids(list("~^|@;!")))
    model.generation_config.suppress_tokens = [i for i in range(len(tokenizer)) if i not in spoken]
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
    save_model(model, tokenizer, out / "model")
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "model")


class Counter:
    """Tokens that the model has read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = 0
        self.handle = model.model.embed_tokens.register_forward_hook(self._count)

    def _count(self, module: object, args: tuple[torch.Tensor], output: object) -> None:
        self.tokens += args[0].numel()


@pytest.fixture
def counter(model: PreTrainedModel) -> Iterator[Counter]:
    counter = Counter(model)
    yield counter
    counter.handle.remove()


def _client(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TestClient:
    return TestClient(build_app(model, tokenizer, NAME, **options))


def _complete(client: TestClient, prompt: str, new: int = 8, **more: object) -> str:
    body = {"model": NAME, "prompt": prompt, "max_tokens": new, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def _chat(client: TestClient, *messages: str, new: int = 8, system: str = "") -> str:
    roles = ["system"] * bool(system)
    body = {
        "model": NAME, "max_tokens": new, "temperature": 0,
        "messages": [{"role": role, "content": system} for role in roles]
        + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)],
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def _generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, new: int = 8) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def _streamed(client: TestClient, path: str, **body: object) -> list[dict[str, Any]]:
    body = {"model": NAME, "max_tokens": 8, "temperature": 0, "stream": True, **body}
    with client.stream("POST", path, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [json.loads(line) for line in lines]


def test_endpoints_answer_as_generate_does(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with _client(model, tokenizer) as client:
        assert client.get("/health").json() == {"status": "ok"}
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed["id"] == NAME
        wanted = _generated(model, tokenizer, TEXT)
        assert wanted and _complete(client, TEXT) == wanted
        chunks = _streamed(client, "/v1/completions", prompt=TEXT)
        assert len(chunks) > 3 and "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted
        wanted = _generated(model, tokenizer, "[user]What is a block?\n[assistant]")
        assert _chat(client, "What is a block?") == wanted
        message = [{"role": "user", "content": "What is a block?"}]
        chunks = _streamed(client, "/v1/chat/completions", messages=message)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
        answer = client.post("/v1/responses", json={"model": NAME, "input": "What is a block?", "max_output_tokens": 8})
        assert answer.status_code == 200, answer.text


def test_it_has_one_model_which_stays(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with _client(model, tokenizer) as client:
        body = {"model": "another", "prompt": TEXT, "max_tokens": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400 and NAME in answer.text
        assert client.post("/reset").json() == {"status": "ok"}
        assert _complete(client, TEXT)
        for name, status in ((NAME, "ready"), ("another", "error")):
            lines = client.post("/load_model", json={"model": name}).text.splitlines()
            last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
            assert last["status"] == status and (status == "ready" or NAME in last["message"])


@pytest.mark.parametrize("role", ["", "system"])
def test_a_stored_prompt_is_read_once(
    role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counter: Counter
) -> None:
    prompt = prompt_of(tokenizer, TEXT, role)
    shorter = prompt_of(tokenizer, TEXT[:200], role)
    stored = [read_prompt(model, one) for one in (prompt, shorter)]

    def ask(client: TestClient, question: str) -> str:
        return _chat(client, question, system=TEXT) if role else _complete(client, TEXT + question)

    questions = ("What is a block?", "Who wraps it?", "")
    with _client(model, tokenizer) as without:
        wanted = [ask(without, question) for question in questions]
    counter.tokens = 0
    with _client(model, tokenizer, stored=stored) as client:
        assert [ask(client, question) for question in questions] == wanted
        assert counter.tokens < len(prompt.tokens)  # three requests together
        counter.tokens = 0
        _complete(client, "Another text. " + TEXT)
        assert counter.tokens > len(prompt.tokens)  # what begins otherwise is read as a whole


def test_a_hub_default_that_generate_ignores_is_ignored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(tokenizer, TEXT)
    stored, wanted = read_prompt(model, prompt), _generated(model, tokenizer, TEXT + "A block")
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    counter.tokens = 0
    with _client(model, tokenizer, stored=[stored]) as client:
        assert _complete(client, TEXT + "A block") == wanted
    assert counter.tokens < len(prompt.tokens)


def test_a_chat_that_goes_on_reads_what_is_new(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counter: Counter
) -> None:
    def talk(client: TestClient) -> tuple[list[str], list[int]]:
        texts, counts = [TEXT], []
        for question in ("What is a block?", "Who wraps it?", ""):
            counter.tokens = 0
            texts.append(_complete(client, "".join(texts)) + question)
            counts.append(counter.tokens)
        return texts, counts

    with _client(model, tokenizer) as without, _client(model, tokenizer, kept=2) as client:
        (wanted, whole), (found, rest) = talk(without), talk(client)
        assert found == wanted
        assert rest[0] == whole[0] and max(rest[1:]) < 60 < min(whole)
        for i in (0, 1, 1):  # others take its places, each of them one
            _complete(client, f"{i} " + TEXT)
        counter.tokens = 0
        _complete(client, "".join(found))
        assert counter.tokens > min(whole)


def test_beams_and_other_caches_are_generated_as_they_are(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    stored = [read_prompt(model, prompt_of(tokenizer, TEXT))]
    with _client(model, tokenizer, stored=stored, kept=2) as client:
        for settings in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "dynamic"}):
            more = {"generation_config": json.dumps({"max_new_tokens": 8, "pad_token_id": 0, **settings})}
            ids = tokenizer(TEXT, return_tensors="pt")
            wanted = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)
            text = tokenizer.decode(wanted[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
            assert _complete(client, TEXT, **more) == text, settings


class TestModels:
    """What `darkformer serve` takes, up to the moment at which the server would listen."""

    @staticmethod
    def _served(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[TestClient, str]:
        """A client of what the command would serve, and what it printed."""
        apps: list[Any] = []
        monkeypatch.setattr("uvicorn.run", lambda app, **options: apps.append(app))
        result = CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return TestClient(apps[0]), result.output

    def test_a_light_form_with_its_base(
        self, model_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        save_light(model, tmp_path)
        wanted = _generated(load_light(load_model(str(model_folder)), tmp_path), tokenizer, TEXT)
        client, said = self._served(monkeypatch, str(tmp_path), "--base", str(model_folder), "--name", NAME)
        with client:
            assert _complete(client, TEXT) == wanted != ""
        assert f"Requests call the model '{NAME}'" in said

    @pytest.mark.slow
    def test_a_softmax_model_within_a_budget(
        self, model_folder: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = [str(model_folder), "--budget", "60%", "--budget-at", "512", "--context", "320", "--data", text_glob,
                 "--out", str(tmp_path / "run"), "--name", NAME]  # fmt: skip
        client, _ = self._served(monkeypatch, *words)
        made = (tmp_path / "run" / "record.json").read_bytes()
        assert json.loads(made)["memory"] == "60%"
        again, said = self._served(monkeypatch, *words)
        assert "nothing left to do" in said and (tmp_path / "run" / "record.json").read_bytes() == made
        with client, again:
            answers = [_complete(one, TEXT) for one in (client, again)]
        assert answers[0] == answers[1] != ""


class TestCommand:
    """`darkformer serve` as a process of its own."""

    @staticmethod
    def _start(*words: str) -> tuple[subprocess.Popen[str], list[str]]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(darkformer.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, "-m", "darkformer.cli", "serve", *words, "--port", "0"], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "Uvicorn running on" in line:
                break
        return process, lines

    @staticmethod
    def _post(address: str, path: str, **body: object) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    @pytest.mark.slow
    def test_from_a_folder_to_an_answer(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
        state = tmp_path / "book.safetensors"
        words = ["cache", str(folder), "--prompt", str(tmp_path / "book.txt"), "--out", str(state)]
        assert CliRunner().invoke(app, words).exit_code == 0
        process, lines = self._start(str(folder), "--cache", str(state), "--name", "tiny")
        try:
            said = "".join(lines)
            assert process.poll() is None and "Requests call the model 'tiny'" in said, said
            (address,) = re.findall(r"http://[\w.:\[\]]+", said)
            answer = self._post(
                address, "/v1/completions", model="tiny", prompt=f"{TEXT}A block", max_tokens=8, temperature=0
            )
            assert answer["choices"][0]["text"] == _generated(model, tokenizer, f"{TEXT}A block")
            with pytest.raises(urllib.error.HTTPError):
                self._post(address, "/v1/completions", model="other", prompt="x")
        finally:
            process.terminate()
            rest = process.communicate(timeout=HANG_SECONDS)[0]
        assert "goes on from a state of its first" in rest

    def test_softmax_is_not_served(self, model_folder: Path) -> None:
        process, lines = self._start(str(model_folder))
        said = " ".join("".join(lines).split())
        assert process.wait(HANG_SECONDS) == 1 and "computes softmax attention: it is not converted" in said

    def test_transformers_own_command_refuses_a_converted_folder(self, folder: Path) -> None:
        code = "from transformers.cli.serve import Serve; import sys; Serve(sys.argv[1], port=0)"
        run = subprocess.run(
            [sys.executable, "-c", code, str(folder / "model")], capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert run.returncode == 1 and "model type `darkformer`" in run.stderr


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ""}),
        ("completions", {"prompt": TEXT, "max_tokens": 0}),
        ("completions", {"prompt": TEXT, "max_tokens": "many"}),
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": "hi"}),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    path: str, body: dict[str, object], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with _client(model, tokenizer) as client:
        answer = client.post(f"/v1/{path}", json={"model": NAME, **body})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
        assert _complete(client, TEXT)  # and it goes on


def test_a_port_in_use_is_noticed_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["serve", "/nowhere", "--port", str(taken.getsockname()[1])]
        with pytest.raises(darkformer.InputError, match="choose another --port"):
            CliRunner().invoke(app, words, catch_exceptions=False)
