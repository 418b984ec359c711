"""Runs what tests/data/plan.json lists and has no results yet; writes the report and its pictures.

    python tests/study.py tuning --data-dir DIR     weights of losses, on held-out images
    python tests/study.py study --data-dir DIR      methods and controls, on test images
    python tests/study.py report                    RESULTS.md and data/*.svg, from the results

DIR has CIFAR-10 as train/CLASS/* and test/CLASS/*. A command trains one row with one seed, on one
core. If you stop the runs, the same call goes on.

The plan has lists of tables. A setting is a row of a table in one of its columns; its command has
the flags of both. A row "fp" is the full precision that the table's first row starts from; rows of
"round" 1 are results of earlier code, which is not run again.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
PLAN = json.loads((DATA / "plan.json").read_text())
sys.path.insert(0, str(ROOT))
from common import FP_FLAGS  # noqa: E402

# Quantiles of Student's t for 1, 2, ... degrees of freedom
T_975 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]
T_80 = [1.3764, 1.0607, 0.9785, 0.9410, 0.9195, 0.9057, 0.8960, 0.8889, 0.8834]


# ---------------------------------------------------------------------------------------- the runs


def command(table: dict, row: dict, column: dict, seed: int) -> str:
    flags = f"{row.get('flags', table['flags'])} {column['flags']}"
    return " ".join(f"python {row['command']} {flags} --seed {seed}".split())


def commands(tables: list[dict]) -> list[str]:
    """Of all tables, in their order; within a table seed by seed, so that rows stay paired."""
    found = []
    for table in tables:
        rows = [row for row in table["rows"] if "command" in row and "round" not in row]
        for seed in table["seeds"]:
            for column in table["columns"]:
                found += [command(table, row, column, seed) for row in rows]
    return list(dict.fromkeys(found))


def read(file: Path) -> list[dict]:
    """The rows of a file of JSON lines; a half-written line counts for nothing."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{file}: left out a damaged line", file=sys.stderr)
    return rows


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
        lines = [json.dumps({"round": 2} | row | {"command": text}) + "\n" for row in rows]
        with file.open("a+b", buffering=0) as results:  # one write, so that a kill leaves no half
            results.seek(0)
            before = results.read()
            gap = "\n" if before and not before.endswith(b"\n") else ""
            results.write((gap + "".join(lines)).encode())
    print(f"exit code {code}: {text}", flush=True)


# -------------------------------------------------------------------------------------- the figures


def start(row: dict) -> tuple:
    """What tells one full-precision network from another."""
    return row["seed"], row["data"], *[row.get(flag) for flag in FP_FLAGS]


def index(rows: list[dict]) -> dict:
    """Rows by command (its flags in any order), method and bits; full precision by `start`."""
    found = {}
    for row in rows:
        flags = frozenset(row["command"].split(" --"))
        found[flags, row["method"], row["wbits"], row["abits"]] = row
        if row["method"] == "fp":
            found[start(row)] = row
    return found


def result(found: dict, table: dict, row: dict, column: dict, seed: int) -> dict:
    """The results of a setting with one seed; {} if there are none."""
    trained = table["rows"][0] if row["method"] == "fp" else row
    flags = frozenset(command(table, trained, column, seed).split(" --"))
    figures = found.get((flags, trained["method"], column["wbits"], column["abits"]), {})
    if figures and row["method"] == "fp":
        return found.get(start(figures), {})
    return figures


def by_seed(found: dict, table: dict, row: dict, column: dict, figure: str) -> dict[int, float]:
    figures = {seed: result(found, table, row, column, seed) for seed in table["seeds"]}
    return {seed: row[figure] for seed, row in figures.items() if figure in row}


