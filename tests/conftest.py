"""Shared by all tests: the import path, tiny data and networks, and the ways to run a script."""

import functools
import importlib
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks need no second thread

import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import flat_quant

SHAPES = "--dataset shapes --dry-run"
draw_shapes = functools.cache(common.draw_shapes)
close = torch.testing.assert_close
same = functools.partial(close, rtol=0, atol=0)  # bit for bit


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pytest_configure(config):
    """What takes long is run only where -m asks for it."""
    config.addinivalue_line("markers", "matrix: every script, network, quantizer and bits: an hour")
    config.addinivalue_line("markers", "kills: forty kills at random moments: two minutes")
    config.option.markexpr = config.option.markexpr or "not matrix and not kills"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Shapes are drawn once. No dry run needs all of the Hessian, which has tests of its own."""
    monkeypatch.setattr(common, "draw_shapes", draw_shapes)
    monkeypatch.setattr(flat_quant, "PROBES", 2)
    monkeypatch.setattr(flat_quant, "ITERATIONS", 1)
    monkeypatch.setattr(flat_quant, "MORE_BITS", [(8, 8)])


def load(seed=0, **flags) -> common.Data:
    """The data of the scripts' default flags, but `flags`."""
    defaults = {"dataset": "shapes", "data_dir": Path("nowhere"), "out": Path("nowhere"),
                "train_size": None, "val": None, "pad": 2, "device": "cpu", "dry_run": False}
    args = Namespace(**defaults | flags)
    return common.make_data(args, common.read_images(args), seed)


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
def called(monkeypatch, tmp_path):
    """called("fpq", *flags) -> the script as a module, after sys.argv has become a user's call.

    Flags that are strings are split at spaces; paths are not.
    """
    def script_of(script: str, *flags: str | Path):
        words = []
        for flag in flags:
            words += flag.split() if isinstance(flag, str) else [str(flag)]
        argv = [f"{script}.py", "--device", "cpu", "--out", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", argv)
        return importlib.import_module(script)
    return script_of


@pytest.fixture
def parse(called):
    """parse("fpq", *flags) -> the args of a dry run on shapes, for `tiny_data`."""
    def parsed(script: str, *flags):
        args = called(script, SHAPES, *flags).parse_args()
        args.epochs_left = 0
        return args
    return parsed


@pytest.fixture
def run(called, tmp_path, capsys):
    """run("fpq", *flags) runs a script as a user does, in this process.

    It returns the exit code .code, printed .out and .err, and .results, all lines so far of all
    results.jsonl within tmp_path.
    """
    def entered(script: str, *flags: str | Path) -> Namespace:
        code = 0
        try:
            common.entry(called(script, *flags).main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        results = []
        for file in sorted(tmp_path.rglob("results.jsonl")):
            results += [json.loads(line) for line in file.open()]
        return Namespace(code=code, out=out, err=err, results=results)
    return entered


def tiny_network():
    torch.manual_seed(0)
    layers = [Conv2dNormActivation(*shape) for shape in ((3, 4, 3, 4), (4, 4, 3), (4, 8, 3))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.fixture
def tiny_networks(monkeypatch):
    """All networks that a script builds are `tiny_network`, all its samples have 8 images."""
    sample = common.Data.sample
    monkeypatch.setattr(common, "build_model", lambda *_: tiny_network())
    monkeypatch.setattr(common.Data, "sample", lambda data, count: sample(data, 8))


def student_of(network, data, *how):
    """What `train` starts from, in training mode."""
    student = common.quantize(network, *how or (2, 2))
    common.calibrate(student, data.sample(100)[0])
    return student.train()


def learned(optimizer):
    """The parameters that require a gradient, in the optimizer's order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def gradients(student, loss):
    """By parameter, in the order of `learned`."""
    return [*torch.autograd.grad(loss, learned(common.sgd(student, 1, 0)))]


def first_step(train, *args) -> list[torch.Tensor | None]:
    """The gradients of `learned` at the first optimizer step of train(*args), which ends it."""
    grads = []

    def step(optimizer, *_):
        grads.extend(p.grad for p in learned(optimizer))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", step)
        train(*args)
    return grads


def first_batch(network, data, args, *views):
    """(student, batch) as `train` has them at its first step, to compute the step by hand.

    The next draws from torch's generator are the script's noise.
    """
    student = student_of(network, data, args.wbits, args.abits, args.quantizer)
    draws = common.epoch_draws("training", 0, 0)
    return student, next(data.batches(args.batch_size, draws, *views))
