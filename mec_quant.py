"""MEC-Quant, maximum entropy coding. Pang, Cai, Zhang, "MEC-Quant: Maximum Entropy Coding for
Extremely Low Bit Quantization-Aware Training", arXiv 2509.15514.

The idea. With few bits a network represents its inputs in a biased way. MEC-Quant keeps the
features rich while the network learns the labels: it maximises their entropy, measured by the
length of a lossy code for them. The loss is the cross-entropy minus beta times this length, divided
by the longest possible. The abstract says that weights or activations have a long tail, which a
mixture of experts handles, fast.

We had only the abstract and summaries, which name the coding length and the experts. The length is
that of Ma et al. 2007, its Taylor series that of Liu et al. 2022 (MEC). The rest is ours, marked
[choice]: what the features are, and how the experts share the images. We code directions: features
minus their mean over the batch, scaled to norm 1. That removes a tail of their norms, if there is
one. So our experts have no tail to handle; they do something else. An expert has no weights: it is
a soft group of images whose features had a similar norm. Its term is the coding length of their
directions, so that training spreads the directions within each group. The method `mec` has no
experts, and `random` has random ones; the gradients of their terms are almost parallel. Whether the
authors' experts work like this, we do not know. The formula of the mixture is that of Yu et al.
2020 (maximal coding rate reduction), who make it small within given classes; we make it large.

    symbol                                                                             from
    Z: m x d              normalized_rows(features): m images, d features              [choice]
    eps_d^2               eps2, --eps2: squared error per feature; lambda = 1/(m eps2) Liu
    L(Z), L(Z1, Z2)       coding_length(z1, z2, eps2=...)                              Ma, Liu
    pi_jk                 scale_gates(magnitudes, K): m x K                            [choice]
    L_moe                 moe_coding_length(z, gates, eps2=...)                   Yu [choice]
    CE - beta L_moe/L_max mixture(student, images, labels, ...); longest_code: L_max   [choice]

    python mec_quant.py --bits 2               full precision, baseline (LSQ), MEC-Quant
    python mec_quant.py --wbits 4 --abits 1    activations of one bit
"""

import copy
import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import common  # before torch: it sets GOMP_SPINCOUNT
import torch
import torch.nn.functional as F
from common import Checkpoint, Data, Progress, calibrate, hooked, quantize
from torch import Tensor, nn

# What --recipe paper sets. MEC-Quant's own settings are not known, so these are FPQ's, a paper by
# the same authors; see fpq.py. GUESSES are ours [choice].
FPQ_SETTINGS = {
    "model": "resnet18",
    "dataset": "cifar10",
    "batch_size": 256,
    "lr": 0.01,
    "epochs": 200,
    "weight_decay": 5e-4,
}
GUESSES = {
    # A guess. The accuracy of FPQ's paper in full precision is what we expect of this stem on
    # CIFAR-10, and of --stem cifar on CIFAR-100.
    "stem": "imagenet",
    "fp_epochs": 200,
    "fp_lr": 0.1,
    "fp_weight_decay": 5e-4,
    "pad": 4,
}
SERIES_ORDER = 4  # that of Liu et al., which --diagnose compares with the exact value


def parse_args() -> Namespace:
    parser = common.base_parser("MEC-Quant: maximum entropy coding for extremely low bit "
                                "quantization-aware training (arXiv 2509.15514)",
                                list(METHODS), ["baseline", "mec-quant"])
    common.qat_flags(parser)
    number = common.number
    flag = parser.add_argument
    flag("--beta", type=number(float, 0, 1e6), default=0.1,
         help="weight of the relative coding length in the loss (default: 0.1)")
    flag("--eps2", type=number(float, 1e-6, 1e6), default=1 / 32,
         help="squared error that the code may make per feature (default: 1/32, as in MEC)")
    flag("--experts", type=number(int, 1, 64), default=3, help="K: number of experts (default: 3)")
    return common.parse(parser, list(METHODS), FPQ_SETTINGS | GUESSES)


