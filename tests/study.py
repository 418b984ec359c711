"""Runs what is missing of a list of commands, one process a core, and keeps their results as data:

    python tests/study.py tuning --data-dir DIR     weights and constants, on held-out images
    python tests/study.py tuning                    the table of the README, from the data

DIR is CIFAR-10 as a folder of images. Every command is the exact command line of a script, for one
method and one seed. Stopped at any moment, the same call goes on. Data: tests/data/NAME.jsonl.
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
SIZES = "--dataset folder --train-size 5000 --val 1000 --fp-epochs 60 --seed {seed}"


def tuning() -> list[str]:
    """All commands of the tuning, the first seed of everything before the second."""
    commands = []
    for seed in (0, 1):
        for script, method, flag, values, augments in GRIDS:
            for value in values:
                for augment in augments:
                    bits = "--wbits 2 --abits 4" if script == "flat_quant.py" else "--bits 2"
                    epochs = "" if flag == "--epochs" else "--epochs 30 "
                    commands.append(f"python {script} --method {method} {flag} {value} {bits} "
                                    f"{epochs}--augment {augment} {SIZES.format(seed=seed)}")
    return list(dict.fromkeys(commands))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()] if file.exists() else []


def run(commands: list[str], data: Path, data_dir: Path, out: Path, jobs: int) -> None:
    """Start the commands that `data` has no results of, `jobs` at a time; append their results."""
    data.parent.mkdir(exist_ok=True)
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
                    if row["command"].startswith(command + " --data-dir")]
            with data.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows if row["method"] != "fp")
            print(f"{time.strftime('%H:%M')}  {len(rows)} results, exit code {process.returncode}, "
                  f"{len(waiting)} waiting", flush=True)


def tuning_table(rows: list[dict]) -> str:
    """Mean accuracy on held-out images for each value, over the seeds there are."""
    lines = ["| script, method | flag | value: accuracy %, crop and flip | without augmentation |",
             "|---|---|---|---|"]
    for script, method, flag, values, _ in GRIDS:
        bits = (2, 4) if script == "flat_quant.py" else (2, 2)
        columns = []
        for augment in ("crop+flip", "none"):
            cells = []
            for value in values:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=["tuning"])
    parser.add_argument("--data-dir", type=Path,
                        help="CIFAR-10 as a folder of images; without it, print the table")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="for checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    data = ROOT / "tests" / "data" / f"{args.plan}.jsonl"
    if args.data_dir is None:
        print(tuning_table(read(data)))
    else:
        run(tuning(), data, args.data_dir.resolve(), args.out.resolve(), args.jobs)


if __name__ == "__main__":
    main()
