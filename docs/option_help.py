"""For the API reference: the help of a configuration's field, as the command line prints it, documents the field."""

import dataclasses
import importlib
from typing import Any

from griffe import Attribute, Docstring, Extension

CONFIG = "darkformer.config"


class OptionHelp(Extension):
    """Reads a field written as `name: type = option(default, help)`."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        # Other modules have such fields too, which the reference does not show, and would import transformers.
        if attr.parent is None or attr.module.path != CONFIG or not str(attr.value).startswith("option("):
            return
        owner = getattr(importlib.import_module(CONFIG), attr.parent.name)
        field = next(field for field in dataclasses.fields(owner) if field.name == attr.name)
        attr.value = repr(field.default)
        attr.docstring = Docstring(field.metadata["help"], parent=attr)
