"""LSQ and the fixed zero point against closed forms, torch's operators and a plain composite."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import common
from common import Quantizer, fake_quantize


def composite(x, step, zero_point, qmin, qmax, grad_scale=1.0):
    """The same quantizer out of elementary operations, gradients by detaching: the oracle."""
    scaled = step * grad_scale
    step = step.detach() + (scaled - scaled.detach())
    v = torch.clamp(x / step, qmin - zero_point, qmax - zero_point)
    return (v + (v.round() - v).detach()) * step


def draw(bits, per_channel, dtype, seed=0):
    """(x, step, zero_point, qmin, qmax) with some values outside the grid on either side."""
    rng = torch.Generator().manual_seed(100 * seed + bits)
    shape = [(5, 3, 4, 2), (6, 7), (4, 3, 3)][(bits + seed) % 3]
    steps = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    qmax = 2**bits - 1
    step = torch.rand(steps, generator=rng, dtype=torch.float64) * 0.2 + 0.05
    zero = torch.randint(1, qmax + 1, steps, generator=rng).double()
    v = (torch.rand(shape, generator=rng, dtype=torch.float64) * 1.6 - 0.3) * max(qmax, 2) - zero
    return (v * step).to(dtype), step.to(dtype), zero.to(dtype), 0, qmax


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_eq3_value_and_lsq_gradients_match_the_closed_form(bits, per_channel):
    x, step, zero, qmin, qmax = draw(bits, per_channel, torch.float64)
    x.requires_grad_(), step.requires_grad_()
    grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = fake_quantize(x, step, zero, qmin, qmax, grad_scale=0.25)
    out.backward(grad)

    xn, s, z, g = (t.detach().numpy() for t in (x, step, zero, grad))
    v, low, high = xn / s, qmin - z, qmax - z
    value = (np.clip(np.round(v) + z, qmin, qmax) - z) * s
    inside = (v > low) & (v < high)
    d_step = np.where(inside, np.round(v) - v, np.where(v <= low, low, high))
    by_step = (g * d_step).sum(axis=tuple(range(1, x.dim())) if per_channel else None)
    assert inside.any() and (~inside).any()
    np.testing.assert_allclose(out.detach().numpy(), value, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(x.grad.numpy(), g * inside)
    np.testing.assert_allclose(step.grad.numpy().reshape(by_step.shape), 0.25 * by_step, rtol=1e-9,
                               atol=1e-12)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_match_the_composite_in_every_memory_order(memory, per_channel):
    x, step, zero, qmin, qmax = draw(3, per_channel, torch.float64, seed=3)
    x = x.contiguous(memory_format=memory)
    grad = torch.randn(x.shape, dtype=torch.float64)  # contiguous, whatever x is
    grads = []
    for f in (fake_quantize, composite):
        inputs = x.clone().requires_grad_(), step.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(*inputs, zero, qmin, qmax, 0.5), inputs, grad))
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_mask_uses_the_value_before_rounding():
    # v = 3.2 rounds onto the grid [0, 3] but lies above it: no gradient to x, Qp to the step.
    x, step = torch.tensor([3.2, 2.7]).requires_grad_(), torch.tensor(1.0).requires_grad_()
    gx, gs = torch.autograd.grad(fake_quantize(x, step, torch.tensor(0.0), 0, 3).sum(), (x, step))
    assert gx.tolist() == [0, 1]
    assert gs.item() == pytest.approx(3 + 0.3)


def test_a_value_on_the_bound_counts_as_outside():
    x, step = torch.tensor([3.0, 0.0, -1.0]).requires_grad_(), torch.tensor(1.0).requires_grad_()
    gx, gs = torch.autograd.grad(fake_quantize(x, step, torch.tensor(1.0), 0, 3).sum(), (x, step))
    assert gx.tolist() == [0, 1, 0] and gs.item() == 2 + 0 - 1  # Qp = 2, Qn = -1


def test_fake_quantize_is_twice_differentiable_like_the_composite():
    x, step, zero, qmin, qmax = draw(2, False, torch.float64)
    weight = torch.randn(x.shape, dtype=torch.float64)

    def second(f):
        a, b = x.clone().requires_grad_(), step.clone().requires_grad_()
        loss = (weight * f(a, b, zero, qmin, qmax)).square().sum()  # curved after the quantizer
        first = torch.autograd.grad(loss, (a, b), create_graph=True)
        return torch.autograd.grad(first[0].sin().sum() + first[1].square(), (a, b))

    for mine, theirs in zip(second(fake_quantize), second(composite)):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bits", range(1, 9))
def test_forward_is_bit_equal_to_torch(bits):
    """Per tensor and per channel, but for rounding ties, which torch's x * (1/s) may break."""
    x, step, zero, qmin, qmax = draw(bits, True, torch.float32)
    tie = ((x / step - (x / step).floor()) - 0.5).abs() < 1e-5
    theirs = torch.fake_quantize_per_channel_affine(
        x, step.flatten(), zero.flatten().int(), 0, qmin, qmax)
    assert torch.equal(fake_quantize(x, step, zero, qmin, qmax)[~tie], theirs[~tie])
    x, step, zero, qmin, qmax = draw(bits, False, torch.float32, seed=1)
    tie = ((x / step - (x / step).floor()) - 0.5).abs() < 1e-5
    theirs = torch.fake_quantize_per_tensor_affine(x, step.item(), int(zero), qmin, qmax)
    assert torch.equal(fake_quantize(x, step, zero, qmin, qmax)[~tie], theirs[~tie])


