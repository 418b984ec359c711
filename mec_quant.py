"""MEC-Quant: Maximum Entropy Coding. Pang, Cai, Zhang, "MEC-Quant: Maximum Entropy Coding for
Extremely Low Bit Quantization-Aware Training", arXiv 2509.15514.

The idea. Few bits bias what a network represents. So MEC-Quant keeps the features rich while the
network learns the labels. It measures the features' entropy by the length of a lossy code for them.
Features are long-tailed: a few are far larger than most. So "experts" share the coding, one for
each range of magnitudes, without parameters of their own [choice]. The loss is cross-entropy (CE)
minus beta times the code's relative length.

We had only abstract and summaries; [choice] marks our decisions. Length and series are from Ma et
al. 2007 and Liu et al. 2022; the mixture is after maximal coding rate reduction (Yu et al. 2020).

    symbol                                                                              from
    Z: m x d              normalized_rows(features), m images, d features               [choice]
    eps_d^2, lambda       --eps2; 1 / (m eps_d^2)                                       Liu
    L(Z), L(Z1, Z2)       coding_length(z1, z2), exact or series of even order          Ma, Liu
    pi_jk                 scale_gates(magnitudes, K), m x K, rows sum to 1              [choice]
    L_moe                 moe_coding_length(z, gates)                                   [choice]
    CE - beta L / L_max   train(), longest_code(m, d) normalises                        [choice]

    python mec_quant.py --bits 2               full precision, baseline (LSQ), MEC-Quant
    python mec_quant.py --wbits 4 --abits 1    activations of one bit
"""

import argparse
import math
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import common
import torch
import torch.nn.functional as F
from common import Data, Run, calibrate, full_precision, hooked, print_row, quantize, sgd
from torch import Tensor, nn

PAPER = {"model": "resnet18", "stem": "imagenet", "dataset": "cifar10", "batch_size": 256,
         "lr": 0.01, "epochs": 200, "weight_decay": 5e-4,
         # Above: FPQ's protocol (we infer the stem). Below, and --augment: ours [choice].
         "fp_epochs": 200, "fp_lr": 0.1, "fp_weight_decay": 5e-4, "pad": 4}

# By method: how experts share the rows ("one": no experts; None: no coding length). "branch" codes
# the student's features together with full precision's, Z2; elsewhere Z2 is Z1.
METHODS = {"baseline": None, "mec": "one", "mec-quant": "scale", "branch": "scale",
           "random": "random", "kd": None}
ORDERS = (2, 4, 8)  # of the series that --diagnose compares with the exact value


def even(text: str) -> int:
    """An argparse type: an even number. An odd order's last term is greatest if all rows agree."""
    order = common.number(int, 2, 100)(text)
    if order % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is odd and rewards equal rows; try {order - 1}")
    return order


def parse_args() -> Namespace:
    parser = common.base_parser("MEC-Quant: maximum entropy coding for extremely low bit "
                                "quantization-aware training (arXiv 2509.15514)", fewest_bits=1)
    number = common.number
    common.add_flags(
        parser, "method",
        ("--method", list(METHODS), ["baseline", "mec-quant"], "what to train"),
        ("--beta", number(float, 0, 1e6), 1.0, "weight of the coding length in the loss"),
        ("--eps2", number(float, 1e-6, 1e6), 1 / 32, "squared error per feature the code may make"),
        ("--order", even, None, "mec: even order of the Taylor series (without it: exact value)"),
        ("--experts", number(int, 1, 64), 3, "K: number of experts"),
        ("--features", ["float", "quantized"], "float", "Z before or after the last quantizer"),
        ("--kd-weight", number(float, 0, 1e6), 1.0, "weight of knowledge distillation in kd"),
        ("--ablate", bool, False, f"train all methods: {' '.join(METHODS)}"),
        ("--diagnose", bool, False, "print rank of features, error of series, gates, term"))
    args = common.parse(parser, PAPER)
    args.method = list(METHODS if args.ablate else dict.fromkeys(args.method))
    if args.order and "mec" not in args.method:
        parser.error("--order has no effect without --method mec: add mec, or leave --order out")
    return args


