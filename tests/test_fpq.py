"""FPQ's equations against closed forms, its first step by hand, all its methods as a user's run."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import fpq
from conftest import (SHAPES, close, first_step_by_script, gradients, learned, normal, same,
                      student_of, tiny_network)


def test_eq9_noise_is_uniform_one_step_size_wide_and_a_constant_to_the_gradient():
    x = torch.full((200_000,), 3.0, dtype=torch.float64, requires_grad=True)
    step_size, rng = torch.tensor(0.4, requires_grad=True), torch.Generator().manual_seed(0)
    out = fpq.stochastic_feature_perturbation(x, step_size, 1.0, rng)
    to_x, to_step_size = torch.autograd.grad(out.sum(), (x, step_size), allow_unused=True)
    assert to_x.eq(1).all() and to_step_size is None
    delta = (out - x).detach()
    assert 0.1999 < delta.abs().max() <= 0.2
    assert delta.mean().abs() < 4 * 0.4 / 12**0.5 / 200_000**0.5
    assert delta.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)


def test_eq14_one_coin_for_the_whole_tensor():
    x, hits, rng = torch.zeros(50), 0, torch.Generator().manual_seed(0)
    for _ in range(2000):
        out = fpq.stochastic_feature_perturbation(x, torch.tensor(1.0), 0.3, rng)
        assert out is x or (out != x).all()
        hits += out is not x
    assert abs(hits / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (12, 4), (3, 2, 7)])
def test_eq15_standardize_and_the_distance_of_standardized_copies(shape):
    z = (3e-3 * normal(*shape).double() + 5).requires_grad_()  # of a variance near eps
    teacher = (0.5 * z + 1e-3 * normal(*shape, seed=2)).detach()
    var, mean = torch.var_mean(z, (0, *range(2, z.dim())), correction=0, keepdim=True)
    close(fpq.standardize(z), (z - mean) / (var + 1e-5).sqrt())
    mine = fpq.channel_distance(z, teacher)
    explicit = (fpq.standardize(z) - fpq.standardize(teacher)).square().mean()
    close(mine, explicit)
    close(*(torch.autograd.grad(3 * y, z)[0] for y in (mine, explicit)))


def test_eq17_csd_is_the_mean_over_elements_then_layers_and_finite_if_channels_are_constant():
    z = torch.tensor([[1.0], [-1.0]]).expand(2, 5)[..., None]  # one layer of 5 channels, one of 1
    student, teacher = [z, z[:, :1]], [z, -z[:, :1]]
    assert fpq.csd_loss(student, teacher).item() == pytest.approx((0 + 4) / 2, rel=1e-4)
    assert fpq.csd_loss(teacher, [3 * t + 7 for t in teacher]).item() == pytest.approx(0, abs=1e-4)
    student = torch.linspace(0, 1e3, 9)[:, None] + 1e-3 * torch.randn(8, 9, 16)
    loss = fpq.csd_loss([student.requires_grad_()], [torch.randn(8, 9, 16)])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("noise_at", ["operand", "input", "weight"])
def test_eq16_noise_meets_the_factors_of_products_and_all_inputs_but_the_classifiers(
        tiny_data, noise_at):
    """Behind the quantizer, so off its grid, before it, or on the weights; only in the context."""
    torch.manual_seed(0)
    student = common.quantize(common.build_model("vit_tiny", 10, depth=1), 2, 2)
    common.calibrate(student, tiny_data.sample(4)[0], candidates=2)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, common.Quantizer)}

    def outputs():
        return {name: q(q.step_size.reshape(-1, 1) * torch.linspace(-3, 3, 500)).detach()
                for name, q in quantizers.items()}
    clean = outputs()
    with fpq.perturbed(student, 1.0, noise_at):
        noisy = outputs()
    same(outputs(), clean)
    kind = "weight_quantizer" if noise_at == "weight" else "input_quantizer"
    expected = {f"{name}.{kind}" for name in [*common.weight_layers(student)][:-1]}
    if noise_at != "weight":
        expected |= {name for name in clean if re.search("[ab]_quantizer$", name)}
    assert {name for name in clean if not torch.equal(clean[name], noisy[name])} == expected
    for name in expected:
        levels = noisy[name] / quantizers[name].grid(noisy[name])[0].detach()
        assert torch.allclose(levels, levels.round(), atol=1e-3) == (noise_at == "input")


def test_layer_outputs_are_those_of_all_layers_but_the_classifier_while_it_lasts(tiny_data):
    for model in (tiny_network(), common.build_model("vit_tiny", 10, depth=1)):
        seen, layers = [], common.weight_layers(model).values()
        with common.hooked(layers, after=lambda layer, _, z: seen.append(z)):
            with fpq.layer_outputs(model) as outputs:
                model(tiny_data.sample(4)[0])
            model(tiny_data.sample(4)[0])
        tokens_last = [z.movedim(1, -1) if z.dim() == 3 else z for z in outputs]
        same(tokens_last, seen[:len(layers) - 1])


@pytest.mark.parametrize("method,flags", [
    ("baseline", ""), ("sfp", "--noise-at input"), ("csd", ""), ("fpq", ""),
    ("kd", ""), ("kd", "--kd-weight 0.7 --kd-temperature 3"), ("sam", "--sam-rho 0.3")])
def test_eq22_first_step_by_hand(parse, tiny_data, method, flags):
    """Gradients of CE + weighted CSD; kd: CE + weighted T^2 KL; sam: CE at w + rho g / |g|."""
    args = parse("fpq", "--p 1 --csd-weight 0.6 --wbits 3 --abits 4", flags)
    seen, network, student, (images, labels) = first_step_by_script(
        fpq.train, args, tiny_data, method, "crop+flip")
    with fpq.perturbed(student, method in ("sfp", "fpq"), args.noise_at):
        with fpq.layer_outputs(student) as z:
            logits = student(images)
    with fpq.layer_outputs(network) as z_fp:
        target = network(images).detach()
    loss = F.cross_entropy(logits, labels)
    if method in ("csd", "fpq"):
        loss = loss + 0.6 * fpq.csd_loss(z, z_fp)
    if method == "kd":
        weight, T = (0.7, 3) if flags else (1, 4)
        q = (target / T).softmax(1)
        kl = (q * (q.log() - (logits / T).log_softmax(1))).sum(1).mean()
        loss = loss + weight * T**2 * kl
    grads = gradients(student, loss)
    if method == "sam":
        norm = nn.utils.get_total_norm(grads)
        for p, g in zip(learned(common.sgd(student, 1, 0)), grads):
            p.data += 0.3 * g / norm
        grads = gradients(student, F.cross_entropy(student(images), labels))
    close(seen, grads, rtol=1e-4, atol=1e-6)


def test_gradient_ratio_by_hand():
    """Over the weights of all layers but no bias; a layer that a loss does not meet counts 0."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    (a, b), c, bias = model[0].weight[0], model[1].weight.sum(), model[0].bias.sum()
    term = 21 * a + 28 * b + 9 * bias
    ratio = common.gradient_ratio(term, 6 * a + 8 * c + 9 * bias, model)
    assert ratio == pytest.approx(35 / 10)


