"""CR's terms by hand, its average, views and hidden labels, its first step, its figures."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cr_qat
from conftest import (
    SHAPES,
    close,
    first_step,
    gradients,
    normal,
    same,
    student_of,
    tiny_network,
)


def kl_by_hand(teacher, student):
    p = teacher.softmax(1)
    terms = p * (p.log() - student.log_softmax(1))
    return terms.sum(1).mean()


def test_consistency_is_kl_of_student_from_teacher():
    student = normal(5, 3).double().requires_grad_()
    teacher = normal(5, 3, seed=2).double().requires_grad_()
    loss = cr_qat.consistency_loss(student, teacher)
    close(loss, kl_by_hand(teacher, student))
    loss.backward()
    difference = student.softmax(1) - teacher.softmax(1)
    close(student.grad, difference / 5)  # the mean over five images
    assert teacher.grad is None


def test_ramp_up_from_exp_minus_5_to_one():
    ramp = [cr_qat.ramp_up(t, 4) for t in (0, 2, 4, 9)]
    assert ramp == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert cr_qat.ramp_up(0, 0) == 1


def test_ema_update_of_weights_batch_norm_and_step_sizes(calibrated):
    """theta_T <- a theta_T + (1 - a) theta_S, a = 1 - 1 / (updates + 1) but at most alpha."""
    teacher = copy.deepcopy(calibrated)
    students = dict(calibrated.named_parameters())
    assert "1.conv1.input_quantizer.step_size" in students
    expected = dict.fromkeys(students, 0)
    for updates, a in enumerate((0, 1 / 2, 2 / 3, 0.7, 0.7)):
        for name, p in students.items():
            p.data = torch.rand_like(p)
            expected[name] = a * expected[name] + (1 - a) * p.detach()
        cr_qat.ema_update(teacher, calibrated, updates, 0.7)
    for name, p in teacher.named_parameters():
        close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_average_and_ramp_advance_with_every_step_of_all_epochs(
        monkeypatch, parse, tiny_data):
    args = parse("cr_qat", "--ema 0.6")
    args.epochs = 2
    updates = []
    times = []
    monkeypatch.setattr(
        cr_qat, "ema_update", lambda *call: updates.append(call[2:]))
    monkeypatch.setattr(
        cr_qat, "ramp_up", lambda *call: times.append(call) or 1)
    cr_qat.train(args, tiny_data, "cr", 0, tiny_network())
    assert updates == [(i, 0.6) for i in range(4)]
    assert times == [(t, 2) for t in (0, 0.5, 1, 1.5)]


def test_after_one_step_the_average_is_the_student(parse, tiny_data):
    args = parse("cr_qat", "--ablate")
    args.batch_size = 64
    _, rows = cr_qat.train(args, tiny_data, "cr", 0, tiny_network())
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


def test_distort_adds_noise_or_shifts_colour_per_image():
    view = torch.ones(4000, 3, 2, 2)
    noise = cr_qat.distort(view, "crop+flip+noise") - view
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    colour = cr_qat.distort(view, "crop+flip+colour")
    pixels = colour.flatten(2).unique(dim=2)  # one draw for all of an image and channel
    assert pixels.shape == (4000, 3, 1)
    assert len(pixels.unique()) > 11_000
    assert 1.7 < pixels.max() < 1.8
    assert 0.39 < cr_qat.distort(0 * view, "crop+flip+colour").max() <= 0.4


@pytest.mark.parametrize("method, flags, views", [
    ("baseline", "--views flip", "none"),
    ("cr", "", "none none"),
    ("two-view", "--views flip", "flip flip"),
    ("cr", "--views flip crop+flip", "flip crop+flip"),
])
def test_views_are_of_all_but_the_baseline_which_has_augment(parse, method, flags, views):
    args = parse("cr_qat", "--augment none", flags)
    assert cr_qat.views_of(args, method) == views.split()


@pytest.mark.usefixtures("tiny_networks")
def test_views_as_a_user_ablates_them(run):
    done = run("cr_qat", SHAPES, "--method cr --ablate-views --seed 0 1")
    views = [(row["method"], row.get("views")) for row in done.results]
    assert views == 2 * [("fp", None), ("cr", []),
                         *[(f"cr-{view}", [view]) for view in cr_qat.VIEWS]]


def test_hidden_labels_are_minus_100_and_the_others_balanced(tiny_data):
    data = cr_qat.hide_labels(tiny_data, 20, seed=0)
    labelled = cr_qat.labelled_images(data)
    assert labelled.train_labels.bincount().tolist() == [2] * 10
    known = data.train_labels >= 0
    expected = torch.where(known, tiny_data.train_labels, -100)
    same(data.train_labels, expected)
    images = tiny_data.train_padded[known]
    same(labelled.train_padded.unique(dim=0), images.unique(dim=0))
    assert labelled.fingerprint != tiny_data.fingerprint


@pytest.mark.parametrize("size, steps", [(16, 5), (24, 3), (120, 1)])
def test_a_quarter_of_each_batch_is_labelled(size, steps):
    """An epoch is one pass over the labelled images, here those below 20."""
    labels = torch.tensor([0, 3] * 10 + [-100] * 40)
    draws = torch.Generator().manual_seed(0)
    order = cr_qat.mixed_order(labels, size, draws)
    quarter = size // 4
    known, others = order.reshape(steps, size).split([quarter, size - quarter], 1)
    assert known.max() < 20 <= others.min()
    assert len(known.unique()) == min(20, known.numel())
    assert (known.flatten().diff() < 0).any()  # in random order


@pytest.mark.usefixtures("tiny_networks")
def test_the_schedule_knows_how_many_steps_an_epoch_of_labels_has(monkeypatch, run, tiny_networks):
    """20 labels, 8 of them in a batch of 32: two steps."""
    seen = []
    cosine = common.cosine

    def watched(step, total, **options):
        if not options:  # with a warm-up it is full precision
            seen.append((step, total))
        return cosine(step, total, **options)

    monkeypatch.setattr(common, "cosine", watched)
    run("cr_qat", SHAPES, "--method cr --labels 20")
    assert seen == [(0, 2), (1, 2)]


def test_hidden_labels_are_never_used(monkeypatch, run, tiny_data, tmp_path):
    """Wrong ones change nothing, from full precision to figures and results."""
    hidden = cr_qat.hide_labels(tiny_data, 20, seed=0).train_labels < 0
    known = (~hidden).nonzero().flatten()
    monkeypatch.setattr(common, "pick_balanced", lambda *_: [known])
    flags = "--ablate --diagnose --labels 20 --out"
    for add in (0, 1):
        labels = (tiny_data.train_labels + add * hidden) % 10
        data = replace(tiny_data, train_labels=labels)
        monkeypatch.setattr(common, "make_data", lambda *_: data)
        done = run("cr_qat", SHAPES, flags, tmp_path / str(add))
    assert {row["train_size"] for row in done.results} == {20}
    found = []
    for row in done.results:
        epoch = row["history"][0] | {"seconds": 0}
        found.append([row["method"], row["loss"], epoch])
    assert found[:8] == found[8:]
    assert len(found) == 16


@pytest.mark.parametrize("labels", [None, 20])
@pytest.mark.parametrize("method", cr_qat.METHODS)
def test_first_step_by_hand(parse, tiny_data, method, labels):
    """The gradients of L = CE of labelled images + lambda L_con."""
    args = parse(
        "cr_qat",
        "--wbits 3 --quantizer pact --lambda-max 40",
        "--views crop+flip+noise crop+flip+colour",
    )
    args.labels = labels
    data = cr_qat.hide_labels(tiny_data, labels, 0) if labels else tiny_data
    labelled = cr_qat.labelled_images(data)
    network = tiny_network()
    seen = first_step(cr_qat.train, args, data, method, 0, network)
    student = student_of(network, labelled, 3, 2, "pact")
    draws = common.epoch_draws("training", 0, 0)
    order = None
    if labels:
        order = cr_qat.mixed_order(data.train_labels, 32, draws)
    batches = data.batches(32, draws, "crop+flip", "crop+flip", order=order)
    *images, labels = next(batches)
    if method != "baseline":
        images = list(map(cr_qat.distort, images, args.views))
    known = labels >= 0
    losses = []
    for view in images:  # batch norm sees labelled images only
        losses.append(F.cross_entropy(student(view[known]), labels[known]))
    loss = losses[0]
    if method == "two-view":
        loss = sum(losses) / 2
    elif method != "baseline":
        teacher = network if method == "fp-teacher" else copy.deepcopy(student)
        logits = student(images[0])
        target = teacher(images[1]).detach()
        consistency = kl_by_hand(target, logits)
        loss = F.cross_entropy(logits[known], labels[known])
        loss = loss + 40 * math.exp(-5) * consistency
    close(seen, gradients(student, loss), rtol=1e-4, atol=1e-6)


def test_weight_bins_and_entropy_are_of_all_layers_but_first_and_last(tiny_data):
    student = student_of(tiny_network(), tiny_data)
    _, one, two, _ = common.weight_layers(student).values()
    one.weight.data.fill_(99)
    two.weight.data.fill_(99)
    two.weight.data[:, 0] = -99  # one in four
    expected = [1] * 144 + ([-2] * 9 + [1] * 27) * 8
    assert cr_qat.weight_bins(student).tolist() == expected
    # The entropy of 1/4 and 3/4, and 0
    assert cr_qat.weight_entropy(student) == pytest.approx((2 - 0.75 * math.log2(3)) / 2)


@pytest.mark.parametrize("place", ["input", "weight"])
def test_sensitivity_by_hand(tiny_data, place):
    """KL(clean || noisy); noise on a weight is relative to the layer's standard deviation."""
    model = student_of(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), tiny_data)
    layer = model[1]
    x = tiny_data.normalize(tiny_data.test_images)
    w = layer.weight_quantizer(layer.weight).detach()
    clean = model(x)
    torch.manual_seed(0)
    if place == "input":
        x = x + 0.3 * torch.randn_like(x)
    else:
        w = w + 0.3 * w.std() * torch.randn_like(w)
    x_hat = layer.input_quantizer(x.flatten(1))
    noisy = F.linear(x_hat, w, layer.bias)
    right = noisy.argmax(1) == tiny_data.test_labels
    acc, kl = cr_qat.sensitivity(model, tiny_data, place, 0.3)
    assert acc == pytest.approx(100 * right.float().mean().item())
    assert kl == pytest.approx(kl_by_hand(clean, noisy).item(), rel=1e-3)


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """The ratio of the gradients, the labelled images' trace, the integers that a step changes."""
    args = parse("cr_qat")
    data = cr_qat.hide_labels(tiny_data, 20, 0)
    student = student_of(tiny_network(), tiny_data)
    average = copy.deepcopy(student)
    optimizer = common.sgd(student, 1.0, 0)
    run = {"model": student, "average": average, "optimizer": optimizer}
    args.views = ["flip", "none"]
    draws = torch.Generator().manual_seed(0)
    batch = next(cr_qat.epoch_batches(args, data, "cr", draws))
    found = cr_qat.measure_epoch(args, data, "cr", run, None)
    assert found["trace"] == common.sharpness(student, cr_qat.labelled_images(data))
    own = cr_qat.baseline(student, average, None, *batch, 1.0, args)
    loss = cr_qat.cr(student, average, None, *batch, 1.0, args)
    ratio = common.gradient_ratio(loss, own, student)
    before = cr_qat.weight_bins(student)
    loss.backward()
    optimizer.step()
    changed = (cr_qat.weight_bins(student) != before).float().mean().item()
    assert found["changed"] == pytest.approx(changed, rel=1e-3) and changed > 0
    assert found["ratio"] == pytest.approx(ratio, rel=1e-4)
