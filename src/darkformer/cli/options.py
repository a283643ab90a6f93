"""Options made from the fields of dataclasses, so that a name, a default and a help text are written once.

A verb takes whole dataclasses beside options of its own; `command` shows typer one option for each of their fields,
and puts the dataclasses together again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import NO_BUDGET, USUAL_BUDGET, TrainConfig, field_help
from ..evaluation.settings import BudgetTask
from .recipe import Recipe, Section

#: Boxes of `--help` that the fields of a class are shown in; the others share the general one.
PANELS = {"DarkConfig": "Attention", "TrainConfig": "Finetuning", "RecallTask": "Benchmarks"}

# What several verbs ask for.
Decoder = Annotated[str, typer.Argument(help="Hub id, folder, or .gguf file of a decoder.", metavar="MODEL")]
Model = Annotated[str, typer.Argument(help="Folder of a run or model, hub id, or .gguf file.", metavar="DIR")]
Base = Annotated[
    str, typer.Option("--base", help="DIR holds the light form: the softmax model that it belongs to.", metavar="MODEL")
]
Weights = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="Where the model computes: cpu, cuda, cuda:1, …")]
Data = Annotated[list[str], typer.Option("--data", help=field_help(BudgetTask, "data"))]
HeldOut = Annotated[list[str], typer.Option("--held-out", help=field_help(BudgetTask, "held_out"))]
Context = Annotated[int, typer.Option("--context", help=field_help(BudgetTask, "context"), min=2)]
Dtype = Annotated[str, typer.Option("--dtype", help=field_help(TrainConfig, "dtype"))]
RunFolder = Annotated[Path, typer.Option("--out", help="Run folder: the model goes to OUT/model.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder; begin it if there is none.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder and start afresh.")]


@dataclass(frozen=True)
class Fields:
    """Which fields of a dataclass a verb offers, and what this verb has different: `Annotated[DarkConfig, Fields(…)]`.

    Attributes:
        only: names of the fields; all of them if empty. without: names that are left out.
        defaults: by name, for this verb. minimum: smallest numbers, by name.
    """

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)

    def of(self, owner: type) -> list[dataclasses.Field[Any]]:
        """The fields that are options of the verb."""
        names = self.only or [f.name for f in dataclasses.fields(owner) if "help" in f.metadata]
        return [f for f in dataclasses.fields(owner) if f.name in names and f.name not in self.without]


#: Fields that a budget decides.
WITHOUT_CHOSEN = Fields(without=("window", "keep_exact", "no_features", "layer_windows"))


#: Options that say which keys are exact, so that the usual budget does not.
EXACT_PART = ("paper", "method", "window", "keep_exact", "no_features", "layer_windows")


def budget_beside(options: typer.Context, budget: str) -> str:
    """`budget`, but none in place of the usual one where the caller's other options say which keys are exact."""

    def given(name: str) -> bool:
        """On the command line or in a recipe; a list without elements and a flag that is off say nothing."""
        source = options.get_parameter_source(name)
        value = options.params.get(name)
        return source is not None and source.name != "DEFAULT" and value is not False and value != []

    typed = options.get_parameter_source("budget")
    if budget != USUAL_BUDGET or (typed is not None and typed.name == "COMMANDLINE"):
        return budget
    return NO_BUDGET if any(map(given, EXACT_PART)) else budget


def command(verb: Callable[..., None], from_record: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """`verb` as typer reads it: an option for each field of its dataclasses, and `--config` for a file of them.

    Args:
        verb: its parameters are typer's own, or dataclasses, alone or as `Annotated[Class, Fields(…)]`.
        from_record: turns a record of this verb into a recipe; without, `--config` takes no records.
    """
    parameters: dict[str, inspect.Parameter] = {}
    sections: dict[str, Section] = {}
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        owner, chosen = _owner_and_fields(parameter.annotation)
        if owner is None:
            parameters[parameter.name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        sections[parameter.name] = Section(owner, {f.name for f in chosen.of(owner)})
        for f in chosen.of(owner):
            # Two dataclasses with one field of the same name (a seed) share one option, which has both helps.
            parameters[f.name] = _parameter(owner, f, chosen, parameters.get(f.name))
    if not sections:
        return verb
    records = ", or the record of a finished run" if from_record else ""
    options = {name: p for name, p in parameters.items() if p.annotation is not typer.Context}
    recipe = Recipe(verb.__name__, options, sections, from_record)
    parameters["config_file"] = inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                help=f"YAML file of these options by name{records}. Flags win over it.",
                metavar="FILE",
                is_eager=True,
                callback=recipe.read,
            ),
        ],
    )

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        arguments = {name: values[name] for name in inspect.signature(verb).parameters if name not in sections}
        for name, section in sections.items():
            arguments[name] = section.owner(**{f: _field_value(section.owner, f, values[f]) for f in section.fields})
        verb(**arguments)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters.values()}
    return run


def model_folder(name: str) -> str:
    """A run folder stands for the model inside it."""
    inner = Path(name) / "model"
    return str(inner) if os.path.isfile(inner / "config.json") else name


def _owner_and_fields(annotation: Any) -> tuple[Any, Fields]:
    """A parameter's dataclass and which of its fields; (None, …) if the parameter is an option by itself."""
    owner, *extra = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else (annotation,)
    chosen = next((x for x in extra if isinstance(x, Fields)), Fields())
    return (owner if dataclasses.is_dataclass(owner) else None), chosen


def _parameter(
    owner: type, f: dataclasses.Field[Any], chosen: Fields, shared: inspect.Parameter | None
) -> inspect.Parameter:
    """One field as a parameter of typer."""
    kind, default = _types(owner)[f.name], chosen.defaults.get(f.name, f.default)
    flag, text, panel = f.metadata["flag"], f.metadata["help"], PANELS.get(owner.__name__)
    if not flag:
        flag = f"--{f.name}".replace("_", "-")
        flag += f"/--no-{flag[2:]}" if kind is bool else ""
    if shared is not None:
        text, panel = f"{typing.get_args(shared.annotation)[1].help} Also: {text}", None
    if kind == int | None:
        kind, default = int, default or 0
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        kind, default = list[int] if item is int else list[str], list(default)
    option = typer.Option(flag, help=text, min=chosen.minimum.get(f.name, f.metadata["minimum"]), rich_help_panel=panel)
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


@functools.cache
def _types(owner: type) -> dict[str, Any]:
    """Types by the name of the field."""
    return typing.get_type_hints(owner)


def _field_value(owner: type, name: str, value: Any) -> Any:
    """An option's value as the field has it: lists are tuples, and 0 stands for the None of an `int | None`."""
    if isinstance(value, list):
        return tuple(value)
    return None if value == 0 and isinstance(_types(owner)[name], types.UnionType) else value
