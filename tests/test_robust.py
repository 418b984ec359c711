"""Kills at random moments, bad input, damaged files, full disks."""

import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import ROOT

SCRIPTS = ["fpq", "cr_qat", "mec_quant", "flat_quant"]
SHORT = ["--dataset", "folder", "--batch-size", "8", "--fp-epochs", "2", "--epochs", "2"]
FLAGS = {"fpq": ["--method", "fpq", "--p", "0.5"],
         "cr_qat": ["--method", "cr", "--augment", "crop+flip+noise"],
         "mec_quant": ["--method", "mec-quant", "--branch", "teacher"],
         "flat_quant": ["--method", "weight+activation", "--fp-epochs", "4"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of noise around different colours, 12 images for training, 4 for testing."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(60 + 60 * c, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


# ----------------------------------------------------------------------------------------- kills

DRIVER = """
import importlib, json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import common
scripts = {s: importlib.import_module(s) for s in ("fpq", "cr_qat", "mec_quant", "flat_quant")}
common.import_torchvision()
import PIL.Image
flat = scripts["flat_quant"]
flat.PROBES, flat.ITERATIONS, flat.PTQ_BITS = 2, 1, []  # what follows training, short

def die_at_checkpoint(number, when, replace=os.replace):  # of the written ones, the number-th
    def written(*paths):
        written.count += 1
        if written.count == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if written.count == number:
            os.kill(os.getpid(), signal.SIGKILL)
    written.count, os.replace = 0, written

for line in sys.stdin:
    script, flags, moment = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if child == 0:  # a fresh process, but for the imports
        sys.argv = [script + ".py", *flags]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(moment, list):
            die_at_checkpoint(*moment)
        common.entry(scripts[script].main)
        os._exit(0)
    done, status = 0, 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if isinstance(moment, float) and time.monotonic() - started > moment and not done:
            os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0)
        time.sleep(0.002)
    print(json.dumps([time.monotonic() - started, status]), flush=True)
"""


@pytest.fixture(scope="module")
def drive():
    """drive(script, flags, moment) -> (seconds, wait status). moment: None lets the script run to
    its end; seconds, or (number, "before" or "after") of a written checkpoint, kill -9 it."""
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(ROOT)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as driver:
        def run(script, flags, moment=None):
            print(json.dumps([script, flags, moment]), file=driver.stdin, flush=True)
            return json.loads(driver.stdout.readline())

        yield run
        driver.stdin.close()


def timeless(value):
    """The value without what may differ between two runs: times and the command."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items()
                if k not in ("seconds", "seconds_per_epoch", "command")}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_equal_runs(one: Path, other: Path) -> None:
    """Equal weights, optimizer, averages, noise statistics, history and results, bit for bit."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for file in one.glob("*.pt"):
        states = [torch.load(d / file.name, weights_only=True) for d in (one, other)]
        assert same(*map(timeless, states)), file.name
    lines = [[timeless(json.loads(line)) for line in (d / "results.jsonl").read_text().splitlines()]
             for d in (one, other)]
    assert lines[0] == lines[1] and lines[0]


def command(script: str, folder: Path, out: Path, *more: str) -> list[str]:
    return [*SHORT, *FLAGS[script], "--data-dir", str(folder), "--out", str(out), *more]


def survive(drive, script: str, folder: Path, tmp: Path, kills: int) -> int:
    """Kill `script` at random moments and resume it, `kills` times; every run that gets to its end
    is compared with two undisturbed ones, which are compared with each other. Kills that hit."""
    for out in ("one", "two"):
        seconds, status = drive(script, command(script, folder, tmp / out))
        assert status == 0
    assert_equal_runs(tmp / "one", tmp / "two")
    rng, hits = random.Random(script), 0
    while hits < kills:
        cut = tmp / f"cut{hits}"
        resume = command(script, folder, cut, "--resume")
        moments = [rng.uniform(0.05, 0.9) * seconds for _ in range(min(3, kills - hits))]
        ends = [drive(script, resume, moment)[1] for moment in moments]
        assert set(ends) <= {0, 9} and drive(script, resume)[1] == 0
        assert_equal_runs(tmp / "one", cut)
        hits += ends.count(9)
    return hits


@pytest.mark.parametrize("script,kills", [("fpq", 3), ("cr_qat", 3), ("mec_quant", 2),
                                          ("flat_quant", 2)])
def test_killed_and_resumed_ends_as_if_undisturbed_and_twice_the_same(
        drive, script, kills, folder, tmp_path):
    assert survive(drive, script, folder, tmp_path, kills) >= kills


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_a_checkpoint_and_a_finished_run_resumed_changes_nothing(
        drive, script, folder, tmp_path):
    """Before a checkpoint takes its place, after it, and between the last and the result's line."""
    assert drive(script, command(script, folder, tmp_path / "one"))[1] == 0
    cut = tmp_path / "cut"
    resume = command(script, folder, cut, "--resume")
    last = (2 if script == "flat_quant" else 3), "after"  # of the run's three or five, what is left
    for moment in ((1, "before"), (2, "after"), (2, "before"), last):  # each goes on from the last
        assert drive(script, resume, moment)[1] == 9
        assert bool(list(cut.glob("*.part"))) == (moment[1] == "before")
    lines = [(out / "results.jsonl").read_text().count("\n") for out in (tmp_path / "one", cut)]
    assert lines[1] < lines[0]
    assert drive(script, resume)[1] == 0
    assert_equal_runs(tmp_path / "one", cut)
    before = {p: p.read_bytes() for p in cut.iterdir()}
    assert drive(script, resume)[1] == 0
    assert before == {p: p.read_bytes() for p in cut.iterdir()}


@pytest.mark.kills
@pytest.mark.parametrize("script", SCRIPTS)
def test_hundred_kills(drive, script, folder, tmp_path):
    hits = survive(drive, script, folder, tmp_path, 25)
    print(f"\n{script}: {hits} kills survived of {hits} tried")


# ------------------------------------------------------------------------------------------- files


def start(script: str, monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    """(exit code, stderr) of a script in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    code = 0
    try:
        common.entry(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize("how,says", [
    ("pickle", "is damaged or none of ours"), ("foreign", "is damaged or none of ours"),
    ("empty", "is damaged or none of ours"), ("half", "is damaged or none of ours"),
    ("flipped", "is damaged or none of ours"), ("incomplete", "is damaged or none of ours"),
    ("model", "with model vit_tiny, this command says resnet8"),
    ("wbits", "with wbits 7, this command says 2"),
    ("dataset", "with dataset moons, this command says folder")])
def test_checkpoints_that_do_not_fit_are_refused_and_run_no_code(
        how, says, folder, tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--dry-run", "--method", "fpq", "--data-dir", str(folder),
             "--out", str(tmp_path)]
    assert start("fpq", monkeypatch, capsys, *flags)[0] == 0
    (file,) = (tmp_path / "dry-run").glob("fpq-*.pt")
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    if how == "pickle":
        file.write_bytes(pickle.dumps(Trap()))
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, file)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "half":
        file.write_bytes(file.read_bytes()[:len(file.read_bytes()) // 2])
    elif how == "flipped":  # one byte of a weight
        torch.save(torch.load(file, weights_only=True), file)
        content = bytearray(file.read_bytes())
        weight = torch.load(file, weights_only=True)["model"]["fc.weight"]
        at = content.index(weight.numpy().tobytes()[:64])
        content[at + 2] ^= 1
        file.write_bytes(content)
    elif how == "incomplete":
        state = torch.load(file, weights_only=True)
        del state["optimizer"]
        torch.save(state, file)
    else:
        state = torch.load(file, weights_only=True)
        state["header"][how] = {"model": "vit_tiny", "wbits": "7", "dataset": "moons"}[how]
        torch.save(state, file)
    before = file.read_bytes()
    code, err = start("fpq", monkeypatch, capsys, *flags, "--resume")
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1
    assert file.read_bytes() == before and not (tmp_path / "trap").exists()


def test_checkpoints_of_an_older_command_do_not_stand_in_the_way(drive, folder, tmp_path):
    """A whole run with one rate, one with another killed, which is then resumed."""
    flags = [*SHORT, "--data-dir", str(folder), "--method", "lsq", "sfp"]
    other = [*flags, "--lr", "0.05", "--out"]
    assert drive("fpq", [*flags, "--out", str(tmp_path / "cut")])[1] == 0
    older = {p: p.read_bytes() for p in (tmp_path / "cut").glob("fpq-*.pt")}
    assert drive("fpq", [*other, str(tmp_path / "cut")], (2, "after"))[1] == 9  # within lsq
    assert drive("fpq", [*other, str(tmp_path / "cut"), "--resume"])[1] == 0
    assert drive("fpq", [*other, str(tmp_path / "one")])[1] == 0
    for file in (tmp_path / "one").glob("*.pt"):
        states = [torch.load(tmp_path / d / file.name, weights_only=True) for d in ("one", "cut")]
        assert same(*map(timeless, states)), file.name
    assert older == {p: p.read_bytes() for p in older}


def append_many(out: Path, who: int) -> None:
    for i in range(100):
        common.record(out, {"who": who, "i": i, "filler": "x" * 500})


def test_results_of_processes_at_once_are_whole_lines(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(tmp_path, who)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted((r["who"], r["i"]) for r in lines) == [(w, i) for w in range(3)
                                                         for i in range(100)]


def test_full_disk_is_one_line_and_leaves_nothing_half_written(folder, tmp_path):
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, str(ROOT / "fpq.py"), *SHORT, "--data-dir", str(folder),
         "--out", str(out)],
        capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert "fp-resnet8" in run.stderr and "cannot be written: File too large" in run.stderr
    assert [p.name for p in out.iterdir()] == ["results.jsonl"]


def test_results_line_that_does_not_fit_is_taken_back(tmp_path):
    def tight():
        common.record(tmp_path, {"first": 1})
        size = (tmp_path / "results.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
        with pytest.raises(OSError, match="disk is full"):
            common.record(tmp_path, {"second": "x" * 100})

    process = multiprocessing.get_context("fork").Process(target=tight)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "results.jsonl").read_text() == '{"first": 1}\n'


# -------------------------------------------------------------------------------------------- fuzz

NUMBERS = ["", "x", "nan", "-1", "1e999", "-inf", "0x10", "1,5"]
GARBAGE = {  # per flag what it must refuse; lists are several values
    "fpq cr_qat mec_quant flat_quant": {
        "--bits": [*NUMBERS, "9", "2.5", "99999999999"], "--wbits": ["9", "-3", "two"],
        "--abits": ["33", "", "nan"], "--model": ["resnet9", "", "RESNET8"],
        "--depth": ["0", "49", "x"], "--quantizer": ["LSQ", "dorefa"], "--dataset": ["mnist", ""],
        "--train-size": [*NUMBERS, "0", "2", "37"], "--epochs": [*NUMBERS, "0", "1.5"],
        "--fp-epochs": ["0", "-2", "many"], "--batch-size": [*NUMBERS, "0", "1", "1.0", "9999999"],
        "--lr": ["", "x", "nan", "inf", "0", "-0.1", "1e4"],
        "--weight-decay": ["nan", "-1", "2", "inf"], "--seed": ["x", "-1", "1.5", ["3", "3"], []],
        "--fp-seed": ["x", "-1"], "--device": ["gpu", "", "cuda:99", "abacus", "hpu"],
        "--data-dir": ["/nowhere", "", "/dev/null"],
        "--out": ["/proc/x", "/dev/null", "/dev/null/a"],
        "--recipe": ["nips"], "--resume": ["yes"], "--frobnicate": ["1"]},
    "fpq": {"--p": [*NUMBERS, "2"], "--csd-weight": ["nan", "-1", "x"], "--kd-weight": ["inf"],
            "--noise-at": ["output"], "--method": ["adam", []], "--compare": ["sam"]},
    "cr_qat": {"--lambda-max": [*NUMBERS], "--ramp-epochs": ["nan", "-1"], "--ema": ["1.1", "nan"],
               "--augment": ["mixup", ["none", "flip", "none"], []],
               "--labels": ["0", "2", "36", "x"], "--method": ["fpq"]},
    "mec_quant": {"--bits": ["0"], "--beta": [*NUMBERS], "--eps2": ["0", "-1", "nan"],
                  "--order": ["3", "0", "x"], "--experts": ["0", "-1", "x"], "--branch": ["both"],
                  "--method": ["moe"]},
    "flat_quant": {"--noise-lambda": [*NUMBERS], "--ramp-epochs": ["-1"], "--rho": ["2", "nan"],
                   "--sam-rho": ["-1", "inf"], "--ptq": ["adaround"], "--noise-bits": ["0", "9"],
                   "--method": ["sgd+adam", "weight+", "+"]}}
CASES = [(script, flag, value) for scripts, flags in GARBAGE.items()
         for script in scripts.split() for flag, values in flags.items() for value in values]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_garbage_on_the_command_line_gets_past_one_line(
        script, folder, tmp_path, monkeypatch, capsys):
    assert len(CASES) >= 200
    for _, flag, value in (case for case in CASES if case[0] == script):
        given = [*SHORT, "--dry-run", "--data-dir", str(folder), "--out", str(tmp_path / "out")]
        values = value if isinstance(value, list) else [value]
        if len(values) == 1 and values[0].startswith("-"):
            added = [f"{flag}={values[0]}"]  # as argparse takes a value like -1
        else:
            added = [flag, *values]
        code, err = start(script, monkeypatch, capsys, *given, *added)
        assert code == 2, (flag, value, code, err)
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, (flag, value, err)
        left = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
        assert not left, (flag, value, left)


@pytest.mark.parametrize("script,flags", [
    ("fpq", ["--batch-size", "2", "--p", "1"]), ("fpq", ["--lr", "1e-9", "--weight-decay", "1"]),
    ("cr_qat", ["--labels", "3", "--lambda-max", "0"]), ("cr_qat", ["--ema", "1", "--labels", "5"]),
    ("mec_quant", ["--experts", "8", "--bits", "1"]), ("mec_quant", ["--train-size", "3"]),
    ("flat_quant", ["--train-size", "3", "--rho", "0", "--noise-lambda", "3"])])
def test_extremes_that_are_allowed_run(script, flags, folder, tmp_path, monkeypatch, capsys):
    code, err = start(script, monkeypatch, capsys, *SHORT, "--dry-run", "--data-dir", str(folder),
                      "--out", str(tmp_path), *flags)
    assert code == 0, err


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_black_images_run(script, folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    for file in root.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(file)
    code, err = start(script, monkeypatch, capsys, *SHORT, "--dry-run", "--data-dir", str(root),
                      "--out", str(tmp_path / "out"))
    assert code == 0, err
    for line in (tmp_path / "out/dry-run/results.jsonl").read_text().splitlines():
        assert np.isfinite(json.loads(line)["test_loss"])


def test_a_learning_rate_that_blows_up_stops_with_exit_code_3(
        folder, tmp_path, monkeypatch, capsys):
    code, err = start("fpq", monkeypatch, capsys, *SHORT, "--data-dir", str(folder), "--out",
                      str(tmp_path), "--method", "fpq", "--lr", "1000", "--weight-decay", "1")
    assert code == 3 and "not finite from step" in err and len(err.strip().splitlines()) == 1
    assert "smaller --lr" in err
    code, err = start("mec_quant", monkeypatch, capsys, *SHORT, "--data-dir", str(folder), "--out",
                      str(tmp_path), "--method", "mec", "--order", "4", "--lr", "1000",
                      "--weight-decay", "1", "--diagnose")
    assert code == 3 and len(err.strip().splitlines()) == 1, err
    code, err = start("flat_quant", monkeypatch, capsys, *SHORT, "--data-dir", str(folder), "--out",
                      str(tmp_path), "--method", "additive", "--noise-lambda", "1000",
                      "--ramp-epochs", "0", "--fp-epochs", "9")
    assert code == 3 and "--batch-size" in err and "--lr" not in err, err  # which it does not take


BAD_FOLDERS = ["corrupt", "empty class", "missing in test", "one class", "text as png", "no train",
               "files in place of folders", "truncated", "directory named png", "float tiff"]


@pytest.mark.parametrize("how", BAD_FOLDERS)
def test_bad_folders_are_one_line(how, folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    first = root / "train" / "ant" / "0.png"
    if how == "corrupt":
        first.write_bytes(os.urandom(500))
    elif how == "truncated":
        first.write_bytes(first.read_bytes()[:900])
    elif how == "text as png":
        first.write_text("not an image")
    elif how == "float tiff":
        Image.fromarray(np.zeros((32, 32), np.float32)).save(first.with_suffix(".tiff"))
    elif how == "empty class":
        (root / "train" / "dog").mkdir()
        (root / "test" / "dog").mkdir()
    elif how == "missing in test":
        shutil.rmtree(root / "test" / "cat")
    elif how == "one class":
        for part, name in itertools.product(("train", "test"), ("bee", "cat")):
            shutil.rmtree(root / part / name)
    elif how == "no train":
        shutil.rmtree(root / "train")
    elif how == "files in place of folders":
        shutil.rmtree(root / "train")
        (root / "train").write_text("")
    else:
        first.unlink()
        first.mkdir()
        for file in (root / "train" / "ant").iterdir():
            if file != first:
                file.unlink()
    code, err = start("fpq", monkeypatch, capsys, *SHORT, "--dry-run", "--data-dir", str(root),
                      "--out", str(tmp_path / "out"))
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.stat().st_size]


def test_a_data_directory_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common, "reachable", lambda url: True)
    (tmp_path / "data").write_text("")  # root may write into a read-only one; into this none may
    for name in ("cifar10", "cifar100", "fashion_mnist"):
        code, err = start("fpq", monkeypatch, capsys, "--dataset", name, "--data-dir",
                          str(tmp_path / "data"), "--out", str(tmp_path / "out"))
        assert code == 2 and f"{name} could not be downloaded" in err
        assert len(err.strip().splitlines()) == 1 and not list(tmp_path.rglob("*.pt"))


def test_sixteen_bit_grey_rgba_and_odd_sizes_are_read_as_what_they_show(folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    ant = root / "train" / "ant"
    Image.fromarray(np.full((40, 20), 128 * 257, np.uint16)).save(ant / "0.png")
    Image.fromarray(np.full((32, 32), 128 * 257, np.int32)).save(ant / "4.tiff")
    Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)).save(ant / "5.pgm")
    Image.fromarray(np.full((32, 32), 128, np.int32)).save(ant / "6.tiff")
    Image.new("RGBA", (64, 64), (128, 128, 128, 255)).save(ant / "1.png")
    Image.new("L", (7, 7), 128).save(ant / "2.png")
    Image.new("P", (32, 32), 0).save(ant / "3.png")
    (ant / "notes.txt").write_text("no image, and not looked at")
    data = common.load_data("folder", root)
    order = sorted(p.name for p in ant.iterdir() if p.suffix != ".txt")
    images = data.train_padded[:len(order), 2:-2, 2:-2]
    for name in ("0.png", "1.png", "2.png", "4.tiff", "5.pgm", "6.tiff"):
        assert (images[order.index(name)] == 128).all(), name