# ------------------------------------------------------------------------------------- the method


def normalized_rows(features: Tensor) -> Tensor:
    """Z: features (m x d) minus their mean over the batch, rows scaled to norm 1; 0 for equal rows.
    We centre [choice], as uncentred ReLU features have much of their energy in one direction."""
    z = features - features.mean(0)
    return z * (z.square().sum(1, keepdim=True) + 1e-6).rsqrt()


def series_logdet(c: Tensor, order: int) -> Tensor:
    """Taylor series of log det(I + C), C of spectral norm < 1: sum_{k=1..order} -tr (-C)^k / k."""
    power, total = c, torch.diagonal(c).sum()
    for k in range(2, order + 1):
        power = power @ c
        total = total + (-1) ** (k + 1) / k * torch.diagonal(power).sum()
    return total


def logdet(c: Tensor, symmetric: bool) -> Tensor:
    """log |det(I + C)| of ... x n x n. If Z2 is Z1, C is symmetric: Cholesky is enough, and does
    not wait for the device. Else it takes LU factors; we drop the determinant's sign."""
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    if symmetric:
        factor = torch.linalg.cholesky_ex(eye + c).L
        return 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
    return torch.linalg.slogdet(eye + c).logabsdet


def coding_length(z1: Tensor, z2: Tensor | None = None, *, eps2: float,
                  order: int | None = None) -> Tensor:
    """L(Z1, Z2), m x d each, centred, normalised; Z2 is Z1 by default: length in nats of a code for
    their rows, whose squared error may be eps_d^2 per feature. log det / 2 is the logarithm of the
    number of balls of that error that fill the features' volume; m + d: rows and directions (Ma).

        L = mu log det(I + lambda Z1^T Z2),  mu = (m + d) / 2,  lambda = 1 / (m eps_d^2)

    As det(I + AB) = det(I + BA), I + lambda Z1 Z2^T, m x m, will do; we take the smaller one. The
    default is exact. An even `order` takes the series of Liu et al., but warns and stays exact at a
    spectral norm of 1 or more [choice], waiting for the device. An odd one raises ValueError."""
    m, d = z1.shape
    a, b = (z1, z1 if z2 is None else z2) if m <= d else (z1.T, (z1 if z2 is None else z2).T)
    c = a @ b.T / (m * eps2)
    if order is not None and series_converges(c, order):
        return (m + d) / 2 * series_logdet(c, order)
    return (m + d) / 2 * logdet(c, z2 is None)


def series_converges(c: Tensor, order: int) -> bool:
    """Whether the spectral norm of C is below 1; a warning, shown once, if it is not."""
    if order % 2 or order < 2:
        raise ValueError(f"order should be 2, 4, 6, ..., not {order}: odd ones reward equal rows")
    if not c.isfinite().all():  # LAPACK would raise; the series gives a loss of nan
        return True
    norm = torch.linalg.matrix_norm(c.detach(), 2).item()
    if norm >= 1:
        warnings.warn("the coding length's series diverges (spectral norm 1 or more), so the exact "
                      "value is used; give a larger --eps2, or leave --order out", stacklevel=3)
    return norm < 1


def moe_coding_length(z: Tensor, gates: Tensor, *, eps2: float, z2: Tensor | None = None) -> Tensor:
    """L_moe: each expert k codes its share of the rows; gates pi (m x K, rows sum to 1).

        L_moe = (m + d) / 2 sum_k n_k / m log det(I + 1 / (n_k eps_d^2) Z^T diag(pi_k) Z2)
        n_k = sum_j pi_jk

    One expert gives L(Z). As log det is concave, more give a lower bound of L(Z), if Z2 is Z1: it
    is safe to maximise. Weights (n_k + d) / 2, the cost of K separate codes, would break the bound
    [choice]. The bits that name the expert are left out, as the gates are constants. The K matrices
    are d x d or, if smaller, m x m."""
    m, d = z.shape
    n = gates.sum(0).clamp_min(common.TINY)
    root = gates.T.sqrt()[:, :, None]
    left, right = root * z, root * (z if z2 is None else z2)  # K x m x d
    c = left @ right.mT if m < d else left.mT @ right
    return (m + d) / 2 * (n / m * logdet(c / (n * eps2)[:, None, None], z2 is None)).sum()


