"""Data, flatness, runs and the command line."""

import copy
import importlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import common
from conftest import ROOT, SHAPES, close, draw_shapes, first_step, load, same, tiny_network

SCRIPTS = ["fpq", "cr_qat", "mec_quant", "flat_quant"]


def at_once(*functions) -> list:
    """What the functions return that run at the same time. Files are locked in threads as well."""
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(function) for function in functions]
    return [one.result() for one in running]


# ------------------------------------------------------------------------------------------- data


def test_shapes_are_balanced_and_of_their_seed():
    _, classes, *tensors = draw_shapes.__wrapped__(60, 40, seed=0)
    _, _, *others = draw_shapes.__wrapped__(60, 40, seed=1)
    same(tensors, draw_shapes.__wrapped__(60, 40, seed=0)[2:])
    images, labels, _, test_labels = tensors
    assert images.shape == (60, 32, 32, 3)
    assert not torch.equal(images, others[0])
    counts = torch.cat([labels, test_labels]).bincount()
    assert counts.tolist() == [10] * len(classes)


@pytest.mark.parametrize("augment,shifts,flips", [
    ("none", [3], [0]),
    ("flip", [3], [0, 1]),
    ("crop+flip", list(range(7)), [0, 1])])
def test_a_view_is_a_window_of_the_padded_image(augment, shifts, flips):
    """Mirrored or not; row and column of its corner are drawn independently."""
    data = load(train_size=80, pad=3)
    draws = torch.Generator().manual_seed(0)
    images = data.view(torch.arange(80), augment, draws)
    places = []
    for padded, image in zip(data.train_padded, images):
        windows = padded.unfold(0, 32, 1).unfold(1, 32, 1)  # 7 x 7 x 3 x 32 x 32
        windows = data.normalize(windows.movedim(2, 4).flatten(0, 1))
        both = torch.stack([windows, windows.flip(3)])
        places.append((both == image).flatten(2).all(2).nonzero())
    flip, corner = torch.cat(places).T
    row = corner // 7
    column = corner % 7
    assert len(flip) == 80
    assert flip.unique().tolist() == flips
    assert row.unique().tolist() == shifts
    assert column.unique().tolist() == shifts
    assert len(shifts) == 1 or not torch.equal(row, column)


def test_a_sample_is_of_fixed_random_images_as_they_are():
    """Normalised, that is. Padding is black."""
    data = load(train_size=20)
    inner = data.train_padded[:, 2:-2, 2:-2]
    close(data.mean, (inner / 255).mean((0, 1, 2)))
    close(data.std, (inner / 255).flatten(0, 2).std(0))
    assert data.train_padded.sum() == inner.sum()
    images, labels = data.sample(5)
    whole = data.normalize(inner)
    found = [(whole == image).flatten(1).all(1).nonzero().item() for image in images]
    assert found != sorted(found)
    same(labels, data.train_labels[found])
    same(images, data.sample(5)[0])


def test_batches_cover_an_epoch_once_and_depend_on_the_seed_only(tiny_data):
    def epoch(seed, *views, size=16):
        draws = torch.Generator().manual_seed(seed)
        return list(tiny_data.batches(size, draws, *views))

    one = epoch(0, "crop+flip")
    two = epoch(0, "crop+flip", "crop+flip")
    other = epoch(1, "crop+flip")
    labels = torch.cat([y for _, y in one])
    same(labels.bincount(), tiny_data.train_labels.bincount())
    assert not torch.equal(labels, torch.cat([y for _, y in other]))
    for (images, labels), (first, second, again) in zip(one, two, strict=True):
        same(images, first)
        same(labels, again)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("size,lengths", [
    (16, [16, 16, 16, 16]),
    (24, [24, 24]),  # and 16 left out
    (999, [64])])
def test_an_incomplete_last_batch_is_dropped_but_a_single_one(size, lengths, tiny_data):
    batches = tiny_data.batches(size, torch.Generator(), "none")
    assert [len(labels) for _, labels in batches] == lengths
    assert tiny_data.steps(size) == len(lengths)


