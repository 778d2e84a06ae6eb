"""Every test and every shared fixture draws the same numbers, whatever ran before it."""

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

AT_IMPORT = torch.rand(2)


def draws_after(name: str) -> tuple[float, float, list[float]]:
    """Return one draw of each global generator, seeded with the checksum of ``name``."""
    seed = zlib.crc32(name.encode())
    torchs = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    return random.Random(seed).random(), np.random.RandomState(seed).random(), torchs


def draws() -> tuple[float, float, list[float]]:
    return random.random(), np.random.random(), torch.rand(2).tolist()


@pytest.fixture(scope="module")
def shared() -> tuple[float, float, list[float]]:
    return draws()


def test_a_test_draws_by_its_name(request: pytest.FixtureRequest) -> None:
    assert draws() == draws_after(request.node.nodeid)


def test_a_shared_fixture_draws_by_its_own_name(request: pytest.FixtureRequest, shared: object) -> None:
    """And leaves the generators to the test as they were."""
    assert shared == draws_after("tests/test_seeds.py::shared[0]")
    assert draws() == draws_after(request.node.nodeid)


def test_a_module_draws_by_its_path() -> None:
    assert AT_IMPORT.tolist() == draws_after("tests/test_seeds.py")[2]


@given(st.integers())
def test_every_example_draws_the_same(example: int) -> None:
    """Hypothesis seeds torch, too: an example that fails fails again."""
    assert torch.rand(2).tolist() == torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