# ------------------------------------------------------------------------------------- the method


def normalized_rows(features: Tensor) -> Tensor:
    """Z: features (m x d) minus their mean over the batch, each row scaled to norm 1.

    We centre [choice], because ReLU features have much of their energy in one direction. If all
    rows are equal, Z is 0.
    """
    z = features - features.mean(0)
    return z * (z.square().sum(1, keepdim=True) + 1e-6).rsqrt()


def series_logdet(c: Tensor, order: int) -> Tensor:
    """Taylor series of log det(I + C), by which Liu et al. avoid the determinant:

        sum_{k=1..order} (-1)^(k+1) / k tr(C^k)

    It converges if the spectral norm of C is below 1. Our methods take the exact value;
    `series_errors` measures how far the series is from it.
    """
    power = c
    total = torch.diagonal(c).sum()
    for k in range(2, order + 1):
        power = power @ c
        trace = torch.diagonal(power).sum()
        total = total + (-1) ** (k + 1) / k * trace
    return total


def exact_logdet(c: Tensor, symmetric: bool) -> Tensor:
    """log |det(I + C)| of one n x n matrix C or of a stack of them.

    If C = lambda Z^T Z, I + C is symmetric and positive definite, and Cholesky factors are enough.
    cholesky_ex does not check for errors, so nothing waits for the device. With a second branch,
    C = lambda Z^T Z2, the determinant may be negative; we take its absolute value [choice].
    """
    identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    if symmetric:
        factor = torch.linalg.cholesky_ex(identity + c).L
        diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
        return 2 * diagonal.log().sum(-1)
    return torch.linalg.slogdet(identity + c).logabsdet


def coding_length(
    z1: Tensor, z2: Tensor | None = None, *, eps2: float, order: int | None = None
) -> Tensor:
    """L(Z1, Z2): length in nats of a code for m rows of norm 1, with d features each.

        L = mu log det(I + lambda Z1^T Z2),   mu = (m + d) / 2,   lambda = 1 / (m eps_d^2)

    The code may make the squared error eps_d^2 = eps2 per feature. Half of log det is the length
    for one row: the logarithm of how many balls of squared radius d eps_d^2 fill the volume that
    the features take. The code holds the m rows, and also the d principal directions, which a
    decoder needs. A direction costs as much as a row: hence m + d (Ma).

    The squared error of a row is then d eps_d^2, by default d / 32. For d > 32 it exceeds the
    squared norm of the row, 1. So read L as a smooth measure of spread, not as the length of a
    useful code.

    As det(I + AB) = det(I + BA), we take the smaller one of a d x d and an m x m matrix.

    z2 and `order` complete the form of Liu et al.: a second branch, and a series up to an even
    order in place of the exact value. No call here passes them: `branch` calls `moe_coding_length`,
    and `series_errors` calls `series_logdet`. An odd order raises ValueError: such a series is
    convex in a large eigenvalue (order 3: above 1/2), so maximising it would put all energy in one
    direction. A series that diverges raises it, too.
    """
    m, d = z1.shape
    z2 = z1 if z2 is None else z2
    mu = (m + d) / 2
    c = (z1.T @ z2 if d < m else z1 @ z2.T) / (m * eps2)
    if order is None:
        return mu * exact_logdet(c, symmetric=(z2 is z1))
    if order < 2 or order % 2:
        raise ValueError(f"order should be even and positive, not {order}")
    if torch.linalg.matrix_norm(c, 2) >= 1:
        raise ValueError("the series diverges: give a larger eps2, or no order")
    return mu * series_logdet(c, order)


