"""Benchmarks through lm-eval: its own Hugging Face model class, with our model inside."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, import_problem

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except Exception as error:  # a broken package raises whatever it likes
    if problem := import_problem(error, "--tasks needs", "pip install 'darkformer[eval]' (lm-eval)"):
        raise problem from error
    raise


def _matches(manager: TaskManager, task: str) -> list[str]:
    """Names for one word of `--tasks`: a .yaml file stands for itself, a wildcard for all that it matches."""
    return [task] if os.path.isfile(task) else manager.match_tasks([task])


def _find(tasks: Sequence[str], include_path: str | Path | None) -> tuple[TaskManager, list[str]]:
    """lm-eval's manager and the names it knows `tasks` by.

    Its own list of tasks takes some seconds to read, so it is left out where every task is a file or in `include_path`.
    """
    folder = str(include_path) if include_path else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = [_matches(manager, task) for task in tasks]
    if not all(names and all(n in manager.all_subtasks or os.path.isfile(n) for n in names) for names in found):
        manager = TaskManager(include_path=folder)
        found = [_matches(manager, task) for task in tasks]
    for task, names in zip(tasks, found, strict=True):
        if not names:
            raise InputError(
                f"--tasks {task}: lm-eval knows no such task, group or tag ('lm-eval ls tasks' lists them); "
                "--include-path names a folder with YAML files of your own."
            )
    return manager, [name for names in found for name in names]


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `metric,filter` keys, numbers only, JSON as it is."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float) and "," in name}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    batch_size: int = 4,
    limit: int = 0,
    max_length: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of `model` on lm-eval tasks, by its class `HFLM`. Scores do not depend on `batch_size`.

    Args:
        tasks: names of tasks, groups or tags as lm-eval lists them, or YAML files.
        include_path: folder with tasks of your own (YAML, and the data they name).
        limit: documents a task at most; 0 takes all.
        max_length: tokens after which a prompt is cut from the left; the model's own limit by default. A converted
            model has no limit of memory there, but its rotary embedding was trained for one.

    Returns:
        task → `metric,filter` (with `metric_stderr,filter`) → value; groups under their own names.

    Raises:
        InputError: an unknown task, or one whose data cannot be loaded.
    """
    manager, names = _find(tasks, include_path)
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    try:
        results = simple_evaluate(
            model=language_model, tasks=names, task_manager=manager, limit=limit or None, log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:  # data sets that cannot be reached, YAML that is none
        raise InputError(f"--tasks {' '.join(tasks)}: lm-eval stopped ({type(error).__name__}: {error}).") from error
    assert results is not None  # None only on other ranks than the first
    return {task: _scores(metrics) for task, metrics in json.loads(json.dumps(results["results"], default=str)).items()}
