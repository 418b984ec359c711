"""DNQ: a flat network before it is quantized. Xia, Pang, Cai, "Efficiently Training A Flat Neural
Network Before It has been Quantizated", arXiv 2511.01462.

The idea. Post-training quantization (PTQ) moves a finished network by its rounding errors. They do
little harm where the loss is flat, so one trains for flatness in full precision. Differential
Noise-driven Quantization (DNQ) measures the errors that weights and activations will have at the
bits aimed for, and models both as independent Gaussian noise. It trains under fresh noise of that
size times lambda: on the weights, where it is removed before the next step, and on a random share
of the activations. Stochastic weight averaging (SWA) averages the weights of the last epochs. Then
the network is quantized, by quantizers like those that measured the errors.

Only the abstract of this paper was at hand. The rest follows summaries, and later code and drafts
of the same authors ("authors"); our own decisions are marked [choice].

    symbol                                                                            from
    dW, dx                 quantization_error(t, quantizer)                           authors
    W dx, dW x, the rest   error_decomposition(layer, x): AQE, WQE, cross             authors
    n_t                    DifferentialWeightNoise.injected                           authors
    x + M n                ActivationNoise, M ~ Bernoulli(P), P by --rho and --mask   authors
    r g / |g|              common.SAM.ascended, r by --sam-rho                        Foret 2021
    lambda, its ramp       --noise-lambda, --ramp-epochs                              authors

    python flat_quant.py --bits 4                      plain and flat network, before and after PTQ
    python flat_quant.py --bits 4 --study --measure    every noise, SAM, controls; the errors
"""

import copy
from argparse import Namespace
from contextlib import nullcontext

import common
import torch
import torch.nn.functional as F
from common import SAM, Data, Quantizer, Run, hooked, print_row, shifted, weight_layers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PAPER = {"model": "resnet18", "dataset": "cifar100", "wbits": 2, "abits": 4, "batch_size": 256,
         "fp_lr": 0.015, "fp_weight_decay": 5e-4, "fp_epochs": 120, "ramp_epochs": 20.0, "pad": 4,
         "label_smoothing": 0.1, "swa_rate": 0.01, "noise_lambda": 1.0}
# These are the authors' values. Warm-up, cosine to the held rate and the defaults below: [choice].

WEIGHT_NOISES = ["weight", "additive", "isotropic", "wrong-bits"]
METHODS = ["sgd", *WEIGHT_NOISES, "activation", "weight+activation", "sam"]
PTQ_BITS = [(8, 8), (4, 4), (3, 4), (2, 4), (2, 2)]
PROBES, ITERATIONS = 8, 15  # vectors for the Hessian's trace; steps for its top eigenvalue
FLATNESS = "trace", "trace_error", "top_eigenvalue"  # keys in results; trace_error: standard error


def parse_args() -> Namespace:
    parser = common.base_parser("DNQ: train a flat network, then quantize it. --epochs, --lr and "
                                "--weight-decay have no effect here; --fp-seed draws subsets.")
    number = common.number
    common.add_flags(
        parser, "method",
        ("--method", METHODS, ["sgd", "weight+activation"], "what to train, each also with SWA"),
        ("--noise-lambda", number(float, 0, 1e3), 2.0, "noise relative to the measured error"),
        ("--ramp-epochs", number(float, 0, 1e6), 5.0, "epochs in which noise grows to full size"),
        ("--rho", number(float, 0, 1), 0.5, "share of the activations that get noise"),
        ("--mask", ["uniform", "salience"], "uniform", "noise anywhere, or more in large channels"),
        ("--label-smoothing", number(float, 0, 1), 0.0, "share of a label spread over all classes"),
        ("--swa-rate", number(float, 0, 1), 0.0, "while SWA averages, the learning rate stays at "
                                                 "this share of its peak; 0: a cosine to the end"),
        ("--sam-rho", number(float, 0, 1e3), 0.2, "length of sam's step up the loss"),
        ("--noise-bits", number(int, 2, 8), 8, "bits whose error the control wrong-bits imitates"),
        ("--study", bool, False, "train all methods"),
        ("--measure", bool, False, "print the first method's errors by layer; are they Gaussian?"))
    args = common.parse(parser, PAPER)
    args.method = METHODS if args.study else list(dict.fromkeys(args.method))
    return args


# ---------------------------------------------------------------------------- measuring the errors


def quantization_error(t: Tensor, quantizer: Quantizer) -> Tensor:
    """t_hat - t, shaped like t (if per channel, of dim 0). It first sets the quantizer from t."""
    quantizer = quantizer.to(t.device)
    quantizer.initialize(t)
    return quantizer(t) - t


