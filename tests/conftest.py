"""Shared by all tests: the import path, a tiny data set, a way to run a script as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import flat_quant  # noqa: E402


LONG = {"matrix": "every script, network, quantizer and bits: an hour",
        "kills": "a hundred kills at random moments: ten minutes"}


def pytest_configure(config):
    for name, what in LONG.items():
        config.addinivalue_line("markers", f"{name}: {what}; asked for by -m {name}")


def pytest_collection_modifyitems(config, items):
    """What takes long is run only where -m asks for it."""
    if not config.option.markexpr:
        keep = [item for item in items if not any(map(item.get_closest_marker, LONG))]
        config.hook.pytest_deselected(items=[item for item in items if item not in keep])
        items[:] = keep


@pytest.fixture(autouse=True)
def short_study(monkeypatch):
    """The Hessian and PTQ have tests of their own; no dry run needs all of them."""
    for name, value in (("PROBES", 2), ("ITERATIONS", 1), ("PTQ_BITS", [(8, 8)])):
        monkeypatch.setattr(flat_quant, name, value)


@pytest.fixture
def run_script(tmp_path):
    """run_script("fpq.py", "--bits", "2", ...) -> CompletedProcess; results in tmp_path/out."""
    def run(script: str, *flags: str, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), "--out", str(tmp_path / "out"), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                              cwd=tmp_path)
    return run


@pytest.fixture(scope="session")
def tiny_data() -> common.Data:
    """64 drawn training images and 64 for testing."""
    return common.load_data("shapes", Path("nowhere"), dry_run=True)


@pytest.fixture
def calibrated(tiny_data):
    """A calibrated W2A2 resnet8."""
    torch.manual_seed(0)
    model = common.quantize(common.build_model("resnet8", 10), 2, 2)
    common.calibrate(model, tiny_data.sample(16)[0])
    return model
