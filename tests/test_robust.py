"""Kills, damaged files, full disks, two commands at once, bad values, bad images, divergence."""

import importlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import SHAPES
from test_common import at_once

SHORT = "--batch-size 8 --fp-epochs 2 --dataset folder --data-dir"
DRY = "--dry-run --method baseline"
FLAGS = {
    "fpq": "--epochs 2 --method fpq --p 0.5",
    "cr_qat": "--epochs 2 --method cr --views crop+flip+noise",
    "mec_quant": "--epochs 2 --method branch",
    "flat_quant": "--fp-epochs 4 --method weight+activation"}
PROCESSES = multiprocessing.get_context("forkserver")  # forks of one that has only imported
PROCESSES.set_forkserver_preload(["torch._dynamo", "torchvision", "pytest"])


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three classes of coloured noise, twice 12 images each; one of another size and mode."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "test"), "abc", range(12)):
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(60 * ord(name) - 5760, 40, (32, 32, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    Image.new("LA", (40, 20)).save(root / "train/c/00.png")
    return root


def assert_one_line(result, says: str, code: int = 2, out: Path | None = None) -> None:
    """One line that says so on stderr, the exit code, and no result or checkpoint in `out`."""
    assert says in result.err, result
    assert result.code == code
    assert len(result.err.strip().splitlines()) == 1, result.err
    for path in out.rglob("*") if out else []:
        assert path.is_dir() or not path.stat().st_size


# ------------------------------------------------------------------------------------------ kills


def child(argv: list[str], moment: int | None) -> None:
    """A run of a script, in a process of its own, which may be killed.

    Moments are counted: one before and one after each checkpoint takes its place.
    """
    replace = os.replace
    moments = itertools.count(1)

    def pass_or_die():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_or_die(*paths):
        pass_or_die()
        replace(*paths)
        pass_or_die()

    torch.set_num_threads(1)
    common.sharpness = lambda *_: (0.0, 0.0, 0.0)
    os.replace = replace_or_die
    sys.argv = argv
    sys.stdout = io.StringIO()
    common.entry(importlib.import_module(argv[0][:-3]).main)


def start(script: str, images: Path, out: Path, *flags: str, moment=None):
    """The process of a script."""
    argv = f"{script}.py {SHORT} {images} {FLAGS[script]} --out {out}".split()
    process = PROCESSES.Process(target=child, args=([*argv, *flags], moment))
    process.start()
    return process


def drive(*args, moment=None) -> int:
    """The exit code, -9 if killed; a moment that is a float is in seconds."""
    process = start(*args, moment=moment)
    process.join(moment if isinstance(moment, float) else None)
    process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory):
    """{script: (folder, seconds) of a whole run}."""
    runs = {}
    drive("fpq", images, tmp_path_factory.mktemp("fpq"), "--dry-run")  # starts the forkserver
    for script in FLAGS:
        out = tmp_path_factory.mktemp(script)
        started = time.monotonic()
        assert drive(script, images, out) == 0
        runs[script] = (out, time.monotonic() - started)
    return runs


def plain(value):
    """Tensors as bytes; without what may differ between two runs."""
    if isinstance(value, dict):
        times = ("seconds", "seconds_per_epoch", "command")
        return {k: plain(v) for k, v in value.items() if k not in times}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").open()]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Equal weights, optimizer, averages, history and results, bit for bit."""
    assert plain(results(one)) == plain(results(other)) != []
    names = {path.name for path in one.glob("*.pt")}
    assert names == {path.name for path in other.glob("*.pt")}
    for name in names:
        assert plain(torch.load(one / name)) == plain(torch.load(other / name)), name


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("seed", [
    None, *(pytest.param(seed, marks=pytest.mark.kills) for seed in range(10))])
def test_killed_and_resumed_ends_as_undisturbed(seed, script, images, undisturbed, tmp_path):
    """Killed while files are replaced, or at a random moment, if there is a seed.

    The last kill is between checkpoint and result. A finished command that is repeated changes no
    file.
    """
    whole, seconds = undisturbed[script]
    codes = {-9}
    moments = [2, 3, 4, 1, 2, 2]
    if seed is not None:
        codes = {-9, 0}  # by chance too late
        moments = [random.Random(seed).uniform(0.05, 0.9) * seconds]
    for moment in moments:
        assert drive(script, images, tmp_path, "--resume", moment=moment) in codes
    assert drive(script, images, tmp_path, "--resume") == 0
    assert_equal_runs(whole, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert drive(script, images, tmp_path) == 0
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_ctrl_c_is_one_line_and_only_resume_continues(run, images, tmp_path, monkeypatch):
    """It is pressed in the method's second epoch. Full precision is read in any case."""
    epoch_draws = common.epoch_draws

    def interrupted(stage, seed, epoch):
        if stage == "training" and epoch == 1:
            raise KeyboardInterrupt
        return epoch_draws(stage, seed, epoch)

    flags = (SHORT, images, FLAGS["fpq"])
    with monkeypatch.context() as patch:
        patch.setattr(common, "epoch_draws", interrupted)
        assert_one_line(run("fpq", *flags), "interrupted; add --resume", 130)
    file = next(tmp_path.glob("fpq-*.pt"))
    saved = file.read_bytes()
    anew = run("fpq", *flags)
    assert f"{file} has 1 of 2 epochs; without --resume it starts anew" in anew.out
    assert re.findall("  epoch ([^ ]+) ", anew.out) == ["1/2", "2/2"]
    file.write_bytes(saved)
    resumed = run("fpq", *flags, "--resume")
    assert re.findall("  epoch ([^ ]+) ", resumed.out) == ["2/2"]


# ------------------------------------------------------------------------------------------ files


def as_file(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_damaged_checkpoints_are_refused_and_run_no_code(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("fpq", SHORT, images, DRY).code == 0
    for file in tmp_path.rglob("*.pt"):
        whole = file.read_bytes()
        state = torch.load(file)
        at = whole.index(state["model"]["6.weight"].numpy().tobytes())
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
        del state["optimizer"]
        for damaged in [b"", whole[:5000], flipped, as_file(state), as_file({}), as_file(Trap())]:
            file.write_bytes(damaged)
            result = run("fpq", SHORT, images, DRY, "--resume")
            assert_one_line(result, f"{file} is damaged (")
            assert file.read_bytes() == damaged
        with pytest.raises(common.UsageError, match="is damaged"):
            common.load(file)
        file.write_bytes(whole)
    assert not Path("trap").exists()


def test_a_checkpoint_of_other_settings_is_refused_by_the_flag(run, images, tmp_path):
    run("fpq", SHORT, images, DRY)
    file = next(tmp_path.rglob("fp-*.pt"))
    state = torch.load(file)
    state["settings"]["pad"] = 3
    file.write_bytes(as_file(state))
    result = run("fpq", SHORT, images, DRY, "--resume")
    assert_one_line(result, f"{file} has pad 3, not 2; delete it")


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("script", ["fpq", "cr_qat", "mec_quant"])
def test_a_run_from_another_full_precision_has_another_file(script, run, images, tmp_path):
    run(script, SHORT, images, DRY)
    file = next(tmp_path.rglob("fp-*.pt"))
    state = torch.load(file)
    state["model"]["5.bias"] += 1
    file.write_bytes(as_file(state))
    assert "epoch 1/1" in run(script, SHORT, images, DRY, "--resume").out
    assert len([*tmp_path.rglob("baseline-*.pt")]) == 2


def row(name: str, **entries) -> dict:
    return {"run": name, "method": "fp", "wbits": 2, "abits": 2, "loss": 1.5, **entries}


def test_full_disk_is_one_line_and_leaves_nothing_half_written(run, parse, tmp_path):
    def disk_of(size):  # no file can grow beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))

    args = parse("fpq")
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        disk_of(100_000)
        assert_one_line(run("fpq", SHAPES), "File too large", out=tmp_path)
        disk_of(500)
        common.record(args, row("first"))
        with pytest.raises(OSError, match="results.jsonl.* disk"):
            common.record(args, row("second", history="x" * 500))
    finally:
        disk_of(limit)
    assert [found["run"] for found in results(args.out)] == ["first"]


def test_a_row_begins_a_new_line_after_a_half_written_one(parse):
    args = parse("fpq")
    (args.out / "results.jsonl").write_text('{"method": "fp"')
    common.record(args, row("new"))
    half, line = (args.out / "results.jsonl").read_text().splitlines()
    assert half == '{"method": "fp"' and json.loads(line)["run"] == "new"


class SlowFile(io.FileIO):
    """Another command may write while this one has read and not yet written."""

    def read(self):
        content = super().read()
        time.sleep(0.05)
        return content


@pytest.mark.parametrize("name", ["fp-shapes", 'fp-folder büch"er'])
def test_a_row_is_written_once(name, parse, monkeypatch):
    """Also by two commands at once; another row is written beside it."""
    args = parse("fpq")
    monkeypatch.setattr(common, "open", lambda path, mode, **_: SlowFile(path, mode), raising=False)
    at_once(*[partial(common.record, args, row(own)) for own in (name, name, "a")])
    assert sorted(found["run"] for found in results(args.out)) == ["a", name]


def test_commands_at_once_write_a_row_each(images, undisturbed, tmp_path):
    """Here one command twice, and another with the same network in full precision."""
    scripts = ["fpq", "fpq", "cr_qat"]
    processes = [start(script, images, tmp_path) for script in scripts]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = [found["key"] for script in scripts for found in results(undisturbed[script][0])]
    assert sorted(found["key"] for found in results(tmp_path)) == sorted(set(rows))


@pytest.mark.parametrize("moment", ["keep_freed_memory", "print_table"])
def test_a_reader_that_leaves_ends_the_script_without_a_word(
        moment, run, monkeypatch, tiny_networks):
    """As `| head -1` does, at once or when only the table is unread, which is not flushed."""
    reader, writer = os.pipe()

    def leave(*_):
        os.close(reader)
        print("unread")

    monkeypatch.setattr(common, moment, leave)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(writer, "w"))
        result = run("fpq", SHAPES)
        sys.stdout.flush()  # as Python does when it ends
    assert (result.code, result.err) == (141, "")


# ------------------------------------------------------------------------------------- bad values


BAD = dict(case.split() for case in """
    --bits 9, --wbits 2.5, --abits 0, --depth 49, --pad 17, --data-dir /nowhere, --train-size 2,
    --val 36, --batch-size 1, --epochs 0x10, --fp-epochs 1e3, --lr 0, --fp-lr inf, --seed -1,
    --weight-decay -1, --fp-weight-decay 2, --out /dev/null/a, --p 1.1, --ema nan, --csd-weight nan,
    --kd-temperature 0, --kd-weight 1e999, --labels 2, --temperature 0, --rho 2, --lambda-max -1,
    --ramp-epochs -inf, --beta 1_, --eps2 0, --experts 65, --sam-rho -1,
    --noise-lambda +, --label-smoothing 2, --swa-rate -1, --noise-bits 1,
    --mod resnet8""".split(","))
MORE = {
    "cr_qat": ["--views none flip none", "--labels 6 --batch-size 7"],
    "flat_quant": ["--method weight+isotropic"]}


@pytest.mark.parametrize("script", FLAGS)
def test_one_bad_value_per_flag_is_one_line_and_writes_nothing(script, run, images, tmp_path):
    """Flags that are not in BAD, those with choices, switches and --device, refuse "yes"."""
    flags = {"--mod", *re.findall(" (--[a-z0-9-]+)", run(script, "--help").out)} - {"--help"}
    assert len(flags) > 25
    cases = [f"{flag}={BAD.get(flag, 'yes')}" for flag in flags]
    for case in cases + MORE.get(script, []):
        result = run(script, "--dataset folder --data-dir", images, "--dry-run", case)
        flag, value = re.split("[= ]", case)[:2]
        assert_one_line(result, value if flag == "--out" else flag, out=tmp_path)


@pytest.mark.parametrize("spoil", [
    lambda root: Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "train/a/x.png"),
    lambda root: os.truncate(root / "train/a/00.png", 900),
    lambda root: (root / "train/d").mkdir(),
    lambda root: shutil.rmtree(root / "test/c"),
    lambda root: [shutil.rmtree(p) for p in root.glob("*/[bc]")],
    lambda root: [shutil.rmtree(p) for p in root.glob("*/*")],
    lambda root: [shutil.rmtree(root / "train"), (root / "train").write_text("")],
], ids="16bit truncated empty missing one none file".split())
def test_bad_folders_are_one_line(spoil, images, run, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    spoil(folder)
    out = tmp_path / "out"
    assert_one_line(run("fpq", SHORT, folder, "--out", out), str(folder), out=out)


def test_a_class_without_a_training_image_is_one_line(images, run):
    result = run("fpq", SHORT, images, "--val 34")
    assert_one_line(result, "--val 34 leaves 1 of 3 classes without an image")


@pytest.mark.parametrize("script,flags", [
    ("fpq", "--batch-size 2 --p 1"),
    ("cr_qat", "--batch-size 8 --labels 3 --ema 1"),
    ("mec_quant", "--experts 8 --abits 1 --train-size 3"),
    ("flat_quant", "--method weight+activation --train-size 3 --rho 0 --noise-lambda 3")])
def test_black_images_and_extreme_values_run(script, flags, images, run, tmp_path, tiny_networks):
    folder = shutil.copytree(images, tmp_path / "images")
    for file in folder.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(file)
    result = run(script, SHORT, folder, "--dry-run --diagnose", flags)
    assert result.code == 0
    assert np.isfinite([found["loss"] for found in result.results]).all()


@pytest.mark.parametrize("script,flags", [
    ("fpq", "--method fpq"),
    ("mec_quant", "--method mec --diagnose")])
def test_divergence_is_one_line_and_keeps_the_epochs_before(script, flags, images, run, tmp_path):
    result = run(script, SHORT, images, "--lr 1000 --weight-decay 1 --epochs 9", flags)
    assert_one_line(result, "try a smaller --lr", 3)
    kept = torch.load(next(tmp_path.glob(f"{flags.split()[1]}-*.pt")))
    assert f"not finite in epoch {len(kept['history']) + 1};" in result.err
    assert all(value.isfinite().all() for value in kept["model"].values())
