"""The model card of a run, written from its record, and the upload of a run's model with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..config import DarkConfig, TrainConfig
from ..errors import InputError, RunFolderError
from ..records import RECORD_FILE, read_json
from ..reporting import printable

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STAGES = {
    "softmax": "softmax, before",
    "converted": "converted, calibrated",
    "transferred": "fitted to softmax",
    "finetuned": "finetuned",
}


def _shown(source: str) -> str:
    """A name without the folders of the machine it was found on; ids of the hub and globs' patterns stay readable."""
    path = Path(os.path.expanduser(source))
    return path.name if path.is_absolute() or os.path.exists(path) or len(path.parts) > 2 else source


def _escaped(text: Any) -> str:
    """Text on one line of a card, none of it markdown or HTML: names of models and files may be anything."""
    line = " ".join(printable(str(text)).split())
    return re.sub(r"[\\`*<>|~$&]|\](?=\()|\b_|_\b", r"\\\g<0>", line)


def _base(record: Mapping[str, Any]) -> str | None:
    name = record["model"]
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) and not name.lower().endswith(".gguf") else None


def _data(record: Mapping[str, Any], title: str, text: str) -> ModelCardData:
    stage = list(record["scores"])[-1]
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="text", dataset_name=f"held-out part of {text}",
            metric_type=metric, metric_value=record["scores"][stage][metric],
        )
        for metric in ("perplexity", "accuracy")
    ]  # fmt: skip
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", base_model=_base(record), model_name=title,
        tags=["darkformer", "linear-attention", "random-features"], eval_results=results,
    )  # fmt: skip


def _scores(record: Mapping[str, Any]) -> str:
    rows = [
        f"| {_escaped(_STAGES.get(name, name))} | {s['loss']:.4f} | {s['perplexity']:.2f} | {s['accuracy']:.2%} "
        f"| {s['tokens']:d} |"
        for name, s in record["scores"].items()
    ]
    return "\n".join(["| | loss | perplexity | next-token accuracy | tokens |", "|---|---:|---:|---:|---:|", *rows])


_TEXT = """
# {title}

{base} with its softmax attention replaced by linear attention (`{method}`, {features}), by
[darkformer](https://arxiv.org/abs/2603.04127) {version}. {memory}

```python
import darkformer  # before loading: without it transformers refuses these weights, which are not those of softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

## Scores

On the held-out part of {text}:

{scores}

## How it was made

{training} Every option, by its name in `DarkConfig` and `TrainConfig`:

| attention | | training | |
|---|---|---|---|
{options}

Versions: {versions}. Commit {commit}, {device}, {date}.

The licence and the limits of {base} apply.
"""


def _options(record: Mapping[str, Any]) -> str:
    # What was converted with; records of earlier versions say only what was asked for.
    sides = (record.get("converted_config", record["config"]).items(), record["budget"].items())
    rows = zip_longest(*sides, fillvalue=("", ""))
    return "\n".join("| " + " | ".join(_escaped(cell) for pair in row for cell in pair) + " |" for row in rows)


def model_card(record: Mapping[str, Any], repo_id: str = "") -> ModelCard:
    """The card of a `darkformer linearize` run, from the record it wrote; every number in it is the record's.

    Args:
        record: as returned by `linearize`, or read from `record.json`.
        repo_id: name on the hub; `.` (the folder itself) stands in where there is none yet.

    Raises:
        InputError: the record is not one of `darkformer linearize`, or was altered.
    """
    if not isinstance(record, Mapping) or record.get("command") != "linearize" or "scores" not in record:
        command = record.get("command") if isinstance(record, Mapping) else record
        raise InputError(f"a record of {command!r}: model cards are written from records of darkformer linearize.")
    try:
        return _card(record, repo_id)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"the record is not as darkformer linearize wrote it ({type(error).__name__}: {error}): restore it, or run "
            "linearize again."
        ) from error


def _features(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How many features a head has, or that calibration or transfer left them to none."""
    rows = record.get("transfer") or record.get("calibration") or []
    left = not rows or any(any(row.get("features", [True])) for row in rows)  # earlier versions dropped none
    count = DarkConfig.from_dict(config).feature_count if left else 0
    return f"{count or 'no'} features"


def _card(record: Mapping[str, Any], repo_id: str) -> ModelCard:
    config, budget, made = record.get("converted_config", record["config"]), record["budget"], record["environment"]
    method = DarkConfig.from_dict(config).method
    base, text = _shown(record["model"]), ", ".join(map(_shown, record["held_out"] or record["data"]))
    title = repo_id.rsplit("/", 1)[-1] or f"{Path(base).stem}-{method}"
    trained = "Calibrated, not finetuned."
    if steps := len(record["losses"]):
        tokens = f"{budget['batch_size']} × {budget['seq_len']} tokens"
        trained = f"Finetuned for {steps} steps of {tokens} (`train={TrainConfig(**budget).train}`)."
    kept = config.get("keep_exact") or []
    memory = "The state it keeps while generating does not grow."
    if method == "exact":
        memory = "Softmax stays everywhere: its keys and values grow with the text."
    elif kept:
        memory = (
            f"Softmax stays in {', '.join(map(_escaped, kept))} (layers, or key/value heads of layers): their keys and "
            "values grow with the text, what the others keep does not."
        )
    if choice := record.get("choice"):
        size = record.get("kept_bytes") or choice["size"]  # what was chosen may not count the features
        memory += f" Within a budget of {_escaped(record['memory'])}: {size / 1e6:.1f} MB at {choice['length']:,} "
        memory += f"tokens, softmax {choice['softmax'] / 1e6:.1f} MB."
    others = " (some layers differ)" if config.get("layer_windows") else ""
    body = _TEXT.format(
        memory=memory,
        title=_escaped(title), base=_escaped(base), method=method, repo=repo_id or ".", text=_escaped(text),
        scores=_scores(record),
        features=f"{_features(record, config)}, window {config['window']}{others}, {config['sinks']} sinks",
        version=_escaped(made["versions"]["darkformer"]), training=trained, options=_options(record),
        versions=_escaped(", ".join(f"{name} {number}" for name, number in made["versions"].items())),
        commit=_escaped(made["commit"] or "unknown"), device=_escaped(made["device"]), date=_escaped(made["date"]),
    )  # fmt: skip
    return ModelCard(f"---\n{_data(record, printable(title), printable(text)).to_yaml()}\n---\n{body}")


def push_run(out: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads `OUT/model` of a finished `linearize` run to the hub, with its card and its record. Returns the address.

    The account is the one of `hf auth login`.

    Raises:
        RunFolderError: the folder holds no finished run. InputError: an altered record, or the hub refused (why).
    """
    out = Path(out)
    if not all(map(os.path.isfile, (out / RECORD_FILE, out / "model" / "config.json"))):
        raise RunFolderError(f"{out} holds no finished run of darkformer linearize (record.json and model/).")
    record = read_json(out / RECORD_FILE)
    card = model_card(record, repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        card.save(out / "model" / "README.md")
        return str(api.upload_folder(repo_id=repo_id, folder_path=out / "model", commit_message="darkformer linearize"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{repo_id}: the hub refused ({type(error).__name__}: {error}).") from error
