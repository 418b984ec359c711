"""FPQ: Feature-Perturbed Quantization. Pang & Cai, "Stabilizing Quantization-Aware Training by
Implicit-Regularization on Hessian Matrix", arXiv 2503.11159.

The idea. Rounding moves the weights and features of a network; if the loss is flat, it changes
little. Noise d of mean 0 adds about E[d^2] Tr(H) / 2 to the expected loss, H being its Hessian in
what d moves (Eq. 7): training under noise penalises the trace without computing H. So FPQ adds
uniform noise, one step size wide, to the quantized inputs of random layers: stochastic feature
perturbation (SFP). It also pulls the output of every layer but the classifier towards the
full-precision network's, after standardizing both per channel: channel-wise standardized
distillation (CSD). The loss is cross-entropy plus CSD (Eq. 22).

    paper                            here
    x_l, z_l                         input and output of layer l: N x C x H x W (or N x T x C)
    s_l, z, q                        layer.input_quantizer .step_size, .zero_point, .bits  Eq. 3-5
    delta ~ U[-s_l/2, s_l/2], p      stochastic_feature_perturbation(x, step_size, p)      Eq. 9, 14
    z_l = w_hat * (x_l + delta)      perturbed(student, p, noise_at)                       Eq. 16
    z_l standardized                 standardize(z)                                        Eq. 15
    L_CSD                            csd_loss(student_feats, teacher_feats)                Eq. 17
    L = L_CE + L_CSD                 train()                                       Eq. 22, Alg. 1

    python fpq.py --bits 2                         full precision, baseline (LSQ), FPQ
    python fpq.py --bits 2 --ablate --diagnose     all six methods, the paper's figures as numbers
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import common
import torch
import torch.nn.functional as F
from common import Data, Run, calibrate, full_precision, hooked, print_row, quantize, sgd
from torch import Tensor, nn

PAPER = {"model": "resnet18", "stem": "imagenet", "dataset": "cifar10", "batch_size": 256,
         "lr": 0.01, "epochs": 200, "weight_decay": 5e-4, "p": 0.1,
         # Above: section 4, but we infer the stem. Below, and --augment: our own [choice].
         "fp_epochs": 200, "fp_lr": 0.1, "fp_weight_decay": 5e-4, "pad": 4}

# Which of (--p, --csd-weight, --kd-weight, --sam-rho) each method uses; kd and sam are rivals.
METHODS = {"baseline": (0, 0, 0, 0), "sfp": (1, 0, 0, 0), "csd": (0, 1, 0, 0),
           "fpq": (1, 1, 0, 0), "kd": (0, 0, 1, 0), "sam": (0, 0, 0, 1)}


def parse_args() -> Namespace:
    parser = common.base_parser("FPQ: feature perturbation and channel-wise standardized "
                                "distillation for quantization-aware training (arXiv 2503.11159)")
    weight = common.number(float, 0, 1e6)
    common.add_flags(
        parser, "method",
        ("--method", list(METHODS), ["baseline", "fpq"], "methods to train, one after another"),
        ("--p", common.number(float, 0, 1), 0.1, "Eq. 14: chance per step to perturb a layer"),
        ("--csd-weight", weight, 1.0, "weight of L_CSD in the loss, Eq. 22 (methods csd, fpq)"),
        ("--noise-at", ["operand", "input", "weight"], "operand",
         "add noise after the input quantizer (operand, Eq. 16), before it, or to the weight"),
        ("--kd-weight", weight, 1.0, "weight of knowledge distillation from logits (kd)"),
        ("--kd-temperature", common.number(float, 0.01, 1e3), 4.0, "softmax temperature (kd)"),
        ("--sam-rho", common.number(float, 0, 1e3), 0.05, "radius, sharpness-aware minimisation"),
        ("--ablate", bool, False, f"train all methods: {' '.join(METHODS)}"),
        ("--diagnose", bool, False, "print figures 1 to 5 as numbers, and gradient norm ratios"))
    args = common.parse(parser, PAPER)
    args.method = list(METHODS if args.ablate else dict.fromkeys(args.method))
    return args


# ------------------------------------------------------------------------------------- the method


def stochastic_feature_perturbation(x: Tensor, step_size: Tensor, p: float,
                                    generator: torch.Generator | None = None) -> Tensor:
    """SFP, Eq. 9 and 14: with probability p, x + delta, delta ~ U[-s/2, s/2] per element; else x.

    x: any shape; step_size broadcasts against it. Each layer has its own coin; p is small as noise
    in several layers at once has a biased effect (Prop. 1): 0.1 is two of ResNet-18's 20 layers.
    No gradient flows through delta [choice]. generator: on x's device; None: the CPU tosses.
    """
    coin_device = generator.device if generator else "cpu"
    if torch.rand((), generator=generator, device=coin_device) >= p:  # Eq. 14: the coin
        return x
    delta = torch.empty_like(x).uniform_(-0.5, 0.5, generator=generator)
    return x + delta.mul_(step_size.detach())  # Eq. 9


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Eq. 15: each channel of z (N x C x ...) scaled to mean 0, variance 1 over batch and positions
    [choice; the paper can also be read as over each image alone].

        z~ = (z - mean_c) / sqrt(var_c + eps)          eps inside the root, the biased variance

    This is the definition; training uses `channel_distance`, which makes no standardized copy.
    """
    return F.batch_norm(z, None, None, training=True, eps=eps)  # Eq. 15


