"""Data, flatness, runs and the command line."""

import copy
import importlib
import itertools
import platform
import re
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
from conftest import SHAPES, close, draw_shapes, first_step, load, same, tiny_network

SCRIPTS = ["fpq", "cr_qat", "mec_quant", "flat_quant"]


def at_once(*functions) -> list:
    """What the functions return that run at the same time. Files are locked in threads as well."""
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(function) for function in functions]
    return [one.result() for one in running]


# ------------------------------------------------------------------------------------------- data


def test_shapes_are_balanced_and_of_their_seed():
    name, classes, *tensors = draw_shapes.__wrapped__(train=60, test=40, seed=0)
    same(tensors, draw_shapes.__wrapped__(60, 40, 0)[2:])
    images, labels, _, test_labels = tensors
    assert not torch.equal(images, draw_shapes.__wrapped__(60, 40, 1)[2])
    assert name == "shapes" and images.shape == (60, 32, 32, 3)
    assert torch.cat([labels, test_labels]).bincount().tolist() == [10] * len(classes)


@pytest.mark.parametrize("augment,shifts,flips", [
    ("none", [3], [0]), ("flip", [3], [0, 1]), ("crop+flip", list(range(7)), [0, 1])])
def test_a_view_is_a_window_of_the_black_padded_image(augment, shifts, flips):
    """Mirrored or not; row and column of its corner are drawn independently."""
    data = load(train_size=80, pad=3)
    inner = data.train_padded[:, 3:-3, 3:-3]
    close(data.mean, (inner / 255).mean((0, 1, 2)))
    close(data.std, (inner / 255).flatten(0, 2).std(0))
    images = data.view(torch.arange(80), augment, torch.Generator().manual_seed(0))
    found = []
    for padded, image in zip(data.train_padded, images, strict=True):
        windows = padded.unfold(0, 32, 1).unfold(1, 32, 1)  # 7 x 7 x 3 x 32 x 32
        windows = data.normalize(windows.permute(0, 1, 3, 4, 2).flatten(0, 1))
        both = torch.stack([windows, windows.flip(3)])
        [[flip, corner]] = (both == image).flatten(2).all(2).nonzero().tolist()
        found.append([flip, *divmod(corner, 7)])
    flip, row, column = torch.tensor(found).T
    assert data.train_padded.sum() == inner.sum()
    assert flip.unique().tolist() == flips
    assert row.unique().tolist() == column.unique().tolist() == shifts
    assert len(shifts) == 1 or not torch.equal(row, column)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_is_of_fixed_random_images_as_they_are():
    data = load(train_size=20)
    images, labels = data.sample(5)
    whole = data.normalize(data.train_padded[:, 2:-2, 2:-2])
    found = [(whole == image).flatten(1).all(1).nonzero().item() for image in images]
    assert len(found) == 5 and found != sorted(found)
    same(labels, data.train_labels[found])
    same(images, data.sample(5)[0])


def test_batches_cover_an_epoch_once_and_depend_on_the_seed_only(tiny_data):
    def epoch(seed, *views, size=16):
        return list(tiny_data.batches(size, torch.Generator().manual_seed(seed), *views))

    one = epoch(0, "crop+flip")
    two = epoch(0, "crop+flip", "crop+flip")
    labels = torch.cat([y for _, y in one])
    same(labels.bincount(), tiny_data.train_labels.bincount())
    assert not torch.equal(labels, torch.cat([y for _, y in epoch(1, "crop+flip")]))
    for (images, labels), (first, second, again) in zip(one, two, strict=True):
        same([images, labels], [first, again])
        assert not torch.equal(first, second)
    assert [len(y) for _, y in epoch(0, "none", size=24)] == [24, 24]  # and 16 left out
    assert [len(y) for _, y in epoch(0, "none", size=999)] == [64]
    assert [tiny_data.steps(size) for size in (16, 24, 999)] == [4, 2, 1]


