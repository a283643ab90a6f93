"""darkformer: transformers whose attention costs O(L), through data-aware random features (DARKFormer).

The names below load what they need on first use: `import darkformer` itself needs torch and numpy only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import DarkConfig, TrainConfig
from .errors import (
    BrokenPackageError,
    ConfigError,
    ConversionError,
    DarkformerError,
    DerivativeError,
    InputError,
    MissingExtraError,
    NonFiniteError,
    OutOfMemoryError,
    RunFolderError,
    import_problem,
)
from .features.feature_map import FeatureMap, feature_map
from .hf.patches import install as _install_patches
from .ops.attention import attention
from .ops.state import AttentionState

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .calibration.sensitivity import Sensitivity, sensitivity
    from .hf.convert import convert, revert
    from .hf.layers import dark_layers
    from .hf.light import load_light, save_light
    from .hf.load import load_model
    from .hf.saved_cache import load_cache, save_cache
    from .train.finetune import finetune
    from .train.redraw import Redraw, redraw
    from .train.transfer import LayerTransfer, transfer

_LAZY = {
    "convert": "hf.convert",
    "revert": "hf.convert",
    "dark_layers": "hf.convert",
    "load_cache": "hf.saved_cache",
    "save_cache": "hf.saved_cache",
    "load_light": "hf.light",
    "load_model": "hf.load",
    "save_light": "hf.light",
    "Sensitivity": "calibration.sensitivity",
    "sensitivity": "calibration.sensitivity",
    "calibrate": "calibration.calibrate",
    "finetune": "train.finetune",
    "Redraw": "train.redraw",
    "redraw": "train.redraw",
    "LayerTransfer": "train.transfer",
    "transfer": "train.transfer",
}

__all__ = [
    "AttentionState",
    "BrokenPackageError",
    "ConfigError",
    "ConversionError",
    "DarkConfig",
    "DarkformerError",
    "DerivativeError",
    "FeatureMap",
    "InputError",
    "LayerTransfer",
    "MissingExtraError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Redraw",
    "RunFolderError",
    "Sensitivity",
    "TrainConfig",
    "__version__",
    "attention",
    "calibrate",
    "convert",
    "dark_layers",
    "feature_map",
    "finetune",
    "load_cache",
    "load_light",
    "load_model",
    "redraw",
    "revert",
    "save_cache",
    "save_light",
    "sensitivity",
    "transfer",
]


_install_patches()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'darkformer' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LAZY[name]}", __name__)
    except Exception as error:  # a broken package raises whatever it likes
        install = "pip install 'darkformer[all]' (or the extra hf or train)"
        if problem := import_problem(error, f"darkformer.{name} needs the package", install):
            raise problem from error
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