@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_sums_the_steps_gradient_in_full(bits):
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for kind in (torch.bfloat16, torch.float64):
        a, step = x.to(kind).requires_grad_(), torch.tensor(4 / 2**bits).requires_grad_()
        out = fake_quantize(a, step, 2.0**bits / 2, 0, 2**bits - 1)
        assert out.dtype == kind
        results.append([t.double() for t in (out, *torch.autograd.grad(out, (a, step),
                                                                       grad.to(kind)))])
    for mine, exact in zip(*results):
        torch.testing.assert_close(mine, exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("zero", [1.0, torch.tensor(1.0)])
def test_straight_through_equals_the_eager_quantizer(zero, monkeypatch):
    x, grad = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results, function = [], common.straight_through
    for compiled in ([], [lambda *args: function(*args)]):
        monkeypatch.setattr(common, "COMPILED", compiled)
        a, step = x.clone().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
        out = fake_quantize(a, step, zero, 0, 3, 0.1)
        assert ("FakeQuantize" in out.grad_fn.name()) != bool(compiled)
        results.append((out, *torch.autograd.grad(out, (a, step), grad)))
        with torch.no_grad():
            assert torch.equal(fake_quantize(a, step, zero, 0, 3), out)
        per_row = fake_quantize(x.reshape(2, 30).requires_grad_(), step.repeat(2, 1), zero, 0, 3)
        assert "FakeQuantize" in per_row.grad_fn.name()  # steps of channels stay eager
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


def test_compiled_quantizer_agrees_with_the_eager_one():
    if not common.use_compiled(True):
        pytest.skip("nothing can be compiled here")
    try:
        for shape in ((4, 3, 5, 5), (6, 7)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2
            step, zero, results = torch.tensor(0.3), torch.tensor(1.0), []
            for compiled in (True, False):
                common.use_compiled(compiled)
                a, b = x.clone().requires_grad_(), step.clone().requires_grad_()
                out = fake_quantize(a, b, zero, 0, 3, 0.1)
                assert ("FakeQuantize" in out.grad_fn.name()) != compiled
                results.append((out, *torch.autograd.grad((out * x).sum(), (a, b))))
            for mine, theirs in zip(*results):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    finally:
        common.use_compiled(False)


@pytest.mark.parametrize("symmetric,channels", [(False, None), (True, None), (False, 4), (True, 4)])
def test_quantizer_scales_the_step_gradient_by_lsq_rule(symmetric, channels):
    q = Quantizer(3, symmetric, channels)
    x = torch.randn(4, 6, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    q.initialize(x)
    q(x).sum().backward()
    s, z = (t.detach().clone() for t in q.grid(x))
    s.requires_grad_()
    composite(x, s, z, q.qmin, q.qmax).sum().backward()
    positive, shared = (3 if symmetric else 7), (6 if channels else 24)
    expected = s.grad.reshape(q.step.shape) / math.sqrt(shared * positive)
    torch.testing.assert_close(q.step.grad, expected, rtol=1e-4, atol=1e-6)


def test_eq4_eq5_min_max_golden():
    q = Quantizer(2)
    q.initialize(torch.tensor([-1.0, 0.2, 2.0]), candidates=1)  # a = 1 only
    assert q.step.item() == pytest.approx(3 / 3)  # Eq. 4
    assert q.zero_point.item() == round(3 - 2 / 1)  # Eq. 5
    per_channel = Quantizer(4, channels=2)
    x = torch.tensor([[-1.0, 2.0], [-6.0, 1.5]])
    per_channel.initialize(x, candidates=1)
    assert per_channel.step.tolist() == pytest.approx([3 / 15, 7.5 / 15])
    assert per_channel.zero_point.tolist() == [5, 12]


@pytest.mark.parametrize("bits,symmetric", [(2, False), (4, True), (8, False)])
def test_initialize_finds_the_least_error_of_all_ranges(bits, symmetric):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    x[0].clamp_max_(1), x[1].clamp_min_(-1)  # one longer below 0, one longer above
    q = Quantizer(bits, symmetric, channels=3)
    q.initialize(x)

    def error(step):
        step = step.reshape(3, 1)
        return (fake_quantize(x, step, q.grid(x)[1], q.qmin, q.qmax) - x).square().sum(1)

    limit = x.abs().amax(1) if symmetric else (x.amax(1) - x.amin(1)) / 2
    scale = 2 * limit / (2**bits - 1)
    others = torch.stack([error(scale * i / 100) for i in range(1, 101)])
    torch.testing.assert_close(error(q.step.detach()), others.amin(0), rtol=1e-4, atol=1e-6)


def test_sign_of_the_step_carries_no_meaning():
    x = torch.randn(50)
    q = Quantizer(2)
    q.initialize(x)
    expected = q(x)
    expected.sum().backward()
    forward_grad = q.step.grad.clone()
    with torch.no_grad():
        q.step.neg_()
    q.step.grad = None
    out = q(x)
    out.sum().backward()
    assert torch.equal(out, expected) and torch.equal(q.step.grad, -forward_grad)
    assert forward_grad != 0  # a negative step still learns


@pytest.mark.parametrize("x", [torch.zeros(4, 9), torch.full((4, 9), 3.0), torch.full((4, 9), -3.0),
                               torch.cat([torch.zeros(1, 9), torch.randn(3, 9)])])
@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("step", [None, 0.0])
def test_degenerate_inputs_stay_finite(x, channels, step):
    q, x = Quantizer(2, channels=channels), x.clone().requires_grad_()
    q.initialize(x.detach())
    assert (q.step > 0).all() and ((q.zero_point >= 0) & (q.zero_point <= 3)).all()
    if x.any() and channels and not x[0].any():  # a channel of zeros: the widest of the others
        widest = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)).max().item() / 3
        assert q.step[0].item() == pytest.approx(widest)
    if not x.any():
        assert q.step.eq(1).all()
    if step is not None:
        nn.init.constant_(q.step, step)
    out = q(x)
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and q.step.grad.isfinite().all()
    if step is None and x.unique().numel() == 1:
        torch.testing.assert_close(out, x, rtol=0.02, atol=0)


def test_uncalibrated_use_says_what_to_call(tiny_data):
    model = common.quantize(common.build_model("resnet8", 10), 2, 2)
    with pytest.raises(RuntimeError, match=r"call common\.calibrate"):
        model(tiny_data.sample(2)[0])


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_quantizer_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="from 1 to 8"):
        Quantizer(bits)


