"""DNQ: a flat network before it is quantized. Xia, Pang, Cai, "Efficiently Training A Flat Neural
Network Before It has been Quantizated", arXiv 2511.01462.

The idea. Post-training quantization (PTQ) moves a finished network by its rounding errors; a
network in a flat place of the loss does not mind. So one trains for flatness, in full precision:
  1. measure the errors that weights and activations will make, apart, at the bits aimed for,
  2. model both as independent Gaussian noise,
  3. train under fresh noise of just that size: on the weights, taken out again (differential), and
     on randomly masked activations; average the weights of the last epochs (SWA),
  4. quantize after training, with the very quantizer that measured the errors.

Only the abstract of this paper was at hand; the rest is what summaries and the authors' later work
tell of it, and choices are named.

    symbol                                                                            from
    dW, dx                 quantization_error(t, quantizer)                           authors
    W dx, dW x, the rest   error_decomposition(layer, x): AQE, WQE, cross             authors
    n_t = l (mu + s e)     DifferentialWeightNoise.injected(l)                        authors
    x + M l (mu + s e)     ActivationNoise, M ~ Bernoulli(rho)                        authors
    rho g / |g|            SAM.ascended (Foret et al. 2021)                           ancestor
    lambda, its ramp       --noise-lambda, --ramp-epochs                              choice

    python flat_quant.py --bits 4 --dataset shapes     plain and flat network, quantized; 2 minutes
    python flat_quant.py --bits 4 --study --measure    every noise, SAM, controls; the errors

Measured, 5,000 CIFAR-10 images, resnet8, one seed, W2A4: plain training 62.59 % before and 27.74
after quantization; both noises and SWA 60.31 and 40.53; SAM and SWA 59.68 and 40.44.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Data, QuantConv2d, Run, make_quantizer, product_layers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

PAPER = {"model": "resnet18", "dataset": "cifar100", "wbits": 2, "abits": 4, "batch_size": 256,
         "fp_epochs": 200}  # data set, network and bits are the authors'; batch and epochs a choice

# A method is a sum of pieces: "weight+activation" has both noises. sgd is the plain network.
PIECES = ["sgd", "weight", "additive", "isotropic", "wrong-bits", "activation", "sam"]
STUDY = ["sgd", "weight", "additive", "isotropic", "wrong-bits", "activation", "weight+activation",
         "sam"]
PTQ_BITS = [(8, 8), (4, 4), (3, 4), (2, 4)]
CANDIDATES = {"mse": 100, "minmax": 1}  # ranges of which the best gives the step
PROBES, ITERATIONS = 8, 15  # of the Hessian's trace and of its top eigenvalue


def pieces(text: str) -> str:
    """An argparse type: a method, PIECES joined by +."""
    parts = text.split("+")
    if not set(parts) <= set(PIECES) or len(set(parts) & set(PIECES[1:5])) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} should join {', '.join(PIECES)} by +, with one "
                                         "noise on weights at most")
    return text


def parse_args() -> argparse.Namespace:
    parser = common.base_parser("DNQ: train a flat network, then quantize it (arXiv 2511.01462); "
                                "--epochs, --lr and --weight-decay, of QAT, have no effect here")
    add, number = parser.add_argument, common.number
    add("--noise-lambda", type=number(float, 0, 1e3), default=1.0, help="noise / measured error")
    add("--ramp-epochs", type=number(float, 0, 1e6), default=5.0, help="until lambda is reached")
    add("--rho", type=number(float, 0, 1), default=0.5, help="share of activations with noise")
    add("--sam-rho", type=number(float, 0, 1e3), default=0.05, help="radius of SAM's ascent")
    add("--noise-bits", type=number(int, 2, 8), default=8, help="of wrong-bits, as a control")
    add("--ptq", choices=CANDIDATES, default="mse", help="how steps are found, for noise and PTQ")
    add("--method", type=pieces, nargs="+", default=["sgd", "weight+activation"],
        help=f"sums of {', '.join(PIECES)}; each also with SWA")
    add("--study", action="store_true", help=f"all of {', '.join(STUDY)}")
    add("--measure", action="store_true", help="the errors per layer, and how Gaussian they are")
    args = common.parse(parser, PAPER)
    if args.ptq == "minmax" and args.quantizer == "lsq+":
        parser.error("--ptq minmax is not for --quantizer lsq+, which starts at the least error")
    args.method = list(dict.fromkeys((STUDY if args.study else []) + args.method))
    return common.finish_args(args)


# ---------------------------------------------------------------------------- measuring the errors


def quantization_error(t: Tensor, quantizer: nn.Module, candidates: int = 100) -> Tensor:
    """t_hat - t of a tensor, after `quantizer` has taken its step from it."""
    quantizer = quantizer.to(t.device)
    quantizer.initialize(t, candidates)
    return quantizer(t) - t


@torch.no_grad()
def error_decomposition(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """What quantization does to the output of a calibrated quantized layer with input x, relative
    to ||W x||^2, with dW = W_hat - W and dx = x_hat - x:

        W_hat x_hat - W x = W dx + dW x + dW dx
        total = ||W_hat x_hat - W x||^2 = AQE + WQE + cross,   AQE = ||W dx||^2,   WQE = ||dW x||^2
        cross = ||dW dx||^2 + 2 (<W dx, dW x> + <W dx, dW dx> + <dW x, dW dx>)
    """
    def product(x, w):
        return (F.conv2d(x, w, None, *layer.geometry) if isinstance(layer, QuantConv2d)
                else F.linear(x, w))

    w, w_hat, x_hat = layer.weight, layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    a, b, c = product(x_hat - x, w), product(x, w_hat - w), product(x_hat - x, w_hat - w)
    clean = product(x, w).square().sum()
    parts = {"AQE": a.square().sum(), "WQE": b.square().sum(),
             "cross": c.square().sum() + 2 * ((a * b).sum() + (a * c).sum() + (b * c).sum()),
             "total": (product(x_hat, w_hat) - product(x, w)).square().sum()}
    return {name: (value / clean).item() for name, value in parts.items()}


def excess_kurtosis(t: Tensor) -> float:
    """0 for a Gaussian, -1.2 for the uniform error of fine rounding, -2 for two points."""
    z = (t - t.mean()) / t.std(correction=0).clamp_min(common.TINY)
    return z.pow(4).mean().item() - 3


@torch.no_grad()
def layer_inputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The input of each layer for `images`, batch norm in eval mode."""
    inputs, training = [], model.training
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
             for layer in product_layers(model).values()]
    model.eval()(images)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return inputs


