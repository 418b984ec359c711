"""CR: Consistency Regularization. Pang, Cai, Zhang, Wu, Ye, "In-Distribution Consistency
Regularization Improves the Generalization of Quantization-Aware Training", arXiv 2402.13497.

The idea. Quantized networks are sensitive to small changes of image and weights. So CR asks for the
same answer to two augmented views of one image:
  1. the student, LSQ-quantized, sees one view and learns its label,
  2. a teacher, the moving average of the student, quantized like it, sees the other view,
  3. the student's prediction is drawn to the teacher's, with a weight that rises over some epochs.
That needs no label, so images without one can take part (`--labels N` keeps N labels).

Only the paper's abstract and summaries of it were at hand. The rest is rebuilt on its ancestor, the
mean teacher (Tarvainen & Valpola 2017): formulas, schedule and constants below are choices.

    symbol                 here                                                from
    a(x), a'(x)            two draws of run.batches(), then distort            summaries
    L_con = KL(p_T || p_S) consistency_loss(student_logits, teacher_logits)    summaries, choice
    lambda(t)              ramp_up(t, T) times --lambda-max, T epochs long     ancestor
    theta_T                ema_update, over weights, batch norm and steps      summaries, choice
    L = CE + lambda L_con  train()                                             summaries, choice

    python cr_qat.py --bits 2 --dataset shapes           full precision -> LSQ -> CR, 2 minutes
    python cr_qat.py --bits 2 --controls --diagnose      what else could explain a gain; sensitivity

Measured, 20,000 CIFAR-10 images, resnet8, W2A2, 15 + 6 epochs, one seed: full precision 76.26 %,
LSQ 73.10, CR 73.48, LSQ on two labelled views 73.73. Commands and more in the README.
"""

import argparse
import math
from dataclasses import replace

import common
import torch
import torch.nn.functional as F
from common import Data, Run, calibrate, full_precision, product_layers, quantize, sgd
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

PAPER = {"model": "resnet18", "dataset": "cifar10", "batch_size": 256, "lr": 0.01, "epochs": 200,
         "weight_decay": 5e-4,  # so far the authors' protocol in their FPQ paper; what follows is
         "lambda_max": 1.0, "ema": 0.999, "ramp_epochs": 5.0,  # a choice, after the mean teacher
         "fp_epochs": 200}

# Who gives the second view's answer: nobody, its label, the student's own weights (the Pi-model),
# the full-precision network, or the student's moving average. LSQ is CR with lambda 0.
METHODS = {"lsq": None, "two-view": "label", "pi": "student", "kd": "full precision",
           "cr": "average"}
AUGMENTS = ["none", "flip", "crop+flip", "crop+flip+noise", "crop+flip+colour"]


def parse_args() -> argparse.Namespace:
    parser = common.base_parser("CR: consistency regularization with an averaged teacher for "
                                "quantization-aware training (arXiv 2402.13497)")
    add, number = parser.add_argument, common.number
    add("--lambda-max", type=number(float, 0, 1e6), default=0.3, help="weight of L_con at last")
    add("--ramp-epochs", type=number(float, 0, 1e6), default=2.0, help="T: length of the ramp")
    add("--ema", type=number(float, 0, 1), default=0.9, help="alpha: memory of the average")
    add("--augment", choices=AUGMENTS, nargs="+", default=["crop+flip"], metavar="VIEW",
        help=f"of the student's view and of the teacher's, if another: {', '.join(AUGMENTS)}")
    add("--labels", type=number(int, 1, 10**9), help="labels kept, in equal shares of the classes")
    add("--method", choices=METHODS, nargs="+", default=["lsq", "cr"], help="what to train")
    add("--controls", action="store_true", help="all methods, and the averages of lsq and cr")
    add("--ablate", action="store_true", help="lsq and cr under each augmentation of both views")
    add("--diagnose", action="store_true", help="sensitivity to noise, oscillation, entropy, trace")
    args = common.parse(parser, PAPER)
    if len(args.augment) > 2:
        parser.error("--augment takes one view for both, or the student's and the teacher's")
    if args.labels and args.batch_size < 4:
        parser.error("--labels wants --batch-size 4 or more: a quarter of each batch is labelled")
    args.augment = [args.augment[0], args.augment[-1]]
    args.method = list(dict.fromkeys((list(METHODS) if args.controls else []) + args.method))
    return common.finish_args(args)