@torch.no_grad()
def error_decomposition(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Activation and weight quantization error (AQE, WQE) in the output of a calibrated quantized
    layer, over ||W x||^2, for a batch x of its inputs; dW = W_hat - W and dx = x_hat - x:

        W_hat x_hat - W x = W dx + dW x + dW dx
        total = ||W_hat x_hat - W x||^2 = AQE + WQE + cross,   AQE = ||W dx||^2,   WQE = ||dW x||^2
        cross = ||dW dx||^2 + 2 (<W dx, dW x> + <W dx, dW dx> + <dW x, dW dx>)
    """
    w, w_hat, x_hat = layer.weight, layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    product = layer.product
    a, b, c = product(x_hat - x, w), product(x, w_hat - w), product(x_hat - x, w_hat - w)
    clean = product(x, w)
    parts = {"AQE": a.square().sum(), "WQE": b.square().sum(),
             "cross": c.square().sum() + 2 * ((a * b).sum() + (a * c).sum() + (b * c).sum()),
             "total": (product(x_hat, w_hat) - clean).square().sum()}
    return {name: (value / clean.square().sum()).item() for name, value in parts.items()}


def excess_kurtosis(t: Tensor) -> float:
    """0 for a Gaussian, -1.2 for the uniform error of fine rounding, -2 for a fair coin."""
    z = (t - t.mean()) / t.std(correction=0).clamp_min(common.TINY)
    return z.pow(4).mean().item() - 3


@torch.no_grad()
def layer_inputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The input of each layer for `images`, in order of definition, in the mode the model is in."""
    inputs = {}
    with hooked(weight_layers(model).values(),
                before=lambda layer, args: inputs.update({layer: args[0]})):
        model(images)
    return [inputs[layer] for layer in weight_layers(model).values()]


def layer_bits(model: nn.Module, bits: int) -> list[int]:
    """`bits` for every layer but the first and the last, which have 8."""
    return [8, *[bits] * (len(weight_layers(model)) - 2), 8]


@torch.no_grad()
def measure(args: Namespace, data: Data, network: nn.Module) -> None:
    """Print the decomposition per layer, and how far the errors are from independent Gaussians."""
    images, quantized = data.sample(100)[0], ptq(args, data, network, args.wbits, args.abits)
    print(f"\n{args.method[0]}, last seed: errors at W{args.wbits}A{args.abits} over ||W x||^2, "
          "and their shape (Gaussian: excess kurtosis 0; independent: correlation 0)")
    print_row("AQE", "WQE", "cross", "total", "kurtosis dW", "kurtosis dx", "corr(dW, W)", "layer")
    for (name, layer), x in zip(weight_layers(quantized).items(), layer_inputs(network, images)):
        w, dw = layer.weight, layer.weight_quantizer(layer.weight) - layer.weight
        shape = (excess_kurtosis(dw), excess_kurtosis(layer.input_quantizer(x) - x),
                 torch.corrcoef(torch.stack([w.flatten(), dw.flatten()]))[0, 1].item())
        print_row(*(f"{v:.4f}" for v in (*error_decomposition(layer, x).values(), *shape)), name)


# ------------------------------------------------------------------------------------- the noises


class DifferentialWeightNoise:
    """Gaussian noise like the weights' quantization error, mean and variance per output channel.
    Step t adds n_t to the weights, takes gradient and step there, and then removes n_t:

        w <- w - lr dL/dw(w + n_t),   n_t = lambda (mu + sigma e),   e ~ N(0, 1)

    For the noisy W = w + n_t that is W <- W - lr dL/dW + n_(t+1) - n_t, hence "differential", or
    Anti-PGD (anticorrelated perturbed gradient descent, Orvieto et al. 2022). mu and sigma are
    measured at the start of each epoch [choice; the authors average over epochs, 0.9 of the old].
    `isotropic` gives all weights zero-mean noise of one variance, and the same sum of squares.
    """

    def __init__(self, model: nn.Module, bits: int, isotropic: bool = False):
        self.weights = [layer.weight for layer in weight_layers(model).values()]
        self.bits, self.isotropic = layer_bits(model, bits), isotropic

    @torch.no_grad()
    def measure(self) -> None:
        """Set .mean and .std, for each layer by output channel, broadcastable."""
        errors = [quantization_error(w, Quantizer(bits, channels=len(w))).flatten(1)
                  for w, bits in zip(self.weights, self.bits)]
        shapes = [[-1] + [1] * (w.dim() - 1) for w in self.weights]
        self.mean = [e.mean(1).reshape(shape) for e, shape in zip(errors, shapes)]
        self.std = [e.std(1, correction=0).reshape(shape) for e, shape in zip(errors, shapes)]
        if self.isotropic:  # the root of the mean square, so the sum of squares stays
            std = (sum(e.square().sum() for e in errors) / sum(e.numel() for e in errors)).sqrt()
            self.mean = [torch.zeros_like(m) for m in self.mean]
            self.std = [std.expand_as(s) for s in self.std]

    def injected(self, strength: float):
        """A context with weights w + n, n fresh. Its end removes n; a step taken within stays."""
        noises = [torch.randn_like(w).mul_(std).add_(mean).mul_(strength)
                  for w, mean, std in zip(self.weights, self.mean, self.std)]
        return shifted(self.weights, noises)


class ActivationNoise:
    """Gaussian noise like the activations' quantization error, by layer input, on a random share of
    the elements (all of them would be too much):

        x <- x + M lambda (mu + sigma e),   M ~ Bernoulli(P), P = `chance`,   e ~ N(0, 1)

    At the input of every layer [choice; the authors: at the outputs of ReLUs], within `injected`;
    not at the products of attention, which have no weights.
    """

    def __init__(self, model: nn.Module, bits: int, rho: float, quantizer: str = "lsq",
                 mask: str = "uniform"):
        self.model, self.rho, self.mask, self.bits = model, rho, mask, layer_bits(model, bits)
        self.quantizer = common.QUANTIZERS[quantizer]

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set .statistics, {layer: (mean, std)}, from `images`, at the start of an epoch. Batch
        norm takes these images' statistics, as its running ones are of the noisy network."""
        inputs = layer_inputs(copy.deepcopy(self.model).train(), images)
        errors = [quantization_error(x, self.quantizer(bits)) for x, bits in zip(inputs, self.bits)]
        self.statistics = {layer: (e.mean(), e.std(correction=0)) for layer, e in zip(
            weight_layers(self.model).values(), errors)}

    def chance(self, x: Tensor) -> Tensor | float:
        """P, the chance that an element of x has noise: rho or, with "salience", by channel

            P = clip(softmax(I) C rho, 0, 1),   I = mean of |x| over space or tokens, C channels

        for each image. The authors also divide I by a temperature, which they set to 1."""
        if self.mask == "uniform":
            return self.rho
        channel, over = {4: (1, (2, 3)), 3: (2, 1), 2: (1, None)}[x.dim()]
        salience = x.abs().mean(over, keepdim=True) if over else x.abs()
        return (salience.softmax(channel) * x.shape[channel] * self.rho).clamp_max(1)

    def perturb(self, x: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
        noise = torch.empty_like(x)
        # Drawing in memory order is eight times as fast on the CPU for channels_last images.
        (noise if noise.is_contiguous() else noise.movedim(1, -1)).normal_()
        noise.mul_(std).add_(mean).mul_(torch.rand_like(x) < self.chance(x))
        return x + noise.mul_(strength)

    def injected(self, strength: float):
        """A context in which every layer's input is perturbed."""
        def before(layer, inputs):
            return self.perturb(inputs[0], *self.statistics[layer], strength)

        return hooked(self.statistics, before=before)


# ----------------------------------------------------------------------------------- the training


def train(args: Namespace, data: Data, method: str, seed: int) -> dict[str, tuple]:
    """One training run from scratch: {method: (network, result), method+swa: ...}. One run gives
    both, as averaging does not touch training; --swa-rate changes the learning rate, and so both.

    "weight" is differential: n_t leaves after the step. "additive" removes it before [choice], so
    that weight decay shrinks w, not w + n_t; without weight decay the two are the same. A zero-mean
    pair, w + n_t and w - n_t in one step, is not built. Controls: "isotropic" has noise of another
    shape, "wrong-bits" noise of 8 bits, so hardly any."""
    parts, on_weights, on_activations = method.split("+"), None, None
    torch.manual_seed(common.random_stream("weights", seed))
    model = common.build_model(args.model, data.classes, args.depth, args.stem)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = common.fp_optimizer(args, model)
    average, sam = AveragedModel(model), SAM(model, args.sam_rho)
    if set(parts) & set(WEIGHT_NOISES) and args.noise_lambda:
        bits = args.noise_bits if "wrong-bits" in parts else args.wbits
        on_weights = DifferentialWeightNoise(model, bits, "isotropic" in parts)
    if "activation" in parts and args.noise_lambda:
        on_activations = ActivationNoise(model, args.abits, args.rho, args.quantizer,
                                         args.mask)
    run = Run(args, data, method, seed, args.fp_epochs, warmup=0.1, model=model,
              optimizer=optimizer, average=average)
    half, steps = args.fp_epochs // 2, data.steps(args.batch_size)

    def backward(images, labels):
        loss = F.cross_entropy(model(images), labels, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        return loss

    for epoch in run.epochs():
        if on_weights:
            on_weights.measure()
        if on_activations:
            on_activations.measure(data.sample(100)[0])
        for images, labels in run.batches():
            if args.swa_rate:  # the cosine then ends where averaging begins
                at, end = run.time * steps, half * steps
                rate = common.cosine_lr(at, end, run.peak, warmup=0.1) if at < end else 0
                for group in optimizer.param_groups:
                    group["lr"] = max(rate, args.swa_rate * run.peak)
            ramp = min(1, run.time / args.ramp_epochs) if args.ramp_epochs else 1
            strength = args.noise_lambda * ramp
            with (on_weights.injected(strength) if on_weights else nullcontext(),
                  on_activations.injected(strength) if on_activations else nullcontext()):
                loss = backward(images, labels)
                if "sam" in parts:
                    with sam.ascended():
                        backward(images, labels)
                if "additive" not in parts:
                    optimizer.step()
            if "additive" in parts:
                optimizer.step()
            run.log(loss=loss)
        if epoch >= half:
            average.update_parameters(model)
    full = {"wbits": 32, "abits": 32, "quantizer": None}
    return {method: (model.eval(), run.finish(**full)),
            f"{method}+swa": (average.module.eval(), run.finish(
                average.module, method=f"{method}+swa", **full))}


# ------------------------------------------------------------------- quantization after training


def ptq(args: Namespace, data: Data, network: nn.Module, wbits: int, abits: int) -> nn.Module:
    """Post-training quantization: weights rounded to nearest, per channel; inputs per tensor, from
    100 training images; first and last layer at 8 bits."""
    quantized = common.quantize(network, wbits, abits, args.quantizer)
    common.calibrate(quantized, data.sample(100)[0], batch_stats=False)
    return quantized.eval()


def quantized_results(args: Namespace, data: Data, network: nn.Module, result: dict) -> list[dict]:
    """Results of `network` after PTQ at the bits asked for and PTQ_BITS, and its flatness before.
    "acc_batch_norm": accuracy with batch norm's statistics of the calibration images [choice]."""
    flatness = dict(zip(FLATNESS, common.sharpness(network, data, PROBES, ITERATIONS)))
    results = []
    for wbits, abits in dict.fromkeys([(args.wbits, args.abits), *PTQ_BITS]):
        quantized = ptq(args, data, network, wbits, abits)
        acc, loss = common.evaluate(quantized, data)
        common.update_bn([data.sample(100)[0]], quantized)
        results.append(common.record(args.out, result | flatness | {
            "quantizer": args.quantizer, "wbits": wbits, "abits": abits, "acc": acc, "loss": loss,
            "acc_batch_norm": common.evaluate(quantized, data)[0]}))
    return results


def ptq_table(results: list[dict], figure: str = "acc") -> str:
    """Mean ± standard error of `figure`, "acc" or "acc_batch_norm" (before PTQ always "acc"), by
    network (row) and bits (column), and of its difference to the first row of the same seed."""
    accs, first = {}, results[0]
    for r in results:
        row = accs.setdefault(r["method"], {})
        row.setdefault((r["wbits"], r["abits"]), {})[r["seed"]] = r.get(figure, r["acc"])
    reference, lines = accs[first["method"]], [
        f"\n{first['dataset']}, {first['train_size']} training images, {first['model']}, augment "
        f"{first['augment']}; {first['split']} accuracy %{', new batch norm' * (figure != 'acc')}, "
        "before and after PTQ, and against the first row", f"{'method':<24}" + "".join(
            f"{f'W{w}A{a}':<30}" for w, a in accs[first["method"]]).replace("W32A32", "FP    ")]
    for method, row in accs.items():
        cells = []
        for bits, acc in row.items():
            gain = [acc[seed] - reference[bits][seed] for seed in acc]
            more = f"  {common.mean_and_error(gain, '+')}" if row is not reference else ""
            cells.append(f"{common.mean_and_error(list(acc.values())) + more:<30}")
        lines.append(f"{method:<24}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    results = []
    for args, seed, data in common.per_seed(parse_args()):
        networks = {}
        for method in args.method:
            networks |= train(args, data, method, seed)
        last = [(result, quantized_results(args, data, network, result))
                for network, result in networks.values()]
        results += [r for result, after in last for r in (result, *after)]
    print(ptq_table(results), ptq_table(results, "acc_batch_norm"), sep="\n")
    print(f"\nlast seed: points lost by PTQ at W{args.wbits}A{args.abits}, flatness before it")
    print_row("method", "drop", *FLATNESS)
    for before, (after, *_) in last:
        print_row(before["method"], *(f"{v:.2f}" for v in (
            before["acc"] - after["acc"], *(after[k] for k in FLATNESS))))
    if args.measure:
        measure(args, data, networks[args.method[0]][0])


if __name__ == "__main__":
    common.entry(main)
