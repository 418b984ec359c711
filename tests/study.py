"""Runs the commands of a plan that have no results yet, --jobs at a time, and keeps the results:

    python tests/study.py tuning --data-dir DIR     loss weights and constants, on held-out images
    python tests/study.py study --data-dir DIR      the methods and their controls, on test images
    python tests/study.py report                    tables, verdicts and charts, from the results

DIR has CIFAR-10 as train/<class>/* and test/<class>/*. Each command trains one seed; `run` adds DIR
to it. If you stop the runs, the same call goes on. tests/data has the plan and the results.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
sys.path.insert(0, str(ROOT))
from common import FP_FLAGS, mean_and_error  # noqa: E402

# "tuning" and "study" are lists of tables. A row is [name, script and flags, method, published gain
# if any]; the first is the reference; "fp" is the full precision that the reference starts from. A
# column is [heading, flags, bits of weights, of activations, figure if not acc]. A claim is [paper,
# text, figure, margin to beat the other row by, [table, indices of columns, row, other row], ...].
PLAN = json.loads((DATA / "plan.json").read_text())


def command(table: dict, row: list, column: list, seed: int) -> str:
    return f"python {row[1]} {table['flags']} {column[1]} {table['data']} --seed {seed}"


def commands(tables: list[dict]) -> list[str]:
    """Of all tables: first seeds 0 to 2, then the others; in each part the lowest tier first."""
    found = [((seed >= 3, table["tier"], seed), command(table, row, column, seed))
             for table in tables for seed in range(table["seeds"])
             for row in table["rows"] if row[2] != "fp" for column in table["columns"]]
    return list(dict.fromkeys(text for _, text in sorted(found, key=lambda pair: pair[0])))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()] if file.exists() else []


def run(commands: list[str], data: Path, data_dir: Path, out: Path, jobs: int) -> None:
    """Run, `jobs` at a time, the commands without results in the file `data`, and append theirs."""
    def one(command):
        words = [sys.executable, *shlex.split(command)[1:], "--data-dir", str(data_dir),
                 "--out", str(out), "--resume"]
        with (out / "log.txt").open("a") as log:
            code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        rows = [row | {"command": command} for row in read(out / "results.jsonl")
                if row["command"].startswith(command + " --data-dir") and code == 0]
        with data.open("ab", buffering=0) as file:  # one write, so a kill leaves no half line
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"exit code {code}, see log.txt: {command}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    done = {row["command"] for row in read(data)}
    with ThreadPoolExecutor(jobs) as pool:  # list() raises here what a thread raised
        list(pool.map(one, [command for command in commands if command not in done]))


def start(result: dict) -> tuple:
    """What tells one full-precision network from another."""
    return result["data"], *map(result.get, FP_FLAGS)


def index(rows: list[dict]) -> dict:
    """Results by (command, method or its start "fp", bits). "trace 30" in them is the mean of
    epochs 26 to 30, as that of one epoch has much noise."""
    fp, found = {start(r): r for r in rows if r["method"] == "fp"}, {}
    for r in rows:
        history = r.get("history", [])
        by_epoch = {f"{name} {i}": np.mean([np.ravel(h[name])[0] for h in history[:i][-5:]])
                    for i in range(1, len(history) + 1) for name in history[0]}
        found[r["command"], r["method"], r["wbits"], r["abits"]] = r | by_epoch
        found[r["command"], "fp", r["wbits"], r["abits"]] = fp.get(start(r), {})
    return found


def values(table: dict, names: list, column: list, found: dict, what: str = "acc") -> list[float]:
    """By complete seed: the first row's figure, the column's own or `what`, minus the second's."""
    by_seed, rows = [], {row[0]: row for row in table["rows"]}
    for seed in range(table["seeds"]):
        terms = []
        for row in map(rows.__getitem__, names):
            trained = table["rows"][0] if row[2] == "fp" else row
            key = command(table, trained, column, seed), row[2], *column[2:4]
            terms.append(found.get(key, {}).get(*column[4:] or [what]))
        if None not in terms:
            by_seed.append(terms[0] - sum(terms[1:]))
    return by_seed


def moments(sample: list[float]) -> tuple[float, float]:
    """(mean, standard error), nan where there are too few values."""
    sample = sample or [np.nan]
    return np.mean(sample), np.std(sample) / (len(sample) - 1 or np.nan) ** 0.5


