"""CR: Consistency Regularization. Pang, Cai, Zhang, Wu, "In-Distribution Consistency Regularization
Improves the Generalization of Quantization-Aware Training", arXiv 2402.13497 (v2).

The idea. Small changes of the image and of the weights disturb a quantized network. CR asks for the
same prediction on two augmented views of one image. The quantized student learns the label from one
view, by cross-entropy (CE). A quantized teacher, the moving average of the student, predicts from
the other view. A second loss term draws the student's prediction to the teacher's. It needs no
label, so unlabelled images can take part (`--labels N` keeps N labels).

We had only the abstract and summaries. The rest is rebuilt on its ancestor, the mean teacher
(Tarvainen & Valpola 2017): formulas, schedule and constants are our decisions, marked [choice].

    symbol                 here                                                from
    a(x), a'(x)            two views of run.batches(), then distort            summaries
    L_con = KL(p_T || p_S) consistency_loss(student_logits, teacher_logits)    summaries, [choice]
    lambda(t)              ramp_up(t, T) times --lambda-max, T epochs long     ancestor
    theta_T                ema_update, over all parameters, step sizes too     summaries, [choice]
    L = CE + lambda L_con  train()                                             summaries, [choice]

    python cr_qat.py --bits 2                            full precision, baseline (LSQ), CR
    python cr_qat.py --bits 2 --controls --diagnose      what else could explain a gain; sensitivity
"""

import copy
import math
from argparse import Namespace
from dataclasses import replace

import common
import torch
import torch.nn.functional as F
from common import Data, Run, calibrate, full_precision, hooked, print_row, quantize, sgd
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

PAPER = {"model": "resnet18", "stem": "imagenet", "dataset": "cifar10", "batch_size": 256,
         "lr": 0.01, "epochs": 200, "weight_decay": 5e-4,
         # Above: FPQ's protocol (we infer the stem). Below, and --augment: ours [choice].
         "lambda_max": 1.0, "ema": 0.999, "ramp_epochs": 5.0,  # after the mean teacher
         "fp_epochs": 200, "fp_lr": 0.1, "fp_weight_decay": 5e-4, "pad": 4}

# Who predicts the target from the second view: "student": its own weights (Pi-model, Laine & Aila
# 2017; no gradient flows there [choice]), "full precision" or the student's "average". None: there
# is no second view. "label": the student learns the label of both, to show what more images give.
METHODS = {"baseline": None, "two-view": "label", "pi": "student", "fp-teacher": "full precision",
           "cr": "average"}
VIEWS = ["none", "flip", "crop+flip", "crop+flip+noise", "crop+flip+colour"]


def parse_args() -> Namespace:
    parser = common.base_parser("CR: consistency regularization with an averaged teacher for "
                                "quantization-aware training (arXiv 2402.13497)")
    number = common.number
    common.add_flags(
        parser, "method",
        ("--method", list(METHODS), ["baseline", "cr"], "what to train"),
        ("--lambda-max", number(float, 0, 1e6), 0.3, "full weight of the consistency term"),
        ("--ramp-epochs", number(float, 0, 1e6), 2.0, "T: epochs until that weight is full"),
        ("--temperature", number(float, 0.01, 1e3), 1.0, "of the softmax in the consistency term"),
        ("--ema", number(float, 0, 1), 0.9, "alpha: share of the average that a step keeps"),
        ("--views", VIEWS, [], "the student's augmentation, then the second view's; one sets both; "
                               "by default both have --augment, as the baseline always has"),
        ("--labels", number(int, 1, 10**9), None, "how many labels to keep (all); an epoch is then "
                                             "one pass over the labelled images"),
        ("--controls", bool, False, "train all methods; also evaluate averages of baseline and cr"),
        ("--ablate", bool, False, "also train cr with each choice of --views, for both views"),
        ("--diagnose", bool, False, "print effects of noise, weight changes, entropy, trace"))
    args = common.parse(parser, PAPER)
    if len(args.views) > 2:
        parser.error(f"--views has {len(args.views)} values: give one for both views, or two")
    if args.labels and args.batch_size < 8:
        parser.error(f"--batch-size {args.batch_size} is too small for --labels; give 8 or more")
    args.method = list(dict.fromkeys((list(METHODS) if args.controls else []) + args.method))
    return args