def test_val_holds_out_images_by_seed_and_reads_no_test_image(monkeypatch):
    images = draw_shapes()[:4]
    monkeypatch.setattr(common, "draw_shapes", lambda: (*images, None, None))
    data = load(val=50, train_size=99)
    inner = data.train_padded[:, 2:-2, 2:-2]
    held = {image.numpy().tobytes() for image in data.test_images}
    trained = {image.numpy().tobytes() for image in inner}
    assert len(held) == 50
    assert len(trained) == 99
    assert not held & trained
    whole = load(val=50)
    other = load(val=50, train_size=99, seed=1)
    same(data.test_images, whole.test_images)
    assert not torch.equal(data.test_images, other.test_images)
    assert len({data.fingerprint, whole.fingerprint, other.fingerprint}) == 3
    assert data.split == "val"


def test_a_split_is_as_balanced_as_the_classes_allow():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    x = torch.arange(85)
    picked, own, others, rest = common.pick_balanced(x, labels, 35, 0, "--train-size")
    assert own.bincount().tolist() == [15, 15, 5]
    same(own, labels[picked])
    same(rest, labels[others])
    same(torch.cat([picked, others]).sort()[0], x)


def test_a_split_of_many_classes_takes_no_time():
    labels = torch.arange(100_000) % 5000
    started = time.perf_counter()
    _, own, *_ = common.pick_balanced(labels, labels, 10_000, 0, "--train-size")
    assert time.perf_counter() - started < 2
    assert own.bincount().eq(2).all()


def cifar(root, train, download=False):
    """Stands for torchvision's class. Two downloads to one folder at once clash."""
    if not download:
        raise RuntimeError("not found or corrupted")
    busy = root / "busy"
    busy.touch(exist_ok=False)
    time.sleep(0.05)
    busy.unlink()
    labels = [0, 1, 2] * (2 if train else 1)
    pixels = np.full((len(labels), 32, 32, 3), 7, np.uint8)
    return Namespace(data=pixels, targets=labels, classes=["a", "b", "c"])


def test_cifar_is_read_by_one_process_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", cifar)
    flags = {"dataset": "cifar100", "data_dir": tmp_path / "new"}
    for data in at_once(*[lambda: load(**flags)] * 2):
        assert data.name == "cifar100"
        assert data.class_names == ["a", "b", "c"]
        assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert len(data.test_images) == 3
        assert (data.train_padded[:, 2:-2, 2:-2] == 7).all()


