"""DNQ: the errors and their statistics, the noises, SAM, training, averaging, PTQ, the script."""

import copy
from contextlib import nullcontext
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import flat_quant
from conftest import close, same
from flat_quant import ActivationNoise, DifferentialWeightNoise, quantization_error


@pytest.fixture
def network(request):
    torch.manual_seed(common.random_stream("weights", 0))  # as the network that `train` begins with
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
    x = torch.randn(5, 3, 8, 8).double()
    common.calibrate(layer, x)
    clean, total = layer.product(x, layer.weight), layer(x) - layer(0 * x)  # without the bias
    aqe = layer.product(layer.input_quantizer(x), layer.weight)
    wqe = layer.product(x, layer.weight_quantizer(layer.weight))
    total, aqe, wqe = (((z - clean).square().sum() / clean.square().sum()).item()
                       for z in (total, aqe, wqe))
    assert flat_quant.error_decomposition(layer, x) == pytest.approx(
        {"AQE": aqe, "WQE": wqe, "cross": total - aqe - wqe, "total": total})


def test_kurtosis_of_known_numbers():
    for sample, kurtosis in ((torch.linspace(2, 5, 10_000), -1.2), (torch.tensor([0.0, 1]), -2)):
        assert flat_quant.excess_kurtosis(sample) == pytest.approx(kurtosis, abs=1e-3)


def test_shifted_restores_bit_for_bit_and_keeps_a_step():
    torch.manual_seed(0)
    w, n = torch.randn(900), 1e4 * torch.randn(900)
    before = w.clone()
    with pytest.raises(KeyboardInterrupt), common.shifted([w], [n]):
        assert torch.equal(w, before + n)
        raise KeyboardInterrupt
    assert torch.equal(w, before)
    with common.shifted([w], [n / 1e4]):
        w -= 0.5
    close(w, before - 0.5)


def test_weight_noise_is_fresh_and_has_the_statistics_of_the_current_weights(network):
    """n_t = lambda (mu + sigma e), mu and sigma those of dW per channel, against numpy; isotropic:
    its mean square over all."""
    noise, isotropic = (DifferentialWeightNoise(network, 3, flat) for flat in (False, True))
    noise.measure()
    isotropic.measure()
    errors = [quantization_error(w, common.Quantizer(bits, len(w))).flatten(1).detach().numpy()
              for w, bits in zip(noise.weights, [8] + [3] * 8 + [8])]
    power = np.mean(np.concatenate([e.ravel() for e in errors]) ** 2)
    for i, e in enumerate(errors):
        for found, value in ((noise.mean[i], e.mean(1)), (noise.std[i], e.std(1)),
                             (isotropic.mean[i], 0), (isotropic.std[i], power ** 0.5)):
            np.testing.assert_allclose(found.flatten(), value, rtol=1e-3, atol=1e-6)
    twice = [2 * s for s in noise.mean + noise.std]
    torch._foreach_mul_([w.detach() for w in noise.weights], 2)
    noise.measure()
    same(noise.mean + noise.std, twice)
    noise.mean, noise.std, drawn = [0.5] * 10, [4.0] * 10, []
    torch._foreach_zero_([w.detach() for w in noise.weights])
    for _ in range(2):
        with noise.injected(0.5):
            drawn.append(torch.cat([w.flatten() for w in noise.weights]))
    assert drawn[0].mean().item() == pytest.approx(0.5 * 0.5, abs=0.03)
    assert drawn[0].std().item() == pytest.approx(0.5 * 4, rel=0.02)
    assert not torch.isclose(*drawn).all()


