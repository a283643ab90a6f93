"""The constant-size state of one attention of a module, and how its last tokens are taken back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..features.tracing import traced
from ..ops.attention import attention
from ..ops.native import stepper
from ..ops.native.step import Step
from ..ops.state import AttentionState

#: While a cache records, at least this many tokens can be taken back (or all that were recorded).
CROP = 256


def _read_keys(
    state: AttentionState | None, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, **options: Any
) -> AttentionState:
    """The state after keys and values (B, G, T, d), whatever their queries."""
    query = key.repeat_interleave(feature_map.num_heads // feature_map.num_kv_heads, dim=1)
    _, after = attention(
        query, key, value, feature_map, key_mask=mask, initial_state=state, return_state=True, **options
    )  # fmt: skip
    return after


@dataclass
class History:
    """What taking tokens back needs: the state before them, and their keys and values.

    Sums are not subtracted: a key that raises a feature's running maximum rescales all earlier sums, and what
    underflows then is lost. The state is computed again from the earlier one, which gives the same numbers as prefill.
    """

    state: AttentionState | None
    options: dict[str, Any] = field(default_factory=dict)  # scaling and softcap
    pieces: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # key, value (B, G, T, d), mask (B, T)

    @property
    def length(self) -> int:
        """Tokens that can be taken back."""
        return sum(mask.shape[1] for _, _, mask in self.pieces)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        key, value, mask = zip(*self.pieces, strict=True)
        return torch.cat(key, dim=2), torch.cat(value, dim=2), torch.cat(mask, dim=1)

    def after(self, tokens: int, feature_map: Any) -> AttentionState | None:
        """The state once the first `tokens` of the recorded ones are in it."""
        if tokens == 0:
            return self.state
        key, value, mask = self._joined()
        key, value, mask = key[:, :, :tokens], value[:, :, :tokens], mask[:, :tokens]
        return _read_keys(self.state, key, value, mask, feature_map, **self.options).detach()

    def drop(self, tokens: int, feature_map: Any) -> None:
        """Forgets how to take back the first `tokens` of the recorded ones."""
        self.state = self.after(tokens, feature_map)
        key, value, mask = self._joined()
        self.pieces = [(key[:, :, tokens:], value[:, :, tokens:], mask[:, tokens:])]

    def select(self, rows: Tensor) -> None:
        """Batch rows `rows` (int64), in that order."""
        self.state = None if self.state is None else self.state.select(rows)
        self.pieces = [(k.index_select(0, rows), v.index_select(0, rows), m[rows]) for k, v, m in self.pieces]


class Stream:
    """The state of one attention of a module.

    While tokens come one by one, a compiled `Step` holds the state and updates it in place; `state` is then a copy.
    """

    def __init__(self, *, records: bool = False) -> None:
        self._state: AttentionState | None = None
        self._step: Step | None = None
        self.history = History(None) if records else None

    @property
    def state(self) -> AttentionState | None:
        """After the last token; None before the first one."""
        return self._step.state() if self._step is not None else self._state

    def hold(self, state: AttentionState | None) -> None:
        """Replaces the state."""
        self._state, self._step = state, None

    @property
    def filled(self) -> bool:
        """Whether any token is in."""
        return self._state is not None or self._step is not None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds the state without its graph, not the `Step`, which is memory of this process."""
        state = self.state
        return {"_state": None if state is None else state.detach(), "_step": None, "history": self.history}

    @property
    def count(self) -> Tensor | None:
        """(B,) real tokens read; None before the first one."""
        return self._step.count if self._step is not None else None if self._state is None else self._state.count

    @property
    def nbytes(self) -> int:
        """Bytes of the state, without what is recorded for `crop`."""
        if self._step is not None:
            return self._step.nbytes
        return 0 if self._state is None else self._state.nbytes

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, **options: Any
    ) -> Tensor:
        """Attention of new tokens to themselves and all earlier ones, (B, H, L, d_v); they are added to the state.

        Args:
            query: (B, H, L, d). key, value: (B, G, L, d). mask: (B, L) booleans or None.
            options: scaling, softcap and is_causal of `attention`.
        """
        if (output := self._one_token(query, key, value, mask, feature_map, **options)) is not None:
            return output
        outputs, length = [], key.shape[2]
        # While recording, a long prompt is cut so that only its end has to be kept.
        cuts = [0, length - CROP, length] if self.history and length > CROP else [0, length]
        for start, stop in itertools.pairwise(cuts):
            q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            real = None if mask is None else mask[:, start:stop]
            output, state = attention(
                q, k, v, feature_map, key_mask=real, initial_state=self.state, return_state=True, **options
            )
            outputs.append(output)
            if self.history:
                self._record(k.detach(), v.detach(), real, feature_map, options)
            self.hold(state.detach())  # gradients stop here: a graph over all calls would not be of constant size
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def absorb(self, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, **options: Any) -> None:
        """Reads keys and values (B, G, T, d) that came without queries, as the first T tokens.

        The state keeps their graph, so that prefixes can be trained (prefix tuning).
        """
        state = _read_keys(None, key, value.to(key.dtype), mask, feature_map, **options)
        self.hold(state)
        if self.history:
            self.history.state = state.detach()

    def _one_token(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, *,
        scaling: float, softcap: float | None = None, is_causal: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """The output by the compiled step if that applies (no gradients, no recording, only real tokens), else None."""
        if traced(query) or query.shape[2] != 1 or not is_causal or self.history is not None or torch.is_grad_enabled():
            return None
        if mask is not None and not bool(mask.all()):
            return None
        if self._step is None or not self._step.takes(query, key, scaling, softcap):
            self.hold(self.state)  # from a step for other shapes, if there is one
            self._step = stepper(self._state, query, key, feature_map, scaling=scaling, softcap=softcap)
            if self._step is None:
                return None
            self._state = None
        return self._step(query, key, value)

    def _record(
        self, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, options: dict[str, Any]
    ) -> None:
        history = self.history
        assert history is not None
        history.options = options
        if key.shape[2] >= CROP:  # enough by themselves: earlier tokens are no longer needed
            history.state, history.pieces = None if self.state is None else self.state.detach(), []
        real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        history.pieces.append((key, value, real if mask is None else mask))
        if (length := history.length) >= 2 * CROP and len(history.pieces) > 1:
            history.drop(length - CROP, feature_map)

    def record(self) -> None:
        """From now on tokens can be taken back."""
        if self.history is None:
            self.history = History(None if self.state is None else self.state.detach())

    def take_back(self, tokens: int, feature_map: Any) -> None:
        """The state before the last `tokens` recorded ones; the record starts anew there."""
        assert self.history is not None
        if tokens:
            self.hold(self.history.after(self.history.length - tokens, feature_map))
        self.history = History(self.state, self.history.options)

    def select(self, rows: Tensor) -> None:
        """Batch rows `rows` (int64), in that order."""
        if (state := self.state) is not None:
            self.hold(state.select(rows.to(state.count.device)))
            if self.history is not None:
                self.history.select(rows.to(state.count.device))
