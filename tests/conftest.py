"""Shared by all tests: the import path, tiny data, and the ways to run a script."""

import functools
import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import flat_quant  # noqa: E402

CPU = ["--device", "cpu"]
SHAPES = [*CPU, "--dataset", "shapes", "--dry-run"]
LONG = {"matrix": "every script, network, quantizer and bits: an hour",
        "kills": "forty kills at random moments: two minutes"}


def pytest_configure(config):
    for name, what in LONG.items():
        config.addinivalue_line("markers", f"{name}: {what}; asked for by -m {name}")


def pytest_collection_modifyitems(config, items):
    """What takes long is run only where -m asks for it."""
    if not config.option.markexpr:
        keep = [item for item in items if not any(map(item.get_closest_marker, LONG))]
        config.hook.pytest_deselected(items=[item for item in items if item not in keep])
        items[:] = keep


draw_shapes = functools.cache(common.draw_shapes)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Shapes are drawn once. No dry run needs all of the Hessian and of PTQ, which have tests."""
    monkeypatch.setattr(common, "draw_shapes", draw_shapes)
    for name, value in (("PROBES", 2), ("ITERATIONS", 1), ("PTQ_BITS", [(8, 8)])):
        monkeypatch.setattr(flat_quant, name, value)


def load(**flags) -> common.Data:
    """load_data with the defaults of the scripts, but `flags`."""
    return common.load_data(Namespace(**{
        "dataset": "shapes", "data_dir": Path("nowhere"), "train_size": None, "val": None,
        "fp_seed": 0, "pad": 2, "device": "cpu", "dry_run": False} | flags))


@pytest.fixture(scope="session")
def tiny_data() -> common.Data:
    """64 drawn training images, and some 64 for testing."""
    return load(dry_run=True)


@pytest.fixture
def calibrated(tiny_data):
    """A calibrated W2A2 resnet8."""
    torch.manual_seed(0)
    model = common.quantize(common.build_model("resnet8", 10), 2, 2)
    common.calibrate(model, tiny_data.sample(16)[0])
    return model


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse("fpq", *flags) -> the args of a dry run on shapes, for `tiny_data`."""
    def arguments(script: str, *flags: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--out", str(tmp_path), *SHAPES, *flags])
        return importlib.import_module(script).parse_args()
    return arguments


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("fpq", *flags) runs a script as a user does, in this process: exit code .code, printed
    .out and .err, and .results, all lines so far of all results.jsonl within tmp_path."""
    def entered(script: str, *flags: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--out", str(tmp_path), *CPU, *flags])
        code = 0
        try:
            common.entry(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        results = [json.loads(line) for file in sorted(tmp_path.rglob("results.jsonl"))
                   for line in file.read_text().splitlines()]
        return Namespace(code=code, out=out, err=err, results=results)
    return entered


class FirstStep(Exception):
    pass


def first_step(monkeypatch, train, *args) -> list[torch.Tensor | None]:
    """The gradients at the first optimizer step of train(*args), of all parameters that require
    one, in the optimizer's order."""
    grads = []

    def step(optimizer, *_):
        grads.extend(p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.requires_grad)
        raise FirstStep

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        with pytest.raises(FirstStep):
            train(*args)
    return grads