def scale_gates(magnitudes: Tensor, experts: int) -> Tensor:
    """pi: m x K, rows sum to 1. A long tail mixes scales, so each expert has a Gaussian over
    log-magnitudes: expert k at their (k + 1/2) / K quantile, with width std / K [choice].
    magnitudes: m, norms of the features before `normalized_rows`. No gradient flows."""
    scale = magnitudes.detach().clamp_min(common.TINY).log()
    levels = (torch.arange(experts, device=scale.device, dtype=scale.dtype) + 0.5) / experts
    width = scale.std(correction=0) / experts + 1e-6
    return (-0.5 * ((scale[:, None] - scale.quantile(levels)) / width).square()).softmax(1)


def random_gates(magnitudes: Tensor, experts: int) -> Tensor:
    """The control of `scale_gates`: random gates, m x K, about as soft as those."""
    return scale_gates(torch.randn_like(magnitudes).exp(), experts)


def longest_code(m: int, d: int, eps2: float) -> float:
    """L_max: L(Z) of m unit rows spread evenly over r directions; beta then fits any m and d."""
    r = min(m, d)
    return (m + d) / 2 * r * math.log(1 + 1 / (r * eps2))


def mec_term(features: Tensor, other: Tensor | None = None, kind: str = "scale",
             experts: int = 3, eps2: float = 1 / 32, order: int | None = None) -> Tensor:
    """L / L_max, at most 1, of m x d features and the other branch's, if any; kind: its gates."""
    z, z2 = normalized_rows(features), None if other is None else normalized_rows(other)
    if kind == "one":
        length = coding_length(z, z2, eps2=eps2, order=order)
    else:
        assign = scale_gates if kind == "scale" else random_gates
        gates = assign(features.detach().norm(dim=1), experts)
        length = moe_coding_length(z, gates, eps2=eps2, z2=z2)
    return length / longest_code(*z.shape, eps2)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): T^2 KL(teacher || student); N x classes each."""
    student, teacher = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


@contextmanager
def penultimate(model: nn.Module, features: str = "float") -> Iterator[list[Tensor]]:
    """Yields a list. Inside, each forward pass appends the last layer's input, N x d, to it."""
    def keep(layer, inputs):
        found.append(layer.input_quantizer(*inputs) if features == "quantized" else inputs[0])

    found = []
    with hooked(list(common.weight_layers(model).values())[-1:], before=keep):
        yield found


# ----------------------------------------------------------------------------------- the training


def train(args: Namespace, data: Data, method: str, seed: int,
          network: nn.Module) -> tuple[nn.Module, dict, list[dict]]:
    """(quantized network, result, history), from the full-precision `network` on."""
    kind, by_teacher = METHODS[method], method == "branch" and args.beta > 0
    beta, kd_weight = (args.beta, 0) if kind else (0, args.kd_weight * (method == "kd"))
    student = quantize(network, args.wbits, args.abits, args.quantizer)
    calibrate(student, data.sample(100)[0])
    optimizer = sgd(student, args.lr, args.weight_decay)
    run = Run(args, data, method, seed, args.epochs, model=student, optimizer=optimizer)

    for _ in run.epochs():
        for images, labels in run.batches():
            with penultimate(student, args.features) as features:
                logits = student(images)
            cross_entropy, term = F.cross_entropy(logits, labels), 0
            if by_teacher or kd_weight:
                with torch.no_grad(), penultimate(network) as teacher_features:
                    teacher_logits = network(images)
            if beta:
                f, f2 = features[0], teacher_features[0] if by_teacher else None
                term = -beta * mec_term(f, f2, kind, args.experts, args.eps2, args.order)
            if kd_weight:
                term = kd_weight * kd_loss(logits, teacher_logits)
            if args.diagnose and (beta or kd_weight) and "force" not in run.notes:
                run.notes["force"] = common.gradient_ratio(term, cross_entropy, student)
            loss = cross_entropy + term  # CE - beta L / L_max
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss, ce=cross_entropy)
        if args.diagnose:
            run.notes["series"] = series_errors(args, features_of(student, data))
    return student.eval(), run.finish(), run.history


