"""Rounding that looks at what a layer reads: GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization").

The columns of a weight are rounded one after another, and what one column's rounding did to the layer's output is taken
back by the columns not rounded yet, as far as the second moments of the layer's inputs allow.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hrs.export.quantize import Grid, Quantized, divisors, rounded_steps
from hrs.models import LanguageModel

_DAMPING = 0.01
"""Of the mean of the diagonal, added to it: inputs that calibration hardly saw must not decide anything."""
_BLOCK = 128


@torch.no_grad()
def input_hessians(model: LanguageModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Second moments [in, in] float64 of what each ``nn.Linear`` reads, by the name of its weight.

    Args:
        model: in eval mode, on any device.
        batches: token ids [B, T] of the training text.
    """
    found: dict[str, Tensor] = {}
    n_rows: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double().cpu()  # [B T, in]
            found[name] = found.get(name, torch.zeros(())) + rows.T @ rows
            n_rows[name] = n_rows.get(name, 0) + len(rows)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(f"{n}.weight", m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        device = next(model.parameters()).device
        for tokens in batches:
            model.encode(tokens.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments / n_rows[name] for name, moments in found.items()}


def quantize_calibrated(weight: Tensor, grid: Grid, hessian: Tensor) -> Quantized:
    """Round ``weight`` [out, in] on the same steps as :func:`hrs.export.quantize.quantize`, by GPTQ.

    Args:
        hessian: [in, in] float64, second moments of the layer's inputs.

    Raises:
        HRSError: if a weight is not finite.
    """
    scales, unit = rounded_steps(weight.detach().float(), grid)
    steps = divisors(scales, unit).double()[:, None]  # [out, 1]
    left = weight.detach().double().clone()
    damping = _DAMPING * hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    order = damped.diagonal().argsort(descending=True)  # what matters most is rounded while all others can make up
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    spread = torch.linalg.cholesky(inverse, upper=True)  # [in, in], row i: how column i's error is shared out
    left = left[:, order]
    levels = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        for i in range(start, end):
            column = left[:, i : i + 1]
            levels[:, i : i + 1] = (column / steps).round().clamp(-grid.limit, grid.limit)
            error = (column - levels[:, i : i + 1] * steps) / spread[i, i]
            left[:, i:end] -= error * spread[i, i:end]
            errors[:, i - start : i - start + 1] = error
        left[:, end:] -= errors @ spread[start:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return Quantized(levels[:, back].to(torch.int8), scales, unit)
