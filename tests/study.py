"""Runs the commands of tests/data/plan.json that have no results yet, and keeps the results.

    python tests/study.py tuning --data-dir DIR     weights of losses, on held-out images
    python tests/study.py study --data-dir DIR      methods and controls, on test images

DIR has CIFAR-10 as train/CLASS/* and test/CLASS/*. A command trains one row with one seed, on one
core. If you stop the runs, the same call goes on.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
PLAN = json.loads((DATA / "plan.json").read_text())


def command(table: dict, row: dict, column: str, seed: int) -> str:
    flags = f"{table['flags']} {table['columns'][column]}"
    return " ".join(f"python {row['command']} {flags} --seed {seed}".split())


def commands(tables: list[dict]) -> list[str]:
    """Of all tables, in their order; within a table seed by seed, so that rows stay paired."""
    found = []
    for table in tables:
        for seed in table["seeds"]:
            for column in table["columns"]:
                for row in table["rows"]:
                    if "command" in row:
                        found.append(command(table, row, column, seed))
    return list(dict.fromkeys(found))


def read(file: Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.open()]


def run_one(text: str, file: Path, data_dir: Path, out: Path) -> None:
    """Run the command `text` and append the rows of results that are its own to `file`."""
    words = [sys.executable, *shlex.split(text)[1:], "--data-dir", str(data_dir), "--out", str(out),
             "--resume"]
    with (out / "log.txt").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    if code == 0:
        rows = [row for row in read(out / "results.jsonl")
                if row["command"].startswith(text + " --data-dir")]
        lines = [json.dumps(row | {"command": text}) + "\n" for row in rows]
        with file.open("ab", buffering=0) as results:  # one write, so that a kill leaves no half
            results.write("".join(lines).encode())
    print(f"exit code {code}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", choices=["tuning", "study"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = DATA / f"{args.plan}.jsonl"
    done = {row["command"] for row in read(file)}
    todo = [text for text in commands(PLAN[args.plan]) if text not in done]
    with ThreadPoolExecutor(args.jobs) as pool:  # list() raises here what a thread raised
        list(pool.map(lambda text: run_one(text, file, args.data_dir.resolve(),
                                           args.out.resolve()), todo))


if __name__ == "__main__":
    main()
