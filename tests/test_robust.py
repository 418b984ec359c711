"""Kills, damaged files, full disks, bad values, bad images, divergence."""

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
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import common
import flat_quant
from conftest import SHAPES

SHORT = "--batch-size 8 --fp-epochs 2 --epochs 2 --dataset folder --data-dir"
FLAGS = {"fpq": "--method fpq --p 0.5", "cr_qat": "--method cr --views crop+flip+noise",
         "mec_quant": "--method branch",
         "flat_quant": "--method weight+activation --fp-epochs 4"}
TIMES = "seconds", "seconds_per_epoch", "command"
PROCESSES = multiprocessing.get_context("forkserver")  # forks of one that has only imported
PROCESSES.set_forkserver_preload(["torch._dynamo", "torchvision", "pytest"])


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three classes of coloured noise, 12 and 4 images each; one of another size and mode."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "test"), "abc", range(12)):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        if part == "train" or i < 4:
            pixels = rng.normal(60 * ord(name) - 5760, 40, (32, 32, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i:02}.png")
    Image.new("LA", (40, 20)).save(root / "train/c/00.png")
    return root


def child(argv: list[str], moment: tuple) -> None:
    """A run of a script, in a process of its own. A moment (n, "before") or (n, "after") is that of
    the n-th checkpoint taking its place; there it is killed."""
    def replace_or_die(*paths, replace=os.replace, written=itertools.count(1)):
        number = next(written)
        if moment == (number, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if moment == (number, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
    torch.set_num_threads(1)
    common.sharpness, flat_quant.PTQ_BITS = lambda *_: (0.0, 0.0, 0.0), []
    os.replace, sys.argv, sys.stdout = replace_or_die, argv, io.StringIO()
    common.entry(importlib.import_module(argv[0][:-3]).main)


def drive(script: str, images: Path, out: Path, *flags: str, moment=None) -> int:
    """The exit code, -9 if killed; a moment that is a number kills after so many seconds."""
    argv = [f"{script}.py", *SHORT.split(), str(images), *FLAGS[script].split(), "--out", str(out)]
    process = PROCESSES.Process(target=child, args=([*argv, *flags], moment))
    process.start()
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
        out, started = tmp_path_factory.mktemp(script), time.monotonic()
        assert drive(script, images, out) == 0
        runs[script] = out, time.monotonic() - started
    return runs


def plain(value):
    """Tensors as bytes; without TIMES, which may differ between two runs."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def assert_equal_runs(*outs: Path) -> None:
    """Equal weights, optimizer, averages, history and results, bit for bit."""
    one, other = ({p.name: plain(torch.load(p)) for p in out.glob("*.pt")} | {
        "results": [plain(json.loads(x)) for x in (out / "results.jsonl").open()]} for out in outs)
    assert one.keys() == other.keys() and one["results"]
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("seed", [
    0, 1, *(pytest.param(seed, marks=pytest.mark.kills) for seed in range(2, 12))])
def test_killed_and_resumed_ends_as_undisturbed(seed, script, images, undisturbed, tmp_path):
    """Killed at checkpoints, the last time between checkpoint and result, or, if there is a seed,
    at a random moment. A finished run resumed changes nothing."""
    whole, seconds = undisturbed[script]
    moments = [(1, "before"), (2, "after"), (2, "before"), (1, "after"), (2, "after")]
    codes = {-9}
    if seed:  # by chance too late
        moments, codes = [random.Random(seed).uniform(0.05, 0.9) * seconds], {-9, 0}
    for moment in moments:
        assert drive(script, images, tmp_path, "--resume", moment=moment) in codes
    assert drive(script, images, tmp_path, "--resume") == 0
    assert_equal_runs(whole, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert drive(script, images, tmp_path, "--resume") == 0
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_ctrl_c_is_one_line_and_keeps_the_epochs_before(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "update_bn", Mock(side_effect=KeyboardInterrupt))
    assert_one_line(run("fpq", SHORT, images, "--epochs 9"), "interrupted; add --resume", 130)
    assert len(torch.load(next(tmp_path.glob("fp-*.pt")))["history"]) == 2


def assert_one_line(result, says: str, code: int = 2, out: Path | None = None) -> None:
    """One line that says so on stderr, the exit code, and nothing written to `out`."""
    assert result.code == code and says in result.err, result
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not out or not any(p.is_file() and p.stat().st_size for p in out.rglob("*"))


def test_damaged_checkpoints_are_refused_and_run_no_code(run, images, tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trap",)

    def as_file(content):
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()
    monkeypatch.chdir(tmp_path)
    flags = SHORT, images, "--dry-run --method baseline"
    assert run("fpq", *flags).code == 0
    for file in tmp_path.rglob("*.pt"):
        whole, state = file.read_bytes(), torch.load(file)
        at = whole.index(state["model"]["6.weight"].numpy().tobytes())
        for damaged in (b"", whole[:5000], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:],
                        as_file(Trap()), as_file({"weights": torch.ones(3)}),
                        as_file(state | {"identity": state["identity"] | {"pad": 3}}),
                        as_file({k: v for k, v in state.items() if k != "optimizer"})):
            file.write_bytes(damaged)
            assert_one_line(run("fpq", *flags, "--resume"), f"{file} is damaged or")
            assert file.read_bytes() == damaged and not Path("trap").exists()
        file.write_bytes(whole)


def test_full_disk_is_one_line_and_leaves_nothing_half_written(run, tmp_path):
    def disk_of(size):  # no file can grow beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        disk_of(100_000)
        assert_one_line(run("fpq", SHAPES), "File too large", out=tmp_path)
        disk_of(30)
        common.record(tmp_path, {"first": 1})
        with pytest.raises(OSError, match="results.jsonl.* disk"):
            common.record(tmp_path, {"second": "x" * 100})
    finally:
        disk_of(limit)
    assert (tmp_path / "results.jsonl").read_text() == '{"first": 1}\n'


BAD = dict(case.split() for case in """
    --bits 9, --wbits 2.5, --abits 0, --depth 49, --pad 17, --data-dir /nowhere, --train-size 2,
    --val 36, --batch-size 1, --epochs 0x10, --fp-epochs 1e3, --lr 0, --fp-lr inf, --seed -1,
    --weight-decay -1, --fp-weight-decay 2, --fp-seed nan, --out /dev/null/a, --p 1.1, --ema nan,
    --csd-weight nan, --kd-temperature 0, --kd-weight 1e999, --labels 2, --temperature 0, --rho 2,
    --lambda-max -1, --ramp-epochs -inf, --order 3, --beta 1_, --eps2 0, --experts 65, --sam-rho -1,
    --noise-lambda +, --label-smoothing 2, --noise-bits 1, --mod resnet8""".split(","))
MORE = {"cr_qat": ["--views none flip none", "--labels 6 --batch-size 7"], "fpq": [],
        "flat_quant": ["--method +", "--method weight+isotropic"], "mec_quant": ["--order 2"]}


@pytest.mark.parametrize("script", FLAGS)
def test_one_bad_value_per_flag_is_one_line_and_writes_nothing(script, run, images, tmp_path):
    """Flags that are not in BAD, those with choices, switches and --device, refuse "yes"."""
    flags = {"--mod", *re.findall(" (--[a-z0-9-]+)", run(script, "--help").out)} - {"--help"}
    for case in [*(f"{flag}={BAD.get(flag, 'yes')}" for flag in flags), *MORE[script]]:
        result = run(script, SHORT, images, "--dry-run", case)
        flag, value = re.split("[= ]", case)[:2]
        assert_one_line(result, value if flag == "--out" else flag, out=tmp_path)
    assert len(flags) > 30


@pytest.mark.parametrize("spoil", [
    lambda root: Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "train/a/x.png"),
    lambda root: os.truncate(root / "train/a/00.png", 900),
    lambda root: (root / "train/d").mkdir(), lambda root: shutil.rmtree(root / "test/c"),
    lambda root: [shutil.rmtree(p) for p in root.glob("*/[bc]")],
    lambda root: [shutil.rmtree(root / "train"), (root / "train").write_text("")],
], ids="16bit truncated empty missing one file".split())
def test_bad_folders_are_one_line(spoil, images, run, tmp_path):
    folder, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    spoil(folder)
    assert_one_line(run("fpq", SHORT, folder, "--out", out), str(folder), out=out)


@pytest.mark.parametrize("script,flags", [
    ("fpq", "--batch-size 2 --p 1"), ("cr_qat", "--labels 3 --ema 1"),
    ("mec_quant", "--experts 8 --bits 1 --train-size 3"),
    ("flat_quant", "--method weight+activation --train-size 3 --rho 0 --noise-lambda 3")])
def test_equal_black_images_and_extreme_values_run(script, flags, images, run, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    for file in folder.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(file)
    result = run(script, SHORT, folder, "--dry-run", flags)
    assert result.code == 0 and np.isfinite([r["loss"] for r in result.results]).all(), result


@pytest.mark.parametrize("script,flags", [
    ("fpq", "--method fpq --lr 1000 --weight-decay 1 --epochs 9"),
    ("mec_quant", "--method mec --order 4 --lr 1000 --weight-decay 1 --diagnose --epochs 9")])
def test_divergence_is_one_line_and_keeps_the_epochs_before(script, flags, images, run, tmp_path):
    result = run(script, SHORT, images, flags)
    assert_one_line(result, "learning rate peaks at 1000, try a smaller one", 3)
    kept = torch.load(next(tmp_path.glob(f"{flags.split()[1]}-*.pt")))
    assert f"not finite in epoch {len(kept['history']) + 1};" in result.err
    assert all(v.isfinite().all() for v in kept["model"].values())