def test_quantize_copies_and_keeps_first_and_last_layer_at_8_bits(tiny_data):
    model = common.build_model("resnet8", 10)
    quantized = common.quantize(model, 2, 3)
    bits = [(layer.weight_quantizer.bits, layer.input_quantizer.bits)
            for layer in common.product_layers(quantized).values()]
    assert bits == [(8, 8)] + [(2, 3)] * 8 + [(8, 8)]
    assert all(layer.weight_quantizer.channels == len(layer.weight)
               and layer.input_quantizer.channels is None
               for layer in common.product_layers(quantized).values())
    common.calibrate(quantized, tiny_data.sample(8)[0])
    assert not any(isinstance(m, Quantizer) for m in model.modules())
    quantized.conv.weight.data.zero_()
    assert model.conv.weight.abs().sum() > 0


@pytest.mark.parametrize("batch_stats", [True, False])
def test_calibration_is_layer_after_layer_and_leaves_no_trace(batch_stats, tiny_data, calibrated):
    again = copy.deepcopy(calibrated).train()
    images = 3 * tiny_data.sample(16)[0]
    before = {k: v.clone() for k, v in again.state_dict().items()}
    common.calibrate(again, images, batch_stats=batch_stats)
    assert again.training and all(m.track_running_stats for m in again.modules()
                                  if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items()
               if "running" in k or "tracked" in k)
    assert not any(m._forward_pre_hooks for m in again.modules())
    # A later layer's step is the one that the quantized, not the float, layers before it ask, and
    # their batch norm as it is in training, or in evaluation.
    seen = []
    hook = again.blocks[1].conv2.input_quantizer.register_forward_pre_hook(
        lambda q, inputs: seen.append(inputs[0]))
    again.train(batch_stats)(images)
    hook.remove()
    fresh = Quantizer(2)
    fresh.initialize(seen[0])
    assert torch.equal(fresh.step, again.blocks[1].conv2.input_quantizer.step)


