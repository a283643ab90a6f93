"""Attention transfer: what conversion added learns, layer by layer, to give what softmax gives.

Each layer is fitted alone, on the softmax model's own queries, keys and values, by what its heads add to the residual
stream. One pass of the softmax model serves all layers: a layer takes its optimizer step while the pass is in it, so
that only one layer's gradients exist at a time. The model's own weights stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..calibration.calibrate import drop_unpaid, pays
from ..calibration.projections import output_grams, squared_lengths
from ..calibration.rows import inputs_of, run
from ..config import native_dtype
from ..errors import ConfigError, InputError, NonFiniteError, RunFolderError
from ..features.feature_map import FeatureMap, feature_map
from ..hf.interface import observing
from ..hf.layers import required_maps
from ..hf.sealed import read_sealed, write_sealed
from ..ops.attention import attention

#: Called with (steps done, steps in all, mean loss).
StepProgress = Callable[[int, int, float], None]
#: Checks of all layers on the batch held back, evenly spread over the steps.
CHECKS = 8
#: A layer stops after so many checks without an improvement.
PATIENCE = 3
#: A layer has diverged if its squared error on the batch held back is this many times what it was before.
DIVERGED = 2.0
WARMUP = 5
#: Version of the checkpoint's layout.
LAYOUT = 1
CHECKPOINT = "transfer.safetensors"


@dataclass
class LayerTransfer:
    """What transfer did to one layer, per kv head with features.

    Errors, on the batch held back, are ‖head - softmax‖ / ‖softmax‖ of what a head adds to the residual stream.
    """

    layer: int
    heads: list[int]  # numbers of the kv heads in the layer
    error_exact_part: list[float]  # window and sinks alone; 1, as of no output at all, where there is no window
    error_before: list[float]
    error: list[float] = field(default_factory=list)  # at the step that was kept
    kept_step: int = 0
    stopped: str = ""  # why the layer stopped before the last step; empty: it did not
    features: list[bool] = field(default_factory=list)  # whether they are left on, see `HeadChoice`


def _mean_square(errors: Sequence[float]) -> float:
    return sum(x * x for x in errors) / len(errors)


class _Layer:
    """A layer that learns: its optimizer, and its best values so far."""

    def __init__(self, fm: FeatureMap, gram: Tensor | None, lr: float) -> None:
        self.fm, self.gram, self.lr = fm, gram, lr
        self.parameters = [p for p in fm.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.99))
        self.best: dict[str, Tensor] = {}
        self.errors: Tensor | None = None  # (G,) of the last check
        self.report = LayerTransfer(fm.layer, list(fm.heads), [], [])
        self.since_best = 0

    @property
    def learns(self) -> bool:
        return not self.report.stopped

    def relative_errors(self, output: Tensor, target: Tensor) -> Tensor:
        """(G,) squared error over squared size of outputs (B, H, L, d_v), after the output projection where known."""
        groups = self.fm.num_kv_heads
        split = (x.unflatten(1, (groups, -1)).float() for x in (output - target, target))
        missed, size = (squared_lengths(x, self.gram).sum((0, 2)) for x in split)
        return missed / size.clamp_min(torch.finfo(torch.float32).tiny)

    def step(self, loss: Tensor, rate: float) -> float:
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if math.isfinite(float(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def check(self, step: int) -> None:
        """Keeps the values if they are the best so far; stops the layer where it no longer improves, or diverges."""
        errors, report = self.errors, self.report
        assert errors is not None
        mean = float(errors.square().mean())
        if not report.error or mean < _mean_square(report.error):
            report.error, report.kept_step, self.since_best = errors.tolist(), step, 0
            self.best = {name: x.clone() for name, x in self.fm.values().items()}
            return
        self.since_best += 1
        if not math.isfinite(mean) or mean > DIVERGED * _mean_square(report.error_before):
            self.diverge(step)
        elif self.since_best >= PATIENCE:
            report.stopped = f"step {step}: no improvement for {PATIENCE} checks"

    def diverge(self, step: int) -> None:
        """Stops the layer; what it keeps are its best values."""
        self.report.stopped = f"step {step}: diverged"

    @torch.no_grad()
    def finish(self) -> None:
        for name, x in self.best.items():
            if name != "proposal_root":  # is not learned
                self.fm.set_(name, x)


def _local(fm: FeatureMap) -> FeatureMap:
    """The layer's exact part alone."""
    config = replace(fm.config, method="local")
    return feature_map(
        config, num_heads=fm.num_heads, num_kv_heads=fm.num_kv_heads, head_dim=fm.head_dim, layer=fm.layer
    )