@pytest.mark.parametrize("network", ["resnet8", "vit_tiny"], indirect=True)
def test_activation_noise_meets_a_share_of_each_layers_input(network, tiny_data):
    """x + M lambda (mu + sigma e), M ~ Bernoulli(rho), statistics of the inputs as in training."""
    images, layers = tiny_data.sample(32)[0], list(common.weight_layers(network).values())
    noise, before = ActivationNoise(network, 3, 0.3, "lsq+"), copy.deepcopy(network.state_dict())
    noise.measure(3 * images)
    noise.measure(images)  # nothing is left of those before
    same(network.state_dict(), before)
    clean = flat_quant.layer_inputs(network, images)
    for layer, x in zip(layers, clean, strict=True):
        bits = 8 if layer in (layers[0], layers[-1]) else 3
        error = quantization_error(x, common.LSQPlus(bits)).detach()
        close(noise.statistics[layer], (error.mean(), error.std(correction=0)))
    for i in (0, 3, -1):
        noise.statistics = {layer: (0, 0) for layer in layers} | {layers[i]: (4, 2)}
        with noise.injected(2.0):
            seen = flat_quant.layer_inputs(network, images)
        n = (seen[i] - clean[i])[seen[i] != clean[i]]
        found = [n.numel() / clean[i].numel(), n.mean().item(), n.std().item()]
        assert found == pytest.approx([0.3, 2 * 4, 2 * 2], rel=0.1)
        same(seen[:i], clean[:i])
    same(flat_quant.layer_inputs(network, images), clean)


def test_salience_by_hand():
    """P = clip(softmax(I) C rho, 0, 1), I the mean of |x| over space, or over tokens."""
    noise = ActivationNoise(nn.Linear(1, 1), 3, 0.4, mask="salience")
    x = torch.tensor([[0.0, math.log(2), -math.log(5)], [30.0, 0, 0]])
    expected = torch.tensor([[0.15, 0.3, 0.75], [1, 0, 0]])
    images = x[..., None, None] * torch.tensor([0.5, -1.5])[:, None]
    for features in (x, images, images[..., 0].transpose(1, 2)):
        close(noise.chance(features).reshape(2, 3), expected)
    assert (noise.perturb(x, 1, 0, 1) != x)[1].tolist() == [True, False, False]


@pytest.mark.parametrize("method", ["weight", "additive", "sam"])
def test_rule_written_out(method, train, network, tiny_data, monkeypatch):
    """weight: W <- W + n_t - n_(t-1), and SGD's gradient, decay and momentum act on W = w + n_t.
    The others: they act on w, only the gradient is taken at w + n; sam: n = rho g / |g|."""
    noises, shifted = [], common.shifted
    for module in (common, flat_quant):
        monkeypatch.setattr(module, "shifted", lambda params, shifts: (
            noises.append(shifts) or shifted(params, shifts)))
    trained, _ = train(method, batch_size=16, fp_weight_decay=0.5, label_smoothing=0.2)[method]
    noisy, found = ([p.detach() for p in model.parameters() if method == "sam" or p.dim() > 1]
                    for model in (network, trained))
    previous = [torch.zeros_like(p) for p in noisy]
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=0.5, nesterov=True)
    draws = torch.Generator().manual_seed(common.random_stream("method", "batches", 0, 0))
    batches = tiny_data.batches(16, draws)
    for i, ((images, labels), noise) in enumerate(zip(batches, noises, strict=True)):
        optimizer.param_groups[0]["lr"] = common.cosine_lr(i, 4, 0.2, warmup=0.1)
        optimizer.zero_grad()
        torch._foreach_add_(noisy, [n - old for n, old in zip(noise, previous)])
        F.cross_entropy(network(images), labels, label_smoothing=0.2).backward()
        if method == "weight":
            previous = noise
        else:
            torch._foreach_sub_(noisy, noise)
        optimizer.step()
    close([p + n for p, n in zip(found, previous)], noisy, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method, bits", [("wrong-bits", 5), ("isotropic", 3)])
def test_statistics_of_each_epoch_and_strength_of_each_step(method, bits, train, monkeypatch):
    calls, noises = [], {}
    for kind in (DifferentialWeightNoise, ActivationNoise):
        for name in ("measure", "injected"):
            def watched(noise, *args, name=name, original=getattr(kind, name)):
                calls.append(args[0] if name == "injected" else name)
                noises[type(noise)] = noise
                return original(noise, *args)
            monkeypatch.setattr(kind, name, watched)
    train(f"{method}+activation", wbits=3, abits=4, noise_bits=5, noise_lambda=3, ramp_epochs=1,
          quantizer="pact", rho=0.2, mask="salience", fp_epochs=2)
    assert calls == ["measure"] * 2 + [0, 0, 1.5, 1.5] + ["measure"] * 2 + [3] * 4
    weights, activations = noises[DifferentialWeightNoise], noises[ActivationNoise]
    assert weights.bits == [8] + [bits] * 8 + [8] and weights.isotropic == (bits == 3)
    assert activations.bits == [8] + [4] * 8 + [8] and activations.rho == 0.2
    assert activations.mask == "salience" and activations.quantizer is common.PACT


def test_strength_zero_is_plain_sgd_bit_for_bit(train):
    plain = train("sgd")["sgd"][0].state_dict()
    for method, strength in (("weight+activation+sam", 0), ("additive", 0), ("activation", 1)):
        other, _ = train(method, noise_lambda=strength, sam_rho=0)[method]
        with pytest.raises(AssertionError) if strength else nullcontext():
            same(other.state_dict(), plain)


def test_noise_while_the_weights_stay_leaves_no_trace(train, network, tiny_data):
    """Weights are clean, batch norm is estimated on them, in the plain network and the average."""
    draws = torch.Generator().manual_seed(common.random_stream("batch norm"))
    common.update_bn(tiny_data.batches(32, draws), network)
    outcomes = train("weight+activation", noise_lambda=30, fp_lr=0.0)
    assert len(outcomes) == 2
    for model, result in outcomes.values():
        same(model.state_dict(), network.state_dict())
        assert (result["acc"], result["loss"]) == common.evaluate(network, tiny_data)


def test_swa_averages_the_last_half_of_the_epochs_at_a_held_rate(train, tiny_data, monkeypatch):
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: step(optimizer) or seen.append(
        [1 * optimizer.param_groups[0]["params"][0], optimizer.param_groups[1]["lr"]]))
    average, result = train("sgd", fp_epochs=8, swa_rate=0.2)["sgd+swa"]
    weights, rates = zip(*seen)
    cosine = [common.cosine_lr(i, 8, 0.2, warmup=0.1) for i in range(8)]
    assert rates == pytest.approx([*cosine[:6], *[0.2 * 0.2] * 10])
    close(average[0][0].weight, sum(weights[9::2]) / 4)
    assert (result["acc"], result["loss"]) == common.evaluate(average, tiny_data)


