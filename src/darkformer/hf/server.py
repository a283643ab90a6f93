"""transformers' own server with a converted model, and states of prompts that requests begin with.

Endpoints, request fields and streaming are those of `transformers serve`. Three of its parts are replaced: the one that
loads models by name, the one that keeps a generating thread for each, and that thread's call of `generate`. Importing
this module needs the extra `serve`. Requests are computed one after another, in the order in which they come.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..errors import DarkformerError, InputError
from .prompt import StoredPrompt, longest
from .saved_cache import Prompt

_log = logging.getLogger("darkformer")


class OneModel(ModelManager):
    """A model that is loaded already, under one name; requests for others are refused, and it stays loaded."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.force_model = name
        self.model, self.tokenizer, self.since = model, tokenizer, int(time.time())
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, *_: Any, gguf_file: str | None = None, **__: Any
    ) -> tuple[PreTrainedModel, Any]:
        name = model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}"
        if name != self.force_model:
            raise InputError(f"this server has {self.force_model} and no other model; asked for {name}.")
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "owned_by": "darkformer", "created": self.since}]

    def shutdown(self) -> None:
        """Nothing: `/reset` unloads what the next request would load again, which cannot be done here."""


class PromptStates:
    """Stored prompts, and states after the last requests, so that a chat that goes on reads what is new alone.

    Only the thread that generates touches it.
    """

    def __init__(self, stored: Sequence[StoredPrompt], kept: int) -> None:
        self.stored = tuple(stored)
        self.last: deque[StoredPrompt] = deque(maxlen=kept)

    def longest(self, ids: Tensor) -> StoredPrompt | None:
        """The longest one that ids (1, L) go on from."""
        return longest([*self.stored, *self.last], ids)

    def keep(self, ids: Tensor, cache: DynamicCache) -> None:
        """Keeps a cache that has read the beginning of ids (L,), in place of the oldest one."""
        tokens = ids[: cache.get_seq_length()].cpu()
        same = next((one for one in self.last if one.prompt.tokens.equal(tokens)), None)
        if same is not None:
            self.last.remove(same)
        self.last.append(StoredPrompt(Prompt(tokens, ""), cache))


class Continuing:
    """Stands in for a model in one request: its `generate` goes on from the longest state that fits."""

    def __init__(self, model: PreTrainedModel, states: PromptStates) -> None:
        self.model, self.states = model, states

    def generate(self, **inputs: Any) -> Tensor:
        """`model.generate`, in the thread that generates."""
        model: Any = self.model
        if not inputs["input_ids"].shape[1]:
            raise InputError("the prompt has no tokens: send some text.")
        if not _has_one_row(inputs["generation_config"]):
            answers: Tensor = model.generate(**inputs)
            return answers
        stored = self.states.longest(inputs["input_ids"])
        if stored is None:
            if self.states.stored:
                _log.info("A request of %d tokens begins with no stored prompt.", inputs["input_ids"].shape[1])
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        else:
            cache = stored.state()
            read, total = len(stored.prompt.tokens), inputs["input_ids"].shape[1]
            _log.info("A request of %d tokens goes on from a state of its first %d.", total, read)
        sequences: Tensor = model.generate(**inputs, past_key_values=cache)
        self.states.keep(sequences[0], cache)
        return sequences


def _has_one_row(settings: Any) -> bool:
    """Whether `generate` takes a cache of ours as it is: one sequence, in a cache of the usual kind."""
    rows = (settings.num_beams or 1) * (settings.num_return_sequences or 1)
    # `generate` takes `hybrid`, which older models of sliding windows ask for, as if nothing was said.
    usual = settings.cache_implementation in (None, "hybrid")
    return rows == 1 and usual and settings.use_cache is not False


class Generation(GenerateManager):
    """transformers' thread that generates, which goes on from states of prompts."""

    def __init__(self, states: PromptStates) -> None:
        super().__init__()
        self.states = states

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model = Continuing(model, self.states)
        return super().generate_streaming(model, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model = Continuing(model, self.states)
        return await super().generate_non_streaming(model, *args, **kwargs)


class OneGeneration(GenerationState):
    """One generating thread for all requests."""

    def __init__(self, states: PromptStates) -> None:
        super().__init__()
        self.only = Generation(states)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        return self.only


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    stored: Sequence[StoredPrompt] = (),
    kept: int = 0,
    cors: bool = False,
) -> Any:
    """The FastAPI application that serves a converted model.

    Args:
        name: what requests call the model, and `/v1/models` lists.
        stored: prompts whose states requests go on from.
        kept: requests whose states are kept after their answers.
        cors: whether pages of any origin may send requests.
    """
    manager, state = OneModel(model, tokenizer, name), OneGeneration(PromptStates(stored, kept))
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
        enable_cors=cors,
    )
    # What transformers and `generate` say of a request that cannot be answered; unhandled it would be an error of ours.
    for kind in (ValueError, TypeError, DarkformerError):
        app.add_exception_handler(kind, _refused)
    return app


async def _refused(request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    _log.warning("%s was refused: %s: %s", request.url.path, type(error).__name__, error)
    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