def test_figures_by_hand(parse, tiny_data):
    """Fig. 1: sigma^2, where the logits are the pixels. Fig. 3, 4: what the second layer sees. Fig.
    2: the gradient of the only step, of all layers but the classifier."""
    images, _ = tiny_data.sample(256)
    expected = 0.3**2 / images.flatten(1).var(0).mean().item()
    assert fpq.output_variance(nn.Flatten(), images, 0.3) == pytest.approx(expected, rel=0.01)
    network = tiny_network()
    student = student_of(network, tiny_data).eval()
    x = network[0](images)
    same(fpq.relu_output(network, images), x.detach().permute(0, 2, 3, 1).reshape(-1, 4))
    x_hat = student[1][0].input_quantizer(student[0](images)).detach()
    same(fpq.relu_output(student, images), x_hat.permute(0, 2, 3, 1).reshape(-1, 4))
    args = parse("fpq", "--diagnose")
    args.batch_size = 64
    student, result, history = fpq.train(args, tiny_data, "fpq", 0, network)
    grads = [layer.weight.grad for layer in common.weight_layers(student).values()][:-1]
    assert history[-1]["gradient"] == nn.utils.get_total_norm(grads)  # the mean over one step
    assert result["history"] == history
    tokens = common.build_model("vit_tiny", 10, depth=1)
    assert fpq.relu_output(tokens, images[:2]).shape == (2 * 65, 192)


def test_all_methods_and_figures_as_a_user_runs_them(run, forces):
    """The printed force is that of each added term."""
    done = run("fpq", SHAPES, "--ablate --diagnose --wbits 3 --abits 4")
    assert [row["method"] for row in done.results] == ["fp", *fpq.METHODS]
    assert all((row["wbits"], row["abits"]) == (3, 4) for row in done.results[1:])
    assert all(f"Fig. {i}" in done.out for i in range(1, 6)) and "nan" not in done.out
    assert len(forces) == 3 and min(forces) > 0.01
    assert all(f"; {force:.2f}" in done.out for force in forces)
