"""Parallel transport of a state from one direction to another, along the great circle between them."""

import torch
from torch import Tensor

from hrs.nn.manifold.context import SHORTEST, unit

_OPPOSITE = 1e-3
_SEED = 0


def transport(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The rotation T of states ``x`` [..., D] with T u = v for u, v the directions of ``source`` and ``target``.

    T = R_{u+v} R_u with the reflections R_a = I - 2 a a^T / |a|^2: it turns the plane of u and v and leaves everything
    orthogonal to it alone. States stay as they are where a vector is shorter than :data:`SHORTEST`, or where u and v
    are opposite, |u + v| < 1e-3: then no plane is singled out.
    """
    lengths = torch.stack((source, target)).norm(dim=-1, keepdim=True)  # [2, ..., 1]
    u, v = unit(source), unit(target)
    middle = u + v
    squared = middle.square().sum(dim=-1, keepdim=True)
    defined = (lengths > SHORTEST).all(dim=0) & (squared > _OPPOSITE**2)
    reflected = x - 2 * (u * x).sum(dim=-1, keepdim=True) * u
    # The divisor is replaced before dividing: a quotient that is thrown away still has a gradient.
    factor = 2 * (middle * reflected).sum(dim=-1, keepdim=True) / torch.where(defined, squared, 1.0)
    return torch.where(defined, reflected - factor * middle, x)


def transported(x: Tensor, source: Tensor, target: Tensor, share: float) -> Tensor:
    """``x`` [..., D] with share * (1 - cos) / 2 of it replaced by its :func:`transport`; 0 for equal directions."""
    cosine = (unit(source) * unit(target)).sum(dim=-1, keepdim=True)
    return x + share * (1 - cosine) / 2 * (transport(x, source, target) - x)


def orthonormal_lift(n_coordinates: int, d_model: int) -> Tensor:
    """[D, N] with orthonormal columns, or with orthonormal rows if N > D; the same for every model of these sizes.

    Fixed, not learned: the layers around it can learn any rotation of the stream, and a learned one would have to be
    made orthonormal anew in every pass. Random, not [I; 0], so that no coordinate is lost where N > D.
    """
    shape = (max(d_model, n_coordinates), min(d_model, n_coordinates))
    if torch.empty(0).device.type == "meta":
        tall = torch.empty(shape)
    else:
        generator = torch.Generator("cpu").manual_seed(_SEED)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        tall = torch.linalg.qr(drawn).Q.to(torch.get_default_dtype())
    return tall if d_model >= n_coordinates else tall.mT.contiguous()