def test_ptq_rounds_as_was_measured_and_fits_the_inputs_of_evaluation(parse, tiny_data, network):
    network[0][1].running_var.fill_(1e-4)  # by which inputs are a hundred times as large
    args, images = parse("flat_quant", "--quantizer", "pact"), tiny_data.sample(100)[0]
    exact, weight = network.eval()(images), network[1].conv2.weight
    layer = flat_quant.ptq(args, tiny_data, network, 3, 4)[1].conv2
    error = quantization_error(weight, common.Quantizer(3, channels=16))
    assert torch.equal(layer.weight_quantizer(layer.weight) - weight, error)
    assert isinstance(layer.input_quantizer, common.PACT) and layer.input_quantizer.bits == 4
    fine = flat_quant.ptq(args, tiny_data, network.train(), 8, 8)
    assert (fine(images) - exact).norm() < 0.1 * exact.norm() and not fine.training
    result = flat_quant.quantized_results(args, tiny_data, network, {"seed": 0})[0]
    assert result["acc_batch_norm"] > result["acc"]


def test_study_as_a_user_runs_it(run, monkeypatch):
    """Every network in full precision and after PTQ; the drop is the difference of the two."""
    accuracies = iter(range(99))  # of epoch, network and average; then, after PTQ, of all networks
    monkeypatch.setattr(common, "evaluate", lambda *args: (next(accuracies), 1.0))
    monkeypatch.setattr(common, "sharpness", lambda *args: (7, 8, 9))
    monkeypatch.setattr(flat_quant, "METHODS", ["sgd", "wrong-bits"])
    monkeypatch.setattr(flat_quant, "PTQ_BITS", [])
    done = run("flat_quant", "--dry-run", "--dataset", "shapes", "--study", "--measure")
    rows = [line.split() for line in done.out.splitlines()]
    for row in ("method FP W2A2", "sgd 1.00 6.00", "wrong-bits 4.00 +3.00 10.00 +4.00",
                "sgd 1.00 7.00", "sgd+swa -6.00 7.00 8.00 9.00"):
        assert row.split() in rows
    assert len(done.results) == 8 and "corr(dW, W)" in done.out
