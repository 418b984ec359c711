"""FPQ: Feature-Perturbed Quantization. Pang & Cai, "Stabilizing Quantization-Aware Training by
Implicit-Regularization on Hessian Matrix", arXiv 2503.11159.

The idea. A flat loss tolerates the jumps of rounding. Zero-mean noise penalises the trace of the
Hessian of the loss without computing it (Eq. 7, for weights; the paper carries it over to
features), so FPQ
  1. adds uniform noise, one quantization step wide, to the inputs of randomly chosen layers (SFP),
  2. holds every layer's output, channel by channel, to the shape that the full-precision network's
     has (CSD), which keeps the noise from pulling features away,
and trains the LSQ-quantized network with the sum of cross-entropy and CSD (Eq. 22).

    paper                            here
    x_l, z_l                         input and output of layer l: N x C x H x W, or N x C; z_l is
                                     that of the convolution or linear layer, before batch norm
    s_l, z, q                        layer.input_quantizer .step, .zero_point, .bits     Eq. 3-5
    delta ~ U[-s_l/2, s_l/2], p      stochastic_feature_perturbation(x, step, p)     Eq. 9, 14
    z_l standardised                 standardize(z)                                  Eq. 15
    L_CSD                            csd_loss(student_feats, teacher_feats)          Eq. 16, 17
    L = L_CE + L_CSD                 train()                                         Eq. 22, Alg. 1

    python fpq.py --bits 2 --dataset shapes        full precision -> LSQ -> FPQ, 2-3 minutes
    python fpq.py --bits 2 --ablate --diagnose     the paper's ablation, its figures as numbers

Measured, CIFAR-10, resnet8, W2A2, 15 + 6 epochs, one seed: full precision 81.63 %, LSQ 78.26,
FPQ 78.30; commands and more in the README.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import common
import torch
import torch.nn.functional as F
from common import Data, Run, calibrate, full_precision, product_layers, quantize, sgd
from torch import Tensor, nn

PAPER = {"model": "resnet18", "dataset": "cifar10", "batch_size": 256, "lr": 0.01, "epochs": 200,
         "weight_decay": 5e-4, "p": 0.1,  # section 4; what is a choice of ours stays so
         "fp_epochs": 200}  # a choice: the paper only says that it starts from full precision


def parse_args() -> argparse.Namespace:
    parser = common.base_parser("FPQ: feature perturbation and channel-wise standardised "
                                "distillation for quantization-aware training (arXiv 2503.11159)")
    unit, weight = common.number(float, 0, 1), common.number(float, 0, 1e6)
    add = parser.add_argument
    add("--p", type=unit, default=0.1, help="Eq. 14: chance that a layer is perturbed in a step")
    add("--csd-weight", type=weight, default=1.0,
        help="of L_CSD in Eq. 22 [choice; the paper sums, unweighted]")
    add("--noise-at", choices=["operand", "input"], default="operand",
        help="Eq. 16: noise after the activation quantizer; or before it (dither)")
    add("--kd-weight", type=weight, default=1.0, help="of the distillation term of kd [choice]")
    add("--method", choices=METHODS, nargs="+", default=["lsq", "fpq"], help="what to train")
    add("--ablate", action="store_true", help="the paper's ablation: lsq, sfp, csd, fpq")
    add("--compare", choices=["kd"], help="train also a method of the paper's tables")
    add("--diagnose", action="store_true", help="figures 1, 2, 3 and 5 of the paper as numbers")
    args = common.parse(parser, PAPER)
    methods = (["lsq", "sfp", "csd", "fpq"] if args.ablate else []) + args.method
    args.method = list(dict.fromkeys(methods + ([args.compare] if args.compare else [])))
    return common.finish_args(args)


# ------------------------------------------------------------------------------------- the method

# Which of (--p, --csd-weight, --kd-weight) act in a method. LSQ is FPQ with none.
METHODS = {"lsq": (0, 0, 0), "sfp": (1, 0, 0), "csd": (0, 1, 0), "fpq": (1, 1, 0), "kd": (0, 0, 1)}


def stochastic_feature_perturbation(x: Tensor, step: Tensor, p: float,
                                    generator: torch.Generator | None = None) -> Tensor:
    """SFP, Eq. 9 and 14: with probability p, x + delta, delta ~ U[-s/2, s/2] per element; else x.

    x: any shape; step: a scalar. One coin per layer and step, so that seldom several layers are
    perturbed at once, which biases the expectation (Prop. 1). No gradient flows through delta
    [choice]. Without a generator the coin is drawn on the CPU, so that no device is waited for.
    """
    coin_device = generator.device if generator else "cpu"
    if torch.rand((), generator=generator, device=coin_device) >= p:
        return x
    delta = torch.empty_like(x).uniform_(-0.5, 0.5, generator=generator)
    return x + delta.mul_(step.detach())  # Eq. 9, 14


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Eq. 15: each channel of z (N x C x ...) to mean 0 and variance 1 over all else.

        z~ = (z - mean_c) / sqrt(var_c + eps)          eps inside the root, the biased variance

    The definition; training uses `channel_distance`, which needs no standardised copy.
    """
    return F.batch_norm(z, None, None, training=True, eps=eps)  # Eq. 15