def test_val_holds_out_images_by_seed_and_reads_no_test_image(monkeypatch):
    name, classes, x, y, *_ = draw_shapes()
    monkeypatch.setattr(common, "draw_shapes", lambda: (name, classes, x, y, None, None))
    data = load(val=50, train_size=99)
    held = {image.numpy().tobytes() for image in data.test_images}
    trained = {image.numpy().tobytes() for image in data.train_padded[:, 2:-2, 2:-2]}
    assert len(held) == 50 and len(trained) == 99 and not held & trained
    whole = load(val=50)
    other = load(val=50, train_size=99, seed=1)
    same(data.test_images, whole.test_images)
    assert not torch.equal(data.test_images, other.test_images)
    assert len({data.fingerprint, whole.fingerprint, other.fingerprint}) == 3
    assert data.fingerprint == load(val=50, train_size=99).fingerprint
    assert data.split == "val"


def test_a_split_is_as_balanced_as_the_classes_allow():
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 5]))
    picked, own, others, rest = common.split(torch.arange(85), labels, 35, 0, "--train-size")
    assert own.bincount().tolist() == [15, 15, 5]
    same([labels[picked], labels[others]], [own, rest])
    assert sorted([*picked, *others]) == list(range(85))


@pytest.mark.parametrize("size,says", [
    (2, "--val 2 should be from 3, .* to 84"), (85, "--val 85 should be from 3, .* to 84"),
    (35, "--val 35 leaves 1 of 3 classes without an image")])
def test_a_split_that_cannot_be_is_refused(size, says):
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 5]))
    with pytest.raises(common.UsageError, match=says):
        common.split(labels, labels, size, 0, "--val")


def test_a_split_of_many_classes_takes_no_time():
    labels = torch.arange(100_000) % 5000
    started = time.perf_counter()
    _, own, *_ = common.split(labels, labels, 10_000, 0, "--train-size")
    assert time.perf_counter() - started < 2
    assert own.bincount().eq(2).all()


