"""`--config`: the options of a verb from a YAML file, or from the record of a finished run."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError

#: Characters of a YAML file, and lists and mappings in brackets within it: deep ones take YAML's reader forever.
LARGEST, MOST_BRACKETS = 1_000_000, 1000
#: Words, in small letters, that leave an option out, and those that answer a question.
NOTHING, ANSWERS = ("", "~", "null"), {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Section:
    """A dataclass that a verb takes, and the names of its fields that are options of the verb."""

    owner: type
    fields: set[str]


class Recipe:
    """Reads the files that one verb's `--config` takes.

    A file holds options by the name of their flag or field, alone or within the section of their dataclass:

        model: HuggingFaceTB/SmolLM2-135M
        data: ["books/*.txt"]
        steps: 500
        config: {window: 128, keep_exact: [6, "18.2"]}

    Its values go the way of the command line's: each as it would be typed, so that the same rules refuse it.

    Args:
        parameters: of the verb, by the name of field or parameter.
        sections: the verb's dataclasses by the names of their sections.
        from_record: turns a record of this verb into a recipe; None: the verb takes no records.
    """

    def __init__(
        self,
        verb: str,
        parameters: Mapping[str, inspect.Parameter],
        sections: Mapping[str, Section],
        from_record: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        self.verb, self.sections, self.from_record = verb, sections, from_record
        self.kinds: dict[str, Any] = {}
        self.names: dict[str, str] = {}  # what a file may call a parameter
        for name, parameter in parameters.items():
            self.kinds[name], info = typing.get_args(parameter.annotation)
            flags = [flag.split("/")[0] for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]
            self.names |= {alias.removeprefix("--").replace("-", "_"): name for alias in (name, *flags)}

    def read(self, context: typer.Context, value: Path | None) -> Path | None:
        """typer's callback: the file's values become the defaults of this call.

        Raises:
            ConfigError: no such file, none of this kind, an option that the verb does not have, or one given twice.
        """
        if value is not None:
            context.default_map = self.defaults(value)
        return value

    def defaults(self, file: Path) -> dict[str, Any]:
        """Values by parameter, as typed on the command line."""
        values: dict[str, Any] = {}
        for key, name, value in self._options(file):
            text = self._typed(f"{file}: {key}", self.kinds[name], value)
            if text is None:
                continue
            if values.setdefault(name, text) != text:
                raise ConfigError(f"{file}: {key}: {text} here, {values[name]} elsewhere in the file, for one option.")
        return values

    def _options(self, file: Path) -> Iterator[tuple[str, str, Any]]:
        """(name in the file, parameter, value) of each option that the file sets."""
        for key, value in self._content(file).items():
            section = self.sections.get(key)
            if not isinstance(value, Mapping) and not _is_nothing(value):
                if section is not None and key not in self.names:  # `train` is the name of an option as well
                    raise ConfigError(f"{file}: {key}: give the section's options as NAME: VALUE, one a line.")
                section = None
            if section is None:
                yield key, self._parameter(file, key, self.names), value
                continue
            fields = {f.name: f for f in dataclasses.fields(section.owner)}
            offered = {alias: name for alias, name in self.names.items() if name in section.fields}
            for inner, x in value.items() if isinstance(value, Mapping) else ():
                f = fields.get(inner)
                # A record says every field. What this verb decides itself is there as it was before it did.
                if f is None or f.name in section.fields or str(x).lower() != str(_plain(f.default)).lower():
                    yield f"{key}: {inner}", self._parameter(file, inner, offered, f"{key}: "), x

    def _content(self, file: Path) -> dict[str, Any]:
        if file.exists() and not file.is_file():
            raise ConfigError(f"--config {file}: it is not a file.")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: it cannot be read ({getattr(error, 'strerror', error)}).") from error
        try:
            content = json.loads(text, object_pairs_hook=_once_each) if file.suffix == ".json" else _yaml(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--config {file}: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--config {file}: give options as NAME: VALUE, one a line.")
        if "command" not in content:
            return content
        if content["command"] != self.verb or self.from_record is None:
            takes = f"a record of {self.verb}" if self.from_record else "a YAML file of options"
            raise ConfigError(
                f"--config {file}: a record of darkformer {content['command']}; darkformer {self.verb} takes {takes}."
            )
        try:
            return self.from_record(content)
        except KeyError as error:
            raise ConfigError(f"--config {file}: a record without {error}: it is not of a finished run.") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"--config {file}: it is not as darkformer {self.verb} wrote it ({error}).") from error

    def _parameter(self, file: Path, key: Any, names: Mapping[str, str], section: str = "") -> str:
        """The parameter that a file calls `key`."""
        key = str(key)
        alias = key.replace("-", "_")
        if alias not in names:
            closest = difflib.get_close_matches(alias, names, 1)
            hint = f"Did you mean {closest[0]}?" if closest else f"darkformer {self.verb} --help lists them."
            raise ConfigError(f"{file}: {section}{key:.80}: darkformer {self.verb} has no such option. {hint}")
        return names[alias]

    @staticmethod
    def _typed(where: str, kind: Any, value: Any) -> Any:
        """A value as it would be typed on the command line; None leaves the option out."""
        if _is_nothing(value):
            return None
        if kind is bool:
            answer = ANSWERS.get(value.lower()) if isinstance(value, str) else value
            if not isinstance(answer, bool):
                raise ConfigError(f"{where}: {value!r}: must be true or false.")
            return answer
        if typing.get_origin(kind) is not list:
            if isinstance(value, list | Mapping | bool):
                raise ConfigError(f"{where}: {value!r}: give one value.")
            return str(value)
        items = value if isinstance(value, list) else [value]
        if any(isinstance(x, bool | Mapping) or _is_nothing(x) for x in items):
            raise ConfigError(f"{where}: {value!r}: give a list of names.")
        if any(isinstance(x, float) for x in items):  # of JSON
            raise ConfigError(f"{where}: {value!r}: give a list of names; in quotes: as a number 18.10 would be 18.1.")
        return ["=".join(map(str, x)) if isinstance(x, list) else str(x) for x in items]


def _is_nothing(value: Any) -> bool:
    """Whether a value leaves its option out."""
    return value is None or (isinstance(value, str) and value.lower() in NOTHING)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's object of these pairs.

    Raises:
        ValueError: a name twice.
    """
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)


def _yaml(text: str) -> Any:
    """A YAML file's lists, mappings and texts; what they say is the texts', so that no number loses a digit.

    Raises:
        ValueError: it is none, or no recipe: larger than `LARGEST`, with more brackets than `MOST_BRACKETS`, a name
            twice, or aliases, of which a few lines are gigabytes.
    """
    import yaml  # only here: not every call has a file

    if len(text) > LARGEST:
        raise ValueError(f"a recipe has {LARGEST:,} characters at most, this file has {len(text):,}")
    if (brackets := text.count("[") + text.count("{")) > MOST_BRACKETS:
        raise ValueError(f"a recipe has {MOST_BRACKETS:,} brackets at most, this file has {brackets:,}")

    class Loader(yaml.BaseLoader):  # makes nothing but dicts, lists and texts
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            if all(isinstance(name, str) for name in names):
                _once_each([(name, None) for name in names])
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.BaseLoader)):
            raise ValueError("aliases (*name) are not taken: write the values out")
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _plain(value: Any) -> Any:
    """A field's default as a file has it."""
    return list(value) if isinstance(value, tuple) else value
