"""DNQ: the errors and their statistics, the noises, training, averaging, PTQ, all its figures."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import flat_quant
from conftest import SHAPES, close, normal, same, tiny_network
from flat_quant import ActivationNoise, DifferentialWeightNoise, quantization_error


@pytest.fixture
def network(request):
    torch.manual_seed(common.stream("weights", 0))  # as the network that `train` begins with
    model = common.build_model(getattr(request, "param", "resnet8"), 10, depth=1)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def train(parse, tiny_data):
    """train(method, **settings) -> what flat_quant.train returns; two steps an epoch."""
    def trained(method, **settings):
        args = parse("flat_quant")
        vars(args).update({"ramp_epochs": 0} | settings)
        return flat_quant.train(args, tiny_data, method, 0)
    return trained


def test_decomposition_is_that_of_the_measured_error():
    """||W_hat x_hat - W x||^2 = AQE + WQE + cross, AQE = ||W dx||^2, WQE = ||dW x||^2."""
    torch.manual_seed(0)
    layer = common.QuantLayer(nn.Conv2d(3, 4, 3, stride=2, padding=1), 2, 3).double()
    x = normal(5, 3, 8, 8).double()
    common.calibrate(layer, x)
    clean = layer.product(x, layer.weight)
    measured = layer(x) - layer(0 * x)  # without the bias
    from_x = layer.product(layer.input_quantizer(x), layer.weight)
    from_w = layer.product(x, layer.weight_quantizer(layer.weight))
    shares = []
    for z in (from_x, from_w, measured):
        shares.append(((z - clean).square().sum() / clean.square().sum()).item())
    aqe, wqe, total = shares
    expected = {"AQE": aqe, "WQE": wqe, "cross": total - aqe - wqe, "total": total}
    assert flat_quant.error_decomposition(layer, x) == pytest.approx(expected)


def test_kurtosis_of_known_numbers():
    uniform = torch.linspace(2, 5, 10_000)
    assert flat_quant.excess_kurtosis(uniform) == pytest.approx(-1.2, abs=1e-3)
    assert flat_quant.excess_kurtosis(torch.tensor([0.0, 1])) == pytest.approx(-2, abs=1e-3)


def test_weight_noise_has_the_statistics_of_the_current_weights_by_channel(network):
    """mu and sigma of dW against numpy; isotropic: 0 and the root mean square over all."""
    noise = DifferentialWeightNoise(network, 3)
    isotropic = flat_quant.IsotropicWeightNoise(network, 3)
    weights = list(noise.bits)
    for factor in (1, 2):
        weights[4].data *= factor
        noise.measure()
        isotropic.measure()
        errors = []
        for w, bits in zip(weights, [8, *[3] * 8, 8], strict=True):
            error = quantization_error(w, common.Quantizer(bits, len(w)))
            errors.append(error.flatten(1).detach().numpy())
            mean, std = noise.statistics[w]
            np.testing.assert_allclose(mean.flatten(), errors[-1].mean(1), rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(std.flatten(), errors[-1].std(1), rtol=1e-3, atol=1e-6)
        power = np.mean(np.concatenate([e.ravel() for e in errors]) ** 2)
        for mean, std in isotropic.statistics.values():
            assert mean == 0
            assert std.item() == pytest.approx(power**0.5, rel=1e-3)


def test_weight_noise_is_fresh_and_leaves_the_weights_as_they_were():
    """n_t = lambda (mu + sigma e), once on a weight that two layers share."""
    model = nn.Sequential(nn.Linear(90, 90), nn.ReLU(), nn.Linear(90, 90))
    model[2].weight = model[0].weight
    w = model[0].weight
    clean = w.detach().clone()
    noise = DifferentialWeightNoise(model, 3)
    noise.measure()
    assert list(noise.statistics) == [w]
    noise.statistics[w] = (torch.tensor(0.5), torch.tensor(4.0))
    drawn = []
    for _ in range(2):
        noise.add(0.5)
        drawn.append(w.detach() - clean)
        noise.before_step()
        close(w - clean, drawn[-1])
        noise.remove()
        noise.remove()  # does nothing
        assert (w - clean).abs().max() < 1e-6 * drawn[-1].abs().max()
    assert drawn[0].mean().item() == pytest.approx(0.5 * 0.5, abs=0.1)
    assert drawn[0].std().item() == pytest.approx(0.5 * 4, rel=0.05)
    assert not torch.isclose(*drawn).all()


@pytest.mark.parametrize("network", ["resnet8", "vit_tiny"], indirect=True)
def test_activation_noise_meets_a_share_of_each_layers_input(network, tiny_data):
    """x + M lambda (mu + sigma e), M ~ Bernoulli(rho), statistics of the inputs as in training."""
    images, _ = tiny_data.sample(32)
    before = copy.deepcopy(network.state_dict())
    noise = ActivationNoise(network, 3, 0.3, "lsq+")
    noise.measure(3 * images)
    noise.measure(images)  # nothing is left of those before
    same(network.state_dict(), before)
    clean = flat_quant.layer_inputs(network.train(), images)
    names = list(clean)
    layers = common.weight_layers(network)
    for name, x in clean.items():
        bits = 8 if name in (names[0], names[-1]) else 3
        error = quantization_error(x, common.LSQPlus(bits)).detach()
        close(noise.statistics[layers[name]], (error.mean(), error.std(correction=0)))
    for i in (0, 3, -1):
        noise.statistics = {layer: (0, 0) for layer in layers.values()}
        noise.statistics[layers[names[i]]] = (4, 2)
        with noise.injected(2.0):
            seen = flat_quant.layer_inputs(network, images)
        n = seen[names[i]] - clean[names[i]]
        n = n[n != 0]
        share = n.numel() / clean[names[i]].numel()
        assert share == pytest.approx(0.3, rel=0.1)
        assert n.mean().item() == pytest.approx(2 * 4, rel=0.1)
        assert n.std().item() == pytest.approx(2 * 2, rel=0.1)
        for name in names[:i]:
            same(seen[name], clean[name])
    same(flat_quant.layer_inputs(network, images), clean)


def test_salience_by_hand():
    """P = clip(softmax(I) C rho, 0, 1), I the mean of |x| over space, or over tokens."""
    noise = ActivationNoise(nn.Linear(1, 1), 3, 0.4, mask="salience")
    x = torch.tensor([[0.0, math.log(2), -math.log(5)], [30.0, 0, 0]])
    expected = torch.tensor([[0.15, 0.3, 0.75], [1, 0, 0]])
    images = x[..., None, None] * torch.tensor([0.5, -1.5])[:, None]
    for features in (x, images, images[..., 0].transpose(1, 2)):
        close(noise.chance(features).reshape(2, 3), expected)
    moved = noise.perturb(x, 1, 0, 1) != x
    assert moved[1].tolist() == [True, False, False]


@pytest.mark.parametrize("method", ["weight", "additive", "sam"])
def test_rule_by_hand(method, train, network, tiny_data, monkeypatch):
    """weight: Anti-PGD, W <- W - lr dL/dW + n_(t+1) - n_t, with decay and momentum of W.

    additive: only the gradient is taken at w + n; sam: at w + rho g / |g|.
    """
    noises = []
    add = DifferentialWeightNoise.add

    def watched(noise, strength):
        add(noise, strength)
        noises.append([n.clone() for n in noise.noise.values()])

    monkeypatch.setattr(DifferentialWeightNoise, "add", watched)
    settings = {"batch_size": 16, "fp_weight_decay": 0.5, "label_smoothing": 0.2}
    trained, _ = train(method, **settings)[method]
    weights = [layer.weight.detach() for layer in common.weight_layers(network).values()]
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=0.5, nesterov=True)
    draws = torch.Generator().manual_seed(common.stream("method", "batches", 0, 0))
    batches = tiny_data.batches(16, draws, "crop+flip")
    old = [torch.zeros_like(w) for w in weights]
    for i, (images, labels) in enumerate(batches):
        common.set_rate(optimizer, 0.2 * common.cosine(i, 4, warmup=0.1))
        new = noises[i] or old
        for w, n, previous in zip(weights, new, old):
            w += n - previous
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.2)
        if method == "sam":
            loss = common.sam_loss(network, images, labels, 0.2, 0.2)
        optimizer.zero_grad()
        loss.backward()
        if method == "weight":
            old = new
        else:
            for w, n in zip(weights, new):
                w -= n
        optimizer.step()
    assert len(noises) == 4
    found = [layer.weight for layer in common.weight_layers(trained).values()]
    for w, n, end in zip(weights, old, found):
        close(end + n, w, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method, bits", [("wrong-bits", 5), ("weight+activation", 3)])
def test_statistics_of_each_epoch_and_strength_of_each_step(method, bits, train, monkeypatch):
    calls = []
    noises = {}

    def watch(kind, name):
        original = getattr(kind, name)

        def watched(noise, *args):
            calls.append((name, *args) if name != "measure" else name)
            noises[kind] = noise
            return original(noise, *args)

        monkeypatch.setattr(kind, name, watched)

    watch(DifferentialWeightNoise, "measure")
    watch(DifferentialWeightNoise, "add")
    watch(ActivationNoise, "injected")
    train(method, wbits=3, abits=4, noise_bits=5, noise_lambda=3, ramp_epochs=1,
          quantizer="pact", rho=0.2, mask="salience", fp_epochs=2)
    expected = []
    for strengths in ((0, 1.5), (3, 3)):
        expected.append("measure")
        for strength in strengths:
            expected += [("add", strength), ("injected", strength)]
    assert calls == expected
    weights = noises[DifferentialWeightNoise]
    assert list(weights.bits.values()) == [8, *[bits] * 8, 8]
    activations = noises[ActivationNoise]
    assert list(activations.bits.values()) == [8, *[4] * 8, 8]
    assert (activations.rho, activations.mask) == (0.2, "salience")
    assert activations.quantizer is common.PACT
    assert bool(activations.statistics) == (method == "weight+activation")


def test_strength_zero_is_sgd_bit_for_bit(train):
    sgd = train("sgd")["sgd"][0].state_dict()
    for method in ("weight+activation", "additive", "isotropic", "wrong-bits"):
        other = train(method, noise_lambda=0)[method][0]
        same(other.state_dict(), sgd)
    noisy = train("activation", noise_lambda=1)["activation"][0]
    assert not torch.equal(noisy[6].weight, sgd["6.weight"])


def test_evaluation_checkpoint_and_average_see_weights_without_noise(
        train, network, tmp_path, monkeypatch):
    """At a learning rate of 0 those are the first weights, to the rounding of adding the noise."""
    seen = []
    evaluate = common.evaluate

    def watched(model, *args):
        seen.append(copy.deepcopy(dict(model.named_parameters())))
        return evaluate(model, *args)

    monkeypatch.setattr(common, "evaluate", watched)
    train("weight+activation", fp_lr=0.0, fp_epochs=2)
    state = common.read_checkpoint(next(tmp_path.rglob("*.pt")))
    assert len(seen) == 4
    for name, p in network.named_parameters():
        assert all((model[name] - p).abs().max() < 1e-6 * p.abs().max() + 1e-12 for model in seen)
        for end in (state["model"][name], state["average"]["module." + name]):
            close(end, p.detach(), rtol=0, atol=1e-6)


def test_swa_averages_the_last_half_of_the_epochs_at_a_held_rate(train, tiny_data, monkeypatch):
    weights = []
    rates = []
    step = torch.optim.SGD.step

    def watched(optimizer):
        step(optimizer)
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())
        rates.append(optimizer.param_groups[1]["lr"])

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    average, row = train("sgd", fp_epochs=8, swa_rate=0.2)["sgd+swa"]
    cosine = [0.2 * common.cosine(i, 8, warmup=0.1) for i in range(8)]
    assert rates == pytest.approx([*cosine[:6], *[0.2 * 0.2] * 10])
    close(average[0][0].weight, sum(weights[9::2]) / 4)
    assert (row["acc"], row["loss"]) == common.evaluate(average, tiny_data)


def test_ptq_rounds_as_was_measured_and_fits_the_inputs_of_evaluation(parse, tiny_data, network):
    network[0][1].running_var.fill_(1e-4)  # by which inputs are a hundred times as large
    args = parse("flat_quant", "--quantizer pact")
    images, _ = tiny_data.sample(100)
    exact = network.eval()(images)
    weight = network[1].conv2.weight
    layer = flat_quant.ptq(args, tiny_data, network, 3, 4)[1].conv2
    error = quantization_error(weight, common.Quantizer(3, channels=16))
    same(layer.weight_quantizer(layer.weight) - weight, error)
    assert isinstance(layer.input_quantizer, common.PACT)
    assert layer.input_quantizer.bits == 4
    fine = flat_quant.ptq(args, tiny_data, network.train(), 8, 8)
    assert not fine.training
    assert (fine(images) - exact).norm() < 0.1 * exact.norm()


def test_rows_of_ptq_have_flatness_before_it_and_the_bits_of_the_noise(parse, tiny_data, network):
    network[0][1].running_var.fill_(1e-4)
    args = parse("flat_quant", "--wbits 3 --abits 4 --more-bits")
    trained = {"seed": 0, "method": "sgd", "run": "run", "wbits": 32, "acc": 0.0}
    rows = flat_quant.quantized_rows(args, tiny_data, network, trained)
    assert [(row["wbits"], row["abits"]) for row in rows] == [(3, 4), (8, 8)]
    flatness = common.sharpness(network, tiny_data, 2, 1)
    for row in rows:
        assert (row["noise_wbits"], row["noise_abits"]) == (3, 4)
        found = [row["trace"], row["trace_error"], row["top_eigenvalue"]]
        assert found == pytest.approx(flatness, rel=1e-4)
    assert rows[0]["acc_batch_norm"] > rows[0]["acc"]


def test_printed_errors_by_hand(parse, tiny_data, capsys):
    args = parse("flat_quant")
    network = tiny_network()
    flat_quant.print_errors(args, tiny_data, network)
    found = capsys.readouterr().out.splitlines()[-1].split()
    images, _ = tiny_data.sample(100)
    layer = flat_quant.ptq(args, tiny_data, network, 2, 2)[-1]
    x = network[:-1](images)
    w = layer.weight.detach()
    dw = layer.weight_quantizer(w).detach() - w
    dx = layer.input_quantizer(x).detach() - x
    figures = [*flat_quant.error_decomposition(layer, x).values()]
    figures += [flat_quant.excess_kurtosis(dw), flat_quant.excess_kurtosis(dx)]
    figures.append(np.corrcoef(dw.flatten(), w.flatten())[0, 1])
    assert [float(cell) for cell in found[:-1]] == pytest.approx(figures, abs=2e-4)


@pytest.mark.usefixtures("tiny_networks")
def test_table_of_ptq_and_drop(run, monkeypatch):
    """The drop is the accuracy in full precision less that after PTQ."""
    accuracies = iter(range(99))  # of epoch, network and average; then, after PTQ, of all networks
    monkeypatch.setattr(common, "evaluate", lambda *args: (next(accuracies), 1.0))
    monkeypatch.setattr(common, "sharpness", lambda *args: (7, 8, 9))
    done = run("flat_quant", SHAPES, "--method sgd wrong-bits")
    lines = [line.split() for line in done.out.splitlines()]
    print(done.out)
    for row in ("sgd 2/2 6.00 7.00 1", "wrong-bits 2/2 10.00 +4.00 11.00 +4.00 1",
                "-5.00 7.00 8.00 9.00 sgd"):
        assert row.split() in lines


@pytest.mark.usefixtures("tiny_networks")
def test_all_methods_and_figures_as_a_user_runs_them(run):
    done = run("flat_quant", SHAPES, "--ablate --diagnose --more-bits")
    names = {row["method"] for row in done.results}
    assert names == {*flat_quant.METHODS, *[f"{name}+swa" for name in flat_quant.METHODS]}
    assert len(done.results) == 3 * len(names)
    assert "nan" not in done.out
    assert "corr(dW, W)" in done.out