# ------------------------------------------------------------------------------------- the method


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_con, mean over the batch of the Kullback-Leibler divergence of the student's prediction
    from the teacher's; no gradient goes to the teacher. Temperature 1 and direction are choices.

        KL(p_T || p_S) = sum_c p_T(c) (log p_T(c) - log p_S(c))        logits: N x classes
    """
    student, teacher = student_logits.log_softmax(1), teacher_logits.detach().log_softmax(1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def ramp_up(t: float, T: float) -> float:
    """exp(-5 (1 - min(t / T, 1))^2): from 0.0067 at t = 0 to 1 from t = T on, both in epochs."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2) if T > 0 else 1.0


def ema_update(average: list[Tensor], current: list[Tensor], updates: int, alpha: float) -> None:
    """theta_T <- a theta_T + (1 - a) theta_S, a = min(1 - 1 / (updates + 1), alpha), in place: a
    plain mean at first, so that the start is soon forgotten. `updates` is the number so far."""
    a = min(1 - 1 / (updates + 1), alpha)
    get_ema_multi_avg_fn(a)(average, current, updates)


def averaged(student: nn.Module, alpha: float) -> AveragedModel:
    """The teacher: the average of the student's parameters, so of weights, scales and shifts of
    batch norm, and steps; zero points are fixed. In training mode, so that batch norm takes the
    statistics of the teacher's own activations, which those of the student would not fit [choice].
    `.update_parameters(student)` after each step."""
    average = AveragedModel(student)
    # What torch would pass as the third argument is on the device, which reading it would wait for;
    # n_averaged is on the CPU.
    average.multi_avg_fn = lambda mean, new, _: ema_update(mean, new, int(average.n_averaged),
                                                           alpha)
    return average.train()


def distort(view: Tensor, augment: str) -> Tensor:
    """The augmentations beyond crop and flip, on normalised N x 3 x 32 x 32 [choice]: Gaussian
    noise of deviation 0.1; each image's channels times U[0.6, 1.4] plus U[-0.4, 0.4].
    (torchvision's ColorJitter draws once for a whole batch.)"""
    if "noise" in augment:
        view = view + 0.1 * torch.randn_like(view)
    if "colour" in augment:
        gain, shift = torch.empty(2, len(view), 3, 1, 1, device=view.device).uniform_(-0.4, 0.4)
        view = view * (1 + gain) + shift
    return view


def hide_labels(data: Data, count: int, seed: int) -> Data:
    """`data` with `count` labels left, the others -1, which cross_entropy is told to ignore."""
    total = len(data.train_labels)
    if not data.classes <= count < total:
        raise common.UsageError(f"--labels {count} should be from {data.classes} (the classes) to "
                                f"{total - 1} (below the training images)")
    keep = common.balanced_subset(data.train_labels.cpu(), count, seed).to(data.train_labels.device)
    labels = torch.full_like(data.train_labels, -1)
    labels[keep] = data.train_labels[keep]
    return replace(data, train_labels=labels)


