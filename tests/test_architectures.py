"""Quantized layers and networks, and the matrix script x network x quantizer x bits."""

import copy
import itertools
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrizations import orthogonal

import common
import fpq
from common import Product, Quantizer, QuantLayer, build_model, calibrate, quantize, weight_layers
from conftest import SHAPES, close, normal, same, tiny_network


def train(model, images, labels, optimizer, steps):
    """The losses before each of `steps` steps on one batch."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
@pytest.mark.parametrize("kind", [
    partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1, groups=2),
    partial(nn.Conv2d, 4, 6, 3, dilation=2),
    partial(nn.Linear, 7, 5),
])
@torch.no_grad()
def test_a_quantized_layer_stands_for_a_layer_of_integers(kind, quantizer):
    """Eq. 3 in both factors: sum x_hat w_hat = s_x s_w sum (n_x - z_x) (n_w - z_w).

    The offset beta of LSQ+ adds beta s_w sum (n_w - z_w).
    """
    torch.manual_seed(0)
    plain = kind()
    x = normal(2, 4, 7, 7)
    beta = torch.tensor(0.0)
    layer = QuantLayer(plain, 3, 3, quantizer)
    layer.input_quantizer.initialize(x)
    layer.weight_quantizer.initialize(plain.weight)
    if quantizer == "lsq+":
        beta = layer.input_quantizer.offset.fill_(0.15)
    out = layer(x)

    def integers(quantizer, values):
        s, z = quantizer.grid(values)
        return (values / s).round().clamp(-z, quantizer.qmax - z), s

    n_x, s_x = integers(layer.input_quantizer, x - beta)
    n_w, s_w = integers(layer.weight_quantizer, plain.weight)
    s_w = s_w[..., 0]
    bias = plain.bias.clone().reshape(s_w.shape)
    plain.weight.copy_(n_w)
    plain.bias.zero_()
    sums = s_x * plain(n_x) + beta * plain(torch.ones_like(x))
    close(out, s_w * sums + bias)


def test_requires_grad_neither_frees_nor_freezes_a_step_size():
    """At 8 bits it is a buffer, else a parameter, whatever the network's parameters require."""
    model = quantize(three_layers().requires_grad_(False), 2, 3)
    steps = ["1.input_quantizer.step_size", "1.weight_quantizer.step_size"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == steps
    model.requires_grad_(True)
    assert [name for name, _ in model.named_parameters() if "quantizer" in name] == steps


@pytest.mark.parametrize("name,products,left", [
    ("resnet8", 0, []),
    ("vit_tiny", 2, ["left in full precision: class_token, encoder.pos_embedding"]),
])
def test_quantize_copies_and_quantizes_both_factors(name, products, left, recwarn):
    model = build_model(name, 10, depth=1)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize(model, 2, 3, "pact")
    calibrate(quantized, normal(4, 3, 32, 32))
    assert [str(w.message) for w in recwarn] == left
    bits = {Quantizer: [], common.PACT: []}
    for quantizer in common.quantizers_of(quantized).values():
        bits[type(quantizer)].append(quantizer.bits)
    inner = len(weight_layers(model)) - 2
    assert sorted(bits[Quantizer]) == [2] * inner + [8, 8]
    assert sorted(bits[common.PACT]) == [3] * (inner + 2 * products) + [8, 8]
    for p in quantized.parameters():
        nn.init.zeros_(p)
    same(model.state_dict(), before)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_calibration_is_layer_after_layer_and_leaves_no_trace(batch_stats, tiny_data, calibrated):
    """A layer's range is that of its inputs from quantized layers, with batch norm as said."""
    images = 3 * tiny_data.sample(16)[0]
    before = dict(copy.deepcopy(calibrated).named_buffers())
    calibrate(calibrated, images, batch_stats=batch_stats)
    assert calibrated.training
    for name, value in calibrated.named_buffers():
        assert "quantizer" in name or torch.equal(value, before[name])
    fresh = Quantizer(2)
    quantizer = calibrated[2].conv2.input_quantizer
    quantizer.register_forward_pre_hook(lambda q, inputs: fresh.initialize(inputs[0]))
    calibrated.train(batch_stats)(images)
    same(fresh.step_size, quantizer.step_size)


@pytest.mark.parametrize("scales", [(46.7, 0.002), (0.002, 46.7)])
def test_calibration_of_a_layer_that_is_called_twice_fits_both_calls(scales):
    class Twice(nn.Sequential):
        def forward(self, x):
            return sum(self[0](scale * x) for scale in scales)

    x = normal(64, 8)
    x /= x.abs().max()
    model = quantize(Twice(nn.Linear(8, 3)), 2, 2)
    calibrate(model, x)
    both = torch.cat([scale * x for scale in scales])
    error = model[0].input_quantizer(both) - both
    assert error.square().mean() < 1e-3 * both.var()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_names_the_layer_that_meets_values_that_are_not_finite(value):
    model = quantize(tiny_network(), 2, 2)
    images = normal(2, 3, 32, 32)
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"0\.0\.input_quantizer meets .* not finite"):
        calibrate(model, images)
    nn.init.constant_(model[1][0].weight, value)
    with pytest.raises(ValueError, match=r"1\.0\.weight_quantizer meets .* not finite"):
        calibrate(model, normal(2, 3, 32, 32))


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
def test_a_state_copied_in_place_is_all_that_calibration_found(quantizer):
    x = normal(64, 8)
    model = quantize(three_layers(), 3, 3, quantizer)
    other = copy.deepcopy(model)
    calibrate(model, x)
    x = 3 * x + 1
    calibrate(other, x)
    assert not torch.equal(model(x), other(x))
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values()):
        mine.copy_(theirs)
    same(model(x), other(x))


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
def test_an_empty_batch_passes_forward_and_backward(quantizer):
    model = quantize(tiny_network(), 2, 2, quantizer)
    calibrate(model, normal(8, 3, 32, 32))
    model(torch.zeros(0, 3, 32, 32)).sum().backward()


