"""FPQ's equations against closed forms, its first step by hand, all its figures."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Permute

import common
import fpq
from conftest import (SHAPES, close, first_batch, first_step, gradients, learned, normal, same,
                      student_of, tiny_network)


def test_eq9_noise_is_uniform_one_step_size_wide_and_a_constant_to_the_gradient():
    draws = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 3.0, dtype=torch.float64, requires_grad=True)
    step_size = torch.tensor(0.4, requires_grad=True)
    out = fpq.stochastic_feature_perturbation(x, step_size, 1.0, draws)
    out.sum().backward()
    assert x.grad.eq(1).all()
    assert step_size.grad is None
    delta = (out - x).detach()
    assert 0.1999 < delta.abs().max() <= 0.2
    assert delta.mean().abs() < 1e-3  # four standard errors
    assert delta.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)


def test_eq14_one_coin_for_the_whole_tensor():
    draws = torch.Generator().manual_seed(0)
    x = torch.zeros(50)
    hits = 0
    for _ in range(2000):
        out = fpq.stochastic_feature_perturbation(x, torch.tensor(1.0), 0.3, draws)
        assert out is x or (out != x).all()
        hits += out is not x
    assert abs(hits / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def standardized(z):
    """Eq. 15 in float64, by torch's own variance."""
    others = (0, *range(2, z.dim()))
    variance, mean = torch.var_mean(z.double(), others, correction=0, keepdim=True)
    return (z - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (12, 4), (3, 2, 7)])
def test_eq15_standardize(shape):
    z = 3e-3 * normal(*shape).double() + 5  # of a variance near eps
    close(fpq.standardize(z), standardized(z))


def test_eq17_csd_is_the_mean_over_elements_then_layers():
    z = torch.tensor([1.0, -1.0])[:, None].expand(2, 5)
    student = [z, z[:, :1]]  # a layer of five channels, and one of one
    teacher = [z, -z[:, :1]]
    assert fpq.csd_loss(student, teacher).item() == pytest.approx((0 + 4) / 2, rel=1e-4)
    scaled = [3 * t + 7 for t in teacher]
    assert fpq.csd_loss(teacher, scaled).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("ratio", [1, 30, 1000])
