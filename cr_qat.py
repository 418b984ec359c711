"""CR, consistency regularization. Pang, Cai, Zhang, Wu, "In-Distribution Consistency Regularization
Improves the Generalization of Quantization-Aware Training", arXiv 2402.13497 (v2).

The idea. Small changes of the image or of the weights disturb a quantized network. CR asks for the
same prediction on two augmented views of an image. The quantized student learns the label from one
view. A quantized teacher, the moving average of the student, predicts from the other view, and the
student is drawn to that prediction. This needs no label, so unlabelled images can take part.

We had only the abstract and other people's summaries. They mention the views, an averaged teacher
and a divergence. The abstract of version 1 asks for consistency of latent features instead. The
rest is rebuilt on the mean teacher (Tarvainen & Valpola 2017), the ancestor; our own decisions,
among them all constants, are marked [choice].

    symbol                   here                                               from
    two views                data.batches(), then distort                       summaries
    L_con = KL(p_T || p_S)   consistency_loss(student_logits, teacher_logits)   direction: [choice]
    lambda(t)                --lambda-max times ramp_up(t, length)              ancestor
    theta_T                  ema_update(teacher, student, updates, alpha)       constants: [choice]
    L = CE + lambda L_con    consistent(student, teacher, views, labels, ...)   summaries

    python cr_qat.py --bits 2                         full precision, baseline (LSQ), CR
    python cr_qat.py --bits 2 --ablate --diagnose     all methods and controls; sensitivity
"""

import copy
import math
from argparse import Namespace
from dataclasses import replace

import common  # before torch: it sets GOMP_SPINCOUNT
import torch
import torch.nn.functional as F
from common import Checkpoint, Data, Progress, calibrate, hooked, quantize
from torch import Tensor, nn

# What --recipe paper sets, for a long training; without it the defaults in `parse_args` apply, for
# a short one. CR's own settings are not known, so these are FPQ's, a paper by the same authors; see
# fpq.py. GUESSES are ours [choice], "ema" and "ramp_epochs" after the mean teacher.
FPQ_SETTINGS = {
    "model": "resnet18",
    "dataset": "cifar10",
    "batch_size": 256,
    "lr": 0.01,
    "epochs": 200,
    "weight_decay": 5e-4,
}
GUESSES = {
    "lambda_max": 1.0,
    "ema": 0.999,
    "ramp_epochs": 5.0,
    # A guess. The accuracy of FPQ's paper in full precision is what we expect of this stem on
    # CIFAR-10, and of --stem cifar on CIFAR-100.
    "stem": "imagenet",
    "fp_epochs": 200,
    "fp_lr": 0.1,
    "fp_weight_decay": 5e-4,
    "pad": 4,
}
LABELLED_SHARE = 1 / 4  # with --labels, this share of each batch has labels [choice]
VIEWS = ["none", "flip", "crop+flip", "crop+flip+noise", "crop+flip+colour"]


def parse_args() -> Namespace:
    parser = common.base_parser("CR: consistency regularization with an averaged teacher for "
                                "quantization-aware training (arXiv 2402.13497)",
                                list(METHODS), ["baseline", "cr"])
    common.qat_flags(parser)
    number = common.number
    flag = parser.add_argument
    flag("--lambda-max", type=number(float, 0, 1e6), default=0.3,
         help="full weight of the consistency term (default: 0.3)")
    flag("--ramp-epochs", type=number(float, 0, 1e6), default=2.0,
         help="epochs until that weight is full (default: 2)")
    flag("--ema", type=number(float, 0, 1), default=0.9,
         help="alpha: share of the average that a step keeps (default: 0.9)")
    flag("--views", choices=VIEWS, nargs="+", default=[], metavar="VIEW",
         help="augmentation of the student's view, then of the teacher's; one value sets both. "
              f"Values: {', '.join(VIEWS)} (default: --augment, which the baseline always has)")
    flag("--labels", type=number(int, 1, 10**9),
         help="keep so many labels (default: all); an epoch is one pass over those images")
    flag("--ablate-views", action="store_true",
         help="also train cr with each augmentation that --views knows")
    args = common.parse(parser, list(METHODS), FPQ_SETTINGS | GUESSES)
    if len(args.views) > 2:
        parser.error(f"--views has {len(args.views)} values: give one for both views, or two")
    if args.labels and args.batch_size < 8:  # batch norm needs two images; see `baseline`
        parser.error(f"--batch-size {args.batch_size} is too small for --labels; give 8 or more")
    return args