def test_a_weight_channel_of_zeros_learns():
    model = three_layers()
    nn.init.zeros_(model[1].weight[2])
    model = quantize(model, 2, 2)
    x = normal(32, 8)
    calibrate(model, x)
    train(model, x, x.argmax(1), common.sgd(model, 0.02, 0), 30)
    assert model[1].weight[2].all()


@pytest.mark.parametrize("quantizer", common.QUANTIZERS)
@pytest.mark.parametrize("wbits", [2, 8])
def test_every_quantizer_trains_saves_and_exports(quantizer, wbits, tiny_data):
    model = quantize(tiny_network(), wbits, 2, quantizer)
    images, labels = tiny_data.sample(16)
    with pytest.raises(RuntimeError, match=r"call common\.calibrate"):
        model(images)
    optimizer = common.sgd(model, 0.1, 5e-4)  # before calibration: the step sizes exist already
    calibrate(model, images)
    train(model, images, labels, optimizer, 1)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        free = "weight_quantizer" in name or "quantizer" in name and quantizer != "pact"
        assert decays.pop(p) == (0 if free else 5e-4), name
        assert p.grad.any(), name
    assert not decays
    again = quantize(tiny_network(), wbits, 2, quantizer)
    again.load_state_dict(model.state_dict())
    same(again.eval()(images), model.eval()(images))
    exported = common.export_int(model)
    assert exported.keys() == weight_layers(model).keys()
    for name, (weight, scale, zero) in exported.items():
        layer = model.get_submodule(name)
        assert weight.dtype == torch.int8
        same((weight - zero) * scale, layer.weight_quantizer(layer.weight))


@torch.no_grad()
def sizes(model, size=32):
    """Parameters, and multiply-accumulates of layers and products for an image of size x size."""
    macs = []

    def count(layer, inputs, out):
        if isinstance(layer, Product):
            macs.append(out.numel() * inputs[0].shape[-1])
        else:
            macs.append(layer.weight.numel() * out.numel() // len(layer.weight))

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, Product))]
    with common.hooked(layers, after=count):
        model.eval()(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), sum(macs)


@pytest.mark.parametrize("name,stem,expected", [
    ("resnet8", "cifar", (78_042, 12_501_632)),
    ("resnet20", "cifar", (272_474, 40_813_184)),
    ("resnet18", "cifar", (11_173_962, 555_422_720)),
    ("resnet18", "imagenet", (11_181_642, 37_016_576)),
    ("resnet50", "cifar", (23_520_842, 1_297_829_888)),
    ("resnet50", "imagenet", (23_528_522, 83_431_424)),
    ("mobilenet_v1", "cifar", (3_217_226, 46_354_432)),
    ("mobilenet_v1", "imagenet", (3_217_226, 11_596_288)),
    ("mobilenet_v2", "cifar", (2_236_682, 87_976_448)),
    ("mobilenet_v2", "imagenet", (2_236_682, 6_124_928)),
    ("vit_tiny", "cifar", (1_803_850, 122_097_024)),
])
def test_parameters_and_macs_are_known(name, stem, expected):
    model = build_model(name, 10, stem=stem)
    assert sizes(model) == expected
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    if name == "resnet18":  # with "imagenet" it starts as torchvision has it
        assert model.layer1[0].bn2.weight.any() == (stem == "imagenet")


def test_sizes_of_mobilenet_v1_at_224_pixels_are_the_published_ones():
    model = common.mobilenet_v1(1000, "imagenet")
    assert sizes(model, 224) == pytest.approx((4.2e6, 569e6), rel=0.01)  # Howard et al., table 4


