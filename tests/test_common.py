"""Data, models, flatness, book-keeping and the command line."""

import gc
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import fpq
from conftest import ROOT

# ------------------------------------------------------------------------------------------ data


def test_shapes_are_deterministic_and_balanced():
    a, b, c = (common.draw_shapes(40, 20, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and not torch.equal(a[0], c[0])
    assert a[0].dtype == torch.uint8 and a[0].shape == (40, 32, 32, 3)
    assert torch.cat([a[1], a[3]]).bincount().tolist() == [6] * 10


@pytest.mark.parametrize("kind,inside,outside", [
    ("disk", (0, 0), (0.7, 0.7)), ("ring", (0.7, 0), (0, 0)), ("square", (0.7, 0.7), (0.8, 0)),
    ("bar", (0.9, 0.3), (0.3, 0.9)), ("cross", (0.9, 0.2), (0.5, 0.5)),
    ("triangle", (-0.8, 0), (0.6, 0)), ("hexagon", (0.7, 0), (0.9, 0)),
    ("star", (0.95, 0), (-0.95, 0)), ("crescent", (-0.6, 0), (0.4, 0)),
    ("dumbbell", (-0.6, 0.3), (0, 0))])
def test_every_shape_has_its_inside(kind, inside, outside):
    distance = [common.SHAPES[kind](np.float64(x), np.float64(y)) for x, y in (inside, outside)]
    assert distance[0] < 0 < distance[1]


def test_augmentation_is_a_window_of_the_black_padded_image(tiny_data):
    draws = torch.Generator().manual_seed(3)
    index, corner = torch.arange(20), torch.randint(0, 5, (2, 20), generator=draws)
    flip = torch.arange(20) % 3 == 0
    images = tiny_data.augment(index, corner, flip)
    for i in index:
        padded = tiny_data.train_padded[i].permute(2, 0, 1)
        assert padded.shape == (3, 36, 36)
        assert not padded[:, :2].any() and not padded[:, :, -2:].any()
        window = padded[:, corner[0, i]:corner[0, i] + 32, corner[1, i]:corner[1, i] + 32]
        window = window.flip(2) if flip[i] else window
        expected = (window / 255 - tiny_data.mean[:, None, None]) / tiny_data.std[:, None, None]
        torch.testing.assert_close(images[i], expected)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_every_image_has_a_crop_and_a_flip_of_its_own(tiny_data, monkeypatch):
    seen = []
    monkeypatch.setattr(common.Data, "augment", lambda self, *drawn: seen.append(drawn))
    list(tiny_data.batches(16, torch.Generator().manual_seed(0)))
    index, corner, flip = (torch.cat(parts, dim=-1) for parts in zip(*seen))
    assert sorted(index.tolist()) == list(range(64)) and not torch.equal(index, torch.arange(64))
    assert corner.unique().tolist() == [0, 1, 2, 3, 4] and not torch.equal(*corner)
    assert 10 < flip.sum() < 54


def test_mean_and_deviation_are_those_of_all_classes(tmp_path, monkeypatch):
    dark = torch.zeros(9_000, 32, 32, 3, dtype=torch.uint8)
    light = torch.full_like(dark, 255)
    labels = torch.arange(2).repeat_interleave(9_000)  # sorted by class, as folders are
    images = torch.cat([dark, light])
    monkeypatch.setattr(common, "read_folder", lambda _: (images, labels, images, labels, 2))
    data = common.load_data("folder", tmp_path)
    assert data.mean.tolist() == pytest.approx([0.5] * 3, abs=1e-3)
    assert data.std.tolist() == pytest.approx([0.5] * 3, abs=1e-3)
    few = common.load_data("folder", tmp_path, dry_run=True)
    assert few.train_labels.bincount().min() > 30


def test_batches_cover_an_epoch_once_and_depend_on_the_seed_only(tiny_data):
    def epoch(seed):
        return list(tiny_data.batches(16, torch.Generator().manual_seed(seed)))

    labels = torch.cat([y for _, y in epoch(0)])
    assert torch.equal(labels.bincount(), tiny_data.train_labels.bincount())
    assert all(torch.equal(a, b) for x, y in zip(epoch(0), epoch(0)) for a, b in zip(x, y))
    assert not torch.equal(epoch(0)[0][0], epoch(1)[0][0])
    assert [len(y) for _, y in tiny_data.batches(24, torch.Generator())] == [24, 24]  # no rump
    assert [len(y) for _, y in tiny_data.batches(999, torch.Generator())] == [64]


def test_balanced_subset():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    picked = common.balanced_subset(labels, 35, seed=0)
    assert labels[picked].bincount().tolist() == [15, 15, 5] and len(picked.unique()) == 35
    assert not torch.equal(picked, common.balanced_subset(labels, 35, seed=1))


def write_folder(root: Path, classes=("cat", "dog"), parts=("train", "test")) -> Path:
    for part in parts:
        for i, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for j, mode in enumerate(("RGB", "L", "RGBA")):
                size = (32, 32) if j == 0 else (20 + 30 * j, 40)
                Image.new(mode, size, 80 * i if mode == "L" else (80 * i,) * len(mode)).save(
                    root / part / name / f"{j}.png")
    return root


def test_folder_reads_any_size_and_mode(tmp_path):
    data = common.load_data("folder", write_folder(tmp_path))
    images = data.train_padded[:, 2:-2, 2:-2]
    assert images.shape == (6, 32, 32, 3) and data.classes == 2
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:3].max() == 0 and (images[3:] == 80).all()


def damage(root: Path, how: str) -> None:
    if how == "no test":
        (root / "test").rename(root / "tset")
    elif how == "empty class":
        (root / "train" / "eel").mkdir()
    elif how == "corrupt":
        (root / "train" / "cat" / "0.png").write_bytes(b"no image")
    elif how == "other classes":
        (root / "test" / "dog").rename(root / "test" / "fox")


@pytest.mark.parametrize("how,says", [("no test", "test/<class>"), ("empty class", "eel"),
                                      ("corrupt", "0.png"), ("other classes", "same classes")])
def test_unusable_folders_are_named(tmp_path, how, says):
    damage(write_folder(tmp_path), how)
    with pytest.raises(common.UsageError, match=says):
        common.load_data("folder", tmp_path)


def test_auto_falls_back_to_shapes_aloud_and_cifar10_never_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "reachable", lambda url: False)
    assert common.load_data("auto", tmp_path, dry_run=True).name == "shapes"
    assert "'shapes' instead" in capsys.readouterr().err
    with pytest.raises(common.UsageError, match="cannot be reached"):
        common.load_data("cifar10", tmp_path)


