"""Quantized layers and networks, and the matrix script x network x quantizer x bits."""

import copy
import itertools
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
import fpq
from common import Quantizer, QuantLayer, build_model, calibrate, hooked, quantize, weight_layers
from conftest import SHAPES, close, normal


def train(model, images, labels, optimizer, steps):
    """The losses before each of `steps` steps on one batch."""
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("wbits", [1, 3])
@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
@pytest.mark.parametrize("kind", [
    partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1, groups=2),
    partial(nn.Conv2d, 4, 6, 3, dilation=2), partial(nn.Linear, 7, 5)],
    ids=["grouped", "dilated", "linear"])
def test_a_quantized_layer_stands_for_a_layer_of_integers(kind, quantizer, wbits):
    """Eq. 3 in both factors: sum x_hat w_hat = s_x s_w sum (n_x - z_x) (n_w - z_w); the offset beta
    of LSQ+ adds the constant beta sum w_hat. One-bit weights have z = 1/2, so all are doubled."""
    def computed(x, weight, bias):
        return torch.func.functional_call(plain, {"weight": weight, "bias": bias}, x)
    torch.manual_seed(0)
    plain, x, beta = kind(), normal(2, 4, 7, 7), torch.tensor(0.0)
    layer = QuantLayer(plain, wbits, 3, quantizer).requires_grad_(False)
    layer.input_quantizer.initialize(x)
    layer.weight_quantizer.initialize(plain.weight)
    if quantizer == "lsq+":
        beta = nn.init.constant_(layer.input_quantizer.offset, 0.15)
    n_x, s_x, z_x = layer.input_quantizer.integers(x - beta)
    n_w, s_w, z_w = layer.weight_quantizer.integers(plain.weight)
    whole = n_x - z_x, 2 * (n_w - z_w)
    assert all(torch.equal(t, t.round()) and len(t.unique()) > 1 for t in whole)
    sums = computed(*(t.long() for t in whole), torch.zeros(len(n_w)).long())
    constant = computed(beta.expand_as(x), (n_w - z_w) * s_w, plain.bias)
    close(layer(x), sums * (s_x * s_w[..., 0] / 2) + constant)


def test_8_bit_step_sizes_stay_and_so_do_the_levels_in_use(tiny_data):
    """LSQ would make them grow until few of the 256 levels are used."""
    def integers():
        found = [m.weight_quantizer.integers(m.weight) for m in weight_layers(model).values()]
        return [(n.unique(), s.clone()) for n, s, z in found]
    torch.manual_seed(0)
    images, labels = tiny_data.sample(64)
    model = quantize(nn.Sequential(nn.Conv2d(3, 32, 5, 4), nn.ReLU(), nn.Flatten(),
                                   nn.Linear(32 * 49, 10)), 2, 2)
    calibrate(model, images)
    calibrated = integers()
    train(model, images, labels, common.sgd(model, 0.2, 0), 6)
    for (before, s), (after, t) in zip(calibrated, integers()):
        assert torch.equal(s, t) and len(before) > 200
        assert torch.isin(before, after).float().mean() >= 0.9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_quantize_copies_and_keeps_first_and_last_layer_at_8_bits(name):
    model = build_model(name, 10, depth=1)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize(model, 2, 3, "pact")
    layers = list(weight_layers(quantized).values())
    bits = [(m.weight_quantizer.bits, m.input_quantizer.bits) for m in layers]
    assert bits == [(8, 8)] + [(2, 3)] * (len(layers) - 2) + [(8, 8)]
    assert {type(m.weight_quantizer) for m in layers} == {Quantizer}
    factors = [(type(q), q.bits) for m in quantized.modules() if isinstance(m, common.Product)
               for q in m.children()]
    assert factors == [(common.PACT, 3)] * 4 * (name == "vit_tiny")
    for p in quantized.parameters():
        nn.init.zeros_(p)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch_stats", [True, False])
