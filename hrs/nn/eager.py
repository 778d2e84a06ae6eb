"""Whether what is written for the CPU in eager mode may run."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_eager_cpu(x: Tensor) -> bool:
    """Return True if ``x`` is on the CPU, in eager mode, and no mode watches torch's functions.

    A mode that watches them, as the imitations of CUDA in the memory planner and in the models of a GPU's speed do, is
    shown the operators that run on a GPU.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.overrides.has_torch_function((x,))


def without_autograd(x: Tensor) -> AbstractContextManager[None]:
    """Return the context in which small operators on ``x`` take least time: inference mode if :func:`on_eager_cpu`.

    Tensors made in it must not be changed in place outside of it. Elsewhere it is ``no_grad``: in inference mode, what
    watches operators is shown those that consist of others as one.
    """
    return torch.inference_mode() if on_eager_cpu(x) else torch.no_grad()
