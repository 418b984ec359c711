"""FPQ, feature-perturbed quantization. Pang & Cai, "Stabilizing Quantization-Aware Training by
Implicit-Regularization on Hessian Matrix", arXiv 2503.11159.

The idea. Rounding moves the weights and features of a network; where the loss is flat, that does
little harm. Noise d of mean 0 raises the expected loss by about E[d^2] Tr(H) / 2, where H is the
loss's Hessian with respect to what d moves (Eq. 7). So training under noise makes the loss flat
without computing H. FPQ adds uniform noise to the quantized inputs of random layers. The noise is
as wide as the quantizer's step size s, the distance of two neighbouring quantized values, so
E[d^2] = s^2 / 12. FPQ also pulls the output of each layer but the classifier towards that of the
full-precision network, the teacher, after standardizing both.

The equations are the paper's. What it leaves open is ours and marked [choice]. In the paper, z
without an index is the zero point, the integer that stands for 0; `fake_quantize` in common.py is
Eq. 3. z_l is the output of layer l, and x_l its quantized input. FPQ perturbs x_l and distils z_l;
we call both features.

    paper                            here
    s_l, z, q (bits)                 input_quantizer.step_size, .zero_point, .bits     Eq. 3-5
    delta ~ U[-s_l/2, s_l/2], p      stochastic_feature_perturbation(x, step_size, p)  Eq. 9, 14
    z_l = w_hat * (x_l + delta)      perturbed(student, p) adds delta to x_l; the      Eq. 16
                                     product is in common.QuantLayer.forward
    z_l standardized                 standardize(features)                             Eq. 15
    L_CSD                            csd_loss(student_feats, teacher_feats)            Eq. 17
    L = L_CE + L_CSD                 fpq(student, ...); our L_CSD has a weight         Eq. 22
    Algorithm 1                      train(...)

    python fpq.py --bits 2                         full precision; LSQ (learned step sizes); FPQ
    python fpq.py --bits 2 --ablate --diagnose     all methods, the paper's figures as numbers
"""

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import common  # before torch: it sets GOMP_SPINCOUNT
import torch
import torch.nn.functional as F
from common import Checkpoint, Data, Progress, calibrate, feature_layers, hooked, quantize
from torch import Tensor, nn

# What --recipe paper sets: section 4 of the paper, and our guesses [choice] where it is silent. The
# stem is the first layers of ResNet-18. We guess it from the paper's accuracy in full precision:
# torchvision's own, "imagenet", on CIFAR-10. On CIFAR-100 it points to "cifar": add --stem cifar.
# The weight of CSD keeps its default.
PAPER = {
    "model": "resnet18",
    "dataset": "cifar10",
    "batch_size": 256,
    "lr": 0.01,
    "epochs": 200,
    "weight_decay": 5e-4,
    "p": 0.1,
}
GUESSES = {"stem": "imagenet", "fp_epochs": 200, "fp_lr": 0.1, "fp_weight_decay": 5e-4, "pad": 4}


def parse_args() -> Namespace:
    parser = common.base_parser("FPQ: feature perturbation and standardized distillation for "
                                "quantization-aware training (arXiv 2503.11159)",
                                list(METHODS), ["baseline", "fpq"])
    common.qat_flags(parser)
    flag = parser.add_argument
    weight = common.number(float, 0, 1e6)
    flag("--p", type=common.number(float, 0, 1), default=0.1,
         help="Eq. 14: chance that a layer is perturbed in a step (default: 0.1)")
    flag("--csd-weight", type=weight, default=0.01,
         help="weight of the distillation L_CSD in the loss, Eq. 22 (default: 0.01)")
    flag("--noise-at", choices=["operand", "input", "weight"], default="operand",
         help="operand (default): noise on the quantized input; input: on the input before it is "
              "quantized; weight: on the quantized weight")
    flag("--kd-weight", type=weight, default=1.0,
         help="weight of logit distillation, kd (default: 1)")
    flag("--kd-temperature", type=common.number(float, 0.01, 1e3), default=4.0,
         help="its softmax temperature (default: 4)")
    flag("--sam-rho", type=common.number(float, 0, 1e3), default=0.05,
         help="radius of sharpness-aware minimisation, sam (default: 0.05)")
    return common.parse(parser, list(METHODS), PAPER | GUESSES)


# ------------------------------------------------------------------------------------- the method


def stochastic_feature_perturbation(x: Tensor, step_size: Tensor, p: float) -> Tensor:
    """SFP, Eq. 9 and 14: perturb x with probability p, and else return it as it is.

        x + delta,   delta ~ U[-s/2, s/2] for each element

    x has any shape; step_size s broadcasts against it. Prop. 1 of the paper warns of noise in many
    layers at once. So each layer tosses its own coin, and few have noise in the same step. No
    gradient flows through delta [choice].
    """
    if torch.rand(()) >= p:  # Eq. 14; on the CPU, so that no device is waited for
        return x
    delta = torch.empty_like(x).uniform_(-0.5, 0.5) * step_size.detach()
    return x + delta  # Eq. 9


