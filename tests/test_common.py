"""Data, flatness, book-keeping and the command line."""

import copy
import importlib
import itertools
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
import study
from conftest import ROOT, SHAPES, close, draw_shapes, first_step, load, same, tiny_network


def test_shapes_are_balanced_and_of_their_seed():
    x, again, other = (draw_shapes.__wrapped__(train=60, test=40, seed=s) for s in (0, 0, 1))
    assert torch.equal(x[0], again[0]) and not torch.equal(x[0], other[0])
    assert x[0].shape == (60, 32, 32, 3) and torch.cat(x[1::2]).bincount().tolist() == [10] * 10


def test_cut_is_a_window_of_the_black_padded_image_and_sample_the_image():
    data, index = load(train_size=20, pad=3), torch.arange(20)
    inner = data.train_padded[:, 3:-3, 3:-3]
    close(data.mean, (inner / 255).mean((0, 1, 2)))
    close(data.std, (inner / 255).flatten(0, 2).std(0))
    row, column = torch.randint(-3, 4, (2, 20), generator=torch.Generator().manual_seed(3))
    images = data.cut(index, row, column, index % 3)
    for i, padded in enumerate(data.train_padded):
        assert padded.shape == (38, 38, 3) and padded.sum() == inner[i].sum()
        window = padded[3 + row[i]:, 3 + column[i]:][:32, :32]
        expected = data.normalize((window.flip(1) if i % 3 else window)[None])
        assert torch.equal(images[i], expected[0])
    assert images.is_contiguous(memory_format=torch.channels_last)
    few, labels = data.sample(5)
    found = [index[(data.normalize(inner) == x).flatten(1).all(1)].item() for x in few]
    assert len(few) == 5 and found != sorted(found)
    assert torch.equal(labels, data.train_labels[found])


def test_batches_cover_an_epoch_once_and_depend_on_the_seed_only(tiny_data):
    def epoch(seed, *views, size=16):
        return list(tiny_data.batches(size, torch.Generator().manual_seed(seed), views))
    one, two = epoch(0, "crop+flip"), epoch(0, "crop+flip", "crop+flip")
    labels, other = (torch.cat([y for _, y in batches]) for batches in (one, epoch(1, "crop+flip")))
    assert torch.equal(labels.bincount(), tiny_data.train_labels.bincount())
    assert not torch.equal(labels, other)
    for (x, y), (first, second, again) in zip(one, two, strict=True):
        assert torch.equal(x, first) and torch.equal(y, again) and not torch.equal(x, second)
    assert [len(y) for _, y in epoch(0, "none", size=24)] == [24, 24]  # and 16 left out
    assert [len(y) for _, y in epoch(0, "none", size=999)] == [64]


def test_val_holds_out_images_by_fp_seed_and_reads_no_test_image(run, monkeypatch):
    x, y, *_ = common.draw_shapes()
    monkeypatch.setattr(common, "draw_shapes", lambda *_: (x, y, None, None))
    data, again, other = (load(val=50, **flags) for flags in (
        {"train_size": 99}, {}, {"train_size": 99, "fp_seed": 1}))
    held, trained = ({image.numpy().tobytes() for image in images} for images in (
        data.test_images, data.train_padded[:, 2:-2, 2:-2]))
    assert len(held) == 50 and len(trained) == 99 and not held & trained
    assert torch.equal(data.test_images, again.test_images)
    assert not torch.equal(data.test_images, other.test_images)
    assert len({data.fingerprint, again.fingerprint, other.fingerprint}) == 3
    result = run("fpq", SHAPES, "--val 300 --method baseline")
    assert {r["split"] for r in result.results} == {"val"}


def test_split_is_as_balanced_as_the_classes_allow():
    y = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 5]))
    picked, labels, others, rest = common.split(torch.arange(85), y, 35, 0, "--val")
    assert labels.bincount().tolist() == [15, 15, 5]
    same([y[picked], y[others]], [labels, rest])
    assert len({*picked.tolist(), *others.tolist()}) == 85
    with pytest.raises(common.UsageError, match="--val 2 should be from 3, .* to 84"):
        common.split(y, y, 2, 0, "--val")