def channel_mean(z: Tensor) -> Tensor:
    """Mean of each channel of z (N x C x ...), by a product with ones: in channels_last order three
    times as fast as .mean, which goes through memory against the grain there."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    return rows.new_ones(len(rows)) @ rows / len(rows)


class ChannelDistance(torch.autograd.Function):
    """`channel_distance`. Its gradient is a combination of student and teacher per channel, so two
    passes over memory do where autograd would take ten; teacher gets none."""

    @staticmethod
    def forward(ctx, student, teacher, eps):
        mean_s, mean_t = channel_mean(student), channel_mean(teacher)
        var_s = (channel_mean(student * student) - mean_s.square()).clamp_min(0)  # rounding
        var_t = (channel_mean(teacher * teacher) - mean_t.square()).clamp_min(0)
        cov = channel_mean(student * teacher) - mean_s * mean_t
        s, t = var_s + eps, var_t + eps
        per_student = (eps / s + cov / (s * t).sqrt()) / s
        per_teacher = -(s * t).rsqrt()
        constant = -per_student * mean_s - per_teacher * mean_t
        shape = [1, -1] + [1] * (student.dim() - 2)
        ctx.save_for_backward(student, teacher, *(
            c.reshape(shape) for c in (per_student, per_teacher, constant)))
        return (var_s / s + var_t / t - 2 * cov / (s * t).sqrt()).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        student, teacher, *factors = ctx.saved_tensors
        per_student, per_teacher, constant = (f * (2 * grad / student.numel()) for f in factors)
        out = torch.addcmul(constant, student, per_student).addcmul_(teacher, per_teacher)
        return out, None, None


def channel_distance(student: Tensor, teacher: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean of (standardize(student) - standardize(teacher))^2 over N x C x ..., without computing
    either: for standardised channels it is 2 (1 - r), r being Pearson's correlation of student and
    teacher in the channel, so five sums per channel tell all. With eps in the roots:

        var_s / (var_s + eps) + var_t / (var_t + eps) - 2 cov / sqrt((var_s + eps)(var_t + eps))
    """
    return ChannelDistance.apply(student, teacher, eps)


