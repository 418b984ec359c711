"""Runs what is missing of a list of commands, one process a core, and keeps their results as data:

    python tests/study.py tuning --data-dir DIR     weights and constants, on held-out images
    python tests/study.py study --data-dir DIR      the methods and their controls, on test images
    python tests/study.py report                    the tables of the README, from the data

DIR is CIFAR-10 as a folder of images. Every command is the exact command line of a script, for one
seed. Stopped at any moment, the same call goes on. Plan: tests/data/plan.json; data beside it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# "tuning" is a list of grids: a flag and its values, all else as by default. "study" is a list of
# tables. A row is [name, flags, method of the result], the first row is the reference; "fp", full
# precision, comes with any other row. A column is [heading, augmentation, bits of weights, of
# activations].
PLAN = json.loads((DATA / "plan.json").read_text())
SIZES = "--dataset folder --train-size 5000 {}--fp-epochs 60 --seed {}"


def tuning() -> list[str]:
    """All commands of the tuning, the first seed of everything before the second."""
    commands = []
    for seed in (0, 1):
        for grid in PLAN["tuning"]:
            bits = "--wbits 2 --abits 4" if grid["script"] == "flat_quant.py" else "--bits 2"
            epochs = "" if grid["flag"] == "--epochs" else "--epochs 30 "
            commands += [f"python {grid['script']} --method {grid['method']} {grid['flag']} {value}"
                         f" {bits} {epochs}--augment {augment} {SIZES.format('--val 1000 ', seed)}"
                         for value in grid["values"] for augment in grid["augment"]]
    return commands


def command(table: dict, row: list, column: list, seed: int) -> str:
    return (f"python {table['script']} {row[1]} {table['flags']} --augment {column[1]} "
            f"{SIZES.format('', seed)} --fp-seed same")


def study() -> list[str]:
    """All commands of the tables, the first seed of everything before the second."""
    return list(dict.fromkeys(
        command(table, row, column, seed) for seed in range(5) for table in PLAN["study"]
        if seed < table["seeds"] for row in table["rows"] if row[2] != "fp"
        for column in table["columns"]))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()] if file.exists() else []


def run(commands: list[str], data: Path, data_dir: Path, out: Path, jobs: int) -> None:
    """Run the commands that `data` has no results of, `jobs` at a time; append their results."""
    def one(command):
        words = [sys.executable, *shlex.split(command)[1:], "--data-dir", str(data_dir),
                 "--out", str(out), "--resume"]
        print(f"{time.strftime('%H:%M')}  started {command}", flush=True)
        with (out / "log.txt").open("a") as log:
            code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        rows = [row | {"command": command} for row in read(out / "results.jsonl")
                if row["command"].startswith(command + " --data-dir") and code == 0]
        with data.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{time.strftime('%H:%M')}  {len(rows)} results, exit code {code}; command "
              f"{missing.index(command) + 1} of {len(missing)}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    done = {row["command"] for row in read(data)}
    missing = [command for command in commands if command not in done]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing))  # which raises what one of them raised


def tuning_table(rows: list[dict]) -> str:
    """Mean accuracy on held-out images for each value, over the seeds there are."""
    lines = ["| script, method | flag | value: accuracy %, crop and flip | without augmentation |",
             "|---|---|---|---|"]
    for grid in PLAN["tuning"]:
        bits = [2, 4] if grid["script"] == "flat_quant.py" else [2, 2]
        rows_of = [r for r in rows if [r["script"], r["method"], r["wbits"], r["abits"]] == [
            grid["script"], grid["method"], *bits]]
        columns = []
        for augment in ("crop+flip", "none"):
            cells = []
            for value in grid["values"]:
                acc = [r["acc"] for r in rows_of if r["augment"] == augment
                       and f"{grid['flag']} {value} " in r["command"]]
                if acc:
                    more = f" ({len(acc)})" if len(acc) > 1 else ""
                    cells.append(f"{value:g}: {np.mean(acc):.1f}{more}")
            columns.append(", ".join(cells))
        if any(columns):
            lines.append(f"| `{grid['script']}` {grid['method']} | `{grid['flag']}` | "
                         f"{' | '.join(columns)} |")
    return "\n".join(lines)


def published(name: str, wbits: int, abits: int) -> str:
    """FPQ's gain over LSQ on ResNet-18 and CIFAR-10 in % (Tables 1, 2, 4), or nothing."""
    rows = json.loads((DATA / "published.json").read_text())
    acc = {row["method"].lower(): row["resnet18"] for row in rows
           if [row["dataset"], row["wbits"], row["abits"]] == ["cifar10", wbits, abits]}
    return f"{acc[name] - acc['lsq']:+.2f}" if name in acc else ""


def study_table(table: dict, rows: list[dict]) -> str:
    """Accuracy of each row, and its difference to the first row of the same seed, as mean ±
    standard error over the seeds; the published difference, where there is one."""
    found = {(r["command"], r["method"], r["wbits"], r["abits"]): r["acc"] for r in rows} | {
        (r["augment"], "fp", r["seed"]): r["acc"] for r in rows
        if r["method"] == "fp" and r["train_size"] == 5000}

    def accuracies(row, column):
        keys = {seed: (column[1], "fp", seed) if row[2] == "fp" else (
            command(table, row, column, seed), row[2], *column[2:])
            for seed in range(table["seeds"])}
        return {seed: found[key] for seed, key in keys.items() if key in found}
    columns, reference = table["columns"], table["rows"][0]
    lines = [f"| {table['title']} | {' | | '.join(c[0] for c in columns)} | | published | seeds |",
             "|---|" + "---|---|" * len(columns) + "---|---|"]
    for row in table["rows"]:
        cells, counts = [], []
        for column in columns:
            acc, other = accuracies(row, column), accuracies(reference, column)
            gains = [acc[seed] - other[seed] for seed in acc if seed in other]
            gain = "" if row == reference else common.mean_and_error(gains, "+")
            cells += [common.mean_and_error(list(acc.values())), gain]
            counts.append(len(acc))
        if any(counts):
            fields = row[0], *cells, published(row[0], *columns[0][2:]), str(min(counts))
            lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines) if lines[2:] else ""


def report() -> str:
    """All tables, from the data."""
    rows = read(DATA / "study.jsonl")
    return "\n\n".join(filter(None, [tuning_table(read(DATA / "tuning.jsonl")),
                                     *(study_table(table, rows) for table in PLAN["study"])]))


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