def tuning_table(found: dict) -> str:
    """Accuracy on held-out images for each value of a flag, as mean ± standard error."""
    lines = ["| script, method | flag (default) | value: held-out acc. %, crop+flip | without |",
             "|---|---|---|---|"]
    for table in PLAN["tuning"]:
        cells = ["", ""]
        for i, column in enumerate(table["columns"]):
            acc = {name: values(table, [name], column, found) for name, *_ in table["rows"]}
            cells[i] = ", ".join(f"{name}: {mean_and_error(a)}" for name, a in acc.items())
        lines.append(f"| {table['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def study_table(table: dict, found: dict) -> str:
    """Accuracy of each row, and its difference to the first row of the same seed, as mean ±
    standard error over the seeds; the published difference, where there is one."""
    columns, first = table["columns"], table["rows"][0][0]
    lines = [f"| {table['title']} | {' | difference | '.join(c[0] for c in columns)} | difference "
             "| published difference | seeds |", "|---|" + "---|---|" * len(columns) + "---|---|"]
    for name, _, _, *gain in table["rows"]:
        acc = [values(table, [name], c, found) for c in columns]
        more = [values(table, [name, first], c, found) if name != first else [] for c in columns]
        cells = [cell for a, m in zip(acc, more)
                 for cell in (mean_and_error(a), mean_and_error(m, "+"))]
        if any(acc):
            seeds = "/".join(dict.fromkeys(str(len(a)) for a in acc))  # by column if not the same
            lines.append(f"| {' | '.join([name, *cells, *(gain or ['']), seeds])} |")
    return "\n".join(lines) if lines[2:] else ""


def verdicts(found: dict) -> str:
    """A row per claim: differences of at least three seeds, and if 2 errors beyond the margin."""
    lines = ["| paper | claim | measured (seeds) | holds |", "|---|---|---|---|"]
    tables = {table["title"]: table for table in PLAN["study"]}
    for paper, claim, what, margin, *tests in PLAN["claims"]:
        cells, errors = [], []
        for title, where, name, than in tests:
            for column in (tables[title]["columns"][i] for i in where):
                sample = values(tables[title], [name, than], column, found, what)
                if sample[2:]:
                    mean, error = moments(sample)
                    errors += [(mean - margin) / error]
                    cells += [f"{title}, {column[0]} {mean_and_error(sample, '+')} ({len(sample)})"]
        verdict = ("not run" if not errors else "yes" if min(errors) > 2 else "mixed"
                   if min(errors) < -2 and max(errors) > 2 else "in part" if max(errors) > 2
                   else "no" if min(errors) < -2 else "not shown")
        head = f"| {paper} | {claim} | {what}, {' - '.join(tests[0][2:])}: "
        lines.append(f"{head}{'; '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def chart(title: str, x: list, *series: tuple) -> str:
    """A chart for Mermaid, with 0; "" if a value is missing. series: ("bar" or "line", values)."""
    names, ends = ", ".join(f'"{n}"' for n in x), [0, *(v for _, data in series for v in data)]
    axis = f"    y-axis {np.floor(min(ends)):.0f} --> {np.ceil(max(ends)):.0f}"
    lines = [f'    title "{title}"', f"    x-axis [{names}]", axis, *(
        f"    {kind} [{', '.join(f'{v:.2f}' for v in data)}]" for kind, data in series)]
    head = "xychart-beta horizontal" if series[0][0] == "bar" else "xychart-beta"
    return "" if "nan" in str(lines) else "\n".join(["```mermaid", head, *lines, "```"])


def charts(found: dict) -> list[str]:
    """Gains beside published; trace by epoch; accuracy after PTQ by bits, and its drop by trace."""
    def mean(table, name, column, what="acc"):
        return moments(values(table, [name], column, found, what))[0]
    qat, _, dnq, *_, large, _ = PLAN["study"]
    bits, bars = dnq["columns"][:3], {}
    for name, _, _, gain in (row for row in large["rows"] if row[3:]):
        gained, error = moments(values(large, [name, "baseline"], large["columns"][0], found))
        bars |= {f"{name}: ± {error:.2f}": gained, f"{name}, published": float(gain)}
    acc = {name: [mean(dnq, name, column) for column in bits] for name, *_ in dnq["rows"]}
    traces, names = zip(*sorted((mean(dnq, name, bits[1], "trace"), name) for name in acc))
    full, low, *_ = np.transpose([acc[name] for name in names])
    near = abs(full - acc["sgd"][0]) < 1
    r, of_near = (np.corrcoef(np.log(traces)[m], (full - low)[m])[0, 1] for m in (full > 0, near))
    return [
        chart(f"Points over LSQ ± standard error. {large['title']}", bars, ("bar", bars.values())),
        chart("Hessian trace, mean of five epochs, W2A2: LSQ, then FPQ", range(1, 31), *(
            ("line", [mean(qat, name, qat["columns"][0], f"trace {i}") for i in range(1, 31)])
            for name in ("baseline", "fpq"))),
        chart("Accuracy in % after PTQ: sgd, then weight+activation+swa, for W2A4",
              [column[0] for column in bits], ("line", acc["sgd"]),
              ("line", acc["weight+activation+swa"])),
        chart(f"Points lost by PTQ to W4A4, by trace. Correlation with its logarithm {r:.2f}, of "
              f"the networks within 1 point of sgd before PTQ {of_near:.2f}",
              [f"{name} {trace:.0f}" for name, trace in zip(names, traces)], ("bar", full - low))]


def report() -> str:
    """All tables, verdicts and charts, from the data."""
    found = index(read(DATA / "study.jsonl"))
    return "\n\n".join(filter(None, [
        tuning_table(index(read(DATA / "tuning.jsonl"))), verdicts(found), *charts(found),
        *(study_table(table, found) for table in PLAN["study"])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("plan", choices=["tuning", "study", "report"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.plan == "report":
        print(report())
    elif args.data_dir is None:
        parser.error("add --data-dir DIR, with CIFAR-10 in DIR/train and DIR/test")
    else:
        run(commands(PLAN[args.plan]), DATA / f"{args.plan}.jsonl", args.data_dir.resolve(),
            args.out.resolve(), args.jobs)


if __name__ == "__main__":
    main()
