"""MEC-Quant's coding lengths against closed forms, its first step by hand, all its figures."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import mec_quant
from conftest import SHAPES, close, first_batch, first_step, gradients, normal, tiny_network
from mec_quant import coding_length, longest_code, moe_coding_length, normalized_rows, scale_gates


def rows(m, d, seed=0):
    """m x d in float64, centred, of unit norm, with a gradient."""
    return normalized_rows(normal(m, d, seed=seed).double()).detach().requires_grad_()


def by_definition(z1, z2, gates, eps2):
    """L_moe in its d x d form, which has the determinants of the m x m form."""
    m, d = z1.shape
    total = 0
    for pi, n in zip(gates.T, gates.sum(0)):
        c = z1.T @ (pi[:, None] * z2) / (n * eps2)
        total += (m + d) / 2 * n / m * torch.logdet(torch.eye(d).double() + c)
    return total


@pytest.mark.parametrize("m, d", [(12, 5), (5, 12)])
@pytest.mark.parametrize("branches", [1, 2])
def test_lengths_equal_the_definition_by_the_smaller_determinants(monkeypatch, m, d, branches):
    """Value and gradient of L and L_moe. With K = 1, L_moe is L; with more, a lower bound."""
    sizes = []
    exact_logdet = mec_quant.exact_logdet

    def watched(c, symmetric):
        assert symmetric == (branches == 1)
        sizes.append(c.shape[-1])
        return exact_logdet(c, symmetric)

    monkeypatch.setattr(mec_quant, "exact_logdet", watched)
    z1 = rows(m, d)
    other = None
    leaves = [z1]
    if branches == 2:
        other = (z1 + 0.3 * rows(m, d, 1)).detach().requires_grad_()
        leaves.append(other)
    one = torch.ones(m, 1).double()
    gates = rows(m, 3, 2).detach().softmax(1)
    length = coding_length(z1, other, eps2=0.5)
    for found, pi in [
            (length, one),
            (moe_coding_length(z1, one, eps2=0.5, z2=other), one),
            (moe_coding_length(z1, gates, eps2=0.5, z2=other), gates)]:
        expected = by_definition(z1, leaves[-1], pi, 0.5)
        close(found, expected)
        grads = torch.autograd.grad(found, leaves, retain_graph=True)
        close(grads, torch.autograd.grad(expected, leaves, retain_graph=True))
    assert sizes == [5, 5, 5]
    assert branches == 2 or found < length


@pytest.mark.filterwarnings("error")
def test_series_by_hand_where_it_converges_else_a_warning_and_the_exact_value():
    z = torch.full((20, 6), 6**-0.5, dtype=torch.float64)  # one direction: norm 1 / eps2
    x = 1 / 1.01
    series = coding_length(z, eps2=1.01, order=4).item()
    assert series == pytest.approx(26 / 2 * (x - x**2 / 2 + x**3 / 3 - x**4 / 4))
    with pytest.warns(UserWarning, match="diverges"):
        assert coding_length(z, eps2=0.5, order=4) == coding_length(z, eps2=0.5)
    with pytest.raises(ValueError, match="order"):
        coding_length(z, eps2=2.0, order=3)
    assert coding_length(math.nan * z, eps2=2.0, order=4).isnan()  # no error, but a loss of nan


def test_longest_code_is_that_of_rows_spread_over_all_directions():
    spread = torch.eye(6).double().repeat(2, 1)
    for z in (spread, spread[:4]):
        assert coding_length(z, eps2=0.5).item() == pytest.approx(longest_code(*z.shape, 0.5))


def test_normalized_rows_are_centred_first_and_then_of_unit_norm():
    features = 3 * normal(50, 8).double() + 5
    expected = F.normalize(features - features.mean(0))
    close(normalized_rows(features), expected, rtol=1e-5, atol=0)
    tiny = torch.tensor([[1e-3, 0], [-1e-3, 0]], dtype=torch.float64)  # norm^2 = eps
    assert normalized_rows(tiny)[0, 0].item() == pytest.approx(2**-0.5)


def test_gates_sum_to_one_and_follow_the_magnitude():
    magnitudes = torch.tensor([0.01, 0.011, 1.0, 1.1, 90.0, 100.0], requires_grad=True)
    gates = scale_gates(magnitudes, 3)
    assert not gates.requires_grad
    assert gates.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    close(gates.sum(1), torch.ones(6))
    assert scale_gates(0 * magnitudes, 3).isfinite().all()
    near = torch.tensor([-2e-6, 2e-6], dtype=torch.float64).exp()  # width: std / K + 1e-6
    expected = 1 / (1 + math.exp(-1))
    assert scale_gates(7 * near, 2)[0, 0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method, flags", [
    ("baseline", ""),
    ("mec", ""),
    ("mec", "--order 2 --eps2 2"),
    ("mec-quant", ""),
    ("mec-quant", "--features quantized"),
    ("branch", ""),
    ("random", "")])
def test_first_step_by_hand(parse, tiny_data, method, flags):
    """The gradients of CE - beta L / L_max."""
    args = parse("mec_quant", "--beta 5 --experts 2 --quantizer pact --method", method, flags)
    network = tiny_network()
    seen = first_step(mec_quant.train, args, tiny_data, method, 0, network)
    student, (images, labels) = first_batch(network, tiny_data, args, "crop+flip")
    features = student[:-1](images)
    loss = F.cross_entropy(student[-1](features), labels)
    if args.features == "quantized":
        features = student[-1].input_quantizer(features)
    z = normalized_rows(features)
    other = normalized_rows(network[:-1](images)).detach() if method == "branch" else None
    magnitudes = features.detach().norm(dim=1)
    if method == "random":
        magnitudes = torch.randn_like(magnitudes).exp()
    length = moe_coding_length(z, scale_gates(magnitudes, 2), eps2=1 / 32, z2=other)
    if method == "mec":
        length = coding_length(z, eps2=args.eps2, order=args.order)
    if method != "baseline":
        loss = loss - 5 * length / longest_code(32, 8, args.eps2)
    close(seen, gradients(student, loss), rtol=1e-3, atol=1e-6)


def test_spectrum_and_series_errors_of_known_features():
    spread = torch.cat([torch.eye(4), -torch.eye(4)])
    line = torch.linspace(-1, 1, 8)[:, None] * torch.ones(4)
    assert mec_quant.spectrum(spread, 0.5) == pytest.approx((1, 4, 0.25), rel=1e-3)
    assert mec_quant.spectrum(line, 0.5)[1:] == pytest.approx((1, 1), rel=1e-3)
    norm, error, *_ = mec_quant.series_errors(spread, 0.5)
    assert norm == pytest.approx(0.5, rel=1e-3)  # 1 / (4 * 0.5), the fourfold eigenvalue
    assert error == pytest.approx((0.5 - 0.5**2 / 2) / math.log(1.5) - 1, rel=1e-2)


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """The ratio in training mode; the series of the float features in eval mode."""
    args = parse("mec_quant", "--beta 5")
    network = tiny_network()
    student, _ = first_batch(network, tiny_data, args, "none")
    images, labels = tiny_data.sample(512)
    weights = [layer.weight for layer in common.weight_layers(student).values()]
    loss = mec_quant.mec(student, network, images, labels, args)
    cross_entropy = F.cross_entropy(student(images), labels)
    own = common.gradient_of(cross_entropy, weights, retain_graph=True)
    added = common.gradient_of(loss - cross_entropy, weights)
    found = mec_quant.figures_of_epoch(args, tiny_data, "mec", student, network)
    assert found["ratio"] == pytest.approx((added.norm() / own.norm()).item(), rel=1e-3)
    features = student.eval()[:-1](images).detach()
    assert found["series"] == pytest.approx(mec_quant.series_errors(features, 1 / 32), rel=1e-3)


@pytest.mark.usefixtures("tiny_networks")
def test_all_methods_and_figures_as_a_user_runs_them(run):
    done = run("mec_quant", SHAPES, "--ablate --diagnose --wbits 4 --abits 1")
    trained = done.results[1:]
    assert [row["method"] for row in trained] == list(mec_quant.METHODS)
    assert all((row["wbits"], row["abits"]) == (4, 1) for row in trained)
    assert "nan" not in done.out
    assert "effective rank" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    epochs = [row["history"][0] for row in trained]
    ratios = [f"{epoch['ratio']:.4f}" for epoch in epochs]
    assert ["1", *ratios] in lines
    assert len(set(ratios)) == 5
    series = ["{0:.2f} {2:+.3f}".format(*epoch["series"]) for epoch in epochs]
    assert ["1", *" ".join(series).split()] in lines
    gates = [line for line in lines if line[:1] in (["0"], ["1"], ["2"]) and "%" in line]
    assert sum(float(gate[1]) for gate in gates) == pytest.approx(100, abs=0.3)
