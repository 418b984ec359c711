"""CR's terms against closed forms, its average, views and hidden labels, its first step by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import common
import cr_qat
from conftest import (SHAPES, close, first_step, first_step_by_script, gradients, same, student_of,
                      tiny_network)


def test_consistency_is_kl_of_student_from_teacher_by_hand():
    student = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64,
                           requires_grad=True)
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


def test_average_closed_form_over_weights_batch_norm_and_step_sizes(calibrated):
    """theta_T <- a theta_T + (1 - a) theta_S, a = 1 - 1 / (updates + 1) but at most alpha."""
    teacher = copy.deepcopy(calibrated)
    buffers = {k: v.clone() for k, v in teacher.named_buffers()}
    expected = {k: p.detach().double() for k, p in calibrated.named_parameters()}
    assert {"0.0.weight", "0.1.bias", "6.input_quantizer.step_size"} < {*expected}
    for updates, a in enumerate((0, 1 / 2, 2 / 3, 0.7, 0.7)):
        for key, p in calibrated.named_parameters():
            p.data = torch.rand_like(p)
            expected[key] = a * expected[key] + (1 - a) * p.data
        cr_qat.ema_update(teacher, calibrated, updates, 0.7)
    for key, p in teacher.named_parameters():
        close(p.detach().double(), expected[key], rtol=1e-5, atol=1e-6)
    same(dict(teacher.named_buffers()), buffers)


def test_average_and_ramp_advance_with_every_step_of_all_epochs(monkeypatch, parse, tiny_data):
    args, calls, times = parse("cr_qat", "--ema 0.6"), [], []
    args.epochs = 2
    monkeypatch.setattr(cr_qat, "ema_update", lambda *call: calls.append(call[2:]))
    monkeypatch.setattr(cr_qat, "ramp_up", lambda t, T: times.append(t) or 1)
    for method in ("baseline", "cr"):  # --controls may be asked for later
        cr_qat.train(args, tiny_data, method, 0, tiny_network())
    assert calls == [(updates, 0.6) for updates in range(4)] * 2
    assert times == [0, 0.5, 1, 1.5]


def test_distort_adds_noise_or_shifts_colour_per_image():
    view = torch.ones(4000, 3, 2, 2)
    assert cr_qat.distort(view, "crop+flip") is view
    noise = cr_qat.distort(view, "crop+flip+noise") - view
    assert noise.std().item() == pytest.approx(0.1, rel=0.05) and noise.mean().abs() < 0.01
    colour = cr_qat.distort(view, "crop+flip+colour")
    assert torch.equal(colour, colour[:, :, :1, :1].expand_as(colour))  # one draw for all pixels
    assert 0.2 < colour.min() < 0.3 and 1.7 < colour.max() < 1.8
    assert 0.39 < cr_qat.distort(0 * view, "crop+flip+colour").abs().max() <= 0.4


@pytest.mark.parametrize("method,flags,views", [
    ("baseline", "--views flip", "none"), ("cr", "", "none none"), ("two-view", "", "none none"),
    ("cr", "--views flip", "flip flip"), ("cr", "--views flip none --lambda-max 0", "flip"),
    *((method, "--views flip crop+flip", "flip crop+flip")
      for method in ("cr", "pi", "fp-teacher", "two-view"))])
def test_views_are_of_all_but_the_baseline_which_has_augment(
        monkeypatch, parse, tiny_data, method, flags, views):
    asked, batches = [], common.Data.batches
    monkeypatch.setattr(common.Data, "batches", lambda *how: asked.extend(how[3]) or batches(*how))
    args = parse("cr_qat", "--augment none", flags)
    first_step(cr_qat.train, args, tiny_data, method, 0, tiny_network())
    assert asked == views.split()


def test_hidden_labels_are_balanced_and_a_quarter_of_each_batch_is_labelled(tiny_data):
    few, data = cr_qat.hide_labels(tiny_data, 20, seed=0)
    kept = data.train_labels >= 0
    assert few.train_labels.bincount().tolist() == [2] * 10
    same(data.train_labels, torch.where(kept, tiny_data.train_labels, -100))
    same(few.train_labels, tiny_data.train_labels[kept])
    same(few.train_padded, tiny_data.train_padded[kept])
    assert few.fingerprint != tiny_data.fingerprint != data.fingerprint
    for size, steps in ((16, 20 // 4), (80, 1)):  # an epoch is a pass over the labelled images
        batches = list(data.batches(size, torch.Generator().manual_seed(0)))
        assert [len(images) for images, _ in batches] == [size] * steps
        for _, labels in batches:
            assert (labels[:size // 4] >= 0).all() and (labels[size // 4:] < 0).all()


def test_hidden_labels_are_never_used(monkeypatch, run, tiny_data, tmp_path):
    """Wrong ones change nothing, from full precision to the results."""
    hidden = cr_qat.hide_labels(tiny_data, 20, seed=0)[1].train_labels < 0
    monkeypatch.setattr(common, "split", lambda *_: [(~hidden).nonzero().flatten()])
    monkeypatch.setattr(common, "build_model", lambda *_: tiny_network())
    for add in (0, 1):
        data = replace(tiny_data, train_labels=(tiny_data.train_labels + add * hidden) % 10)
        monkeypatch.setattr(common, "load_data", lambda args: data)
        done = run("cr_qat", "--dry-run --labels 20 --method", *cr_qat.METHODS,
                   "--out", tmp_path / str(add))
    rows = [(row["method"], row["train_size"], row["loss"]) for row in done.results]
    assert len(rows) == 12 and rows[:6] == rows[6:] and rows[0][:2] == ("fp", 20)


@pytest.mark.parametrize("method,flags", [
    ("baseline", ""), ("cr", "--lambda-max 40"), ("pi", ""), ("two-view", ""),
    ("cr", "--labels 20 --lambda-max 40 --temperature 2"), ("baseline", "--labels 20"),
    ("fp-teacher", "--ramp-epochs 0 --views crop+flip+noise crop+flip+colour")])
def test_first_step_by_hand(parse, tiny_data, method, flags):
    """The gradients of L = CE of labelled images + lambda L_con."""
    args = parse("cr_qat", "--wbits 3 --quantizer pact", flags)
    data = cr_qat.hide_labels(tiny_data, 20, 0)[1] if args.labels else tiny_data
    seen, network, student, (one, two, labels) = first_step_by_script(
        cr_qat.train, args, data, method, "crop+flip", "crop+flip")
    teacher = network if method == "fp-teacher" else copy.deepcopy(student)
    if args.views:
        one, two = map(cr_qat.distort, (one, two), args.views)
    if args.labels and method == "baseline":
        one, labels = one[:8], labels[:8]
    logits = student(one)
    if method == "two-view":
        logits, labels = torch.cat([logits, student(two)]), labels.repeat(2)
    known = labels >= 0
    loss = F.cross_entropy(logits[known], labels[known])
    if method in ("cr", "pi", "fp-teacher"):
        ramp = math.exp(-5) if args.ramp_epochs else 1
        loss = loss + args.lambda_max * ramp * cr_qat.consistency_loss(
            logits, teacher(two), args.temperature)
    close(seen, gradients(student, loss), rtol=1e-4, atol=1e-6)


def test_weight_bins_and_entropy_are_of_all_layers_but_first_and_last(tiny_data):
    student = student_of(tiny_network(), tiny_data)
    one, two = list(common.weight_layers(student).values())[1:-1]
    assert cr_qat.weight_bins(student).unique().tolist() == [-2, -1, 0, 1]
    one.weight.data.fill_(99)
    two.weight.data.fill_(99)[:, 0] = -99  # one in four
    assert cr_qat.weight_bins(student).tolist() == [1] * 144 + ([-2] * 9 + [1] * 27) * 8
    assert cr_qat.weight_entropy(student) == pytest.approx((2 - 0.75 * math.log2(3)) / 2)


def test_sensitivity_grows_with_noise_and_leaves_no_hook(calibrated, tiny_data):
    clean = common.evaluate(calibrated.eval(), tiny_data)[0]
    for place in ("input", "weight"):
        (acc, none), (_, small), (_, large) = (
            cr_qat.sensitivity(calibrated, tiny_data, place, sigma) for sigma in (0, 0.1, 1))
        assert acc == pytest.approx(clean, abs=1e-3) and none == pytest.approx(0, abs=1e-6)
        assert 1e-6 < small < large
    of = [cr_qat.sensitivity(torch.nn.Flatten(), tiny_data, x, 1)[1] for x in ("weight", "input")]
    assert of[0] == 0 < of[1]  # it has no weights


def test_everything_as_a_user_runs_it(run, forces):
    """The printed force is that of each consistency term."""
    done = run("cr_qat", SHAPES, "--controls --diagnose --ablate --labels 20 --lambda-max 3000")
    own, views = done.results[:8], done.results[8::2]
    assert [row["method"] for row in own] == [
        "fp", "baseline", "baseline-ema", "two-view", "pi", "fp-teacher", "cr", "cr-ema"]
    assert len({row["loss"] for row in own}) == 7  # pi and cr agree so early
    assert [(r["method"], r["views"]) for r in views] == [(f"cr-{v}", [v]) for v in cr_qat.VIEWS]
    assert "nan" not in done.out and all(words in done.out for words in (
        "20 training images", "noise on each weight", "entropy", "change their integer"))
    assert len(forces) == 8 and min(forces[:3]) > 0.01
    assert all(f"; {force:.2f}" in done.out for force in forces[:3])
