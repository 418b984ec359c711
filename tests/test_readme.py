"""The README's examples run as they stand."""

import re

import torch

import common
from conftest import ROOT, SHAPES

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_examples_quantize_train_export_and_distil():
    names = {}
    for example in EXAMPLES[:2]:
        exec(example, names)
    assert names["loss"].isfinite()
    for name, (weight, scale, zero) in names["integers"].items():
        layer = names["student"].get_submodule(name)
        assert torch.equal((weight - zero) * scale, layer.weight_quantizer(layer.weight))


def test_example_reads_a_checkpoint(run, tmp_path, monkeypatch):
    run("fpq", SHAPES, "--method fpq")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dry-run").rename(tmp_path / "runs")
    file = next((tmp_path / "runs").glob("fpq-*.pt"))
    names = {"common": common, "images": torch.rand(4, 3, 32, 32)}
    exec(EXAMPLES[2].replace("FILE.pt", file.name), names)
    assert names["logits"].shape == (4, 10)
