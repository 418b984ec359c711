"""MEC-Quant's coding lengths against closed forms, one-bit grids, every method as a dry run."""

import copy
import json
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import common
import mec_quant
from mec_quant import coding_length, moe_coding_length, normalized_rows, scale_gates


def rows(m, d, seed=0):
    """m x d in float64, centred, of unit norm."""
    draws = torch.Generator().manual_seed(seed)
    return normalized_rows(torch.randn(m, d, dtype=torch.float64, generator=draws))


@pytest.mark.parametrize("m,d", [(12, 5), (5, 12), (7, 7)])
@pytest.mark.parametrize("branches", [1, 2])
def test_coding_length_batchwise_equals_featurewise_equals_the_definition(m, d, branches):
    z1 = rows(m, d)
    z2 = z1 if branches == 1 else z1 + 0.3 * rows(m, d, 1)
    mu, lam = (m + d) / 2, 1 / (m * 0.5)
    mine = coding_length(z1, None if branches == 1 else z2, eps2=0.5)
    for product in (z1.T @ z2, z1 @ z2.T):
        eye = torch.eye(len(product), dtype=torch.float64)
        torch.testing.assert_close(mine, mu * torch.logdet(eye + lam * product))


@pytest.mark.parametrize("m,d", [(12, 5), (5, 12)])
def test_the_smaller_of_the_two_forms_is_taken(monkeypatch, m, d):
    sizes = []
    monkeypatch.setattr(mec_quant, "logdet", lambda c, _: sizes.append(tuple(c.shape)) or c.sum())
    coding_length(rows(m, d), eps2=0.5)
    coding_length(rows(m, d), rows(m, d, 1), eps2=0.5)
    assert sizes == [(5, 5)] * 2


@pytest.mark.parametrize("branches", [1, 2])
def test_series_converges_to_the_exact_length(branches):
    z1, z2 = rows(20, 6), None if branches == 1 else rows(20, 6, 1)
    exact = coding_length(z1, z2, eps2=2.0)
    errors = [(coding_length(z1, z2, eps2=2.0, order=k) - exact).abs() for k in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-6 and errors[-1] < 1e-8


def test_series_of_order_two_and_four_by_hand():
    c = torch.diag(torch.tensor([0.5, 0.2], dtype=torch.float64))
    two = sum(x - x**2 / 2 for x in (0.5, 0.2))
    four = two + sum(x**3 / 3 - x**4 / 4 for x in (0.5, 0.2))
    assert mec_quant.series_logdet(c, 2).item() == pytest.approx(two)
    assert mec_quant.series_logdet(c, 4).item() == pytest.approx(four)


def test_series_outside_convergence_warns_and_is_exact_and_odd_orders_are_refused():
    z = F.normalize(torch.ones(20, 6, dtype=torch.float64), dim=1)  # one direction: norm 1 / eps2
    with pytest.warns(UserWarning, match="diverges"):
        guarded = coding_length(z, eps2=0.5, order=4)
    assert guarded == coding_length(z, eps2=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = coding_length(z, eps2=1.01, order=4)
    x = 1 / 1.01  # the only eigenvalue
    by_hand = 26 / 2 * (x - x**2 / 2 + x**3 / 3 - x**4 / 4)
    assert series.item() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="even"):
        coding_length(z, eps2=2.0, order=3)
    assert coding_length(math.nan * z, eps2=2.0, order=4).isnan()  # no error, but a loss of nan


def test_one_expert_codes_as_much_as_all_rows_together():
    z, z2 = rows(12, 5), rows(12, 5, 1)
    one = torch.ones(12, 1, dtype=torch.float64)
    torch.testing.assert_close(moe_coding_length(z, one, eps2=0.5), coding_length(z, eps2=0.5))
    torch.testing.assert_close(moe_coding_length(z, one, eps2=0.5, z2=z2),
                               coding_length(z, z2, eps2=0.5))


@pytest.mark.parametrize("seed", range(5))
def test_mixture_by_hand_and_as_a_lower_bound(seed):
    z = rows(30, 4, seed)
    gates = torch.randn(30, 3, dtype=torch.float64).mul(3).softmax(1)
    expected = 0
    for k in range(3):
        n = gates[:, k].sum()
        gram = sum(gates[j, k] * torch.outer(z[j], z[j]) for j in range(30))
        expected += 34 / 2 * n / 30 * torch.logdet(
            torch.eye(4, dtype=torch.float64) + gram / (n * 0.5))
    length = moe_coding_length(z, gates, eps2=0.5)
    torch.testing.assert_close(length, expected)
    assert length < coding_length(z, eps2=0.5)


def test_length_is_invariant_to_rotation_greatest_if_spread_and_least_if_collapsed():
    z = rows(40, 6)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    torch.testing.assert_close(coding_length(z @ turn, eps2=0.5), coding_length(z, eps2=0.5))
    spread = torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)])
    longest = coding_length(spread, eps2=0.5)
    assert longest.item() == pytest.approx(mec_quant.longest_code(12, 6, 0.5))
    collapsed = coding_length(spread[:1].expand(12, 6), eps2=0.5)
    assert collapsed.item() == pytest.approx(18 / 2 * math.log(1 + 1 / 0.5))
    for seed in range(5):
        assert collapsed < coding_length(rows(12, 6, seed), eps2=0.5) < longest