def cifar(root, train, download):
    """Stands for torchvision's class. Two of it in one folder at once clash, as downloads do."""
    (root / "busy").touch(exist_ok=False)
    time.sleep(0.05)
    (root / "busy").unlink()
    count = 6 if train else 3
    pixels = np.full((count, 32, 32, 3), 7, np.uint8)
    return Namespace(data=pixels, targets=[0, 1, 2] * (count // 3), classes=["a", "b", "c"])


def test_cifar_is_read_by_one_process_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", cifar)
    read = [lambda: load(dataset="cifar100", data_dir=tmp_path / "new")] * 2
    for data in at_once(*read):
        assert (data.name, data.class_names) == ("cifar100", ["a", "b", "c"])
        assert (len(data.train_labels), len(data.test_labels)) == (6, 3)
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
        place = tmp_path / "photos" / part / name
        place.mkdir(parents=True)
        Image.new("L", (40, 20), 99).save(place / "0.png")
    return tmp_path / "photos"


def test_a_folder_is_read_without_what_is_no_image(folder, tmp_path, capsys):
    (folder / "train/a/1.gif").touch()
    (folder / "train/.ipynb_checkpoints").mkdir()
    data = load(dataset="folder", data_dir=folder, out=tmp_path)
    assert "1 of 5 files are no images and are skipped\n" in capsys.readouterr().out
    assert (data.name, data.class_names) == ("folder photos", ["a", "b"])
    assert (data.test_images == 99).all() and data.test_labels.tolist() == [0, 1]


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    exif = Image.Exif()
    exif[274] = 6  # the orientation of a camera held upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert (common.read_image(tmp_path / "turned.png") == np.rot90(pixels, -1)).all()


def test_images_are_cached_until_one_changes(folder, tmp_path, monkeypatch):
    first = load(dataset="folder", data_dir=folder, out=tmp_path)
    read = Mock(side_effect=common.read_image)
    monkeypatch.setattr(common, "read_image", read)
    again = load(dataset="folder", data_dir=folder, out=tmp_path)
    assert again.fingerprint == first.fingerprint and not read.called
    Image.new("L", (40, 20), 98).save(folder / "train/a/0.png")
    changed = load(dataset="folder", data_dir=folder, out=tmp_path)
    assert (changed.train_padded[0, 2:-2, 2:-2] == 98).all()


# --------------------------------------------------------------------------------------- flatness


@pytest.mark.parametrize("quantized", [False, True])
def test_hessian_trace_and_top_eigenvalue_match_the_exact_hessian(quantized):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    y = torch.arange(20) % 3
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
    variance = 2 * (hessian - hessian.diag().diag()).square().sum()  # of v.Hv, v of signs
    assert error == pytest.approx((variance / 400).sqrt().item(), rel=0.2)
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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    if tied:
        model[2].weight = model[0].weight
    x = torch.randn(9, 5)
    y = torch.arange(9) % 3
    params = list(model.parameters())
    loss = common.sam_loss(model, x, y, 0.5, label_smoothing=0.1)
    found = common.gradient_of(loss, params)
    plain = common.gradient_of(F.cross_entropy(model(x), y, label_smoothing=0.1), params)
    shift = 0.5 * plain / plain.norm()
    with torch.no_grad():
        for p, step in zip(params, shift.split([p.numel() for p in params])):
            p.add_(step.reshape(p.shape))
    shifted = F.cross_entropy(model(x), y, label_smoothing=0.1)
    close(loss, shifted)
    close(found, common.gradient_of(shifted, params))


def test_evaluate_uses_eval_mode_on_every_second_image_and_restores_it(tiny_data):
    """This network answers 3, or 4 in training mode."""
    model = nn.Module()
    model.forward = lambda x: torch.eye(10)[torch.full((len(x),), 3 + model.training)]
    share = (tiny_data.test_labels[::2] == 3).float().mean().item()
    acc, loss = common.evaluate(model, tiny_data, 2)
    assert model.training
    assert acc == pytest.approx(100 * share)
    assert loss == pytest.approx(np.log(9 + np.e) - share)


# ------------------------------------------------------------------------------------------- runs


def test_random_numbers_differ_by_purpose_stage_seed_and_epoch():
    seeds = []
    for key in [*itertools.product(("method", "full precision"), (0, 1), (0, 1))] * 2:
        draws = common.epoch_draws(*key)
        seeds += [torch.initial_seed(), draws.initial_seed()]
    assert seeds[:16] == seeds[16:] and len(set(seeds)) == 16
    assert max(seeds) < 2**32  # the CPU's generator drops higher bits


def test_the_learning_rate_rises_then_follows_a_cosine():
    rates = [common.cosine(step, 10, warmup=0.2) for step in (0, 1, 2, 6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert common.cosine(25, 100) == pytest.approx(0.5 + 0.5**1.5)


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
    lines = ["epoch 7  batch 1/4  loss 1.0000  6 s left", "epoch 7  batch 2/4  loss 2.0000  4 s left"]
    assert capsys.readouterr().out == terminal * "".join(f"\r\033[K{line}" for line in lines)


@pytest.mark.parametrize("script,more", [
    ("fpq", ""), ("cr_qat", "--ablate-views"), ("mec_quant", ""), ("flat_quant", "")])
def test_time_left_is_that_of_the_whole_command(script, more, run, tiny_networks, monkeypatch):
    """Of all methods and seeds. By this clock an epoch of two steps takes a minute."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    result = run(script, SHAPES, "--ablate --seed 0 1", more)
    minutes = [int(n) for n in re.findall("  whole command (.*) min left\n", result.out)]
    assert minutes == list(reversed(range(len(minutes))))
    trained = {row["method"] for row in result.results}
    assert len(minutes) > 10 and trained > set(importlib.import_module(script).METHODS)


@pytest.mark.parametrize("script,augment,pad,more", [
    ("fpq", "none", 2, "--model mobilenet_v2"), ("cr_qat", "flip", 5, "--ablate"),
    ("mec_quant", "crop+flip", 1, ""), ("flat_quant", "crop+flip", 0, "--method sgd")])
def test_network_augmentation_and_batch_norm_of_all_results(
        script, augment, pad, more, run, monkeypatch):
    """Batch norm's statistics are of the pass over the training images that precedes a result.

    mobilenet_v2 ends at a resolution of 1.
    """
    view = common.Data.view
    build = common.build_model
    finish = common.finish
    built = []
    views = []
    finished = []

    def recording_view(data, index, how, draws):
        if len(index) == 32:  # a batch
            views.append((how, data.pad))
        return view(data, index, how, draws)

    def recording_build(*how):
        built.append(how)
        return build(*how)

    def compared(checkpoint, model=None, method=None, **entries):
        network = model or checkpoint.parts["model"]
        expected = copy.deepcopy(network).train()
        row = finish(checkpoint, model, method, **entries)
        draws = torch.Generator().manual_seed(common.stream("batch norm"))
        common.update_bn(checkpoint.data.batches(32, draws, augment), expected)
        same(network.state_dict(), expected.state_dict())
        assert (row["acc"], row["loss"]) == common.evaluate(expected, checkpoint.data)
        finished.append(row["method"])
        return row

    monkeypatch.setattr(common.Data, "view", recording_view)
    monkeypatch.setattr(common, "build_model", recording_build)
    monkeypatch.setattr(common, "finish", compared)
    flags = f"--augment {augment} --pad {pad} --depth 2 --stem imagenet"
    result = run(script, SHAPES, flags, more)
    assert result.code == 0 and {row["method"] for row in result.results} == set(finished)
    assert built == [(result.results[0]["model"], 10, 2, "imagenet")]
    assert set(views) == {(augment, pad)}


NOT_SHAPING = """out data_dir dataset train_size val device recipe bits seed method ablate
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
        assert (other == own) == (flag in NOT_SHAPING), flag
        assert (other_shared != shared) == (flag in FP_FLAGS), flag
    others = {*names(args, seed=1), *names(args, load(train_size=64))}
    assert len(others) == 4 and not others & {own, shared}


def test_full_precision_is_trained_on_cross_entropy_once(parse, tiny_data):
    args = parse("fpq")
    grads = first_step(common.full_precision, args, tiny_data, 1)
    torch.manual_seed(common.stream("weights", 1))
    model = common.build_model("resnet8", 10)
    draws = common.epoch_draws("full precision", 1, 0)
    images, labels = next(tiny_data.batches(32, draws, "crop+flip"))
    close(grads, list(torch.autograd.grad(F.cross_entropy(model(images), labels),
                                          list(model.parameters()))))
    network, result = common.full_precision(args, tiny_data, 1)
    again, read = common.full_precision(parse("mec_quant"), tiny_data, 1)
    assert read == result and not again.training  # as result holds the time it took
    same(network.state_dict(), again.state_dict())
    assert (args.out / "results.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("script,flags,zero", [
    ("fpq", "--p 1", {"sfp": "--p 0", "csd": "--csd-weight 0", "fpq": "--p 0 --csd-weight 0",
                      "kd": "--kd-weight 0", "sam": "--sam-rho 0"}),
    ("cr_qat", "--ramp-epochs 0", dict.fromkeys(["cr", "pi", "fp-teacher"], "--lambda-max 0")),
    ("mec_quant", "", dict.fromkeys(["mec", "mec-quant", "branch", "random"], "--beta 0"))])
def test_methods_differ_and_at_strength_0_are_the_baseline(script, flags, zero, parse, tiny_data):
    """Bit for bit; none of them changes the full-precision network."""
    module = importlib.import_module(script)
    network = tiny_network()
    data = [tiny_data] * (1 + (script == "cr_qat"))  # all images, and those with labels

    def trained(method, flags):  # 4 steps, as CR's average differs from the student after two
        args = parse(script, "--batch-size 16", flags)
        return module.train(args, *data, method, 0, network)[0].state_dict()

    states = {method: trained(method, flags) for method in module.METHODS}
    assert len({state["5.weight"].sum().item() for state in states.values()}) == len(states)
    for method, off in zero.items():
        same(trained(method, off), states["baseline"])
    same(network.state_dict(), tiny_network().state_dict())


def test_each_seed_has_a_network_and_a_subset_of_images_read_once(run, tiny_networks, monkeypatch):
    read = Mock(side_effect=common.read_images)
    monkeypatch.setattr(common, "read_images", read)
    rows = run("fpq", SHAPES, "--method baseline --train-size 640 --seed 2 1 2").results
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("fp", 2), ("baseline", 2), ("fp", 1), ("baseline", 1)]
    data = [row["data"] for row in rows]
    assert data[0] == data[1] != data[2] == data[3]
    assert read.call_count == 1


def test_rows_say_how_they_came_about(run, folder, tiny_networks):
    flags = "--dataset folder --epochs 2 --fp-epochs 2 --batch-size 2 --seed 3 --data-dir"
    result = run("fpq", flags, folder)
    assert [row["method"] for row in result.results] == ["fp", "baseline", "fpq"]
    for row in result.results:
        assert row["torch"] == torch.__version__
        assert row["threads"] == torch.get_num_threads()
        assert row["processor"].startswith(platform.machine())
        assert (row["device"], row["dataset"], row["classes"]) == ("cpu", "folder photos", 2)
        assert (row["split"], row["train_size"], row["seed"]) == ("test", 2, 3)
        assert row["command"].endswith(f" {flags} {folder}")
        assert [epoch["epoch"] for epoch in row["history"]] == [1, 2]
        assert row["history"][0].keys() == {"epoch", "loss", "eval_loss", "acc", "seconds"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_command_is_read_and_not_trained_again(script, run, tiny_networks, monkeypatch):
    first = run(script, SHAPES)
    monkeypatch.setattr(torch.optim.SGD, "step", Mock(side_effect=AssertionError))
    again = run(script, SHAPES)
    assert again.code == 0 and again.results == first.results
    table = first.out[first.out.index("\nshapes, "):]
    assert again.out.endswith(table)


def test_a_loaded_checkpoint_has_the_accuracy_of_its_row(run, tmp_path, tiny_data):
    rows = run("fpq", SHAPES, "--method fpq --quantizer pact").results
    assert [row["method"] for row in rows] == ["fp", "fpq"]
    for row in rows:
        path = tmp_path / "dry-run" / (row["row"].split()[0] + ".pt")
        model, mean, std, class_names = common.load(path)
        images = tiny_data.test_images.permute(0, 3, 1, 2) / 255
        answers = model((images - mean) / std).argmax(1)
        right = (answers == tiny_data.test_labels).sum().item()
        assert 100 * right / len(images) == row["acc"]
        assert class_names == tiny_data.class_names


def test_the_table_pairs_seeds(capsys):
    """Mean ± standard error, and the difference to the baseline of the same seed."""
    rows = [{"method": method, "acc": acc, "seed": seed, "wbits": bits, "abits": bits,
             "quantizer": "pact", "dataset": "d", "model": "m", "train_size": 9,
             "augment": "flip", "split": "val"}
            for method, acc, seed, bits in (
                ("fp", 70.0, 0, 32), ("baseline", 80.0, 0, 2), ("baseline", 82.0, 1, 2),
                ("fpq", 83.0, 1, 2), ("fpq", 80.5, 0, 2), ("fpq", 90.0, 2, 2),
                ("fpq", 99.0, 0, 4))]
    common.print_table(rows)
    _, title, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "d, 9 training images, m, pact, flip; val accuracy"
    assert [re.split("  +", line) for line in lines] == [
        ["fp", "32/32", "70.00", "1"], ["baseline", "2/2", "81.00 ± 1.00", "2"],
        ["fpq", "2/2", "84.50 ± 2.84", "+0.75 ± 0.25", "3"], ["fpq", "4/4", "99.00", "1"]]


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("script,flags,bits,batch_size,stem", [
    ("flat_quant", "--recipe paper --batch-size 16", [2, 2], 16, "cifar"),
    ("flat_quant", "--recipe paper --wbits 3", [3, 2], 32, "cifar"),
    ("mec_quant", "--bits 3 --abits 1", [3, 1], 32, "cifar"),
    ("cr_qat", "--recipe paper --bits 4", [4, 4], 32, "imagenet"),
    ("fpq", "--recipe=paper --stem cifar", [2, 2], 32, "cifar")])
def test_flags_override_the_recipe(script, flags, bits, batch_size, stem, parse, capsys):
    """A dry run takes at most 32 images at a time."""
    args = parse(script, flags)
    assert [args.wbits, args.abits] == bits
    assert (args.batch_size, args.stem) == (batch_size, stem)
    assert (args.model == "resnet18") == ("recipe" in flags)
    assert ("--recipe paper: --model resnet18" in capsys.readouterr().out) == ("recipe" in flags)


@pytest.mark.parametrize("script,name", [
    ("fpq", "baseline"), ("cr_qat", "baseline"), ("mec_quant", "baseline"), ("flat_quant", "sgd")])
def test_a_quantizer_is_no_method(script, name, run):
    result = run(script, "--method lsq")
    assert result.code == 2
    assert f"a --quantizer; training without a paper's method is {name} " in result.err
