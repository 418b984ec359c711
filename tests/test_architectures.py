"""LSQ+ and PACT beside LSQ; every network; the matrix script x network x quantizer x bits."""

import functools
import importlib
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import common
from common import ClipQuantizer, OffsetQuantizer, TanhQuantizer

# ------------------------------------------------------------------------------------ LSQ+ and PACT


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_lsq_plus_value_and_gradients_match_the_closed_form():
    q, x, grad = OffsetQuantizer(2).double(), 2 * normal(200, dtype=torch.float64), normal(200)
    with torch.no_grad():
        q.step.fill_(0.7), q.offset.fill_(-0.4)
    x.requires_grad_()
    out = q(x)
    out.backward(grad.double())
    xn, g = x.detach().numpy(), grad.double().numpy()
    v = (xn + 0.4) / 0.7
    inside, n = (v > 0) & (v < 3), np.clip(np.round(v), 0, 3)
    scale = 1 / math.sqrt(200 * 3)
    np.testing.assert_allclose(out.detach().numpy(), n * 0.7 - 0.4, atol=1e-12)
    np.testing.assert_array_equal(x.grad.numpy(), g * inside)
    by_step = (g * np.where(inside, n - v, n)).sum() * scale
    assert q.step.grad.item() == pytest.approx(by_step)
    assert q.offset.grad.item() == pytest.approx((g * ~inside).sum() * scale)
    integers, step, zero = q.integers(x)
    np.testing.assert_array_equal(integers.detach().numpy(), n)
    torch.testing.assert_close((integers - zero) * step, out)
    gradient, q.step.grad = q.step.grad, None
    with torch.no_grad():
        q.step.neg_()  # a step pushed through 0 means the same and learns on
    assert torch.equal(q(x), out)
    q(x).backward(grad.double())
    assert torch.equal(q.step.grad, -gradient) and gradient != 0


def test_lsq_plus_weights_have_lsqs_gradient_on_a_signed_grid():
    q, w, grad = OffsetQuantizer(2, channels=3), 2 * normal(3, 40), normal(40)
    with torch.no_grad():
        q.step.copy_(torch.tensor([0.7, -0.5, 1.1]))
    w.requires_grad_()
    out = q(w)
    out.backward(grad.expand(3, 40))
    step = np.array([[0.7], [0.5], [1.1]])
    v, g = w.detach().numpy() / step, grad.numpy()
    inside, n = (v > -2) & (v < 1), np.clip(np.round(v), -2, 1)
    np.testing.assert_allclose(out.detach().numpy(), n * step, rtol=1e-5)
    np.testing.assert_array_equal(w.grad.numpy(), g * inside)
    by_step = (g * np.where(inside, n - v, n)).sum(1) / math.sqrt(40 * 1) * [1, -1, 1]
    np.testing.assert_allclose(q.step.grad.numpy(), by_step, rtol=1e-4)


def test_lsq_plus_starts_at_three_deviations_and_at_the_least_error():
    w, weights = torch.tensor([[0.3], [0], [-0.3]]) + normal(3, 50), OffsetQuantizer(4, channels=3)
    weights.initialize(w)
    mean, std = w.numpy().mean(1), w.numpy().std(1)
    expected = np.maximum(abs(mean - 3 * std), abs(mean + 3 * std)) / 8
    np.testing.assert_allclose(weights.step.detach().numpy(), expected, rtol=1e-5)
    assert weights.offset is None and (weights.qmin, weights.qmax) == (-8, 7)
    w[1] = 0  # a channel of zeros: the largest step of the others
    weights.initialize(w)
    assert weights.step[1].item() == pytest.approx(max(expected[0], expected[2]))
    weights.initialize(0 * w)
    assert weights.step.tolist() == [1, 1, 1]
    two = OffsetQuantizer(1)
    two.initialize(torch.tensor([0.3] * 70 + [1.0] * 30))
    assert two.step.item() == pytest.approx(0.7) and two.offset.item() == pytest.approx(0.3)
    levels = torch.tensor([0.3, 1.0, 1.7, 2.4]).repeat(9)  # no grid with a zero fits these
    q = OffsetQuantizer(2)
    q.initialize(levels)
    assert q.step.item() == pytest.approx(0.7) and q.offset.item() == pytest.approx(0.3, abs=1e-5)
    x = F.gelu(normal(3000))
    q.initialize(x)

    def error(step, offset):
        n = ((x - offset) / step).round().clamp(0, 3)
        return (n * step + offset - x).square().sum().item()

    step, offset = q.step.item(), q.offset.item()
    best = error(step, offset)
    plain = common.Quantizer(2)
    plain.initialize(x)
    assert best < (plain(x) - x).square().sum().item()
    assert all(error(step * a, offset + b) > 0.999 * best
               for a in (0.97, 1, 1.03) for b in (-0.02, 0, 0.02))


