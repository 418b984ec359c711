"""Does the suite prove itself? Breaks one line at a time and looks whether a test fails:

    python tests/mutate.py                         every mutant of every equation, some hours
    python tests/mutate.py --sample 40 --seed 1    that many, drawn at random
    python tests/mutate.py --only fpq.csd_loss     those of one function

A mutant swaps + and -, * and /, < and > and their like, drops a sign, doubles a constant (or makes
0 a 1), exchanges min and max or clamp_min and clamp_max, or negates a condition, in one place of a
function that holds an equation. It works on a copy in a temporary directory. Survivors are listed.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy  # noqa: F401  (with torch and torchvision: imported once, for all children)
import pytest
import torch  # noqa: F401
import torch.optim.swa_utils  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
EQUATIONS = [  # file, functions and methods, tests that guard them
    ("common", ["FakeQuantize.forward", "FakeQuantize.backward", "fake_quantize", "scale_gradient",
                "straight_through", "Quantizer.grid", "Quantizer.forward", "Quantizer.initialize",
                "Quantizer.integers"], ["test_quantizers.py", "test_architectures.py"]),
    ("common", ["OffsetQuantizer.grid", "OffsetQuantizer.forward", "OffsetQuantizer.initialize",
                "ClipQuantizer.step", "ClipQuantizer.forward", "ClipQuantizer.initialize",
                "TanhQuantizer.grid", "TanhQuantizer.integers", "TanhQuantizer.forward"],
     ["test_architectures.py"]),
    ("common", ["cosine_lr", "hessian_trace", "hessian_top_eigenvalue", "balanced_subset"],
     ["test_common.py"]),
    ("fpq", ["stochastic_feature_perturbation", "standardize", "channel_mean",
             "ChannelDistance.forward", "ChannelDistance.backward", "csd_loss", "kd_loss"],
     ["test_fpq.py"]),
    ("cr_qat", ["consistency_loss", "ramp_up", "ema_update", "distort", "weight_entropy"],
     ["test_cr_qat.py"]),
    ("mec_quant", ["normalized_rows", "series_logdet", "coding_length", "series_converges",
                   "moe_coding_length", "scale_gates", "longest_code"], ["test_mec_quant.py"]),
    ("flat_quant", ["quantization_error", "error_decomposition", "excess_kurtosis",
                    "DifferentialWeightNoise.measure", "DifferentialWeightNoise.injected",
                    "ActivationNoise.perturb", "ActivationNoise.measure", "smooth", "SAM.ascended",
                    "loss_under_noise", "rank_correlation"], ["test_flat_quant.py"])]
SKIP = " and ".join(f"not {word}" for word in (
    "user", "vit", "matrix", "one_batch", "compile", "ctrl_c", "torchvision", "macs",
    "pixels"))  # slow, and about other things
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
             ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
             ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
         "amin": "amax", "amax": "amin", "argmin": "argmax", "add": "sub", "sub": "add",
         "add_": "sub_", "sub_": "add_", "mul_": "div_", "div_": "mul_", "sum": "mean",
         "mean": "sum", "std": "var", "var": "std", "sqrt": "square", "rsqrt": "sqrt",
         "maximum": "minimum", "minimum": "maximum"}


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}": n for n in node.body
                      if isinstance(n, ast.FunctionDef)}
    return found


SYMMETRIC = "the noise is symmetric: the same in distribution"
SAMPLE = "how many values are looked at; the choice is not an equation"
START = "where a search starts whose end is tested"
REASONS = {  # survivors that no test could or need catch
    "common.FakeQuantize.backward: x.device.type == 'mps': Eq -> NotEq":
        "whether memory is used again; the values are the same",
    "common.Quantizer.initialize: 100: 100 -> 200": "a finer search; `calibrate` names 100 itself",
    "common.Quantizer.initialize: 0: 0 -> 1": "leaves out the narrowest of 100 ranges",
    "common.Quantizer.initialize: (x_hat - rows).square().sum: sum -> mean": "has the same least",
    "common.Quantizer.initialize: 65536: 65536 -> 131072": SAMPLE,
    "common.OffsetQuantizer.initialize: 100: 100 -> 200": START,
    "common.OffsetQuantizer.initialize: -start.zero_point * start.step: Mult -> Div": START,
    "common.OffsetQuantizer.initialize: -start.zero_point: - dropped": START,
    "common.OffsetQuantizer.initialize: 20: 20 -> 40": "more rounds than it needs",
    "common.OffsetQuantizer.initialize: 65536: 65536 -> 131072": SAMPLE,
    "common.OffsetQuantizer.initialize: 1: 1 -> 2": SAMPLE,
    "common.ClipQuantizer.initialize: 100: 100 -> 200": "a finer search; `calibrate` names 100",
    "fpq.stochastic_feature_perturbation: x + delta.mul_(step.detach()): Add -> Sub": SYMMETRIC,
    "cr_qat.distort: view + 0.1 * torch.randn_like(view): Add -> Sub": SYMMETRIC,
    "cr_qat.distort: view * (1 + gain) + shift: Add -> Sub": SYMMETRIC,
    "cr_qat.distort: 1 + gain: Add -> Sub": SYMMETRIC,
    "mec_quant.series_logdet: k + 1: Add -> Sub": "(-1)^(k-1) is (-1)^(k+1)",
    "mec_quant.series_converges: 3: 3 -> 6": "the line that a warning points at",
    "flat_quant.quantization_error: 100: 100 -> 200": "a finer search; both noises name theirs",
    "flat_quant.ActivationNoise.measure: 0: 0 -> 1": "variance of 10^5 values over n or n - 1",
    "flat_quant.loss_under_noise: 256: 256 -> 512": "how many images; the tests have 64"}


def changes(node: ast.AST) -> list:
    """What can be done to this node, as (description, function that does it in place)."""
    out = []
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        new = OPERATORS[type(node.op)]
        out.append((f"{type(node.op).__name__} -> {new.__name__}",
                    lambda n: setattr(n, "op", new())))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        other = OPERATORS[type(node.ops[0])]
        out.append((f"{type(node.ops[0]).__name__} -> {other.__name__}",
                    lambda n: n.ops.__setitem__(0, other())))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        out.append(("- dropped", lambda n: setattr(n, "op", ast.UAdd())))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        out.append(("not dropped", lambda n: setattr(n, "op", ast.UAdd())))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value * 2 or 1
        out.append((f"{node.value} -> {value}", lambda n: setattr(n, "value", value)))
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        out.append((f"{node.attr} -> {NAMES[node.attr]}",
                    lambda n: setattr(n, "attr", NAMES[n.attr])))
    if isinstance(node, ast.Name) and node.id in ("min", "max"):
        out.append((f"{node.id} -> {NAMES[node.id]}", lambda n: setattr(n, "id", NAMES[n.id])))
    return out


def mutants(file: str, names: list[str]) -> list[tuple[str, int, str, int, int]]:
    """(function, line, what is done, index of the node in a walk, index of the change)."""
    found = functions(ast.parse((ROOT / f"{file}.py").read_text()))
    return [(name, node.lineno, f"{name}: {ast.unparse(node)[:60]}: {what}", i, j)
            for name in names for i, node in enumerate(ast.walk(found[name]))
            for j, (what, _) in enumerate(changes(node))]


def broken(file: str, name: str, index: int, change: int) -> str:
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    node = list(ast.walk(functions(tree)[name]))[index]
    changes(copy.copy(node))[change][1](node)
    return ast.unparse(ast.fix_missing_locations(tree))


def caught(directory: Path, file: str, source: str, tests: list[str], seconds: int = 300) -> bool:
    """Whether a test fails. The child is forked: importing torch takes longer than most tests."""
    (directory / f"{file}.py").write_text(source)
    child = os.fork()
    if child == 0:
        sys.dont_write_bytecode = True  # a mutant of the same second and size would be taken for it
        os.chdir(directory)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", SKIP,
                              *(f"tests/{t}" for t in tests)]) != 0)
    for _ in range(20 * seconds):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True  # a mutant that never ends does not pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many of them, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="file, or file.function")
    args = parser.parse_args()
    work = [(file, tests, *m) for file, names, tests in EQUATIONS for m in mutants(file, names)
            if f"{file}.{m[0]}".startswith(args.only)]
    total = len(work)
    if args.sample:
        work = sorted(random.Random(args.seed).sample(work, min(args.sample, total)))
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / "copy"
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(
            ".*", "runs", "data", "__pycache__"))
        for file, tests in {(file, tuple(tests)) for file, tests, *_ in work}:
            if caught(copied, file, (ROOT / f"{file}.py").read_text(), tests):
                sys.exit(f"{', '.join(tests)} fail as they stand, or take too long")
        for file, tests, name, line, what, index, change in work:
            dead = caught(copied, file, broken(file, name, index, change), tests)
            (copied / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
            print(f"{'caught  ' if dead else 'SURVIVED'} {file}.py:{line} {what}", flush=True)
            if not dead:
                reason = REASONS.get(f"{file}.{what}", "no reason known: a test is missing")
                survivors.append(f"{file}.py:{line} {what}\n    {reason}")
    share = 100 * (1 - len(survivors) / len(work))
    print(f"\n{len(work) - len(survivors)} of {len(work)} mutants caught, {share:.1f} % (of {total} "
          "there are); the others:", *survivors, sep="\n")


if __name__ == "__main__":
    main()
