"""Whatever goes wrong is one line on standard error and exit code 1: damaged files, odd names, absurd sizes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hang import HANG_SECONDS
from safetensors.torch import load_file, save_file

import darkformer
from darkformer.cli import main
from darkformer.config import DarkConfig
from darkformer.hf.gguf_header import check_header
from darkformer.records import RUN_FILE, check_folder, finished_record, open_run, read_kept, write_kept
from darkformer.train.data import load_documents

SMALL = [
    "--steps",
    "0",
    "--seq-len",
    "64",
    "--context",
    "64",
    "--features",
    "16",
    "--window",
    "8",
    "--dtype",
    "float32",
]
Refused = Callable[..., str]


def linearize(model: str | Path, out: str | Path, data: str, *more: str) -> list[str]:
    return ["linearize", str(model), "--out", str(out), "--data", data, *SMALL, *more]


def generate(model: str | Path, *more: str) -> list[str]:
    return ["generate", str(model), "--prompt", "The with", "--max-new-tokens", "2", *more]


@pytest.fixture
def copy_of_model(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def edited(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def finished(model_folder: Path, text_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `linearize` leaves it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["darkformer", *linearize(model_folder, out, text_glob)])
        main()
    assert not caught.value.code
    return out


# names


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2500, "~nobody-has-this-name/x", "x" * 300 + ".gguf", "a\0b", ""])
def test_any_name_of_a_model_or_of_data(name: str, refused: Refused, tmp_path: Path, text_glob: str) -> None:
    model = refused(*generate(name))
    said = ("cannot be loaded", "GGUF", "no config.json", "no such folder")
    assert any(x in model for x in said) and "Error: " not in model[:15]
    refused("evaluate", name, "--data", text_glob, "--out", str(tmp_path / "e"))
    data = refused(*linearize("x.gguf", tmp_path / "r", text_glob))
    assert "GGUF" in data
    with pytest.raises(darkformer.DarkformerError, match="--data"):
        load_documents([name])


@pytest.mark.parametrize("verb", ["linearize", "evaluate", "recall", "diagnose", "budget", "bench"])
@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_an_output_folder_that_cannot_be_is_refused_before_the_work(
    verb: str, where: str, refused: Refused, tmp_path: Path, text_glob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for module in ("train.linearize", "evaluation.compare", "diagnostics.run", "evaluation.budget"):
        monkeypatch.setattr(f"darkformer.{module}.load_tokenizer", lambda name: pytest.fail("work has begun"))
    words = {"recall": ["evaluate", "x", "--recall"], "bench": ["bench", "--quick"]}.get(verb, [verb, "x"])
    assert str(tmp_path / where) in refused(*words, "--out", str(tmp_path / where))
    assert (tmp_path / "file").read_text() == "mine"


def test_output_folders_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "dangling/below", "loop", "a\0b"):
        with pytest.raises(darkformer.RunFolderError):
            check_folder(tmp_path / name)
    check_folder(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    if os.geteuid():
        (tmp_path / "mine").mkdir(mode=0o500)
        with pytest.raises(darkformer.RunFolderError, match="permission"):
            check_folder(tmp_path / "mine" / "r")


# run folders


@pytest.mark.parametrize(
    "content", ["", '{"settings": {"a', "[]", "null", "{}", '{"settings": 3, "finished": true}', "[" * 100_000]
)
@pytest.mark.parametrize("name", [RUN_FILE, "record.json"])
def test_a_damaged_file_of_a_run(
    name: str, content: str, finished: Path, refused: Refused, model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / name).write_text(content)
    said = refused(*linearize(model_folder, out, text_glob, "--resume"))
    assert str(out / name) in said and "--overwrite" in said
    if name == "record.json":
        said = refused("push", str(out), "me/x")
        assert "record" in said and "Error: " not in said
        if content != "{}":  # a file of no options
            refused(*linearize(model_folder, tmp_path / "other", text_glob, "--config", str(out / name)))


def test_a_converted_model_is_refused_before_its_text_is_read(finished: Path, refused: Refused, tmp_path: Path) -> None:
    said = refused(*linearize(finished / "model", tmp_path / "again", "nosuch.txt"))
    assert "is converted already: give the softmax model" in said


def test_a_folder_that_is_not_there(refused: Refused, text_glob: str, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nosuch"), "nosuch/", "./nosuch"):
        assert f"{name}: no such folder." in refused(*linearize(name, tmp_path / "run", text_glob))


def test_a_missing_or_edited_record(
    finished: Path, refused: Refused, model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    record = json.loads((out / "record.json").read_text())
    again = linearize(model_folder, out, text_glob, "--resume")
    (out / "record.json").write_text(json.dumps({**record, "memory": 3, "memory_at": [], "frontier": 0}))
    assert "record.json: budget_at" in refused(
        *linearize(model_folder, tmp_path / "b", text_glob, "--config", str(out / "record.json"))
    )
    for change in ({"scores": []}, {"scores": {"softmax": 3}}, {"scores": None}, {"seconds": 0}):
        (out / "record.json").write_text(json.dumps({**record, **change}))
        assert "record.json: it was altered after the run" in refused(*again)
    (out / "record.json").unlink()
    assert "record.json" in refused(*again)
    (out / RUN_FILE).unlink()
    assert "holds no run" in refused(*again)


@pytest.mark.parametrize("value", [{"x": [1, 2.5, None, "é"]}, [], {"1": float("nan")}, 0.1 + 0.2])
def test_what_a_run_keeps_is_taken_up_as_it_was_written(value: Any, tmp_path: Path) -> None:
    write_kept(tmp_path / "kept.json", value)
    assert repr(read_kept(tmp_path / "kept.json")) == repr(value)
    whole = json.loads((tmp_path / "kept.json").read_text())
    for content in ([], None, {}, value, {**whole, "value": [value]}, {**whole, "checksum": None}):
        (tmp_path / "kept.json").write_text(json.dumps(content))
        with pytest.raises(darkformer.RunFolderError, match="it was altered, or an earlier version"):
            read_kept(tmp_path / "kept.json")


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_that_was_killed_while_it_claimed_its_folder(flags: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / f"{RUN_FILE}.part").write_text('{"sett')
    asked = {"resume": False, "overwrite": False} | flags
    assert not open_run(tmp_path, {"a": 1}, **asked)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]
    assert open_run(tmp_path, {"a": 1}, resume=True, overwrite=False)
    assert finished_record(tmp_path) is None


def test_a_run_that_was_killed_while_it_overwrote_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(tmp_path, {"a": 1}, resume=False, overwrite=False)
    (tmp_path / "model").mkdir()

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        open_run(tmp_path, {"a": 2}, resume=False, overwrite=True)
    assert not open_run(tmp_path, {"a": 2}, resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk(refused: Refused, model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    (tmp_path / f"{RUN_FILE}.part").symlink_to("/dev/full")
    assert "No space left on device" in refused(*linearize(model_folder, tmp_path, text_glob))


# models


@pytest.mark.parametrize(
    "content", ["[]", "null", '"x"', "3", "", '{"a', "[" * 100_000 + "]" * 100_000, '{"a":' * 5000]
)
def test_a_config_that_is_none(content: str, refused: Refused, copy_of_model: Path) -> None:
    (copy_of_model / "config.json").write_text(content)
    assert "cannot be loaded" in refused(*generate(copy_of_model))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", '{"a', "[" * 100_000])
def test_a_damaged_tokenizer(name: str, content: str, refused: Refused, copy_of_model: Path) -> None:
    (copy_of_model / name).write_text(content)
    assert "tokenizer cannot be loaded" in refused(*generate(copy_of_model))


@pytest.mark.parametrize(
    "value", [True, [1], "x", 3, {"foo": 1}, {"method": ["dark"]}, {"draw": {}}, {"num_features": "x"}]
)
def test_what_a_config_says_of_the_conversion(value: Any, refused: Refused, finished: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    edited(model / "config.json", darkformer=value)
    said = refused(*generate(model))
    assert "DarkConfig" in said or "field" in said or "must be" in said or "unknown" in said, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 10**13}, "window=10000000000000"),
        ({"sinks": 10**13}, "sinks=10000000000000"),
        ({"window": 10**400}, "window=1000"),
        ({"layer_windows": ["²=5"]}, "give LAYER=WINDOW"),
        ({"layer_windows": ["1" * 5000 + "=5"]}, "give LAYER=WINDOW"),
        ({"keep_exact": ["1" * 5000]}, "name a layer"),
        ({"keep_exact": ["١"]}, "name a layer"),
        ({"method": "exact"}, "tensors of feature maps that its config.json does not describe"),
        ({"method": "performer"}, "tensors of feature maps that its config.json does not describe"),
        ({"center": False}, "tensors of feature maps that its config.json does not describe"),
    ],
)  # fmt: skip
def test_a_config_that_was_changed_beside_its_weights(
    change: dict[str, Any], message: str, refused: Refused, finished: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    edited(model / "config.json", darkformer={**config["darkformer"], **change})
    assert message in refused(*generate(model))


@pytest.mark.parametrize("base", [[1], 3, {}, {"name": "x", "dtype": None, "fingerprint": 5}])
def test_what_a_config_says_of_its_base(base: Any, refused: Refused, finished: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    edited(model / "config.json", darkformer_base=base)
    assert "darkformer_base in config.json does not say the" in refused(*generate(model))


@pytest.mark.parametrize("layers", [True, [3], [{}], {"name": "x"}])
def test_what_a_config_says_of_converted_layers(layers: Any, refused: Refused, finished: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    edited(model / "config.json", darkformer_layers=layers)
    assert "cannot be loaded" in refused(*generate(model))


def test_weights_of_another_shape(refused: Refused, copy_of_model: Path) -> None:
    weights = load_file(copy_of_model / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(5, 32)
    save_file(weights, copy_of_model / "model.safetensors", metadata={"format": "pt"})
    assert "cannot be loaded" in refused(*generate(copy_of_model))


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", (10**12).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (33).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1]}}' + bytes(4)],
)  # fmt: skip
def test_damaged_weights(content: bytes, refused: Refused, copy_of_model: Path) -> None:
    (copy_of_model / "model.safetensors").write_bytes(content)
    assert "cannot be loaded" in refused(*generate(copy_of_model))


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + (5).to_bytes(8, "little") * 2, b"GGUF\x03\0\0\0" + bytes(80),
     b"GGUF\x03\0\0\0" + (2**62).to_bytes(8, "little") * 2, b"GGUF\x03\0\0\0" + b"\xff" * 200],
)  # fmt: skip
def test_a_damaged_gguf_file(content: bytes, refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(content)
    assert "cannot be loaded" in refused(*generate(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("order", "version"), [("<", 3), ("<", 2), (">", 3)])
def test_a_gguf_header_with_every_kind_of_value(order: str, version: int, tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack(f"{order}Q", len(value)) + value

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    fields = [struct.pack(f"{order}I", kind) + bytes(size) for kind, size in sizes.items()]
    fields += [struct.pack(f"{order}IIQ", 9, kind, 3) + bytes(3 * size) for kind, size in sizes.items()]
    fields.append(struct.pack(f"{order}I", 8) + text(b"a text"))
    fields.append(struct.pack(f"{order}IIQ", 9, 8, 1000) + b"".join(text(b"x" * (i % 7)) for i in range(1000)))
    start = b"GGUF" + struct.pack(f"{order}IQQ", version, 0, len(fields))
    file = tmp_path / "m.gguf"
    file.write_bytes(start + b"".join(text(f"key.{i}".encode()) + field for i, field in enumerate(fields)))
    check_header(file)
    for cut in (1, 100, 6000):  # not even the last field is whole, and so on
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(darkformer.InputError, match="header is damaged"):
            check_header(tmp_path / "cut.gguf")


def test_a_gguf_header_that_counts_beyond_its_file(refused: Refused, tmp_path: Path) -> None:
    def number(n: int, size: int = 8) -> bytes:
        return n.to_bytes(size, "little")

    def header(value: bytes, kind: int = 9, *, fields: int = 1, tensors: int = 0) -> bytes:
        key = number(1) + b"k" + number(kind, 4)
        return b"GGUF" + number(3, 4) + number(tensors) + number(fields) + key + value + bytes(64)

    nested = b"".join(number(9, 4) + number(1) for _ in range(1000))
    for content in (
        header(number(0, 4) + number(2**50)),  # an array of bytes
        header(number(8, 4) + number(2**50)),  # of strings
        header(number(9, 4) + number(2**50)),  # of arrays
        header(nested), header(number(2**60), 8), header(number(0), 8, tensors=2**40), header(b"", 77),
        header(number(0), 8, fields=2**50), header(number(0, 4) + number(2**24) + bytes(2**24)),
    ):  # fmt: skip
        (tmp_path / "m.gguf").write_bytes(content)
        assert "its header is damaged or altered" in refused(*generate(tmp_path / "m.gguf"))


# values


@pytest.mark.parametrize("prompt", ["", "bytes \udcff"])
def test_a_prompt_that_is_none(prompt: str, refused: Refused, model_folder: Path, finished: Path) -> None:
    for model in (model_folder, finished):
        assert "the prompt" in refused("generate", str(model), "--prompt", prompt)


def test_a_temperature_that_no_logit_can_be_divided_by(refused: Refused, model_folder: Path) -> None:
    assert "--temperature 1e-40" in refused(*generate(model_folder, "--temperature", "1e-40"))


@pytest.mark.parametrize(
    "words", [["--seed", "18446744073709551616"], ["--seed", str(-(2**63) - 1)], ["--temperature", "nan"]]
)
def test_seeds_and_temperatures_out_of_range(
    words: list[str], model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["darkformer", *generate(model_folder, *words)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and words[0] in capfd.readouterr().err  # typer's own refusal, with its usage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "1000000000000"], "num_features=1000000000000"),
        (["--features", "100000000000000000000"], "num_features=100000000000000000000"),
        (["--window", "1000000000000"], "window=1000000000000"),
        (["--layer-window", "1=1000000000000"], "window=1000000000000"),
        (["--sinks", "1000000000000"], "sinks=1000000000000"),
        (["--seed", "99999999999999999999"], "seed=99999999999999999999"),
        (["--steps", "1000000000000000000000"], "steps=1000000000000000000000"),
        (["--batch-size", "1000000000000000000000"], "batch_size=1000000000000000000000"),
        (["--seq-len", "100000000000"], "seq_len=100000000000"),
        (["--context", "100000000000"], "one sequence needs 100000000000"),
    ],
)
def test_absurd_sizes_are_refused_at_once(
    words: list[str], message: str, refused: Refused, model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    assert message in refused(*linearize(model_folder, tmp_path / "r", text_glob), *words)
    assert not (tmp_path / "r").exists()


def test_features_are_refused_by_the_memory_they_take() -> None:
    with pytest.raises(
        darkformer.ConfigError, match=r"num_features=1000000000 in 8 .* takes 12,288 GB, and this machine"
    ):
        darkformer.feature_map(DarkConfig(num_features=10**9), num_heads=8, num_kv_heads=8, head_dim=64)


def test_links_that_form_a_loop_are_entered_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("x.txt", "a/y.txt", "a/b/z.txt", ".hidden/no.txt", "a/b/other.md"):
        (tmp_path / name).write_text(name)
    for i in range(3):  # a walk that follows them goes 3^40 ways
        (tmp_path / "a" / f"link{i}").symlink_to(tmp_path)

    def hanging(*args: object) -> None:
        raise TimeoutError("the walk goes on")

    before = signal.signal(signal.SIGALRM, hanging)
    signal.alarm(int(HANG_SECONDS))
    try:
        for pattern in ("**/*.txt", "**/**/*.txt", "*/../**/*.txt"):
            assert sorted(load_documents([str(tmp_path / pattern)])) == ["a/b/z.txt", "a/y.txt", "x.txt"], pattern
        assert sorted(load_documents([str(tmp_path / "a" / "**")])) == ["a/b/other.md", "a/b/z.txt", "a/y.txt", "x.txt"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# the handler itself


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out/x"), "error: out/x: No space left on device."),
        (OSError("two\nlines"), "error: OSError: two lines (darkformer --debug VERB … shows where)"),
        (KeyError("scores"), "error: KeyError: 'scores' (darkformer --debug VERB … shows where)"),
        (darkformer.InputError("a [/] \x1b[31m"), r"error: a [/] \x1b[31m"),
        (
            ImportError("cannot import name"),
            "error: ImportError: cannot import name (darkformer --debug VERB … shows where)",
        ),
    ],
)
def test_every_error_is_one_line(
    error: Exception, line: str, refused: Refused, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("darkformer.train.linearize.linearize", failing)
    assert refused("linearize", "x", "--out", "r") == line
    monkeypatch.setattr(sys, "argv", ["darkformer", "--debug", "linearize", "x", "--out", "r"])
    with pytest.raises(SystemExit):
        main()
    shown = capfd.readouterr().err
    assert "Traceback" in shown and "in failing" in shown and shown.splitlines()[-1] == line
    assert traceback.format_exception_only(error)[0].split(":")[0] in shown


def test_a_name_that_the_terminal_cannot_write(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    """The work is done when the names are printed."""
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["darkformer", *generate(model_folder, "--prompt", "naïve →")])
        with pytest.raises(SystemExit) as caught:
            main()
    assert not caught.value.code and r"na\xefve \u2192" in (tmp_path / "out").read_text()
