"""`--config`: a file of options, or a run's record, gives the run that the same flags give; flags win over it."""

from __future__ import annotations

import ast
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import darkformer
from darkformer import ConfigError, DarkConfig, TrainConfig
from darkformer.cli import app

SOURCES = Path(darkformer.__file__).parent


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches `linearize`, which does nothing here."""
    calls: list[dict[str, Any]] = []

    def linearize(model: str, out: Path, **options: Any) -> dict[str, Any]:
        calls.append({"model": model, "out": out, **options})
        del calls[-1]["reporter"], calls[-1]["measure_frontier"]
        return {"scores": {}}

    monkeypatch.setattr("darkformer.train.linearize.linearize", linearize)
    return calls


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_a_recipe_is_the_flags_it_names(calls: list[dict[str, Any]], recipe: Path) -> None:
    flags = [
        "x.gguf", "--out", "r", "--data", "a.txt", "--data", "b.txt", "--features", "16", "--keep-exact", "6",
        "--keep-exact", "18.10", "--layer-window", "3=256", "--untied", "--lr", "2e-05", "--warmup", "7",
        "--context", "64",
    ]  # fmt: skip
    run("linearize", *flags)
    flat = """
        model: x.gguf
        out: r
        data: [a.txt, b.txt]
        features: 16
        keep-exact: [6, "18.10"]
        layer_windows: [[3, 256]]
        tied: false
        lr: 2e-05
        warmup: 7
        context: 64
    """
    sections = """
        model: x.gguf
        out: r
        data: [a.txt, b.txt]
        config: {num_features: 16, keep_exact: [6, "18.10"], layer_window: 3=256, tied: false}
        train: {lr: 0.00002, warmup: 7}
        context: 64
    """
    for text in (flat, sections):
        recipe.write_text(text)
        run("linearize", "--config", str(recipe))
    assert calls[1] == calls[0] == calls[2]
    assert calls[0]["config"].keep_exact == (6, "18.10") and calls[0]["training"].warmup == 7


def test_flags_win(calls: list[dict[str, Any]], recipe: Path) -> None:
    recipe.write_text(
        "{model: x.gguf, window: 32, steps: 7, center: false, keep_exact: [1], train: none, budget_at: 5}"
    )
    run("linearize", "y.gguf", "--config", str(recipe), "--out", "r", "--window", "16", "--center", "--keep-exact", "2")
    (call,) = calls
    assert call["model"] == "y.gguf" and call["training"].steps == 7 and call["training"].train == "none"
    assert call["config"] == DarkConfig(window=16, keep_exact=(2,)) and call["budget_at"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widow: 8", "widow: darkformer linearize has no such option. Did you mean window?"),
        ("config: {geometry_lr: 1}", "config: geometry_lr: darkformer linearize has no such option"),
        ("config.window: 8", "config.window: darkformer linearize has no such option"),
        ("zzz: 8", "zzz: .* darkformer linearize --help lists them"),
        ("config: 8", "config: give the section's options as NAME: VALUE"),
        ("window: {a: 8}", "give one value"),
        ("center: 1", "must be true or false"),
        ("{config: {seed: 1}, train: {seed: 2}}", "train: seed: 2 here, 1 elsewhere in the file"),
        ("{window: 8, config: {window: 9}}", "9 here, 8 elsewhere"),
        ("window: -8", "window=-8: must be an integer of at least 0"),
        ("window", "NAME: VALUE"),
        ("{window", "recipe.yaml"),
        ("command: budget", "a record of darkformer budget; darkformer linearize takes a record of linearize"),
        ("command: linearize", "a record without 'model'"),
        ("a: &a [1]\ndata: *a", r"aliases \(\*name\) are not taken"),
        ("x" * 1_000_001, "1,000,000 characters at most"),
        ("data: " + "[" * 5000 + "]" * 5000, "1,000 brackets at most"),
        ("", "NAME: VALUE"),
        ("# nothing yet", "NAME: VALUE"),
        ("steps: 1\nsteps: 2", "'steps' is there twice"),
        ("config: {seed: 1, seed: 2}", "'seed' is there twice"),
        ("config: [1, 2]", "config: give the section's options as NAME: VALUE"),
        ("data: [a, null]", "give a list of names"),
        ("data: {a: b}", "give a list of names"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say(calls: list[dict[str, Any]], recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run("linearize", "x.gguf", "--out", "r", "--config", str(recipe))
    assert not calls


def test_aliases_of_aliases_take_no_memory(calls: list[dict[str, Any]], recipe: Path) -> None:
    """Lists of nine names each, of the list before: written out they are 12 MB, with three levels more 9 GB."""
    lists = ["l0: &l0 [xxx,xxx,xxx,xxx,xxx,xxx,xxx,xxx,xxx]"]
    lists += [f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 6)]
    recipe.write_text("\n".join([*lists, "data: *l5"]))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="aliases"):
            run("linearize", "x.gguf", "--out", "r", "--config", str(recipe))
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


def test_values_are_what_is_written(calls: list[dict[str, Any]], recipe: Path) -> None:
    """Not what YAML makes of them: no number loses a digit, and tags make nothing."""
    recipe.write_text(
        "keep_exact: [18.10, 6]\nlr: 2e-5\nseed: !!int 7\ntied: No\nheld_out: ~\nsteps: 0\nconfig:\ncontext: null\n"
    )
    run("linearize", "x.gguf", "--out", "r", "--config", str(recipe))
    config, training = calls[0]["config"], calls[0]["training"]
    assert config.keep_exact == (6, "18.10") and config.seed == 7 and config.tied is False
    assert (training.lr, training.steps) == (2e-5, 0)


@pytest.mark.parametrize(
    ("name", "steps", "method"),
    [("linearize", 500, "dark"), ("smollm2-135m", 60, "local"), ("gemma3-270m", 60, "local")],
)
def test_the_recipes(calls: list[dict[str, Any]], name: str, steps: int, method: str) -> None:
    run("linearize", "--config", str(SOURCES.parents[1] / "recipes" / f"{name}.yaml"))
    (call,) = calls
    assert (call["training"].steps, call["budget"], call["config"].method) == (steps, "10%", method)


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        ([], "usual"), (["--sinks", "2", "--steps", "0", "--features", "32"], "usual"), (["--budget", "30%"], "30%"),
        (["--budget", "none"], "none"), (["--paper"], "none"), (["--paper", "--budget", "none"], "none"),
        (["--method", "performer"], "none"), (["--method", "dark"], "none"), (["--window", "64"], "none"),
        (["--keep-exact", "1"], "none"), (["--layer-window", "1=32"], "none"), (["--no-features", "1"], "none"),
        (["--method", "local", "--budget", "10%"], "10%"),
    ],
)  # fmt: skip
def test_the_usual_budget(calls: list[dict[str, Any]], recipe: Path, words: list[str], budget: str) -> None:
    """Where nothing says which keys are exact, and only there, in a file as on the command line."""
    run("linearize", "x.gguf", "--out", "r", *words)
    if "--paper" not in words:
        pairs = zip(words[::2], words[1::2], strict=True)
        recipe.write_text("".join(["seed: 0\n", *(f"{flag[2:]}: '{value}'\n" for flag, value in pairs)]))
        run("linearize", "x.gguf", "--out", "r", "--config", str(recipe))
    assert all(call["budget"] == budget for call in calls)


def test_options_that_say_nothing_leave_the_usual_budget(calls: list[dict[str, Any]], recipe: Path) -> None:
    recipe.write_text("{paper: false, keep_exact: [], no_features: []}")
    run("linearize", "x.gguf", "--out", "r", "--config", str(recipe))
    recipe.write_text("window: 32")
    run("linearize", "x.gguf", "--out", "r", "--config", str(recipe), "--budget", "usual")
    assert [call["budget"] for call in calls] == ["usual", "usual"]


@pytest.mark.parametrize("text", ['{"seed": 1, "seed": 2}', '{"model": true}', '{"data": [false]}', '{"tied": 1}'])
def test_json_is_taken_as_strictly(calls: list[dict[str, Any]], tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match=r"there twice|give one value|give a list|true or false"):
        run("linearize", "x.gguf", "--out", "r", "--config", str(tmp_path / "recipe.json"))
    os.mkfifo(tmp_path / "pipe")
    for file in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match="it is not a file"):
            run("linearize", "x.gguf", "--out", "r", "--config", file)


def test_a_file_that_is_not_there_and_a_record_where_none_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: it cannot be read \(No such file"):
        run("linearize", "--config", str(tmp_path / "no.yaml"))
    (tmp_path / "record.json").write_text('{"command": "diagnose"}')
    with pytest.raises(ConfigError, match="diagnose takes a YAML file of options"):
        run("diagnose", "x.gguf", "--config", str(tmp_path / "record.json"))


@pytest.mark.parametrize(
    ("text", "option"), [("steps: many", "--steps"), ("context: 1", "--context"), ("steps: 2.5", "--steps")]
)
def test_a_recipes_values_follow_the_command_lines_rules(recipe: Path, text: str, option: str) -> None:
    recipe.write_text(text)
    result = CliRunner().invoke(app, ["linearize", "x.gguf", "--out", "r", "--config", str(recipe)])
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.output


def test_what_is_missing_is_asked_for(recipe: Path) -> None:
    recipe.write_text("steps: 3")
    result = CliRunner().invoke(app, ["linearize", "--config", str(recipe)])
    assert result.exit_code == 2 and "Missing argument 'MODEL'" in result.output


def test_a_record_is_a_recipe_of_the_same_run(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    words = [
        "--data", text_glob, "--steps", "2", "--seq-len", "64", "--context", "64", "--features", "8", "--window", "8",
        "--dtype", "float32", "--keep-exact", "1.1", "--layer-window", "0=16", "--untied", "--seed", "5", "--lr",
        "3e-5",
    ]  # fmt: skip
    run("linearize", str(model_folder), "--out", str(out), *words)
    # In the same folder it is that run, which is finished; elsewhere it runs again, to the same end.
    assert "finished: nothing left" in run("linearize", "--config", f"{out}/record.json", "--out", str(out), "--resume")
    run("linearize", "--config", f"{out}/record.json", "--out", str(again))
    first, second = (json.loads((folder / "record.json").read_text()) for folder in (out, again))
    for record in (first, second):
        del record["environment"], record["seconds"]
    assert first == second
    with pytest.raises(darkformer.RunFolderError, match="'lr': 3e-05"):  # another run than its record's
        run("linearize", "--config", f"{out}/record.json", "--lr", "1", "--out", str(out), "--resume")


def test_records_of_the_first_release(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    """They know neither budgets nor a context, and fewer fields."""
    config, train = DarkConfig(num_features=9).to_dict(), dict(vars(TrainConfig(steps=4, dtype="float32")))
    for name in ("no_features", "layer_windows", "drop_features"):
        del config[name]
    del train["redraw_every"]
    record = {
        "command": "linearize", "model": "x.gguf", "data": ["pydoc"], "held_out": [], "config": config,
        "budget": train, "scores": {}, "losses": [],
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(record))
    run("linearize", "--config", str(tmp_path / "record.json"), "--out", "r")
    assert calls[0]["config"] == DarkConfig(num_features=9) and calls[0]["budget"] == "none"  # as it was then
    assert calls[0]["training"] == TrainConfig(steps=4, dtype="float32")


def test_a_budget_in_a_record(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    run("linearize", "x.gguf", "--out", "r", "--budget", "20%", "--budget-at", "4096")
    record = {
        "command": "linearize", "model": "x.gguf", "data": ["pydoc"], "held_out": [], "memory": "20%",
        "config": calls[0]["config"].to_dict(), "budget": vars(calls[0]["training"]), "memory_at": 4096,
        "context": 2048, "frontier": None,
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(record))
    run("linearize", "--config", str(tmp_path / "record.json"), "--out", "r")
    assert calls[0] == calls[1]


def shown_options() -> dict[tuple[str, str], str]:
    """Help by verb and flags."""
    return {
        (name, " ".join(p.opts)): p.help
        for name, verb in get_command(app).commands.items()  # type: ignore[attr-defined]
        for p in verb.params
        if p.help
    }


def test_no_help_is_written_twice() -> None:
    written: list[str] = []
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                written.append(node.value)
    helps = set(shown_options().values())
    assert len(helps) > 60
    assert not [text for text in helps if written.count(text) > 1]


@pytest.mark.parametrize("flag", ["--data", "--held-out", "--features", "--sinks", "--dtype", "--budget-at"])
def test_an_option_that_means_the_same_reads_the_same(flag: str) -> None:
    others = {"reproduce", "generate", "cache", "serve"}  # whose --dtype is the scale's, and that of the weights
    shown = {text for (verb, flags), text in shown_options().items() if flag in flags.split() and verb not in others}
    assert len(shown) == 1


def test_every_field_is_an_option_of_linearize() -> None:
    command = get_command(app).commands["linearize"]  # type: ignore[attr-defined]
    names = {p.name for p in command.params}
    assert {*DarkConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__} <= names


def test_budgets_window_is_said_to_be_another() -> None:
    assert "Unlike other verbs' --window" in " ".join(run("budget", "--help").replace("│", " ").split())