def moe_coding_length(z: Tensor, gates: Tensor, *, eps2: float, z2: Tensor | None = None) -> Tensor:
    """L_moe: a mixture of K experts, each of which codes its share of the rows.

        L_moe = (m + d) / 2 sum_k n_k / m log det(I + 1 / (n_k eps_d^2) Z^T diag(pi_k) Z2)
        n_k = sum_j pi_jk

    gates: pi, m x K, rows sum to 1. The K matrices are d x d or m x m. With one expert it is L(Z).
    With more, and one branch, it is a lower bound of L(Z), because log det is concave.

    We weight expert k by n_k / m, as Yu et al. do [choice]. With separate codes, of factors (n_k +
    d) / 2, L_moe could exceed L(Z). We also leave out the bits that name an image's expert
    [choice].
    """
    m, d = z.shape
    n = gates.sum(0).clamp_min(common.TINY)
    # The root of the gates, K x m x 1, on both sides gives Z^T diag(pi_k) Z2
    root = gates.T.sqrt()[:, :, None]
    left = root * z  # K x m x d
    right = left if z2 is None else root * z2
    c = left.mT @ right if d < m else left @ right.mT
    c = c / (n * eps2)[:, None, None]
    logdets = exact_logdet(c, symmetric=z2 is None)
    return (m + d) / 2 * (n / m * logdets).sum()


def scale_gates(magnitudes: Tensor, experts: int) -> Tensor:
    """pi, m x K: how much of each image belongs to each expert, by its magnitude [choice].

    magnitudes: m, the norms of the images' features before `normalized_rows`. We group by scale,
    because a long tail, as of the abstract's weights or activations, mixes scales. Expert k has a
    Gaussian over log-magnitudes. Its mean is their (k + 1/2) / K quantile in the batch. Its width
    is their standard deviation in the batch, divided by K. pi_jk is Gaussian k at image j, divided
    by the sum of all K. No gradient flows.
    """
    log_magnitudes = magnitudes.detach().clamp_min(common.TINY).log()
    numbers = torch.arange(experts, device=magnitudes.device, dtype=magnitudes.dtype)
    means = log_magnitudes.quantile((numbers + 0.5) / experts)
    width = log_magnitudes.std(correction=0) / experts + 1e-6
    distance = (log_magnitudes[:, None] - means) / width
    return (-0.5 * distance.square()).softmax(1)


def random_gates(magnitudes: Tensor, experts: int) -> Tensor:
    """The control of `scale_gates`: gates for random magnitudes, drawn anew in each step."""
    return scale_gates(torch.randn_like(magnitudes).exp(), experts)


def longest_code(m: int, d: int, eps2: float) -> float:
    """L_max, the largest L(Z) of m unit rows, so that L / L_max <= 1.

    The eigenvalues of Z^T Z sum to m, and at most r = min(m, d) are not 0. As log is concave, the
    length is largest if r of them are equal, each m / r.
    """
    r = min(m, d)
    return (m + d) / 2 * r * math.log(1 + 1 / (r * eps2))


