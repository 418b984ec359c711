"""LSQ, LSQ+ and PACT against closed forms, autograd and torch's own operators."""

import math
from functools import partial

import pytest
import torch

import common
from common import PACT, LSQPlus, Quantizer, fake_quantize
from conftest import close, normal, same

KINDS = dict(common.QUANTIZERS)
KINDS["weights"] = partial(Quantizer, channels=4)


def draw(bits, per_channel):
    """x, step size, zero point, qmax, in float64. Some x are outside the grid on either side."""
    rng = torch.Generator().manual_seed(bits)
    qmax = 2**bits - 1
    shared = [5, 1, 1, 1] if per_channel else []
    step_size = 0.05 + torch.rand(shared, generator=rng) / 5
    zero = torch.randint(1, qmax + 1, shared, generator=rng)
    shares = 1.6 * torch.rand(5, 3, 4, 2, generator=rng) - 0.3
    x = (max(qmax, 2) * shares - zero) * step_size
    return x.double(), step_size.double(), zero.double(), qmax


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_eq3_is_the_closed_form_and_bit_equal_to_torchs_own_operators(bits, per_channel):
    """To torch's in float32, but for ties of rounding, which its x * (1/s) may break."""
    x, step_size, z, qmax = draw(bits, per_channel)
    v = x / step_size
    x_int = (v.round() + z).clamp(0, qmax)
    x_hat = fake_quantize(x, step_size, z, 0, qmax)
    close(x_hat, (x_int - z) * step_size, rtol=0, atol=1e-14)
    x = x.float()
    step_size = step_size.float()
    mine = fake_quantize(x, step_size, z.float(), 0, qmax)
    if per_channel:
        fake = torch.fake_quantize_per_channel_affine
        theirs = fake(x, step_size.flatten(), z.flatten().int(), 0, 0, qmax)
    else:
        theirs = torch.fake_quantize_per_tensor_affine(x, step_size, z.int(), 0, qmax)
    distance = v - v.floor() - 0.5
    clear = distance.abs() > 1e-4
    same(mine[clear], theirs[clear])


def test_lsq_gradients_golden():
    """s = 1/2, z = 1, q_max = 3; x/s is below, on the bound, a tie, inside, on the bound, above."""
    x = torch.tensor([-0.8, -0.5, 0.25, 0.3, 1.0, 5.0], requires_grad=True)
    step_size = torch.full((6,), 0.5, requires_grad=True)
    zero = torch.ones(6)
    x_hat = fake_quantize(x, step_size, zero, 0, 3, grad_scale=10)
    x_hat.sum().backward()
    assert x_hat.tolist() == [-0.5, -0.5, 0, 0.5, 1, 1]
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]
    slopes = torch.tensor([-1, -1, -0.5, 0.4, 2, 2])
    close(step_size.grad, 10 * slopes)


def autograd_reference(x, step_size, zero_point, qmin, qmax):
    """Eq. 3, where autograd derives clamp, and rounding has derivative 1."""
    v = (x / step_size + zero_point).clamp(qmin, qmax)
    x_int = v + (v.round() - v).detach()
    return (x_int - zero_point) * step_size


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_first_and_second_derivatives_are_those_of_autograd(bits, per_channel):
    x, step_size, z, qmax = draw(bits, per_channel)
    g = normal(*x.shape)
    x = x.contiguous(memory_format=torch.channels_last)  # g is not
    x.requires_grad_()
    step_size.requires_grad_()

    def derivatives(f):
        out = f(x, step_size, z, 0, qmax)
        weighted = g * out
        loss = weighted.sum() + weighted.square().sum()
        by_x, by_s = torch.autograd.grad(loss, (x, step_size), create_graph=True)
        loss = by_x.sin().sum() + by_s.square().sum()
        second = torch.autograd.grad(loss, (x, step_size))
        assert second[0].any() and second[1].any()
        return by_x, by_s, *second

    mine = derivatives(fake_quantize)
    close(mine, derivatives(autograd_reference), rtol=1e-9, atol=1e-10)


def test_lsq_gradient_scale_of_weights_counts_the_elements_of_a_channel():
    """1 / sqrt(N q_max); that N counts the whole batch for activations, the test of LSQ+ shows."""
    q = Quantizer(3, channels=4)
    assert q.grad_scale(normal(4, 6)) == pytest.approx((6 * 7) ** -0.5)


def test_eq4_eq5_min_max_golden():
    q = Quantizer(4, channels=3)
    x = torch.tensor([
        [-1.0, 2.1],
        [-6.0, 1.5],
        [1.0, 3.0],  # widened to hold 0
    ])
    q.initialize(x, candidates=1)  # a = 1 only
    assert q.step_size.tolist() == pytest.approx([3.1 / 15, 7.5 / 15, 3 / 15])  # Eq. 4
    assert q.zero_point.tolist() == [round(15 - 2.1 / 3.1 * 15), 12, 0]  # Eq. 5