def layer_bits(model: nn.Module, bits: int) -> list[int]:
    """`bits` for every layer but the first and the last, which have 8."""
    return [8, *[bits] * (len(product_layers(model)) - 2), 8]


def measure(args: argparse.Namespace, data: Data, network: nn.Module) -> None:
    """Print the decomposition per layer, and how far the errors are from independent Gaussians."""
    images, quantized = data.sample(100)[0], ptq(args, data, network, args.wbits, args.abits)
    inputs = layer_inputs(network, images)
    print(f"\nerrors at W{args.wbits}A{args.abits} relative to ||W x||^2, and their shape (a "
          "Gaussian has kurtosis 0; independence has correlation 0)")
    print(f"{'layer':<28}{'AQE':<9}{'WQE':<9}{'cross':<9}{'total':<9}{'kurt dW':<9}{'kurt dx':<9}"
          "corr(dW, W)")
    for (name, layer), x in zip(product_layers(quantized).items(), inputs):
        parts = error_decomposition(layer, x)
        with torch.no_grad():
            w, dw = layer.weight, layer.weight_quantizer(layer.weight) - layer.weight
            dx = layer.input_quantizer(x) - x
        corr = torch.corrcoef(torch.stack([w.flatten(), dw.flatten()]))[0, 1].item()
        print(f"{name:<28}" + "".join(f"{v:<9.4f}" for v in parts.values())
              + f"{excess_kurtosis(dw):<9.2f}{excess_kurtosis(dx):<9.2f}{corr:.3f}")


# ------------------------------------------------------------------------------------- the noises


