"""FPQ's equations against closed forms, its baseline bit for bit, every method as a dry run."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import fpq


def test_eq9_noise_is_uniform_one_step_wide():
    x, step = torch.full((200_000,), 3.0, dtype=torch.float64), torch.tensor(0.4)
    rng = torch.Generator().manual_seed(0)
    delta = fpq.stochastic_feature_perturbation(x, step, 1.0, rng) - x
    assert delta.abs().max() <= 0.2 and delta.abs().max() > 0.1999
    assert delta.mean().abs() < 4 * 0.4 / 12**0.5 / 200_000**0.5
    assert delta.var().item() == pytest.approx(0.4**2 / 12, rel=0.01)
    assert (delta.abs() < 0.1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_eq14_one_coin_for_the_whole_tensor():
    x, step, rng = torch.zeros(50), torch.tensor(1.0), torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(2000):
        out = fpq.stochastic_feature_perturbation(x, step, 0.3, rng)
        assert out is x or (out != x).all()
        hits += out is not x
    assert abs(hits / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert fpq.stochastic_feature_perturbation(x, step, 0.0) is x


def test_eq14_noise_is_a_constant_to_the_gradient():
    x, step = torch.randn(9).requires_grad_(), torch.tensor(0.5).requires_grad_()
    out = fpq.stochastic_feature_perturbation(x, step, 1.0)
    to_x, to_step = torch.autograd.grad(out.sum(), (x, step), allow_unused=True)
    assert to_x.eq(1).all() and to_step is None


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (12, 4), (3, 2, 7)])
def test_eq15_standardize(shape):
    z = torch.randn(shape, dtype=torch.float64) * 3 + 5
    over = tuple(i for i in range(len(shape)) if i != 1)
    zn = z.numpy()
    expected = (zn - zn.mean(over, keepdims=True)) / np.sqrt(zn.var(over, keepdims=True) + 1e-2)
    np.testing.assert_allclose(fpq.standardize(z, eps=1e-2).numpy(), expected, rtol=1e-10)
    zn = 1e-3 * zn  # where eps counts: 1e-5 unless given
    expected = (zn - zn.mean(over, keepdims=True)) / np.sqrt(zn.var(over, keepdims=True) + 1e-5)
    np.testing.assert_allclose(fpq.standardize(1e-3 * z).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("memory,scale", [(torch.contiguous_format, 2),
                                          (torch.channels_last, 0.05)])
def test_eq16_distance_equals_the_standardised_copies_and_two_minus_two_r(memory, scale):
    student = torch.randn(6, 3, 4, 5, dtype=torch.float64) * scale + 1
    student = student.contiguous(memory_format=memory)
    teacher = scale / 2 * torch.randn(6, 3, 4, 5, dtype=torch.float64) + 0.5 * student
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    mine = fpq.channel_distance(a, teacher, eps=1e-2)
    explicit = (fpq.standardize(b, 1e-2) - fpq.standardize(teacher, 1e-2)).square().mean()
    torch.testing.assert_close(mine, explicit)
    grads = (torch.autograd.grad(3 * y, x)[0] for y, x in ((mine, a), (explicit, b)))
    torch.testing.assert_close(*grads)
    r = [np.corrcoef(student[:, c].flatten(), teacher[:, c].flatten())[0, 1] for c in range(3)]
    assert fpq.channel_distance(student, teacher, eps=0).item() == pytest.approx(2 - 2 * np.mean(r))


def test_eq17_csd_is_the_mean_over_elements_then_over_layers():
    z = torch.tensor([[1.0], [-1.0]]).expand(2, 5)[..., None]  # one layer of 5 channels, one of 1
    student, teacher = [z, z[:, :1]], [z, -z[:, :1]]
    assert fpq.csd_loss(student, teacher).item() == pytest.approx((0 + 4) / 2, rel=1e-4)
    assert fpq.csd_loss(teacher, [3 * t + 7 for t in teacher]).item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError):
        fpq.csd_loss(student, teacher[:1])


@pytest.mark.parametrize("value", [0.0, 1e3])
def test_csd_of_a_constant_channel_is_finite(value):
    student = (value + 1e-3 * torch.randn(8, 2, 4, 4)).requires_grad_()
    loss = fpq.csd_loss([student], [torch.randn(8, 2, 4, 4)])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("flags,temperature", [({"temperature": 3.0}, 3), ({}, 4)])
def test_kd_loss_by_hand(flags, temperature):
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    q = (teacher[0] / temperature).softmax(0)
    expected = temperature**2 * (q * (q / 0.5).log()).sum()
    assert fpq.kd_loss(student, teacher, **flags).item() == pytest.approx(expected.item())
    assert fpq.kd_loss(teacher, teacher, **flags).item() == pytest.approx(0, abs=1e-6)


def test_eq16_noise_lands_behind_the_quantizer_or_before_it_and_in_training_only(
        calibrated, tiny_data):
    images = tiny_data.sample(8)[0]
    clean = calibrated.eval()(images)
    quantizer = calibrated.blocks[0].conv1.input_quantizer
    for place, on_grid in (("operand", False), ("input", True)):
        model = common.quantize(common.build_model("resnet8", 10), 2, 2)
        model.load_state_dict(calibrated.state_dict())
        fpq.attach_sfp(model, 1.0, place)
        assert torch.equal(model.eval()(images), clean)
        model.train()
        x = torch.linspace(-1, 3, 500)
        out = model.blocks[0].conv1.input_quantizer(x)
        assert not torch.equal(out, quantizer(x))
        levels = out.detach() / quantizer.step.detach()
        assert torch.allclose(levels, levels.round(), atol=1e-4) == on_grid


def test_layer_outputs_lists_every_layer_once_and_forgets(calibrated, tiny_data):
    images = tiny_data.sample(4)[0]
    with fpq.layer_outputs(calibrated.eval()) as outputs:
        logits = calibrated(images)
    assert len(outputs) == 10 and torch.equal(outputs[-1], logits)
    calibrated(images)
    assert len(outputs) == 10
    assert not any(layer._forward_hooks for layer in common.product_layers(calibrated).values())


def test_eq22_loss_is_cross_entropy_plus_weighted_csd(monkeypatch, tiny_data, tmp_path):
    """The first step of the loop, rebuilt by hand: same gradients."""
    args = parse(monkeypatch, tmp_path, "--csd-weight", "0.7")
    network = common.build_model("resnet8", 10).eval()
    seen = {}

    class Stop(Exception):
        pass

    def step(optimizer, *_):
        seen.update({i: p.grad.clone() for i, p in enumerate(
            p for g in optimizer.param_groups for p in g["params"])})
        raise Stop

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(Stop):
        fpq.train(args, tiny_data, "csd", 0, network)
    student = common.quantize(network, 2, 2)
    common.calibrate(student, tiny_data.sample(100)[0])
    images, labels = next(tiny_data.batches(args.batch_size, torch.Generator().manual_seed(0)))
    with fpq.layer_outputs(student.train()) as z, fpq.layer_outputs(network) as z_fp:
        loss = F.cross_entropy(student(images), labels)
        network(images)
    parameters = [p for g in common.sgd(student, 1, 0).param_groups for p in g["params"]]
    loss = loss + 0.7 * fpq.csd_loss(z, [t.detach() for t in z_fp])
    grads = torch.autograd.grad(loss, parameters)
    assert len(seen) == len(grads)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(seen[i], grad, rtol=1e-4, atol=1e-7)


def parse(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr("sys.argv", ["fpq.py", "--dataset", "shapes", "--out", str(tmp_path),
                                     "--dry-run", *flags])
    return fpq.parse_args()


def test_baseline_is_fpq_of_no_strength_bit_for_bit(monkeypatch, tiny_data, tmp_path):
    network = common.build_model("resnet8", 10).eval()
    args = parse(monkeypatch, tmp_path, "--p", "0", "--csd-weight", "0")
    lsq, fpq_at_zero = (fpq.train(args, tiny_data, method, 0, network)[0].state_dict()
                        for method in ("lsq", "fpq"))
    assert all(torch.equal(v, fpq_at_zero[k]) for k, v in lsq.items())
    weights = [lsq["fc.weight"]]
    for method, flags in (("sfp", ["--p", "1"]), ("sfp", ["--p", "1", "--noise-at", "input"]),
                          ("csd", []), ("csd", ["--csd-weight", "2"]), ("kd", []),
                          ("kd", ["--kd-weight", "2"]), ("fpq", ["--p", "1"])):
        before = {k: v.clone() for k, v in network.state_dict().items()}
        args = parse(monkeypatch, tmp_path, *flags)
        weights.append(fpq.train(args, tiny_data, method, 0, network)[0].fc.weight.detach())
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_recipe_paper_sets_the_protocol_and_flags_win(monkeypatch, tmp_path):
    args = parse(monkeypatch, tmp_path, "--recipe", "paper", "--lr", "0.3")
    assert (args.model, args.dataset, args.lr, args.p) == ("resnet18", "shapes", 0.3, 0.1)
    assert args.weight_decay == 5e-4


def dry_run(monkeypatch, capsys, tmp_path, *flags):
    """(rows of results.jsonl, what is printed) of fpq.py."""
    monkeypatch.setattr("sys.argv", ["fpq.py", "--dry-run", "--dataset", "shapes", "--out",
                                     str(tmp_path), *flags])
    common.entry(fpq.main)
    written = (tmp_path / "dry-run/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in written], capsys.readouterr().out


def test_every_method_and_diagnosis_as_a_user_runs_them(monkeypatch, capsys, tmp_path):
    lines, _ = dry_run(monkeypatch, capsys, tmp_path, "--ablate", "--compare", "kd",
                       "--wbits", "3", "--abits", "4")
    assert [x["method"] for x in lines] == ["fp", "lsq", "sfp", "csd", "fpq", "kd"]
    assert all((x["wbits"], x["abits"]) == (3, 4) for x in lines[1:])
    assert {"script", "method", "dataset", "model", "wbits", "abits", "seed", "epochs",
            "train_size", "test_acc", "test_loss", "seconds_per_epoch", "torch", "device",
            "command"} <= lines[0].keys()
    _, shown = dry_run(monkeypatch, capsys, tmp_path, "--method", "fpq", "--diagnose")
    for figure in ("Fig. 1", "Fig. 2", "Fig. 3", "Fig. 5"):
        assert figure in shown
    assert "nan" not in shown


def test_compile_without_a_compiler_says_so_and_runs_eager(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = run_script("fpq.py", "--dry-run", "--compile", "--dataset", "shapes", "--method", "fpq")
    assert done.returncode == 0 and "running eager" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_compiled_run_agrees_with_the_eager_one(monkeypatch, capsys, tmp_path):
    """All but the compiler, which test_compiled_quantizer_agrees_with_the_eager_one runs."""
    calls = []

    def compiled(function, **options):
        return lambda *args: calls.append(args) or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.delattr(common.use_compiled, "function", raising=False)
    losses = []
    for flags in ([], ["--compile"]):
        assert not calls
        lines, _ = dry_run(monkeypatch, capsys, tmp_path, "--method", "lsq", *flags)
        losses.append(lines[-1]["test_loss"])
    assert len(calls) > 10 and losses[0] == pytest.approx(losses[1], rel=1e-2)
    common.use_compiled(False)
