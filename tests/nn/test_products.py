"""Products by oneDNN against torch's own, and which of the two is taken."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hrs.nn import products
from hrs.nn.products import Linear, by_onednn, linear, product

N, IN, OUT = 24, 16, 40

needs_onednn = pytest.mark.skipif(not products._HAS_ONEDNN, reason="torch was built without oneDNN")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take oneDNN on every processor, and for small products, too."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 1)
    yield


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def forms(n: int, m: int) -> list[Tensor]:
    """One matrix [n, m]: rows, columns, rows and columns with gaps, and every other of both."""
    wide, tall, sparse = draw(n, 2 * m), draw(m, 2 * n), draw(2 * n, 2 * m)
    return [draw(n, m), draw(m, n).t(), wide[:, :m], tall[:, :n].t(), sparse[::2, ::2]]


def operators(function: Callable[[], object]) -> list[str]:
    """Names of the operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events()]


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_and_its_gradients_equal_torchs(has_bias: bool) -> None:
    leaves = [draw(2, N, IN), draw(OUT, IN), *([draw(OUT)] if has_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    direction = draw(2, N, OUT)
    results = [function(*leaves) for function in (linear, F.linear)]
    assert "_Linear" in type(results[0].grad_fn).__name__
    torch.testing.assert_close(*results)
    for ours, theirs in zip(*(torch.autograd.grad(r, leaves, direction) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_second_derivatives_equal_torchs() -> None:
    x, weight = draw(N, IN).requires_grad_(), draw(OUT, IN).requires_grad_()

    def second(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        inner = torch.autograd.grad(function(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), (x, weight))

    for ours, theirs in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    x, weight = draw(N, IN), draw(OUT, IN).requires_grad_()
    result = linear(x, weight)
    products_run = [name for name in operators(lambda: result.sum().backward()) if "linear_pointwise" in name]
    assert len(products_run) == 1 and weight.grad is not None


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_product_takes_matrices_of_any_strides(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for left in forms(N, IN):
            for right in forms(IN, OUT):
                assert by_onednn(left, OUT)
                torch.testing.assert_close(product(left, right), left @ right)
    codes = re.findall(r"exec,cpu,inner_product,([^,]+),", capfd.readouterr().out)
    assert len(codes) == 25
    assert not [code for code in codes if code.startswith("ref")], (
        "the reference code is slower than torch's own product"
    )


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_rows_do_not_depend_on_each_other_to_the_last_bit() -> None:
    x, weight = draw(200, IN), draw(OUT, IN)
    other = x.clone()
    other[::3] = 7.0
    kept = torch.arange(200) % 3 != 0
    assert torch.equal(linear(x, weight)[kept], linear(other, weight)[kept])


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_operations_are_counted() -> None:
    x, weight = draw(N, IN), draw(OUT, IN).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * N * IN * OUT)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.filterwarnings("ignore:TF32")
def test_torch_multiplies_what_onednn_should_not() -> None:
    x = draw(N, IN)
    assert not by_onednn(x.double(), OUT), "float64"
    assert not by_onednn(x.bfloat16(), OUT), "half precision"
    assert not by_onednn(x[:4], OUT) and not by_onednn(x, 4) and not by_onednn(x[:0], OUT), "thin matrices"
    assert not by_onednn(x.to("meta"), OUT), "other devices"
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(x, OUT), "where the user turns it off"
    layer = Linear(IN, OUT, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"neon": True}, False),
    ],
)
def test_mkl_is_slow_where_it_leaves_avx512_unused(
    capabilities: dict[str, object], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    has_both = torch.backends.mkl.is_available() and products._HAS_ONEDNN
    assert products.mkl_is_slow.__wrapped__() == (slow and has_both)