def test_pact_learns_its_clip_from_values_beyond_it_only():
    q, x = ClipQuantizer(2), torch.tensor([-1.0, 0.4, 1.3, 2.9, 3.0, 5.0], requires_grad=True)
    with torch.no_grad():
        q.alpha.fill_(3.0)
    out = q(x)
    assert out.tolist() == [0, 0, 1, 3, 3, 3] and q.step.item() == 1
    out.backward(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert q.alpha.grad.item() == 5 + 6
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]
    with torch.no_grad():
        q.alpha.neg_()  # a clip pushed through 0 lives on
    assert torch.equal(q(x), out)


def test_pact_keeps_negative_values_of_signed_inputs():
    q, x = ClipQuantizer(4), normal(1000)
    q.initialize(x)
    z, step = q.zero_point.item(), q.step.item()
    assert 5 < z < 11 and q(x).min().item() == pytest.approx(-z * step)
    (q(x) * (x < -z * step)).sum().backward()  # below: -z / (15 - z) of alpha
    assert q.alpha.grad.item() == pytest.approx(-z / (15 - z) * (x < -z * step).sum().item())
    positive = ClipQuantizer(4)
    positive.initialize(x.relu())
    assert positive.zero_point == 0
    negative = ClipQuantizer(4)
    negative.initialize(-x.abs())
    assert negative.zero_point == 14 and negative.alpha > 0  # 15 would leave nothing above 0


@pytest.mark.parametrize("bits", [2, 4])
def test_pact_weights_are_dorefas_at_the_scale_of_the_layer(bits):
    w, grad, top = normal(3, 40).double().requires_grad_(), normal(3, 40).double(), 2**bits - 1
    q = TanhQuantizer(bits, channels=3)
    out = q(w)
    out.backward(grad)
    wn = w.detach().numpy()
    m, t = abs(wn).max(1, keepdims=True), np.tanh(wn)
    share = t / abs(t).max(1, keepdims=True)
    n = np.round(top * (share / 2 + 0.5))
    np.testing.assert_allclose(out.detach().numpy(), m * (2 * n / top - 1), atol=1e-12)
    slope = m / abs(t).max(1, keepdims=True) * (1 - t**2)
    np.testing.assert_allclose(w.grad.numpy(), grad.numpy() * slope, rtol=1e-9)
    torch.testing.assert_close(out.abs().amax(1), w.abs().amax(1))  # theirs would be 1


def test_pact_one_bit_weight_is_the_sign_times_the_mean_magnitude():
    w = normal(3, 40)
    expected = w.sign() * w.abs().mean(1, keepdim=True)
    torch.testing.assert_close(TanhQuantizer(1, 3)(w), expected)


@pytest.mark.parametrize("x", [torch.zeros(4, 9), torch.full((4, 9), 3.0), torch.full((4, 9), -3.0),
                               torch.cat([torch.zeros(1, 9), normal(3, 9)])])
