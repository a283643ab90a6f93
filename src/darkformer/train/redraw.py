"""Fresh draws of Ω while a model trains, so that it learns the kernel and not one draw of its features."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..errors import ConfigError
from ..hf.layers import required_maps


def redraw(model: nn.Module, step: int) -> None:
    """Replaces Ω of every layer by the draw of (seed, step, layer, head), in place; step 0 is the first draw.

    Nothing else enters, no global generator and no state of the run, so every process of a distributed run and every
    resumed one has the same rows. `seed` is `DarkConfig.seed`. Learned projections (`lfk`) stay.

    Raises:
        ConversionError: the model is not converted. ConfigError: its method draws nothing, or learns what it drew.
    """
    if step < 0:
        raise ConfigError(f"step={step}: must be at least 0.")
    layers = required_maps(model)
    if not any([layer.redraw_(step) for layer in layers]):
        method = layers[0].config.method
        raise ConfigError(f"method={method!r} has no random projection to draw anew (lfk learns its own).")


class Redraw(TrainerCallback):
    """Calls `redraw` every `every` optimizer steps of any HF Trainer: `Trainer(…, callbacks=[Redraw(200)])`.

    A resumed run starts with the draw of the last multiple of `every`, whatever its checkpoint holds (an adapter's
    checkpoint holds no Ω).

    Raises:
        ConfigError: `every` is below 1.
    """

    def __init__(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r}: must be an integer of at least 1.")
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step >= self.every:
            redraw(model, state.global_step // self.every * self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            redraw(model, state.global_step)
