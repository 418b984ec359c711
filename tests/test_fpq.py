"""FPQ's equations against closed forms, its first step by hand, all its methods as a user's run."""

import importlib
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

import common
import fpq
from conftest import first_step
from fpq import stochastic_feature_perturbation

close = torch.testing.assert_close
same = partial(close, rtol=0, atol=0)  # bit for bit

# What the tests of CR and MEC-Quant use, too.


def tiny_network():
    torch.manual_seed(0)
    return nn.Sequential(Conv2dNormActivation(3, 4, 3, 4), Conv2dNormActivation(4, 4, 3),
                         Conv2dNormActivation(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10)).eval()


def student_of(network, data):
    """What `train` starts from, in training mode."""
    student = common.quantize(network, 2, 2)
    common.calibrate(student, data.sample(100)[0])
    return student.train()


def first_batch(data, *views):
    """The images and labels of the first step of `train`; its noise comes next."""
    stream = partial(common.random_stream, "method")
    torch.manual_seed(stream("noise", 0, 0))
    return next(data.batches(32, torch.Generator().manual_seed(stream("batches", 0, 0)), views))


def gradients(student, loss):
    """In the order of `first_step`."""
    groups = common.sgd(student, 1, 0).param_groups
    return [*torch.autograd.grad(loss, [p for g in groups for p in g["params"]
                                        if p.requires_grad])]


def check_strengths(parse, data, script, flags, zero):
    """All methods differ, {method: flags} of `zero` equal the baseline bit for bit, and none
    changes the full-precision network."""
    module, network = importlib.import_module(script), tiny_network()

    def trained(method, flags):  # 4 steps, as CR's average differs from the student after two
        args = parse(script, "--batch-size", "16", *flags.split())
        return dict(module.train(args, data, method, 0, network)[0].state_dict())

    methods = {method: trained(method, flags) for method in module.METHODS}
    assert len({state["5.weight"].sum().item() for state in methods.values()}) == len(methods)
    for method, off in zero.items():
        same(trained(method, off), methods["baseline"])
    same(dict(network.state_dict()), dict(tiny_network().state_dict()))


def record_forces(monkeypatch):
    """A list that all gradient ratios are appended to; the networks and samples become tiny."""
    forces, ratio, sample = [], common.gradient_ratio, common.Data.sample
    monkeypatch.setattr(common, "build_model", lambda *_: tiny_network())
    monkeypatch.setattr(common.Data, "sample", lambda data, count: sample(data, 8))
    monkeypatch.setattr(
        common, "gradient_ratio", lambda *terms: forces.append(ratio(*terms)) or forces[-1])
    return forces


def test_eq9_noise_is_uniform_one_step_size_wide_and_a_constant_to_the_gradient():
    x = torch.full((200_000,), 3.0, dtype=torch.float64, requires_grad=True)
    step_size, rng = torch.tensor(0.4, requires_grad=True), torch.Generator().manual_seed(0)
    out = stochastic_feature_perturbation(x, step_size, 1.0, rng)
    to_x, to_step_size = torch.autograd.grad(out.sum(), (x, step_size), allow_unused=True)
    assert to_x.eq(1).all() and to_step_size is None
    delta = (out - x).detach()
    assert 0.1999 < delta.abs().max() <= 0.2
    assert delta.mean().abs() < 4 * 0.4 / 12**0.5 / 200_000**0.5
    assert delta.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)


def test_eq14_one_coin_for_the_whole_tensor():
    x, hits, rng = torch.zeros(50), 0, torch.Generator().manual_seed(0)
    for _ in range(2000):
        out = stochastic_feature_perturbation(x, torch.tensor(1.0), 0.3, rng)
        assert out is x or (out != x).all()
        hits += out is not x
    assert abs(hits / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (12, 4), (3, 2, 7)])
def test_eq15_standardize(shape):
    z = torch.randn(shape, dtype=torch.float64) * 3e-3 + 5  # of a variance near eps
    over = [i for i in range(len(shape)) if i != 1]
    var, mean = torch.var_mean(z, over, correction=0, keepdim=True)
    close(fpq.standardize(z), (z - mean) / (var + 1e-5).sqrt())


