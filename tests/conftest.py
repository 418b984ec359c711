"""Shared by all tests: the import path, tiny data and networks, and the ways to run a script."""

import functools
import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import flat_quant  # noqa: E402

SHAPES = "--dataset shapes --dry-run"
draw_shapes = functools.cache(common.draw_shapes)
close = torch.testing.assert_close
same = functools.partial(close, rtol=0, atol=0)  # bit for bit


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pytest_configure(config):
    """What takes long is run only where -m asks for it."""
    for name, what in (("matrix", "every script, network, quantizer and bits: an hour"),
                       ("kills", "forty kills at random moments: two minutes")):
        config.addinivalue_line("markers", f"{name}: {what}; asked for by -m {name}")
    config.option.markexpr = config.option.markexpr or "not matrix and not kills"


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
def called(monkeypatch, tmp_path):
    """called("fpq", *flags) -> the script as a module, after sys.argv has become that of a user's
    call. Flags that are strings are split at spaces; paths are not."""
    def script_of(script: str, *flags: str | Path):
        words = [word for flag in flags
                 for word in (flag.split() if isinstance(flag, str) else [str(flag)])]
        monkeypatch.setattr(
            sys, "argv", [f"{script}.py", "--device", "cpu", "--out", str(tmp_path), *words])
        return importlib.import_module(script)
    return script_of


@pytest.fixture
def parse(called):
    """parse("fpq", *flags) -> the args of a dry run on shapes, for `tiny_data`."""
    return lambda script, *flags: called(script, SHAPES, *flags).parse_args()


@pytest.fixture
def run(called, tmp_path, capsys):
    """run("fpq", *flags) runs a script as a user does, in this process: exit code .code, printed
    .out and .err, and .results, all lines so far of all results.jsonl within tmp_path."""
    def entered(script: str, *flags: str | Path) -> Namespace:
        code = 0
        try:
            common.entry(called(script, *flags).main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        results = [json.loads(line) for file in sorted(tmp_path.rglob("results.jsonl"))
                   for line in file.open()]
        return Namespace(code=code, out=out, err=err, results=results)
    return entered


def tiny_network():
    torch.manual_seed(0)
    layers = (Conv2dNormActivation(*shape) for shape in ((3, 4, 3, 4), (4, 4, 3), (4, 8, 3)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.fixture
def forces(monkeypatch):
    """A list that all gradient ratios are appended to; the networks and samples become tiny."""
    found, ratio, sample = [], common.gradient_ratio, common.Data.sample
    monkeypatch.setattr(common, "build_model", lambda *_: tiny_network())
    monkeypatch.setattr(common.Data, "sample", lambda data, count: sample(data, 8))
    monkeypatch.setattr(
        common, "gradient_ratio", lambda *terms: found.append(ratio(*terms)) or found[-1])
    return found


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


def first_step_by_script(train, args, data, method, *views):
    """(the script's gradients; network, student and batch to compute them by hand). The next draws
    from torch's generator are the script's noise."""
    network, stream = tiny_network(), functools.partial(common.random_stream, "method")
    grads = first_step(train, args, data, method, 0, network)
    student = student_of(network, data, args.wbits, args.abits, args.quantizer)
    torch.manual_seed(stream("noise", 0, 0))
    draws = torch.Generator().manual_seed(stream("batches", 0, 0))
    return grads, network, student, next(data.batches(32, draws, views))
