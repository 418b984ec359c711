"""tests/study.py: the rule of its readings, its plan, and that the report is what the data give."""

import math
import shlex
from argparse import Namespace
from xml.etree import ElementTree

import numpy as np
import pytest

import study

close = pytest.approx
COLUMN = {"name": "", "flags": "--bits 2", "wbits": 2, "abits": 2, "figure": "acc"}


def results_of(method, accs, **entries):
    """Rows of results, from seed 0 on; None is a seed that has not run."""
    rows = []
    for seed, acc in enumerate(accs):
        text = f"python fpq.py --bits 2 --method {method} --seed {seed}"
        if acc is not None:
            rows.append({
                "command": text,
                "method": method,
                "seed": seed,
                "data": seed,
                "wbits": 2,
                "abits": 2,
                "acc": acc,
                "loss": -acc,
            } | entries)
    return rows


def table_of(*names, **entries):
    rows = [{"name": name, "command": f"fpq.py --method {name}", "method": name} for name in names]
    table = {"title": "", "flags": "", "seeds": range(5), "columns": [COLUMN], "rows": rows}
    return table | entries


def test_differences_are_paired_by_seed():
    rows = results_of("baseline", [10, None, 30, 40]) + results_of("fpq", [11, 22, 33])
    table = table_of("baseline", "fpq", reading=True)
    baseline, fpq = study.settings(study.index(rows), table)
    assert fpq.accuracy == [11, 22, 33]
    assert fpq.differences == [1, 3]
    assert fpq.losses == [-1, -3]
    assert baseline.differences == []
    assert "too few seeds | 2 of 5 |" in study.study_table(study.index(rows), table)


def test_against_another_row():
    rows = results_of("a", [1]) + results_of("b", [2]) + results_of("c", [5])
    table = table_of("a", "b", "c")
    table["rows"][2]["against"] = "b"
    assert study.settings(study.index(rows), table)[2].differences == [3]


def test_full_precision_of_the_same_start():
    rows = results_of("baseline", [60, 61], augment="none", data=7)
    rows += results_of("fp", [70, 72], augment="none", data=7)
    rows += results_of("fp", [50, 50], augment="flip", data=7)
    rows += results_of("fp", [30, 30], augment="none", data=8)
    table = table_of("baseline", "full precision")
    table["rows"][1] = {"name": "full precision", "method": "fp"}
    assert study.settings(study.index(rows), table)[1].differences == [10, 11]