def channel_mean(z: Tensor) -> Tensor:
    """Mean of each channel of z (N x C x ...), by a product with ones: three times as fast as .mean
    in channels_last order."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    return rows.new_ones(len(rows)) @ rows / len(rows)


class ChannelDistance(torch.autograd.Function):
    """`channel_distance`. Its derivative is, but for a factor 2 / numel, per_student * student +
    per_teacher * teacher + constant: two passes over memory, where autograd takes ten."""

    @staticmethod
    def forward(ctx, student, teacher, eps):
        mean_s, mean_t = channel_mean(student), channel_mean(teacher)
        var_s = (channel_mean(student * student) - mean_s.square()).clamp_min(0)  # roundoff
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
    """Mean of (standardize(student) - standardize(teacher))^2 over N x C x ..., from five sums per
    channel. Standardized channels have mean 0, so a channel gives

        var_s / (var_s + eps) + var_t / (var_t + eps) - 2 cov / sqrt((var_s + eps)(var_t + eps))

    With eps = 0 this is 2 (1 - r), r being Pearson's correlation of student and teacher."""
    return ChannelDistance.apply(student, teacher, eps)


def csd_loss(student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
    """CSD, Eq. 17. Both lists hold the outputs z_l, N x C x ..., of the same layers in order.

        L_CSD = mean_l mean_(n,c,...) (z~_student - z~_teacher)^2

    The paper sums over elements and layers; the sum grows with batch, image and depth and drowns
    the cross-entropy. We take means [choice]. At eps = 0 correlations of 1 give 0, of -1 give 4.
    """
    distances = [channel_distance(s, t) for s, t in zip(student_feats, teacher_feats, strict=True)]
    return torch.stack(distances).mean()  # Eq. 17


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Distillation of logits (Hinton et al. 2015), the tables' KD row: T^2 KL(teacher || student)
    of the softmax, mean over the batch; temperature T and weight [choice]. logits: N x classes."""
    student, teacher = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """All layers but the classifier: in ResNets and MobileNets the convolutions, as in the paper.
    The classifier's outputs are logits: CSD on them would be logit distillation in disguise."""
    return list(common.weight_layers(model).values())[:-1]


def perturbed(student: nn.Module, p: float, noise_at: str):
    """A context in which SFP acts, with chance p each, on the inputs of `layers_of` and on both
    factors of attention's products [choice]. noise_at: "operand", after the quantizer, as in Eq.
    16; "input", before it, which makes rounding stochastic [choice]; "weight", only on the
    quantized weights of `layers_of`, as Fig. 2 compares."""
    def after(quantizer, inputs, x_hat):
        return stochastic_feature_perturbation(x_hat, quantizer.grid(x_hat)[0], p)  # Eq. 16

    def before(quantizer, inputs):
        return stochastic_feature_perturbation(inputs[0], quantizer.grid(inputs[0])[0], p)

    if p == 0:
        return nullcontext()
    layers = [m for m in layers_of(student) if isinstance(m, common.QuantLayer)]
    if noise_at == "weight":
        return hooked([layer.weight_quantizer for layer in layers], after=after)
    sites = [layer.input_quantizer for layer in layers]
    sites += [q for m in student.modules() if isinstance(m, common.Product) for q in m.children()]
    return hooked(sites, **({"after": after} if noise_at == "operand" else {"before": before}))


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context that yields a list; each layer of `layers_of` appends its output z_l, N x C x ...
    (tokens, N x T x C: N x C x T). An in-place ReLU right after a layer would spoil its z_l."""
    def keep(layer, inputs, z):
        outputs.append(z.movedim(2, 1) if z.dim() == 3 else z)

    outputs = []
    with hooked(layers_of(model), after=keep):
        yield outputs


# ----------------------------------------------------------------------------------- the training


def train(args: Namespace, data: Data, method: str, seed: int,
          network: nn.Module) -> tuple[nn.Module, dict, list[dict]]:
    """Algorithm 1. Returns (quantized network, result, history). The student starts as a quantized
    copy of the full-precision `network`, which is the teacher: in eval mode, never trained."""
    strengths = args.p, args.csd_weight, args.kd_weight, args.sam_rho
    p, csd_weight, kd_weight, rho = (on * x for on, x in zip(METHODS[method], strengths))
    student, teacher = quantize(network, args.wbits, args.abits, args.quantizer), network
    calibrate(student, data.sample(100)[0])  # Eq. 4-5
    optimizer, sam = sgd(student, args.lr, args.weight_decay), common.SAM(student, rho)
    run = Run(args, data, method, seed, args.epochs, model=student, optimizer=optimizer)

    for _ in run.epochs():
        with perturbed(student, p, args.noise_at):  # ends before the epoch's evaluation
            for images, labels in run.batches():
                with layer_outputs(student) as student_feats:
                    logits = student(images)  # quantized (Eq. 3) and perturbed (Eq. 14)
                cross_entropy, term = F.cross_entropy(logits, labels), 0
                if csd_weight or kd_weight:
                    with torch.no_grad(), layer_outputs(teacher) as teacher_feats:
                        teacher_logits = teacher(images)
                if csd_weight:
                    term += csd_weight * csd_loss(student_feats, teacher_feats)  # Eq. 17
                if kd_weight:
                    term += kd_weight * kd_loss(logits, teacher_logits, args.kd_temperature)
                if args.diagnose and (csd_weight or kd_weight) and "force" not in run.notes:
                    run.notes["force"] = common.gradient_ratio(term, cross_entropy, student)
                loss = cross_entropy + term  # Eq. 22
                optimizer.zero_grad()
                loss.backward()
                if args.diagnose:
                    grads = [layer.weight.grad for layer in layers_of(student)]
                    run.log(gradient=nn.utils.get_total_norm(grads))
                if rho:  # the rival of Table 1: cross-entropy's gradient at the ascended weights
                    with sam.ascended():
                        optimizer.zero_grad()
                        F.cross_entropy(student(images), labels).backward()
                optimizer.step()
                run.log(loss=loss, ce=cross_entropy)
        if args.diagnose:
            run.notes["trace"] = common.sharpness(student, data)
    figures = {"history": run.history} if args.diagnose else {}
    return student.eval(), run.finish(**figures), run.history


# ----------------------------------------------------------------- the paper's figures as numbers


@torch.no_grad()
def output_variance(model: nn.Module, images: Tensor, sigma: float, draws: int = 16) -> float:
    """Fig. 1: variance of the logits over `draws` of N(0, sigma^2) noise on the normalised images,
    divided by their variance over the noiseless images [choice: logits differ in scale from network
    to network]."""
    torch.manual_seed(0)
    noisy = torch.stack([model(images + sigma * torch.randn_like(images)) for _ in range(draws)])
    return (noisy.var(0).mean() / model(images).var(0).mean()).item()


@torch.no_grad()
def relu_output(model: nn.Module, images: Tensor) -> Tensor:
    """Fig. 3, 4: the input of the second layer, (values, channels), quantized if that layer is. In
    ResNets and MobileNets it is a ReLU's output (max-pooled in ResNet-18/50's imagenet stem)."""
    def keep(layer, inputs):
        x = getattr(layer, "input_quantizer", nn.Identity())(inputs[0])
        found.append((x if x.dim() == 3 else x.movedim(1, -1)).flatten(0, -2))

    found = []
    with hooked([layers_of(model)[1]], before=keep):
        model(images)
    return found[0]


def diagnose(data: Data, network: nn.Module, trained: dict[str, tuple]) -> None:
    """Print what the paper draws, for the networks of the last seed."""
    images, models = data.sample(256)[0], [network, *(model for model, *_ in trained.values())]
    print("\nFig. 1  variance of the logits under Gaussian input noise / variance over images")
    print_row("sigma", "fp", *trained)
    for sigma in (0.05, 0.1, 0.2, 0.4):
        print_row(sigma, *(f"{output_variance(model, images, sigma):.4f}" for model in models))
    values = [relu_output(model, images) for model in models]
    print("\nFig. 3  mean, minimum and maximum per channel of the input of the second layer (in\n"
          "        ResNets the output of a ReLU), quantized if the layer is")
    print_row("channel", "fp", *trained)
    for i, channels in zip(range(32), zip(*(v.T for v in values))):
        print_row(i, *(f"{c.mean():.2f} {c.min():.2f} {c.max():.2f}" for c in channels))
    print("\nFig. 4  histogram of the same values; each # stands for 6 % of them")
    print_row("from", "fp", *trained)
    low, high = (f(torch.stack([f(v) for v in values])).item() for f in (torch.min, torch.max))
    shares = [v.histc(12, low, high) / v.numel() for v in values]
    for i in range(12):
        print_row(f"{low + (high - low) * i / 12:.2f}",
                  *("#" * round(share[i].item() / 0.06) for share in shares))
    for title, cell in (
            ("Fig. 2  norm of the loss gradient with respect to the weights, mean over steps; the\n"
             "        paper compares sfp with and without --noise-at weight",
             lambda h: f"{h['gradient']:.3f}"),
            ("Fig. 5  Hessian trace ± its standard error; force of the added term: norm of its\n"
             "        gradient / norm of the cross-entropy's, at the first batch", lambda h:
             f"{h['trace'][0]:.0f} ± {h['trace'][1]:.0f}; {h.get('force', 0):.2f}")):
        print(f"\n{title}; by epoch")
        print_row("epoch", *trained)
        for row in zip(*(history for *_, history in trained.values())):
            print_row(row[0]["epoch"], *(cell(h) if "trace" in h else "not recorded"
                                         for h in row))  # trained without --diagnose


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
        diagnose(data, network, trained)


if __name__ == "__main__":
    common.entry(main)