@contextmanager
def penultimate(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context that yields a list, to which each pass adds the last layer's input, N x d.

    It is what the layer gets, before its own input quantizer [choice].
    """
    found = []

    def keep(layer, inputs):
        found.append(inputs[0])

    classifier = list(common.weight_layers(model).values())[-1]
    with hooked([classifier], before=keep):
        yield found


# Each method is a function that returns the loss of a batch: images N x 3 x 32 x 32, labels N.
# All methods start from the same network. Only `branch` uses the teacher.


def baseline(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, args: Namespace
) -> Tensor:
    """QAT with the quantizer and nothing else."""
    return F.cross_entropy(student(images), labels)


def mec(student, teacher, images, labels, args):
    """One code for all rows, without experts: loss = CE - beta L(Z) / L_max."""
    with penultimate(student) as features:
        logits = student(images)
    z = normalized_rows(features[0])
    length = coding_length(z, eps2=args.eps2)
    share = length / longest_code(*z.shape, args.eps2)
    return F.cross_entropy(logits, labels) - args.beta * share


def mixture(student, images, labels, args, gates_of, other=None):
    """loss = CE - beta L_moe / L_max. gates_of gives the gates; other is Z2 of a second branch."""
    with penultimate(student) as features:
        logits = student(images)
    z = normalized_rows(features[0])
    gates = gates_of(features[0].norm(dim=1), args.experts)
    length = moe_coding_length(z, gates, eps2=args.eps2, z2=other)
    share = length / longest_code(*z.shape, args.eps2)
    return F.cross_entropy(logits, labels) - args.beta * share


def mec_quant(student, teacher, images, labels, args):
    """MEC-Quant with one branch: the student's features alone.

    The default of --beta was the best above 0 on held-out images. With 2 bits and resnet8 the
    gradient of the term is then 1 to 3 % of that of the cross-entropy; --diagnose prints it.
    """
    return mixture(student, images, labels, args, scale_gates)


def branch(student, teacher, images, labels, args):
    """A variant with two branches: the student's features and those of full precision, Z2.

    In Liu et al. the second branch has another view of the images.
    """
    with torch.no_grad(), penultimate(teacher) as features:
        teacher(images)
    other = normalized_rows(features[0])
    return mixture(student, images, labels, args, scale_gates, other)


def random_experts(student, teacher, images, labels, args):
    """A control: experts that share the rows at random."""
    return mixture(student, images, labels, args, random_gates)


METHODS = {
    "baseline": baseline,
    "mec": mec,
    "mec-quant": mec_quant,
    "branch": branch,
    "random": random_experts,
}


# ----------------------------------------------------------------------------------- the training


def train(
    args: Namespace, data: Data, method: str, seed: int, network: nn.Module
) -> tuple[nn.Module, dict]:
    """Returns (the quantized network, its row of results).

    The full-precision `network` is the teacher and stays as it is. The student is a quantized copy.
    """
    teacher = network.eval()
    student = quantize(network, args.wbits, args.abits, args.quantizer)
    calibrate(student, data.sample(100)[0])
    optimizer = common.sgd(student, args.lr, args.weight_decay)
    checkpoint = Checkpoint(
        args, data, method, seed, args.epochs, network, model=student, optimizer=optimizer
    )
    steps = data.steps(args.batch_size)
    done = checkpoint.load()  # how many epochs its file has done; 0 to start anew

    for epoch in range(done, args.epochs):
        student.train()
        draws = common.epoch_draws("training", seed, epoch)
        progress = Progress(f"{method:<9} seed {seed}  epoch {epoch + 1}/{args.epochs}", steps)
        batches = data.batches(args.batch_size, draws, args.augment)
        for i, (images, labels) in enumerate(batches):
            # Learning rate: a cosine from --lr down to 0
            rate = args.lr * common.cosine(epoch * steps + i, args.epochs * steps)
            common.set_rate(optimizer, rate)
            # Forward: the method returns its loss
            loss = METHODS[method](student, teacher, images, labels, args)
            # Backward
            optimizer.zero_grad()
            loss.backward()
            # Step: weights, batch norm's parameters, learned step sizes
            optimizer.step()
            progress.add(loss=loss)
        # With --diagnose, measurements
        notes = measure_epoch(args, data, method, student, teacher) if args.diagnose else {}
        # Evaluation on some test images, checkpoint, a printed row
        common.end_epoch(checkpoint, progress, **notes)
    # New statistics for batch norm, evaluation on all test images, a line of results.jsonl
    row = common.finish(checkpoint)
    return student.eval(), row


# ---------------------------------------------------------------------- the claims as numbers


@torch.no_grad()
def features_of(model: nn.Module, data: Data) -> Tensor:
    """Features, m x d, of m <= 512 fixed training images."""
    model = copy.deepcopy(model).eval()
    with penultimate(model) as features:
        model(data.sample(512)[0])
    return features[0]


def measure_epoch(
    args: Namespace, data: Data, method: str, student: nn.Module, teacher: nn.Module
) -> dict:
    """ratio: |gradient of the added term| / |gradient of the cross-entropy|, of 256 images.

    series: the spectral norm of C = lambda Z^T Z, and the relative error of its series of order
    SERIES_ORDER.
    """
    series = series_errors(features_of(student, data), args.eps2)
    student = copy.deepcopy(student)  # in training mode a pass changes its running statistics
    images, labels = data.sample(256)
    loss = METHODS[method](student, teacher, images, labels, args)
    cross_entropy = baseline(student, teacher, images, labels, args)
    ratio = common.gradient_ratio(loss, cross_entropy, student)
    return {"ratio": ratio, "series": series}


def series_errors(features: Tensor, eps2: float) -> list[float]:
    z = normalized_rows(features)
    c = z.T @ z / (len(z) * eps2)
    c = c.nan_to_num()  # a nan must not raise here: `end_epoch` reports it
    exact = exact_logdet(c, symmetric=True)
    error = (series_logdet(c, SERIES_ORDER) - exact) / exact
    return [torch.linalg.matrix_norm(c, 2).item(), error.item()]


def spectrum(features: Tensor, eps2: float) -> tuple[float, float, float]:
    """(L / L_max, effective rank, energy share of the top direction) of the normalised features.

    The effective rank is exp of the entropy of the energies' shares (after Roy & Vetterli 2007).
    """
    z = normalized_rows(features)
    energy = torch.linalg.svdvals(z).square()
    share = energy / energy.sum().clamp_min(common.TINY)
    rank = torch.special.entr(share).sum().exp()
    length = coding_length(z, eps2=eps2) / longest_code(*z.shape, eps2)
    return length.item(), rank.item(), share.max().item()


def diagnose(args: Namespace, data: Data, network: nn.Module, trained: dict) -> None:
    """Measure what the abstract claims, on the networks of the last seed.

    It claims that features become richer: we print their coding length and effective rank. It also
    claims that experts handle a long tail: we print the norms of the images of each expert.
    """
    histories = [row["history"] for _, row in trained.values()]
    features = {"fp": features_of(network, data)}
    for name, (model, _) in trained.items():
        features[name] = features_of(model, data)
    print("\nfeatures: relative coding length, effective rank, energy in the top direction")
    common.print_row("", "L / L_max", "rank", "top")
    for name, raw in features.items():
        length, rank, top = spectrum(raw, args.eps2)
        common.print_row(name, f"{length:.4f}", f"{rank:.2f}", f"{100 * top:.1f} %")
    print("\n|gradient of the term| / |gradient of the cross-entropy|, after each epoch")
    common.print_by_epoch(trained, histories, "ratio", lambda ratio: f"{ratio:.4f}")
    print(f"\nspectral norm of C, and the relative error of its series of order {SERIES_ORDER}")
    common.print_by_epoch(trained, histories, "series", lambda s: f"{s[0]:.2f} {s[1]:+.3g}")
    name = "mec-quant" if "mec-quant" in trained else list(trained)[-1]
    magnitudes = features[name].norm(dim=1)
    gates = scale_gates(magnitudes, args.experts)
    print(f"\nscale gates on {name}: mean gate; magnitudes of images that are mostly this expert's")
    common.print_row("expert", "gate", "from", "to")
    for k in range(args.experts):
        own = magnitudes[gates.argmax(1) == k]
        span = [f"{own.min():.3f}", f"{own.max():.3f}"] if len(own) else []
        common.print_row(k, f"{100 * gates[:, k].mean():.1f} %", *span)


def main() -> None:
    args = parse_args()
    # For the time left, which `end_epoch` prints
    args.epochs_left = len(args.seed) * (args.fp_epochs + len(args.method) * args.epochs)
    source = common.read_images(args)
    rows = []
    for seed in args.seed:
        data = common.make_data(args, source, seed)
        network, row = common.full_precision(args, data, seed)
        rows.append(row)
        trained = {}
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            rows.append(trained[method][1])
    common.print_table(rows)
    if args.diagnose:
        diagnose(args, data, network, trained)


if __name__ == "__main__":
    common.entry(main)