@pytest.mark.parametrize("m,d", [(6, 3), (3, 6)])
def test_gradients_by_finite_differences(m, d):
    z1, z2 = rows(m, d).requires_grad_(), rows(m, d, 1).requires_grad_()
    gates = torch.rand(m, 2, dtype=torch.float64).softmax(1)
    check = torch.autograd.gradcheck
    assert check(lambda z: coding_length(z, eps2=0.5), z1)
    assert check(lambda z: coding_length(z, eps2=2.0, order=4), z1)
    assert check(lambda a, b: coding_length(a, b, eps2=2.0), (z1, z2))
    assert check(lambda a, b: coding_length(a, b, eps2=2.0, order=4), (z1, z2))
    assert check(lambda z: moe_coding_length(z, gates, eps2=0.5), z1)
    assert check(lambda a, b: moe_coding_length(a, gates, eps2=2.0, z2=b), (z1, z2))
    assert check(normalized_rows, torch.randn(m, d, dtype=torch.float64, requires_grad=True))


def test_normalized_rows_are_centred_first_and_then_of_unit_norm():
    features = torch.rand(50, 8, dtype=torch.float64) * 3 + 5
    z = normalized_rows(features)
    expected = F.normalize(features - features.mean(0), dim=1)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(50).double(), rtol=1e-5, atol=0)
    tiny = torch.tensor([[1e-3, 0], [-1e-3, 0]], dtype=torch.float64)  # 1e-6 of eps: 1 / sqrt(2)
    assert normalized_rows(tiny)[0, 0].item() == pytest.approx(2**-0.5)


@pytest.mark.parametrize("value", [0.0, 7.0])
@pytest.mark.parametrize("kind", ["one", "scale", "random"])
def test_equal_features_are_finite(monkeypatch, tmp_path, value, kind):
    args = parse(monkeypatch, tmp_path)
    features = torch.full((16, 8), value, requires_grad=True)
    term = mec_quant.mec_term(args, features, None, kind)
    term.backward()
    assert term.item() == pytest.approx(0, abs=1e-4) and features.grad.isfinite().all()


def test_gates_sum_to_one_and_follow_the_magnitude_before_normalisation():
    magnitudes = torch.tensor([0.01, 0.011, 1.0, 1.1, 90.0, 100.0])
    gates = scale_gates(magnitudes, 3)
    torch.testing.assert_close(gates.sum(1), torch.ones(6))
    assert gates.argmax(1).tolist() == [0, 0, 1, 1, 2, 2] and gates.max(1).values.min() > 0.7
    torch.testing.assert_close(scale_gates(7 * magnitudes, 3), gates, rtol=1e-3, atol=1e-4)
    assert scale_gates(magnitudes, 1).eq(1).all()
    assert scale_gates(torch.ones(4), 2).eq(0.5).all()
    near = torch.tensor([-2e-6, 2e-6], dtype=torch.float64).exp()  # width: half of 2e-6, plus 1e-6
    assert scale_gates(near, 2)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-4)
    assert not scale_gates(magnitudes.requires_grad_(), 3).requires_grad
    torch.manual_seed(0)
    assert not torch.equal(mec_quant.random_gates(magnitudes.detach(), 3), gates)