def test_reachable_gives_up_in_time():
    started = time.monotonic()
    assert not common.reachable("http://192.0.2.1/", seconds=0.5)  # an address that never answers
    assert time.monotonic() - started < 2


def test_cifar10_and_fashion_mnist_are_read_where_they_lie(tmp_path, monkeypatch):
    class Fake:
        url, mirrors, classes = "http://x/", ["http://x/"], list("abc")

        def __init__(self, root, train, download=False):
            n = 6 if train else 3
            self.data = self.pixels(n)
            self.targets = [i % 3 for i in range(n)]

    datasets = common.import_torchvision().datasets
    monkeypatch.setattr(datasets, "CIFAR10", type("C", (Fake,), {
        "pixels": lambda self, n: np.full((n, 3, 32, 32), 7, np.uint8).transpose(0, 2, 3, 1)}))
    monkeypatch.setattr(datasets, "FashionMNIST", type("M", (Fake,), {
        "pixels": lambda self, n: torch.full((n, 28, 28), 7, dtype=torch.uint8)}))
    cifar = common.load_data("cifar10", tmp_path, train_size=3)
    assert sorted(cifar.train_labels.tolist()) == [0, 1, 2]
    assert cifar.mean[0].item() == pytest.approx(0.4914)
    for error in (ValueError, AssertionError, EOFError):
        def broken(*_, error=error):
            raise error("of a file cut short")
        monkeypatch.setattr(datasets, "CIFAR100", broken)
        monkeypatch.setattr(broken, "url", "http://x/", raising=False)
        with pytest.raises(common.UsageError, match="is damaged .of a file cut short"):
            common.load_data("cifar100", tmp_path)
    grey = common.load_data("fashion_mnist", tmp_path)
    image = grey.train_padded[0, 2:-2, 2:-2, 0]
    assert image.shape == (32, 32) and (image[2:-2, 2:-2] == 7).all() and image.sum() == 7 * 28 * 28