class _Transfer:
    """One run over all layers."""

    def __init__(self, model: Any, layers: Sequence[_Layer], steps: int, dtype: torch.dtype) -> None:
        self.model, self.layers, self.steps, self.dtype = model, {id(x.fm): x for x in layers}, steps, dtype

    def _pass(self, batch: Any, visit: Callable[[_Layer, Callable[[FeatureMap], Tensor], Tensor], None]) -> None:
        """Calls `visit` with each layer, a function that gives a feature map's attention, and softmax's output."""

        def observer(
            fm: FeatureMap, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
            target: Tensor,
        ) -> None:  # fmt: skip
            if (layer := self.layers.get(id(fm))) is None:
                return
            q, k, v = (x.detach().to(self.dtype) for x in (query, key, value))
            real = None if mask is None else mask[:, -query.shape[2] :].bool()
            wanted = target if real is None else target * real[:, None, :, None]

            def output(of: FeatureMap) -> Tensor:
                result = attention(q, k, v, of, key_mask=real, scaling=scaling)
                assert isinstance(result, Tensor)
                return result if real is None else result * real[:, None, :, None]

            with torch.autocast(q.device.type, enabled=False):
                visit(layer, output, wanted)

        device = next(self.model.parameters()).device.type
        half = torch.autocast(device, torch.bfloat16, self.dtype == torch.bfloat16)
        with observing(self.model, observer, softmax=True), half:
            run(self.model, inputs_of(batch))

    def check(self, batch: Any, step: int) -> None:
        """Measures all layers on the batch held back; before the first step also their exact part alone."""

        def visit(layer: _Layer, output: Callable[[FeatureMap], Tensor], target: Tensor) -> None:
            if not layer.learns:
                return
            try:
                layer.errors = layer.relative_errors(output(layer.fm), target).sqrt()
            except NonFiniteError:
                if step == 0:  # there is nothing better to go back to
                    raise
                layer.diverge(step)
                return
            if step == 0:
                layer.report.error_before = layer.errors.tolist()
                local = torch.ones_like(layer.errors)
                if layer.fm.config.window:
                    local = layer.relative_errors(output(_local(layer.fm)), target).sqrt()
                layer.report.error_exact_part = local.tolist()

        self._pass(batch, visit)
        for layer in self.layers.values():
            if layer.learns:
                layer.check(step)

    def step(self, batch: Any, step: int) -> float:
        """One optimizer step of every layer that still learns; their mean loss."""
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        losses: list[float] = []

        def visit(layer: _Layer, output: Callable[[FeatureMap], Tensor], target: Tensor) -> None:
            if not layer.learns:
                return
            try:
                with torch.enable_grad():
                    loss = layer.relative_errors(output(layer.fm), target).mean()
                    losses.append(layer.step(loss, rate))
            except NonFiniteError:
                layer.diverge(step + 1)

        self._pass(batch, visit)
        return sum(losses) / len(losses) if losses else math.nan

    @property
    def learns(self) -> bool:
        return any(layer.learns for layer in self.layers.values())

    def save(self, file: Path, step: int, settings: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        for layer in self.layers.values():
            prefix = f"{layer.fm.layer}.{layer.fm.heads[0]}"
            tensors |= {f"{prefix}.best.{name}": x for name, x in layer.best.items()}
            tensors |= {f"{prefix}.now.{name}": x for name, x in layer.fm.state_dict().items()}
            for i, p in enumerate(layer.parameters):
                for name, x in layer.optimizer.state.get(p, {}).items():
                    tensors[f"{prefix}.adam.{i}.{name}"] = x
        reports = [asdict(layer.report) | {"since_best": layer.since_best} for layer in self.layers.values()]
        header = {"layout": LAYOUT, "version": __version__, "step": step, "settings": settings, "layers": reports}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(file, "transfer", header, {name: x.clone() for name, x in tensors.items()})

    def load(self, file: Path, settings: dict[str, Any]) -> int:
        """Continues where `save` was called; the step."""
        header, tensors = read_sealed(
            file, "transfer", LAYOUT, fields={"step": int, "settings": dict, "layers": list}, what="transfer",
            writer="darkformer.transfer",
        )  # fmt: skip
        if header["settings"] != settings:
            raise RunFolderError(f"{file} is of another transfer ({header['settings']}, now {settings}): delete it.")

        def within(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        for layer, values in zip(self.layers.values(), header["layers"], strict=True):
            prefix = f"{layer.fm.layer}.{layer.fm.heads[0]}"
            layer.since_best = values.pop("since_best")
            layer.report = LayerTransfer(**values)
            layer.best = within(f"{prefix}.best.")
            layer.fm.load_state_dict(within(f"{prefix}.now."))
            for i, p in enumerate(layer.parameters):
                if state := within(f"{prefix}.adam.{i}."):
                    layer.optimizer.state[p] = state
        return int(header["step"])


def transfer(
    model: Any, batches: Iterable[Any], *, steps: int = 120, lr: float = 1e-2, dtype: str = "auto",
    folder: str | Path | None = None, progress: StepProgress | None = None,
) -> list[LayerTransfer]:  # fmt: skip
    """Fits what conversion added to a calibrated model to softmax, layer by layer, in place.

    Each step is one batch through the softmax model; the layers see its own queries, keys and values, so they do not
    depend on each other. The loss of a layer is the squared error of what its heads add to the residual stream over
    the squared size of that, the mean over kv heads and every query of the context. The last batch is held back: on it
    layers are checked from time to time, the best values are kept, and a layer that no longer improves, or diverges,
    stops.

    With `drop_features` in the configuration, heads whose features still do not beat their window and sinks alone (by
    `MARGIN`, on the batch held back) lose them afterwards; create optimizers after that.

    Args:
        batches: token ids (B, L), or dicts with input_ids and attention_mask, of the context the model will be used
            at; two at least. They are used again where there are fewer than steps.
        steps: optimizer steps of every layer.
        lr: peak of Adam's rate (linear warm-up, cosine decay).
        dtype: of the layers' queries, keys and values: float32, bfloat16, or `auto`, bfloat16 where it is native.
        folder: keeps a checkpoint (`transfer.safetensors`), from which the same call goes on. It is deleted at the end.
        progress: called with (steps done, steps, mean loss).

    Returns:
        One `LayerTransfer` per layer that learned.

    Raises:
        ConversionError: the model is not converted. ConfigError: nothing in it learns, or bad steps or rate.
        InputError: fewer than two batches. RunFolderError: the folder holds a checkpoint of other settings.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r}: must be an integer of at least 1.")
    if not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ConfigError(f"lr={lr!r}: must be a finite number above 0.")
    every = list(batches)
    if len(every) < 2:
        raise InputError(f"{len(every)} batches for transfer: give two at least, the last one is held back.")
    maps = required_maps(model)
    learning = [fm for fm in maps if fm.config.feature_count and any(p.requires_grad for p in fm.parameters())]
    if not learning:
        raise ConfigError(
            f"method={maps[0].config.method!r}: no head has features that learn, so there is no transfer."
        )
    compute = getattr(torch, native_dtype() if dtype == "auto" else dtype)
    was_training = model.training
    model.eval()
    try:
        grams = output_grams(model, every[0])
        layers = [_Layer(fm, grams.get(id(fm)), lr) for fm in learning]
        work = _Transfer(model, layers, steps, compute)
        _fit(work, every, None if folder is None else Path(folder) / CHECKPOINT, progress)
        for layer in layers:
            layer.finish()
    finally:
        model.train(was_training)
        for fm in learning:
            for p in fm.parameters():
                p.grad = None
    reports = [layer.report for layer in layers]
    for report in reports:
        error, without = (torch.tensor(x).square() for x in (report.error, report.error_exact_part))
        report.features = pays(error, without).tolist()
    drop_unpaid(model, learning, reports)
    return reports


def _fit(
    work: _Transfer, batches: list[Any], file: Path | None, progress: Callable[[int, int, float], None] | None
) -> None:
    settings = {"steps": work.steps, "layers": [layer.fm.layer for layer in work.layers.values()]}
    start = 0
    if file is not None and file.is_file():
        start = work.load(file, settings)
    else:
        work.check(batches[-1], 0)
    between = max(1, work.steps // CHECKS)
    loss = math.nan
    for step in range(start, work.steps):
        if not work.learns:
            break
        loss = work.step(batches[step % (len(batches) - 1)], step)
        if (step + 1) % between == 0 or step + 1 == work.steps:
            work.check(batches[-1], step + 1)
            if file is not None:
                work.save(file, step + 1, settings)
        if progress:
            progress(step + 1, work.steps, loss)
    if file is not None:
        file.unlink(missing_ok=True)