# ------------------------------------------------------------------------------------- the method


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_con: how far the student's prediction is from the teacher's, as a mean over the batch.

        KL(p_T || p_S) = sum over classes of p_T (log p_T - log p_S),   p = softmax(logits)

    logits: N x classes. No gradient goes to the teacher. The direction is ours [choice].
    """
    student = student_logits.log_softmax(1)
    teacher = teacher_logits.log_softmax(1).detach()
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def ramp_up(t: float, length: float) -> float:
    """lambda(t) / lambda_max, which rises from exp(-5) to 1:

        exp(-5 (1 - min(t / length, 1))^2)

    t and length are in epochs.
    """
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(t / length, 1)) ** 2)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, updates: int, alpha: float) -> None:
    """Exponential moving average of all parameters, learned step sizes included, in place.

        theta_T <- keep theta_T + (1 - keep) theta_S,   keep = min(1 - 1 / (updates + 1), alpha)

    `updates` counts the calls before this one. So the first call copies the student. Until keep
    reaches alpha, theta_T is the plain mean of the student's parameters after all steps so far.
    Zero points, and the 8-bit step sizes of the first and the last layer, are not learned; they are
    the same in both networks. Batch norm's statistics are not averaged: in training, the teacher
    takes those of its own batch.
    """
    keep = min(1 - 1 / (updates + 1), alpha)
    for theta_t, theta_s in zip(teacher.parameters(), student.parameters()):
        theta_t.lerp_(theta_s, 1 - keep)


def distort(images: Tensor, name: str) -> Tensor:
    """What a view does beyond crop and flip, to normalised images N x 3 x 32 x 32 [choice].

    noise: Gaussian, of standard deviation 0.1. colour: x (1 + gain) + shift for each channel of an
    image, where gain and shift are from U[-0.4, 0.4].
    """
    if "noise" in name:
        images = images + 0.1 * torch.randn_like(images)
    if "colour" in name:
        shape = (2, len(images), 3, 1, 1)
        gain, shift = torch.empty(shape, device=images.device).uniform_(-0.4, 0.4)
        images = images * (1 + gain) + shift
    return images


# Each method is a function that returns the loss of a batch. views: the images, N x 3 x 32 x 32, as
# the student sees them and as the teacher does. labels: N, -100 if unknown, which cross-entropy
# ignores. ramp: lambda(t) / lambda_max. average: the moving average of the student. network: full
# precision. All methods start from a quantized copy of it.


def baseline(student, average, network, views, labels, ramp, args):
    """QAT with the quantizer and nothing else. It has one view, and labelled images only.

    With --labels, labelled images come first in a batch (`mixed_order`). The student sees only them
    here. A baseline that sees whole batches is `cr` with --lambda-max 0.
    """
    count = int(len(labels) * LABELLED_SHARE) if args.labels else len(labels)
    return F.cross_entropy(student(views[0][:count]), labels[:count])


def two_view(student, average, network, views, labels, ramp, args):
    """A control: the student learns the labels of both views, by the mean of the two losses."""
    one = baseline(student, average, network, views, labels, ramp, args)
    # `baseline` takes the first of the views that it gets
    other = baseline(student, average, network, [views[1]], labels, ramp, args)
    return (one + other) / 2


def consistent(
    student: nn.Module,
    teacher: nn.Module,
    views: list[Tensor],
    labels: Tensor,
    ramp: float,
    args: Namespace,
) -> Tensor:
    """L = CE + lambda(t) L_con, with the prediction of any teacher on the second view."""
    logits = student(views[0])
    with torch.no_grad():
        teacher_logits = teacher(views[1])
    consistency = consistency_loss(logits, teacher_logits)
    return F.cross_entropy(logits, labels) + args.lambda_max * ramp * consistency


def pi(student, average, network, views, labels, ramp, args):
    """A control after the Pi-model (Laine & Aila 2017): the student is its own teacher.

    There the loss is a squared error with gradients of both passes; here it is that of `cr`.
    """
    return consistent(student, student, views, labels, ramp, args)


def fp_teacher(student, average, network, views, labels, ramp, args):
    """A control: the full-precision network is the teacher, in eval mode."""
    return consistent(student, network, views, labels, ramp, args)


def cr(student, average, network, views, labels, ramp, args):
    """CR: the moving average of the student is the teacher, and quantizes as well.

    The default is --augment for both views. With --augment none they are equal, and what is left
    of the consistency is that of the student with its past.
    """
    return consistent(student, average, views, labels, ramp, args)


METHODS = {
    "baseline": baseline,
    "two-view": two_view,
    "pi": pi,
    "fp-teacher": fp_teacher,
    "cr": cr,
}


# ------------------------------------------------------------------------- images without a label


def hide_labels(data: Data, count: int, seed: int) -> Data:
    """The same images, with labels for `count` class-balanced ones and -100 for the others.

    Raises UsageError for a bad count.
    """
    numbers = torch.arange(len(data.train_labels))
    # In place of images we give their numbers, and get those that were picked
    keep, *_ = common.pick_balanced(numbers, data.train_labels.cpu(), count, seed, "--labels")
    keep = keep.to(data.train_labels.device)
    labels = torch.full_like(data.train_labels, -100)
    labels[keep] = data.train_labels[keep]
    # It is in the names of checkpoints: full precision of another count has another file
    fingerprint = f"{data.fingerprint}-{count}"
    return replace(data, fingerprint=fingerprint, train_labels=labels)


def labelled_images(data: Data) -> Data:
    """The images of `data` that have labels."""
    keep = data.train_labels >= 0
    labels = data.train_labels[keep]
    return replace(data, train_labels=labels, train_padded=data.train_padded[keep])


def mixed_order(labels: Tensor, batch_size: int, draws: torch.Generator) -> Tensor:
    """The indices of an epoch. The first LABELLED_SHARE of each batch are labelled images.

    An epoch ends after one pass over the labelled images. The images without a label are drawn with
    replacement [choice].
    """
    share = int(batch_size * LABELLED_SHARE)
    known = (labels >= 0).nonzero().flatten()
    unknown = (labels < 0).nonzero().flatten()
    known = known[torch.randperm(len(known), generator=draws)]
    steps = max(1, len(known) // share)
    if len(known) < share:  # too few for one batch: repeat them, then cut off what is too many
        known = known.repeat(share)
    known = known[: steps * share]
    chosen = torch.randint(len(unknown), (steps, batch_size - share), generator=draws)
    return torch.cat([known.reshape(steps, share), unknown[chosen]], 1).flatten()


def views_of(args: Namespace, method: str) -> list[str]:
    """A list of augmentations: the baseline's one, or the student's and the teacher's."""
    if method == "baseline":
        return [args.augment]
    asked = args.views or [args.augment]
    return [asked[0], asked[-1]]


