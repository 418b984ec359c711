"""Runs what is missing of a list of commands, one process a core, and keeps their results as data:

    python tests/study.py tuning --data-dir DIR     weights and constants, on held-out images
    python tests/study.py study --data-dir DIR      the methods and their controls, on test images
    python tests/study.py report                    the tables of the README, from the data

DIR is CIFAR-10 as a folder of images. Every command is the exact command line of a script, for one
seed. Stopped at any moment, the same call goes on. Data: tests/data/tuning.jsonl, study.jsonl.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# (script, method, flag to tune, its values, augmentations). The flags' other values are defaults.
GRIDS = [("cr_qat.py", "cr", "--lambda-max", [0.1, 0.3, 1.0, 3.0], ["crop+flip", "none"]),
         ("fpq.py", "kd", "--kd-weight", [0.03, 0.1, 0.3, 1.0], ["crop+flip", "none"]),
         ("fpq.py", "csd", "--csd-weight", [0.1, 1.0, 10.0, 100.0], ["crop+flip", "none"]),
         ("fpq.py", "baseline", "--lr", [0.005, 0.01, 0.02, 0.05], ["crop+flip", "none"]),
         ("mec_quant.py", "mec-quant", "--beta", [0.1, 1.0, 10.0, 100.0], ["crop+flip"]),
         ("cr_qat.py", "cr", "--ema", [0.97, 0.99, 0.999], ["crop+flip"]),
         ("fpq.py", "kd", "--kd-temperature", [1.0, 2.0, 8.0], ["crop+flip"]),
         ("flat_quant.py", "weight+activation", "--noise-lambda", [0.25, 0.5, 1.0, 2.0],
          ["crop+flip"]),
         ("flat_quant.py", "sam", "--sam-rho", [0.02, 0.05, 0.1, 0.2], ["crop+flip"]),
         ("fpq.py", "baseline", "--epochs", [15, 60], ["crop+flip"])]
SIZES = "--dataset folder --train-size 5000 {}--fp-epochs 60 --seed {}"

# (title, script, shared flags, rows, columns, seeds). A row is (name, flags, method of the result),
# the first is the reference; a column is (heading, augmentation, bits of the result).
BOTH = [("no augmentation", "none", (2, 2)), ("crop and flip", "crop+flip", (2, 2))]
CONTROLS = "--controls --views crop+flip"
PTQ = [(name, "crop+flip", bits) for name, bits in (
    ("FP", (32, 32)), ("W4A4", (4, 4)), ("W3A4", (3, 4)), ("W2A4", (2, 4)))]


def methods(*names: str, more: str = "") -> list[tuple]:
    return [(name, f"--method {name}{more}", name) for name in names]


TABLES = [
    ("FPQ, W2A2", "fpq.py", "--bits 2 --epochs 30",
     methods("baseline", more=" --diagnose") + methods("sfp", "csd") +
     methods("fpq", more=" --diagnose") + methods("kd", "sam"), BOTH, 5),
    ("CR, W2A2", "cr_qat.py", "--bits 2 --epochs 30",
     [(name, CONTROLS, name) for name in ("baseline", "baseline-ema", "two-view", "pi",
                                          "fp-teacher", "cr", "cr-ema")], BOTH, 5),
    ("MEC-Quant, W2A2", "mec_quant.py", "--bits 2 --epochs 30",
     methods("baseline", "mec", "mec-quant", "branch", "random"), BOTH, 5),
    ("DNQ, before and after PTQ", "flat_quant.py", "--wbits 2 --abits 4",
     [(name + swa, f"--method {name}", name + swa) for swa in ("", "+swa") for name in (
         "sgd", "weight", "additive", "isotropic", "wrong-bits", "activation", "weight+activation",
         "sam")], PTQ, 5),
    ("FPQ, places of the noise, W2A2", "fpq.py", "--bits 2 --epochs 30",
     methods("baseline", more=" --diagnose") + methods("sfp") +
     [(f"sfp, {where}", f"--method sfp --noise-at {where}", "sfp")
      for where in ("input", "weight")], BOTH, 3),
    ("CR, both views the same, W2A2", "cr_qat.py", "--bits 2 --epochs 30",
     [("baseline", CONTROLS, "baseline"), *methods("cr")], BOTH[:1], 3),
    ("CR, 1,000 labels, W2A2", "cr_qat.py", "--bits 2 --epochs 30",
     methods("baseline", "cr", more=" --labels 1000"), BOTH[1:], 3),
    ("MEC-Quant, W4A1", "mec_quant.py", "--wbits 4 --abits 1 --epochs 30",
     methods("baseline", "mec-quant"), [(n, a, (4, 1)) for n, a, _ in BOTH], 3),
    ("W4A4", "fpq.py", "--bits 4 --epochs 30", methods("baseline", "fpq", "kd"),
     [(n, a, (4, 4)) for n, a, _ in BOTH], 3)]


def tuning() -> list[str]:
    """All commands of the tuning, the first seed of everything before the second."""
    commands = []
    for seed in (0, 1):
        for script, method, flag, values, augments in GRIDS:
            for value in values:
                for augment in augments:
                    bits = "--wbits 2 --abits 4" if script == "flat_quant.py" else "--bits 2"
                    epochs = "" if flag == "--epochs" else "--epochs 30 "
                    commands.append(
                        f"python {script} --method {method} {flag} {value} {bits} {epochs}"
                        f"--augment {augment} {SIZES.format('--val 1000 ', seed)}")
    return list(dict.fromkeys(commands))


def command(script: str, flags: str, row: tuple, column: tuple, seed: int) -> str:
    words = ["python", script, row[1], flags, "--augment", column[1], SIZES.format("", seed),
             "--fp-seed same"]
    return " ".join(filter(None, words))


def study() -> list[str]:
    """All commands of TABLES, the first seed of everything before the second."""
    return list(dict.fromkeys(
        command(script, flags, row, column, seed) for seed in range(5)
        for _, script, flags, rows, columns, seeds in TABLES if seed < seeds
        for row in rows for column in columns))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()] if file.exists() else []


def run(commands: list[str], data: Path, data_dir: Path, out: Path, jobs: int) -> None:
    """Start the commands that `data` has no results of, `jobs` at a time; append their results."""
    out.mkdir(parents=True, exist_ok=True)
    done = {row["command"] for row in read(data)}
    waiting, running = [c for c in commands if c not in done], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            command = waiting.pop(0)
            words = [sys.executable, *shlex.split(command)[1:], "--data-dir", str(data_dir),
                     "--out", str(out), "--resume"]
            running[command] = subprocess.Popen(
                words, cwd=ROOT, stdout=(out / "log.txt").open("a"), stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"})
            print(f"{time.strftime('%H:%M')}  started {command}", flush=True)
        time.sleep(1)
        for command, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[command]
            rows = [row | {"command": command} for row in read(out / "results.jsonl")
                    if row["command"].startswith(command + " --data-dir")
                    and process.returncode == 0]
            with data.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"{time.strftime('%H:%M')}  {len(rows)} results, exit code {process.returncode}, "
                  f"{len(waiting)} waiting", flush=True)


def tuning_table(rows: list[dict]) -> str:
    """Mean accuracy on held-out images for each value, over the seeds there are."""
    lines = ["| script, method | flag | value: accuracy %, crop and flip | without augmentation |",
             "|---|---|---|---|"]
    for script, method, flag, values, _ in GRIDS:
        columns = []
        for augment in ("crop+flip", "none"):
            cells = []
            for value in values:
                bits = (2, 4) if script == "flat_quant.py" else (2, 2)
                acc = [r["acc"] for r in rows if f"{flag} {value} " in r["command"] and (
                    r["script"], r["method"], r["augment"], r["wbits"], r["abits"]) == (
                    script, method, augment, *bits)]
                if acc:
                    more = f" ({len(acc)})" if len(acc) > 1 else ""
                    cells.append(f"{value:g}: {np.mean(acc):.1f}{more}")
            columns.append(", ".join(cells))
        if any(columns):
            lines.append(f"| `{script}` {method} | `{flag}` | {' | '.join(columns)} |")
    return "\n".join(lines)


def published(name: str, wbits: int, abits: int) -> str:
    """FPQ's gain over LSQ on ResNet-18 and CIFAR-10 in % (Tables 1, 2, 4), or nothing."""
    acc = {row["method"]: row["resnet18"] for row in json.loads(
        (DATA / "published.json").read_text()) if (row["dataset"], row["wbits"], row["abits"]) == (
        "cifar10", wbits, abits)}
    name = name.upper()
    return f"{acc[name] - acc['LSQ']:+.2f}" if name in acc else ""