class DifferentialWeightNoise(nn.Module):
    """Gaussian noise like the weights' quantization error, mean and variance per output channel.

        W <- W + n_t - n_(t-1),   n_t = lambda (mu + sigma e),   e ~ N(0, 1)

    The noise of one step is gone in the next, so with w = W - n it is w <- w - lr dL/dw(w + n): the
    module holds w, and n is in it within `injected` only. That is Anti-PGD (Orvieto et al. 2022)
    with the statistics of quantization. Evaluated, saved and averaged is w.

    `additive` leaves n in, W <- W + n_t, a random walk [choice]. `isotropic` gives all weights the
    same variance, of the same sum, and mean 0.
    """

    def __init__(self, model: nn.Module, bits: int, additive: bool = False,
                 isotropic: bool = False, quantizer: str = "lsq", candidates: int = 100):
        super().__init__()
        self.quantizer, self.candidates = quantizer, candidates
        self.weights = [layer.weight for layer in product_layers(model).values()]
        self.bits, self.additive, self.isotropic = layer_bits(model, bits), additive, isotropic
        for i, w in enumerate(self.weights):  # buffers, so that a checkpoint has them
            self.register_buffer(f"mean{i}", torch.full((len(w),), torch.nan, device=w.device))
            self.register_buffer(f"var{i}", torch.full((len(w),), torch.nan, device=w.device))

    @torch.no_grad()
    def measure(self) -> None:
        """Once per epoch: quantize, take mean and variance of the error, average over epochs."""
        errors = [quantization_error(w, make_quantizer(self.quantizer, bits, len(w)),
                                     self.candidates).flatten(1)
                  for w, bits in zip(self.weights, self.bits)]
        if self.isotropic:  # of the mean square, so that the sum over all weights stays
            square = sum(e.square().sum() for e in errors) / sum(e.numel() for e in errors)
        for i, error in enumerate(errors):
            mean, var = error.mean(1), error.var(1, correction=0)
            if self.isotropic:
                mean, var = torch.zeros_like(mean), square.expand_as(var)
            smooth(getattr(self, f"mean{i}"), mean)
            smooth(getattr(self, f"var{i}"), var)

    @contextmanager
    def injected(self, strength: float) -> Iterator[None]:
        """Within: weights w + n, n fresh; after: w, bit for bit (`additive`: w + n)."""
        with torch.no_grad():
            latent = [w.clone() for w in self.weights]
            for i, w in enumerate(self.weights):
                shape = [-1] + [1] * (w.dim() - 1)
                mean, std = getattr(self, f"mean{i}"), getattr(self, f"var{i}").sqrt()
                noise = torch.randn_like(w).mul_(std.reshape(shape)).add_(mean.reshape(shape))
                w.add_(noise, alpha=strength)
        try:
            yield
        finally:
            if not self.additive:
                with torch.no_grad():
                    for w, value in zip(self.weights, latent):
                        w.copy_(value)


class ActivationNoise(nn.Module):
    """Gaussian noise like the activations' quantization error, mean and variance per layer input,
    on a random share of the elements (all of them would be too much):

        x <- x + M lambda (mu + sigma e),   M ~ Bernoulli(rho),   e ~ N(0, 1)

    At every layer's input, in training and while `strength` (lambda) is above 0 only.
    """

    def __init__(self, model: nn.Module, bits: int, rho: float, quantizer: str = "lsq",
                 candidates: int = 100):
        super().__init__()
        self.bits, self.rho, self.strength = layer_bits(model, bits), rho, 0.0
        self.quantizer, self.candidates = quantizer, candidates
        layers = product_layers(model).values()
        device = next(model.parameters()).device
        self.register_buffer("mean", torch.full((len(layers),), torch.nan, device=device))
        self.register_buffer("var", torch.full((len(layers),), torch.nan, device=device))
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(
                lambda layer, inputs, i=i: self.perturb(inputs[0], i) if layer.training else None)

    def perturb(self, x: Tensor, i: int) -> Tensor:
        if self.strength == 0:
            return x
        noise = gaussian_like(x).mul_(self.var[i].sqrt()).add_(self.mean[i])
        return x + noise.mul_(torch.rand_like(x) < self.rho).mul_(self.strength)

    @torch.no_grad()
    def measure(self, model: nn.Module, images: Tensor) -> None:
        """Once per epoch, on calibration images: mean and variance, averaged over epochs."""
        errors = [quantization_error(x, make_quantizer(self.quantizer, bits), self.candidates)
                  for x, bits in zip(layer_inputs(model, images), self.bits)]
        smooth(self.mean, torch.stack([e.mean() for e in errors]))
        smooth(self.var, torch.stack([e.var(correction=0) for e in errors]))


def gaussian_like(x: Tensor) -> Tensor:
    """torch.randn_like(x), drawn in memory order: on the CPU eight times as fast for images."""
    noise = torch.empty_like(x)
    (noise if noise.is_contiguous() else noise.movedim(1, -1)).normal_()
    return noise