@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("method", ["lsq+", "pact"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_degenerate_inputs_stay_finite_with_every_quantizer(x, channels, method, bits):
    q, x = common.make_quantizer(method, bits, channels), x.clone().requires_grad_()
    q.initialize(x.detach())
    out = q(x)
    out.square().sum().backward()
    grads = [p.grad for p in q.parameters()]
    assert all(t.isfinite().all() for t in [out, x.grad, *grads])


@pytest.mark.parametrize("method", common.QUANTIZERS)
@pytest.mark.parametrize("wbits", [1, 2, 8])
def test_every_quantizer_trains_saves_and_exports(method, wbits, tiny_data):
    torch.manual_seed(0)
    model = common.quantize(common.build_model("resnet8", 10), wbits, 2, method)
    images, labels = tiny_data.sample(16)
    with pytest.raises(RuntimeError, match=r"call common\.calibrate"):
        model(images)
    optimizer = common.sgd(model, 0.1, 5e-4)
    common.calibrate(model, images)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert (decay[id(p)] == 0) == name.endswith((".step", ".offset"))
    before = {k: v.clone() for k, v in model.named_parameters()}
    F.cross_entropy(model.train()(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert all(not torch.equal(v, before[k]) for k, v in model.named_parameters()
               if not k.endswith((".step", ".offset")))
    again = common.quantize(common.build_model("resnet8", 10), wbits, 2, method)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))
    for name, (weight, scale, zero) in common.export_int(model).items():
        layer = model.get_submodule(name)
        assert weight.unique().numel() <= 2 ** layer.weight_quantizer.bits
        assert torch.equal((weight - zero) * scale, layer.weight_quantizer(layer.weight))


# ---------------------------------------------------------------------------------------- networks


def macs(model: nn.Module, size: int = 32) -> int:
    """Multiply-accumulates of all convolutions, linear layers and products for one image."""
    def count(layer, inputs, out):
        if isinstance(layer, common.Product):
            total.append(out.numel() * inputs[0].shape[-1])
            return
        positions = out[0, 0].numel() if isinstance(layer, nn.Conv2d) else out[0].numel() // len(
            layer.weight)
        total.append(layer.weight.numel() * positions)

    total = []
    hooks = [m.register_forward_hook(count) for m in model.modules()
             if isinstance(m, (nn.Conv2d, nn.Linear, common.Product))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(total)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


SIZES = {"resnet8": (78_042, 12_501_632), "resnet20": (272_474, 40_813_184),
         "resnet18": (11_173_962, 555_422_720), "resnet50": (23_520_842, 1_297_829_888),
         "mobilenet_v1": (3_217_226, 46_354_432), "mobilenet_v2": (2_236_682, 87_976_448),
         "vit_tiny": (1_803_466, 120_129_408)}


@pytest.mark.parametrize("name", common.MODELS)
def test_parameters_and_macs_are_those_of_the_readme(name):
    model = common.build_model(name, 10)
    assert (parameters(model), macs(model)) == SIZES[name]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert name == "vit_tiny" or norms == convs


def test_sizes_at_224_pixels_and_1000_classes_are_the_published_ones():
    mobile = common.mobilenet_v1(1000)
    mobile[0].stride = (2, 2)
    assert parameters(mobile) == pytest.approx(4.2e6, rel=0.01)  # Howard et al. 2017, table 4
    assert macs(mobile, 224) == pytest.approx(569e6, rel=0.001)
    models = common.import_torchvision().models
    for name, millions, giga in (("resnet18", 11.689512, 1.81), ("resnet50", 25.557032, 4.09),
                                 ("mobilenet_v2", 3.504872, 0.30)):  # torchvision's weights' pages
        model = getattr(models, name)()
        assert parameters(model) == 1e6 * millions
        assert macs(model, 224) / 1e9 == pytest.approx(giga, abs=0.01)


# -------------------------------------------------------------- quantize on other people's networks


class HeadFirst(nn.Module):
    """Its last layer is defined first, one layer is used twice, and one never."""

    def __init__(self):
        super().__init__()
        self.head, self.middle = nn.Linear(8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.again, self.unused = self.middle, nn.Linear(2, 2)
        self.stem, self.mixer = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        x = self.again(self.middle(self.stem(x)).relu()).relu()
        return self.head(self.mixer(x.flatten(2)).mean(2))


def test_first_and_last_layer_are_those_of_the_datas_way():
    with pytest.warns(UserWarning, match=r"precision: unused \(Linear\), mixer \(Conv1d\)"):
        model = common.quantize(HeadFirst(), 2, 3)
    bits = {name: layer.weight_quantizer.bits for name, layer in common.product_layers(
        model).items() if name != "unused"}
    assert bits == {"head": 8, "middle": 2, "stem": 8}
    assert model.again is model.middle and isinstance(model.unused, nn.Linear)
    assert common.export_int(model).keys() == bits.keys()


def test_a_weight_computed_from_others_is_left_and_a_single_layer_is_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 3, 32, 32))
    nn.utils.parametrizations.weight_norm(model[1])
    model[2].initialize = lambda *_: pytest.fail("of the user's own, not a quantizer's")
    with pytest.warns(UserWarning, match=r"full precision: 1 \(ParametrizedConv2d\)$"):
        quantized = common.quantize(model, 2, 2)
    common.calibrate(quantized, normal(4, 3, 32, 32))
    assert isinstance(quantized[0], common.QuantConv2d) and len(quantized.state_dict()) == 15
    single = common.quantize(nn.Linear(4, 2), 2, 2, example=torch.zeros(1, 4))
    common.calibrate(single, normal(8, 4))
    assert single(normal(8, 4)).shape == (8, 2) and single.weight_quantizer.bits == 8


def test_inputs_of_another_shape_need_an_example():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="give `example`"):
        common.quantize(model, 2, 2)
    quantized = common.quantize(model, 2, 2, example=torch.zeros(1, 4))
    assert [m.weight_quantizer.bits for m in common.product_layers(quantized).values()] == [8, 2, 8]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_torchvision_networks_of_none_of_our_names(name):
    torch.manual_seed(0)
    model = common.quantize(getattr(common.import_torchvision().models, name)(num_classes=5), 4, 4)
    images = normal(4, 3, 64, 64)
    common.calibrate(model, images)
    kinds = {type(m) for m in model.modules()}
    assert common.QuantConv2d in kinds and not {nn.Conv2d, nn.Linear} & kinds
    F.cross_entropy(model.train()(images), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_attention_that_bypasses_its_layers_is_named():
    model = common.import_torchvision().models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5)
    with pytest.warns(UserWarning, match=r"self_attention \(MultiheadAttention\)"):
        quantized = common.quantize(model, 4, 4)
    common.calibrate(quantized, normal(2, 3, 32, 32))
    assert quantized(normal(2, 3, 32, 32)).isfinite().all()