def standardize(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Eq. 15: scale each channel of features, N x C x ..., to mean 0 and variance 1.

        z~_l = (z_l - mean) / sqrt(variance + eps)

    Mean and variance are over the batch and all positions [choice]. The text can also be read as
    over the positions of each image.
    """
    channels_last = features.movedim(1, -1)
    z = channels_last.reshape(-1, features.shape[1])  # values x channels
    z = z - z.mean(0)
    variance = z.square().mean(0)
    z = z * (variance + eps).rsqrt()  # Eq. 15
    return z.reshape(channels_last.shape).movedim(-1, 1)


def csd_loss(student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
    """CSD, channel-wise standardized distillation, Eq. 17.

        L_CSD = mean over layers of the mean over elements of (z~_student - z~_teacher)^2

    Both lists hold the outputs, N x C x ..., of the same layers. We take means where the paper has
    sums [choice], because a sum grows with batch, image and depth. We expect that it would drown
    the cross-entropy. Our layers count equally; in the paper's sum a layer counts by its number of
    elements, so no weight of ours gives quite the same loss. In one channel, the mean squared
    distance is 2 (1 - r), where r is the correlation of student and teacher. So CSD raises the
    correlation.
    """
    distances = []
    for student, teacher in zip(student_feats, teacher_feats, strict=True):
        # movedim is for speed: `standardize` leaves the channels last in memory, and mse_loss is
        # faster in that order
        student = standardize(student).movedim(1, -1)
        teacher = standardize(teacher).movedim(1, -1)
        distances.append(F.mse_loss(student, teacher))
    return torch.stack(distances).mean()  # Eq. 17


def perturbed(student: nn.Module, p: float, noise_at: str = "operand"):
    """A context in which every pass through `student` has SFP at all layers but the classifier.

    It is done by hooks on the layers' quantizers. noise_at "operand" puts the noise on the
    quantized input, as in Eq. 16. "input" puts it on the input before it is quantized, so that
    rounding becomes stochastic. "weight" puts it on the quantized weights instead; Fig. 2 compares
    this with noise on inputs. Both factors of attention's products, q k^T and softmax times v,
    count as inputs [choice].
    """
    kind = "weight_quantizer" if noise_at == "weight" else "input_quantizer"
    sites = [getattr(layer, kind, None) for layer in feature_layers(student)]
    if noise_at != "weight":
        for module in student.modules():
            if isinstance(module, common.Product):
                sites += [module.a_quantizer, module.b_quantizer]
    # What was left in full precision has no quantizer, and gets no noise.
    sites = [site for site in sites if isinstance(site, common.Quantizer)]

    def after(quantizer, inputs, x_hat):  # x_hat is the quantized input, as in Eq. 16, or weight
        step_size, _ = quantizer.grid(x_hat)  # shaped to broadcast against x_hat
        return stochastic_feature_perturbation(x_hat, step_size, p)

    def before(quantizer, inputs):
        step_size, _ = quantizer.grid(inputs[0])
        return stochastic_feature_perturbation(inputs[0], step_size, p)

    if noise_at == "input":
        return hooked(sites, before=before)
    return hooked(sites, after=after)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context with a list of the output, N x C x ..., of each layer but the classifier.

    In ResNets and MobileNets these are the convolutions, as in the paper. CSD of the classifier
    would be a distillation of logits. Raises RuntimeError if an output is changed in place, as by
    an nn.ReLU(inplace=True) right after the layer.
    """
    outputs = []
    versions = []  # torch counts how often a tensor, or a view of it, was changed in place

    def keep(layer, inputs, output):
        channel = 1 if layer.weight.dim() == 4 else -1  # of a convolution, of a linear layer
        features = output.movedim(channel, 1)  # a view
        outputs.append(features)
        versions.append(features._version)

    with hooked(feature_layers(model), after=keep):
        yield outputs
    if [output._version for output in outputs] != versions:
        raise RuntimeError(
            "the output of a layer was changed in place, by nn.ReLU(inplace=True) perhaps; "
            "distillation needs it as it was"
        )


# Each method is a function that returns the loss of a batch: images N x 3 x 32 x 32, labels N.
# All methods start from the same network.


def baseline(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, args: Namespace
) -> Tensor:
    """QAT with the quantizer, by default LSQ, and nothing else."""
    return F.cross_entropy(student(images), labels)


def sfp(student, teacher, images, labels, args):
    """FPQ without distillation: feature perturbation only."""
    with perturbed(student, args.p, args.noise_at):  # Eq. 14, 16
        return F.cross_entropy(student(images), labels)


def csd(student, teacher, images, labels, args):
    """FPQ without noise. The teacher is in eval mode and never trained."""
    with layer_outputs(student) as student_feats:
        logits = student(images)
    with torch.no_grad(), layer_outputs(teacher) as teacher_feats:
        teacher(images)
    distance = csd_loss(student_feats, teacher_feats)  # Eq. 17
    return F.cross_entropy(logits, labels) + args.csd_weight * distance  # Eq. 22


def fpq(student, teacher, images, labels, args):
    """FPQ, Eq. 22: the loss of `csd`, with the student perturbed.

    The paper's sum has no weight. Our mean is much smaller, so it has one, --csd-weight [choice].
    With 5,000 training images 100 was the best on held-out images, by the mean of runs with and
    without augmentation. There the gradient of the term is about eight times that of the
    cross-entropy. With all training images smaller weights were better down to the default, which
    hardly acts: `fpq` is then little more than `sfp`.
    """
    with perturbed(student, args.p, args.noise_at):  # Eq. 14, 16
        return csd(student, teacher, images, labels, args)  # the teacher has no hooks, so no noise


def kd(student, teacher, images, labels, args):
    """A rival, the row KD of the paper's tables: distillation of logits (Hinton et al. 2015).

        L = L_CE + weight T^2 KL(teacher || student)

    The divergence KL is that of the predictions softmax(logits / T). The paper does not give the
    weight, T or the form [choice].
    """
    logits = student(images)
    with torch.no_grad():
        target = teacher(images)
    divergence = F.kl_div(
        (logits / args.kd_temperature).log_softmax(1),
        (target / args.kd_temperature).log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    return F.cross_entropy(logits, labels) + args.kd_weight * args.kd_temperature**2 * divergence


def sam(student, teacher, images, labels, args):
    """A rival, of Table 1: sharpness-aware minimisation, at twice the cost."""
    return common.sam_loss(student, images, labels, args.sam_rho)


METHODS = {"baseline": baseline, "sfp": sfp, "csd": csd, "fpq": fpq, "kd": kd, "sam": sam}


# ----------------------------------------------------------------------------------- the training


def train(
    args: Namespace, data: Data, method: str, seed: int, network: nn.Module
) -> tuple[nn.Module, dict]:
    """Algorithm 1. Returns (the quantized network, its row of results).

    The full-precision `network` is the teacher and stays as it is. The student is a quantized copy.
    """
    teacher = network.eval()
    student = quantize(network, args.wbits, args.abits, args.quantizer)  # first, last layer: 8 bits
    calibrate(student, data.sample(100)[0])  # Eq. 4-5
    optimizer = common.sgd(student, args.lr, args.weight_decay)
    checkpoint = Checkpoint(
        args, data, method, seed, args.epochs, network, model=student, optimizer=optimizer
    )
    steps = data.steps(args.batch_size)
    done = checkpoint.load()  # how many epochs its file has done; 0 to start anew

    for epoch in range(done, args.epochs):
        student.train()
        # This seeds torch's own generator, for the noise, and returns one for the batches
        draws = common.epoch_draws("training", seed, epoch)
        progress = Progress(f"{method:<9} seed {seed}  epoch {epoch + 1}/{args.epochs}", steps)
        batches = data.batches(args.batch_size, draws, args.augment)
        for i, (images, labels) in enumerate(batches):
            # Learning rate: a cosine from --lr down to 0
            rate = args.lr * common.cosine(epoch * steps + i, args.epochs * steps)
            common.set_rate(optimizer, rate)
            # Forward, through the fake quantization of Eq. 3; the method returns its loss
            loss = METHODS[method](student, teacher, images, labels, args)
            # Backward
            optimizer.zero_grad()
            loss.backward()
            # Step: weights, batch norm's parameters, learned step sizes
            optimizer.step()
            progress.add(loss=loss)
        # With --diagnose, what Fig. 2 and Fig. 5 show, after this epoch
        notes = measure_epoch(args, data, method, student, teacher) if args.diagnose else {}
        # Evaluation on some test images, checkpoint, a printed row
        common.end_epoch(checkpoint, progress, **notes)
    # Renew batch norm's statistics, evaluate on all test images, append a line to results.jsonl
    row = common.finish(checkpoint)
    return student.eval(), row


# ----------------------------------------------------------------- the paper's figures as numbers


def measure_epoch(
    args: Namespace, data: Data, method: str, student: nn.Module, teacher: nn.Module
) -> dict:
    """Numbers measured on 256 training images, with respect to the weights of all layers.

    gradient: the norm of the gradient of the method's loss, Fig. 2, under one draw of coins and
        noise, the same after each epoch
    trace: the trace of the cross-entropy's Hessian, without noise, Fig. 5, with its standard error
    ratio: |gradient of the term that the method adds| / |gradient of the cross-entropy|; 0 for
        methods that add no term

    The noise flattens the loss with respect to the layers' inputs. The paper's figures show
    flatness with respect to weights, but the paper does not prove that one implies the other.
    """
    student = copy.deepcopy(student)
    images, labels = data.sample(256)
    weights = [layer.weight for layer in common.weight_layers(student).values()]
    torch.manual_seed(0)  # training is not changed: `epoch_draws` seeds each epoch anew
    loss = METHODS[method](student, teacher, images, labels, args)
    torch.manual_seed(0)  # once more, under the same noise, without the added term
    plain = Namespace(**{**vars(args), "csd_weight": 0.0, "kd_weight": 0.0})
    without_term = METHODS[method](student, teacher, images, labels, plain)
    return {
        "gradient": common.gradient_of(loss, weights, retain_graph=True).norm().item(),
        "ratio": common.gradient_ratio(loss, without_term, student),
        "trace": common.sharpness(student, data),
    }


@torch.no_grad()
def output_variance(model: nn.Module, images: Tensor, sigma: float, times: int = 16) -> float:
    """Fig. 1: how much the logits vary if noise N(0, sigma^2) is added to the normalised images.

    This is their variance between `times` draws of the noise, divided by their variance between
    images without noise, because networks differ in the scale of their logits [choice].
    """
    torch.manual_seed(0)
    noisy = torch.stack([model(images + sigma * torch.randn_like(images)) for _ in range(times)])
    return (noisy.var(0).mean() / model(images).var(0).mean()).item()


@torch.no_grad()
def second_layer_input(model: nn.Module, images: Tensor) -> Tensor:
    """Fig. 3, 4: the second layer's input, values x channels, after its quantizer if it has one.

    In ResNets and MobileNets it is the output of a ReLU, max-pooled with the "imagenet" stem.
    """
    found = []

    def keep(layer, inputs):
        x = inputs[0]
        if isinstance(layer, common.QuantLayer):
            x = layer.input_quantizer(x)
        channels_last = x.movedim(1, -1) if layer.weight.dim() == 4 else x
        found.append(channels_last.flatten(0, -2))

    with hooked(feature_layers(model)[1:2], before=keep):
        model(images)
    return found[0]


def diagnose(data: Data, network: nn.Module, trained: dict[str, tuple]) -> None:
    """Print what the paper draws, for the networks of the last seed."""
    images, _ = data.sample(256)
    models = [network] + [model for model, _ in trained.values()]
    histories = [row["history"] for _, row in trained.values()]
    print("\nFig. 1: variance of the logits under Gaussian input noise / variance over images")
    common.print_row("sigma", "fp", *trained)
    for sigma in (0.05, 0.1, 0.2, 0.4):
        common.print_row(sigma, *[f"{output_variance(m, images, sigma):.4f}" for m in models])
    print(
        "\nFig. 2: norm of the loss gradient in the weights, after each epoch\n"
        "        (the paper compares sfp with sfp --noise-at weight)"
    )
    common.print_by_epoch(trained, histories, "gradient", lambda norm: f"{norm:.3f}")
    values = [second_layer_input(model, images) for model in models]
    print("\nFig. 3: a channel's mean and largest value, at the input of the second layer")
    common.print_row("channel", "fp", *trained)
    for channel in range(min(32, values[0].shape[1])):
        columns = [value[:, channel] for value in values]
        common.print_row(channel, *[f"{c.mean():.2f} {c.max():.2f}" for c in columns])
    print("\nFig. 4: histogram of the same values, % of them")
    common.print_row("from", "fp", *trained)
    low = min(value.min().item() for value in values)
    high = max(value.max().item() for value in values)
    shares = [100 * value.histc(12, low, high) / value.numel() for value in values]
    for i in range(12):
        start = low + (high - low) * i / 12
        common.print_row(f"{start:.2f}", *[f"{share[i]:.1f}" for share in shares])
    print("\nFig. 5: Hessian trace ± its standard error, after each epoch")
    common.print_by_epoch(
        trained, histories, "trace", lambda trace: "{:.0f} ± {:.0f}".format(*trace)
    )
    print("\ngradient of the added term / gradient of the cross-entropy, after each epoch")
    common.print_by_epoch(trained, histories, "ratio", lambda ratio: f"{ratio:.3f}")


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
        diagnose(data, network, trained)


if __name__ == "__main__":
    common.entry(main)