# -------------------------------------------------------------------------------- models, flatness


def small_problem(quantized: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    model.double()
    if quantized:
        model = common.quantize(model, 3, 3, example=x)
        common.calibrate(model, x)
    params = [layer.weight for layer in common.product_layers(model).values()]
    return lambda: F.cross_entropy(model(x), y), params


def exact_hessian(loss_fn, params):
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


@pytest.mark.parametrize("quantized", [False, True])
def test_hessian_trace_and_top_eigenvalue_match_the_exact_hessian(quantized):
    loss_fn, params = small_problem(quantized)
    hessian = exact_hessian(loss_fn, params)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-8, atol=1e-10)
    rng = torch.Generator().manual_seed(0)
    mean, error = common.hessian_trace(loss_fn, params, 400, rng)
    variance = 2 * (hessian.square().sum() - hessian.diag().square().sum())  # of v.Hv, v of signs
    assert error == pytest.approx((variance / 400).sqrt().item(), rel=0.2)
    assert abs(mean - hessian.trace().item()) < 3 * error
    eigenvalues = torch.linalg.eigvalsh(hessian)
    top = eigenvalues[eigenvalues.abs().argmax()].item()
    assert common.hessian_top_eigenvalue(loss_fn, params, 300, rng) == pytest.approx(top, rel=1e-4)


def test_hessian_leaves_no_graph_and_no_gradient():
    loss_fn, params = small_problem(True)

    def tensors():
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    common.hessian_trace(loss_fn, params, 2)
    before = tensors()
    common.hessian_trace(loss_fn, params, 5)
    common.hessian_top_eigenvalue(loss_fn, params, 5)
    assert tensors() <= before and all(p.grad is None for p in params)


def test_evaluate_counts_every_test_image_and_keeps_the_mode(tiny_data):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.eye(10)[torch.full((len(x),), 3)]

    accuracy, loss = common.evaluate(Constant().train(), tiny_data, batch_size=50)  # 50 + 14
    share = (tiny_data.test_labels == 3).float().mean().item()
    assert accuracy == pytest.approx(100 * share)
    assert loss == pytest.approx(np.log(9 + np.e) - share, rel=1e-5)


# --------------------------------------------------------------------- book-keeping, command line


def test_cosine_lr():
    assert common.cosine_lr(0, 100, 2.0) == 2
    assert common.cosine_lr(50, 100, 2.0) == pytest.approx(1)
    assert common.cosine_lr(100, 100, 2.0) == pytest.approx(0)
    rising = [common.cosine_lr(i, 100, 2.0, warmup=0.2) for i in range(21)]
    assert common.cosine_lr(60, 100, 2.0, warmup=0.2) == pytest.approx(1)  # half of what is left
    assert rising == sorted(rising) and rising[0] == pytest.approx(2 / 21) and rising[20] == 2