def test_cifar_is_read_where_it_lies_and_only_auto_does_without(monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, train, download: Namespace(
        targets=[0, 1, 2] * (1 + train), data=np.full((3 + 3 * train, 32, 32, 3), 7, np.uint8)))
    data = load(dataset="cifar100")
    assert (data.name, data.classes, len(data.test_labels)) == ("cifar100", 3, 3)
    assert (data.train_padded[:, 2:-2, 2:-2] == 7).all()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **__: 1 / 0)
    assert load(dataset="auto").name == "shapes" and "Using 'shapes'" in capsys.readouterr().err
    with pytest.raises(common.UsageError, match="cifar10 cannot .* nowhere .* .division by zero"):
        load(dataset="cifar10")


@pytest.mark.parametrize("quantized", [False, True])
def test_hessian_trace_and_top_eigenvalue_match_the_exact_hessian(quantized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    if quantized:
        model = common.quantize(model, 3, 3, example=x)
        common.calibrate(model, x)
    params = [layer.weight for layer in common.weight_layers(model).values()]
    loss_fn = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    rows = [torch.autograd.grad(g, params, retain_graph=True)
            for g in torch.cat([g.flatten() for g in grads])]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    rng = torch.Generator().manual_seed(0)
    mean, error = common.hessian_trace(loss_fn, params, 400, rng)
    variance = 2 * (hessian - hessian.diag().diag()).square().sum()  # of v.Hv, v of signs
    assert error == pytest.approx((variance / 400).sqrt().item(), rel=0.2)
    assert abs(mean - hessian.trace().item()) < 3 * error
    top = max(torch.linalg.eigvalsh(hessian).tolist(), key=abs)
    assert common.hessian_top_eigenvalue(loss_fn, params, 300, rng) == pytest.approx(top, rel=1e-4)


def test_sharpness_is_of_the_weights_with_fresh_batch_norm_in_a_copy(calibrated, tiny_data):
    before = copy.deepcopy(calibrated.train().state_dict())
    found = common.sharpness(calibrated, tiny_data, probes=2, iters=1)
    assert calibrated.training and len(found) == 3
    same(calibrated.state_dict(), before)
    images, labels = tiny_data.sample(64)
    common.update_bn([images], calibrated)
    weights = [layer.weight for layer in common.weight_layers(calibrated.eval()).values()]
    expected = common.hessian_trace(lambda: F.cross_entropy(calibrated(images), labels), weights,
                                    2, torch.Generator().manual_seed(0))
    assert found[:2] == pytest.approx(expected, rel=1e-4)


def test_evaluate_uses_eval_mode_on_every_second_image_and_restores_it(tiny_data):
    model, share = nn.Module(), (tiny_data.test_labels[::2] == 3).float().mean().item()
    model.forward = lambda x: torch.eye(10)[torch.full((len(x),), 3 + model.training)]
    assert common.evaluate(model, tiny_data, 2) == pytest.approx(
        (100 * share, np.log(9 + np.e) - share), rel=1e-5)
    assert model.training


def linear_run(args, data, seed=0, **options) -> common.Run:
    """A run of three epochs; its learning rate peaks at 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return common.Run(args, data, "x", seed, 3, model=model, optimizer=common.sgd(model, 0.5, 0),
                      **options)


def test_run_follows_the_schedule_and_keeps_means_and_notes(parse, tiny_data):
    run, rates, times = linear_run(parse("fpq"), tiny_data, warmup=0.5), [], []
    for epoch in run.epochs():
        for i, _ in enumerate(run.batches()):
            rates.append(run.parts["optimizer"].param_groups[1]["lr"])
            times.append(run.time)
            run.log(loss=torch.tensor(float(epoch + i)))
        run.notes["noted"] = -epoch
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.375, 0.125])  # a rise, then a cosine
    assert times == [0, 0.5, 1, 1.5, 2, 2.5]
    acc, loss = common.evaluate(run.parts["model"], tiny_data)
    for i, row in enumerate(run.history):
        del row["seconds"]
        assert row == {"epoch": i + 1, "loss": i + 0.5, "noted": -i, "eval_loss": loss, "acc": acc}
    assert common.cosine_lr(25, 100, 2.0) == pytest.approx(1 + 0.5**0.5)


def test_random_numbers_differ_by_purpose_stage_seed_and_epoch(parse, tiny_data, monkeypatch):
    batches, seeds = common.Data.batches, []
    monkeypatch.setattr(common.Data, "batches", lambda self, size, draws, views: seeds.extend(
        [torch.initial_seed(), draws.initial_seed()]) or batches(self, size, draws, views))
    for seed, shared in ((0, False), (0, True), (1, False), (1, True), (0, False)):
        run = linear_run(parse("fpq"), tiny_data, seed, shared=shared)
        for _ in run.epochs():
            for _ in run.batches():
                run.log(loss=torch.zeros(()))
    assert len(set(seeds)) == 24 and seeds[24:] == seeds[:6]
    assert max(seeds) < 2**32  # the CPU's generator drops higher bits


def test_row_has_the_mean_loss_the_seconds_and_the_time_left(
        parse, tiny_data, capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(common.time, "perf_counter", lambda: 4 * next(clock))
    run = linear_run(parse("fpq", "--batch-size 16"), tiny_data)
    for _ in run.epochs():
        for i, _ in enumerate(run.batches()):
            run.log(loss=torch.tensor(i + 1.0))
    row = capsys.readouterr().out.split("\n")[0]
    assert "  loss 2.5000  " in row and row.endswith("4.0 s  left 0:08")


@pytest.mark.parametrize("script,augment,pad,more", [
    ("fpq", "none", 2, "--model mobilenet_v2"), ("cr_qat", "flip", 5, "--controls"),
    ("mec_quant", "crop+flip", 1, ""),
    ("flat_quant", "crop+flip", 0, "--method sgd --model mobilenet_v2")])
def test_network_augmentation_and_batch_norm_of_all_results(
        script, augment, pad, more, run, monkeypatch):
    """--augment and --pad in full precision, methods and the pass that precedes a result, whose
    statistics batch norm then has. mobilenet_v2 ends at a resolution of 1."""
    def finish_and_compare(self, model=None, **row):
        network = model or self.parts["model"]
        expected, result = copy.deepcopy(network).train(), finish(self, model, **row)
        draws = torch.Generator().manual_seed(common.random_stream("batch norm"))
        common.update_bn(self.data.batches(32, draws, (augment,)), expected)
        same(network.state_dict(), expected.state_dict())
        assert (result["acc"], result["loss"]) == common.evaluate(expected, self.data)
        finished.add(result["method"])
        return result
    cut, finish, drawn, finished = common.Data.cut, common.Run.finish, [], set()
    build, built = common.build_model, []
    monkeypatch.setattr(common, "build_model", lambda *how: built.append(how) or build(*how))
    monkeypatch.setattr(common.Run, "finish", finish_and_compare)
    monkeypatch.setattr(common.Data, "cut", lambda *args: drawn.append(args) or cut(*args))
    result = run(script, SHAPES, f"--augment {augment} --pad {pad} --depth 2 --stem imagenet", more)
    assert result.code == 0 and {r["method"] for r in result.results} == finished
    assert built == [(result.results[0]["model"], 10, 2, "imagenet")]
    for _, _, row, column, mirrored in (args for args in drawn if len(args[1]) == 32):  # batches
        moves = [*range(-pad, pad + 1)] if "crop" in augment else [0]
        assert row.unique().tolist() == column.unique().tolist() == moves
        assert len(moves) == 1 or not torch.equal(row, column)
        assert mirrored.unique().tolist() == ([0, 1] if "flip" in augment else [0])


def test_a_checkpoint_has_a_name_of_its_own_for_all_that_shapes_it(parse, tiny_data):
    def name(shared, data=tiny_data, seed=0, **changed):
        changed = Namespace(**vars(args) | changed)
        return linear_run(changed, data, seed, shared=shared).path.name
    shared = "model depth stem augment pad batch_size fp_epochs fp_lr fp_weight_decay fp_seed tf32"
    not_shaping = ("data_dir dataset train_size val device recipe bits method command resume "
                   "dry_run deterministic ablate diagnose controls")
    args = parse("cr_qat")
    for flag in vars(args).keys() - {"out", "seed"}:
        value = getattr(args, flag)
        other = {flag: not value if isinstance(value, bool) else f"{value}x"}
        assert (name(True, **other) != name(True)) == (flag in shared.split()), flag
        assert (name(False, **other) == name(False)) == (flag in not_shaping.split()), flag
    for full in (False, True):
        assert name(full, seed=1) != name(full) != name(full, data=load(train_size=64))


def test_full_precision_is_trained_on_cross_entropy_once(parse, tiny_data):
    args, stream = parse("fpq", "--fp-seed 1"), common.random_stream
    grads = first_step(common.full_precision, args, tiny_data)
    torch.manual_seed(stream("weights", 1))
    model = common.build_model("resnet8", 10)
    draws = torch.Generator().manual_seed(stream("full precision", "batches", 1, 0))
    images, labels = next(tiny_data.batches(32, draws))
    F.cross_entropy(model(images), labels).backward()
    close(grads, [p.grad for p in model.parameters()])
    network, result = common.full_precision(args, tiny_data)
    again, read = common.full_precision(parse("mec_quant", "--fp-seed 1"), tiny_data)
    assert read == result and not again.training  # as result holds the time it took
    same(network.state_dict(), again.state_dict())
    assert (args.out / "results.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("script,flags,zero", [
    ("fpq", "--p 1", {"sfp": "--p 0", "csd": "--csd-weight 0", "fpq": "--p 0 --csd-weight 0",
                      "kd": "--kd-weight 0", "sam": "--sam-rho 0"}),
    ("cr_qat", "--ramp-epochs 0", dict.fromkeys(("cr", "pi", "fp-teacher"), "--lambda-max 0")),
    ("mec_quant", "--beta 2", dict.fromkeys(
        ("mec", "mec-quant", "branch", "random", "kd"), "--beta 0 --kd-weight 0"))])
def test_methods_differ_and_at_strength_0_are_the_baseline(script, flags, zero, parse, tiny_data):
    """Bit for bit; none of them changes the full-precision network."""
    def trained(method, flags):  # 4 steps, as CR's average differs from the student after two
        args = parse(script, "--batch-size 16", flags)
        return module.train(args, tiny_data, method, 0, network)[0].state_dict()
    module, network = importlib.import_module(script), tiny_network()
    methods = {method: trained(method, flags) for method in module.METHODS}
    assert len({state["5.weight"].sum().item() for state in methods.values()}) == len(methods)
    for method, off in zero.items():
        same(trained(method, off), methods["baseline"])
    same(network.state_dict(), tiny_network().state_dict())


def test_fp_seed_same_trains_a_full_precision_network_for_each_seed(run, monkeypatch):
    each = run("fpq", SHAPES, "--method baseline --train-size 640 --seed 2 1 2 --fp-seed same")
    assert [(r["method"], r["seed"], r["fp_seed"]) for r in each.results] == [
        ("fp", 2, 2), ("baseline", 2, 2), ("fp", 1, 1), ("baseline", 1, 1)]
    data = [r["data"] for r in each.results]  # the subset is the seed's, too
    assert data[0] == data[1] != data[2] and "one full-precision network" not in each.out
    loads, load_once = [], common.load_data
    monkeypatch.setattr(common, "load_data", lambda args: loads.append(1) or load_once(args))
    shared = run("fpq", SHAPES, "--seed 2 1 --fp-seed 3 --method baseline")
    assert [r["fp_seed"] for r in shared.results[4:]] == [3] * 3 and len(loads) == 1
    assert "one full-precision network" in shared.out


def test_precision_and_determinism_on_nvidia_gpus_are_asked_for(parse):
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for on in (True, False):
        parse("fpq", "--tf32 --deterministic" * on)
        assert (cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (on, on, on)
        assert cudnn.benchmark != on


def test_result_table_pairs_seeds():
    """Mean ± standard error, and the difference to the baseline of the same seed."""
    def row(method, acc, seed, bits=2):
        return {"method": method, "acc": acc, "seed": seed, "wbits": bits, "abits": bits,
                "quantizer": "pact", "dataset": "d", "model": "m",
                "train_size": 9, "augment": "flip", "split": "val", "fp_seed": 0}
    rows = [row("fp", 70.0, 0, 32), row("baseline", 80.0, 0), row("baseline", 82.0, 1),
            row("fpq", 83.0, 1), row("fpq", 80.5, 0), row("fpq", 90.0, 2), row("fpq", 99.0, 0, 4)]
    _, title, _, *lines, note = common.result_table(rows).split("\n")
    assert title == ("d, 9 training images, m, quantizer pact, augment flip; val accuracy after "
                     "the last epoch, batch norm renewed")
    assert note.startswith("± is over seeds of one full-precision")
    assert [re.split("  +", line) for line in lines] == [
        ["fp", "32/32", "70.00", "1"], ["baseline", "2/2", "81.00 ± 1.00", "2"],
        ["fpq", "2/2", "84.50 ± 2.84", "+0.75 ± 0.25", "3"], ["fpq", "4/4", "99.00", "1"]]


def test_flags_and_bits_override_the_recipe(parse, capsys):
    for script, flags, *expected in (
            ("flat_quant", "--recipe paper --batch-size 16", 2, 4, 16, [0]),
            ("flat_quant", "--recipe paper --bits 3", 3, 3, 32, [0]),
            ("mec_quant", "--bits 3 --abits 1 --seed 4 4", 3, 1, 32, [4]),
            ("cr_qat", "--recipe paper", 2, 2, 32, [0])):
        args = parse(script, flags)
        assert args.stem == ("imagenet" if script == "cr_qat" else "cifar")
        assert [args.wbits, args.abits, args.batch_size, args.seed] == expected
    out = capsys.readouterr().out
    assert "--recipe paper: --model resnet18" in out and "--wbits 3 --abits 3 --batch-size" in out
    assert parse("fpq", "--recipe paper --dataset cifar100").stem == "cifar"


def test_study_pairs_seeds_finds_full_precision_and_judges(monkeypatch):
    column, start = ["c", "-a", 2, 2], dict.fromkeys(common.FP_FLAGS)
    table = {"title": "t", "flags": "-x", "data": "-d", "seeds": 4, "columns": [column], "rows": [
        ["base", "s -b", "b"], ["full", "", "fp"], ["fpq", "s -f", "f", "+0.51"]]}
    rows = [start | {"command": study.command(table, table["rows"][row], column, seed), "acc": acc,
                     "method": table["rows"][row][2], "wbits": 2, "abits": 2, "data": seed}
            for row, seed, acc in ((2, 1, 84), (2, 0, 83), (0, 0, 80), (0, 1, 82), (0, 2, 84),
                                   (2, 2, 87))]
    full = [rows[i] | {"method": "fp", "wbits": 32, "pad": pad, "acc": acc}
            for i, pad, acc in ((2, None, 78), (3, None, 76), (3, 5, 9))]
    found = study.index(rows + full)
    assert study.study_table(table, found).split("\n")[2:] == [
        "| base | 82.00 ± 1.15 |  |  | 3 |", "| full | 77.00 ± 1.00 | -4.00 ± 2.00 |  | 2 |",
        "| fpq | 84.67 ± 1.20 | +2.67 ± 0.33 | +0.51 | 3 |"]
    for name, margin, verdict in (("fpq", 1.9, "(3) | yes |"), ("fpq", 2.1, "(3) | not shown |"),
                                  ("fpq", 9, "(3) | no |"), ("full", -99, "base:  | not run |")):
        claim = ["p", "q", "acc", margin, ["t", [0], name, "base"]]
        monkeypatch.setattr(study, "PLAN", {"study": [table], "claims": [claim]})
        assert study.verdicts(found).endswith(verdict)


def test_every_command_of_the_study_parses_and_every_claim_has_its_rows(parse):
    for command in study.commands(study.PLAN["tuning"] + study.PLAN["study"]):
        script, flags = command.removeprefix("python ").split(".py ")
        parse(script, flags)
    study.verdicts({})


def test_every_line_of_the_readmes_tables_and_charts_is_in_the_report():
    results = (ROOT / "README.md").read_text().split("## Results")[1].split("## Choices")[0]
    lines = {line for line in results.split("\n") if line.startswith(("|", "    "))}
    assert lines and lines <= set(study.report().split("\n"))
