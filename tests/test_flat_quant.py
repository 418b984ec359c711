"""DNQ: the errors and their statistics, the noises, training by hand, averaging, PTQ."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import flat_quant
from conftest import SHAPES, close, normal, same
from flat_quant import (
    ActivationNoise,
    DifferentialWeightNoise,
    IsotropicWeightNoise,
    quantization_error,
)


@pytest.fixture
def network():
    torch.manual_seed(common.hashed("weights", 0))  # as the network that `train` begins with
    model = common.build_model("resnet8", 10)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def train(parse, tiny_data):
    """train(method, flags, epochs) -> what flat_quant.train returns; two steps an epoch."""
    def trained(method, flags="", epochs=1):
        args = parse("flat_quant", "--ramp-epochs 0", flags)
        args.fp_epochs = epochs
        return flat_quant.train(args, tiny_data, method, 0)
    return trained


def test_decomposition_is_that_of_the_measured_error():
    """||W_hat x_hat - W x||^2 = AQE + WQE + cross, AQE = ||W dx||^2, WQE = ||dW x||^2."""
    layer = common.QuantLayer(nn.Conv2d(3, 4, 3, padding=1, bias=False), 2, 3).double()
    x = normal(5, 3, 8, 8).double()
    common.calibrate(layer, x)
    w = layer.weight
    w_hat = layer.weight_quantizer(w)
    x_hat = layer.input_quantizer(x)
    clean = layer.product(x, w)
    shares = []
    for z in (layer.product(x_hat, w), layer.product(x, w_hat), layer(x)):
        share = (z - clean).norm() / clean.norm()
        shares.append(share.item() ** 2)
    aqe, wqe, total = shares
    cross = total - aqe - wqe
    expected = {"AQE": aqe, "WQE": wqe, "cross": cross, "total": total}
    assert flat_quant.error_decomposition(layer, x) == pytest.approx(expected)


def test_kurtosis_of_known_numbers():
    for sample, kurtosis in (
            (torch.linspace(2, 5, 10_000), -1.2),
            (torch.tensor([0.0, 1]), -2)):
        channels = torch.stack([sample, 9 * sample + 1])  # of any mean and variance
        assert flat_quant.excess_kurtosis(channels) == pytest.approx(kurtosis, abs=1e-3)


def test_weight_noise_has_the_statistics_of_dW_by_channel(network):
    """Isotropic: 0 and the root mean square over all."""
    noise = DifferentialWeightNoise(network, 3)
    isotropic = IsotropicWeightNoise(network, 3)
    noise.measure()
    isotropic.measure()
    errors = []
    all_bits = [8, *[3] * 8, 8]
    for w, bits in zip(noise.bits, all_bits, strict=True):
        error = quantization_error(w, common.Quantizer(bits, len(w)))
        error = error.detach().flatten(1)
        errors.append(error.flatten())
        mean, std = noise.statistics[w]
        close(mean.flatten(), error.mean(1))
        close(std.flatten(), error.std(1, correction=0))
        mean, std = isotropic.statistics[w]
        assert mean == 0
    close(std, torch.cat(errors).square().mean().sqrt())


def test_weight_noise_is_added_once_to_a_weight_that_two_layers_share_and_removed():
    model = nn.Sequential(nn.Linear(90, 90), nn.ReLU(), nn.Linear(90, 90))
    model[2].weight = model[0].weight
    w = model[0].weight
    clean = w.detach().clone()
    noise = DifferentialWeightNoise(model, 3)
    noise.statistics = {shared: (0.0, 4.0) for shared in noise.bits}
    noise.add(0.5)
    n = w.detach() - clean
    assert n.std().item() == pytest.approx(0.5 * 4, rel=0.05)
    noise.remove()
    noise.remove()  # does nothing
    error = (w - clean).norm()
    assert error < 1e-6 * n.norm()


def test_activation_noise_meets_a_share_of_each_layers_input(network, tiny_data):
    """x + M lambda (mu + sigma e), M ~ Bernoulli(rho), statistics of the inputs as in training."""
    images, _ = tiny_data.sample(32)
    before = copy.deepcopy(network.state_dict())
    noise = ActivationNoise(network.eval(), 3, 0.3, "lsq+")
    noise.measure(images)
    same(network.state_dict(), before)
    clean = flat_quant.layer_inputs(network.train(), images)
    names = list(clean)
    layers = common.weight_layers(network)
    for name, x in clean.items():
        bits = 8 if name in (names[0], names[-1]) else 3
        error = quantization_error(x, common.LSQPlus(bits)).detach()
        expected = (error.mean(), error.std(correction=0))
        close(noise.statistics[layers[name]], expected)
    for name in (names[0], names[-1]):
        noise.statistics = dict.fromkeys(layers.values(), (0, 0))
        noise.statistics[layers[name]] = (4, 2)
        with noise.injected(2.0):
            n = flat_quant.layer_inputs(network, images)[name] - clean[name]
        n = n[n != 0]
        share = n.numel() / clean[name].numel()
        found = [share, n.mean().item(), n.std().item()]
        assert found == pytest.approx([0.3, 2 * 4, 2 * 2], rel=0.1)


def test_salience_by_hand():
    """P = clip(softmax(I) C rho, 0, 1), I the mean of |x| over space, or over tokens."""
    noise = ActivationNoise(nn.Linear(1, 1), 3, 0.4, mask="salience")
    x = torch.tensor([[0.0, math.log(2), -math.log(5)], [30.0, 0, 0]])
    expected = torch.tensor([[0.15, 0.3, 0.75], [1, 0, 0]])
    tokens = x[:, None] * torch.tensor([0.5, -1.5])[:, None]
    images = tokens.mT.reshape(2, 3, 2, 1)
    for features in (x, tokens, images, images.mT):
        close(noise.chance(features).reshape(2, 3), expected)


@pytest.mark.parametrize("method", flat_quant.METHODS)
def test_all_steps_by_hand(method, train, network, tiny_data):
    """Anti-PGD, W <- W - lr dL/dW + n_(t+1) - n_t, with decay and momentum of W = w + n_t.

    additive: decay and momentum are of w; sam: the gradient is taken at w + rho g / |g|.
    """
    flags = ("--wbits 3 --abits 4 --noise-bits 5 --quantizer pact --rho 0.2 --mask salience "
             "--sam-rho 0.3 "
             "--noise-lambda 3 --ramp-epochs 1 --batch-size 16 --fp-weight-decay 0.5 "
             "--label-smoothing 0.2")
    found, _ = train(method, flags, epochs=2)[method]
    kind = IsotropicWeightNoise if method == "isotropic" else DifferentialWeightNoise
    noise = kind(network, 5 if method == "wrong-bits" else 3)
    inputs = ActivationNoise(network, 4, 0.2, "pact", "salience")
    optimizer = torch.optim.SGD(
        network.parameters(), momentum=0.9, weight_decay=0.5, nesterov=True)
    step = 0
    for epoch in range(2):
        draws = common.epoch_draws("training", 0, epoch)
        if method not in ("sgd", "sam", "activation"):
            noise.measure()
        if "activation" in method:
            inputs.measure(tiny_data.sample(100)[0])
        old = dict.fromkeys(noise.bits, 0)
        for images, labels in tiny_data.batches(16, draws, "crop+flip"):
            common.set_rate(optimizer, 0.2 * common.cosine(step, 8, warmup=0.1))
            strength = 3 * min(1, step / 4)
            step += 1
            for w, (mean, std) in noise.statistics.items():
                new = strength * (mean + std * torch.randn_like(w))
                w.data += new - old[w]
                old[w] = new
            with inputs.injected(strength):
                logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.2)
            if method == "sam":
                loss = common.sam_loss(network, images, labels, 0.3, 0.2)
            optimizer.zero_grad()
            loss.backward()
            if method == "additive":
                for w in noise.bits:
                    w.data -= old[w]
                    old[w] = 0
            optimizer.step()
        for w in noise.bits:
            w.data -= old[w]
    expected = list(network.parameters())
    close(list(found.parameters()), expected, rtol=0, atol=1e-3)


def test_strength_zero_is_sgd_bit_for_bit(train):
    sgd, _ = train("sgd")["sgd"]
    for method in flat_quant.WEIGHT_NOISES:
        other, _ = train(method, "--noise-lambda 0")[method]
        same(other.state_dict(), sgd.state_dict())
    noisy, _ = train("activation")["activation"]
    assert not torch.equal(noisy[6].weight, sgd[6].weight)


def test_evaluation_checkpoint_and_average_see_weights_without_noise(
        train, network, tmp_path, monkeypatch):
    """At a tiny learning rate those are the first, to the rounding of adding the noise."""
    seen = []
    evaluate = common.evaluate

    def watched(model, *args):
        seen.append(copy.deepcopy(model.state_dict()))
        return evaluate(model, *args)

    monkeypatch.setattr(common, "evaluate", watched)
    train("weight", "--fp-lr 1e-9", epochs=2)
    state = common.read_checkpoint(next(tmp_path.rglob("*.pt")))
    assert len(seen) == 4  # twice after an epoch, then the network and its average
    for name, p in network.named_parameters():
        for weights in (state["model"], *seen):
            error = (weights[name] - p).norm()
            assert error < 1e-6 * p.norm() + 1e-9


def test_swa_averages_the_last_half_of_the_epochs_at_a_held_rate(
        train, tiny_data, monkeypatch):
    weights = []
    rates = []
    step = torch.optim.SGD.step

    def watched(optimizer):
        step(optimizer)
        group = optimizer.param_groups[0]
        weights.append(group["params"][0].detach().clone())
        rates.append(group["lr"])

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    average, row = train("sgd", "--swa-rate 0.2", epochs=8)["sgd+swa"]
    cosine = [0.2 * common.cosine(i, 8, warmup=0.1) for i in range(8)]
    assert rates == pytest.approx(cosine[:6] + [0.2 * 0.2] * 10)
    close(average[0][0].weight, sum(weights[9::2]) / 4)
    assert (row["acc"], row["loss"]) == common.evaluate(average, tiny_data)


def test_ptq_rounds_as_was_measured_and_fits_the_inputs_of_evaluation(
        parse, tiny_data, network):
    network[0][1].running_var.fill_(1e-4)  # by which inputs are a hundred times as large
    args = parse("flat_quant", "--quantizer pact --wbits 3 --abits 4 --more-bits")
    images, _ = tiny_data.sample(100)
    exact = network.eval()(images)
    weight = network[1].conv2.weight
    layer = flat_quant.ptq(args, tiny_data, network, 3, 4)[1].conv2
    error = quantization_error(weight, common.Quantizer(3, channels=16))
    same(layer.weight_quantizer(layer.weight) - weight, error)
    assert isinstance(layer.input_quantizer, common.PACT)
    fine = flat_quant.ptq(args, tiny_data, network.train(), 8, 8)
    assert (fine(images) - exact).norm() < 0.1 * exact.norm()
    bits = ["wbits", "abits", "noise_wbits", "noise_abits"]
    for method, noise in (
            ("sam", [None, None]), ("wrong-bits+swa", [8, None]), ("weight+activation", [3, 4])):
        row = {"method": method, "run": "", "wbits": 32, "abits": 32}
        rows = flat_quant.quantized_rows(args, tiny_data, network, row)
        found = [[row[name] for name in bits] for row in rows]
        assert found == [[3, 4, *noise], [8, 8, *noise]]
    assert rows[0]["acc_batch_norm"] > rows[0]["acc"]


def test_printed_errors_are_those_that_the_noise_imitates(parse, tiny_data, network, monkeypatch):
    network[0][1].running_var.fill_(1e-4)
    found = []
    monkeypatch.setattr(flat_quant, "error_decomposition",
                        lambda layer, x: found.append((layer.input_quantizer, x)) or {})
    args = parse("flat_quant", "--wbits 2 --abits 4")
    flat_quant.print_errors(args, tiny_data, network.eval())
    for quantizer, x in found[1:-1]:
        same(quantizer(x) - x, quantization_error(x, common.Quantizer(4)))


@pytest.mark.usefixtures("tiny_networks")
def test_tables_as_a_user_reads_them(run, monkeypatch):
    """The drop is the accuracy in full precision less that after PTQ."""
    accuracies = iter(range(99))  # of epoch, network, average; then, after PTQ, of all networks
    monkeypatch.setattr(common, "evaluate", lambda *_: (next(accuracies), 1.0))
    monkeypatch.setattr(common, "sharpness", lambda *_: (7, 8, 9))
    done = run("flat_quant", SHAPES, "--method sgd wrong-bits")
    lines = [line.split() for line in done.out.splitlines()]
    for row in (
            "sgd 2/2 6.00 7.00 1",
            "wrong-bits 2/2 10.00 +4.00 11.00 +4.00 1",
            "-5.00 7.00 8.00 9.00 sgd"):
        assert row.split() in lines


@pytest.mark.usefixtures("tiny_networks")
def test_averages_are_compared_with_averages(run):
    tables = run("flat_quant", SHAPES, "--bits 4").out.split("\nmethod ")[1:]
    for table, name in zip(tables, ["sgd", "sgd+swa"], strict=True):
        heading, *rows = table.split("\n\n")[0].splitlines()
        assert heading.split().count(name) == 2  # after "vs", for either figure
        assert {row.split()[0] for row in rows} == {name, name.replace("sgd", "weight+activation")}