def test_interval():
    """The standard deviation is sqrt(2.5), and t for 4 degrees of freedom 2.7764."""
    assert study.interval([1, 2, 3, 4, 5]) == close((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert study.cell([1, 2, 3, 4, 5], 2) == "+3.00 [+1.04, +4.96]"
    assert study.cell([1], 2) == "+1.00"


@pytest.mark.parametrize("sample, published, expected", [
    ([1, 2, 3, 4, 5], None, "gain"),
    ([-1, -2, -3, -4, -5], None, "loss"),
    ([3, -1, 2, 1, 1], None, "cannot tell"),
    ([1, 2, 3, 4], 9, "too few seeds"),
    ([], 9, ""),
    ([1, 2, 3, 4, 5], 4.9, "gain; includes the published"),
    ([1, 2, 3, 4, 5], 5, "gain; excludes the published"),
])
def test_reading(sample, published, expected):
    assert study.reading(sample, published) == expected


def test_detectable():
    """The variances are 1, of three values, and 4, of five; the sum of the quantiles 5.3634."""
    pooled = (2 * 1 + 4 * 4) / 6
    smallest = study.detectable([[1, 2, 3], [0, 0, 2, 4, 4]])
    assert smallest == close(5.3634 * (pooled / 3) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("quantiles, probability", [(study.T_975, 0.975), (study.T_80, 0.8)])
def test_quantiles(quantiles, probability):
    """Student's density, integrated from 0 to the quantile."""
    for freedom, quantile in enumerate(quantiles, 1):
        x = np.linspace(0, quantile, 200_001)
        log_factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(log_factor) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        area = np.trapezoid(density, x) / math.sqrt(freedom * math.pi)
        assert 0.5 + area == close(probability, abs=2e-5)


def test_table_says_what_has_not_run():
    rows = results_of("baseline", [1, 2, 3]) + results_of("fpq", [2, 4, 6])
    table = table_of("baseline", "fpq", "kd", reading=False)
    text = study.study_table(study.index(rows), table)
    assert "| fpq | 4.00 | +2.00 [-0.48, +4.48] | -2.000 [-4.484, +0.484] |  |  | 3 of 5 |" in text
    assert "| kd | not run yet |  |  |  |  | 0 of 5 |" in text
    assert "Smallest detectable difference, in points: 3.10." in text
    assert "Intervals of accuracy: 1; by chance 0.05 would miss 0." in text
    assert study.study_table({}, table).endswith("Not run yet: baseline; fpq; kd.")


def test_differences_of_few_seeds_do_not_blur_a_detectable_one():
    rows = results_of("baseline", [0] * 5) + results_of("a", [1, 2, 3, 4, 5])
    rows += results_of("b", [9, -9])
    found = study.index(rows)
    alone = study.study_table(found, table_of("baseline", "a", reading=True))
    both = study.study_table(found, table_of("baseline", "a", "b", reading=True))
    assert "Smallest detectable difference, in points: 2.63." in alone
    assert "Smallest detectable difference, in points: 2.63." in both


def test_columns_keep_their_bits_and_published_gains():
    rows = results_of("baseline", [1] * 5) + results_of("fpq", [2] * 5)
    rows += results_of("baseline", [1] * 5, wbits=4) + results_of("fpq", [4] * 5, wbits=4)
    columns = [COLUMN | {"name": "W2"}, COLUMN | {"name": "W4", "wbits": 4}]
    table = table_of("baseline", "fpq", columns=columns, reading=True)
    table["rows"][1]["published"] = {"W4": 2.5}
    text = study.study_table(study.index(rows), table)
    assert "| W2: fpq | 2.00 | +1.00 [+1.00, +1.00] | -1.000 [-1.000, -1.000] |  | gain |" in text
    assert "| W4: fpq | 4.00 | +3.00 [+3.00, +3.00] | -3.000 [-3.000, -3.000] | +2.50 |" in text


def test_tuning_takes_the_best_mean_of_values_that_have_run():
    rows = results_of("a", [1, 2]) + results_of("b", [5, 4]) + results_of("c", [9, None])
    table = table_of("a", "b", "c", seeds=range(2), flag="--a")
    text = study.tuning_table(study.index(rows), table)
    assert "| a | 1.50 | 1.50 |\n| b | 4.50 | **4.50** |\n| c | not run yet |  |" in text


def test_tuning_compares_values_of_one_round():
    rows = results_of("a", [1, 2])
    rows += results_of("b", [5, 4], loss=1.5) + results_of("c", [0, 1], loss=-1.5)
    columns = [COLUMN, COLUMN | {"name": "loss", "figure": "loss"}]
    table = table_of("a", "b", "c", seeds=range(2), flag="--a", columns=columns)
    table["rows"][1]["round"] = 1
    text = study.tuning_table(study.index(rows), table)
    assert "| a | 1.50 | -1.50 | **0.00** |\n" in text
    assert "| b (round 1) | 4.50 | 1.50 | **3.00** |\n| c | 0.50 | -1.50 | -0.50 |" in text


def test_half_written_line(tmp_path):
    file = tmp_path / "study.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    study.append(file, [{"a": 3}, {"a": 4}])
    assert study.read(file) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_a_command_leaves_its_own_rows(tmp_path, monkeypatch):
    """Not those of seed 10, nor those of an earlier call; and none if it fails."""
    out = tmp_path / "out"
    out.mkdir()
    data = tmp_path / "study.jsonl"
    code = 0

    def run(words, **_):
        assert words[-5:] == ["--data-dir", str(tmp_path), "--out", str(out), "--resume"]
        rows = [{"command": f"python fpq.py --seed {seed} --data-dir d", "acc": seed}
                for seed in (1, 10)]
        study.append(out / "results.jsonl", rows)
        return Namespace(returncode=code)

    monkeypatch.setattr(study.subprocess, "run", run)
    study.run_one("python fpq.py --seed 1", data, tmp_path, out)
    assert study.read(data) == [{"round": 2, "command": "python fpq.py --seed 1", "acc": 1}]
    code = 2
    study.run_one("python fpq.py --seed 10", data, tmp_path, out)
    assert len(study.read(data)) == 1


def test_commands_go_seed_by_seed():
    table = table_of("a", "b", seeds=range(2))
    table["rows"][0] |= {"flags": "--lr 1"}
    assert [text.split()[3:] for text in study.commands([table, table])] == [
        [method, *flags.split(), "--bits", "2", "--seed", seed]
        for seed in "01" for method, flags in (("a", "--lr 1"), ("b", ""))
    ]


def test_commands_parse(called):
    texts = study.commands(study.PLAN["tuning"] + study.PLAN["study"])
    assert len(texts) > 300
    for text in texts:
        _, script, *flags = shlex.split(text)
        args = called(script.removesuffix(".py"), *flags).parse_args()
        assert len(args.seed) == 1


def test_plan():
    for table in study.PLAN["tuning"] + study.PLAN["study"] + study.PLAN["first round"]:
        names = [row["name"] for row in table["rows"]]
        columns = {column["name"] for column in table["columns"]}
        assert len(set(names)) == len(names)
        assert len(table["seeds"]) <= len(study.T_975)
        for row in table["rows"]:
            assert row.get("against", names[0]) in names
            assert row.get("published", {}).keys() <= columns


def test_pictures(tmp_path):
    """Of five seeds of each row."""
    lines = []
    for table in study.PLAN["study"]:
        for column in table["columns"]:
            for row in table["rows"]:
                for seed in table["seeds"][:5] if "command" in row else []:
                    lines.append(column | row | {
                        "command": study.command(table, row, column, seed),
                        "seed": seed,
                        "data": 0,
                        "acc": seed,
                        "loss": 0,
                        "acc_batch_norm": 50,
                        "history": [{"trace": [seed, 1]}],
                    })
    study.append(tmp_path / "study.jsonl", lines)
    study.append(tmp_path / "tuning.jsonl", [])
    files = study.report(tmp_path)
    del files["RESULTS.md"]
    # A2, cr: no difference to the baseline in any seed; 570 is zero
    assert 'cr - baseline</text><path class="faint" d="M570.0 ' in files["data/forest.svg"]
    # A1 has no readings
    assert "What you will get" not in files["data/forest.svg"]
    assert len(files) == 4
    for picture in files.values():
        ElementTree.fromstring(picture)


def test_report_is_what_the_data_give():
    for name, content in study.report().items():
        assert (study.ROOT / "tests" / name).read_text() == content, "run tests/study.py report"
