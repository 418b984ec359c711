"""CR's terms by hand, its average, views and hidden labels, its first step, all its figures."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cr_qat
from conftest import SHAPES, close, first_step, gradients, same, student_of, tiny_network


def kl_by_hand(teacher, student):
    p = teacher.softmax(1)
    return (p * (p.log() - student.log_softmax(1))).sum(1).mean()


def test_consistency_is_kl_of_student_from_teacher():
    student = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64)
    teacher.requires_grad_()
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = cr_qat.consistency_loss(student, teacher)
    assert loss.item() == pytest.approx(forward / 2)  # the mean over two images
    loss.backward()
    close(student.grad, (student.softmax(1) - teacher.softmax(1)) / 2)
    assert teacher.grad is None
    close(cr_qat.consistency_loss(3 * student, 3 * teacher, temperature=3), 9 * loss)


def test_ramp_up_from_exp_minus_5_to_one():
    ramp = [cr_qat.ramp_up(t, 4) for t in (0, 2, 4, 9)]
    assert ramp == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert cr_qat.ramp_up(0, 0) == 1


def test_ema_update_of_weights_batch_norm_and_step_sizes(calibrated):
    """theta_T <- a theta_T + (1 - a) theta_S, a = 1 - 1 / (updates + 1) but at most alpha."""
    teacher = copy.deepcopy(calibrated)
    buffers = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    students = dict(calibrated.named_parameters())
    assert {"0.0.weight", "0.1.bias", "6.input_quantizer.step_size"} < set(students)
    expected = {name: p.detach().double() for name, p in students.items()}
    for updates, a in enumerate((0, 1 / 2, 2 / 3, 0.7, 0.7)):
        for name, p in students.items():
            p.data = torch.rand_like(p)
            expected[name] = a * expected[name] + (1 - a) * p.data
        cr_qat.ema_update(teacher, calibrated, updates, 0.7)
    for name, p in teacher.named_parameters():
        close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    same(dict(teacher.named_buffers()), buffers)


def test_average_and_ramp_advance_with_every_step_of_all_epochs(monkeypatch, parse, tiny_data):
    args = parse("cr_qat", "--ema 0.6")
    args.epochs = 2
    updates = []
    times = []
    monkeypatch.setattr(cr_qat, "ema_update", lambda *call: updates.append(call[2:]))
    monkeypatch.setattr(cr_qat, "ramp_up", lambda *call: times.append(call) or 1)
    cr_qat.train(args, tiny_data, tiny_data, "cr", 0, tiny_network())
    assert updates == [(i, 0.6) for i in range(4)]
    assert times == [(t, 2) for t in (0, 0.5, 1, 1.5)]


def test_after_one_step_the_average_is_the_student(parse, tiny_data):
    """And `changed` is the share of integers that the step changed."""
    args = parse("cr_qat", "--ablate --diagnose --lr 1")
    args.batch_size = 64
    before = cr_qat.weight_bins(student_of(tiny_network(), tiny_data))
    student, rows = cr_qat.train(args, tiny_data, tiny_data, "cr", 0, tiny_network())
    share = (cr_qat.weight_bins(student) != before).float().mean().item()
    assert 0 < share < 1
    assert rows[0]["history"][0]["changed"] == pytest.approx(share)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


def test_distort_adds_noise_or_shifts_colour_per_image():
    view = torch.ones(4000, 3, 2, 2)
    assert cr_qat.distort(view, "crop+flip") is view
    noise = cr_qat.distort(view, "crop+flip+noise") - view
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().abs() < 0.01
    colour = cr_qat.distort(view, "crop+flip+colour")
    one_pixel = colour[:, :, :1, :1]  # one draw for all pixels
    same(colour, one_pixel.expand_as(colour))
    assert len(one_pixel.unique()) > 11_000
    assert 0.2 < colour.min() < 0.3
    assert 1.7 < colour.max() < 1.8
    shift = cr_qat.distort(0 * view, "crop+flip+colour")
    assert 0.39 < shift.abs().max() <= 0.4


@pytest.mark.parametrize("method, flags, views", [
    ("baseline", "--views flip", "none"), ("cr", "", "none none"), ("two-view", "", "none none"),
    ("cr", "--views flip", "flip flip"), ("cr", "--views flip crop+flip", "flip crop+flip")])
def test_views_are_of_all_but_the_baseline_which_has_augment(
        monkeypatch, parse, tiny_data, method, flags, views):
    asked = []
    batches = common.Data.batches

    def watched(*call, **order):
        asked.extend(call[3:])
        return batches(*call, **order)

    monkeypatch.setattr(common.Data, "batches", watched)
    args = parse("cr_qat", "--augment none", flags)
    first_step(cr_qat.train, args, tiny_data, tiny_data, method, 0, tiny_network())
    assert asked == views.split()


def test_hidden_labels_are_minus_100_and_the_others_balanced(tiny_data):
    labelled, data = cr_qat.hide_labels(tiny_data, 20, seed=0)
    known = data.train_labels >= 0
    assert labelled.train_labels.bincount().tolist() == [2] * 10
    same(data.train_labels, torch.where(known, tiny_data.train_labels, -100))
    for kept in ("train_padded", "train_labels"):
        shown = getattr(tiny_data, kept)[known]
        same(getattr(labelled, kept).flatten(1).sort(0)[0], shown.flatten(1).sort(0)[0])
    assert labelled.fingerprint != tiny_data.fingerprint != data.fingerprint


@pytest.mark.parametrize("size, steps", [(16, 5), (24, 3), (120, 1)])
def test_a_quarter_of_each_batch_is_labelled(size, steps):
    """An epoch is one pass over the labelled images, here those below 20."""
    labels = torch.tensor([3] * 20 + [-100] * 40)
    order = cr_qat.mixed_order(labels, size, torch.Generator().manual_seed(0))
    batches = order.reshape(steps, size)
    known = batches[:, :size // 4]
    assert (known < 20).all()
    assert len(known.unique()) == min(20, known.numel())
    others = batches[:, size // 4:]
    assert (others >= 20).all()
    assert len(others.unique()) > 25
    assert known.flatten().tolist() != sorted(known.flatten().tolist())


@pytest.mark.usefixtures("tiny_networks")
def test_hidden_labels_are_never_used(monkeypatch, run, tiny_data, tmp_path):
    """Wrong ones change nothing, from full precision to figures and results."""
    hidden = cr_qat.hide_labels(tiny_data, 20, seed=0)[1].train_labels < 0
    known = (~hidden).nonzero().flatten()
    monkeypatch.setattr(common, "split", lambda *_: [known])
    for add in (0, 1):
        labels = (tiny_data.train_labels + add * hidden) % 10
        data = replace(tiny_data, train_labels=labels)
        monkeypatch.setattr(common, "make_data", lambda *_: data)
        done = run("cr_qat", SHAPES, "--ablate --diagnose --labels 20 --out", tmp_path / str(add))
    found = []
    for row in done.results:
        last = row["history"][0] | {"seconds": 0}
        found.append([row["method"], row["train_size"], row["loss"], last])
    assert len(found) == 16
    assert found[:8] == found[8:]
    assert found[0][:2] == ["fp", 20]


@pytest.mark.parametrize("method, flags", [
    ("baseline", ""), ("baseline", "--labels 20"), ("pi", ""), ("cr", "--lambda-max 40"),
    ("cr", "--labels 20 --lambda-max 40 --temperature 2"), ("two-view", ""),
    ("two-view", "--labels 20"),
    ("fp-teacher", "--ramp-epochs 0 --views crop+flip+noise crop+flip+colour")])
def test_first_step_by_hand(parse, tiny_data, method, flags):
    """The gradients of L = CE of labelled images + lambda L_con."""
    args = parse("cr_qat", "--wbits 3 --quantizer pact", flags)
    data = tiny_data
    labelled = tiny_data
    if args.labels:
        labelled, data = cr_qat.hide_labels(tiny_data, 20, 0)
    network = tiny_network()
    seen = first_step(cr_qat.train, args, data, labelled, method, 0, network)
    student = student_of(network, labelled, 3, 2, "pact")
    draws = common.epoch_draws("method", 0, 0)
    order = cr_qat.mixed_order(data.train_labels, 32, draws) if args.labels else None
    one, two, labels = next(data.batches(32, draws, "crop+flip", "crop+flip", order=order))
    if args.views:
        one = cr_qat.distort(one, "noise")
        two = cr_qat.distort(two, "colour")
    known = labels >= 0
    if method in ("baseline", "two-view"):  # batch norm sees labelled images only
        loss = F.cross_entropy(student(one[known]), labels[known])
        if method == "two-view":
            other = F.cross_entropy(student(two[known]), labels[known])
            loss = (loss + other) / 2
    else:
        teacher = network if method == "fp-teacher" else copy.deepcopy(student)
        logits = student(one)
        target = teacher(two).detach()
        weight = args.lambda_max * (math.exp(-5) if args.ramp_epochs else 1)
        T = args.temperature
        consistency = T**2 * kl_by_hand(target / T, logits / T)
        loss = F.cross_entropy(logits[known], labels[known]) + weight * consistency
    close(seen, gradients(student, loss), rtol=1e-4, atol=1e-6)


def test_weight_bins_and_entropy_are_of_all_layers_but_first_and_last(tiny_data):
    student = student_of(tiny_network(), tiny_data)
    one, two = list(common.weight_layers(student).values())[1:-1]
    assert cr_qat.weight_bins(student).unique().tolist() == [-2, -1, 0, 1]
    one.weight.data.fill_(99)
    two.weight.data.fill_(99)[:, 0] = -99  # one in four
    expected = [1] * 144 + ([-2] * 9 + [1] * 27) * 8
    assert cr_qat.weight_bins(student).tolist() == expected
    assert cr_qat.weight_entropy(student) == pytest.approx((2 - 0.75 * math.log2(3)) / 2)


@pytest.mark.parametrize("place", ["input", "weight"])
def test_sensitivity_by_hand(tiny_data, place):
    """KL(clean || noisy); noise on a weight is relative to the layer's standard deviation."""
    single = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model = student_of(single, tiny_data).eval()
    images = tiny_data.normalize(tiny_data.test_images)
    layer = model[1]
    x = images
    w = layer.weight_quantizer(layer.weight).detach()
    torch.manual_seed(0)
    if place == "input":
        x = x + 0.3 * torch.randn_like(x)
    else:
        w = w + 0.3 * w.std() * torch.randn_like(w)
    noisy = F.linear(layer.input_quantizer(x.flatten(1)), w, layer.bias)
    clean = model(images)
    right = noisy.argmax(1) == tiny_data.test_labels
    acc, kl = cr_qat.sensitivity(model, tiny_data, place, 0.3)
    assert acc == pytest.approx(100 * right.float().mean().item())
    assert kl == pytest.approx(kl_by_hand(clean, noisy).item(), rel=1e-3)
    same(model(images), clean)  # no hook is left


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """The ratio of the gradients at the full weight, and the trace."""
    args = parse("cr_qat")
    network = tiny_network()
    student = student_of(network, tiny_data)
    average = copy.deepcopy(student)
    draws = torch.Generator().manual_seed(0)
    one, two, labels = next(tiny_data.batches(256, draws, "flip", "none"))
    weights = [layer.weight for layer in common.weight_layers(student).values()]
    logits = student(one)
    term = 0.3 * kl_by_hand(average(two).detach(), logits)
    added = common.gradient_of(term, weights, retain_graph=True)
    own = common.gradient_of(F.cross_entropy(logits, labels), weights)
    views = ["flip", "none"]
    found = cr_qat.figures_of_epoch(args, tiny_data, views, "cr", student, average, network)
    assert found["ratio"] == pytest.approx((added.norm() / own.norm()).item(), rel=1e-3)
    assert found["trace"] == common.sharpness(student, tiny_data)