def test_eq17_csd_in_float32_is_that_of_float64(ratio):
    """Of channels whose mean is `ratio` standard deviations; never above 4."""
    student = (ratio + normal(32, 3, 8, 8)).requires_grad_()
    teacher = 0.5 * student.detach() + normal(32, 3, 8, 8, seed=2)
    exact = student.detach().double().requires_grad_()
    loss = fpq.csd_loss([student], [teacher])
    expected = (standardized(exact) - standardized(teacher)).square().mean()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (student.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()
    for scale in (1, 1e-3, 1e-5):  # down to channels that rounding makes constant
        z = ratio + scale * normal(32, 3, 8, 8)
        assert 0 <= fpq.csd_loss([z], [-z]) <= 4


@pytest.mark.parametrize("noise_at", ["operand", "input", "weight"])
def test_eq16_noise_meets_all_layers_but_the_classifier_and_both_factors_of_products(
        tiny_data, noise_at):
    """Behind the input quantizer, so off its grid, before it, or on the weights."""
    torch.manual_seed(0)
    student = common.quantize(common.build_model("vit_tiny", 10, depth=1), 2, 2)
    common.calibrate(student, tiny_data.sample(4)[0], candidates=2)
    quantizers = common.quantizers_of(student)

    def outputs():
        found = {}
        for name, quantizer in quantizers.items():
            x = quantizer.step_size.reshape(-1, 1) * torch.linspace(-3, 3, 500)
            found[name] = quantizer(x).detach()
        return found

    clean = outputs()
    with fpq.perturbed(student, 1.0, noise_at):
        noisy = outputs()
    same(outputs(), clean)  # only in the context
    kind = "weight_quantizer" if noise_at == "weight" else "input_quantizer"
    layers = list(common.weight_layers(student))
    expected = {f"{name}.{kind}" for name in layers[:-1]}
    if noise_at != "weight":
        expected |= {name for name in clean if re.search("[ab]_quantizer$", name)}
    assert {name for name in clean if not torch.equal(clean[name], noisy[name])} == expected
    for name in expected:
        step_size, _ = quantizers[name].grid(noisy[name])
        levels = (noisy[name] / step_size).detach()
        on_grid = torch.allclose(levels, levels.round(), atol=1e-3)
        assert on_grid == (noise_at == "input")


def test_layer_outputs_have_their_channels_in_dimension_1():
    """The layer tells which those are, not the number of dimensions; no classifier."""
    images = normal(5, 3, 2, 2)
    last = [Permute([0, 2, 3, 1]), nn.Linear(4, 6), nn.Flatten(), nn.Linear(24, 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *last)
    quantized = common.quantize(model, 8, 8)
    common.calibrate(quantized, images)
    for network in (model, quantized):
        with fpq.layer_outputs(network) as outputs:
            network(images)
        network(images)  # outside the context
        assert len(outputs) == 2
        same(outputs[0], network[0](images))
        same(outputs[1].movedim(1, -1), network[:3](images))


def test_layer_outputs_refuse_an_activation_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(RuntimeError, match="in place"), fpq.layer_outputs(model):
        model(normal(5, 3, 2, 2))


@pytest.mark.parametrize("method, flags", [
    ("baseline", ""), ("sfp", "--noise-at input"), ("csd", ""), ("fpq", "--csd-weight 0.6"),
    ("kd", "--kd-weight 0.7 --kd-temperature 3"), ("sam", "--sam-rho 0.3")])
def test_eq22_first_step_by_hand(parse, tiny_data, method, flags):
    """Gradients of CE + weighted CSD; kd: CE + weighted T^2 KL; sam: CE at w + rho g / |g|."""
    args = parse("fpq", "--p 1 --wbits 3 --abits 4", flags)
    network = tiny_network()
    seen = first_step(fpq.train, args, tiny_data, method, 0, network)
    student, (images, labels) = first_batch(network, tiny_data, args, "crop+flip")
    p = 1.0 if method in ("sfp", "fpq") else 0.0
    with fpq.perturbed(student, p, args.noise_at), fpq.layer_outputs(student) as z:
        logits = student(images)
    with fpq.layer_outputs(network) as z_fp:
        target = network(images).detach()
    loss = F.cross_entropy(logits, labels)
    if method in ("csd", "fpq"):
        weight = 0.6 if flags else 1
        loss = loss + weight * fpq.csd_loss(z, z_fp)
    if method == "kd":
        q = (target / 3).softmax(1)
        kl = q * (q.log() - (logits / 3).log_softmax(1))
        loss = loss + 0.7 * 3**2 * kl.sum(1).mean()
    grads = gradients(student, loss)
    if method == "sam":
        norm = nn.utils.get_total_norm(grads)
        for p, g in zip(learned(common.sgd(student, 1, 0)), grads):
            p.data += 0.3 * g / norm
        grads = gradients(student, F.cross_entropy(student(images), labels))
    close(seen, grads, rtol=1e-4, atol=1e-6)


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """Fig. 2: |gradient| of the layers but the last; the ratio is of all; Fig. 5: the trace."""
    args = parse("fpq", "--p 1 --csd-weight 0.6")
    network = tiny_network()
    student = student_of(network, tiny_data)
    images, labels = tiny_data.sample(256)
    torch.manual_seed(0)
    with fpq.perturbed(student, 1.0), fpq.layer_outputs(student) as z:
        logits = student(images)
    with fpq.layer_outputs(network) as z_fp:
        network(images)
    weights = [layer.weight for layer in common.weight_layers(student).values()]
    term = 0.6 * fpq.csd_loss(z, z_fp)
    added = common.gradient_of(term, weights, retain_graph=True)
    own = common.gradient_of(F.cross_entropy(logits, labels), weights)
    found = fpq.figures_of_epoch(args, tiny_data, "fpq", student, network)
    gradient = (added + own)[:-weights[-1].numel()]
    assert found["gradient"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert found["ratio"] == pytest.approx((added.norm() / own.norm()).item(), rel=1e-4)
    assert found["trace"] == common.sharpness(student, tiny_data)


def test_fig1_is_sigma_squared_where_the_logits_are_the_pixels(tiny_data):
    images, _ = tiny_data.sample(256)
    expected = 0.3**2 / images.flatten(1).var(0).mean().item()
    assert fpq.output_variance(nn.Flatten(), images, 0.3) == pytest.approx(expected, rel=0.01)


def test_fig3_and_fig4_are_of_what_the_second_layer_multiplies(tiny_data):
    images, _ = tiny_data.sample(256)
    network = tiny_network()
    student = student_of(network, tiny_data).eval()
    x = network[0](images)
    x_hat = student[1][0].input_quantizer(student[0](images))
    for model, expected in ((network, x), (student, x_hat)):
        rows = expected.detach().permute(0, 2, 3, 1).reshape(-1, 4)
        same(fpq.relu_output(model, images), rows)
    tokens = common.build_model("vit_tiny", 10, depth=1)
    assert fpq.relu_output(tokens, images[:2]).shape == (2 * 65, 192)


def test_printed_figures_by_hand(capsys, tiny_data):
    network = tiny_network()
    fpq.diagnose(tiny_data, network, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    images, _ = tiny_data.sample(256)
    assert ["0.1", f"{fpq.output_variance(network, images, 0.1):.4f}"] in lines
    values = fpq.relu_output(network, images)
    channel = values[:, 2]
    assert ["2", f"{channel.mean():.2f}", f"{channel.max():.2f}"] in lines
    counts, edges = np.histogram(values, 12)
    shares = 100 * counts / values.numel()
    for low, share in zip(edges, shares):
        assert [f"{low:.2f}", f"{share:.1f}"] in lines


@pytest.mark.usefixtures("tiny_networks")
def test_all_methods_and_figures_as_a_user_runs_them(run):
    done = run("fpq", SHAPES, "--ablate --diagnose --wbits 3 --abits 4")
    trained = done.results[1:]
    assert [row["method"] for row in trained] == list(fpq.METHODS)
    assert all((row["wbits"], row["abits"]) == (3, 4) for row in trained)
    assert "nan" not in done.out
    assert all(f"Fig. {i}: " in done.out for i in range(1, 6))
    lines = [line.split() for line in done.out.splitlines()]
    epochs = [row["history"][0] for row in trained]
    for figure in ("gradient", "ratio"):
        assert ["1", *[f"{epoch[figure]:.3f}" for epoch in epochs]] in lines
    traces = ["{:.0f} ± {:.0f}".format(*epoch["trace"]) for epoch in epochs]
    assert ["1", *" ".join(traces).split()] in lines


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("script, columns", [
    ("fpq", 6), ("cr_qat", 6), ("mec_quant", 4), ("flat_quant", 0)])
def test_diagnosis_changes_nothing(script, columns, run, tmp_path):
    """The same bits with and without it. What a finished run lacks is "not recorded"."""
    flags = "--dataset shapes --train-size 64 --fp-epochs 2"
    if script != "flat_quant":
        flags += " --epochs 2"
    plain = tmp_path / "plain"
    run(script, flags, "--out", plain)
    run(script, flags, "--diagnose --out", tmp_path / "diagnosed")
    files = list(plain.glob("*.pt"))
    assert len(files) > 1
    for file in files:
        parts = []
        for folder in ("plain", "diagnosed"):
            state = common.read_checkpoint(tmp_path / folder / file.name)
            losses = [[epoch["loss"], epoch["eval_loss"]] for epoch in state["history"]]
            parts.append([state["model"], losses])
        same(*parts)
    again = run(script, flags, "--diagnose --out", plain)
    assert again.out.count("not recorded") == 2 * columns
