"""MEC-Quant's coding lengths against closed forms, its first step by hand, its figures."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import mec_quant
from conftest import close, first_batch, first_step, gradients, normal, tiny_network
from mec_quant import coding_length, longest_code, moe_coding_length, normalized_rows, scale_gates


def by_definition(z1, z2, gates, eps2):
    """L_moe in its d x d form, which has the determinants of the m x m form."""
    m, d = z1.shape
    total = 0
    for pi, n in zip(gates.T, gates.sum(0)):
        c = z1.T @ (pi[:, None] * z2) / (n * eps2)
        total += (m + d) / 2 * n / m * torch.logdet(torch.eye(d) + c)
    return total


@pytest.mark.parametrize("m, d", [(12, 5), (5, 12)])
@pytest.mark.parametrize("branches", [1, 2])
def test_lengths_equal_the_definition_by_the_smaller_determinants(
        monkeypatch, m, d, branches):
    """Value and gradient of L and L_moe. With K = 1, L_moe is L; with more, a lower bound."""
    sizes = []
    logdet = mec_quant.exact_logdet

    def watched(c, symmetric):
        sizes.append(c.shape[-1])
        return logdet(c, symmetric)

    monkeypatch.setattr(mec_quant, "exact_logdet", watched)
    z1 = F.normalize(normal(m, d).double()).requires_grad_()
    z2 = z1
    other = None
    if branches == 2:
        z2 = F.normalize(z1.detach() + 0.3 * normal(m, d, seed=2))
        other = z2
    one = torch.ones(m, 1).double()
    gates = normal(m, 3).double().softmax(1)
    length = coding_length(z1, other, eps2=0.5)
    alone = moe_coding_length(z1, one, eps2=0.5, z2=other)
    mixture = moe_coding_length(z1, gates, eps2=0.5, z2=other)
    for found, pi in ((length, one), (alone, one), (mixture, gates)):
        expected = by_definition(z1, z2, pi, 0.5)
        close(found, expected)
        close(
            torch.autograd.grad(found, z1, retain_graph=True),
            torch.autograd.grad(expected, z1, retain_graph=True))
    assert sizes == [5, 5, 5]
    assert branches == 2 or mixture < length


def test_series_by_hand_where_it_converges_else_an_error():
    z = torch.full((20, 6), 6**-0.5).double()  # one direction: norm 1 / eps2
    x = 1 / 1.01
    expected = 26 / 2 * (x - x**2 / 2 + x**3 / 3 - x**4 / 4)
    series = coding_length(z, eps2=1.01, order=4)
    assert series.item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="diverges"):
        coding_length(z, eps2=0.99, order=4)
    for order in (0, 3):
        with pytest.raises(ValueError, match="even"):
            coding_length(z, eps2=2.0, order=order)


def test_longest_code_is_that_of_rows_spread_over_all_directions():
    spread = torch.eye(6).double().repeat(2, 1)
    for z in (spread, spread[:4]):
        length = coding_length(z, eps2=0.5).item()
        assert length == pytest.approx(longest_code(*z.shape, 0.5))


def test_normalized_rows_are_centred_first_and_then_of_unit_norm():
    features = 3 * normal(50, 8).double() + 5
    expected = F.normalize(features - features.mean(0))
    close(normalized_rows(features), expected, rtol=1e-5, atol=0)
    tiny = torch.tensor([[1e-3], [-1e-3]])  # norm^2 = eps
    assert normalized_rows(tiny)[0].item() == pytest.approx(2**-0.5)


def test_gates_sum_to_one_and_follow_the_magnitude():
    magnitudes = torch.tensor([0.01, 0.011, 1.0, 1.1, 90.0, 100.0], requires_grad=True)
    gates = scale_gates(magnitudes, 3)
    assert not gates.requires_grad
    assert gates.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    close(gates.sum(1), torch.ones(6))
    assert scale_gates(0 * magnitudes, 3).isfinite().all()
    near = torch.tensor([-2e-6, 2e-6]).double().exp()  # width: std / K + 1e-6
    gate = scale_gates(7 * near, 2)[0, 0].item()
    assert gate == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-4)


@pytest.mark.parametrize("method, flags", [
    ("baseline", ""),
    ("mec", ""),
    ("mec", "--eps2 2"),
    ("mec-quant", ""),
    ("branch", ""),
    ("random", ""),
])
def test_first_step_by_hand(parse, tiny_data, method, flags):
    """The gradients of CE - beta L / L_max."""
    flags += f" --beta 5 --experts 2 --quantizer pact --method {method}"
    args = parse("mec_quant", flags)
    network = tiny_network()
    seen = first_step(mec_quant.train, args, tiny_data, method, 0, network)
    student, (images, labels) = first_batch(network, tiny_data, args, "crop+flip")
    features = student[:-1](images)
    loss = F.cross_entropy(student[-1](features), labels)
    z = normalized_rows(features)
    other = normalized_rows(network[:-1](images)).detach() if method == "branch" else None
    magnitudes = features.norm(dim=1)
    if method == "random":
        magnitudes = torch.randn_like(magnitudes).exp()
    gates = scale_gates(magnitudes, 2)
    length = moe_coding_length(z, gates, eps2=1 / 32, z2=other)
    if method == "mec":
        length = coding_length(z, eps2=args.eps2)
    if method != "baseline":
        loss = loss - 5 * length / longest_code(32, 8, args.eps2)
    close(seen, gradients(student, loss), rtol=1e-3, atol=1e-6)


def test_spectrum_and_series_errors_of_known_features():
    spread = torch.cat([torch.eye(4), -torch.eye(4)])
    found = mec_quant.spectrum(spread, 0.5)
    assert found == pytest.approx((1, 4, 0.25), rel=1e-3)
    norm, error = mec_quant.series_errors(spread, 0.5)
    assert norm == pytest.approx(0.5, rel=1e-3)  # 1 / (4 * 0.5), the fourfold eigenvalue
    series = 0.5 - 0.5**2 / 2 + 0.5**3 / 3 - 0.5**4 / 4
    assert error == pytest.approx(series / math.log(1.5) - 1, rel=1e-2)


def test_figures_of_an_epoch_by_hand(parse, tiny_data):
    """The ratio in training mode, the features in eval mode."""
    args = parse("mec_quant")
    network = tiny_network()
    student, _ = first_batch(network, tiny_data, args, "none")
    images, labels = tiny_data.sample(512)
    batch = (student, network, images, labels, args)
    loss = mec_quant.mec(*batch)
    ratio = common.gradient_ratio(loss, mec_quant.baseline(*batch), student)
    found = mec_quant.measure_epoch(args, tiny_data, "mec", student, network)
    assert found["ratio"] == pytest.approx(ratio, rel=1e-4)
    features = mec_quant.features_of(student, tiny_data)
    close(features, student.eval()[:-1](images).detach())