def parse(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr("sys.argv", ["mec_quant.py", "--dataset", "shapes", "--out", str(tmp_path),
                                     "--dry-run", *flags])
    return mec_quant.parse_args()


@pytest.mark.parametrize("method,flags", [("mec", []), ("mec", ["--order", "2", "--eps2", "2"]),
                                          ("mec-quant", []), ("branch", []), ("kd", [])])
def test_loss_is_cross_entropy_minus_beta_times_the_relative_length(
        monkeypatch, tmp_path, tiny_data, method, flags):
    """The first step of the loop, rebuilt by hand: same gradients."""
    args, seen = parse(monkeypatch, tmp_path, "--beta", "5", "--method", method, *flags), []
    torch.manual_seed(0)
    network = common.build_model("resnet8", 10).eval()

    class Stop(Exception):
        pass

    def step(optimizer, *_):
        seen.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
        raise Stop

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(Stop):
        mec_quant.train(args, tiny_data, method, 0, network)
    student = common.quantize(network, 2, 2)
    common.calibrate(student, tiny_data.sample(100)[0])
    images, labels = next(tiny_data.batches(32, torch.Generator().manual_seed(0)))
    pooled = {}
    for name, model in (("student", student.train()), ("teacher", network)):
        hook = model.blocks.register_forward_hook(
            lambda layer, inputs, out, name=name: pooled.update({name: out.mean((2, 3))}))
        logits = model(images)
        hook.remove()
        if name == "student":
            mine = logits
    z, magnitude = normalized_rows(pooled["student"]), pooled["student"].norm(dim=1)
    loss, gates = F.cross_entropy(mine, labels), scale_gates(magnitude, 3)
    most = mec_quant.longest_code(32, 64, args.eps2)
    if method == "mec":
        loss = loss - 5 * coding_length(z, eps2=args.eps2, order=args.order) / most
    elif method == "mec-quant":
        loss = loss - 5 * moe_coding_length(z, gates, eps2=0.5) / most
    elif method == "branch":
        other = normalized_rows(pooled["teacher"]).detach()
        loss = loss - 5 * moe_coding_length(z, gates, eps2=0.5, z2=other) / most
    else:
        q = (logits / 4).softmax(1).detach()
        loss = loss + 16 * (q * (q.log() - (mine / 4).log_softmax(1))).sum(1).mean()
    parameters = [p for g in common.sgd(student, 1, 0).param_groups for p in g["params"]]
    for mine, grad in zip(seen, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-5)


def test_beta_zero_is_lsq_bit_for_bit_and_every_method_differs(monkeypatch, tmp_path, tiny_data):
    network = common.build_model("resnet8", 10).eval()
    before = copy.deepcopy(network.state_dict())

    def trained(method, *flags):
        args = parse(monkeypatch, tmp_path, *flags)
        return mec_quant.train(args, tiny_data, method, 0, network)[0].state_dict()

    results = {method: trained(method) for method in mec_quant.METHODS}
    for method in ("mec", "mec-quant", "branch"):
        zero = trained(method, "--beta", "0")
        assert all(torch.equal(v, results["lsq"][k]) for k, v in zero.items())
    teacher = trained("mec-quant", "--branch", "teacher")
    assert all(torch.equal(v, results["branch"][k]) for k, v in teacher.items())
    weights = [r["fc.weight"] for r in results.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_spectrum_of_known_features():
    spread = torch.cat([torch.eye(4), -torch.eye(4)])
    length, rank, top = mec_quant.spectrum(spread, 0.5)
    assert length == pytest.approx(1, rel=1e-4) and rank == pytest.approx(4, rel=1e-4)
    assert top == pytest.approx(0.25, rel=1e-4)
    line = torch.linspace(-1, 1, 8)[:, None] * torch.ones(4)
    assert mec_quant.spectrum(line, 0.5)[1:] == (pytest.approx(1, abs=1e-3), pytest.approx(1))


def test_series_errors_shrink_and_begin_with_the_spectral_norm(monkeypatch, tmp_path):
    args = parse(monkeypatch, tmp_path, "--eps2", "2")
    features = torch.randn(64, 8)
    norm, *errors = mec_quant.series_errors(args, features)
    z = normalized_rows(features)
    assert norm == pytest.approx(torch.linalg.svdvals(z)[0].item() ** 2 / (64 * 2), rel=1e-4)
    assert all(e < 0 for e in errors[:2]) and abs(errors[0]) > abs(errors[1])


@pytest.mark.parametrize("flags,bits", [(["--ablate", "--diagnose"], [(2, 2)]),
                                        (["--bits", "1"], [(1, 1)]),
                                        (["--sweep-bits"], [(2, 4), (2, 3), (2, 2), (2, 1)])])
def test_everything_as_a_user_runs_it(monkeypatch, capsys, tmp_path, flags, bits):
    monkeypatch.setattr(sys, "argv", ["mec_quant.py", "--dry-run", "--dataset", "shapes", "--out",
                                      str(tmp_path), *flags])
    common.entry(mec_quant.main)
    out = capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "dry-run/results.jsonl").read_text().splitlines()]
    methods = list(mec_quant.METHODS) if "--ablate" in flags else ["lsq", "mec-quant"]
    expected = [("fp", 32, 32)] + [(m, *b) for b in bits for m in methods]
    assert [(x["method"], x["wbits"], x["abits"]) for x in lines] == expected
    assert "nan" not in out
    assert all(f" {w}/{a} " in out for w, a in bits) and out.count("+0.00") >= len(bits)
    if "--diagnose" in flags:
        assert all(word in out for word in ("effective rank", "series of", "experts of", "blocks"))


@pytest.mark.parametrize("flags,word", [(["--order", "3"], "even"), (["--bits", "0"], "1 to 8"),
                                        (["--order", "2"], "--method mec"),
                                        (["--experts", "0"], "from 1"), (["--eps2", "0"], "from")])
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, flags, word):
    monkeypatch.setattr(sys, "argv", ["mec_quant.py", "--dry-run", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stop:
        common.entry(mec_quant.main)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and word in err and len(err.splitlines()) == 1