def smooth(average: Tensor, new: Tensor) -> None:
    """average <- 0.9 average + 0.1 new, in place; the first value as it is."""
    average.copy_(torch.where(average.isnan(), new, 0.9 * average + 0.1 * new))


class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient at w + rho g / |g|."""

    def __init__(self, model: nn.Module, rho: float):
        self.model, self.rho = model, rho

    @contextmanager
    def ascended(self) -> Iterator[None]:
        """Within: parameters w + rho g / |g|, g their .grad on entry; after: w, bit for bit. Batch
        norm takes its statistics from the pass before."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        with torch.no_grad():
            latent = [p.clone() for p in params]
            norm = torch.stack([p.grad.norm() for p in params]).norm().clamp_min(common.TINY)
            for p in params:
                p.add_(p.grad * (self.rho / norm))
        for m in norms:
            m.momentum = 0.0
        try:
            yield
        finally:
            for m, momentum in zip(norms, momenta):
                m.momentum = momentum
            with torch.no_grad():
                for p, value in zip(params, latent):
                    p.copy_(value)


# ----------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, data: Data, method: str,
          seed: int) -> dict[str, tuple[nn.Module, dict]]:
    """One training run from scratch, as {method: (network, result), method+swa: ...}: averaging
    does not touch training, so one run gives both."""
    parts = method.split("+")
    torch.manual_seed(seed)
    model = common.build_model(args.model, data.classes, args.depth)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer, lr = common.fp_optimizer(args, data, model)
    average, sam, extras = AveragedModel(model), SAM(model, args.sam_rho), {}
    weight_noise = activation_noise = None
    if set(parts) & {"weight", "additive", "isotropic", "wrong-bits"} and args.noise_lambda:
        bits = args.noise_bits if "wrong-bits" in parts else args.wbits
        weight_noise = DifferentialWeightNoise(model, bits, additive="additive" in parts,
                                               isotropic="isotropic" in parts,
                                               quantizer=args.quantizer,
                                               candidates=CANDIDATES[args.ptq])
        extras["weight_noise"] = weight_noise
    if "activation" in parts and args.noise_lambda:
        activation_noise = ActivationNoise(model, args.abits, args.rho, args.quantizer,
                                           CANDIDATES[args.ptq])
        extras["activation_noise"] = activation_noise
    run = Run(args, data, model, optimizer, method, seed, args.fp_epochs, lr, common.FP_WARMUP,
              extras={"average": average} | extras)
    steps = data.steps(args.batch_size)

    for epoch in run.epochs():
        if weight_noise:
            weight_noise.measure()
        if activation_noise:
            activation_noise.measure(model, data.sample(100)[0])
        for i, (images, labels) in enumerate(run.batches()):
            ramp = min(1.0, (epoch + i / steps) / args.ramp_epochs) if args.ramp_epochs else 1.0
            strength = args.noise_lambda * ramp
            if activation_noise:
                activation_noise.strength = strength
            with weight_noise.injected(strength) if weight_noise else nullcontext():
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                if "sam" in parts:
                    with sam.ascended():
                        optimizer.zero_grad()
                        F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            run.log(loss=loss)
        if epoch >= args.fp_epochs // 2:
            average.update_parameters(model)
    result = run.finish(32, 32)
    torch.manual_seed(seed)  # the average's batch norm: statistics of one epoch of training images
    update_bn(data.batches(args.batch_size, torch.Generator().manual_seed(seed)), average)
    acc, loss = common.evaluate(average.eval(), data)
    averaged = common.record(args.out, result | {"method": method + "+swa", "test_acc": acc,
                                                 "test_loss": loss})
    return {method: (model.eval(), result), method + "+swa": (average.module.eval(), averaged)}


# ------------------------------------------------------------------- quantization after training


def ptq(args: argparse.Namespace, data: Data, network: nn.Module, wbits: int,
        abits: int) -> nn.Module:
    """Post-training quantization: weights rounded to nearest, per channel; inputs per tensor, from
    100 training images; first and last layer at 8 bits."""
    quantized = common.quantize(network, wbits, abits, args.quantizer)
    common.calibrate(quantized, data.sample(100)[0], CANDIDATES[args.ptq], batch_stats=False)
    return quantized.eval()