# ----------------------------------------------------------------- the paper's claims as numbers


@torch.no_grad()
def features_of(model: nn.Module, data: Data) -> Tensor:
    """Float features, m x d, of m <= 512 fixed training images; leaves model in eval mode."""
    with penultimate(model.eval()) as features:
        model(data.sample(512)[0])
    return features[0]


def series_errors(args: Namespace, features: Tensor) -> tuple[float, ...]:
    """Spectral norm of C, then the relative error of the series of each of ORDERS."""
    z = normalized_rows(features)
    c = (z.T @ z / (len(z) * args.eps2)).nan_to_num()  # nan would raise; Run checks the loss
    exact = logdet(c, True)
    errors = [(series_logdet(c, order) - exact) / exact for order in ORDERS]
    return torch.linalg.matrix_norm(c, 2).item(), *torch.stack(errors).tolist()


def spectrum(features: Tensor, eps2: float) -> tuple[float, float, float]:
    """(L / L_max, effective rank, energy share of the top direction) of the normalised features;
    the effective rank is exp of the entropy of the energies' shares (after Roy & Vetterli 2007)."""
    z = normalized_rows(features)
    energy = torch.linalg.svdvals(z).square()
    share = energy / energy.sum().clamp_min(common.TINY)
    rank = torch.special.entr(share).sum().exp()
    length = coding_length(z, eps2=eps2) / longest_code(*z.shape, eps2)
    return length.item(), rank.item(), share.max().item()


def diagnose(args: Namespace, data: Data, network: nn.Module, trained: dict) -> None:
    """Print what the abstract claims, for the networks of the last seed."""
    features = {"fp": features_of(network, data)} | {
        name: features_of(model, data) for name, (model, _, _) in trained.items()}
    print()
    print_row("features", "L / L_max", "effective rank", "energy in the top direction")
    for name, f in features.items():
        length, rank, top = spectrum(f, args.eps2)
        print_row(name, f"{length:.4f}", f"{rank:.2f}", f"{100 * top:.1f} %")
    print("\nfirst step of each epoch: |gradient of the term| / |gradient of the cross-entropy|")
    print_row("epoch", *trained)
    for row in zip(*(history for *_, history in trained.values())):
        print_row(row[0]["epoch"], *(f"{h.get('force', 0):.4f}" for h in row))
    last = "mec-quant" if "mec-quant" in trained else list(trained)[-1]
    print(f"\nby epoch, {last}: spectral norm of C; relative error of its series, orders {ORDERS}")
    for row in trained[last][2]:
        if "series" in row:  # a run resumed after training without --diagnose has none
            print_row(row["epoch"], *(f"{e:+.4f}" for e in row["series"]))
    magnitudes = features[last].norm(dim=1)
    gates = scale_gates(magnitudes, args.experts)
    print(f"\nscale gates on {last}: expert, mean gate, magnitudes where its gate is largest")
    for k in range(args.experts):
        own = magnitudes[gates.argmax(1) == k]
        span = f"{own.min():.3f} to {own.max():.3f}" if len(own) else "none"
        print_row(k, f"{100 * gates[:, k].mean():.1f} %", span)


def main() -> None:
    results, trained = [], {}
    for args, seed, data in common.per_seed(parse_args()):
        network, result = full_precision(args, data)
        results.append(result)
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            results.append(trained[method][1])
    print(common.result_table(results))
    if args.diagnose:
        diagnose(args, data, network, trained)


if __name__ == "__main__":
    common.entry(main)
