"""Whether tensors may be looked at: inside torch.func's transforms, in a trace, and without data they may not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_Mode = torch._C._TorchDispatchModeKey
#: Modes that record operators, or run them without numbers.
_RECORDING = (_Mode.PROXY, _Mode.FAKE, _Mode.FUNCTIONAL)


def transformed() -> bool:
    """Whether a transform of torch.func is active (grad, vmap, jvp, …), or a level of forward-mode differentiation.

    Tensors then are wrappers without memory of their own, and may carry a tangent.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced(*tensors: Tensor) -> bool:
    """Whether operators are recorded, or run on tensors without numbers: torch.export, make_fx, fake and meta tensors.

    What is recorded must hold for other numbers and lengths, so nothing may be decided by them. Not so under
    torch.compile, which notices such decisions, nor under torch.jit.trace, which warns of them.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    recording = any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDING)
    return recording or any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in tensors)
