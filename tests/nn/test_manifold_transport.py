"""Parallel transport carries one direction to the other and leaves the rest alone."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import examples

from hrs.nn.manifold.context import SHORTEST
from hrs.nn.manifold.transport import orthonormal_lift, transport, transported

D = 7


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, D, generator=generator, dtype=torch.float64)
    return drawn[0] / drawn[0].norm(), drawn[1] / drawn[1].norm()


def matrix(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """T as a matrix: its columns are the transported basis vectors."""
    return transport(torch.eye(D, dtype=source.dtype), source.expand(D, D), target.expand(D, D)).T


@examples(50)
@given(seed=st.integers(0, 10_000), length=st.floats(2 * SHORTEST, 10.0))
def test_carries_source_to_target_by_a_rotation_of_their_plane(seed: int, length: float) -> None:
    u, v = pair(seed)
    opening = float((u + v).norm())
    assume(opening > 2e-3)  # opposite directions single out no plane
    # u + v is off by some 30 roundings, its direction by 30 / |u + v|, a reflection in it by four times as much; sums
    # of seven add 100. A column of the rotation is off by less than 400 / |u + v| roundings, what is made of the seven
    # columns by less than 14 times that: 6e-13 / |u + v|.
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12 / opening)
    rotation = matrix(length * u, v)
    close(rotation @ u, v)
    close(rotation @ rotation.T, torch.eye(D).double())
    close(torch.linalg.det(rotation), torch.tensor(1.0).double())
    plane = torch.linalg.qr(torch.stack((u, v), dim=1)).Q
    x = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    outside = x - plane @ (plane.T @ x)
    close(rotation @ outside, outside)
    # The trace tells the angle: it turns by the angle between the two and by no other.
    close(rotation.trace(), D - 2 + 2 * (u @ v))


def test_float32_keeps_six_digits() -> None:
    u, v = (x.float() for x in pair(3))
    torch.testing.assert_close(matrix(u, v) @ u, v, rtol=0, atol=1e-6)


def test_equal_directions_are_the_identity() -> None:
    u, _ = pair(0)
    torch.testing.assert_close(matrix(u, u), torch.eye(D).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["opposite", "no source", "no target", "short source"])
def test_states_stay_where_no_plane_is_given(case: str) -> None:
    """To the bit, and with finite gradients."""
    u, v = pair(1)
    zero = torch.zeros_like(u)
    source, target = {
        "opposite": (u, -u),
        "no source": (zero, v),
        "no target": (u, zero),
        "short source": (0.9 * SHORTEST * u, v),
    }[case]
    source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
    x = torch.randn(D, dtype=torch.float64)
    moved = transport(x, source, target)
    assert torch.equal(moved, x)
    moved.sum().backward()
    assert source.grad is not None and target.grad is not None
    assert not source.grad.any() and not target.grad.any()


@pytest.mark.parametrize("degrees", [0, 60, 90, 150])
def test_share_grows_with_the_angle(degrees: int) -> None:
    angle = math.radians(degrees)
    u = torch.zeros(D, dtype=torch.float64)
    v = u.clone()
    u[0], v[0], v[1] = 1.0, math.cos(angle), math.sin(angle)
    weight = 0.2 * (1 - math.cos(angle)) / 2
    torch.testing.assert_close(transported(u, u, v, 0.2), (1 - weight) * u + weight * v, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "d"), [(5, 9), (9, 9), (12, 6)])
def test_lift_is_orthonormal_and_leaves_the_generator_alone(n: int, d: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    lift = orthonormal_lift(n, d)
    assert torch.equal(torch.rand(3), expected)
    assert lift.shape == (d, n)
    gram = lift.T @ lift if n <= d else lift @ lift.T
    torch.testing.assert_close(gram, torch.eye(min(n, d)), rtol=0, atol=1e-6)
    assert torch.equal(lift, orthonormal_lift(n, d))