@pytest.mark.usefixtures("tiny_networks")
def test_all_methods_and_figures_as_a_user_runs_them(run):
    done = run("cr_qat", SHAPES, "--ablate --ablate-views --diagnose --labels 20")
    own = done.results[:8]
    methods = "fp baseline baseline-ema two-view pi fp-teacher cr cr-ema"
    assert [row["method"] for row in own] == methods.split()
    assert len({row["loss"] for row in own}) >= 7  # pi and cr may agree so early
    views = [(row["method"], row["views"]) for row in done.results[8::2]]
    assert views == [(f"cr-{view}", [view]) for view in cr_qat.VIEWS]
    assert "nan" not in done.out
    for words in ("20 training images", "noise on each input", "noise on each weight", "entropy"):
        assert words in done.out
    lines = [line.split() for line in done.out.splitlines()]
    epochs = [row["history"][0] for row in own[1:] if not row["method"].endswith("-ema")]
    assert ["1", *[f"{100 * epoch['changed']:.3f}" for epoch in epochs]] in lines
    assert ["1", *[f"{epoch['ratio']:.3f}" for epoch in epochs]] in lines
    traces = ["{:.0f} ± {:.0f}".format(*epoch["trace"]) for epoch in epochs]
    assert ["1", *" ".join(traces).split()] in lines
