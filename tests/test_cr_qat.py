"""CR's terms against closed forms, its average, hidden labels, resume, every method."""

import copy
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import common
import cr_qat


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse("--labels", "40", ...) -> the arguments of a dry run."""
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["cr_qat.py", "--dataset", "shapes", "--out", str(tmp_path),
                                         "--dry-run", *flags])
        return cr_qat.parse_args()
    return run


def test_consistency_is_kl_of_student_from_teacher_by_hand():
    student = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert cr_qat.consistency_loss(student, teacher).item() == pytest.approx(forward / 2)
    assert cr_qat.consistency_loss(teacher, student).item() == pytest.approx(backward / 2)
    assert cr_qat.consistency_loss(teacher, teacher + 3).item() == pytest.approx(0, abs=1e-12)


def test_consistency_sends_its_gradient_into_the_student_only():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    student.requires_grad_(), teacher.requires_grad_()
    cr_qat.consistency_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(1) - teacher.softmax(1)) / 6)
    assert teacher.grad is None


def test_ramp_up_from_a_hundredth_to_one():
    for t, value in ((0, math.exp(-5)), (2, math.exp(-1.25)), (4, 1), (9, 1)):
        assert cr_qat.ramp_up(t, 4) == pytest.approx(value)
    assert cr_qat.ramp_up(0, 0) == 1 and cr_qat.ramp_up(0, 0.5) == pytest.approx(math.exp(-5))


def randomise(model):
    with torch.no_grad():
        for name, value in model.state_dict().items():  # zero points are fixed
            if value.is_floating_point() and "zero_point" not in name:
                value.copy_(torch.rand_like(value))


def test_average_closed_form_over_weights_batch_norm_and_steps(calibrated):
    average, expected = cr_qat.averaged(calibrated, 0.7), None
    zeros = {n: b.clone() for n, b in calibrated.named_buffers() if "zero_point" in n}
    for a in (0, 1 / 2, 2 / 3, 0.7, 0.7):  # 1 - 1 / (updates + 1), at most 0.7
        randomise(calibrated)
        average.update_parameters(calibrated)
        new = {k: v.detach().double() for k, v in calibrated.named_parameters()}
        expected = {k: a * expected[k] + (1 - a) * v for k, v in new.items()} if expected else new
    state = average.module.state_dict()
    for name in ("conv.weight", "bn.weight", "bn.bias", "fc.input_quantizer.step"):
        assert name in expected
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(state[n], z) for n, z in zeros.items()) and len(zeros) == 20
    assert average.training  # batch norm by the teacher's own statistics


def test_average_without_memory_is_the_student(calibrated):
    average = cr_qat.averaged(calibrated, 0)
    for _ in range(3):
        randomise(calibrated)
        average.update_parameters(calibrated)
    state = average.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in calibrated.named_parameters())


def test_the_average_predicts_with_quantized_weights_and_inputs(calibrated, tiny_data):
    average = cr_qat.averaged(calibrated, 0.9)
    images = tiny_data.sample(4)[0]
    assert torch.equal(average.eval()(images), calibrated.eval()(images))
    kinds = [type(m) for m in common.product_layers(average).values()]
    assert set(kinds) == {common.QuantConv2d, common.QuantLinear}


def test_views_differ_and_the_first_one_is_the_same_however_many_there_are(tiny_data):
    def first(*views):
        return next(tiny_data.batches(16, torch.Generator().manual_seed(3), views))

    one, labels = first("crop+flip")
    again, other, plain, flipped, labels_too = first("crop+flip", "crop+flip", "none", "flip")
    assert torch.equal(one, again) and torch.equal(labels, labels_too)
    assert not torch.equal(again, other)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:16]
    unpadded = tiny_data.train_padded[index, common.PAD:-common.PAD, common.PAD:-common.PAD]
    assert torch.equal(plain, tiny_data.normalize(unpadded))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert 0 < sum(mirrored) < 16 and torch.equal(flipped[mirrored], plain[mirrored].flip(3))


def test_distort_adds_noise_or_shifts_colour_per_image():
    view = torch.ones(4000, 3, 2, 2)
    assert cr_qat.distort(view, "crop+flip") is view
    noise = cr_qat.distort(view, "crop+flip+noise") - view
    assert noise.std().item() == pytest.approx(0.1, rel=0.05) and noise.mean().abs() < 0.01
    colour = cr_qat.distort(view, "crop+flip+colour")
    assert torch.equal(colour, colour[:, :, :1, :1].expand_as(colour))  # one draw for all pixels
    assert colour.min() > 0.2 - 1e-5 and colour.max() < 1.8 + 1e-5 and colour.std() > 0.25
    assert cr_qat.distort(view * 0, "crop+flip+colour").abs().max() <= 0.4


def test_hidden_labels_are_balanced_and_a_quarter_of_each_batch_is_labelled(tiny_data):
    data = cr_qat.hide_labels(tiny_data, 20, seed=0)
    kept = data.train_labels >= 0
    assert kept.sum() == 20 and data.train_labels[kept].bincount().min() > 0
    assert torch.equal(data.train_labels[kept], tiny_data.train_labels[kept])
    for _, labels in data.batches(16, torch.Generator().manual_seed(0)):
        assert (labels[:4] >= 0).all() and (labels[4:] == -1).all()
    only = data.labelled()
    assert torch.equal(only.train_labels, data.train_labels[kept])
    assert torch.equal(only.train_padded, data.train_padded[kept])
    assert only.fingerprint != data.fingerprint and tiny_data.labelled() is tiny_data
    for count in (9, 64):
        with pytest.raises(common.UsageError, match="--labels"):
            cr_qat.hide_labels(tiny_data, count, seed=0)


@pytest.mark.parametrize("method,flags", [
    ("cr", ["--lambda-max", "40"]), ("cr", ["--labels", "20", "--lambda-max", "40"]),
    ("lsq", ["--labels", "20"]), ("kd", ["--ramp-epochs", "0", "--lambda-max", "1"]),
    ("two-view", [])])
def test_loss_is_cross_entropy_of_labelled_plus_weighted_consistency(
        monkeypatch, parse, tiny_data, method, flags):
    """The first step of the loop, rebuilt by hand: same gradients."""
    args, seen = parse(*flags), []
    data = cr_qat.hide_labels(tiny_data, args.labels, 0) if args.labels else tiny_data
    torch.manual_seed(0)
    network = common.build_model("resnet8", 10).eval()

    class Stop(Exception):
        pass

    def step(optimizer, *_):
        seen.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
        raise Stop

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(Stop):
        cr_qat.train(args, data, method, 0, network)
    student = common.quantize(network, 2, 2)
    common.calibrate(student, data.sample(100)[0])
    one, two, labels = next(data.batches(32, torch.Generator().manual_seed(0), ("crop+flip",) * 2))
    teacher = network if method == "kd" else copy.deepcopy(student).train()
    target = teacher(two).softmax(1).detach()
    if args.labels and method == "lsq":
        one, labels = one[:8], labels[:8]
    known = labels >= 0
    if method == "two-view":
        logits = student.train()(torch.cat([one, two]))
        loss = F.cross_entropy(logits, torch.cat([labels, labels]))
    else:
        logits = student.train()(one)
        loss = F.cross_entropy(logits[known], labels[known])
    if method in ("cr", "kd"):
        weight = 1 if method == "kd" else 40 * math.exp(-5)
        kl = (target * (target.log() - logits.log_softmax(1))).sum(1).mean()
        loss = loss + weight * kl
    parameters = [p for g in common.sgd(student, 1, 0).param_groups for p in g["params"]]
    grads = torch.autograd.grad(loss, parameters)
    assert len(seen) == len(grads)
    for mine, grad in zip(seen, grads):
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-6)


def test_lambda_zero_is_lsq_bit_for_bit_and_every_method_differs(parse, tiny_data):
    network = common.build_model("resnet8", 10).eval()
    before = copy.deepcopy(network.state_dict())

    def trained(method, *flags):  # 8 steps: the average begins to differ after the second
        args = parse("--batch-size", "8", *flags)
        return cr_qat.train(args, tiny_data, method, 0, network)[0].state_dict()

    results = {m: trained(m) for m in cr_qat.METHODS}
    zero = trained("cr", "--lambda-max", "0")
    assert all(torch.equal(v, results["lsq"][k]) for k, v in zero.items())
    results["noise"] = trained("cr", "--augment", "crop+flip", "crop+flip+noise")
    results["ema"] = trained("cr", "--ema", "0.6")
    weights = [r["fc.weight"] for r in results.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weight_bins_and_entropy(calibrated):
    bins = cr_qat.weight_bins(calibrated)
    layers = list(common.product_layers(calibrated).values())[1:-1]
    assert len(bins) == sum(layer.weight.numel() for layer in layers) and len(bins.unique()) == 4
    with torch.no_grad():
        step = layers[0].weight_quantizer.step[0]
        layers[0].weight[0, 0, 0, 0] = -9 * step if layers[0].weight[0, 0, 0, 0] > 0 else 9 * step
    assert (cr_qat.weight_bins(calibrated) != bins).sum() == 1
    with torch.no_grad():
        for layer in layers:
            place = torch.arange(layer.weight[0].numel()).reshape(layer.weight[0].shape)
            quarter = layer is layers[1]  # one value in four is another
            minus = place % (4 if quarter else 2) == 0
            layer.weight.copy_(torch.where(minus, -99.0, 99.0).expand_as(layer.weight))
        layers[0].weight.fill_(99)  # all the same
    expected = (0 + math.log2(4) - 0.75 * math.log2(3) + 6 * 1) / 8
    assert cr_qat.weight_entropy(calibrated) == pytest.approx(expected)


def test_sensitivity_is_nothing_without_noise_and_leaves_no_hook(calibrated, tiny_data):
    clean = common.evaluate(calibrated.eval(), tiny_data)[0]
    for place in ("input", "weight"):
        acc, kl = cr_qat.sensitivity(calibrated, tiny_data, place, 0.0)
        assert acc == pytest.approx(clean, abs=1e-3) and kl == pytest.approx(0, abs=1e-6)
        kls = [cr_qat.sensitivity(calibrated, tiny_data, place, sigma)[1] for sigma in (0.1, 1.0)]
        assert 0 < kls[0] < kls[1]
    assert common.evaluate(calibrated, tiny_data)[0] == clean


def test_everything_as_a_user_runs_it(parse, monkeypatch, capsys, tmp_path):
    assert "crop+flip" in cr_qat.AUGMENTS
    monkeypatch.setattr(cr_qat, "AUGMENTS", ["none", "crop+flip+colour"])
    parse("--controls", "--ablate", "--diagnose", "--labels", "20",
          "--augment", "crop+flip+colour")
    common.entry(cr_qat.main)
    shown = capsys.readouterr().out
    rows = [json.loads(x)["method"]
            for x in (tmp_path / "dry-run/results.jsonl").read_text().splitlines()]
    assert rows == ["fp", "lsq", "lsq-ema", "two-view", "pi", "kd", "cr", "cr-ema", "lsq-none",
                    "cr-none", "lsq-crop+flip+colour", "cr-crop+flip+colour"]
    assert "nan" not in shown
    for words in ("20 training images", "Gaussian noise on each weight", "entropy", "change bin"):
        assert words in shown


@pytest.mark.parametrize("flags,word", [
    (["--labels", "5"], "--labels 5 should be"), (["--augment", *["none"] * 3], "--augment takes"),
    (["--labels", "20", "--batch-size", "2"], "--batch-size 4"), (["--ema", "1.5"], "from 0 to 1")])
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, flags, word):
    monkeypatch.setattr(sys, "argv", ["cr_qat.py", "--dry-run", "--dataset", "shapes", "--out",
                                      str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stop:
        common.entry(cr_qat.main)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and word in err and len(err.splitlines()) == 1