def epoch_batches(args: Namespace, data: Data, method: str, draws: torch.Generator):
    """The batches of an epoch: (a list of the images in each view, labels)."""
    names = views_of(args, method)
    order = None
    if args.labels:
        order = mixed_order(data.train_labels.cpu(), args.batch_size, draws)
    for *views, labels in data.batches(args.batch_size, draws, *names, order=order):
        yield [distort(view, name) for view, name in zip(views, names)], labels


# ----------------------------------------------------------------------------------- the training


def train(
    args: Namespace, data: Data, method: str, seed: int, network: nn.Module, name: str = ""
) -> tuple[nn.Module, list[dict]]:
    """Returns (the student, its rows of results).

    Student and average start as quantized copies of `network`. name: what the results call the run;
    by default that is the method.
    """
    # Labelled images alone calibrate and, by way of the checkpoint, renew batch norm [choice]
    labelled = labelled_images(data)
    student = quantize(network, args.wbits, args.abits, args.quantizer)
    calibrate(student, labelled.sample(100)[0])
    average = copy.deepcopy(student)
    optimizer = common.sgd(student, args.lr, args.weight_decay)
    name = name or method
    parts = {"model": student, "optimizer": optimizer, "average": average}
    checkpoint = Checkpoint(args, labelled, name, seed, args.epochs, network, **parts)
    # With --labels, as many steps as `mixed_order` makes
    per_batch = int(args.batch_size * LABELLED_SHARE) if args.labels else args.batch_size
    steps = labelled.steps(per_batch)
    done = checkpoint.load()  # how many epochs its file has done; 0 to start anew

    for epoch in range(done, args.epochs):
        student.train()
        average.train()  # it normalises by its own batches [choice]
        draws = common.epoch_draws("training", seed, epoch)
        progress = Progress(f"{name:<9} seed {seed}  epoch {epoch + 1}/{args.epochs}", steps)
        batches = epoch_batches(args, data, method, draws)
        for i, (views, labels) in enumerate(batches):
            step = epoch * steps + i
            # Learning rate: a cosine from --lr down to 0; the consistency term's weight: a ramp up
            common.set_rate(optimizer, args.lr * common.cosine(step, args.epochs * steps))
            ramp = ramp_up(step / steps, args.ramp_epochs)
            # Forward: the method returns its loss
            loss = METHODS[method](student, average, network, views, labels, ramp, args)
            # Backward
            optimizer.zero_grad()
            loss.backward()
            # Step of the student, then of its average, the teacher of "cr"
            optimizer.step()
            ema_update(average, student, step, args.ema)
            progress.add(loss=loss)
        # With --diagnose, measurements
        notes = {}
        if args.diagnose:
            notes = measure_epoch(args, data, method, parts, network)
        # Evaluation on some test images, checkpoint, a printed row
        common.end_epoch(checkpoint, progress, **notes)
    # New statistics for batch norm, evaluation on all test images, a line of results.jsonl
    rows = [common.finish(checkpoint)]
    if args.ablate and method in ("baseline", "cr"):  # how good is the average itself?
        rows.append(common.finish(checkpoint, average, f"{name}-ema"))
    return student.eval(), rows


