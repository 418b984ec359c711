"""What the four papers take for granted; no method lives here. Read it once, top to bottom.

    1. Command line and run      base_parser, parse, finish_args, entry, sgd, Run, result_table
    2. Data                      Data, load_data
    3. Models                    CifarResNet, ViT, build_model, full_precision
    4. Quantizers                a: fake_quantize, Quantizer (LSQ); b: LSQ+ and PACT;
                                 c: QuantConv2d, QuantLinear, quantize, calibrate, export_int
    5. Evaluation and flatness   evaluate, hessian_trace, hessian_top_eigenvalue

Symbols follow the papers' shared protocol (FPQ, arXiv 2503.11159, section 3.1): step s, zero
point z, bits q, integer x_int, de-quantized value x_hat.
"""

import argparse
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import shlex
import socket
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MODELS = ["resnet8", "resnet20", "resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "vit_tiny"]
QUANTIZERS = ["lsq", "lsq+", "pact"]
DATASETS = ["auto", "cifar10", "cifar100", "fashion_mnist", "folder", "shapes"]

# ------------------------------------------------------------------------ 1. Command line and run


class UsageError(Exception):
    """Something the user can put right: reported in one line, exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse prints the whole usage first; one line is clearer
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind: type, low: float, high: float) -> Callable:
    """An argparse type: a `kind` (int or float) within [low, high]; nan is refused."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        word = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} should be {word} from {low:g} to {high:g}")
    return parse


def base_parser(description: str, fewest_bits: int = 2) -> Parser:
    """The flags that all scripts share; defaults are quick, `--recipe paper` is the protocol."""
    p = Parser(description=description, allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    bits, count, seed = number(int, fewest_bits, 8), number(int, 1, 10**9), number(int, 0, 2**31)
    add = p.add_argument
    add("--bits", type=bits, default=2, help="of weights and activations")
    add("--wbits", type=bits, help="of weights, if not --bits")
    add("--abits", type=bits, help="of activations, if not --bits")
    add("--model", choices=MODELS, default="resnet8", help="network")
    add("--depth", type=number(int, 1, 48), default=4, help="blocks of vit_tiny")
    add("--quantizer", choices=QUANTIZERS, default="lsq", help="how steps are learned")
    add("--dataset", choices=DATASETS, default="auto", help="auto: cifar10 if at hand, else shapes")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie")
    add("--train-size", type=count, help="class-balanced subset of the training images")
    add("--epochs", type=count, default=6, help="quantization-aware epochs")
    add("--fp-epochs", type=count, default=15, help="full-precision epochs before them")
    add("--batch-size", type=number(int, 2, 10**6), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e3), default=0.02, help="peak, quantized epochs")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4, help="on all but steps")
    add("--seed", type=seed, nargs="+", default=[0], help="each runs every method once")
    add("--fp-seed", type=seed, default=0, help="of full precision and of --train-size")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--out", type=Path, default=Path("runs"), help="checkpoints and results.jsonl")
    add("--resume", action="store_true", help="go on where the same command stopped")
    add("--compile", action="store_true", help="compile the quantizer: faster after some seconds")
    add("--dry-run", action="store_true", help="two steps of everything, into OUT/dry-run")
    return p


def parse(parser: Parser, recipe: dict) -> argparse.Namespace:
    """The command line. `--recipe paper` puts `recipe` in place of the defaults and prints it;
    flags given beside it win, and so does --bits over the recipe's wbits and abits."""
    parser.add_argument("--recipe", choices=["paper"], help=f"the published schedule: {recipe}")
    if parser.parse_args().recipe:
        if any(word.split("=")[0] == "--bits" for word in sys.argv):
            recipe = {k: v for k, v in recipe.items() if k not in ("wbits", "abits")}
        parser.set_defaults(**recipe)
        args = parser.parse_args()
        print("--recipe paper:", *(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in recipe))
    return parser.parse_args()


def finish_args(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags; find out now, not after an hour, what cannot work."""
    args.wbits, args.abits = args.wbits or args.bits, args.abits or args.bits
    if len(set(args.seed)) < len(args.seed):
        raise UsageError("--seed names a seed twice; name each once")
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available()
                       else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"--device {args.device} cannot be used here "
                         f"({str(error).splitlines()[0]}); try --device cpu") from None
    if args.dry_run:
        args.out, args.epochs, args.fp_epochs = args.out / "dry-run", 1, 1
        args.batch_size = min(args.batch_size, 32)
    args.out.mkdir(parents=True, exist_ok=True)
    open(args.out / "results.jsonl", "a").close()  # an unwritable --out shows before any work
    use_compiled(args.compile, args.device)
    torch.backends.cudnn.deterministic = True  # same command, same machine: same bits
    return args


def keep_memory() -> None:
    """Let malloc keep what is freed. By default glibc gives large blocks back to the kernel, and
    every large tensor on the CPU then costs its page faults anew: a tenth to a fifth of a step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the kernel
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor goes back before 2 GB are free


def entry(main: Callable[[], None]) -> None:
    """Run a script. What a user can cause ends in one line: 2 usage or disk, 3 loss, 130 Ctrl-C."""
    keep_memory()
    try:
        return main()
    except (UsageError, OSError) as error:
        code, line = 2, f"error: {error}"
    except FloatingPointError as error:
        code, line = 3, f"stopped: {error}"
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        code, line = 2, "error: out of memory; try a smaller --batch-size"
    except KeyboardInterrupt:
        code, line = 130, "interrupted; --resume goes on from the last whole epoch"
    print(f"\n{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)


def sgd(model: nn.Module, lr: float, weight_decay: float, **options) -> torch.optim.SGD:
    """SGD, momentum 0.9; no weight decay on steps and offsets of quantizers. PACT's clips have it,
    as nothing else would make them smaller."""
    groups = ([], [])
    for name, parameter in model.named_parameters():
        groups[name.endswith((".step", ".offset"))].append(parameter)
    return torch.optim.SGD([{"params": groups[0], "weight_decay": weight_decay},
                            {"params": groups[1], "weight_decay": 0}], lr, momentum=0.9, **options)


def cosine_lr(step: int, total: int, peak: float, warmup: float = 0.0) -> float:
    """Linear to `peak` over the first `warmup` share of `total` steps, then cosine to 0.
    A pure function of the step, so that resuming needs no scheduler state."""
    ramp = warmup * total
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (total - ramp)))


