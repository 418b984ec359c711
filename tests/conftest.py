"""Shared by all tests: the import path, a tiny data set, a way to run a script as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


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