def test_calibration_is_layer_after_layer_and_leaves_no_trace(batch_stats, tiny_data, calibrated):
    images = 3 * tiny_data.sample(16)[0]
    before = {k: v.clone() for k, v in calibrated.state_dict().items()}
    calibrate(calibrated, images, batch_stats=batch_stats)
    assert calibrated.training
    assert all(torch.equal(v, before[k]) for k, v in calibrated.state_dict().items()
               if "running" in k or "tracked" in k)
    # A later layer's step size is the one that the quantized, not the float, layers before it ask,
    # and their batch norm as it is in training, or in evaluation.
    fresh, quantizer = Quantizer(2), calibrated[2].conv2.input_quantizer
    with hooked([quantizer], before=lambda q, inputs: fresh.initialize(inputs[0])):
        calibrated.train(batch_stats)(images)
    assert torch.equal(fresh.step_size, quantizer.step_size)


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
@pytest.mark.parametrize("wbits", [1, 2, 8])
def test_every_quantizer_trains_saves_and_exports(quantizer, wbits, tiny_data):
    torch.manual_seed(0)
    model = quantize(build_model("resnet8", 10), wbits, 2, quantizer)
    images, labels = tiny_data.sample(16)
    with pytest.raises(RuntimeError, match=r"call common\.calibrate"):
        model(images)
    optimizer = common.sgd(model, 0.1, 5e-4)  # before calibration: the step sizes exist already
    calibrate(model, images)
    nn.init.zeros_(model[2].conv1.weight[1])
    free = {p for m in model.modules() if isinstance(m, Quantizer) and type(m) is not common.PACT
            for p in m.parameters()}
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {p: 0 if p in free else 5e-4 for p in model.parameters()}
    train(model, images, labels, optimizer, 1)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None and p.grad.any()), name
    again = quantize(build_model("resnet8", 10), wbits, 2, quantizer)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))
    exported = common.export_int(model)
    assert exported.keys() == weight_layers(model).keys()
    for name, (weight, scale, zero) in exported.items():
        layer = model.get_submodule(name)
        assert weight.dtype == torch.int8
        assert torch.equal((weight - zero) * scale, layer.weight_quantizer(layer.weight))


@torch.no_grad()
def sizes(model, size=32):
    """Parameters, and multiply-accumulates of layers and products for an image of size x size."""
    def count(layer, inputs, out):
        if isinstance(layer, common.Product):
            macs.append(out.numel() * inputs[0].shape[-1])
        else:
            macs.append(layer.weight.numel() * out.numel() // len(layer.weight))
    macs, kinds = [], (nn.Conv2d, nn.Linear, common.Product)
    with hooked([m for m in model.modules() if isinstance(m, kinds)], after=count):
        model.eval()(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), sum(macs)


@pytest.mark.parametrize("name,cifar,imagenet", [
    ("resnet8", (78_042, 12_501_632), None), ("resnet20", (272_474, 40_813_184), None),
    ("resnet18", (11_173_962, 555_422_720), (11_181_642, 37_016_576)),
    ("resnet50", (23_520_842, 1_297_829_888), (23_528_522, 83_431_424)),
    ("mobilenet_v1", (3_217_226, 46_354_432), (3_217_226, 11_596_288)),
    ("mobilenet_v2", (2_236_682, 87_976_448), (2_236_682, 6_124_928)),
    ("vit_tiny", (1_803_850, 122_097_024), None)])
def test_parameters_and_macs_are_known(name, cifar, imagenet):
    for stem, expected in ("cifar", cifar), ("imagenet", imagenet or cifar):
        model = build_model(name, 10, stem=stem)
        assert sizes(model) == expected
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        if name == "resnet18":  # with "imagenet" it starts as torchvision has it
            assert model.layer1[0].bn2.weight.any() == (stem == "imagenet")


def test_sizes_of_mobilenet_v1_at_224_pixels_are_the_published_ones():
    model = common.mobilenet_v1(1000, "imagenet")
    assert sizes(model, 224) == pytest.approx((4.2e6, 569e6), rel=0.01)  # Howard et al., table 4


def test_the_attention_of_vit_tiny_is_torchs():
    mine, x = common.Attention(12, 3), normal(2, 5, 12)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.state_dict().values())))
    close(mine(x, x, x, need_weights=False)[0], theirs(x, x, x)[0])


