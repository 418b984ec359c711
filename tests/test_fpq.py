"""FPQ's equations against closed forms, its first step by hand; the figures of all scripts."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Permute

import common
import fpq
from conftest import (
    close,
    draw_shapes,
    first_batch,
    first_step,
    gradients,
    learned,
    normal,
    same,
    student_of,
    tiny_network,
)


def test_eq9_noise_is_uniform_one_step_size_wide_and_a_constant_to_the_gradient():
    torch.manual_seed(0)
    x = torch.full((200_000,), 3.0, dtype=torch.float64, requires_grad=True)
    step_size = torch.tensor(0.4, requires_grad=True)
    out = fpq.stochastic_feature_perturbation(x, step_size, 1.0)
    out.sum().backward()
    assert x.grad.eq(1).all()
    assert step_size.grad is None
    delta = (out - x).detach()
    assert 0.1999 < delta.max() <= 0.2
    assert delta.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)


def test_eq14_one_coin_for_the_whole_tensor():
    torch.manual_seed(0)
    x = torch.zeros(50)
    hits = 0
    for _ in range(2000):
        out = fpq.stochastic_feature_perturbation(x, torch.tensor(1.0), 0.3)
        assert out is x or (out != x).all()
        hits += out is not x
    assert 0.26 < hits / 2000 < 0.34  # four standard deviations


def standardized(z):
    """Eq. 15 in float64, by torch's own variance."""
    others = (0, *range(2, z.dim()))
    variance, mean = torch.var_mean(
        z.double(), others, correction=0, keepdim=True)
    return (z - mean) / (variance + 1e-5).sqrt()


def test_eq15_standardize():
    for shape in [(6, 3, 4, 5), (12, 4), (3, 2, 7)]:
        z = 3e-3 * normal(*shape).double() + 5  # of a variance near eps
        close(fpq.standardize(z), standardized(z))


def test_eq17_csd_is_the_mean_over_elements_then_layers():
    z = torch.tensor([1.0, -1.0])[:, None].expand(2, 5)
    student = [z, z[:, :1]]  # a layer of five channels, and one of one
    teacher = [3 * z + 7, -z[:, :1]]
    loss = fpq.csd_loss(student, teacher)
    assert loss.item() == pytest.approx((0 + 4) / 2, rel=1e-4)


@pytest.mark.parametrize("ratio", [1, 30, 1000])
def test_eq17_csd_in_float32_is_that_of_float64(ratio):
    """Of channels whose mean is `ratio` standard deviations; never above 4."""
    student = (ratio + normal(32, 3, 8, 8)).requires_grad_()
    teacher = 0.5 * student.detach() + normal(32, 3, 8, 8, seed=2)
    exact = student.detach().double().requires_grad_()
    loss = fpq.csd_loss([student], [teacher])
    loss.backward()
    difference = standardized(exact) - standardized(teacher)
    expected = difference.square().mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    error = student.grad - exact.grad
    assert error.norm() < 1e-3 * exact.grad.norm()
    nearly_constant = ratio + 1e-4 * normal(32, 3, 8, 8)
    for z in (teacher, nearly_constant):
        assert fpq.csd_loss([z], [-z]) <= 4


@pytest.mark.parametrize("noise_at", ["operand", "input", "weight"])
def test_eq16_a_layer_left_in_full_precision_gets_no_noise(noise_at):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode) for mode in ("zeros", "reflect")]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 2))
    with pytest.warns(UserWarning, match="left in full precision: 1.weight"):
        student = common.quantize(network, 2, 2)
    x = normal(4, 3, 4, 4)
    common.calibrate(student, x)
    with fpq.perturbed(student, 1.0, noise_at):
        noisy = student[0](x)
        assert not torch.equal(noisy, student[0](x))
        same(student[1](noisy), student[1](noisy))


def test_eq16_noise_meets_inputs_or_weights_of_all_layers_but_the_classifier(
        monkeypatch, tiny_data):
    """Behind the input quantizer, before it, or on the weight; both factors of products."""
    student = common.quantize(common.build_model("vit_tiny", 10, depth=1), 2, 2)
    common.calibrate(student, tiny_data.sample(4)[0], candidates=2)
    monkeypatch.setattr(
        fpq, "stochastic_feature_perturbation", lambda x, s, p: x + 0.3 * p * s)
    for name, quantizer in common.quantizers_of(student).items():
        x = quantizer.step_size.reshape(-1, 1) * torch.linspace(-3, 3, 50)
        step_size, _ = quantizer.grid(x)
        clean = quantizer(x)
        shifted = clean + 0.3 * step_size
        expected = {
            "operand": shifted,
            "input": quantizer(x + 0.3 * step_size),
            "weight": clean,
        }
        if "weight_quantizer" in name:
            expected = {"operand": clean, "input": clean, "weight": shifted}
        for noise_at, value in expected.items():
            with fpq.perturbed(student, 1.0, noise_at):
                noisy = quantizer(x)
            close(noisy, clean if "heads" in name else value)
        same(quantizer(x), clean)  # only in the context