@pytest.mark.parametrize("bits,channels", [(1, None), (2, 3), (4, 3), (8, 3)])
def test_initialize_finds_the_least_error_of_all_ranges(bits, channels):
    x = normal(channels or 1, 500).clamp_min(-1)
    x[0] *= -1  # one row is longer below 0, the others are longer above it
    q = Quantizer(bits, channels)
    q.initialize(x)
    _, zero = q.grid(x)
    low = x.amin(1, keepdim=True)
    high = x.amax(1, keepdim=True)
    largest = (high - low) / q.qmax
    errors = []
    for i in range(1, 101):
        x_hat = fake_quantize(x, i / 100 * largest, zero, 0, q.qmax)
        errors.append((x_hat - x).square().sum(1))
    least = torch.stack(errors).amin(0)
    x_hat = q(x).detach()
    close((x_hat - x).square().sum(1), least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels,width,most", [
    (1, 10**6, 65536),
    (64, 5000, 1024),
])
def test_large_tensors_calibrate_on_evenly_spaced_values_and_both_extremes(channels, width, most):
    """All 1e8 values of a weight of 4096 x 25088 would take minutes."""
    x = torch.linspace(0, 1, width).repeat(channels, 1)
    x[:, 7] = 99
    x[:, 8] = -99
    rows = common.spaced_values(x, channels)
    same(rows.amax(1), x.amax(1))
    same(rows.amin(1), x.amin(1))
    spaced = torch.linspace(0, 1, most).expand(channels, most)
    close(rows[:, :-2], spaced, rtol=0, atol=1 / most)


def test_lsq_plus_value_and_gradients_match_the_closed_form():
    """dx_hat/dbeta = 0 inside the grid, 1 outside; beta starts at 0, on the grid of LSQ."""
    q = LSQPlus(2)
    lsq = Quantizer(2)
    x = 2 * normal(200)
    g = normal(200, seed=2)
    q.initialize(x)
    lsq.initialize(x)
    assert q.zero_point > 0
    same(q(x), lsq(x))
    q.step_size.data.fill_(0.7)
    q.offset.data.fill_(-0.4)
    v = (x + 0.4) / 0.7
    low = -q.zero_point
    inside = (v > low) & (v < low + 3)
    whole = v.round().clamp(low, low + 3)
    x.requires_grad_()
    out = q(x)
    out.backward(g)
    close(out, whole * 0.7 - 0.4)
    same(x.grad, g * inside)
    by_step_size = (g * torch.where(inside, whole - v, whole)).sum()
    close(q.step_size.grad, by_step_size / math.sqrt(200 * 3))
    close(q.offset.grad, (g * ~inside).sum() / math.sqrt(200 * 3))
    q.initialize(x)  # anew: beta is 0 again
    same(q(x), lsq(x))


@pytest.mark.parametrize("bits,zero", [
    (2, 0),
    (2, 1),
    (1, 0),
])
def test_pact_matches_the_closed_form_and_alpha_moves_as_if_it_were_the_parameter(bits, zero):
    """dx_hat/dalpha = [x >= alpha]; with negative data -z / (q_max - z) where x <= -z s."""
    q = PACT(bits)
    alpha = (q.qmax - zero) / 2
    q.step_size.data.fill_(1 / 2)
    q.zero_point.fill_(zero)
    optimizer = torch.optim.SGD(q.parameters(), 0.01, weight_decay=0.5)
    x = torch.tensor([-1.0, 0.25, alpha - 0.2, alpha - 0.1, alpha, 5.0], requires_grad=True)
    out = q(x)
    assert out.tolist() == [-zero / 2, 0, alpha, alpha, alpha, alpha]  # 0.25 is a tie
    out.backward(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]
    optimizer.step()
    slope = 5 + 6 - zero / 2 / alpha
    expected = alpha - 0.01 * (slope + 0.5 * alpha)
    assert 2 * alpha * q.step_size.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sign_of_the_step_size_carries_no_meaning(kind):
    q = KINDS[kind](2)
    x = normal(4, 50)
    q.initialize(x)
    g = normal(4, 50, seed=2)
    out = q(x)
    out.backward(g)
    grad = q.step_size.grad
    q.step_size = torch.nn.Parameter(-q.step_size)
    same(q(x), out)
    q(x).backward(g)
    same(q.step_size.grad, -grad)
    assert grad.all()  # a negative step size still learns


CASES = [(kind, bits) for kind in KINDS for bits in (1, 2, 8)]
CASES.remove(("weights", 1))


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("kind,bits", CASES)
def test_degenerate_inputs_and_step_sizes_stay_finite(kind, bits, value):
    q = KINDS[kind](bits)
    x = torch.full((4, 9), value)
    q.initialize(x)
    assert (q.step_size > 0).all()
    if value >= 0 or bits > 1:
        close(q(x), x, rtol=0.02, atol=0)
    x.requires_grad_()
    for factor in (1, 0):  # also a step size of 0
        q.step_size.data *= factor
        q(x).square().sum().backward()
        gradients = [p.grad for p in q.parameters()]
        for tensor in [q(x), x.grad, *gradients]:
            assert tensor.isfinite().all()


@pytest.mark.parametrize("kind,bits", [case for case in CASES if case[1] > 1])
def test_zero_is_strictly_inside_the_grid_where_nothing_is_above_it(kind, bits):
    """On a bound of the grid, an x of 0 would never have a gradient."""
    q = KINDS[kind](bits)
    x = -normal(4, 50).relu()
    x[0] = 0
    q.initialize(x)
    assert (q.zero_point > 0).all()
    assert (q.zero_point < q.qmax).all()
    assert q.step_size.argmax() == 0  # zeros take the widest range of the other channels
    x.requires_grad_()
    q(x).sum().backward()
    assert x.grad[x == 0].all()


@pytest.mark.parametrize("bits,channels,fewest", [
    (0, None, 1),
    (9, None, 1),
    (1, 4, 2),
])
def test_quantizer_refuses_other_bits(bits, channels, fewest):
    with pytest.raises(ValueError, match=f"from {fewest} to 8"):
        Quantizer(bits, channels)