def csd_loss(student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
    """CSD, Eq. 16-17, of the outputs z_l of all layers, N x C x ... each, in the same order.

        L_CSD = mean_l mean_(n,c,...) (z~_student - z~_teacher)^2

    The published sum over elements and layers grows with batch, image and depth and drowns the
    cross-entropy; the means are ours [choice]. From 0 (equal but for shift and scale) to 4
    (mirrored).
    """
    distances = [channel_distance(s, t) for s, t in zip(student_feats, teacher_feats, strict=True)]
    return torch.stack(distances).mean()  # Eq. 17


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Logit distillation (Hinton et al. 2015), the tables' KD row: T^2 KL(teacher || student) of
    the softmax at temperature T, mean over the batch. T = 4 is a choice. logits: N x classes."""
    student, teacher = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def attach_sfp(student: nn.Module, p: float, noise_at: str) -> None:
    """Perturb every quantized layer in training. A layer's output is w_hat * x_s (Eq. 16), so the
    noise is on the quantized operand ("operand"); the other reading has it before the quantizer,
    where it makes rounding stochastic ("input")."""
    def after(quantizer, inputs, x_hat):
        return perturb(x_hat, quantizer.step) if quantizer.training else x_hat

    def before(quantizer, inputs):
        return perturb(inputs[0], quantizer.step) if quantizer.training else None

    perturb = partial(stochastic_feature_perturbation, p=p)
    for layer in product_layers(student).values():
        if noise_at == "operand":
            layer.input_quantizer.register_forward_hook(after)
        else:
            layer.input_quantizer.register_forward_pre_hook(before)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, a list that the outputs z_l of all layers are appended to, in order:
    N x C x ...; of tokens, N x T x C, the channels are moved to where convolutions have them."""
    def keep(layer, inputs, z):
        outputs.append(z.movedim(2, 1) if z.dim() == 3 else z)

    outputs = []
    hooks = [layer.register_forward_hook(keep)
             for layer in product_layers(model).values()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, data: Data, method: str, seed: int,
          network: nn.Module) -> tuple[nn.Module, dict, list[dict]]:
    """Algorithm 1: (quantized network, result, history). Student and teacher both start as the
    full-precision `network`; the teacher stays as it is, in eval mode."""
    strengths = args.p, args.csd_weight, args.kd_weight
    p, csd_weight, kd_weight = (on * strength for on, strength in zip(METHODS[method], strengths))
    student, teacher = quantize(network, args.wbits, args.abits, args.quantizer), network
    calibrate(student, data.sample(100)[0])  # Eq. 4-5
    optimizer = sgd(student, args.lr, args.weight_decay)
    run = Run(args, data, student, optimizer, method, seed, args.epochs, args.lr)
    if p:
        attach_sfp(student, p, args.noise_at)

    for _ in run.epochs():
        for images, labels in run.batches():
            with layer_outputs(student) as student_feats:
                logits = student(images)  # quantized (Eq. 3) and perturbed (Eq. 14)
            cross_entropy = loss = F.cross_entropy(logits, labels)
            if csd_weight or kd_weight:
                with torch.no_grad(), layer_outputs(teacher) as teacher_feats:
                    teacher_logits = teacher(images)
            if csd_weight:
                csd = csd_loss(student_feats, teacher_feats)  # Eq. 16-17
                loss = loss + csd_weight * csd  # Eq. 22
                run.log(csd=csd)
            if kd_weight:
                loss = loss + kd_weight * kd_loss(logits, teacher_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss, ce=cross_entropy)
        if args.diagnose:
            run.note(trace=common.weight_hessian_trace(student, data))
    return student.eval(), run.finish(), run.history


# ----------------------------------------------------------------- the paper's figures as numbers


@torch.no_grad()
def output_variance(model: nn.Module, images: Tensor, sigma: float, draws: int = 16) -> float:
    """Fig. 1: variance of the logits under N(0, sigma^2) noise on the normalised images, over
    `draws`, relative to their variance over the images without noise [choice: logits differ in
    scale from network to network]."""
    torch.manual_seed(0)
    noisy = torch.stack([model(images + sigma * torch.randn_like(images)) for _ in range(draws)])
    return (noisy.var(0).mean() / model(images).var(0).mean()).item()


def gradient_norm(model: nn.Module, data: Data, place: str, width: float) -> float:
    """Fig. 2: norm of the loss gradient in the weights, with uniform noise `width` steps wide on
    all quantized weights (place "weight") or features ("feature"); mean of 8 draws."""
    def noise(quantizer, inputs, x_hat):
        step = width * quantizer.grid(x_hat)[0]
        return x_hat + (torch.rand_like(x_hat) - 0.5) * step.detach()

    torch.manual_seed(0)
    images, labels = data.sample(256)
    layers = product_layers(model).values()
    quantizers = [q.weight_quantizer if place == "weight" else q.input_quantizer for q in layers]
    hooks = [q.register_forward_hook(noise) for q in quantizers]
    weights, norms = [layer.weight for layer in layers], []
    for _ in range(8):
        grads = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
        norms.append(torch.sqrt(sum(g.square().sum() for g in grads)))
    for hook in hooks:
        hook.remove()
    return torch.stack(norms).mean().item()


@torch.no_grad()
def feature_drift(model: nn.Module, network: nn.Module, images: Tensor) -> list[float]:
    """Fig. 3: per layer, the mean over channels of |mean_quantized - mean_fp| / std_fp."""
    with layer_outputs(model) as quantized, layer_outputs(network) as reference:
        model(images)
        network(images)
    drifts = []
    for z, z_fp in zip(quantized, reference):
        over = [0, *range(2, z.dim())]
        drift = (z.mean(over) - z_fp.mean(over)).abs() / (z_fp.std(over) + 1e-5)
        drifts.append(drift.mean().item())
    return drifts


def diagnose(data: Data, network: nn.Module, trained: dict[str, tuple]) -> None:
    """Print what the paper draws, for the networks of the last seed."""
    images, _ = data.sample(256)
    names = list(trained)
    print("\nFig. 1  variance of the logits under Gaussian input noise, relative")
    print(f"{'sigma':<9}" + "".join(f"{n:<12}" for n in ["fp", *names]))
    for sigma in (0.05, 0.1, 0.2, 0.4):
        models = [network, *(trained[n][0] for n in names)]
        row = (f"{output_variance(m, images, sigma):<12.4f}" for m in models)
        print(f"{sigma:<9}" + "".join(row))
    print("\nFig. 2  gradient norm under noise `width` steps wide on weights | on features")
    print(f"{'width':<9}" + "".join(f"{n:<22}" for n in names))
    for width in (0.0, 0.25, 0.5, 1.0):
        pairs = ([gradient_norm(trained[n][0], data, place, width)
                  for place in ("weight", "feature")] for n in names)
        print(f"{width:<9}" + "".join(f"{f'{w:.3f} | {x:.3f}':<22}" for w, x in pairs))
    print("\nFig. 3  drift of channel means from full precision, in its standard deviations")
    print(f"{'layer':<28}" + "".join(f"{n:<12}" for n in names))
    drifts = [feature_drift(trained[n][0], network, images) for n in names]
    for layer, *row in zip(product_layers(network), *drifts):
        print(f"{layer:<28}" + "".join(f"{d:<12.4f}" for d in row))
    print("\nFig. 5  Hessian trace ± standard error of the estimate, by epoch")
    print(f"{'epoch':<9}" + "".join(f"{n:<22}" for n in names))
    for row in zip(*(trained[n][2] for n in names)):
        cells = (f"{h['trace'][0]:.1f} ± {h['trace'][1]:.1f}" if "trace" in h else "not recorded"
                 for h in row)  # a run resumed after training without --diagnose has none
        print(f"{row[0]['epoch']:<9}" + "".join(f"{cell:<22}" for cell in cells))


def main() -> None:
    args = parse_args()
    data = common.load_data(args.dataset, args.data_dir, args.train_size, args.fp_seed, args.device,
                            args.dry_run)
    network, result = full_precision(args, data)
    results, trained = [result], {}
    for seed in args.seed:
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            results.append(trained[method][1])
    print(common.result_table(results, baseline="lsq"))
    if args.diagnose:
        diagnose(data, network, trained)


if __name__ == "__main__":
    common.entry(main)