class Run:
    """The book-keeping of one training run, so that a script's loop is the paper's lines only:

        run = Run(args, data, student, optimizer, "fpq", seed, args.epochs, args.lr)
        for epoch in run.epochs():                 # seeds, row, evaluation, checkpoint, resume
            for images, labels in run.batches():   # augmented batches, learning rate
                ...
                run.log(loss=loss)                 # a mean over the epoch; no device is waited for
        result = run.finish()                      # the line in results.jsonl

    Randomness restarts from (seed, epoch), so resuming at an epoch's start is bit-identical.
    `header` names all that made the run; a digest of it is in the checkpoint's name, and a file
    that holds another one is refused. What else training depends on (an average of the weights,
    statistics of noise) goes into `extras`: objects with state_dict and load_state_dict, by name.
    """

    def __init__(self, args: argparse.Namespace, data: "Data", model: nn.Module,
                 optimizer: torch.optim.Optimizer, method: str, seed: int, epochs: int, lr: float,
                 warmup: float = 0.0, header: dict | None = None, extras: dict | None = None):
        self.parts = {"model": model, "optimizer": optimizer} | (extras or {})
        self.args, self.data, self.model, self.optimizer = args, data, model, optimizer
        self.method, self.seed, self.total = method, seed, epochs
        self.peak, self.warmup = lr, warmup
        self.script, self.history, self.finished = Path(sys.argv[0]).stem, [], None
        self.stream = seed * 100_003 + (2**41 if header else 0)  # full precision has one of its own
        flags = {k: str(v) for k, v in sorted(vars(args).items()) if k not in (
            "bits out resume seed data_dir device recipe ablate compare controls diagnose measure "
            "study sweep_bits").split()}
        self.header = header or flags | {"script": self.script, "method": method, "seed": seed,
                                         "dataset": data.name, "data": data.fingerprint, "pad": PAD}
        digest = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:8]
        name = "-".join([method, args.model, data.name] if header else [
            self.script, method, args.model, data.name,
            *([args.quantizer] if args.quantizer != "lsq" else []),
            f"w{args.wbits}a{args.abits}", f"s{seed}"])
        self.path = args.out / f"{name}-{digest}.pt"
        if args.resume:
            for stale in args.out.glob(f"{name}-{digest}.*.part"):  # of a run killed while it wrote
                stale.unlink(missing_ok=True)
        if (args.resume or header) and self.path.exists():
            self.load()
        elif args.resume and not header and any(args.out.glob(f"{name}-*.pt")):
            print(f"{name} in {args.out} was made by another command; starting afresh for this one",
                  file=sys.stderr)

    def load(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about foreign files: the one line below is enough
                if zipfile.ZipFile(self.path).testzip():  # torch.load looks at no check sum
                    raise ValueError
                state = torch.load(self.path, map_location="cpu", weights_only=True)
            for key in self.header | state["header"]:
                mine, theirs = self.header.get(key), state["header"].get(key)
                if mine != theirs:
                    raise UsageError(f"{self.path} was made with {key} {theirs}, this command says "
                                     f"{mine}; take another --out or delete it")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.history, self.finished = state["history"], state["finished"]
        except UsageError:
            raise
        except Exception as error:  # half a dozen kinds for a damaged or incomplete file
            raise UsageError(f"{self.path} is damaged or none of ours ({type(error).__name__}); "
                             "delete it to start afresh") from None

    def save(self) -> None:
        state = {"header": self.header, "history": self.history, "finished": self.finished}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        whole = io.BytesIO()  # as torch.save says less clearly than a file why it cannot write
        torch.save(state, whole)
        partial = self.path.with_suffix(f".{os.getpid()}.part")  # so `path` is whole or absent
        try:
            partial.write_bytes(whole.getbuffer())
            os.replace(partial, self.path)
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)

    def epochs(self) -> Iterator[int]:
        for epoch in range(len(self.history), self.total):
            torch.manual_seed(2**40 + self.stream + epoch)  # not what the batches are drawn from
            self.epoch, self.sums, self.steps, self.notes = epoch, {}, 0, {}
            self.finite, self.good = torch.tensor(True), 0  # steps until a loss was not finite
            self.model.train()
            yield epoch
            acc, loss = evaluate(self.model, self.data)
            self.check(loss)
            self.history.append({"epoch": epoch + 1, **self.means, "test_loss": loss,
                                 "test_acc": acc, "seconds": self.seconds, **self.notes})
            self.save()
            left = int((self.total - epoch - 1) * np.mean([h["seconds"] for h in self.history]))
            print(f"{self.method:<5} seed {self.seed}  epoch {epoch + 1:>3}/{self.total}  "
                  + "  ".join(f"{k} {v:.4f}" for k, v in self.means.items())
                  + f"  test loss {loss:.4f}  test acc {acc:5.2f} %  {self.seconds:5.1f} s  "
                  f"left {left // 60}:{left % 60:02d}", flush=True)

    def batches(self, views: tuple[str, ...] = ("crop+flip",)) -> Iterator[tuple[Tensor, ...]]:
        started = time.perf_counter()
        draws = torch.Generator().manual_seed(self.stream + self.epoch)
        steps = self.data.steps(self.args.batch_size)
        for i, batch in enumerate(self.data.batches(self.args.batch_size, draws, views)):
            for group in self.optimizer.param_groups:
                group["lr"] = cosine_lr(self.epoch * steps + i, self.total * steps, self.peak,
                                        self.warmup)
            self.steps = i + 1
            yield batch
            self.good = self.good + self.finite
        # Here the device is waited for, once per epoch.
        self.means = {k: v.item() / self.steps for k, v in self.sums.items()}
        self.seconds = time.perf_counter() - started
        self.check(*self.means.values())

    def check(self, *losses: float) -> None:
        """FloatingPointError, which ends the script, if a loss is not finite."""
        if all(map(math.isfinite, losses)):
            return
        flag = "--lr" if self.peak == self.args.lr else "--batch-size, which its rate grows with"
        step = min(int(self.good), self.steps - 1)
        rate = cosine_lr(self.epoch * self.steps + step, self.total * self.steps, self.peak,
                         self.warmup)
        kept = ". The checkpoint of the epoch before is kept" if self.history else ""
        raise FloatingPointError(f"{self.method}: the loss is not finite from step {step + 1} of "
                                 f"epoch {self.epoch + 1} on, learning rate {rate:.3g}; try a "
                                 f"smaller {flag}{kept}")

    def log(self, **losses: Tensor) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.finite = self.finite & value.detach().isfinite()

    def note(self, **numbers: float | tuple[float, ...]) -> None:
        """Keep numbers of this epoch in the history, so that they survive a resume."""
        self.notes |= numbers

    def finish(self, wbits: int | None = None, abits: int | None = None) -> dict:
        """The result as a dict; one line of results.jsonl, however often the run is resumed."""
        a = self.args
        if self.finished:
            print(f"{self.method:<5} seed {self.seed}  already trained: {self.path}")
        else:
            self.finished = {
                "script": self.script, "method": self.method, "dataset": self.data.name,
                "model": a.model, "quantizer": None if self.method == "fp" else a.quantizer,
                "wbits": wbits or a.wbits, "abits": abits or a.abits,
                "seed": self.seed, "epochs": self.total, "train_size": len(self.data.train_labels),
                "test_acc": self.history[-1]["test_acc"],
                "test_loss": self.history[-1]["test_loss"],
                "seconds_per_epoch": float(np.mean([h["seconds"] for h in self.history])),
                "torch": str(torch.__version__), "device": str(a.device),
                "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])}
            self.save()
        return record(a.out, self.finished)


def record(out: Path, result: dict) -> dict:
    """Append result to OUT/results.jsonl unless it is there already."""
    line = json.dumps(result).encode() + b"\n"
    with open(out / "results.jsonl", "a+b", buffering=0) as file:
        file.seek(0)
        if line not in file.read():  # a kill after the last checkpoint may have come before this
            written = file.write(line)  # appended whole: two processes do not mix
            if written < len(line):
                file.truncate(file.seek(0, os.SEEK_END) - written)
                raise OSError(f"{out / 'results.jsonl'} cannot be written: the disk is full")
    return result


def result_table(results: list[dict], baseline: str) -> str:
    """One row per method: accuracy of the last epoch, mean ± sample deviation over seeds."""
    first, wide = results[0], max(8, *(len(r["method"]) + 2 for r in results))
    lines = [f"\n{first['dataset']}, {first['train_size']} training images, {first['model']}, "
             f"quantizer {results[-1]['quantizer']}, accuracy of the last epoch",
             f"{'method':<{wide}}{'W/A':<7}{'test acc %':<15}{'vs ' + baseline:<9}{'test loss':<11}"
             f"{'epochs':<8}{'s/epoch':<9}seeds"]
    groups = {}
    for result in results:
        groups.setdefault(tuple(result[k] for k in ("method", "wbits", "abits")), []).append(result)
    mean = {key: np.mean([r["test_acc"] for r in group]) for key, group in groups.items()}
    for (method, *bits), group in groups.items():
        acc = f"{mean[method, *bits]:.2f}"
        if len(group) > 1:
            acc += f" ± {np.std([r['test_acc'] for r in group], ddof=1):.2f}"
        reference = mean.get((baseline, *bits))
        delta = "" if reference is None else f"{mean[method, *bits] - reference:+.2f}"
        loss, seconds = (np.mean([r[k] for r in group]) for k in ("test_loss", "seconds_per_epoch"))
        lines.append(f"{method:<{wide}}{f'{bits[0]}/{bits[1]}':<7}{acc:<15}{delta:<9}{loss:<11.4f}"
                     f"{group[0]['epochs']:<8}{seconds:<9.1f}{len(group)}")
    return "\n".join(lines)


# --------------------- 2. Data: uint8, whole on the device, one vectorised crop and flip per batch

PUBLISHED = {  # mean and deviation of the training pixels in [0, 1], as commonly published
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
PAD = 2  # black pixels around a training image, out of which a random 32 x 32 window is cut; 4 is
#          usual for hundreds of epochs, but a small network in 15 epochs underfits as it is


@dataclass
class Data:
    """A data set on one device. Images are uint8 N x 32 x 32 x 3, those for training with PAD black
    pixels around them; labels are int64 N, -1 if unknown; mean and std belong to the 3 channels."""

    name: str
    classes: int
    train_padded: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    fingerprint: int  # of all pixels and labels used: checkpoints carry it

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 N x H x W x 3 -> float N x 3 x H x W, a view in channels_last order."""
        return images.float().div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    def steps(self, batch_size: int) -> int:
        """Batches per epoch. What is left over at the end is dropped: batch norm wants no rump."""
        return max(1, len(self.train_labels) // batch_size)

    def batches(self, batch_size: int, draws: torch.Generator,
                views: tuple[str, ...] = ("crop+flip",)) -> Iterator[tuple[Tensor, ...]]:
        """One shuffled epoch of (images N x 3 x 32 x 32 for each of `views`, labels N). A view
        whose name lacks "crop" or "flip" goes without it. `draws` lives on the CPU, so that a seed
        means the same batches everywhere; the first view is the same however many there are."""
        n, device = len(self.train_labels), self.train_labels.device
        order, moves = self.order(batch_size, draws).to(device), []
        for view in views:
            corner = torch.randint(0, 2 * PAD + 1, (2, n), generator=draws)
            flip = torch.randint(0, 2, (n,), generator=draws).bool()
            moves.append(((corner if "crop" in view else corner * 0 + PAD).to(device),
                          (flip & ("flip" in view)).to(device)))
        for i in range(self.steps(batch_size)):  # all draws are on the device: no step waits
            at = slice(i * batch_size, (i + 1) * batch_size)
            index = order[at]
            yield (*(self.augment(index, corner[:, at], flip[at]) for corner, flip in moves),
                   self.train_labels[index])

    def order(self, batch_size: int, draws: torch.Generator) -> Tensor:
        """The training images of an epoch in random order. If some have no label (-1), a quarter of
        each batch are labelled ones; either kind begins anew when it is used up."""
        n, labelled = len(self.train_labels), self.train_labels.cpu() >= 0
        if labelled.all():
            return torch.randperm(n, generator=draws)
        batch_size = min(batch_size, n)
        few = max(1, batch_size // 4)
        shares = few, batch_size - few
        columns = []
        for of, share in zip((labelled, ~labelled), shares):
            of, count = of.nonzero().flatten(), self.steps(batch_size) * share
            rounds = [of[torch.randperm(len(of), generator=draws)]
                      for _ in range(math.ceil(count / len(of)))]
            columns.append(torch.cat(rounds)[:count].reshape(-1, share))
        return torch.cat(columns, 1).flatten()

    def labelled(self) -> "Data":
        """The labelled training images only."""
        keep = self.train_labels >= 0
        if keep.all():
            return self
        return replace(self, train_padded=self.train_padded[keep],
                       train_labels=self.train_labels[keep],
                       fingerprint=zlib.crc32(keep.cpu().numpy(), self.fingerprint))

    def augment(self, index: Tensor, corner: Tensor, flip: Tensor) -> Tensor:
        """The training images `index` (N), each cut out at its corner (2 x N, row and column) and
        mirrored where flip (N) says so, normalised."""
        line = torch.arange(32, device=index.device)
        rows = corner[0, :, None] + line
        columns = corner[1, :, None] + torch.where(flip[:, None], 31 - line, line)
        return self.normalize(
            self.train_padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` fixed random training images, not augmented: for calibration and diagnosis."""
        index = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        index = index[:count].to(self.train_labels.device)
        images = self.train_padded[index, PAD:-PAD, PAD:-PAD]
        return self.normalize(images), self.train_labels[index]


def load_data(name: str, data_dir: Path, train_size: int | None = None, seed: int = 0,
              device: torch.device | str = "cpu", dry_run: bool = False) -> Data:
    """A data set by name; `train_size` draws a class-balanced subset by `seed`.

    "auto" is CIFAR-10 if at hand, else shapes, and says so. UsageError for missing or bad data.
    """
    readers = {"folder": read_folder, "shapes": lambda _: draw_shapes()}
    try:
        real = "cifar10" if name == "auto" else name
        arrays = readers[real](data_dir) if real in readers else read_torchvision(real, data_dir)
    except UsageError as error:
        if name != "auto":
            raise
        real, bar = "shapes", "!" * 99
        print(f"{bar}\n!! {error}\n!! Training on the drawn data set 'shapes' instead: its figures "
              f"say nothing about CIFAR-10.\n{bar}", file=sys.stderr)
        arrays = draw_shapes()
    train_x, train_y, test_x, test_y, classes = arrays
    if train_size is not None:
        if not classes <= train_size <= len(train_y):
            raise UsageError(f"--train-size {train_size} should be from {classes} (the classes of "
                             f"{real}) to {len(train_y)} (its training images)")
        keep = balanced_subset(train_y, train_size, seed)
        train_x, train_y = train_x[keep], train_y[keep]
    if dry_run:  # every class, however the images are sorted
        few = [slice(None, None, max(1, len(y) // 64)) for y in (train_y, test_y)]
        train_x, train_y = train_x[few[0]].contiguous(), train_y[few[0]].contiguous()
        test_x, test_y = test_x[few[1]].contiguous(), test_y[few[1]].contiguous()
    pixels = train_x[::1 + len(train_x) // 10_000].float().div(255).flatten(0, 2)
    measured = pixels.mean(0), pixels.std(0).clamp_min(1e-3)
    mean, std = map(torch.tensor, PUBLISHED[real]) if real in PUBLISHED else measured
    fingerprint = 0
    for part in (train_x, train_y, test_x, test_y):
        fingerprint = zlib.crc32(part.numpy(), fingerprint)
    train_x = F.pad(train_x, (0, 0, PAD, PAD, PAD, PAD))
    parts = (part.to(device) for part in (train_x, train_y, test_x, test_y, mean, std))
    return Data(real, classes, *parts, fingerprint)


def balanced_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices of `size` random examples, the classes as equal in number as the data allows."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels.numpy()[order]
    rank = np.empty(len(labels), np.int64)  # how many of its class come earlier
    for c in np.unique(shuffled):
        rank[shuffled == c] = np.arange((shuffled == c).sum())
    return torch.from_numpy(np.sort(order[np.argsort(rank, kind="stable")[:size]]))


def import_torchvision():
    """torchvision, also where its compiled operators do not fit the installed torch: a CPU torch
    beside the usual wheel lacks two box operators, which nothing here uses. Declare, try again."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import_torchvision.library = library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether `url` answers in time; asked in a thread, as looking up a name knows no time-out."""
    def ask():
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            answers.append(url)
        except (OSError, ValueError):
            return  # whatever the reason, it cannot be reached

    answers, thread = [], threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def read_torchvision(name: str, data_dir: Path) -> tuple:
    """cifar10, cifar100 or fashion_mnist, which torchvision downloads and verifies."""
    datasets = import_torchvision().datasets
    kind, url = {"cifar10": (datasets.CIFAR10, datasets.CIFAR10.url),
                 "cifar100": (datasets.CIFAR100, datasets.CIFAR100.url),
                 "fashion_mnist": (datasets.FashionMNIST, datasets.FashionMNIST.mirrors[0])}[name]
    try:
        parts = [kind(data_dir, train) for train in (True, False)]
    except (ValueError, AssertionError, EOFError) as error:  # there, but not what it should be
        raise UsageError(f"{name} in {data_dir} is damaged ({error}); delete it") from None
    except RuntimeError:  # not there, or not whole
        if not reachable(url):
            raise UsageError(f"{name} is not in {data_dir} and its host cannot be reached; "
                             "--dataset shapes needs neither") from None
        socket.setdefaulttimeout(15)  # a download that stalls should fail, not hang
        try:
            parts = [kind(data_dir, train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{name} could not be downloaded: {error}") from None
    out = []
    for part in parts:
        images = torch.as_tensor(part.data).contiguous()  # CIFAR's is a transposed view
        if images.dim() == 3:  # grey, 28 x 28: centred on 32 x 32, three equal channels
            images = F.pad(images, (2, 2, 2, 2))[..., None].repeat(1, 1, 1, 3)
        out += [images, torch.as_tensor(part.targets)]
    return *out, len(parts[0].classes)


def read_image(path: str) -> np.ndarray:
    """Any image as uint8 32 x 32 x 3; 16 bits of grey are scaled, where PIL alone would cut."""
    from PIL import Image  # what torchvision reads images with

    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("its pixels are floating-point, whose black and white are not known")
        if image.mode.startswith("I"):
            grey = np.asarray(image)
            image = Image.fromarray((grey // (257 if grey.max() > 255 else 1)).astype(np.uint8))
        image = image.convert("RGB")
        return np.asarray(image if image.size == (32, 32) else image.resize((32, 32)))


def read_folder(data_dir: Path) -> tuple:
    """DIR/train/<class>/* and DIR/test/<class>/*: the image formats that torchvision's ImageFolder
    takes, by their endings; resized to 32 x 32."""
    datasets, out, classes = import_torchvision().datasets, [], []
    for part in ("train", "test"):
        try:
            folder = datasets.ImageFolder(data_dir / part)
        except OSError as error:
            raise UsageError(f"--data-dir {data_dir} should hold train/<class>/* and "
                             f"test/<class>/*: {str(error).splitlines()[0]}") from None
        images = np.empty((len(folder), 32, 32, 3), np.uint8)
        for i, (path, _) in enumerate(folder.samples):
            try:
                images[i] = read_image(path)
            except Exception as error:  # PIL raises many kinds for a damaged image
                raise UsageError(f"{path} cannot be read as an image: {error}") from None
        classes.append(folder.classes)
        out += [torch.from_numpy(images), torch.tensor(folder.targets)]
    if classes[0] != classes[1] or len(classes[0]) < 2:
        odd = sorted(set(classes[0]) ^ set(classes[1])) or classes[0]
        raise UsageError(f"{data_dir} should have the same classes, two or more, in train and in "
                         f"test; look at {', '.join(odd[:5])}")
    return *out, len(classes[0])


def polygon(x: np.ndarray, y: np.ndarray, corners: int, apothem: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.max([x * np.cos(a) + y * np.sin(a) for a in angles], axis=0) - apothem


def box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


SHAPES = {  # signed distance to a shape of about unit size, negative inside
    "disk": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.2,
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "bar": lambda x, y: box(x, y, 1.0, 0.35),
    "cross": lambda x, y: np.minimum(box(x, y, 0.95, 0.27), box(x, y, 0.27, 0.95)),
    "triangle": lambda x, y: polygon(x, y, 3, 0.5),
    "hexagon": lambda x, y: polygon(x, y, 6, 0.8),
    "star": lambda x, y: np.hypot(x, y) - 0.7 - 0.3 * np.cos(5 * np.arctan2(y, x)),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y)),
    "dumbbell": lambda x, y: np.hypot(np.abs(x) - 0.6, y) - 0.4}


def draw_shapes(train: int = 3200, test: int = 1000, seed: int = 0) -> tuple:
    """Ten drawn shapes of random place, size, turn and colour over clutter and noise; the classes
    in equal shares. Deterministic in `seed`, needs no download."""
    rng, count, pixel = np.random.default_rng(seed), train + test, np.arange(32, dtype=np.float32)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def draw(image, kinds, size, low, high):
        """Lay one shape of kind kinds[i] and of a random colour over image[i]."""
        size, turn, cx, cy = uniform(*size, 1, 1), uniform(0, 2 * np.pi, 1, 1), *(
            uniform(11, 20, 1, 1) for _ in range(2))
        dx, dy = (pixel[None, None, :] - cx) / size, (pixel[None, :, None] - cy) / size
        x, y = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        cover = np.empty((count, 32, 32), np.float32)
        for k, distance in enumerate(SHAPES.values()):
            of = kinds == k
            cover[of] = np.clip(0.5 - distance(x[of], y[of]) * size[of], 0, 1)  # soft, 1 pixel wide
        return image + cover[..., None] * (uniform(low, high, 1, 1, 3) - image)

    labels = rng.permutation(np.arange(count) % len(SHAPES))
    tilt = (pixel[:, None, None] - 15.5) / 32
    image = uniform(0, 0.5, 1, 1, 3) + tilt * uniform(-0.4, 0.4, 1, 1, 3) + np.zeros((32, 1), "f")
    image = draw(image, rng.integers(0, len(SHAPES), count), (2, 4), 0.2, 0.8)  # clutter
    image = draw(image, labels, (6, 11), 0.4, 1)
    image = image + rng.normal(0, 0.04, image.shape).astype(np.float32)
    images = torch.from_numpy(np.clip(image * 255, 0, 255).astype(np.uint8))
    labels = torch.from_numpy(labels)
    return images[:train], labels[:train], images[train:], labels[train:], len(SHAPES)

# ------------------------------------------------------------------------------------- 3. Models


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network for N x 3 x 32 x 32: a stem, then stages of blocks, each twice as wide."""

    def __init__(self, stages: list[int], classes: int, width: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for i, count in enumerate(stages):
            for j in range(count):
                blocks.append(Block(inputs, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                inputs = width * 2**i
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu_(self.bn(self.conv(x)))).mean((2, 3)))


class Product(nn.Module):
    """a @ b of two features, as a module for `quantize` to replace."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Attention(nn.Module):
    """Self-attention over N x T x width; each matrix product is a module of its own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.scores, self.mix = Product(), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))
        weights = (self.scores(q, k.transpose(2, 3)) * q.shape[3] ** -0.5).softmax(3)
        return self.proj(self.mix(weights, v).transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x)))): N x T x width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer for N x 3 x 32 x 32: 64 patches of 4 x 4, their mean classified. DeiT-Ti
    has this width and these heads, depth 12 and a class token."""

    def __init__(self, classes: int, depth: int = 4, width: int = 192, heads: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(self.blocks(x)).mean(1))


def mobilenet_v1(classes: int) -> nn.Sequential:
    """MobileNet (Howard et al. 2017, table 1): 3 x 3 convolutions of each channel apart, then
    1 x 1; batch norm and ReLU after each. Its first stride, of 2, is 1 for 32 x 32 images."""
    def unit(inputs, outputs, size, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

    layers, inputs = [*unit(3, 32, 3)], 32
    for outputs, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
                            *[(512, 1)] * 5, (1024, 2), (1024, 1)]:
        layers += [*unit(inputs, inputs, 3, stride, inputs), *unit(inputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))


def build_model(name: str, classes: int, depth: int = 4) -> nn.Module:
    """A network for N x 3 x 32 x 32 images, freshly initialised from torch's global generator."""
    if name == "vit_tiny":
        return ViT(classes, depth)
    if name == "resnet8":  # MLPerf Tiny, 78 k parameters
        return CifarResNet([1, 1, 1], classes)
    if name == "resnet20":  # He et al. 2016, section 4.2, with 1 x 1 convolutions as shortcuts
        return CifarResNet([3, 3, 3], classes)
    if name == "mobilenet_v1":
        return mobilenet_v1(classes)
    models = import_torchvision().models
    if name == "mobilenet_v2":  # the usual strides for 32 x 32 images: two of five are left out
        model = models.mobilenet_v2(num_classes=classes, dropout=0.0)
        model.features[0][0].stride = model.features[2].conv[1][0].stride = (1, 1)
        return model
    kind = {"resnet18": models.resnet18, "resnet50": models.resnet50}[name]
    # Blocks start as the identity: else FP_LR first throws a ResNet-50 far off.
    model = kind(num_classes=classes, zero_init_residual=True)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the usual stem for 32 x 32 images
    model.maxpool = nn.Identity()
    return model


FP_LR, FP_WARMUP, FP_DECAY = 0.2, 0.1, 1e-4  # peak rate per 128 images, share of rising steps
VIT_LR, VIT_DECAY = 1e-3, 0.05  # the same for vit_tiny, which wants AdamW


def fp_optimizer(args: argparse.Namespace, data: Data,
                 model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """(optimizer, peak learning rate) of full-precision training: Nesterov SGD, or AdamW."""
    images = min(args.batch_size, len(data.train_labels))
    if args.model == "vit_tiny":
        lr = VIT_LR * images / 128
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=VIT_DECAY), lr
    lr = FP_LR * images / 128
    return sgd(model, lr, FP_DECAY, nesterov=True), lr


def full_precision(args: argparse.Namespace, data: Data) -> tuple[nn.Module, dict]:
    """The full-precision network in eval mode and its result. Trained once: the checkpoint names
    all that made it, so that seeds, methods and scripts share it and other settings do not."""
    header = {"model": args.model, "dataset": data.name, "data": data.fingerprint,
              "pad": PAD, "fp_seed": args.fp_seed, "fp_epochs": args.fp_epochs, "lr": FP_LR,
              "warmup": FP_WARMUP, "batch_size": args.batch_size, "decay": FP_DECAY}
    if args.model == "vit_tiny":
        header |= {"lr": VIT_LR, "decay": VIT_DECAY, "depth": args.depth}
    torch.manual_seed(args.fp_seed)
    model = build_model(args.model, data.classes, args.depth)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer, lr = fp_optimizer(args, data, model)
    run = Run(args, data, model, optimizer, "fp", args.fp_seed, args.fp_epochs, lr, FP_WARMUP,
              header)
    for _ in run.epochs():
        for images, labels in run.batches():
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    return model.eval(), run.finish(32, 32)


# ------------- 4. Quantizers. 4a: LSQ (Esser et al. 2020) with a fixed zero point (FPQ, Eq. 3-5)

TINY = 1e-12  # no step is smaller: keeps x / s finite should a step be exactly 0


class FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with both gradients in few passes over memory."""

    @staticmethod
    def forward(ctx, x, step, zero_point, qmin, qmax, grad_scale):
        x_int = (x / step).round_()
        if zero_point is None:
            x_hat = x_int.clamp_(qmin, qmax).mul_(step)
        else:
            x_hat = x_int.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(step)  # Eq. 3
        ctx.save_for_backward(x, x_hat, step, zero_point)
        ctx.bounds, ctx.grad_scale = (float(qmin), float(qmax)), grad_scale
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        x, x_hat, step, zero_point = ctx.saved_tensors
        # dL/dx: the derivative of a hard tanh, one pass where a mask of booleans takes five. Its
        # result takes the place of v, unless a second derivative is wanted, which still needs v (or
        # on MPS, where older systems lose what is written to a channels_last tensor).
        v = x / step
        if zero_point is not None:
            v.add_(zero_point)
        keep = torch.is_grad_enabled() or x.device.type == "mps"
        place = {} if keep else {"grad_input": v}
        grad_x = torch.ops.aten.hardtanh_backward(grad, v, *ctx.bounds, **place)
        # dL/ds = (<grad, x_hat> - <grad_x, x>) / s, as x_hat = round(v) s inside and Qn s or Qp s
        # outside: two inner products in place of a tensor of derivatives.
        if step.numel() == 1:
            flat = [in_memory_order(t, x) for t in (grad, x_hat, grad_x, x)]
            grad_step = (torch.dot(*flat[:2]) - torch.dot(*flat[2:])).reshape(step.shape)
        else:
            grad_step = (grad * x_hat - grad_x * x).sum_to_size(step.shape)
        return grad_x, grad_step * (ctx.grad_scale / step), None, None, None, None


def in_memory_order(t: Tensor, like: Tensor) -> Tensor:
    """t as a vector, in the order in which `like` lies in memory: a view if both lie alike."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (t.permute(0, 2, 3, 1) if channels_last else t).reshape(-1)


def fake_quantize(x: Tensor, step: Tensor, zero_point: Tensor | float, qmin: int, qmax: int,
                  grad_scale: float = 1.0) -> Tensor:
    """Quantize and de-quantize (FPQ Eq. 3) with the gradients of LSQ (its Eq. 3 and 5).

        x_hat     = (clip(round(x/s) + z, q_min, q_max) - z) * s
        dx_hat/dx = 1 if q_min < x/s + z < q_max else 0
        dx_hat/ds = round(v) - v inside, Qn below, Qp above; v = x/s, Qn = q_min - z, Qp = q_max - z

    step (> 0) and zero_point (integers, fixed) broadcast against x; grad_scale multiplies dL/ds.
    The mask is on the value before rounding. Twice differentiable, unless compiled. A zero_point
    that is a number costs three passes over x less: it goes into the bounds, as
    clip(n + z, a, b) - z = clip(n, a - z, b - z).
    """
    if x.dtype in (torch.float16, torch.bfloat16):  # whose sums would be too coarse
        return fake_quantize(x.float(), step, zero_point, qmin, qmax, grad_scale).to(x.dtype)
    if not isinstance(zero_point, Tensor):
        qmin, qmax, zero_point = qmin - zero_point, qmax - zero_point, None
    if COMPILED and step.numel() == 1 and x.requires_grad and torch.is_grad_enabled():
        step = scale_gradient(step, grad_scale)
        shift = 0 if zero_point is None else zero_point
        low, high = (torch.full((), float(q), device=x.device) - shift for q in (qmin, qmax))
        return COMPILED[0](x, step, low, high)  # tensors: new numbers would mean to compile anew
    return FakeQuantize.apply(x, step, zero_point, qmin, qmax, grad_scale)


def scale_gradient(t: Tensor, scale: float) -> Tensor:
    """t, whose gradient is multiplied by `scale`."""
    scaled = t * scale
    return t.detach() + (scaled - scaled.detach())  # the difference is 0, exactly


COMPILED = []  # the compiled `straight_through` while `use_compiled(True)` holds


def straight_through(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`fake_quantize` out of elementary operations, for a compiler to fuse: one pass each way."""
    v = torch.clamp(x / step, low, high)
    return (v + (v.round() - v).detach()) * step


def use_compiled(on: bool, device: torch.device | str = "cpu") -> bool:
    """Compile `fake_quantize` and nothing else, so hooks and methods stay eager; True if it worked.
    Results agree with eager ones to rounding, but for values exactly on a bound of the grid, whose
    gradient passes. Without a compiler: one line, and eager it stays."""
    if on and not hasattr(use_compiled, "function"):
        use_compiled.function = torch.compile(straight_through, dynamic=True)
        x = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
        try:
            bounds = torch.tensor([1.0, 0.0, 3.0], device=device)
            use_compiled.function(x, *bounds).sum().backward()
        except Exception as error:  # whatever the compiler's trouble, eager works
            print(f"--compile: running eager, as nothing can be compiled here "
                  f"({type(error).__name__})", file=sys.stderr)
            use_compiled.function = None
    function = getattr(use_compiled, "function", None)
    COMPILED[:] = [function] if on and function else []
    return bool(COMPILED)


class Quantizer(nn.Module):
    """A learned step and a fixed zero point, for a tensor or for each of its `channels` (dim 0).

    bits: 1 to 8. The grid is [0, 2^bits - 1] with a zero point from the data, or signed around 0 if
    `symmetric`. step is NaN until calibrated; only its magnitude counts, so it may cross zero.
    One bit per channel, of a weight, means -s/2 or s/2 [choice]: of two levels that include 0, one
    sign would be lost. It is the grid of Eq. 3 with z = 1, half a step up. One bit per tensor
    means 0 or s.
    """

    def __init__(self, bits: int, symmetric: bool = False, channels: int | None = None):
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits should be from 1 to 8, not {bits}")
        self.bits, self.symmetric, self.channels = bits, symmetric, channels
        self.centred = bits == 1 and channels is not None
        self.qmin = -(2 ** (bits - 1)) if symmetric else 0
        self.qmax = self.qmin + 2**bits - 1
        shape = () if channels is None else (channels,)
        self.step = nn.Parameter(torch.full(shape, math.nan))
        self.register_buffer("zero_point", torch.zeros(shape))
        self.zero = None  # zero_point as `fake_quantize` takes it, once seen to be calibrated
        self.register_load_state_dict_post_hook(Quantizer.forget)

    def forget(self, *_) -> None:
        self.zero = None

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(|step|, zero point), shaped to broadcast against x."""
        shape = [-1] + [1] * (x.dim() - 1) if self.channels else []
        return self.step.abs().clamp_min(TINY).reshape(shape), self.zero_point.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        step, zero_point = self.grid(x)
        if self.zero is None:
            if self.step.isnan().any():
                raise RuntimeError("quantizer without a step: call common.calibrate first")
            self.zero = zero_point.tolist()
        zero = zero_point if self.channels else self.zero
        # LSQ's gradient scale 1 / sqrt(N q_max), N the elements that share a step.
        scale = (x.numel() / self.step.numel() * max(self.qmax, 1)) ** -0.5
        if self.centred:
            step = scale_gradient(step, scale)
            return fake_quantize(x - step / 2, step, zero, self.qmin, self.qmax) + step / 2
        return fake_quantize(x, step, zero, self.qmin, self.qmax, scale)

    @torch.no_grad()
    def initialize(self, x: Tensor, candidates: int = 100) -> None:
        """Step and zero point from data by Eq. 4-5, on the range a [x_min, x_max] that quantizes x
        with the least squared error [choice; the paper's is a = 1, `candidates` = 1].

            s = a (x_max - x_min) / (2^q - 1)       Eq. 4
            z = round(q_max - a x_max / s)          Eq. 5

        The range is widened to hold 0 [choice], which padding and zeros after a ReLU need exactly.
        """
        rows = x.reshape(self.channels or 1, -1)
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        if self.symmetric or self.centred:
            high = torch.maximum(-low, high)
            low = -high
        step = (high - low) / (self.qmax - self.qmin)  # Eq. 4
        # A channel of zeros has no range: it takes the largest step of the others, or 1.
        step = torch.where(step > TINY, step, step.max() if step.max() > TINY else step + 1)
        zero = (self.qmax - high / step).round() * (not self.symmetric)  # Eq. 5
        zero = torch.ones_like(zero) if self.centred else zero
        rows = rows[:, ::rows.shape[1] // 65536 | 1]  # a sample is enough; odd, to meet all columns
        shrink = torch.arange(candidates, 0, -1, device=x.device) / candidates  # ties: the widest
        error = []
        for a in shrink:
            s = (a * step)[:, None]
            half = s / 2 if self.centred else 0
            x_hat = fake_quantize(rows - half, s, zero[:, None], self.qmin, self.qmax) + half
            error.append((x_hat - rows).square().sum(1))
        error = torch.stack(error)
        self.step.copy_((step * shrink[error.argmin(0)]).reshape(self.step.shape))
        self.zero_point.copy_(zero.reshape(self.step.shape))
        self.forget()

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, scale, zero) with x_hat = (n - zero) * scale bit for bit, n whole numbers."""
        scale, zero = self.grid(x)
        half = 0.5 * self.centred  # a centred grid lies half a step higher
        n = (x / scale - half).round().add(zero).clamp(self.qmin, self.qmax)
        return n, scale, zero - half


# ----------------------------------- 4b. LSQ+ and PACT (--quantizer); a first reading can skip them


def require_calibrated(quantizer: nn.Module, value: Tensor) -> None:
    if not hasattr(quantizer, "seen"):  # looked at once: it means to wait for the device
        if value.isnan().any():
            raise RuntimeError("quantizer without a step: call common.calibrate first")
        quantizer.seen = True


class OffsetQuantizer(nn.Module):
    """LSQ+ (Bhalgat et al. 2020): LSQ whose activations (no `channels`) have a learned offset beta,
    and whose weights have a signed grid, n = -2^(q-1) to 2^(q-1) - 1.

        x_hat = clip(round((x - beta) / s), 0, 2^q - 1) s + beta     w_hat = clip(round(w / s)) s
        dx_hat/dbeta = 0 within the grid, 1 outside                  dx_hat/ds: LSQ's

    Initial values are the paper's: s = max|mean -+ 3 deviations| / 2^(q-1) of each channel of a
    weight; of an activation, s and beta of the least squared error. Beta's gradient has the step's
    scale [choice].
    """

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        self.bits, self.channels = bits, channels
        self.qmin = -(2 ** (bits - 1)) if channels else 0
        self.qmax = self.qmin + 2**bits - 1
        self.step = nn.Parameter(torch.full((channels,) if channels else (), math.nan))
        self.offset = None if channels else nn.Parameter(torch.tensor(math.nan))

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        step = self.step.abs().clamp_min(TINY)
        if self.channels:
            return step.reshape([-1] + [1] * (x.dim() - 1)), step.new_zeros(())
        return step, -self.offset / step

    def forward(self, x: Tensor) -> Tensor:
        require_calibrated(self, self.step)
        step, scale = self.grid(x)[0], (x.numel() / self.step.numel() * max(self.qmax, 1)) ** -0.5
        if self.channels:
            return fake_quantize(x, step, 0, self.qmin, self.qmax, scale)
        beta = scale_gradient(self.offset, scale)
        return fake_quantize(x - beta, step, 0, self.qmin, self.qmax, scale) + beta

    @torch.no_grad()
    def initialize(self, x: Tensor, candidates: int = 100) -> None:
        """From data. The least squared error is sought from LSQ's start on, fitting s and beta by
        least squares and rounding anew in turn [choice]."""
        if self.channels:
            rows = x.flatten(1)
            mean, reach = rows.mean(1), 3 * rows.std(1, correction=0)
            step = torch.maximum((mean - reach).abs(), (mean + reach).abs()) / 2 ** (self.bits - 1)
            step = torch.where(step > TINY, step, step.max() if step.max() > TINY else step + 1)
            self.step.copy_(step)
            return
        start = Quantizer(self.bits).to(x.device)
        start.initialize(x, candidates)
        step, beta = start.step.detach().clone(), -start.zero_point * start.step
        sample = x.flatten()[::x.numel() // 65536 | 1]
        for _ in range(20):
            n = ((sample - beta) / step).round().clamp(0, self.qmax)
            spread = n.var(correction=0)
            fitted = ((n * sample).mean() - n.mean() * sample.mean()) / spread
            step = torch.where((spread > 0) & (fitted > TINY), fitted, step)
            beta = sample.mean() - step * n.mean()
        self.step.copy_(step)
        self.offset.copy_(beta)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step, zero = self.grid(x)
        return (x / step + zero).round().clamp(self.qmin, self.qmax), step, zero


class ClipQuantizer(nn.Module):
    """PACT (Choi et al. 2018), of activations: the clip alpha is learned, by values beyond it only.

        x_hat = round(clip(x, 0, alpha) / s) s,   s = alpha / (2^q - 1)
        dx_hat/dalpha = 1 if x >= alpha else 0

    Weight decay, which the paper gives alpha as it does weights, is all that makes it smaller.
    Where the data have negative values (images, tokens), which the paper does not know, a zero
    point as LSQ's moves the grid: clip(x, -z s, alpha), s = alpha / (2^q - 1 - z) [choice]. alpha
    starts as LSQ's range does [choice; theirs starts high, from scratch].
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits, self.channels, self.qmin, self.qmax = bits, None, 0, 2**bits - 1
        self.alpha = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("zero_point", torch.tensor(0.0))

    @property
    def step(self) -> Tensor:
        return self.alpha.abs().clamp_min(TINY) / (self.qmax - self.zero_point)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.step, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        require_calibrated(self, self.alpha)
        high, step = self.alpha.abs().clamp_min(TINY), self.step.detach()
        low = -self.zero_point * high / (self.qmax - self.zero_point)
        clipped = torch.where(x >= high, high, torch.where(x <= low, low, x))
        return clipped + ((clipped / step).round() * step - clipped).detach()

    @torch.no_grad()
    def initialize(self, x: Tensor, candidates: int = 100) -> None:
        start = Quantizer(self.bits).to(x.device)
        start.initialize(x, candidates)
        zero = start.zero_point.clamp_max(self.qmax - 1)  # all negative: still a clip above 0
        self.zero_point.copy_(zero)
        self.alpha.copy_(start.step * (self.qmax - zero))


class TanhQuantizer(nn.Module):
    """PACT's weights are those of DoReFa (Zhou et al. 2016); nothing is learned but w:

        w_hat = m (2 n / (2^q - 1) - 1),   n = round((2^q - 1) (tanh w / (2 max|tanh w|) + 1/2))

    per output channel [choice]. m is max|w|, constant in the gradient [choice]: theirs is 1, which
    suits training from scratch, but takes a pretrained layer without batch norm out of its scale.
    One bit: m = mean|w|, theirs.
    """

    def __init__(self, bits: int, channels: int):
        super().__init__()
        self.bits, self.channels, self.qmin, self.qmax = bits, channels, 0, 2**bits - 1

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor]:
        size = w.detach().flatten(1).abs()
        m = size.mean(1) if self.bits == 1 else size.amax(1)
        m = m.clamp_min(TINY).reshape([-1] + [1] * (w.dim() - 1))
        return 2 / self.qmax * m, torch.full_like(m, self.qmax / 2)

    def integers(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        most = w.detach().flatten(1).abs().amax(1).clamp_min(TINY)
        unit = w.tanh() / most.tanh().reshape([-1] + [1] * (w.dim() - 1))  # max|tanh| = tanh max
        level = self.qmax * (unit / 2 + 0.5)
        return level + (level.round() - level).detach(), *self.grid(w)

    def forward(self, w: Tensor) -> Tensor:
        n, scale, zero = self.integers(w)
        return (n - zero) * scale

    def initialize(self, w: Tensor, candidates: int = 100) -> None:
        """Nothing to take from data."""


# ------------------------------------------------------------------------ 4c. Layers and networks


def make_quantizer(method: str, bits: int, channels: int | None = None) -> nn.Module:
    """Of a weight of `channels` output channels, or of an activation; method: one of QUANTIZERS."""
    if method not in QUANTIZERS:
        raise ValueError(f"method should be one of {', '.join(QUANTIZERS)}, not {method!r}")
    if method == "pact":
        return TanhQuantizer(bits, channels) if channels else ClipQuantizer(bits)
    if method == "lsq+" and not (channels and bits == 1):  # signed, one bit would be -s and 0
        return OffsetQuantizer(bits, channels)
    return Quantizer(bits, channels=channels)


class QuantConv2d(nn.Module):
    """Convolution with quantized input and weight; takes over the parameters of `conv`."""

    def __init__(self, conv: nn.Conv2d, wbits: int, abits: int, method: str = "lsq"):
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode should be 'zeros', not {conv.padding_mode!r}")
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        self.input_quantizer = make_quantizer(method, abits)
        self.weight_quantizer = make_quantizer(method, wbits, conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias,
                        *self.geometry)


class QuantLinear(nn.Module):
    """Linear layer with quantized input and weight; takes over the parameters of `linear`."""

    def __init__(self, linear: nn.Linear, wbits: int, abits: int, method: str = "lsq"):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = make_quantizer(method, abits)
        self.weight_quantizer = make_quantizer(method, wbits, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantProduct(nn.Module):
    """`Product` of two quantized features."""

    def __init__(self, abits: int, method: str = "lsq"):
        super().__init__()
        self.a_quantizer, self.b_quantizer = (make_quantizer(method, abits) for _ in "ab")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a_quantizer(a) @ self.b_quantizer(b)


def product_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by a weight, quantized or not, by name in order of definition."""
    kinds = (nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


@torch.no_grad()
def layers_on_the_way(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """Names of the Conv2d and Linear layers in the order in which `example`, by default a black
    1 x 3 x 32 x 32 image, comes to them. Layers that it does not come to are not among them."""
    probe, order = copy.deepcopy(model).eval(), []
    for name, layer in product_layers(probe).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: order.append(name))
    if example is None:
        like = next(probe.parameters())
        example = torch.zeros(1, 3, 32, 32, device=like.device, dtype=like.dtype)
    try:
        probe(example)
    except RuntimeError as error:
        raise ValueError(f"the model cannot take {tuple(example.shape)} ({error}); give `example`, "
                         "an input that shows the way through its layers") from None
    return list(dict.fromkeys(order))


def quantize(model: nn.Module, wbits: int, abits: int, method: str = "lsq",
             example: Tensor | None = None) -> nn.Module:
    """A copy of `model` in which every Conv2d and Linear quantizes input and weight, the first and
    the last on the way of `example` at 8 bits, and every Product its two operands. method: one of
    QUANTIZERS. Steps exist, for an optimizer to hold, but are NaN until `calibrate`. Warns of
    layers with weights that stay in full precision: of other kinds (or with a weight computed from
    others, as by weight_norm), or not come to."""
    model, order = copy.deepcopy(model), layers_on_the_way(model, example)
    modules = {name: m for name, m in model.named_modules()}
    new = {}
    for name, module in modules.items():
        if isinstance(module, Product):
            new[module] = QuantProduct(abits, method).to(next(model.parameters()).device)
        elif name in order and type(module).forward in (
                nn.Conv2d.forward, nn.Linear.forward) and isinstance(module.weight, nn.Parameter):
            ends = name in (order[0], order[-1])
            kind = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            new[module] = kind(module, *(8, 8) if ends else (wbits, abits), method).to(
                module.weight.device)
    left = [f"{name} ({type(m).__name__})" for name, m in modules.items() if m not in new and (
        name in product_layers(model) or any(
            "weight" in n and p.dim() > 1 for n, p in m.named_parameters(recurse=False)))]
    if left:
        warnings.warn(f"left in full precision: {', '.join(left)}", stacklevel=2)
    if model in new:  # a single layer
        return new[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):  # one may have two names
        if module in new:
            model.set_submodule(name, new[module])
    return model


@torch.no_grad()
def calibrate(qmodel: nn.Module, images: Tensor, candidates: int = 100,
              batch_stats: bool = True) -> None:
    """Set steps and zero points from one pass of `images` (the paper takes 100), layer by layer,
    each layer seeing its input as the quantized layers before it make it. `candidates`: 1 takes
    the range of the data, more search for the one of least error (see `Quantizer.initialize`).

    Batch norm normalises by these images, as in the training to come [choice]. By its running
    statistics, those of full precision, deep networks of few bits start with quantizers far from
    what they meet in training; `batch_stats=False` takes them, for a network not to be trained any
    more. Neither changes them.
    """
    def before(quantizer, inputs):
        quantizer.initialize(inputs[0], candidates)

    training = qmodel.training
    norms = [m for m in qmodel.eval().modules() if batch_stats
             and isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in norms:
        m.training, m.track_running_stats = True, False
    hooks = [m.register_forward_pre_hook(before) for m in qmodel.modules()
             if isinstance(m, (Quantizer, OffsetQuantizer, ClipQuantizer, TanhQuantizer))]
    try:
        qmodel(images)
    finally:
        for hook in hooks:
            hook.remove()
        for m in norms:
            m.track_running_stats = True
        qmodel.train(training)


@torch.no_grad()
def export_int(qmodel: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{layer: (weight as int8, scale, zero point)}; (weight - zero point) * scale is bit-equal to
    what the network multiplies by. Scale and zero point broadcast against the weight."""
    integers = {}
    for name, layer in product_layers(qmodel).items():
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            n, scale, zero = layer.weight_quantizer.integers(layer.weight)
            shift = 0 if layer.weight_quantizer.qmin < 0 else 2 ** (layer.weight_quantizer.bits - 1)
            integers[name] = (n - shift).to(torch.int8), scale, zero - shift  # -128 to 127
    return integers


# -------------------------------------------------------------------- 5. Evaluation and flatness


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, batch_size: int = 500) -> tuple[float, float]:
    """(accuracy in %, mean cross-entropy) on the test images; leaves training mode as it was."""
    training, n = model.training, len(data.test_labels)
    model.eval()
    sums = torch.zeros(2, device=data.test_labels.device)
    for images, labels in zip(*(t.split(batch_size) for t in (data.test_images, data.test_labels))):
        logits = model(data.normalize(images))
        sums += torch.stack([(logits.argmax(1) == labels).sum(),
                             F.cross_entropy(logits, labels, reduction="sum")])
    model.train(training)
    correct, loss = sums.tolist()
    return 100 * correct / n, loss / n


def hessian_vector(loss_fn: Callable[[], Tensor], params: list[Tensor]) -> Callable:
    """v -> H v, H the Hessian of loss_fn() in `params`; on a quantized network that of its
    straight-through gradients. Leaves .grad alone; the graph goes with the returned function."""
    was, COMPILED[:] = COMPILED[:], []  # compiled code has no second derivative
    try:
        grads = torch.autograd.grad(loss_fn(), params, create_graph=True, materialize_grads=True)
    finally:
        COMPILED[:] = was
    return lambda v: torch.autograd.grad(grads, params, v, retain_graph=True,
                                         materialize_grads=True)


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def hessian_trace(loss_fn: Callable[[], Tensor], params: list[Tensor], probes: int,
                  generator: torch.Generator | None = None) -> tuple[float, float]:
    """Tr(H), which Eq. 7 says noise penalises, by Hutchinson: (mean, its standard error) of v.Hv
    over `probes` >= 2 random sign vectors v."""
    product, samples = hessian_vector(loss_fn, params), []
    for _ in range(probes):
        v = [torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1
             for p in params]
        samples.append(dot(v, product(v)))
    samples = torch.stack(samples)
    return samples.mean().item(), samples.std().item() / math.sqrt(probes)


def weight_hessian_trace(model: nn.Module, data: Data) -> tuple[float, float]:
    """Trace of the Hessian of the loss on 256 training images in the layers' weights, batch
    norm in eval mode: (estimate, standard error) from 8 probes."""
    images, labels = data.sample(256)
    weights = [layer.weight for layer in product_layers(model).values()]
    training = model.training
    model.eval()
    probes = torch.Generator(device=images.device).manual_seed(0)
    trace = hessian_trace(lambda: F.cross_entropy(model(images), labels), weights, 8, probes)
    model.train(training)
    return trace


def hessian_top_eigenvalue(loss_fn: Callable[[], Tensor], params: list[Tensor], iters: int,
                           generator: torch.Generator | None = None) -> float:
    """The Hessian eigenvalue of largest magnitude, by `iters` steps of power iteration."""
    product = hessian_vector(loss_fn, params)
    v = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in params]
    for _ in range(iters):
        norm = dot(v, v).sqrt().clamp_min(TINY)
        v = [x / norm for x in v]
        hv = product(v)
        eigenvalue, v = dot(v, hv), hv  # the Rayleigh quotient, as |v| = 1
    return eigenvalue.item()