def test_the_attention_of_vit_tiny_is_torchs():
    mine = common.Attention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.state_dict().values())))
    x = normal(2, 5, 12)
    close(mine(x, x, x, need_weights=False)[0], theirs(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:left in full precision")
def test_torchs_own_transformer_is_quantized_in_evaluation_too():
    """There its fast path would take the weights as they are, without gradients only."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 1), nn.Linear(16, 3))
    x = normal(4, 5, 8)
    try:
        model = quantize(network, 2, 2)
        calibrate(model, x)
        model.eval()
        with torch.no_grad():
            evaluated = model(x)
        same(evaluated, model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_first_and_last_layer_are_by_definition_and_what_is_left_is_named():
    """The head is defined first, and one layer has two names."""
    network = nn.Module()
    network.head = nn.Linear(8, 3)
    network.middle = nn.Conv2d(8, 8, 3)
    network.again = network.middle
    network.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    network.mixer = nn.Conv1d(8, 8, 1)
    network.attention = nn.MultiheadAttention(8, 2)
    network.kernel = nn.Parameter(normal(8, 8, 3, 3))  # for F.conv2d(x, self.kernel)
    network.stem = nn.Conv2d(3, 8, 3)
    left = ["kernel", "mirror.weight", "mixer.weight", "attention.in_proj_weight",
            "attention.out_proj.weight"]
    with pytest.warns(match=f"^left in full precision: {', '.join(left)}$"):
        model = quantize(network, 2, 3)
    bits = [q.bits for q in common.quantizers_of(model).values()]
    assert bits == [8, 8, 3, 2, 8, 8]  # of the inputs and weights of head, middle and stem
    assert model.again is model.middle


def test_a_network_may_be_a_single_layer():
    assert quantize(nn.Linear(4, 4), 2, 2).weight_quantizer.bits == 8


class Listed(nn.Module):
    """It calls its layers by a plain list, which `quantize` cannot see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = three_layers()
        self.blocks = [self.a, self.b, self.c]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_of_a_plain_list_stay_in_full_precision_and_are_named():
    plain = Listed()
    model = quantize(plain, 2, 2)
    x = normal(4, 8)
    names = "a.input_quantizer, a.weight_quantizer, b.*, b.*, c.input_quantizer, c.weight_quantizer"
    with pytest.warns(match=f"never reached these, which stay in full precision: {names}$"):
        calibrate(model, x)
    assert common.export_int(model) == {}
    same(model(x), plain(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm
@pytest.mark.parametrize("compute,left", [
    (weight_norm, "1.weight_g, 1.weight_v"),
    (spectral_norm, "1.weight_orig"),
    (partial(prune.l1_unstructured, name="weight", amount=0.5), "1.weight_orig"),
    (orthogonal, "1.parametrizations.weight.original"),
])
def test_a_weight_computed_in_each_pass_stays_in_full_precision(compute, left):
    model = three_layers()
    compute(model[1])
    x = normal(16, 8)
    with torch.no_grad():
        model(x)
    with pytest.warns(match=f"^left in full precision: {left}$"):
        model = quantize(model, 2, 2)
    calibrate(model, x)
    assert common.export_int(model).keys() == {"0", "2"}
    with fpq.perturbed(model, 1.0):  # no noise there either
        model(x)


def test_a_network_that_keeps_a_result_is_told_what_to_do():
    model = three_layers()
    model.feat = model(normal(4, 8))
    with pytest.raises(RuntimeError, match=r"run it once under torch\.no_grad\(\) before quantize"):
        quantize(model, 2, 2)


BITS = [(4, 4), (2, 4), (2, 2)]
FEW = [("fpq", "resnet8", "pact", (2, 2)), ("cr_qat", "resnet8", "lsq+", (2, 4)),
       ("mec_quant", "vit_tiny", "pact", (4, 4)), ("flat_quant", "resnet8", "lsq+", (2, 4))]


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
    wbits, abits = bits
    done = run(script, SHAPES, "--depth 1 --train-size 20 --model", model, "--quantizer", quantizer,
               f"--wbits {wbits} --abits {abits} --out", shared)
    assert done.code == 0, done.err
    assert "nan" not in done.out
    assert "test loss" in done.out


@pytest.mark.parametrize("model,quantizer,bits", cases(
    lambda case: case[::2] == ("resnet8", (2, 2)), common.MODELS, common.QUANTIZERS, BITS))
def test_loss_falls_on_one_batch(model, quantizer, bits, tiny_data):
    """After full precision has learned it. The entropy of the 20 labels is 2.0."""
    images, labels = tiny_data.sample(20)
    fp_lr = 0.2 if model == "vit_tiny" else 0.05
    flags = Namespace(model=model, depth=1, stem="cifar", fp_lr=fp_lr, fp_weight_decay=0)
    network, optimizer = common.new_network(flags, tiny_data, 0, "cpu")
    train(network, images, labels, optimizer, 15)
    student = quantize(network, *bits, quantizer)
    calibrate(student, images, candidates=20)
    optimizer = common.sgd(student, 0.02, 0)
    losses = train(student, images, labels, optimizer, 30)
    assert losses[-1] < 0.8 * min(losses[0], 2.0)


def test_a_quantized_network_is_not_quantized_again(calibrated):
    with pytest.raises(ValueError, match="quantized already"):
        quantize(calibrated, 4, 4)