def test_eq16_distance_is_that_of_standardized_copies_and_two_minus_two_r():
    z = 0.1 * torch.randn(6, 3, 4, 5, dtype=torch.float64) + 1
    teacher = 0.05 * torch.randn_like(z) + 0.5 * z
    z = z.contiguous(memory_format=torch.channels_last).requires_grad_()
    mine = fpq.channel_distance(z, teacher, eps=1e-2)
    explicit = (fpq.standardize(z, 1e-2) - fpq.standardize(teacher, 1e-2)).square().mean()
    close(mine, explicit)
    close(*(torch.autograd.grad(3 * y, z)[0] for y in (mine, explicit)))
    r = (fpq.standardize(z, 1e-15) * fpq.standardize(teacher, 1e-15)).mean()  # over channels
    close(fpq.channel_distance(z, teacher, eps=0), 2 - 2 * r)


def test_eq17_csd_is_the_mean_over_elements_then_over_layers():
    z = torch.tensor([[1.0], [-1.0]]).expand(2, 5)[..., None]  # one layer of 5 channels, one of 1
    student, teacher = [z, z[:, :1]], [z, -z[:, :1]]
    assert fpq.csd_loss(student, teacher).item() == pytest.approx((0 + 4) / 2, rel=1e-4)
    assert fpq.csd_loss(teacher, [3 * t + 7 for t in teacher]).item() == pytest.approx(0, abs=1e-4)


def test_csd_of_constant_channels_is_finite():
    student = torch.linspace(0, 1e3, 9)[:, None] + 1e-3 * torch.randn(8, 9, 16)
    loss = fpq.csd_loss([student.requires_grad_()], [torch.randn(8, 9, 16)])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("noise_at", ["operand", "input", "weight"])
def test_eq16_noise_meets_the_factors_of_products_and_all_inputs_but_the_classifiers(
        tiny_data, noise_at):
    """It is behind the quantizer, so off its grid, or before it, and never outside the context; or
    on the quantized weights of these layers."""
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
    ("baseline", ""), ("sfp", ""), ("sfp", "--noise-at input"), ("csd", ""), ("fpq", ""),
    ("kd", ""), ("kd", "--kd-weight 0.7 --kd-temperature 3"), ("sam", "--sam-rho 0.3")])
def test_eq22_first_step_by_hand(monkeypatch, parse, tiny_data, method, flags):
    """Gradients of cross-entropy plus weighted CSD or, with kd, plus T^2 KL of the logits; with sam
    of the cross-entropy at w + rho g / |g|."""
    args = parse("fpq", *f"--p 1 --csd-weight 0.6 {flags}".split())
    network = tiny_network()
    seen = first_step(monkeypatch, fpq.train, args, tiny_data, method, 0, network)
    student = student_of(network, tiny_data)
    images, labels = first_batch(tiny_data, "crop+flip")
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
        learned = [p for g in common.sgd(student, 1, 0).param_groups for p in g["params"]
                   if p.requires_grad]
        norm = nn.utils.get_total_norm(grads)
        torch._foreach_add_([p.detach() for p in learned], [0.3 * g / norm for g in grads])
        grads = gradients(student, F.cross_entropy(student(images), labels))
    close(seen, grads, rtol=1e-4, atol=1e-6)


def test_methods_of_no_strength_are_the_baseline_bit_for_bit(parse, tiny_data):
    check_strengths(parse, tiny_data, "fpq", "--p 1", {
        "sfp": "--p 0", "csd": "--csd-weight 0", "fpq": "--p 0 --csd-weight 0",
        "kd": "--kd-weight 0", "sam": "--sam-rho 0"})


def test_gradient_ratio_by_hand():
    """Over the weights of all layers but no bias; a layer that a loss does not meet counts 0."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    (a, b), c, bias = model[0].weight[0], model[1].weight.sum(), model[0].bias.sum()
    for scale in (1, 7):
        term = scale * (3 * a + 4 * b + 9 * bias)
        ratio = common.gradient_ratio(term, 6 * a + 8 * c + 9 * bias, model)
        assert ratio == pytest.approx(scale * 5 / 10)


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


def test_all_methods_and_figures_as_a_user_runs_them(run, monkeypatch):
    """The printed force is that of each added term."""
    forces = record_forces(monkeypatch)
    flags = "--dry-run --dataset shapes --ablate --diagnose --wbits 3 --abits 4"
    done = run("fpq", *flags.split())
    assert [row["method"] for row in done.results] == ["fp", *fpq.METHODS]
    assert all((row["wbits"], row["abits"]) == (3, 4) for row in done.results[1:])
    assert all(f"Fig. {i}" in done.out for i in range(1, 6)) and "nan" not in done.out
    assert len(forces) == 3 and min(forces) > 0.01
    assert all(f"; {force:.2f}" in done.out for force in forces)
