"""LSQ, LSQ+ and PACT against closed forms, the definition in common.py and torch's operators."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import common
from common import PACT, LSQPlus, Quantizer, fake_quantize, fake_quantize_definition
from conftest import close, normal

KINDS = {**common.QUANTIZERS, "weights": partial(Quantizer, channels=4)}


def draw(bits, per_channel=False):
    """(x, step size, zero point, qmax), doubles with some values outside the grid on either side,
    and a gradient."""
    rng, qmax, shape = torch.Generator().manual_seed(bits), 2**bits - 1, (5, 3, 4, 2)
    steps = (5, 1, 1, 1) if per_channel else ()
    step_size = torch.rand(steps, generator=rng).double() * 0.2 + 0.05
    zero = torch.randint(1, qmax + 1, steps, generator=rng).double()
    v = (torch.rand(shape, generator=rng).double() * 1.6 - 0.3) * max(qmax, 2) - zero
    return v * step_size, step_size, zero, qmax, normal(*shape).double()


@pytest.mark.parametrize("kind", ["number", "tensor", "channels"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_eq3_value_and_lsq_gradients_match_the_closed_form_and_torch(bits, kind):
    """In float32 bit-equal to torch, but for rounding ties, which its x * (1/s) may break."""
    x, step_size, z, qmax, g = draw(bits, kind == "channels")
    if kind == "channels":  # x/s on both bounds, without a gradient; a tie: to 0 whatever z
        step_size[0] = 1 / 8
        x[0, :, 0, 0] = torch.tensor([-z[0], qmax - z[0], 0.5]) / 8
    a, s = x.clone().requires_grad_(), step_size.clone().requires_grad_()
    zero = z.item() if kind == "number" else z
    out = fake_quantize(a, s, zero, 0, qmax, 0.25)
    out.backward(g)
    v, low, high = x / step_size, -z, qmax - z
    inside = (v > low) & (v < high)
    assert 0 < inside.sum() < x.numel()
    slope = torch.where(inside, v.round() - v, torch.where(v <= low, low, high))
    close(out, ((v.round() + z).clamp(0, qmax) - z) * step_size, rtol=0, atol=1e-14)
    assert torch.equal(a.grad, g * inside)
    close(s.grad, 0.25 * (g * slope).sum_to_size(s.shape), rtol=1e-9, atol=1e-12)
    x, s, v = x.float(), step_size.float(), x.float() / step_size.float()
    clear = (v - v.floor() - 0.5).abs() > 1e-5
    theirs = torch.fake_quantize_per_channel_affine(  # a tensor as its only channel
        x if kind == "channels" else x[None], s.flatten(), z.flatten().int(), 0, 0, qmax)
    mine = fake_quantize(x, s, zero, 0, qmax)
    assert torch.equal(mine[clear], theirs.reshape(x.shape)[clear])


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [False, True])
def test_both_derivatives_match_the_definition_in_every_memory_order(memory, per_channel):
    def derivatives(f):
        a = x.clone(memory_format=memory).requires_grad_()
        s = step_size.clone().requires_grad_()
        out = f(a, s, zero, 0, qmax)
        plain = torch.autograd.grad(out, (a, s), g, retain_graph=True)
        curved = (g * out).square().sum()
        by_a, by_s = torch.autograd.grad(curved, (a, s), create_graph=True)
        second = by_a.sin().sum() + by_s.square().sum()
        return out, *plain, *torch.autograd.grad(second, (a, s))
    x, step_size, zero, qmax, g = draw(3, per_channel)  # g is contiguous, whatever x is
    for mine, theirs in zip(derivatives(fake_quantize), derivatives(fake_quantize_definition)):
        assert mine.abs().sum() > 0
        close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_lsq_gradient_scale_of_weights_counts_the_elements_of_a_channel():
    """1 / sqrt(N q_max); that N counts the whole batch for activations, the test of LSQ+ shows."""
    assert Quantizer(3, channels=4).grad_scale(normal(4, 6)) == pytest.approx((6 * 7) ** -0.5)


def test_eq4_eq5_min_max_golden():
    q = Quantizer(4, channels=3)
    x = torch.tensor([[-1.0, 2.1], [-6.0, 1.5], [1.0, 3.0]])  # the third is widened to hold 0
    q.initialize(x, candidates=1)  # a = 1 only
    assert q.step_size.tolist() == pytest.approx([3.1 / 15, 7.5 / 15, 3 / 15])  # Eq. 4
    assert q.zero_point.tolist() == [round(15 - 2.1 / 3.1 * 15), 12, 0]  # Eq. 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_initialize_finds_the_least_error_of_all_ranges(bits):
    def error(step_size):
        x_hat = fake_quantize(x, step_size.reshape(3, 1), q.grid(x)[1], 0, q.qmax)
        return (x_hat - x).square().sum(1)
    q, x = Quantizer(bits, channels=3), normal(3, 500)
    x[0].clamp_max_(1)  # longer below 0
    x[1].clamp_min_(-1)  # longer above it
    q.initialize(x)
    width = 2 * x.abs().amax(1) if bits == 1 else x.amax(1) - x.amin(1)
    others = torch.stack([error(width / q.qmax * i / 100) for i in range(1, 101)])
    close(error(q.step_size.detach()), others.amin(0), rtol=1e-4, atol=1e-6)
    if bits == 1:  # the least squared error of -s/2 and s/2
        close(q.step_size, 2 * x.abs().mean(1), rtol=0.05, atol=0)


def test_one_bit_of_a_weight_is_minus_or_plus_half_a_step_size():
    q = Quantizer(1, channels=2)
    w = torch.tensor([[-2.0, -0.4, 0.1, 3.0], [0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    q.initialize(w.detach())
    q.step_size.data = torch.tensor([1.0, 2.0])
    out = q(w)
    assert out.tolist() == [[-0.5, -0.5, 0.5, 0.5], [1, -1, 1, -1]]
    out.backward(torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 2]]))
    assert w.grad.tolist() == [[0, 2, 3, 0], [1, 1, 1, 2]]  # straight through within the levels
    # d x_hat / ds = x_hat / s - x / s within, x_hat / s outside; scaled by 1 / sqrt(N q_max)
    first = 1 * -0.5 + 2 * (-0.5 + 0.4) + 3 * (0.5 - 0.1) + 4 * 0.5
    second = (0.5 - 0.25) * (1 - 1 + 1 - 2)
    close(q.step_size.grad, torch.tensor([first, second]) / 2)


def test_lsq_plus_value_and_gradients_match_the_closed_form():
    """dx_hat/dbeta = 0 inside the grid, 1 outside; beta starts at 0, on the grid of LSQ."""
    q, lsq, x, g = LSQPlus(2), Quantizer(2), 2 * normal(200), normal(200, seed=2)
    q.initialize(x)
    lsq.initialize(x)
    assert q.zero_point > 0 and torch.equal(q(x), lsq(x))
    nn.init.constant_(q.step_size, 0.7)
    nn.init.constant_(q.offset, -0.4)
    a, v, low = x.clone().requires_grad_(), (x + 0.4) / 0.7, -q.zero_point
    out = q(a)
    out.backward(g)
    inside, n = (v > low) & (v < low + 3), v.round().clamp(low, low + 3)
    close(out, n * 0.7 - 0.4)
    assert torch.equal(a.grad, g * inside)
    by_step_size = (g * torch.where(inside, n - v, n)).sum()
    for p, expected in (q.step_size, by_step_size), (q.offset, (g * ~inside).sum()):
        close(p.grad, expected / math.sqrt(200 * 3))


@pytest.mark.parametrize("bits,zero", [(2, 0), (2, 1), (1, 0)])
def test_pact_matches_the_closed_form_and_alpha_moves_as_if_it_were_the_parameter(bits, zero):
    """dx_hat/dalpha = [x >= alpha]; with negative data -z / (q_max - z) where x <= -z s."""
    q, alpha = PACT(bits), (2**bits - 1 - zero) / 2
    nn.init.constant_(q.step_size, 1 / 2)
    q.zero_point.fill_(zero)
    optimizer = torch.optim.SGD(q.parameters(), 0.01, weight_decay=0.5)
    x = torch.tensor([-1.0, 0.25, alpha - 0.2, alpha - 0.1, alpha, 5.0], requires_grad=True)
    out = q(x)
    assert out.tolist() == [-zero / 2, 0, alpha, alpha, alpha, alpha]  # 0.25 is a tie, also here:
    assert torch.equal((q.integers(x)[0] - zero) / 2, out)
    out.backward(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]
    optimizer.step()
    expected = alpha - 0.01 * (5 + 6 - zero / 2 / alpha + 0.5 * alpha)
    assert 2 * alpha * q.step_size.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sign_of_the_step_size_carries_no_meaning(kind):
    q, x, found = KINDS[kind](2), normal(4, 50), []
    q.initialize(x)
    for _ in range(2):
        out = q(x)
        found += out, *torch.autograd.grad(out, q.step_size, normal(4, 50, seed=2))
        q.step_size.data.neg_()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], -found[3])
    assert found[3].all()  # a negative step size still learns


INPUTS = {"zeros": torch.zeros(4, 9), "positive": torch.full((4, 9), 3.0),
          "negative": torch.full((4, 9), -3.0), "one": torch.cat([torch.zeros(1, 9), normal(3, 9)])}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_degenerate_inputs_stay_finite(bits, kind, name):
    q, x = KINDS[kind](bits), INPUTS[name].clone().requires_grad_()
    q.initialize(x.detach())
    s, z = q.step_size.detach(), q.zero_point
    assert (s > 0).all() and ((z >= 0) & (z <= q.qmax)).all()
    if bits > 1 or kind != "weights":  # one bit of a weight is never 0
        assert name != "zeros" or s.eq(1).all()
        assert name != "one" or s.max() == s.flatten()[0] != 1  # the widest of the channels
    if name in ("positive", "negative"):
        close(q(x), x, rtol=0.02, atol=0)
    for step_size in (q.step_size.data, 0 * s):
        q.step_size.data = step_size
        out = q(x)
        out.square().sum().backward()
        grads = [p.grad for p in q.parameters() if p.requires_grad]
        assert len(grads) == (bits < 8) * (1 + (kind == "lsq+"))
        assert all(t.isfinite().all() for t in [out, x.grad, *grads])


@pytest.mark.parametrize("kind", KINDS)
def test_another_zero_point_takes_effect_on_a_quantizer_in_use(kind):
    """Also where a network that holds the quantizer loads its state."""
    x, (loaded, again, other) = normal(4, 30), (KINDS[kind](3) for _ in range(3))
    for q, values in ((loaded, x), (again, x), (other, x - 1)):
        q.initialize(values)
        q(x)
    assert not torch.equal(other.zero_point, loaded.zero_point)
    nn.Sequential(loaded).load_state_dict(nn.Sequential(other).state_dict())
    again.initialize(x - 1)
    assert torch.equal(loaded(x), other(x)) and torch.equal(again(x), other(x))


@pytest.mark.parametrize("bits", [0, 9])
def test_quantizer_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="from 1 to 8"):
        Quantizer(bits)
