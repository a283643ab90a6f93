"""The error family: what was received, the rule it broke, what to do next."""

from __future__ import annotations

import importlib.util


class DarkformerError(Exception):
    """Base of every error this library raises: what was received, the rule it broke, what to do next."""


class ConfigError(DarkformerError, ValueError):
    """A configuration field has a value outside its rule."""


class InputError(DarkformerError, ValueError):
    """Tensors, text or files do not satisfy what an operation needs."""


class NonFiniteError(InputError):
    """NaN or infinity where finite numbers are needed."""


class OutOfMemoryError(DarkformerError, MemoryError):
    """The compiled attention could not allocate memory to work in."""


class DerivativeError(DarkformerError, NotImplementedError):
    """A derivative that an operator does not have: forward mode, or a second one under torch.func."""


class ConversionError(DarkformerError):
    """A model cannot be converted, is converted already, or is not converted."""


class MissingExtraError(DarkformerError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class BrokenPackageError(DarkformerError, ImportError):
    """A package is installed but cannot be imported; the message has the error that it raised."""


class RunFolderError(DarkformerError):
    """An output folder holds another run, or a run cannot be continued."""


def import_problem(error: Exception, needs: str, install: str) -> DarkformerError | None:
    """What to raise for `error`, which stopped an import: a package is missing, or it is there and broken.

    Args:
        needs, install: around the name of the package: "--tasks needs", "pip install 'darkformer[eval]'".

    Returns:
        None for an error that no other package explains: raise it as it is.
    """
    if isinstance(error, DarkformerError):
        return None
    cause: BaseException = error
    while isinstance(cause, ModuleNotFoundError) and cause.name is None and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__ or cause  # transformers wraps whatever stopped a lazy import
    package = _being_imported(cause)
    if package == "darkformer" and isinstance(cause, ImportError) and cause.name:
        package = cause.name.split(".")[0]
        if isinstance(cause, ModuleNotFoundError) and not _installed(package):
            return MissingExtraError(f"{needs} {package!r}, which is not installed: {install}.")
    if package == "darkformer":
        return None
    return BrokenPackageError(
        f"{needs} {package!r}, which is installed but broken. Importing it raises {type(cause).__name__}: {cause}. "
        "Reinstall it (`pip check` lists what packages lack)."
    )


def _being_imported(error: BaseException) -> str:
    """The innermost package that was being imported when `error` was raised; ours if there was no other."""
    package, at = "darkformer", error.__traceback__
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if at.tb_frame.f_code.co_name == "<module>":  # a module's own code, as opposed to a function that it calls
            package = name
        at = at.tb_next
    return package


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is imported, and nobody wrote down from where
        return True
