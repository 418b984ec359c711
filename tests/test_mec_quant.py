"""MEC-Quant's coding lengths against closed forms, its first step by hand, a user's run."""

import math

import pytest
import torch
import torch.nn.functional as F

import fpq
import mec_quant
from conftest import SHAPES, close, first_step_by_script, gradients, normal
from mec_quant import coding_length, moe_coding_length, normalized_rows, scale_gates


def rows(m, d, seed=0):
    """m x d in float64, centred, of unit norm, with a gradient."""
    return normalized_rows(normal(m, d, seed=seed).double()).requires_grad_()


def by_definition(z1, z2, gates, eps2):
    """L_moe in its d x d form, which has the determinants of the m x m form."""
    (m, d), total = z1.shape, 0
    for pi, n in zip(gates.T, gates.sum(0)):
        c = z1.T @ (pi[:, None] * z2) / (n * eps2)
        total += (m + d) / 2 * n / m * torch.logdet(torch.eye(d).double() + c)
    return total


@pytest.mark.parametrize("m,d", [(12, 5), (5, 12)])
@pytest.mark.parametrize("two", [False, True])
def test_lengths_equal_the_definition_by_the_smaller_determinants(monkeypatch, m, d, two):
    """Value and gradient of L and L_moe, of one branch and two; with K = 1 L_moe is L."""
    z1, sizes, logdet = rows(m, d), [], mec_quant.logdet
    monkeypatch.setattr(
        mec_quant, "logdet", lambda c, one: sizes.append(c.shape[-1]) or logdet(c, one))
    other = (z1 + 0.3 * rows(m, d, 1)).detach().requires_grad_() if two else None
    z2, leaves = (other, (z1, other)) if two else (z1, (z1,))
    one, gates = torch.ones(m, 1).double(), rows(m, 3, 2).detach().softmax(1)
    for mine, pi in ((coding_length(z1, other, eps2=0.5), one),
                     (moe_coding_length(z1, one, eps2=0.5, z2=other), one),
                     (moe_coding_length(z1, gates, eps2=0.5, z2=other), gates)):
        expected = by_definition(z1, z2, pi, 0.5)
        close(mine, expected)
        close(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in (mine, expected)))
    assert sizes == [5] * 3
    assert two or mine < coding_length(z1, eps2=0.5)  # a mixture is a lower bound


@pytest.mark.filterwarnings("error")
def test_series_by_hand_where_it_converges_else_a_warning_and_the_exact_value():
    z = torch.full((20, 6), 6**-0.5, dtype=torch.float64)  # one direction: norm 1 / eps2
    x, series = 1 / 1.01, coding_length(z, eps2=1.01, order=4)
    assert series.item() == pytest.approx(26 / 2 * (x - x**2 / 2 + x**3 / 3 - x**4 / 4))
    with pytest.warns(UserWarning, match="diverges"):
        assert coding_length(z, eps2=0.5, order=4) == coding_length(z, eps2=0.5)
    with pytest.raises(ValueError, match="order"):
        coding_length(z, eps2=2.0, order=3)
    assert coding_length(math.nan * z, eps2=2.0, order=4).isnan()  # no error, but a loss of nan


def test_longest_code_is_that_of_rows_spread_over_all_directions():
    spread = torch.eye(6).double().repeat(2, 1)
    for z in (spread, spread[:4]):
        close(coding_length(z, eps2=0.5).item(), mec_quant.longest_code(*z.shape, 0.5))


def test_normalized_rows_are_centred_first_and_then_of_unit_norm():
    features = 3 * normal(50, 8).double() + 5
    close(normalized_rows(features), F.normalize(features - features.mean(0)), rtol=1e-5, atol=0)
    tiny = torch.tensor([[1e-3, 0], [-1e-3, 0]], dtype=torch.float64)  # norm^2 = eps
    assert normalized_rows(tiny)[0, 0].item() == pytest.approx(2**-0.5)


def test_gates_sum_to_one_and_follow_the_magnitude():
    magnitudes = torch.tensor([0.01, 0.011, 1.0, 1.1, 90.0, 100.0], requires_grad=True)
    gates = scale_gates(magnitudes, 3)
    assert scale_gates(0 * magnitudes, 3).isfinite().all()
    close(gates.sum(1), torch.ones(6))
    assert gates.argmax(1).tolist() == [0, 0, 1, 1, 2, 2] and not gates.requires_grad
    near = 7 * torch.tensor([-2e-6, 2e-6], dtype=torch.float64).exp()  # width: std / K + 1e-6
    assert scale_gates(near, 2)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-4)


@pytest.mark.parametrize("method,flags", [
    ("baseline", ""), ("mec", ""), ("mec", "--order 2 --eps2 2"), ("mec-quant", ""),
    ("branch", ""), ("kd", "--kd-weight 0.7"), ("mec-quant", "--features quantized")])
def test_first_step_by_hand(parse, tiny_data, method, flags):
    """The gradients of CE - beta L / L_max or, with kd, of CE plus FPQ's distillation."""
    args = parse("mec_quant", "--beta 5 --experts 2 --quantizer pact --method", method, flags)
    seen, network, student, (images, labels) = first_step_by_script(
        mec_quant.train, args, tiny_data, method, "crop+flip")
    features, other = student[:-1](images), normalized_rows(network[:-1](images)).detach()
    logits, loss = student[-1](features), 0
    if args.features == "quantized":
        features = student[-1].input_quantizer(features)
    z = normalized_rows(features)
    if method == "kd":
        loss = 0.7 * fpq.kd_loss(logits, network(images).detach())
    elif method == "mec":
        loss = -5 * coding_length(z, eps2=args.eps2, order=args.order)
    elif method != "baseline":
        z2 = other if method == "branch" else None
        loss = -5 * moe_coding_length(z, scale_gates(features.norm(dim=1), 2), eps2=1 / 32, z2=z2)
    if method != "kd":
        loss = loss / mec_quant.longest_code(32, 8, args.eps2)
    loss = loss + F.cross_entropy(logits, labels)
    close(seen, gradients(student, loss), rtol=1e-3, atol=1e-6)


def test_spectrum_and_series_errors_of_known_features(parse):
    spread = torch.cat([torch.eye(4), -torch.eye(4)])
    line = torch.linspace(-1, 1, 8)[:, None] * torch.ones(4)
    assert mec_quant.spectrum(spread, 0.5) == pytest.approx((1, 4, 0.25), rel=1e-3)
    assert mec_quant.spectrum(line, 0.5)[1:] == pytest.approx((1, 1), rel=1e-3)
    norm, error, *_ = mec_quant.series_errors(parse("mec_quant", "--eps2 0.5"), spread)
    assert norm == pytest.approx(0.5, rel=1e-3)  # 1 / (4 * 0.5), the fourfold eigenvalue
    assert error == pytest.approx((0.5 - 0.5**2 / 2) / math.log(1.5) - 1, rel=1e-2)


def test_everything_as_a_user_runs_it(run, forces):
    """The printed force is that of each added term."""
    done = run("mec_quant", SHAPES, "--ablate --diagnose --wbits 4 --abits 1")
    assert [(row["method"], row["wbits"], row["abits"]) for row in done.results] == [
        ("fp", 32, 32), *((method, 4, 1) for method in mec_quant.METHODS)]
    row = [f"{force:.4f}" for force in (0, *forces)]
    assert ["1", *row] in map(str.split, done.out.splitlines()) and "nan" not in done.out
    assert len({*row}) == 6
    assert all(words in done.out for words in ("effective rank", "mec-quant: sp", "scale gates on"))
