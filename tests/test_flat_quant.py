"""DNQ: the errors and their statistics, the noises, SAM, averaging, ViT, every method."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import flat_quant
from flat_quant import SAM, ActivationNoise, DifferentialWeightNoise


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse("--bits", "4", ...) -> the arguments of a dry run."""
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["flat_quant.py", "--dataset", "shapes", "--out",
                                         str(tmp_path), "--dry-run", *flags])
        return flat_quant.parse_args()
    return run


@pytest.fixture
def network():
    torch.manual_seed(0)
    return common.build_model("resnet8", 10)


class Exact(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["conv", "linear", "tokens"])
def test_decomposition_sums_to_the_measured_error_and_each_part_can_vanish(kind):
    torch.manual_seed(0)
    if kind == "conv":
        layer = common.QuantConv2d(nn.Conv2d(3, 4, 3, stride=2, padding=1), 2, 3)
        x = torch.randn(5, 3, 8, 8).relu()
    else:
        layer = common.QuantLinear(nn.Linear(6, 4), 2, 3)
        x = torch.randn(*((7, 6) if kind == "linear" else (3, 7, 6)))
    common.calibrate(layer, x)
    parts = flat_quant.error_decomposition(layer, x)
    plain = copy.deepcopy(layer)
    plain.input_quantizer = plain.weight_quantizer = Exact()
    clean, quantized = plain(x), layer(x)
    measured = ((quantized - clean).square().sum()
                / (clean - plain(torch.zeros_like(x))).square().sum()).item()
    assert parts["total"] == pytest.approx(measured, rel=1e-4)
    assert parts["AQE"] + parts["WQE"] + parts["cross"] == pytest.approx(measured, rel=1e-4)
    assert min(parts["AQE"], parts["WQE"]) > 0.005 and abs(parts["cross"]) > 1e-5
    for gone, left in (("AQE", "WQE"), ("WQE", "AQE")):
        half = copy.deepcopy(layer)
        setattr(half, "input_quantizer" if gone == "AQE" else "weight_quantizer", Exact())
        some = flat_quant.error_decomposition(half, x)
        assert some[gone] == some["cross"] == 0 and some["total"] == pytest.approx(parts[left])


def test_kurtosis_of_known_distributions():
    torch.manual_seed(0)
    assert flat_quant.excess_kurtosis(torch.randn(200_000)) == pytest.approx(0, abs=0.1)
    assert flat_quant.excess_kurtosis(torch.rand(200_000) * 3 + 1) == pytest.approx(-1.2, abs=0.02)
    assert flat_quant.excess_kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(-2)


