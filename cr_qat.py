"""CR: Consistency Regularization. Pang, Cai, Zhang, Wu, "In-Distribution Consistency Regularization
Improves the Generalization of Quantization-Aware Training", arXiv 2402.13497 (v2).

The idea. Quantized networks are sensitive to small changes of the image and of the weights. CR asks
for the same prediction on two augmented views of one image. The quantized student learns the label
from one view. A teacher, which is the moving average of the student and quantized like it, predicts
from the other view, and the student's prediction is drawn to the teacher's. That needs no label, so
unlabelled images can take part (`--labels N` keeps N labels).

Only the abstract and summaries of the paper were at hand. The rest is rebuilt on its ancestor, the
mean teacher (Tarvainen & Valpola 2017): formulas, schedule and constants are choices.

    symbol                 here                                                from
    a(x), a'(x)            two views of run.batches(), then distort            summaries
    L_con = KL(p_T || p_S) consistency_loss(student_logits, teacher_logits)    summaries, [choice]
    lambda(t)              ramp_up(t, T) times --lambda-max, T epochs long     ancestor
    theta_T                ema_update, over weights, batch norm, step sizes    summaries, [choice]
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

# Source of the target for the second view: none; its label, which tells what more augmentation
# gives; the student's own weights (the Pi-model; no gradient flows there [choice]); the
# full-precision network; the student's average.
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
        ("--lambda-max", number(float, 0, 1e6), 0.3, "weight of L_con after the ramp"),
        ("--ramp-epochs", number(float, 0, 1e6), 2.0, "T: length of the ramp"),
        ("--temperature", number(float, 0.01, 1e3), 1.0, "of the softmax in L_con"),
        ("--ema", number(float, 0, 1), 0.9, "alpha: memory of the moving average"),
        ("--views", VIEWS, [], "the student's augmentation, then the teacher's (the same if left "
                               "out); the baseline always has --augment"),
        ("--labels", number(int, 1, 10**9), None, "labels to keep (all); an epoch is then "
                                             "one pass over the labelled images"),
        ("--controls", bool, False, "all methods, and the averages of baseline and cr"),
        ("--ablate", bool, False, "cr with each augmentation of both views"),
        ("--diagnose", bool, False, "sensitivity to noise, oscillation, entropy, trace, force"))
    args = common.parse(parser, PAPER)
    if len(args.views) > 2:
        parser.error("--views takes one augmentation for both, or the student's and the teacher's")
    if args.labels and args.batch_size < 8:
        parser.error("--labels needs --batch-size 8 or more: a quarter of each batch is labelled")
    args.method = list(dict.fromkeys((list(METHODS) if args.controls else []) + args.method))
    return args


# ------------------------------------------------------------------------------------- the method


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor,
                     temperature: float = 1.0) -> Tensor:
    """L_con, mean over the batch of the Kullback-Leibler divergence KL(teacher || student) of the
    predictions; no gradient goes to the teacher. Direction and temperature t are [choice]s.

        t^2 KL(p_T || p_S),  KL = sum_c p_T(c) (log p_T(c) - log p_S(c)),  p = softmax(logits / t)

    logits: N x classes.
    """
    student, teacher = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    divergence = F.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def ramp_up(t: float, T: float) -> float:
    """exp(-5 (1 - min(t / T, 1))^2): from 0.0067 at t = 0 to 1 from t = T on, both in epochs."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2) if T > 0 else 1.0


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, updates: int, alpha: float) -> None:
    """theta_T <- a theta_T + (1 - a) theta_S, a = min(1 - 1 / (updates + 1), alpha), in place, over
    weights, scales and shifts of batch norm, and step sizes; zero points are fixed. At first it
    is the plain mean of the students so far. `updates` counts those before this one."""
    a = min(1 - 1 / (updates + 1), alpha)
    get_ema_multi_avg_fn(a)(list(teacher.parameters()), list(student.parameters()), None)


def distort(view: Tensor, augment: str) -> Tensor:
    """The augmentations beyond crop and flip, on normalised N x 3 x 32 x 32 [choice]: Gaussian
    noise of deviation 0.1; each image's channels times U[0.6, 1.4] plus U[-0.4, 0.4]."""
    if "noise" in augment:
        view = view + 0.1 * torch.randn_like(view)
    if "colour" in augment:
        gain, shift = torch.empty(2, len(view), 3, 1, 1, device=view.device).uniform_(-0.4, 0.4)
        view = view * (1 + gain) + shift
    return view


class PartlyLabelled(Data):
    """Data some of whose training labels are -100, which torch's cross-entropy ignores."""

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

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        return self.labelled.sample(count)


def hide_labels(data: Data, count: int, seed: int) -> tuple[Data, Data]:
    """(the `count` labelled images only, all images with the other labels -100), class-balanced."""
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
    """(student, results, history) of a method, from the full-precision `network` on."""
    student, by = quantize(network, args.wbits, args.abits, args.quantizer), METHODS[method]
    calibrate(student, data.sample(100)[0])
    average = copy.deepcopy(student)
    teacher = network if by == "full precision" else average
    optimizer = sgd(student, args.lr, args.weight_decay)
    run = Run(args, data, name or method, seed, args.epochs, model=student, optimizer=optimizer,
              average=average)
    views = args.views if by and args.views else [args.augment]
    consistent = args.lambda_max > 0 and by not in (None, "label")
    # The student's view, then the teacher's, if there is use for a second one.
    views = [views[0], views[-1]][:2 if consistent or by == "label" else 1]
    alpha = 0 if by == "student" else args.ema  # 0: a copy of the student

    for epoch in run.epochs():
        average.train()  # it normalises by its own batches [choice]
        for i, (*images, labels) in enumerate(run.batches(tuple(views))):
            images = [distort(image, view) for image, view in zip(images, views)]
            if args.labels and not consistent:  # without the term unlabelled images teach nothing
                few = max(1, len(labels) // 4)  # the labelled ones come first
                images, labels = [x[:few] for x in images], labels[:few]
            if by == "label":
                logits, labels = student(torch.cat(images)), labels.repeat(2)
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
    """Entropy in bits of how often each integer is used, mean over layers but first and last: at
    most the number of bits."""
    entropies = []
    for weight, _, _ in list(common.export_int(model).values())[1:-1]:
        share = weight.unique(return_counts=True)[1] / weight.numel()
        entropies.append(-(share * share.log2()).sum())
    return torch.stack(entropies).mean().item()


@torch.no_grad()
def sensitivity(model: nn.Module, data: Data, place: str, sigma: float) -> tuple[float, float]:
    """(accuracy in %, mean KL(clean || noisy) of the predictions) on up to 2,000 test images under
    Gaussian noise: on the normalised image (place "input"), or on all quantized weights ("weight"),
    there in units of each layer's standard deviation."""
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
        print(f"\naccuracy % | KL to the clean prediction, under Gaussian noise on each {place}")
        print_row("sigma", *trained)
        for sigma in (0.0, 0.1, 0.2, 0.4):
            cells = (sensitivity(model, data, place, sigma) for model in models)
            print_row(sigma, *(f"{acc:.2f} | {kl:.4f}" for acc, kl in cells))
    print("\nentropy of the quantized weights, bits")
    print_row("", *(f"{weight_entropy(model):.4f}" for model in models))
    print("\nby epoch: weights that change their integer in a step, % | Hessian trace; first step's"
          "\nforce of the consistency term, |its gradient| / |that of the cross-entropy|")
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