# ------------------------------------------------------------------------------------- the method


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor,
                     temperature: float = 1.0) -> Tensor:
    """L_con: the Kullback-Leibler divergence KL(teacher || student) of the predictions, mean over
    the batch. No gradient goes to the teacher. We chose direction and temperature t [choice].

        t^2 KL(p_T || p_S),  KL = sum_c p_T(c) (log p_T(c) - log p_S(c)),  p = softmax(logits / t)

    logits: N x classes.
    """
    student, teacher = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    divergence = F.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def ramp_up(t: float, T: float) -> float:
    """exp(-5 (1 - min(t / T, 1))^2), t and T in epochs: 0.0067 at t = 0, 1 from t = T on."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2) if T > 0 else 1.0


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, updates: int, alpha: float) -> None:
    """Exponential moving average, in place, of all parameters, step sizes included (zero points are
    fixed): theta_T <- a theta_T + (1 - a) theta_S, a = min(1 - 1 / (updates + 1), alpha). `updates`
    counts the calls before this one; while a < alpha, theta_T is the mean of the students."""
    a = min(1 - 1 / (updates + 1), alpha)
    get_ema_multi_avg_fn(a)(list(teacher.parameters()), list(student.parameters()), None)


def distort(view: Tensor, augment: str) -> Tensor:
    """Augmentations beyond crop and flip, of normalised N x 3 x 32 x 32 images [choice]: Gaussian
    noise of standard deviation 0.1; each channel times U[0.6, 1.4] plus U[-0.4, 0.4], by image."""
    if "noise" in augment:
        view = view + 0.1 * torch.randn_like(view)
    if "colour" in augment:
        gain, shift = torch.empty(2, len(view), 3, 1, 1, device=view.device).uniform_(-0.4, 0.4)
        view = view * (1 + gain) + shift
    return view


class PartlyLabelled(Data):
    """Data with some labels -100, which cross-entropy ignores; .labelled: Data of the others."""

    def steps(self, batch_size: int) -> int:
        """An epoch is one pass over the labelled images [choice], a quarter of each batch."""
        return max(1, len(self.labelled.train_labels) // max(1, batch_size // 4))

    def order(self, batch_size: int, draws: torch.Generator) -> Tensor:
        """A quarter of each batch is labelled; either kind begins anew when it is used up."""
        labelled, few = self.train_labels.cpu() >= 0, max(1, batch_size // 4)
        columns = []
        for of, share in ((labelled, few), (~labelled, batch_size - few)):
            of, count = of.nonzero().flatten(), self.steps(batch_size) * share
            rounds = [of[torch.randperm(len(of), generator=draws)]
                      for _ in range(math.ceil(count / len(of)))]
            columns.append(torch.cat(rounds)[:count].reshape(-1, share))
        return torch.cat(columns, 1).flatten()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:  # `sharpness` needs the labels
        return self.labelled.sample(count)


def hide_labels(data: Data, count: int, seed: int) -> tuple[Data, Data]:
    """(`count` class-balanced labelled images; all, other labels -100). Bad count: UsageError."""
    numbers = torch.arange(len(data.train_labels))
    keep = common.split(numbers, data.train_labels.cpu(), count, seed, "--labels")[0]
    keep = keep.to(data.train_labels.device)
    labels = torch.full_like(data.train_labels, -100)
    labels[keep] = data.train_labels[keep]
    changed = {"fingerprint": f"{data.fingerprint}-{count}", "train_labels": labels}
    few = {"train_padded": data.train_padded[keep], "train_labels": labels[keep]}
    partly = PartlyLabelled(**vars(data) | changed)
    partly.labelled = replace(data, **changed | few)
    return partly.labelled, partly


# ----------------------------------------------------------------------------------- the training


def train(args: Namespace, data: Data, method: str, seed: int, network: nn.Module,
          name: str | None = None) -> tuple[nn.Module, list[dict], list[dict]]:
    """(student, results, history by epoch), from full-precision `network` on. `name`: the run's."""
    student, by = quantize(network, args.wbits, args.abits, args.quantizer), METHODS[method]
    calibrate(student, data.sample(100)[0])
    average = copy.deepcopy(student)
    teacher = network if by == "full precision" else average
    optimizer = sgd(student, args.lr, args.weight_decay)
    run = Run(args, data, name or method, seed, args.epochs, model=student, optimizer=optimizer,
              average=average)
    views = args.views if by and args.views else [args.augment]
    consistent = args.lambda_max > 0 and by not in (None, "label")
    # A second view is for the teacher, or for labels ("two-view"); others have no use for it.
    views = [views[0], views[-1]] if consistent or by == "label" else views[:1]
    alpha = 0 if by == "student" else args.ema  # 0: a copy of the student

    for epoch in run.epochs():
        average.train()  # it normalises by its own batches [choice]
        for i, (*images, labels) in enumerate(run.batches(tuple(views))):
            images = [distort(image, view) for image, view in zip(images, views)]
            if args.labels and not consistent:  # without the term unlabelled images teach nothing
                few = max(1, len(labels) // 4)  # the labelled ones come first
                images, labels = [x[:few] for x in images], labels[:few]
            if by == "label":  # view by view, so that batch norm sees as many images as elsewhere
                logits, labels = torch.cat([student(x) for x in images]), labels.repeat(2)
            else:
                logits = student(images[0])
            cross_entropy = loss = F.cross_entropy(logits, labels)  # of labelled images
            if consistent:
                with torch.no_grad():
                    teacher_logits = teacher(images[1])
                consistency = consistency_loss(logits, teacher_logits, args.temperature)
                term = args.lambda_max * ramp_up(run.time, args.ramp_epochs) * consistency
                if args.diagnose and "force" not in run.notes:
                    run.notes["force"] = common.gradient_ratio(term, cross_entropy, student)
                loss = cross_entropy + term  # L = CE + lambda(t) L_con
                run.log(consistency=consistency)
            before = weight_bins(student) if args.diagnose else None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(average, student, epoch * data.steps(args.batch_size) + i, alpha)
            run.log(loss=loss, ce=cross_entropy)
            if args.diagnose:
                run.log(moved=(weight_bins(student) != before).float().mean())
        if args.diagnose:
            run.notes["trace"] = common.sharpness(student, data)
    results = [run.finish()]
    if args.controls and by in (None, "average"):
        results.append(run.finish(average, method=run.method + "-ema"))
    return student.eval(), results, run.history


# --------------------------------------------------------------- the paper's claims as numbers


@torch.no_grad()
def weight_bins(model: nn.Module) -> Tensor:
    """The integers that the weights of all layers but first and last round to, as one vector."""
    integers = [weight.flatten() for weight, _, _ in common.export_int(model).values()]
    return torch.cat(integers[1:-1])


@torch.no_grad()
def weight_entropy(model: nn.Module) -> float:
    """Entropy, in bits, of the integers that a layer's weights use, as a mean over all layers but
    first and last. It is at most the number of bits of a weight."""
    entropies = []
    for weight, _, _ in list(common.export_int(model).values())[1:-1]:
        share = weight.unique(return_counts=True)[1] / weight.numel()
        entropies.append(-(share * share.log2()).sum())
    return torch.stack(entropies).mean().item()


@torch.no_grad()
def sensitivity(model: nn.Module, data: Data, place: str, sigma: float) -> tuple[float, float]:
    """(accuracy in %, mean KL(clean || noisy) in nats) on up to 2,000 test images. Gaussian noise
    of standard deviation sigma goes on the normalised images (place "input") or on all quantized
    weights ("weight"), there relative to the standard deviation of the layer's weights."""
    def on_input(module, inputs):
        return inputs[0] + sigma * torch.randn_like(inputs[0])

    def on_weight(quantizer, inputs, x_hat):
        return x_hat + sigma * x_hat.std() * torch.randn_like(x_hat)

    every = 1 + (len(data.test_labels) - 1) // 2000  # spread, as images may be sorted by class
    images, labels = data.normalize(data.test_images[::every]), data.test_labels[::every]
    torch.manual_seed(0)
    clean = model(images)
    quantizers = [layer.weight_quantizer for layer in common.weight_layers(model).values()]
    with (hooked([model], before=on_input) if place == "input"
          else hooked(quantizers, after=on_weight)):
        noisy = model(images)
    right = (noisy.argmax(1) == labels).float().mean()
    return 100 * right.item(), consistency_loss(noisy, clean).item()


def diagnose(data: Data, trained: dict[str, tuple]) -> None:
    """Print what the paper claims or draws, for the networks of the last seed."""
    models = [model for model, *_ in trained.values()]
    for place in ("input", "weight"):
        print(f"\naccuracy % | KL(clean || noisy prediction), with Gaussian noise on each {place}")
        print_row("sigma", *trained)
        for sigma in (0.0, 0.1, 0.2, 0.4):
            cells = (sensitivity(model, data, place, sigma) for model in models)
            print_row(sigma, *(f"{acc:.2f} | {kl:.4f}" for acc, kl in cells))
    print("\nentropy of the quantized weights, bits")
    print_row("", *(f"{weight_entropy(model):.4f}" for model in models))
    print("\nby epoch: % of weights that change their integer in a step | Hessian trace; in its"
          "\nfirst step |gradient of the consistency term| / |gradient of the cross-entropy|")
    print_row("epoch", *trained)
    for row in zip(*(history for *_, history in trained.values())):
        print_row(row[0]["epoch"], *(
            f"{100 * h['moved']:.3f} | {h['trace'][0]:.0f}; {h.get('force', 0):.2f}"
            if "trace" in h else "not recorded" for h in row))  # trained without --diagnose


def main() -> None:
    results, trained = [], {}
    for args, seed, data in common.per_seed(parse_args()):
        labelled = data
        if args.labels:
            count = min(args.labels, 32) if args.dry_run else args.labels
            labelled, data = hide_labels(data, count, args.fp_seed)
        network, result = full_precision(args, labelled)
        results.append(result)
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            results += trained[method][1]
        for view in VIEWS if args.ablate else []:
            both = Namespace(**vars(args) | {"views": [view]})
            results += train(both, data, "cr", seed, network, f"cr-{view}")[1]
    print(common.result_table(results))
    if args.diagnose:
        diagnose(data, trained)


if __name__ == "__main__":
    common.entry(main)