# --------------------------------------------------------------------------------------- the matrix


SCRIPTS = ["fpq", "cr_qat", "mec_quant", "flat_quant"]
BITS = [(4, 4), (2, 4), (2, 2)]
FEW = {("fpq", "mobilenet_v1", "lsq", 2, 4), ("fpq", "resnet8", "pact", 2, 2),
       ("cr_qat", "resnet8", "lsq+", 2, 4), ("mec_quant", "resnet8", "lsq+", 2, 2),
       ("mec_quant", "vit_tiny", "pact", 4, 4), ("flat_quant", "resnet8", "lsq+", 2, 4)}
MATRIX = [pytest.param(*case, marks=[] if case in FEW else pytest.mark.matrix)
          for case in ((s, m, q, *b) for s, m, q, b in itertools.product(
              SCRIPTS, common.MODELS, common.QUANTIZERS, BITS))]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")  # where full precision is trained once per network


@pytest.mark.parametrize("script,model,quantizer,wbits,abits", MATRIX)
def test_matrix_runs(script, model, quantizer, wbits, abits, shared, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        f"{script}.py", "--dataset", "shapes", "--dry-run", "--out", str(shared), "--depth", "2",
        "--train-size", "20", "--batch-size", "10", "--model", model, "--quantizer", quantizer,
        "--wbits", str(wbits), "--abits", str(abits)])
    monkeypatch.setattr(common.calibrate.__wrapped__, "__defaults__", (10, True))  # of 100
    monkeypatch.setattr("flat_quant.CANDIDATES", {"mse": 10, "minmax": 1})
    # What full precision's flatness is has tests of its own and nothing to do with quantizers.
    monkeypatch.setattr("flat_quant.sharpness", lambda *_: (1.0, 0.1, 1.0))
    monkeypatch.setattr("flat_quant.loss_under_noise", lambda *_: 1.0)
    importlib.import_module(script).main()
    shown = capsys.readouterr().out
    assert "nan" not in shown and "test acc" in shown


@pytest.fixture(scope="module")
def learned(tiny_data):
    """learned(name) -> (full precision that has learned one batch, its images, its labels). Each
    class has two images, so that no loss below log 10 comes without looking at them."""
    @functools.cache
    def learn(name):
        torch.manual_seed(0)
        at = torch.cat([(tiny_data.train_labels == c).nonzero()[:2, 0] for c in range(10)])
        images = tiny_data.augment(at, torch.full((2, 20), common.PAD), torch.zeros(20) > 0)
        labels, model = tiny_data.train_labels[at], common.build_model(name, 10, depth=1)
        args = SimpleNamespace(model=name, batch_size=20)
        train(model, images, labels, *common.fp_optimizer(args, tiny_data, model), steps=30)
        update_bn([images], model)
        return model, images, labels
    return learn


def train(model, images, labels, optimizer, lr, steps):
    """The losses of `steps` steps on one batch and after them."""
    losses = []
    for step in range(steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = common.cosine_lr(step, steps, lr, 0.1)
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
@pytest.mark.parametrize("model,wbits,abits", [
    pytest.param(model, *bits, marks=[] if model in ("resnet8", "vit_tiny") and bits == (2, 2)
                 else pytest.mark.matrix)
    for model, bits in itertools.product(common.MODELS, BITS)])
def test_loss_falls_on_one_batch(model, quantizer, wbits, abits, learned):
    network, images, labels = learned(model)
    student = common.quantize(network, wbits, abits, quantizer)
    common.calibrate(student, images, candidates=20)
    losses = train(student, images, labels, common.sgd(student, 0.02, 0), 0.02, steps=20)
    assert losses[-1] < 0.9 * min(losses[0], math.log(10))
