"""What vLLM's configuration must know of a converted model before the model exists."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from ..errors import ConversionError
from .layout import SAVED, Layout, converted_layers, kinds_before, kinds_of, layout_of

#: The architecture that converted models get in vLLM's registry, in place of their own.
ARCHITECTURE = "DarkformerForCausalLM"
#: The name of our backend among vLLM's for layers with states.
BACKEND = "DARKFORMER"


def layout_for(vllm_config: VllmConfig) -> Layout:
    """The layout of the model that a configuration is for, on one worker."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    keys = model.dtype if cache.cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache.cache_dtype]
    return layout_of(
        model.hf_text_config, dtype=model.dtype, cache_dtype=keys, num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
    )  # fmt: skip


def parsing_converted(parser: type) -> type:
    """vLLM's reader of config.json, a subclass of `parser`, that sends converted models to our architecture."""

    class ConvertedConfigParser(parser):
        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            values, config = super().parse(*args, **kwargs)
            text = config.get_text_config()
            if getattr(text, "darkformer", None) is None:
                return values, config
            if text is not config:
                raise ConversionError(
                    f"{type(config).__name__} has parts besides its language model, which the plugin does not serve: "
                    "serve it with `darkformer serve`."
                )
            for name, other in SAVED.items():
                if hasattr(config, name):
                    setattr(config, other, getattr(config, name))
                    delattr(config, name)
            config.architectures = [ARCHITECTURE]
            return values, config

    return ConvertedConfigParser


class DarkSettings(VerifyAndUpdateConfig):
    """Called by vLLM while it makes its configuration, once per engine."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Names the layers with states, from which vLLM sees that the model has both kinds of memory.

        Raises:
            ConversionError: layers that vLLM's cannot stand for.
        """
        text = model_config.hf_text_config
        previous = kinds_before(text)
        layers = converted_layers(text, model_config.get_total_num_kv_heads())
        kinds = kinds_of(layers, previous or ["full_attention"] * text.num_hidden_layers)
        text.layers_block_type = ["linear_attention" if x == "linear_attention" else "attention" for x in kinds]
        if previous:
            text.darkformer_layer_types, text.layer_types = list(previous), kinds

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Sets the size of blocks, and leaves CUDA graphs out.

        Raises:
            ConversionError: tensor parallelism or speculative decoding, which states do not follow.
        """
        if (size := vllm_config.parallel_config.tensor_parallel_size) > 1:
            raise ConversionError(
                f"tensor_parallel_size={size}: the heads of a converted layer are not divided among workers yet. Use "
                "--pipeline-parallel-size or --data-parallel-size."
            )
        if vllm_config.speculative_config is not None:
            raise ConversionError("speculative decoding takes tokens back, which a state cannot: leave it out.")
        # Recorded without requests, our operator would write zeros for ever after.
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if (block := layout_for(vllm_config).block) is not None:
            cache = vllm_config.cache_config
            # As if the user had asked for it: otherwise each platform puts its own favourite in its place.
            cache.block_size, cache.user_specified_block_size = block, True