def test_only_auto_does_without_cifar(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Mock(side_effect=OSError("offline")))
    assert load(dataset="auto", data_dir=tmp_path).name == "shapes"
    assert "Using 'shapes' instead" in capsys.readouterr().err
    with pytest.raises(common.UsageError, match=f"cifar10 cannot .*{tmp_path} .*offline"):
        load(dataset="cifar10", data_dir=tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder "photos" of two classes, with one grey image each."""
    for part, name in itertools.product(("train", "test"), "ab"):
        place = tmp_path / ".hidden/photos" / part / name
        place.mkdir(parents=True)
        Image.new("L", (40, 20), 99 if part == "train" else 50).save(place / "0.png")
    return tmp_path / ".hidden/photos"


def test_a_folder_is_read_without_what_is_no_image(folder, capsys):
    (folder / "train/a/1.gif").touch()
    (folder / "train/notes.txt").touch()
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "train/b/.thumbnails").mkdir()
    shutil.copy(folder / "train/b/0.png", folder / "train/b/.thumbnails")
    data = load(dataset="folder", data_dir=folder)
    out = capsys.readouterr().out
    assert "2 of 6 files are skipped: no images, or hidden\n" in out
    assert data.name == "folder photos"
    assert data.class_names == ["a", "b"]
    assert (data.train_padded[:, 2:-2, 2:-2] == 99).all()
    assert (data.test_images == 50).all()


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8)
    pixels = pixels.reshape(32, 32, 3)
    exif = Image.Exif()
    exif[274] = 6  # the orientation of a camera held upright
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    assert (common.read_image(path) == np.rot90(pixels, -1)).all()


# --------------------------------------------------------------------------------------- flatness


def small_problem() -> tuple:
    """(network of three layers, inputs, labels)."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    x = torch.randn(20, 4, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, torch.arange(20) % 3


@pytest.mark.parametrize("quantized", [False, True])
def test_hessian_trace_and_top_eigenvalue_match_the_exact_hessian(quantized):
    model, x, y = small_problem()
    if quantized:
        model = common.quantize(model, 3, 3)
        common.calibrate(model, x)
    params = [layer.weight for layer in common.weight_layers(model).values()]

    def loss_fn():
        return F.cross_entropy(model(x), y)

    gradient = common.gradient_of(loss_fn(), params, create_graph=True)
    rows = [common.gradient_of(entry, params, retain_graph=True) for entry in gradient]
    hessian = torch.stack(rows)
    draws = torch.Generator().manual_seed(0)
    mean, error = common.hessian_trace(loss_fn, params, 400, draws)
    off_diagonal = hessian - hessian.diag().diag()
    variance = 2 * off_diagonal.square().sum().item()  # of v.Hv, v of signs
    assert error == pytest.approx((variance / 400) ** 0.5, rel=0.2)
    assert abs(mean - hessian.trace().item()) < 3 * error
    top = max(torch.linalg.eigvals(hessian).real.tolist(), key=abs)
    found = common.hessian_top_eigenvalue(loss_fn, params, 300, draws)
    assert found == pytest.approx(top, rel=1e-4)


def test_sharpness_is_of_the_weights_with_fresh_batch_norm_in_a_copy(calibrated, tiny_data):
    before = copy.deepcopy(calibrated.train().state_dict())
    found = common.sharpness(calibrated, tiny_data, probes=2, iters=1)
    assert calibrated.training and len(found) == 3
    same(calibrated.state_dict(), before)
    images, labels = tiny_data.sample(64)
    common.update_bn([images], calibrated)
    weights = [layer.weight for layer in common.weight_layers(calibrated.eval()).values()]

    def loss_fn():
        return F.cross_entropy(calibrated(images), labels)

    draws = torch.Generator().manual_seed(0)
    assert found[:2] == pytest.approx(common.hessian_trace(loss_fn, weights, 2, draws), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_sam_has_the_gradient_at_the_shifted_weights(tied):
    """That is w + rho g / |g|, also if two layers share a weight."""
    model, x, y = small_problem()
    if tied:
        model[2].weight = model[0].weight
    params = list(model.parameters())

    def loss_fn():
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    sam = common.sam_loss(model, x, y, 0.5, label_smoothing=0.1)
    found = common.gradient_of(sam, params)
    plain = common.gradient_of(loss_fn(), params)
    w = nn.utils.parameters_to_vector(params)
    nn.utils.vector_to_parameters(w + 0.5 * plain / plain.norm(), params)
    close(sam, loss_fn())
    close(found, common.gradient_of(loss_fn(), params))


def test_evaluate_uses_eval_mode_on_every_second_image_and_restores_it(tiny_data):
    model = tiny_network()
    labels = tiny_data.test_labels[::2]
    logits = model(tiny_data.normalize(tiny_data.test_images[::2]))
    right = (logits.argmax(1) == labels).float().mean().item()
    acc, loss = common.evaluate(model.train(), tiny_data, 2)
    assert model.training
    assert acc == pytest.approx(100 * right)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item())


# ------------------------------------------------------------------------------------------- runs


def test_random_numbers_differ_by_purpose_stage_seed_and_epoch():
    seeds = []
    for key in [*itertools.product(("training", "full precision"), (0, 1), (0, 1))] * 2:
        draws = common.epoch_draws(*key)
        seeds += [torch.initial_seed(), draws.initial_seed()]
    assert seeds[:16] == seeds[16:] and len(set(seeds)) == 16
    assert max(seeds) < 2**32  # the CPU's generator drops higher bits


def test_the_learning_rate_rises_then_follows_a_cosine():
    rates = [common.cosine(step, 10, warmup=0.2) for step in (0, 1, 2, 6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.5])


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rates_of_full_precision_and_method(script, run, tiny_networks, monkeypatch):
    rates = []

    def step(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    expected = [8 * common.cosine(i, 6, 0.1) for i in range(6)]
    method = "--method sgd"
    if script != "flat_quant":
        expected += [4 * common.cosine(i, 4) for i in range(4)]
        method = "--method baseline --epochs 2 --lr 4"
    run(script, "--dataset shapes --train-size 64 --batch-size 32 --fp-epochs 3 --fp-lr 8", method)
    close(rates, [[rate, rate] for rate in expected])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_within_an_epoch_is_for_terminals_only(terminal, monkeypatch, capsys):
    clock = itertools.count(0, 2)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress = common.Progress("epoch 7", 4)
    progress.add(loss=torch.tensor(1.0))
    progress.add(loss=torch.tensor(3.0))
    assert progress.means() == {"loss": 2}
    lines = ["", "epoch 7  batch 1/4  loss 1.0000  6 s left",
             "epoch 7  batch 2/4  loss 2.0000  4 s left"]
    assert capsys.readouterr().out == terminal * "\r\033[K".join(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_time_left_is_that_of_the_whole_command(script, run, tiny_networks, monkeypatch):
    """Of all methods and seeds, less what is read. By this clock an epoch takes a minute."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    views = "--ablate-views" if script == "cr_qat" else ""
    run(script, SHAPES, "--ablate --seed 0", views)
    result = run(script, SHAPES, "--ablate --seed 0 1", views)
    minutes = [int(n) for n in re.findall("  whole command (.*):00 left\n", result.out)]
    assert len(minutes) > 5
    assert minutes == list(reversed(range(len(minutes))))
    trained = {row["method"] for row in result.results}
    assert trained > set(importlib.import_module(script).METHODS)


@pytest.mark.parametrize("script,augment,pad,more", [
    ("fpq", "none", 2, "--method sfp --model mobilenet_v2"),
    ("cr_qat", "flip", 5, "--ablate"),
    ("mec_quant", "crop+flip", 1, ""),
    ("flat_quant", "crop+flip", 0, "--method sgd")])
def test_network_augmentation_and_batch_norm_of_all_results(
        script, augment, pad, more, run, monkeypatch):
    """Batch norm's statistics are of the pass over the training images that precedes a result.

    mobilenet_v2 ends at a resolution of 1.
    """
    view = common.Data.view
    finish = common.finish
    own = common.build_model if "model" in more else lambda *_: tiny_network()
    build = Mock(side_effect=own)
    views = set()
    finished = set()

    def recorded(data, index, how, draws):
        if len(index) == 32:  # a batch
            views.add((how, data.pad))
        return view(data, index, how, draws)

    def compared(checkpoint, model=None, method=None, **entries):
        network = model or checkpoint.parts["model"]
        expected = copy.deepcopy(network).train()
        row = finish(checkpoint, model, method, **entries)
        draws = torch.Generator().manual_seed(common.hashed("batch norm"))
        common.update_bn(checkpoint.data.batches(32, draws, augment), expected)
        same(network.state_dict(), expected.state_dict())
        assert (row["acc"], row["loss"]) == common.evaluate(expected, checkpoint.data)
        finished.add(row["method"])
        return row

    monkeypatch.setattr(common.Data, "view", recorded)
    monkeypatch.setattr(common, "build_model", build)
    monkeypatch.setattr(common, "finish", compared)
    flags = f"--augment {augment} --pad {pad} --depth 2 --stem imagenet"
    result = run(script, SHAPES, flags, more)
    assert {row["method"] for row in result.results} == finished
    build.assert_called_once_with(result.results[0]["model"], 10, 2, "imagenet")
    assert views == {(augment, pad)}


NOT_SETTINGS = """out data_dir dataset train_size val device recipe bits seed method ablate
    ablate_views diagnose more_bits resume dry_run script command epochs_left""".split()
FP_FLAGS = "model depth stem augment pad batch_size fp_epochs fp_lr fp_weight_decay".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_has_a_name_of_its_own_for_all_that_shapes_it(script, parse, tiny_data):
    def names(flags, data=tiny_data, seed=0):
        own = common.Checkpoint(flags, data, "x", seed, 1)
        shared = common.Checkpoint(flags, data, "x", seed, 1, shared=True)
        return own.path.name, shared.path.name

    args = parse(script)
    own, shared = names(args)
    for flag, value in vars(args).items():
        changed = {flag: Path(f"{value}x")}
        other, other_shared = names(Namespace(**vars(args) | changed))
        assert (other == own) == (flag in NOT_SETTINGS), flag
        assert (other_shared != shared) == (flag in FP_FLAGS), flag
    others = {*names(args, seed=1), *names(args, load(train_size=64))}
    assert len(others) == 4 and not others & {own, shared}


def test_full_precision_is_trained_on_cross_entropy_once(parse, tiny_data):
    args = parse("fpq")
    grads = first_step(common.full_precision, args, tiny_data, 1)
    torch.manual_seed(common.hashed("weights", 1))
    model = common.build_model("resnet8", 10)
    draws = common.epoch_draws("full precision", 1, 0)
    images, labels = next(tiny_data.batches(32, draws, "crop+flip"))
    F.cross_entropy(model(images), labels).backward()
    close(grads, [p.grad for p in model.parameters()])
    network, result = common.full_precision(args, tiny_data, 1)
    again, read = common.full_precision(parse("mec_quant", "--resume"), tiny_data, 1)
    assert read == result  # as it holds the time it took
    assert not again.training
    same(network.state_dict(), again.state_dict())


@pytest.mark.parametrize("script,flags,zero", [
    ("fpq", "--p 1", {
        "sfp": "--p 0",
        "csd": "--csd-weight 0",
        "fpq": "--p 0 --csd-weight 0",
        "kd": "--kd-weight 0",
        "sam": "--sam-rho 0"}),
    ("cr_qat", "--ramp-epochs 0", dict.fromkeys(["cr", "pi", "fp-teacher"], "--lambda-max 0")),
    ("mec_quant", "", dict.fromkeys(["mec", "mec-quant", "branch", "random"], "--beta 0"))])
def test_methods_differ_and_at_strength_0_are_the_baseline(script, flags, zero, parse, tiny_data):
    """Bit for bit; none of them changes the full-precision network."""
    module = importlib.import_module(script)
    network = tiny_network()

    def trained(method, flags):  # 4 steps, as CR's average differs from the student after two
        args = parse(script, "--batch-size 16", flags)
        return module.train(args, tiny_data, method, 0, network)[0].state_dict()

    states = {method: trained(method, flags) for method in module.METHODS}
    sums = {state["5.weight"].sum().item() for state in states.values()}
    assert len(sums) == len(states)
    for method, off in zero.items():
        same(trained(method, off), states["baseline"])
    same(network.state_dict(), tiny_network().state_dict())


def test_each_seed_has_a_network_and_a_subset_of_images_read_once(run, tiny_networks, monkeypatch):
    read = Mock(side_effect=common.read_images)
    monkeypatch.setattr(common, "read_images", read)
    result = run("fpq", SHAPES, "--method baseline --train-size 640 --seed 2 1 2")
    fp, baseline, other_fp, other_baseline = result.results
    assert [row["seed"] for row in result.results] == [2, 2, 1, 1]
    assert fp["data"] == baseline["data"]
    assert fp["data"] != other_fp["data"] == other_baseline["data"]
    assert read.call_count == 1


def test_rows_say_how_they_came_about(run, folder, tiny_networks):
    flags = "--dataset folder --epochs 2 --fp-epochs 2 --batch-size 2 --seed 3 --data-dir"
    result = run("fpq", flags, folder)
    assert [row["method"] for row in result.results] == ["fp", "baseline", "fpq"]
    expected = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dataset": "folder photos",
        "classes": 2,
        "split": "test",
        "train_size": 2,
        "seed": 3}
    for row in result.results:
        assert expected.items() <= row.items()
        assert row["processor"].startswith(platform.machine())
        assert row["command"].endswith(f" {flags} {folder}")
        first, second = row["history"]
        assert first.keys() == {"epoch", "loss", "eval_loss", "acc", "seconds"}
        assert second["epoch"] == 2
        assert 2 * row["seconds_per_epoch"] == first["seconds"] + second["seconds"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_command_is_read_and_not_trained_again(script, run, tiny_networks, monkeypatch):
    run(script, SHAPES)
    first = run(script, SHAPES)  # a dry run is trained anew, so that it tries the code of today
    assert "epoch 1" in first.out
    monkeypatch.setattr(torch.optim.SGD, "step", Mock(side_effect=AssertionError))
    again = run(script, SHAPES, "--resume")
    assert again.results == first.results
    assert "\r" not in first.out
    table = first.out[first.out.index("\nshapes, "):]
    assert again.out.endswith(table)


def test_a_loaded_checkpoint_has_the_accuracy_of_its_row(run, tmp_path, tiny_data):
    rows = run("fpq", SHAPES, "--method fpq --quantizer pact").results
    assert [row["method"] for row in rows] == ["fp", "fpq"]
    for row in rows:
        name = row["run"]
        model, mean, std, class_names = common.load(tmp_path / "dry-run" / f"{name}.pt")
        images = tiny_data.test_images.permute(0, 3, 1, 2) / 255
        answers = model((images - mean) / std).argmax(1)
        right = (answers == tiny_data.test_labels).sum().item()
        assert 100 * right / len(images) == row["acc"]
        assert class_names == tiny_data.class_names


def test_the_table_pairs_seeds(capsys):
    """Mean ± standard error, and the difference to the baseline of the same seed."""
    rows = []
    for line in """
            fp 70 0 32
            baseline 80 0 2
            baseline 82 1 2
            fpq 83 1 2
            fpq 80.5 0 2
            fpq 90 2 2
            fpq 99 0 4""".splitlines()[1:]:
        method, acc, seed, bits = line.split()
        rows.append({
            "method": method, "acc": float(acc), "seed": seed, "wbits": bits, "abits": bits,
            "quantizer": "pact", "dataset": "d", "model": "m", "train_size": 9,
            "augment": "flip", "split": "val"})
    common.print_table(rows)
    _, title, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "d, 9 training images, m, pact, flip; val accuracy ± standard error"
    assert [re.sub("  +", " | ", line) for line in lines] == [
        "fp | 32/32 | 70.00 | 1",
        "baseline | 2/2 | 81.00 ± 1.00 | 2",
        "fpq | 2/2 | 84.50 ± 2.84 | +0.75 ± 0.25 | 3",
        "fpq | 4/4 | 99.00 | 1"]
    rows[3]["other"] = 5
    rows[4]["other"] = 8
    common.print_table(rows[:5], "fpq", other="another figure")
    _, _, headings, *lines = capsys.readouterr().out.splitlines()
    assert "another figure  vs fpq" in headings
    assert [line.split() for line in lines[1:]] == [["baseline", "2/2", "2"],
                                                    "fpq 2/2 6.50 ± 1.50 2".split()]


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("script,flags,expected", [
    ("flat_quant", "--recipe paper --batch-size 16", "resnet18 2 2 16 cifar"),
    ("mec_quant", "--bits 3 --abits 1", "resnet8 3 1 32 cifar"),
    ("cr_qat", "--recipe paper --bits 4 --wbits 3", "resnet18 3 4 32 imagenet"),
    ("fpq", "--recipe=paper --model resnet20", "resnet20 2 2 32 imagenet")])
def test_flags_override_the_recipe(script, flags, expected, parse, capsys):
    """A dry run takes at most 32 images at a time."""
    args = parse(script, flags)
    shown = "{0.model} {0.wbits} {0.abits} {0.batch_size} {0.stem}".format(args)
    assert shown == expected
    told = f"--recipe paper: --model {args.model} " in capsys.readouterr().out
    assert told == ("recipe" in flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quantizer_is_no_method(script, run):
    result = run(script, "--method lsq")
    name = "sgd" if script == "flat_quant" else "baseline"
    assert result.code == 2
    assert f"a --quantizer; training without a paper's method is {name} " in result.err


def test_threads_spin_briefly_unless_the_user_says_otherwise():
    """OpenMP reads the variable when torch is imported, so it is set before that."""
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **given}
        code = ("import builtins, os, sys; load = builtins.__import__\n"
                "def stop(name, *more): print(os.environ['GOMP_SPINCOUNT']); sys.exit()\n"
                "builtins.__import__ = lambda name, *more: "
                "stop(name) if name == 'torch' else load(name, *more)\n"
                "import common")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                              text=True)
        assert done.stdout == f"{expected}\n", done.stderr