def test_layer_outputs_have_their_channels_in_dimension_1():
    """The layer tells which those are, not the number of dimensions; no classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        Permute([0, 2, 3, 1]),
        nn.Linear(4, 6),
        nn.Flatten(),
        nn.Linear(24, 2),
    )
    images = normal(5, 3, 2, 2)
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
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="in place"):
        with fpq.layer_outputs(model):
            model(normal(5, 3))


@pytest.mark.parametrize("method", fpq.METHODS)
def test_eq22_first_step_by_hand(parse, tiny_data, method):
    """Gradients of CE + weighted CSD; kd: CE + weighted T^2 KL; sam: CE at w + rho g / |g|."""
    args = parse(
        "fpq",
        "--p 1 --noise-at input --csd-weight 0.6 --wbits 3 --abits 4",
        "--kd-weight 0.7 --kd-temperature 3 --sam-rho 0.3",
    )
    network = tiny_network()
    seen = first_step(fpq.train, args, tiny_data, method, 0, network)
    student, (images, labels) = first_batch(network, tiny_data, args, "crop+flip")
    p = 1.0 if method in ("sfp", "fpq") else 0.0
    with fpq.perturbed(student, p, "input"):
        with fpq.layer_outputs(student) as z:
            logits = student(images)
    with fpq.layer_outputs(network) as z_fp:
        target = network(images).detach()
    loss = F.cross_entropy(logits, labels)
    if method in ("csd", "fpq"):
        loss = loss + 0.6 * fpq.csd_loss(z, z_fp)
    if method == "kd":
        q = (target / 3).softmax(1)
        kl = q * (q.log() - (logits / 3).log_softmax(1))
        loss = loss + 0.7 * 3**2 * kl.sum(1).mean()
    grads = gradients(student, loss)
    if method == "sam":
        scale = 0.3 / nn.utils.get_total_norm(grads)
        for w, g in zip(learned(common.sgd(student, 1, 0)), grads):
            w.data += scale * g
        loss = F.cross_entropy(student(images), labels)
        grads = gradients(student, loss)
    close(seen, grads, rtol=1e-4, atol=1e-6)


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """Fig. 2: the gradient's norm; Fig. 5: the Hessian's trace; the ratio of the gradients."""
    args = parse("fpq", "--p 1")
    network = tiny_network()
    student = student_of(network, tiny_data)
    images, labels = tiny_data.sample(256)
    gradient = []
    for method in (fpq.fpq, fpq.sfp):
        torch.manual_seed(0)
        loss = method(student, network, images, labels, args)
        weights = [layer.weight for layer in common.weight_layers(student).values()]
        gradient.append(common.gradient_of(loss, weights))
    both, own = gradient
    ratio = (both - own).norm() / own.norm()
    found = fpq.measure_epoch(args, tiny_data, "fpq", student, network)
    assert found["gradient"] == pytest.approx(both.norm().item(), rel=1e-4)
    assert found["ratio"] == pytest.approx(ratio.item(), rel=1e-4)
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
        found = fpq.second_layer_input(model, images)
        same(found, expected.detach().permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("name, figures", [
    ("fpq", ["gradient", "trace", "ratio"]),
    ("cr_qat", ["changed", "trace", "ratio"]),
    ("mec_quant", ["ratio", "series"]),
    ("flat_quant", []),
])
def test_all_methods_and_figures_as_a_user_runs_them(
        name, figures, run, tmp_path, monkeypatch):
    """The diagnosis changes no bit. What a run without it lacks is "not recorded".

    The learning rate of quantization-aware training is a cosine over all epochs.
    """
    rates = []
    set_rate = common.set_rate
    monkeypatch.setattr(
        common, "set_rate", lambda *call: rates.append(call[1]) or set_rate(*call))
    monkeypatch.setattr(common, "draw_shapes", lambda: draw_shapes(64, 64))
    flags = "--ablate --dataset shapes --fp-epochs 2 --bits 3"
    if name != "flat_quant":
        flags += " --epochs 2 --lr 0.03"
    plain = tmp_path / "plain"
    diagnosed = tmp_path / "diagnosed"
    run(name, flags, "--out", plain)
    done = run(name, flags, "--diagnose --out", diagnosed)
    again = run(name, flags, "--diagnose --out", plain)
    assert "nan" not in done.out
    assert not figures or rates[-2:] == pytest.approx([0.03, 0.015])
    methods = importlib.import_module(name).METHODS
    for method in methods:
        file, = plain.glob(f"{method}-resnet8-*.pt")
        parts = []
        for folder in (plain, diagnosed):
            state = common.read_checkpoint(folder / file.name)
            history = state["history"]
            losses = [epoch["eval_loss"] for epoch in history]
            parts.append([state["model"], losses])
        same(*parts)
        assert set(figures) <= history[1].keys()
    missing = 2 * len(methods) * len(figures)
    assert again.out.count("not recorded") == missing
