"""ProLU and its synthetic gradients against the table of the method, and the laws it exists for."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

import prolu
from prolu.sae.nonlinearities import NONLINEARITIES, GeneralisedProLU, activate, nonlinearity_named

EDGES = [-math.inf, -2.0, -1.0, -0.5, -0.0, 0.0, 5e-324, 0.25, 0.5, 1.0, 3.0, math.inf]


def table(m, b, upstream, gradient):
    """The table of section 2, entry by entry, in plain Python."""
    gate = m + b > 0 and m > 0
    if not gate:
        return 0.0, 0.0, 0.0
    if gradient == "relu":
        return m, upstream, upstream
    return m, upstream * (1 + m), upstream * m


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("gradient", ["relu", "ste"])
@pytest.mark.parametrize("m", EDGES)
@pytest.mark.parametrize("b", EDGES)
def test_value_and_gradients_are_the_table_at_every_edge(gradient, m, b):
    for upstream in (1.0, -0.3, 0.0):
        m_, b_ = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (m, b))
        out = prolu.prolu(m_, b_, gradient=gradient)
        out.backward(torch.tensor([upstream], dtype=torch.float64))
        assert m_.grad is not None
        assert b_.grad is not None
        value, dm, db = table(m, b, upstream, gradient)
        assert same(out.item(), value)
        assert same(m_.grad.item(), dm)
        assert same(b_.grad.item(), db)


@given(st.data(), array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4), st.sampled_from(["relu", "ste"]))
def test_all_shapes_follow_the_table_and_bias_gradients_sum_over_every_leading_dimension(data, shape, gradient):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    m = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    b = torch.randn(shape[-1], generator=g, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(shape, generator=g, dtype=torch.float64)
    out = prolu.prolu(m, b, gradient)
    out.backward(upstream)
    rows = [
        table(p.item(), q.item(), u.item(), gradient)
        for p, q, u in zip(m.flatten(), b.expand(shape).flatten(), upstream.flatten(), strict=True)
    ]
    expected = torch.tensor(rows, dtype=torch.float64).reshape(*shape, 3)
    assert torch.equal(out, expected[..., 0])
    assert torch.equal(m.grad, expected[..., 1])
    torch.testing.assert_close(b.grad, expected[..., 2].sum_to_size(b.shape), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gradient", ["relu", "ste"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_gate(gradient, dtype):
    g = torch.Generator().manual_seed(0)
    m, b = (torch.randn(20_000, generator=g).to(dtype).requires_grad_() for _ in range(2))
    out = prolu.prolu(m, b, gradient)
    out.sum().backward()
    exact = (m.double() + b.double() > 0) & (m.double() > 0)
    assert torch.equal(out > 0, exact)
    assert torch.equal(out, torch.where(exact, m, 0))
    assert torch.equal(m.grad != 0, exact)


@given(st.floats(-3, 3), st.floats(0.01, 5), st.floats(0.01, 5))
def test_prolu_is_conditionally_linear_and_has_the_noise_threshold(b, v, k):
    def f(m):
        return prolu.prolu(torch.tensor(m, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).item()

    if f(v) > 0 and f(k * v) > 0:
        assert f(k * v) == pytest.approx(k * f(v), rel=1e-12)
    threshold = max(0.0, -b)
    assert f(threshold) == 0
    assert f(threshold - 0.1) == 0
    assert f(math.nextafter(threshold, math.inf) + 1e-9) > 0


def relu_response(m, b):
    return torch.relu(torch.tensor(m + b, dtype=torch.float64)).item()


@given(st.floats(-2, -0.1), st.floats(0.1, 2), st.floats(1.5, 4))
def test_relu_with_negative_bias_has_the_threshold_but_not_the_linearity(b, above, k):
    v = -b + above
    assert relu_response(-b, b) == 0
    assert relu_response(v, b) > 0
    assert abs(relu_response(k * v, b) - k * relu_response(v, b)) > 1e-3


@given(st.floats(0.1, 2), st.floats(0.1, 2), st.floats(1.5, 4))
def test_relu_with_positive_bias_has_neither(b, v, k):
    assert relu_response(0.0, b) > 0
    assert abs(relu_response(k * v, b) - k * relu_response(v, b)) > 1e-3


def test_named_variants_are_exact_cases_of_the_generalised_one():
    g = torch.Generator().manual_seed(1)
    m, b, u = (torch.randn(1000, generator=g, dtype=torch.float64) for _ in range(3))
    gate = ((m + b > 0) & (m > 0)).double()
    for b_ste, m_ste, m_gg in [
        (0.0, 0.0, 1.0),
        (1.0, 1.0, 1.0),
        (0.3, 0.7, 0.5),
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 0.0),
    ]:
        m_, b_ = m.clone().requires_grad_(), b.clone().requires_grad_()
        activate(GeneralisedProLU(b_ste, m_ste, m_gg), m_, {"b_enc": b_}).backward(u)
        torch.testing.assert_close(b_.grad, u * torch.lerp(gate, gate * m, torch.tensor(b_ste).double()))
        torch.testing.assert_close(m_.grad, u * torch.lerp(gate, m_gg * gate + gate * m, torch.tensor(m_ste).double()))
    assert NONLINEARITIES["prolu_relu"] == GeneralisedProLU(0.0, 0.0, 1.0)
    assert NONLINEARITIES["prolu_ste"] == GeneralisedProLU(1.0, 1.0, 1.0)


def window(x):
    """[0 < x < 1], one of the estimators the author tried."""
    return ((x > 0) & (x < 1)).to(x.dtype)


def clamp(x):
    """Another: not 0 below the gate."""
    return x.clamp(-1, 1)


@pytest.mark.parametrize("ste", [window, clamp, torch.ones_like, torch.exp])
@pytest.mark.parametrize(("b_ste", "m_ste", "m_gg"), [(1.0, 1.0, 1.0), (0.3, 0.7, 0.5), (0.0, 0.0, 1.0)])
def test_an_estimator_of_ones_own_stands_for_the_derivative_of_t(ste, b_ste, m_ste, m_gg):
    g = torch.Generator().manual_seed(3)
    m, b, u = (torch.randn(1000, generator=g, dtype=torch.float64) for _ in range(3))
    m_, b_ = m.clone().requires_grad_(), b.clone().requires_grad_()
    out = prolu.prolu(m_, b_, GeneralisedProLU(b_ste, m_ste, m_gg, ste))
    out.backward(u)
    gate = ((m + b > 0) & (m > 0)).double()
    through = torch.relu(m) * ste(m + b)
    assert torch.equal(out, gate * m)
    torch.testing.assert_close(b_.grad, u * torch.lerp(gate, through, torch.tensor(b_ste).double()))
    torch.testing.assert_close(m_.grad, u * torch.lerp(gate, m_gg * gate + through, torch.tensor(m_ste).double()))


def test_the_papers_estimator_passed_as_a_function_of_ones_own_changes_nothing():
    g = torch.Generator().manual_seed(4)
    m, b, u = (torch.randn(1000, generator=g, dtype=torch.float64) for _ in range(3))
    ends = []
    for gradient in ("ste", GeneralisedProLU(1.0, 1.0, 1.0, lambda x: (x > 0).to(x.dtype))):
        m_, b_ = m.clone().requires_grad_(), b.clone().requires_grad_()
        out = prolu.prolu(m_, b_, gradient)
        out.backward(u)
        ends.append((out, m_.grad, b_.grad))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_members_of_the_family_have_names():
    assert nonlinearity_named("prolu(0.5,1,0)") == GeneralisedProLU(0.5, 1.0, 0.0)
    for wrong in ("prolu", "prolu(1,1)", "prolu(1,1,x)", "prolu(1,nan,1)", "prolu(1,1,1,1)"):
        with pytest.raises(ValueError, match="nonlinearity 'prolu"):
            nonlinearity_named(wrong)


@pytest.mark.parametrize("name", ["TopK", "TopK(32)", "ReLU", "JUMPRELU", "ProLU_STE", "BatchTopK(4)"])
def test_a_name_in_capitals_is_told_how_it_is_written(name):
    with pytest.raises(ValueError, match=rf"write {re.escape(name.lower())}$"):
        nonlinearity_named(name)


def test_terms_of_weight_zero_do_not_make_nan_of_infinity():
    m = torch.tensor([math.inf], requires_grad=True)
    b = torch.tensor([0.0], requires_grad=True)
    prolu.prolu(m, b, "relu").sum().backward()
    assert m.grad.item() == 1
    assert b.grad.item() == 1


def test_prolu_is_jumprelu_on_the_bias_free_preactivation():
    g = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        m, b = (torch.randn(200_000, generator=g).to(dtype) for _ in range(2))
        assert torch.equal(prolu.prolu(m, b), torch.where(m > torch.relu(-b), m, 0))


def test_module_learns_a_bias_per_latent():
    layer = prolu.ProLU(5, gradient="ste", initial_bias=-1.0)
    layer(torch.full((2, 3, 5), 2.0)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((5,), 12.0))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="choose relu or ste"):
        prolu.prolu(torch.zeros(3), torch.zeros(3), "tanh")
    with pytest.raises(ValueError, match=r"b of shape \(4,\) does not broadcast to m's \(2, 3\)"):
        prolu.prolu(torch.zeros(2, 3), torch.zeros(4))