# ---------------------------------------------------------------------- the claims as numbers


@torch.no_grad()
def weight_bins(model: nn.Module) -> Tensor:
    """The integers of the rounded weights as one vector, without the first and the last layer."""
    integers = [weight.flatten() for weight, _, _ in common.export_int(model).values()]
    return torch.cat(integers[1:-1])


def measure_epoch(
    args: Namespace, data: Data, method: str, parts: dict, network: nn.Module
) -> dict:
    """The state after an epoch, and what one more step would change.

    "ratio": |gradient of the consistency term| / |gradient of the cross-entropy|, or 0 without term
    "changed": share of weights, without first and last layer, whose integer one more step changes
    "trace": that of the cross-entropy's Hessian, with its standard error

    The first two are with the consistency term at its full weight, whatever the epoch. "changed"
    shrinks with the learning rate. parts: model, which is the student, optimizer and average.
    """
    # The step is taken on copies. All are copied in one call, so that the copied optimizer updates
    # the copied student.
    parts = copy.deepcopy(parts)
    student = parts["model"]
    draws = torch.Generator().manual_seed(0)
    views, labels = next(epoch_batches(args, data, method, draws))
    arguments = (student, parts["average"], network, views, labels)
    loss = METHODS[method](*arguments, ramp=1.0, args=args)
    cross_entropy = METHODS[method](*arguments, ramp=0.0, args=args)  # without the term
    ratio = common.gradient_ratio(loss, cross_entropy, student)  # keeps the graphs
    trace = common.sharpness(student, labelled_images(data))
    before = weight_bins(student)
    parts["optimizer"].zero_grad()
    loss.backward()
    parts["optimizer"].step()
    changed = (weight_bins(student) != before).float().mean().item()
    return {"ratio": ratio, "trace": trace, "changed": changed}