class HeadFirst(nn.Module):
    """Its last layer is defined first, its middle last; one layer is used twice, and one never."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = nn.Linear(8, 3), nn.Conv2d(3, 8, 3)
        self.unused, self.mixer = nn.Linear(2, 2), nn.Conv1d(8, 8, 1)
        self.middle = self.again = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.again(self.middle(self.stem(x)).relu()).relu()
        return self.head(self.mixer(x.flatten(2)).mean(2))


def test_first_and_last_layer_are_those_of_the_datas_way():
    with pytest.warns(UserWarning, match=r"precision: unused \(Linear\), mixer \(Conv1d\)$"):
        model = quantize(HeadFirst(), 2, 3)
    bits = {name: layer.weight_quantizer.bits for name, layer in weight_layers(model).items()
            if name != "unused"}
    assert bits == {"head": 8, "middle": 2, "stem": 8}
    assert model.again is model.middle
    assert common.export_int(model).keys() == bits.keys()


@pytest.mark.parametrize("network,left", [
    (lambda: nn.Sequential(  # a computed weight, and a padding that is not zeros
        nn.Conv2d(3, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(6272, 3)),
     r"1 \(ParametrizedConv2d\), 2 \(Conv2d\)$"),
    (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5),
     r"\.self_attention \(MultiheadAttention\)")])
def test_what_stays_in_full_precision_is_named(network, left):
    with pytest.warns(match="^left in full precision: .*" + left):
        quantized = quantize(network(), 2, 2)
    images = normal(4, 3, 32, 32)
    calibrate(quantized, images)
    with fpq.perturbed(quantized, 1.0, "operand"):  # no noise there either
        assert quantized(images).isfinite().all()


def test_inputs_of_another_shape_need_an_example_and_a_single_layer_may_be_the_network():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in "abc"))
    for network, expected in ((model, [8, 2, 8]), (model[0], [8])):
        quantized = quantize(network, 2, 2, example=torch.zeros(1, 4))
        assert [m.weight_quantizer.bits for m in weight_layers(quantized).values()] == expected


BITS = [(4, 4), (2, 4), (2, 2)]
FEW = {("fpq", "resnet8", "pact", (2, 2)), ("cr_qat", "resnet8", "lsq+", (2, 4)),
       ("mec_quant", "vit_tiny", "pact", (4, 4)), ("flat_quant", "resnet8", "lsq+", (2, 4))}


def cases(usual, *axes):
    """All of the product of `axes`; behind the marker `matrix` but for the usual ones."""
    return [pytest.param(*case, marks=[] if usual(case) else pytest.mark.matrix)
            for case in itertools.product(*axes)]


@pytest.mark.parametrize("script,model,quantizer,bits", cases(
    FEW.__contains__, ["fpq", "cr_qat", "mec_quant", "flat_quant"], common.MODELS,
    common.QUANTIZERS, BITS))
def test_matrix_runs(script, model, quantizer, bits, run, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(calibrate.__wrapped__, "__defaults__", (10, True))  # of 100 candidates
    shared = tmp_path_factory.getbasetemp()  # where full precision is trained once per network
    done = run(script, SHAPES, "--depth 1 --train-size 20 --model", model, "--quantizer", quantizer,
               f"--wbits {bits[0]} --abits {bits[1]} --out", shared)
    assert done.code == 0 and "nan" not in done.out and "test loss" in done.out, done.err


@pytest.mark.parametrize("model,quantizer,bits", cases(
    lambda case: case[::2] == ("resnet8", (2, 2)), common.MODELS, common.QUANTIZERS, BITS))
def test_loss_falls_on_one_batch(model, quantizer, bits, tiny_data):
    """After full precision has learned it. The entropy of the 20 labels is 2.0."""
    torch.manual_seed(0)
    images, labels = tiny_data.sample(20)
    network = build_model(model, 10, depth=1)
    args = Namespace(model=model, fp_lr=0.2 if model == "vit_tiny" else 0.05, fp_weight_decay=0)
    train(network, images, labels, common.fp_optimizer(args, network), 15)
    student = quantize(network, *bits, quantizer)
    calibrate(student, images, candidates=20)
    losses = train(student, images, labels, common.sgd(student, 0.02, 0), 30)
    assert losses[-1] < 0.8 * min(losses[0], 2.0)