def test_weight_statistics_against_numpy_and_their_average_over_epochs(network):
    noise = DifferentialWeightNoise(network, 3)
    noise.measure()
    quantized = common.quantize(network, 3, 3)
    with torch.no_grad():
        for layer in common.product_layers(quantized).values():
            layer.weight_quantizer.initialize(layer.weight)
        errors = [(layer.weight_quantizer(layer.weight) - layer.weight).flatten(1).numpy()
                  for layer in common.product_layers(quantized).values()]
    for i, e in enumerate(errors):
        np.testing.assert_allclose(getattr(noise, f"mean{i}"), e.mean(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(getattr(noise, f"var{i}"), e.var(1), rtol=1e-3)
    first = noise.var1.clone()
    with torch.no_grad():
        noise.weights[1].mul_(2)  # errors twice, variance four times
    noise.measure()
    torch.testing.assert_close(noise.var1, 0.9 * first + 0.1 * 4 * first, rtol=1e-3, atol=0)


def test_isotropic_noise_has_the_same_mean_square_everywhere(network):
    plain, noise = DifferentialWeightNoise(network, 3), DifferentialWeightNoise(
        network, 3, isotropic=True)
    plain.measure(), noise.measure()
    total = sum((w[0].numel() * (getattr(plain, f"var{i}") + getattr(plain, f"mean{i}") ** 2)).sum()
                for i, w in enumerate(plain.weights))
    count = sum(w.numel() for w in plain.weights)
    for i in range(len(plain.weights)):
        assert not getattr(noise, f"mean{i}").any()
        torch.testing.assert_close(getattr(noise, f"var{i}"),
                                   (total / count).expand_as(getattr(noise, f"var{i}")))
    assert DifferentialWeightNoise(network, 2).bits == [8] + [2] * 8 + [8]


def test_injected_noise_has_the_measured_moments_and_is_taken_out_exactly(network):
    noise = DifferentialWeightNoise(network, 3)
    noise.measure()
    with torch.no_grad():
        noise.mean1.fill_(0.5), noise.var1.fill_(4.0)
    before, sums = [w.clone() for w in noise.weights], []
    for _ in range(50):
        with noise.injected(0.5):
            sums.append(noise.weights[1].detach() - before[1])
        assert all(torch.equal(w, b) for w, b in zip(noise.weights, before))
    n = torch.stack(sums)
    assert n.mean().item() == pytest.approx(0.25, abs=0.02)
    assert n.std().item() == pytest.approx(0.5 * 2, rel=0.02)
    assert not torch.equal(n[0], n[1])
    with pytest.raises(KeyboardInterrupt), noise.injected(1.0):
        raise KeyboardInterrupt
    assert all(torch.equal(w, b) for w, b in zip(noise.weights, before))


def test_differential_rule_telescopes_into_sgd_at_perturbed_weights():
    """W <- W - lr g(W) + n_t - n_(t-1), written out, against w <- w - lr g(w + n_t)."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    noise = DifferentialWeightNoise(model, 2)
    noise.measure()
    noise.double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    explicit, previous = copy.deepcopy(model), None
    for t in range(5):
        with noise.injected(1.0):
            drawn = [w.detach().clone() for w in noise.weights]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
        drawn = [d - w.detach() for d, w in zip(drawn, noise.weights)]
        layers = common.product_layers(explicit).values()
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.weight.add_(drawn[i] - (previous[i] if previous else 0))
        grads = torch.autograd.grad(F.mse_loss(explicit(x), y), list(explicit.parameters()))
        with torch.no_grad():
            for p, g in zip(explicit.parameters(), grads):
                p.sub_(0.1 * g)
        optimizer.step()
        previous = drawn
    for layer, n, w in zip(common.product_layers(explicit).values(), previous, noise.weights):
        torch.testing.assert_close(layer.weight - n, w)


def test_additive_noise_stays(network):
    noise = DifferentialWeightNoise(network, 3, additive=True)
    noise.measure()
    before = noise.weights[1].clone()
    with noise.injected(1.0):
        inside = noise.weights[1].clone()
    assert torch.equal(noise.weights[1], inside) and not torch.equal(inside, before)


def test_activation_noise_statistics_mask_and_moments(network, tiny_data):
    images = tiny_data.sample(32)[0]
    noise = ActivationNoise(network, 3, rho=0.3)
    noise.measure(network.train(), images)
    assert network.training
    inputs = flat_quant.layer_inputs(network, images)
    assert torch.equal(inputs[0], images) and len(inputs) == 10
    quantizer = common.Quantizer(3)
    quantizer.initialize(inputs[2])
    with torch.no_grad():
        error = (quantizer(inputs[2]) - inputs[2]).numpy()
    assert noise.mean[2].item() == pytest.approx(error.mean(), rel=1e-3)
    assert noise.var[2].item() == pytest.approx(error.var(), rel=1e-3)
    x = torch.zeros(100_000)
    assert noise.perturb(x, 2) is x  # strength 0 so far
    noise.strength = 2.0
    noise.mean[2], noise.var[2] = 0.5, 4.0
    out = noise.perturb(x, 2)
    hit = out != 0
    assert hit.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert out[hit].mean().item() == pytest.approx(2 * 0.5, abs=0.1)
    assert out[hit].std().item() == pytest.approx(2 * 2, rel=0.03)
    clean = flat_quant.layer_inputs(network, images)
    assert all(torch.equal(a, b) for a, b in zip(clean, inputs))  # not in eval mode
    seen = []
    hook = network.fc.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    network(images), hook.remove()
    assert not torch.equal(seen[0], inputs[-1])


def test_sam_on_a_quadratic_and_batch_norm_from_the_first_pass_only():
    """L = (a w^2)/2: the gradient at w + rho sign(w) is a (w + rho sign(w))."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(-2.0)
    sam, loss = SAM(model, 0.5), lambda: 3 * model.weight.square().sum() / 2
    loss().backward()
    with sam.ascended():
        model.weight.grad = None
        loss().backward()
    assert model.weight.grad.item() == 3 * -2.5 and model.weight.item() == -2.0
    norm = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    norm(torch.randn(4, 1, 3, 3)).square().sum().backward()
    first = norm[1].running_mean.clone()
    with SAM(norm, 0.1).ascended():
        norm(torch.randn(4, 1, 3, 3) + 9)
    assert torch.equal(norm[1].running_mean, first)
    norm(torch.randn(4, 1, 3, 3) + 9)
    assert not torch.equal(norm[1].running_mean, first)


def test_lambda_zero_is_plain_sgd_bit_for_bit_and_every_method_differs(parse, tiny_data):
    def trained(method, *flags):
        args = parse("--batch-size", "16", "--ramp-epochs", "0.1", *flags)
        return flat_quant.train(args, tiny_data, method, 0)

    networks = {}
    for method in [*flat_quant.STUDY, "weight+sam"]:
        networks |= {k: n.state_dict() for k, (n, _) in trained(method).items()}
    for method in ("weight", "additive", "weight+activation"):
        zero = trained(method, "--noise-lambda", "0")[method][0].state_dict()
        assert all(torch.equal(v, networks["sgd"][k]) for k, v in zero.items())
    plain = [w["conv.weight"] for name, w in networks.items() if "swa" not in name]
    assert len(plain) == 9 and len(networks) == 18
    assert all(not torch.equal(a, b) for i, a in enumerate(plain) for b in plain[:i])


def test_average_of_the_last_half_with_batch_norm_estimated_anew(monkeypatch, parse, tiny_data):
    args = parse()
    args.fp_epochs, args.batch_size, seen = 4, 32, []
    save = common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda run: (
        seen.append(run.model.conv.weight.detach().clone()), save(run)))
    both = flat_quant.train(args, tiny_data, "sgd", 0)
    average = both["sgd+swa"][0]
    mean = np.mean([w.numpy() for w in seen[2:4]], 0)
    np.testing.assert_allclose(average.conv.weight.detach().numpy(), mean, rtol=1e-5, atol=1e-7)
    images = [x for x, _ in tiny_data.batches(32, torch.Generator().manual_seed(0))]
    expected = torch.stack([average.conv(x).mean((0, 2, 3)) for x in images]).mean(0)
    torch.testing.assert_close(average.bn.running_mean, expected.detach(), rtol=1e-3, atol=1e-4)
    assert both["sgd+swa"][1]["test_acc"] == common.evaluate(average, tiny_data)[0]


def test_loss_under_noise_and_rank_correlation(network, tiny_data):
    network.eval()
    before = copy.deepcopy(network.state_dict())
    images, labels = tiny_data.sample(256)
    clean = F.cross_entropy(network(images), labels).item()
    assert flat_quant.loss_under_noise(network, tiny_data, 0.0) == pytest.approx(clean)
    measured = flat_quant.loss_under_noise(network, tiny_data, 0.7)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    losses, noisy = [], copy.deepcopy(network)
    torch.manual_seed(0)
    for _ in range(4):
        for name, layer in common.product_layers(noisy).items():
            w = network.get_submodule(name).weight.detach()
            nn.init.zeros_(layer.weight).data.add_(w + torch.randn(w.shape) * w.std() * 0.7)
        losses.append(F.cross_entropy(noisy(images), labels).item())
    assert measured == pytest.approx(np.mean(losses), rel=1e-5) != pytest.approx(clean, rel=1e-3)
    assert flat_quant.rank_correlation([1, 2, 30], [-5, 0, 0.1]) == pytest.approx(1)
    assert flat_quant.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_ptq_takes_the_quantizer_that_measured(parse, tiny_data, network, monkeypatch):
    args = parse("--ptq", "minmax")
    weight = network.blocks[0].conv2.weight.detach()
    for ptq, candidates in (("minmax", 1), ("mse", 100)):
        args.ptq = ptq
        layer = flat_quant.ptq(args, tiny_data, network.eval(), 3, 4).blocks[0].conv2
        error = flat_quant.quantization_error(weight, common.Quantizer(3, channels=16), candidates)
        assert torch.equal(layer.weight_quantizer(layer.weight) - weight, error)
        assert layer.input_quantizer.bits == 4
        noise = DifferentialWeightNoise(network, 3, candidates=candidates)
        noise.measure()
        index = [w is network.blocks[0].conv2.weight for w in noise.weights].index(True)
        torch.testing.assert_close(getattr(noise, f"mean{index}"), error.mean((1, 2, 3)))
    built = {}
    for kind in ("DifferentialWeightNoise", "ActivationNoise"):
        original = getattr(flat_quant, kind)
        monkeypatch.setattr(flat_quant, kind, lambda *a, original=original, **k: built.setdefault(
            original.__name__, original(*a, **k)))
    flat_quant.train(parse("--ptq", "minmax"), tiny_data, "weight+activation", 0)
    assert [noise.candidates for noise in built.values()] == [1, 1]


def test_ptq_fits_the_inputs_that_evaluation_will_meet(parse, tiny_data, network):
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.fill_(0.01)  # so that by running statistics inputs are much larger
    images = tiny_data.sample(100)[0]
    exact = network.eval()(images)
    error = flat_quant.ptq(parse(), tiny_data, network, 8, 8)(images) - exact
    assert error.norm() < 0.1 * exact.norm()


def test_bits_beside_the_recipe_win(parse):
    args = parse("--recipe", "paper", "--bits", "5")
    assert (args.wbits, args.abits, args.model) == (5, 5, "resnet18")
    args = parse("--recipe", "paper", "--abits", "3")
    assert (args.wbits, args.abits) == (2, 3)


def test_vit_shapes_and_that_every_product_is_quantized(tiny_data):
    torch.manual_seed(0)
    model = common.build_model("vit_tiny", 10, depth=2)
    images = tiny_data.sample(16)[0]
    assert model(images).shape == (16, 10)
    quantized = common.quantize(model, 4, 4)
    common.calibrate(quantized, images)
    kinds = [type(m).__name__ for m in quantized.modules()]
    assert kinds.count("QuantLinear") == 2 * 6 + 1 and kinds.count("QuantProduct") == 2 * 2
    assert not {"Linear", "Conv2d", "Product"} & set(kinds)
    bits = [layer.input_quantizer.bits for layer in common.product_layers(quantized).values()]
    assert bits == [8] + [4] * 12 + [8]
    block = quantized.blocks[0]
    assert block.attention.q.input_quantizer.zero_point > 0  # layer norm: signed
    assert block.fc2.input_quantizer.zero_point > 0  # GELU: asymmetric
    assert block.attention.mix.a_quantizer.zero_point == 0  # softmax: unsigned
    quantized(images).sum().backward()
    steps = [p for name, p in quantized.named_parameters() if name.endswith(".step")]
    assert len(steps) == 2 * 14 + 2 * 4 and all(p.grad is not None for p in steps)


def run_main(monkeypatch, tmp_path, script, *flags):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--dry-run", "--dataset", "shapes",
                                      "--out", str(tmp_path), *flags])
    common.entry(script.main)
    written = (tmp_path / "dry-run/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in written]


def test_study_as_a_user_runs_it(monkeypatch, capsys, tmp_path):
    assert all(flat_quant.pieces(method) == method for method in flat_quant.STUDY)
    monkeypatch.setattr(flat_quant, "STUDY", ["sgd", "wrong-bits", "sam"])
    lines = run_main(monkeypatch, tmp_path, flat_quant, "--study", "--measure", "--wbits", "3",
                     "--abits", "3")
    out = capsys.readouterr().out
    methods = [*flat_quant.STUDY, "weight+activation"]
    assert len(lines) == 4 * 2 * (1 + 2) and "nan" not in out
    assert {x["method"] for x in lines} == {m + s for m in methods for s in ("", "+swa")}
    assert "rank correlation" in out and "corr(dW, W)" in out and "W3A3" in out and "W8A8" in out


@pytest.mark.parametrize("name", ["fpq", "cr_qat", "mec_quant", "flat_quant"])
def test_vit_runs_in_every_script(monkeypatch, tmp_path, name):
    lines = run_main(monkeypatch, tmp_path, __import__(name), "--model", "vit_tiny", "--depth", "1",
                     "--bits", "4")
    assert len(lines) >= 3 and all(np.isfinite(x["test_loss"]) for x in lines)


@pytest.mark.parametrize("method", ["weight+additive", "noise", "sgd+"])
def test_unknown_pieces_are_refused(monkeypatch, capsys, tmp_path, method):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path, flat_quant, "--method", method)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "joined" in err.replace("join ", "joined ")
    assert len(err.splitlines()) == 1