def quantized_results(args: argparse.Namespace, data: Data, network: nn.Module,
                      result: dict) -> list[dict]:
    """Results of `network` after PTQ, at PTQ_BITS and the bits asked for."""
    results = []
    for wbits, abits in dict.fromkeys([*PTQ_BITS, (args.wbits, args.abits)]):
        acc, loss = common.evaluate(ptq(args, data, network, wbits, abits), data)
        results.append(common.record(args.out, result | {
            "wbits": wbits, "abits": abits, "ptq": args.ptq, "test_acc": acc, "test_loss": loss}))
    return results


@torch.no_grad()
def loss_under_noise(model: nn.Module, data: Data, sigma: float, draws: int = 4) -> float:
    """Loss on 256 training images with N(0, sigma^2) on all weights, in units of each layer's
    standard deviation; mean of `draws`."""
    images, labels = data.sample(256)
    weights = [layer.weight for layer in product_layers(model).values()]
    latent, losses = [w.clone() for w in weights], []
    torch.manual_seed(0)
    for _ in range(draws):
        for w, value in zip(weights, latent):
            w.copy_(value + sigma * value.std() * torch.randn_like(value))
        losses.append(F.cross_entropy(model(images), labels))
    for w, value in zip(weights, latent):
        w.copy_(value)
    return torch.stack(losses).mean().item()


def sharpness(model: nn.Module, data: Data) -> tuple[float, float, float]:
    """(trace, its standard error, top eigenvalue) of the Hessian of the loss on 256 training images
    in the layers' weights, batch norm in eval mode."""
    images, labels = data.sample(256)
    weights = [layer.weight for layer in product_layers(model).values()]
    draws = torch.Generator(device=images.device).manual_seed(0)
    loss = lambda: F.cross_entropy(model(images), labels)  # noqa: E731
    return (*common.hessian_trace(loss, weights, PROBES, draws),
            common.hessian_top_eigenvalue(loss, weights, ITERATIONS, draws))


def ptq_table(results: list[dict]) -> str:
    """Accuracy of each network (row) at each pair of bits (column); ± the seeds' deviation."""
    cells, first = {}, results[0]
    for r in results:
        row = cells.setdefault(r["method"], {})
        row.setdefault((r["wbits"], r["abits"]), []).append(r["test_acc"])
    lines = [f"\n{first['dataset']}, {first['train_size']} training images, {first['model']}, test "
             "accuracy % of the last epoch and after post-training quantization",
             f"{'method':<24}" + "".join(f"{f'W{w}A{a}':<15}" for w, a in cells[first["method"]])]
    for method, row in cells.items():
        shown = (f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
                 for v in row.values())
        lines.append(f"{method:<24}" + "".join(f"{cell:<15}" for cell in shown))
    return "\n".join(lines).replace("W32A32", "FP    ")


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of the ranks (no ties expected)."""
    return float(np.corrcoef(*(np.argsort(np.argsort(v)) for v in (a, b)))[0, 1])


def main() -> None:
    args = parse_args()
    data = common.load_data(args.dataset, args.data_dir, args.train_size, args.fp_seed, args.device,
                            args.dry_run)
    results, traces, drops, networks = [], [], [], {}
    for seed in args.seed:
        for method in args.method:
            networks |= train(args, data, method, seed)
        for name, (network, result) in networks.items():
            after = quantized_results(args, data, network, result)
            results += [result, *after]
            asked = [r for r in after if (r["wbits"], r["abits"]) == (args.wbits, args.abits)]
            drops.append(result["test_acc"] - asked[0]["test_acc"])
    print(ptq_table(results))
    print(f"\nflatness, last seed; drop in % from PTQ at W{args.wbits}A{args.abits}\n{'method':<24}"
          f"{'drop':<8}{'Hessian trace ± se':<22}{'top':<9}loss under weight noise 0.05 0.1 0.2")
    drops = drops[-len(networks):]
    for drop, (name, (network, _)) in zip(drops, networks.items()):
        trace, error, top = sharpness(network, data)
        traces.append(trace)
        noisy = "  ".join(f"{loss_under_noise(network, data, s):.4f}" for s in (0.05, 0.1, 0.2))
        print(f"{name:<24}{drop:<8.2f}{f'{trace:.1f} ± {error:.1f}':<22}{top:<9.2f}{noisy}")
    if len(drops) > 4:
        print(f"\nrank correlation of trace and drop over these {len(drops)} networks: "
              f"{rank_correlation(traces, drops):.2f}")
    if args.measure:
        measure(args, data, networks[args.method[0]][0])


if __name__ == "__main__":
    common.entry(main)