@torch.no_grad()
def weight_entropy(model: nn.Module) -> float:
    """Entropy, in bits, of the integers that a layer's weights use; a mean over layers.

    First and last layer do not count. It is at most the number of bits of a weight.
    """
    entropies = []
    for weight, _, _ in list(common.export_int(model).values())[1:-1]:
        _, counts = weight.unique(return_counts=True)
        share = counts / weight.numel()
        entropies.append(-(share * share.log2()).sum())
    return torch.stack(entropies).mean().item()


@torch.no_grad()
def sensitivity(model: nn.Module, data: Data, place: str, sigma: float) -> tuple[float, float]:
    """Accuracy in %, and KL(clean || noisy predictions), of up to 2,000 test images.

    The noise is Gaussian, of standard deviation sigma. place: "input", on the normalised images, or
    "weight", on the quantized weights, where it is relative to the layer's standard deviation.
    """

    def on_input(module, inputs):
        return inputs[0] + sigma * torch.randn_like(inputs[0])

    def on_weight(quantizer, inputs, x_hat):
        return x_hat + sigma * x_hat.std() * torch.randn_like(x_hat)

    every = 1 + (len(data.test_labels) - 1) // 2000  # spread, as images may be sorted by class
    images = data.normalize(data.test_images[::every])
    labels = data.test_labels[::every]
    torch.manual_seed(0)
    clean = model(images)
    if place == "input":
        noise = hooked([model], before=on_input)
    else:
        quantizers = [layer.weight_quantizer for layer in common.weight_layers(model).values()]
        noise = hooked(quantizers, after=on_weight)
    with noise:
        noisy = model(images)
    right = (noisy.argmax(1) == labels).float().mean()
    divergence = consistency_loss(student_logits=noisy, teacher_logits=clean)
    return 100 * right.item(), divergence.item()


def diagnose(data: Data, trained: dict[str, tuple]) -> None:
    """Measure what abstract and summaries claim, on the networks of the last seed.

    They claim less sensitivity to noise, weights of more entropy whose integers change less often,
    and a flatter loss.
    """
    models = [model for model, _ in trained.values()]
    histories = [rows[0]["history"] for _, rows in trained.values()]
    for place in ("input", "weight"):
        print(f"\nGaussian noise on each {place}: accuracy %, KL(clean || noisy prediction)")
        common.print_row("sigma", *trained)
        for sigma in (0.0, 0.1, 0.2, 0.4):
            cells = [sensitivity(model, data, place, sigma) for model in models]
            common.print_row(sigma, *[f"{acc:.2f} {kl:.3f}" for acc, kl in cells])
    print("\nentropy of the quantized weights, bits")
    common.print_row("", *trained)
    common.print_row("", *[f"{weight_entropy(model):.3f}" for model in models])
    print("\n% of weights that change their integer in a step, after each epoch")
    common.print_by_epoch(trained, histories, "changed", lambda changed: f"{100 * changed:.3f}")
    print("\nHessian trace ± its standard error, after each epoch")
    common.print_by_epoch(
        trained, histories, "trace", lambda trace: "{:.0f} ± {:.0f}".format(*trace)
    )
    print("\n|gradient of the consistency term| / |gradient of the cross-entropy|, full weight")
    common.print_by_epoch(trained, histories, "ratio", lambda ratio: f"{ratio:.3f}")


def main() -> None:
    args = parse_args()
    runs = len(args.method) + args.ablate_views * len(VIEWS)
    # For the time left, which `end_epoch` prints
    args.epochs_left = len(args.seed) * (args.fp_epochs + runs * args.epochs)
    source = common.read_images(args)
    rows = []
    for seed in args.seed:
        data = common.make_data(args, source, seed)
        if args.labels:
            # A dry run has about 64 images
            count = min(args.labels, 32) if args.dry_run else args.labels
            data = hide_labels(data, count, seed)
        network, row = common.full_precision(args, labelled_images(data), seed)
        rows.append(row)
        trained = {}
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            rows += trained[method][1]
        if args.ablate_views:
            asked = args.views
            for view in VIEWS:
                args.views = [view]
                rows += train(args, data, "cr", seed, network, f"cr-{view}")[1]
            args.views = asked
    common.print_table(rows)
    if args.diagnose:
        diagnose(data, trained)


if __name__ == "__main__":
    common.entry(main)