# ----------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, data: Data, method: str, seed: int, network: nn.Module,
          name: str | None = None) -> tuple[nn.Module, nn.Module, dict, list[dict]]:
    """(student, its average, result, history) of a method, from the full-precision `network` on."""
    student, by = quantize(network, args.wbits, args.abits, args.quantizer), METHODS[method]
    calibrate(student, data.sample(100)[0])
    optimizer = sgd(student, args.lr, args.weight_decay)
    average = averaged(student, 0 if by == "student" else args.ema)  # 0: a copy of the student
    teacher = network if by == "full precision" else average
    run = Run(args, data, student, optimizer, name or method, seed, args.epochs, args.lr,
              extras={"average": average})
    consistent = args.lambda_max > 0 and by not in (None, "label")
    kinds = tuple(args.augment[:2 if consistent or by == "label" else 1])
    steps = data.steps(args.batch_size)

    for epoch in run.epochs():
        for i, (*views, labels) in enumerate(run.batches(kinds)):
            views = [distort(view, kind) for view, kind in zip(views, kinds)]
            if args.labels and not consistent:  # without the term unlabelled images teach nothing
                labelled = max(1, len(labels) // 4)  # they come first
                views, labels = [v[:labelled] for v in views], labels[:labelled]
            if by == "label":
                logits, labels = student(torch.cat(views)), labels.repeat(2)
            else:
                logits = student(views[0])
            loss = F.cross_entropy(logits, labels, ignore_index=-1)  # mean over labelled images
            run.log(ce=loss)
            if consistent:
                with torch.no_grad():
                    teacher_logits = teacher(views[1])
                consistency = consistency_loss(logits, teacher_logits)
                weight = args.lambda_max * ramp_up(epoch + i / steps, args.ramp_epochs)
                loss = loss + weight * consistency  # L = CE + lambda(t) L_con
                run.log(consistency=consistency)
            before = weight_bins(student) if args.diagnose else None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(student)
            if args.diagnose:
                run.log(moved=(weight_bins(student) != before).float().mean())
        if args.diagnose:
            run.note(trace=common.weight_hessian_trace(student, data.labelled()))
    return student.eval(), average, run.finish(), run.history


def average_result(args: argparse.Namespace, data: Data, average: nn.Module, result: dict) -> dict:
    """The row of a trained student's moving average, as METHOD-ema; its batch norm statistics are
    taken anew from an epoch of training images."""
    draws = torch.Generator().manual_seed(result["seed"])
    update_bn((images for images, _ in data.batches(args.batch_size, draws)), average)
    acc, loss = common.evaluate(average, data)
    return common.record(args.out, result | {"method": result["method"] + "-ema", "test_acc": acc,
                                             "test_loss": loss})


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
    if place == "input":
        hooks = [model.register_forward_pre_hook(on_input)]
    else:
        hooks = [m.weight_quantizer.register_forward_hook(on_weight)
                 for m in product_layers(model).values()]
    noisy = model(images)
    for hook in hooks:
        hook.remove()
    right = (noisy.argmax(1) == labels).float().mean()
    return 100 * right.item(), consistency_loss(noisy, clean).item()


def diagnose(data: Data, trained: dict[str, tuple]) -> None:
    """Print what the paper claims or draws, for the networks of the last seed."""
    names = list(trained)
    for place, sigmas in (("input", (0.0, 0.1, 0.2, 0.4)), ("weight", (0.0, 0.1, 0.2, 0.4))):
        print(f"\naccuracy % | KL to the clean prediction, under Gaussian noise on each {place}")
        print(f"{'sigma':<9}" + "".join(f"{n:<22}" for n in names))
        for sigma in sigmas:
            cells = (sensitivity(trained[n][0], data, place, sigma) for n in names)
            print(f"{sigma:<9}" + "".join(f"{f'{acc:.2f} | {kl:.4f}':<22}" for acc, kl in cells))
    print("\nentropy of the quantized weights, bits")
    print(f"{'':<9}" + "".join(f"{weight_entropy(trained[n][0]):<22.4f}" for n in names))
    print("\nby epoch: weights that change bin in a step, % | Hessian trace ± standard error")
    for row in zip(*(trained[n][3] for n in names)):
        cells = (f"{100 * h['moved']:.3f} | {h['trace'][0]:.1f} ± {h['trace'][1]:.1f}"
                 if "trace" in h else "not recorded" for h in row)  # trained without --diagnose
        print(f"{row[0]['epoch']:<9}" + "".join(f"{cell:<22}" for cell in cells))


def main() -> None:
    args = parse_args()
    data = common.load_data(args.dataset, args.data_dir, args.train_size, args.fp_seed, args.device,
                            args.dry_run)
    if args.labels:
        data = hide_labels(data, args.labels, args.fp_seed)
    network, result = full_precision(args, data.labelled())
    results, trained = [result], {}
    for seed in args.seed:
        for method in args.method:
            trained[method] = train(args, data, method, seed, network)
            results.append(trained[method][2])
            if args.controls and method in ("lsq", "cr"):
                results.append(average_result(args, data, trained[method][1], results[-1]))
        for augment in AUGMENTS if args.ablate else []:
            for method in ("lsq", "cr"):
                same = argparse.Namespace(**vars(args) | {"augment": [augment, augment]})
                results.append(train(same, data, method, seed, network, f"{method}-{augment}")[2])
    print(common.result_table(results, baseline="lsq"))
    if args.diagnose:
        diagnose(data, trained)


if __name__ == "__main__":
    common.entry(main)