def test_result_table_has_mean_deviation_and_difference():
    def row(method, acc, seed):
        return {"method": method, "test_acc": acc, "test_loss": 1.0, "seed": seed, "wbits": 2,
                "quantizer": "lsq", "abits": 2, "epochs": 3, "seconds_per_epoch": 1.0,
                "dataset": "d", "model": "m", "train_size": 9}

    rows = [row("lsq", 80.0, 0), row("lsq", 82.0, 1), row("fpq", 83.5, 0)]
    table = common.result_table(rows, "lsq")
    assert "81.00 ± 1.41" in table and "+2.50" in table and "9 training images" in table


def test_run_follows_the_schedule_and_draws_anew_each_epoch_and_seed(
        tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fpq.py", "--dataset", "shapes", "--out", str(tmp_path)])
    args = fpq.parse_args()
    args.batch_size = 32

    def follow(seed, **options):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        optimizer = common.sgd(model, 9.0, 0)
        run = common.Run(args, tiny_data, model, optimizer, "x", seed, 3, 0.5, **options)
        rates, first_labels, noise = [], [], []
        for _ in run.epochs():
            noise.append(torch.rand(()).item())
            for i, (images, labels) in enumerate(run.batches()):
                rates.append(run.optimizer.param_groups[0]["lr"])
                first_labels += [labels.tolist()] if i == 0 else []
                run.log(loss=images.mean())
        return rates, first_labels, noise

    rates, labels, noise = follow(0, warmup=0.5)
    assert rates == [common.cosine_lr(i, 6, 0.5, 0.5) for i in range(6)]
    again, other = follow(0), follow(1)
    assert again[1:] == (labels, noise)
    everything = labels + other[1]
    assert all(a != b for i, a in enumerate(everything) for b in everything[:i])
    assert len(set(noise + other[2])) == 6


SHORT = ["--dataset", "shapes", "--train-size", "128", "--batch-size", "64", "--fp-epochs", "1",
         "--epochs", "2", "--method", "fpq", "--p", "0.5"]


def test_resume_is_bit_identical_and_a_finished_run_does_nothing(monkeypatch, capsys, tmp_path):
    def run(*flags):
        """(exit code, stdout, stderr) of fpq.py with SHORT and flags, in this process."""
        monkeypatch.setattr(sys, "argv", ["fpq.py", "--out", str(tmp_path), *SHORT, *flags])
        code = 0
        try:
            common.entry(fpq.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    assert run()[0] == 0
    checkpoint, results = next(tmp_path.glob("fpq-*.pt")), tmp_path / "results.jsonl"
    whole = torch.load(checkpoint, weights_only=True)
    line = json.loads(results.read_text().splitlines()[-1])
    assert line["dataset"] == "shapes" and line["epochs"] == 2
    assert line["wbits"] == line["abits"] == 2
    assert line["test_acc"] == whole["history"][-1]["test_acc"] and "--p 0.5" in line["command"]

    save = common.Run.save
    with monkeypatch.context() as patch:
        def save_once(run):
            save(run)
            if run.method == "fpq":
                raise KeyboardInterrupt
        patch.setattr(common.Run, "save", save_once)
        code, _, err = run()
        assert code == 130 and "--resume" in err
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1
    assert run("--resume")[0] == 0
    resumed = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}

    lines = results.read_text()
    results.write_text("".join(lines.splitlines(True)[:-1]))  # as a kill before the line is written
    for _ in range(2):
        code, out, _ = run("--resume")
        assert code == 0 and "fpq   seed 0  already trained" in out and results.read_text() == lines
    code, _, err = run("--resume", "--lr", "0.5")  # another run, beside the first
    assert code == 0 and "was made by another command; starting afresh for this one" in err
    assert len(list(tmp_path.glob("fpq-*.pt"))) == 2 and len(list(tmp_path.glob("fp-*.pt"))) == 1
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    code, _, err = run("--resume")
    assert code == 2 and "is damaged" in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.part"))


def test_full_precision_is_trained_once_and_never_mistaken(
        monkeypatch, tmp_path, capsys, tiny_data):
    monkeypatch.setattr(sys, "argv", ["fpq.py", "--dataset", "shapes", "--out", str(tmp_path),
                                      "--fp-epochs", "1"])
    args = fpq.parse_args()
    network, result = common.full_precision(args, tiny_data)
    again, same = common.full_precision(args, tiny_data)
    assert "already trained" in capsys.readouterr().out and same == result and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    (file,) = tmp_path.glob("fp-*.pt")

    other_data = common.load_data("shapes", tmp_path, train_size=64)
    assert other_data.fingerprint != tiny_data.fingerprint
    for change in ({"fp_seed": 1}, {"fp_epochs": 2}, {"batch_size": 32}, {"data": other_data}):
        data = change.pop("data", tiny_data)
        before = set(tmp_path.glob("fp-*.pt"))
        common.full_precision(type(args)(**(vars(args) | change)), data)
        assert len(set(tmp_path.glob("fp-*.pt")) - before) == 1

    state = torch.load(file, weights_only=True)
    state["header"]["model"] = "resnet20"
    torch.save(state, file)
    with pytest.raises(common.UsageError, match="with model resnet20, this command says resnet8"):
        common.full_precision(args, tiny_data)


def in_process(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["fpq.py", *flags])
    with pytest.raises(SystemExit) as stop:
        common.entry(fpq.main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("flags,says", [
    (["--bits", "0"], "'0' should be a whole number from 2 to 8"),
    (["--bits", "33"], "'33' should be"), (["--bits", "two"], "'two' should be"),
    (["--p", "2"], "'2' should be a number from 0 to 1"), (["--p", "nan"], "'nan' should be"),
    (["--lr", "0"], "'0' should be"), (["--epochs", "1.5"], "'1.5' should be"),
    (["--model", "resnet9"], "invalid choice: 'resnet9'"),
    (["--seed", "1", "1"], "names a seed twice"), (["--device", "abacus"], "--device abacus"),
    (["--train-size", "3201", "--dataset", "shapes"], "--train-size 3201 should be from 10"),
    (["--train-size", "9", "--dataset", "shapes"], "to 3200"),
    (["--dataset", "folder", "--data-dir", "/nowhere"], "should hold train/<class>"),
    (["--out", "/proc/x"], "/proc/x"), (["--frobnicate"], "unrecognized")])
def test_bad_arguments_end_in_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, flags, says):
    code, err = in_process(monkeypatch, capsys, "--out", str(tmp_path), *flags)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1


def test_divergence_stops_with_exit_code_3_and_keeps_the_last_good_checkpoint(
        monkeypatch, capsys, tmp_path):
    losses = []

    def diverging(*logits):
        losses.append(torch.tensor(0.0 if len(losses) < 5 else float("inf")))
        return losses[-1]

    monkeypatch.setattr(fpq, "kd_loss", diverging)
    code, err = in_process(monkeypatch, capsys, "--out", str(tmp_path), "--dataset", "shapes",
                           "--train-size", "64", "--batch-size", "16", "--fp-epochs", "1",
                           "--epochs", "3", "--method", "lsq", "kd")
    assert code == 3 and len(err.strip().splitlines()) == 1
    rate = f"{common.cosine_lr(5, 12, 0.02):.3g}"
    assert f"not finite from step 2 of epoch 2 on, learning rate {rate}; try a smaller --lr" in err
    (file,) = tmp_path.glob("fpq-kd-resnet8-shapes-w2a2-s0-*.pt")
    kept = torch.load(file, weights_only=True)
    assert len(kept["history"]) == 1 and all(v.isfinite().all() for v in kept["model"].values())
    methods = [json.loads(x)["method"] for x in (tmp_path / "results.jsonl").open()]
    assert methods == ["fp", "lsq"]


def test_ctrl_c_ends_in_one_line_and_exit_code_130(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "fpq.py"), "--dataset", "shapes", "--out", str(tmp_path)],
        text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        # A background shell has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert "epoch   1/15" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 1