def test_saved_and_loaded_network_gives_the_same_logits(tmp_path, tiny_data, calibrated):
    images = tiny_data.sample(8)[0]
    torch.save(calibrated.state_dict(), tmp_path / "model.pt")
    fresh = common.quantize(common.build_model("resnet8", 10), 2, 2)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh.eval()(images), calibrated.eval()(images))


def test_every_step_is_trained_without_weight_decay(tiny_data):
    model = common.quantize(common.build_model("resnet8", 10), 2, 2)
    optimizer = common.sgd(model, 0.1, 5e-4)  # built before calibration: the steps exist already
    common.calibrate(model, tiny_data.sample(8)[0])
    steps = {id(m.step) for m in model.modules() if isinstance(m, Quantizer)}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(steps) == 20 and all(decay[s] == 0 for s in steps)
    assert len(decay) == len(list(model.parameters()))
    assert {decay[id(p)] for p in model.parameters() if id(p) not in steps} == {5e-4}
    images, labels = tiny_data.sample(16)
    before = {k: v.clone() for k, v in model.named_parameters()}
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    assert all(not torch.equal(v, before[k]) for k, v in model.named_parameters())


@pytest.mark.parametrize("wbits", [2, 8])
def test_export_int_dequantizes_bit_equal_to_what_the_network_used(wbits, tiny_data):
    torch.manual_seed(0)
    model = common.quantize(common.build_model("resnet8", 10), wbits, 4)
    common.calibrate(model, tiny_data.sample(8)[0])
    nn.init.constant_(model.blocks[0].conv1.weight[1], 0.0)
    exported = common.export_int(model)
    layers = common.product_layers(model)
    assert exported.keys() == layers.keys()
    for name, (weight, scale, zero_point) in exported.items():
        assert weight.dtype == torch.int8
        assert weight.unique().numel() <= 2 ** layers[name].weight_quantizer.bits
        used = layers[name].weight_quantizer(layers[name].weight)
        assert torch.equal((weight - zero_point) * scale, used)


def test_one_bit_of_a_weight_is_minus_or_plus_half_a_step():
    q = Quantizer(1, channels=2)
    w = torch.tensor([[-2.0, -0.4, 0.1, 3.0], [0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    q.initialize(w.detach())
    assert q.step[1].item() == pytest.approx(1)
    with torch.no_grad():
        q.step.copy_(torch.tensor([1.0, 2.0]))
    out = q(w)
    assert out.tolist() == [[-0.5, -0.5, 0.5, 0.5], [1, -1, 1, -1]]
    out.backward(torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 2]]))
    assert w.grad.tolist() == [[0, 2, 3, 0], [1, 1, 1, 2]]  # straight through within the levels
    # d x_hat / ds = x_hat / s - x / s within, x_hat / s outside; scaled by 1 / sqrt(N q_max)
    first = 1 * -0.5 + 2 * (-0.5 + 0.4) + 3 * (0.5 - 0.1) + 4 * 0.5
    second = (0.5 - 0.25) * (1 - 1 + 1 - 2)
    torch.testing.assert_close(q.step.grad, torch.tensor([first, second]) / 2)


def test_one_bit_step_starts_at_twice_the_mean_magnitude_and_exports():
    torch.manual_seed(0)
    model = common.quantize(common.build_model("resnet8", 10), 1, 1)
    common.calibrate(model, torch.randn(8, 3, 32, 32))
    layer = model.blocks[0].conv2
    best = 2 * layer.weight.abs().mean((1, 2, 3))  # the least squared error of +-s/2
    torch.testing.assert_close(layer.weight_quantizer.step, best, rtol=0.05, atol=0)
    weight, scale, zero = common.export_int(model)["blocks.0.conv2"]
    assert weight.unique().numel() == 2
    assert torch.equal((weight - zero) * scale, layer.weight_quantizer(layer.weight))
    x = torch.linspace(-1, 3, 50)
    assert len(layer.input_quantizer(x).unique()) == 2 and (layer.input_quantizer(x) == 0).any()
