"""Which library multiplies, and that either gives the same."""

import pytest
import torch

from gitlight.gradients import products
from gitlight.gradients.products import frozen_linear, write_products


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def by_onednn(request, monkeypatch):
    monkeypatch.setattr(products, "has_avx512", lambda: True)
    monkeypatch.setattr(products, "has_whole_avx512", lambda: True)
    monkeypatch.setattr(products, "is_intels", lambda: not request.param)
    return request.param


def test_large_float32_products_are_onednns_but_on_intels_processors(by_onednn):
    large, small = torch.rand(2, 1, 300, 64), 1000
    assert products._by_onednn(large, 10_000_000) is (by_onednn and torch.backends.mkldnn.is_available())
    assert not products._by_onednn(large, small)
    assert not products._by_onednn(large.double(), 10_000_000)


@pytest.mark.parametrize("n_images", [1, 2])
def test_products_of_leaks_are_those_of_float64(by_onednn, n_images):
    torch.manual_seed(0)
    left, right = torch.randn(2, n_images, 200, 64), torch.randn(2, n_images, 64, 200)
    out = torch.full((2, 200, 200), torch.nan)
    write_products(left, right, out)
    torch.testing.assert_close(out.double(), (left.double() @ right.double()).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize("n_positions", [1, 7, 64])
@pytest.mark.parametrize("layout", ["by position", "by channel", "with gaps"])
def test_products_of_layers_outputs_are_those_of_float64_however_they_lie(by_onednn, n_images, n_positions, layout):
    torch.manual_seed(0)
    size = (4, n_images, n_positions)
    delta, x = torch.randn(*size, 200), torch.randn(*size, 100)
    if layout == "by channel":
        delta = delta.mT.contiguous().mT
    if layout == "with gaps":
        delta, x = torch.randn(*size[:2], n_positions + 1, 200)[:, :, 1:], x.repeat(1, 2, 1, 1)[:, ::2]
    out = torch.full((4, 200, 100), torch.nan)
    write_products(delta.transpose(2, 3), x, out)
    wanted = torch.einsum("bnlo,bnli->boi", delta.double(), x.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("order", ["dense", "swapped", "with gaps"])
def test_a_frozen_linear_layer_and_its_derivative_are_those_of_float64(by_onednn, order, with_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 192), torch.randn(300) if with_bias else None
    shapes = {"dense": (4, 65, 192), "swapped": (65, 4, 192), "with gaps": (4, 65, 200)}
    x = torch.randn(shapes[order], requires_grad=True)
    given = {"dense": x, "swapped": x.transpose(0, 1), "with gaps": x[..., :192]}[order]
    upstream = torch.randn(4, 65, 300)
    made = frozen_linear(given, weight, bias)
    wanted = given.double() @ weight.double().T + (bias.double() if with_bias else 0)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-4)
    for delta in (upstream, upstream.transpose(0, 1).contiguous().transpose(0, 1)):
        (found,) = torch.autograd.grad(made, given, delta, retain_graph=True)
        torch.testing.assert_close(found.double(), upstream.double() @ weight.double(), rtol=1e-4, atol=1e-4)
    assert made.is_contiguous()
    assert not made._is_view()


@pytest.mark.parametrize(("vendor", "is_intels"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_maker_is_read_from_the_system(monkeypatch, vendor, is_intels):
    monkeypatch.setattr(products.Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    assert products.is_intels.__wrapped__() is is_intels


@pytest.mark.parametrize(
    ("system", "whole"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", True),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", True),
        ("", True),
    ],
)
def test_zen_4_halves_its_vectors(monkeypatch, system, whole):
    monkeypatch.setattr(products, "has_avx512", lambda: True)
    monkeypatch.setattr(products.Path, "read_text", lambda path: system)
    assert products.has_whole_avx512.__wrapped__() is whole