def study_table(table: tuple, rows: list[dict]) -> str:
    """Accuracy of each row, and its difference to the first row of the same seed, as mean ±
    standard error over the seeds; the published difference, where there is one."""
    title, script, flags, methods, columns, seeds = table
    found = {(r["command"], r["method"], r["wbits"], r["abits"]): r["acc"] for r in rows}

    def accuracies(row, column):
        keys = {seed: (command(script, flags, row, column, seed), row[2], *column[2])
                for seed in range(seeds)}
        return {seed: found[key] for seed, key in keys.items() if key in found}

    names = [column[0] for column in columns]
    lines = [f"| {title} | {' | | '.join(names)} | | published | seeds |",
             "|---|" + "---|---|" * len(names) + "---|---|"]
    for row in methods:
        cells, counts = [], []
        for column in columns:
            acc, reference = accuracies(row, column), accuracies(methods[0], column)
            gains = [acc[seed] - reference[seed] for seed in acc if seed in reference]
            gain = "" if row == methods[0] else common.mean_and_error(gains, "+")
            cells += [common.mean_and_error(list(acc.values())), gain]
            counts.append(len(acc))
        if any(counts):
            fields = row[0], *cells, published(row[0], *columns[0][2]), min(counts)
            lines.append(f"| {' | '.join(map(str, fields))} |")
    return "\n".join(lines) if lines[2:] else ""


def report() -> str:
    """All tables, from the data."""
    rows = read(DATA / "study.jsonl")
    tables = [tuning_table(read(DATA / "tuning.jsonl")), *(study_table(t, rows) for t in TABLES)]
    return "\n\n".join(filter(None, tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=["tuning", "study", "report"])
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 as a folder of images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="for checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    if args.plan == "report":
        print(report())
    elif args.data_dir is None:
        parser.error("--data-dir is missing: CIFAR-10 as a folder of images")
    else:
        run({"tuning": tuning, "study": study}[args.plan](), DATA / f"{args.plan}.jsonl",
            args.data_dir.resolve(), args.out.resolve(), args.jobs)


if __name__ == "__main__":
    main()