def paired(values: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [value - reference[seed] for seed, value in values.items() if seed in reference]


@dataclass
class Setting:
    """A row of a table in one of its columns. `against` is None for a row that others refer to."""

    name: str
    column: str
    against: str | None
    accuracy: dict[int, float]
    differences: list[float]
    losses: list[float]
    published: float | None


def settings(found: dict, table: dict) -> list[Setting]:
    rows = {row["name"]: row for row in table["rows"]}
    first = table["rows"][0]["name"]
    done = []
    for column in table["columns"]:
        figure = column["figure"]
        loss = figure.replace("acc", "loss")  # with new batch norm it is not recorded
        for name, row in rows.items():
            against = row.get("against", first)
            accuracy = by_seed(found, table, row, column, figure)
            setting = Setting(name, column["name"], None, accuracy, [], [], None)
            if against != name:
                other = rows[against]
                losses = by_seed(found, table, row, column, loss)
                setting.against = against
                setting.differences = paired(accuracy, by_seed(found, table, other, column, figure))
                setting.losses = paired(losses, by_seed(found, table, other, column, loss))
                setting.published = row.get("published", {}).get(column["name"])
            done.append(setting)
    return done


def interval(sample: list[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean of two values or more."""
    half = T_975[len(sample) - 2] * statistics.stdev(sample) / len(sample) ** 0.5
    mean = statistics.fmean(sample)
    return mean - half, mean + half


def reading(differences: list[float], published: float | None = None) -> str:
    if len(differences) < 5:
        return "too few seeds"
    low, high = interval(differences)
    text = "gain" if low > 0 else "loss" if high < 0 else "cannot tell"
    if published is None:
        return text
    return f"{text}; {'includes' if low <= published <= high else 'excludes'} the published"


def detectable(samples: list[list[float]]) -> float:
    """The smallest difference that is detected at 80 % power, by the pooled standard deviation."""
    freedom = sum(len(sample) - 1 for sample in samples)
    squares = sum((len(sample) - 1) * statistics.variance(sample) for sample in samples)
    fewest = min(len(sample) for sample in samples)
    quantiles = T_975[fewest - 2] + T_80[fewest - 2]
    return quantiles * (squares / freedom / fewest) ** 0.5


# --------------------------------------------------------------------------------------- the tables


def cell(sample: list[float], digits: int) -> str:
    """mean [low, high]"""
    if not sample:
        return ""
    numbers = [statistics.fmean(sample), *(interval(sample) if sample[1:] else [])]
    mean, *ends = [f"{number:+.{digits}f}" for number in numbers]
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def study_table(found: dict, table: dict) -> str:
    done = settings(found, table)
    several = len(table["columns"]) > 1
    head = "accuracy %" if several else table["columns"][0]["name"]
    lines = [f"| setting | {head} | difference | loss difference | published | reading | seeds |",
             "|---|---|---|---|---|---|---|"]
    for s in done:
        name = f"{s.column}: {s.name}" if several else s.name
        if s.against not in (None, table["rows"][0]["name"]):
            name += f", against {s.against}"
        acc = f"{statistics.fmean(s.accuracy.values()):.2f}" if s.accuracy else "not run yet"
        published = "" if s.published is None else f"{s.published:+.2f}"
        read_as = ""
        if s.differences and table["reading"]:
            read_as = reading(s.differences, s.published)
        seeds = f"{len(s.accuracy)}"
        if len(s.accuracy) < len(table["seeds"]):
            seeds += f" of {len(table['seeds'])}"
        if s.against and len(s.differences) < len(s.accuracy):
            seeds += f", {len(s.differences)} paired"
        cells = [name, acc, cell(s.differences, 2), cell(s.losses, 3), published, read_as, seeds]
        lines.append(f"| {' | '.join(cells)} |")
    planned = sum(s.against is not None for s in done)
    notes = f"Flags: `{table['flags']}`. "
    notes += "" if table["reading"] else "This table has no readings. "
    samples = [s.differences for s in done if s.differences[1:]]
    if samples:
        notes += f"Its smallest detectable difference is {detectable(samples):.2f} points. "
    notes += f"Of its {planned} intervals {0.05 * planned:.2g} would miss zero by chance alone."
    return "\n".join([f"### {table['title']}", "", notes, "", *lines])


def tuning_table(found: dict, table: dict) -> str:
    columns = table["columns"]
    means = {}
    for s in settings(found, table):
        if s.accuracy:
            means[s.name, s.column] = statistics.fmean(s.accuracy.values())
    best = {}
    for (name, column), mean in means.items():
        best[column] = max(mean, best.get(column, mean))
    names = " | ".join(column["name"] for column in columns)
    lines = [f"| `{table['flag']}` | {names} |", "|---|" + "---|" * len(columns)]
    for row in table["rows"]:
        cells = [row["name"] + (" (round 1)" if "round" in row else "")]
        for column in columns:
            mean = means.get((row["name"], column["name"]))
            text = "not run yet" if mean is None else f"{mean:.2f}"
            cells.append(f"**{text}**" if mean == best.get(column["name"], 0) else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"### {table['title']}", "", f"Flags: `{table['flags']}`.", "", *lines])


# ------------------------------------------------------------------------------------- the pictures

# On light and on dark
COLOURS = {"card": ("#ffffff", "#161b22"), "ink": ("#1f2328", "#e6edf3"),
           "faint": ("#6e7781", "#8b949e"), "rule": ("#d8dee4", "#30363d"),
           "blue": ("#0969da", "#58a6ff"), "orange": ("#bc4c00", "#f0883e")}


def svg(height: float, shapes: list[str]) -> str:
    light = "".join(f".{name}{{color:{pair[0]}}}" for name, pair in COLOURS.items())
    dark = "".join(f".{name}{{color:{pair[1]}}}" for name, pair in COLOURS.items())
    style = ("text,rect,circle{fill:currentColor}polyline{fill:none;stroke:currentColor}"
             f"{light}@media(prefers-color-scheme:dark){{{dark}}}")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" '
        f'height="{height}" font-family="sans-serif" font-size="13"><style>{style}</style>',
        f'<rect class="card" width="760" height="{height}" rx="8"/>', *shapes, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "ink") -> str:
    return (f'<text class="{colour}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>")


def line(colour: str, width: float, *points: tuple[float, float]) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{colour}" stroke-width="{width}" points="{places}"/>'


def dot(colour: str, x: float, y: float) -> str:
    return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def diamond(x: float, y: float) -> str:
    return line("ink", 1.5, (x - 5, y), (x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y))


def ticks(low: float, high: float) -> list[float]:
    """Some five round numbers that hold low and high."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= (high - low) / 5)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def chart(title: str, across: dict[float, str], up: dict[float, str],
          series: dict[str, list[tuple[float, float]]]) -> str:
    """Lines in a frame. across, up: {place of a tick: its label}."""
    points = [point for places in series.values() for point in places]
    left = min(across)
    low = min([*up, *[y for _, y in points]])
    wide = 550 / (max(across) - left)
    tall = 270 / (max([*up, *[y for _, y in points]]) - low)

    def place(x, y):
        return 150 + (x - left) * wide, 350 - (y - low) * tall

    shapes = [text(16, 28, title)]
    for y, label in up.items():
        shapes.append(line("rule", 1, place(left, y), place(max(across), y)))
        shapes.append(text(140, place(left, y)[1] + 4, label, "end", "faint"))
    for x, label in across.items():
        shapes.append(text(place(x, low)[0], 374, label, "middle", "faint"))
    for i, (name, places) in enumerate(series.items()):
        colour = ["ink", "blue", "orange"][i]
        shapes.append(line(colour, 2, *[place(x, y) for x, y in places]))
        shapes.append(line(colour, 2, (16 + 240 * i, 52), (40 + 240 * i, 52)))
        shapes.append(text(48 + 240 * i, 56, name))
    return svg(390, shapes)


def staircase() -> str:
    """x_hat = (clip(round(x) + 1, 0, 3) - 1), whose four levels are -1 to 2."""
    steps = []
    for level in range(-1, 3):
        steps += [(max(-2.5, level - 0.5), level), (min(3.5, level + 0.5), level)]
    steps[0], steps[-1] = (-2.5, -1), (3.5, 2)
    levels = {level: f"x_hat = {level}, x_int = {level + 1}" for level in range(-1, 3)}
    across = {-2.5: ""} | {x: f"{x}" for x in range(-2, 4)} | {3.5: "x"}
    return chart("Fake quantization with two bits, s = 1, z = 1", across, levels,
                 {"x itself": [(-2.5, -2.5), (3.5, 3.5)], "x_hat": steps})


def of_tier(tier: str) -> dict:
    return next(table for table in PLAN["study"] if table["tier"] == tier)


def traces(found: dict) -> str:
    """The Hessian's trace by epoch, mean over seeds; "" without data."""
    table = of_tier("A2")
    series = {}
    for row in table["rows"]:
        histories = by_seed(found, table, row, table["columns"][0], "history").values()
        epochs = [*zip(*[history for history in histories if "trace" in history[0]])]
        if epochs and row["name"] in ("baseline", "fpq"):
            means = [statistics.fmean(one["trace"][0] for one in epoch) for epoch in epochs]
            series[f"{row['name']}, {len(epochs[0])} seeds"] = [*enumerate(means, 1)]
    if not series:
        return ""
    highest = max(mean for means in series.values() for _, mean in means)
    last = max(len(means) for means in series.values())
    across = {epoch: f"{epoch}" for epoch in [1, *range(5, last + 1, 5)]}
    return chart("Hessian trace by epoch, W2A2, crop and flip", across,
                 {y: f"{y:g}" for y in ticks(0, highest)}, series)


def ptq(found: dict) -> str:
    """Accuracy before and after post-training quantization; "" without data."""
    columns = ["before PTQ", "W4A4", "W3A4", "W2A4"]
    series = {}
    for s in settings(found, of_tier("A4")):
        if s.accuracy and s.column in columns and "lambda" not in s.name:
            mean = statistics.fmean(s.accuracy.values())
            series.setdefault(s.name, []).append((columns.index(s.column), mean))
    if not series:
        return ""
    return chart("Accuracy in % after PTQ, by bits", dict(enumerate(columns)),
                 {y: f"{y:g}" for y in range(0, 101, 20)},
                 {name: sorted(means) for name, means in series.items()})


def forest_group(title: str, done: list[Setting], y: float) -> list[str]:
    """A heading with a scale of its own, then a row per difference."""
    ends = [0.01]
    for s in done:
        ends += [abs(end) for end in interval(s.differences)] + [abs(s.published or 0)]
    widest = ticks(0, max(ends))[-1]
    shapes = [text(16, y, title)]
    for tick in (-widest, 0, widest):
        shapes.append(text(540 + tick * 190 / widest, y, f"{tick:+g}" if tick else "0", "middle",
                           "faint"))
    shapes.append(line("faint", 1, (540, y + 6), (540, y + 14 + 20 * len(done))))
    for i, s in enumerate(done, 1):
        middle = y + 20 * i
        name = s.name
        colour = {"gain": "blue", "loss": "orange"}.get(reading(s.differences), "faint")
        low, high = [540 + end * 190 / widest for end in interval(s.differences)]
        shapes.append(text(32, middle + 4, f"{s.name} - {s.against}"))
        shapes.append(line(colour, 2, (low, middle), (high, middle)))
        shapes.append(dot(colour, (low + high) / 2, middle))
        if s.published is not None:
            shapes.append(diamond(540 + s.published * 190 / widest, middle))
    return shapes


def forest(found: dict) -> str:
    """All differences of the tables with readings, by table and column; "" without data."""
    shapes = [text(16, 28, "Differences in accuracy, in points, with 95 % intervals")]
    for i, (colour, name) in enumerate({"blue": "gain", "orange": "loss",
                                        "faint": "cannot tell, or too few seeds"}.items()):
        shapes += [dot(colour, 22 + 80 * i, 50), text(32 + 80 * i, 54, name)]
    shapes += [diamond(402, 50), text(414, 54, "published")]
    y = 96
    for table in PLAN["study"]:
        compared = [s for s in settings(found, table) if s.differences[1:] and table["reading"]]
        for column in table["columns"]:
            group = [s for s in compared if s.column == column["name"]]
            if group:
                title = table["title"] + f": {column['name']}" * (len(table["columns"]) > 1)
                shapes += forest_group(title, group, y)
                y += 20 * len(group) + 50
    return svg(y - 24, shapes) if y > 96 else ""


# --------------------------------------------------------------------------------------- the report


def report(data: Path = DATA) -> dict[str, str]:
    """{file in tests/: its text}, from the results in `data`."""
    tuned = index(read(data / "tuning.jsonl"))
    found = index(read(data / "study.jsonl"))
    pictures = {"staircase": ("How fake quantization rounds x", staircase()),
                "forest": ("Differences with their intervals", forest(found)),
                "traces": ("Hessian trace by epoch", traces(found)),
                "ptq": ("Accuracy after post-training quantization", ptq(found))}
    drawn = {name: both for name, both in pictures.items() if both[1]}
    parts = ["# Results", "`python tests/study.py report` writes this page from the files in `data`; the plan "
             "there has the commands of all rows.", "\n".join(f"- {rule}" for rule in PLAN["rule"]),
             "## Pictures", *[f"![{words}](data/{name}.svg)" for name, (words, _) in drawn.items()],
             "## Study", *[study_table(found, table) for table in PLAN["study"]],
             "## Tuning", "Mean accuracy on held-out images; the best of each column is bold. "
             "Values of round 1 are from earlier code.",
             *[tuning_table(tuned, table) for table in PLAN["tuning"]],
             "## First round", "Three seeds of earlier code, for what the study does not repeat.",
             *[study_table(found, table) for table in PLAN["first round"]]]
    files = {f"data/{name}.svg": picture for name, (_, picture) in drawn.items()}
    return {"RESULTS.md": "\n\n".join(parts) + "\n"} | files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", choices=["tuning", "study", "report"])
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.plan == "report":
        for name, content in report().items():
            (ROOT / "tests" / name).write_text(content)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = DATA / f"{args.plan}.jsonl"
    done = {row["command"] for row in read(file)}
    todo = [text for text in commands(PLAN[args.plan]) if text not in done]
    with ThreadPoolExecutor(args.jobs) as pool:  # list() raises here what a thread raised
        list(pool.map(lambda text: run_one(text, file, args.data_dir.resolve(),
                                           args.out.resolve()), todo))


if __name__ == "__main__":
    main()
