"""DNQ, differential noise-driven quantization. Xia, Pang, Cai, "Efficiently Training A Flat Neural
Network Before It has been Quantizated", arXiv 2511.01462.

The idea. Post-training quantization (PTQ) moves a finished network by its rounding errors. Where
the loss is flat they do little harm, so DNQ trains for flatness in full precision. It measures the
errors that weights and activations will have at the bits aimed for, and models both as independent
Gaussian noise. It trains under fresh noise of lambda times that size: on the weights, where it is
removed after the step, and on a random share of the activations. Stochastic weight averaging (SWA)
averages the weights of the last half of the epochs. Then the network is quantized without further
training.

Of this paper we had only the abstract and summaries. The rest follows later code and drafts of the
same authors, which we cite as "authors". Our own decisions are marked [choice].

    symbol                  here                                              from
    dW, dx: errors          quantization_error(t, quantizer)                  quantizer: [choice]
    ||W dx||^2, ||dW x||^2  error_decomposition(layer, x): AQE, WQE           authors
    w + n_t in step t       DifferentialWeightNoise.add, .remove              authors
    x + M n, M is 0 or 1    ActivationNoise: n is like dx; P(M = 1) by --rho  authors
    lambda and its ramp     --noise-lambda, --ramp-epochs                     authors
    w + r g / |g|           common.sam_loss, r is --sam-rho                   Foret 2021

    python flat_quant.py --bits 4                       plain and flat network, before and after PTQ
    python flat_quant.py --bits 4 --ablate --diagnose   every noise, SAM, controls; the errors
"""

import copy
from argparse import Namespace

import common  # before torch: it sets GOMP_SPINCOUNT
import torch
import torch.nn.functional as F
from common import Checkpoint, Data, Progress, Quantizer, hooked, layer_bits, weight_layers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

# What --recipe paper sets: the settings of the authors' later code, and our guess [choice]. At this
# lambda our weight noise is about half of theirs, see `quantization_error`.
AUTHORS = {
    "model": "resnet18",
    "dataset": "cifar100",
    "batch_size": 256,
    "fp_lr": 0.015,
    "fp_weight_decay": 5e-4,
    "fp_epochs": 120,
    "ramp_epochs": 20.0,
    "pad": 4,
    "label_smoothing": 0.1,
    "swa_rate": 0.01,
    "noise_lambda": 1.0,
}
GUESSES = {"stem": "cifar"}  # the default already; here so that --recipe prints it

MORE_BITS = [(8, 8), (4, 4), (3, 4), (2, 4), (2, 2)]
PROBES = 8  # random vectors for the Hessian's trace
ITERATIONS = 15  # steps of power iteration for its top eigenvalue


def parse_args() -> Namespace:
    parser = common.base_parser("DNQ: train a flat network in full precision, then quantize it "
                                "(arXiv 2511.01462). Each method also gives its average, +swa.",
                                list(METHODS), ["sgd", "weight+activation"])
    number = common.number
    flag = parser.add_argument
    flag("--noise-lambda", type=number(float, 0, 1e3), default=2.0,
         help="noise relative to the measured error (default: 2)")
    flag("--ramp-epochs", type=number(float, 0, 1e6), default=5.0,
         help="epochs in which the noise grows to that size (default: 5)")
    flag("--rho", type=number(float, 0, 1), default=0.5,
         help="share of the activations that get noise (default: 0.5)")
    flag("--mask", choices=["uniform", "salience"], default="uniform",
         help="the same chance of noise for all activations (default), or more in salient channels")
    flag("--noise-bits", type=number(int, 2, 8), default=8,
         help="for the method wrong-bits: bits whose error its noise imitates (default: 8)")
    flag("--label-smoothing", type=number(float, 0, 1), default=0.0,
         help="share of a label that is spread over all classes (default: 0)")
    flag("--swa-rate", type=number(float, 0, 1), default=0.0,
         help="hold the learning rate at this share of its peak while SWA averages "
              "(default: 0, a cosine to the end)")
    flag("--sam-rho", type=number(float, 0, 1e3), default=0.05,
         help="radius of sharpness-aware minimisation, sam (default: 0.05)")
    flag("--more-bits", action="store_true",
         help="quantize to W8A8, W4A4, W3A4, W2A4 and W2A2 as well")
    return common.parse(parser, list(METHODS), AUTHORS | GUESSES)


# ---------------------------------------------------------------------------- measuring the errors


def quantization_error(t: Tensor, quantizer: Quantizer) -> Tensor:
    """dW or dx: t_hat - t, shaped like t. It first sets the quantizer from t.

    The authors' quantizer of weights is symmetric and reaches up to max |t|. Ours has the least
    squared error [choice]. So at 2 bits our error of Gaussian weights is about half of theirs, and
    so is our noise at the same lambda.
    """
    quantizer = quantizer.to(t.device)
    quantizer.initialize(t)
    return quantizer(t) - t


@torch.no_grad()
def error_decomposition(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Activation and weight quantization error, AQE and WQE, in a quantized layer's output.

        W_hat x_hat - W x = W dx + dW x + dW dx,   dW = W_hat - W,   dx = x_hat - x
        AQE = ||W dx||^2,   WQE = ||dW x||^2
        total = ||W_hat x_hat - W x||^2 = AQE + WQE + cross

    cross is the rest, ||dW dx||^2 and the inner products between the three terms, and may be
    negative. All are divided by ||W x||^2. x: a batch of the layer's inputs. The layer is
    calibrated.
    """
    w = layer.weight
    dw = layer.weight_quantizer(w) - w
    dx = layer.input_quantizer(x) - x
    from_x = layer.product(dx, w)
    from_w = layer.product(x, dw)
    from_both = layer.product(dx, dw)
    scale = layer.product(x, w).square().sum()
    aqe = from_x.square().sum() / scale
    wqe = from_w.square().sum() / scale
    total = (from_x + from_w + from_both).square().sum() / scale
    return {
        "AQE": aqe.item(),
        "WQE": wqe.item(),
        "cross": (total - aqe - wqe).item(),
        "total": total.item(),
    }


def excess_kurtosis(t: Tensor) -> float:
    """0 for a Gaussian, -1.2 for the uniform error of fine rounding, -2 for a fair coin.

    t: rows x values; each row, an output channel of a weight, has its own mean and variance.
    """
    t = t - t.mean(1, keepdim=True)
    z = t / t.std(1, correction=0, keepdim=True).clamp_min(common.TINY)
    return z.pow(4).mean().item() - 3


@torch.no_grad()
def layer_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{layer: its input} for `images`, in the mode that the model is in."""
    layers = weight_layers(model)
    names = {layer: name for name, layer in layers.items()}
    inputs = {}

    def keep(layer, arguments):
        inputs[names[layer]] = arguments[0]

    with hooked(layers.values(), before=keep):
        model(images)
    return inputs


# ------------------------------------------------------------------------------------- the noises


class DifferentialWeightNoise:
    """Gaussian noise like the weights' quantization error, by output channel.

    In step t the weights are w + n_t while gradient and step are taken; then n_t is removed. So w
    itself takes an ordinary step, but with the gradient at w + n_t. The formula omits weight decay,
    which is that of w + n_t as well.

        w_(t+1) = w_t - lr dL/dw(w_t + n_t),   n_t = lambda (mu + sigma e),   e ~ N(0, 1)

    The authors write the same step for the noisy weights v_t = w_t + n_t. Their form contains a
    difference of two noises, hence "differential" (Anti-PGD, Orvieto et al. 2022):

        v_(t+1) = w_(t+1) + n_(t+1) = v_t - lr dL/dv(v_t) + n_(t+1) - n_t

    If n_t were removed before the step, only the weight decay would differ; see
    AdditiveWeightNoise.

    mu and sigma are mean and standard deviation of the error at the start of each epoch [choice;
    the authors take moving averages of both over the epochs].
    """

    def __init__(self, model: nn.Module, bits: int):
        bits_of = layer_bits(model, bits)
        # Each weight once, also if two layers share it.
        self.bits = {layer.weight: bits_of[name] for name, layer in weight_layers(model).items()}
        self.statistics = {}
        self.noise = {}

    @torch.no_grad()
    def measure(self) -> None:
        """Set .statistics, {weight: (mean, standard deviation)} that broadcast against it."""
        for w, bits in self.bits.items():
            error = quantization_error(w, Quantizer(bits, channels=len(w)))
            within = tuple(range(1, w.dim()))
            self.statistics[w] = (
                error.mean(within, keepdim=True),
                error.std(within, correction=0, keepdim=True),
            )

    @torch.no_grad()
    def add(self, strength: float) -> None:
        """w <- w + n_t, with fresh noise; strength is lambda."""
        for w, (mean, std) in self.statistics.items():
            self.noise[w] = strength * (mean + std * torch.randn_like(w))
            w.add_(self.noise[w])

    def before_step(self) -> None:
        """Does nothing: differential noise stays on the weights during the step."""

    @torch.no_grad()
    def remove(self) -> None:
        """w <- w - n_t, if it is still there."""
        for w, noise in self.noise.items():
            w.sub_(noise)
        self.noise = {}


class AdditiveWeightNoise(DifferentialWeightNoise):
    """The same noise, removed before the step instead of after it [choice].

    The step is the same but for weight decay, which is now that of w, not of w + n_t. That changes
    little: a large difference to "weight" would be chance. The authors have a rival of this name,
    whose noise is not taken back within the epoch.
    """

    def before_step(self) -> None:
        self.remove()


class IsotropicWeightNoise(DifferentialWeightNoise):
    """A control: mean 0 and one variance for all weights, with the same expected sum of squares.

    So layers with 8 bits get more noise than their errors, and the others less.
    """

    @torch.no_grad()
    def measure(self) -> None:
        super().measure()
        squares = 0
        for w, (mean, std) in self.statistics.items():
            values_per_channel = w.numel() / len(w)
            squares = squares + (mean**2 + std**2).sum() * values_per_channel
        shared = (squares / sum(w.numel() for w in self.statistics)).sqrt()
        self.statistics = {w: (torch.zeros_like(shared), shared) for w in self.statistics}


class ActivationNoise:
    """Gaussian noise like the activations' quantization error, on a random share of each input.

        x <- x + M lambda (mu + sigma e),   M ~ Bernoulli(P),   e ~ N(0, 1)

    With noise on every element, training collapses, say the authors. It is at the input of every
    layer [choice; the authors: at the outputs of ReLUs], not at attention's products, which have no
    weights.
    """

    def __init__(
        self, model: nn.Module, bits: int, rho: float, quantizer: str = "lsq", mask: str = "uniform"
    ):
        self.model = model
        self.rho = rho
        self.mask = mask
        self.bits = layer_bits(model, bits)
        self.quantizer = common.QUANTIZERS[quantizer]
        self.statistics = {}

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set .statistics, {layer: (mean, standard deviation)}, at the start of an epoch [choice].

        Batch norm takes these images' statistics: its running ones were collected under noise.
        """
        layers = weight_layers(self.model)
        inputs = layer_inputs(copy.deepcopy(self.model).train(), images)
        for name, x in inputs.items():
            error = quantization_error(x, self.quantizer(self.bits[name]))
            self.statistics[layers[name]] = (error.mean(), error.std(correction=0))

    def chance(self, x: Tensor) -> Tensor | float:
        """P, the chance that an element of x gets noise. With mask "uniform" it is rho.

        With "salience" it depends on image and channel, of which there are C:

            P = clip(softmax(I) C rho, 0, 1),   I = mean of |x| over space or tokens

        The authors also divide I by a temperature, which they set to 1.
        """
        if self.mask == "uniform":
            return self.rho
        channel = 1 if x.dim() == 4 else -1
        salience = x.abs()
        if x.dim() == 4:  # N x C x height x width
            salience = salience.mean((2, 3), keepdim=True)
        if x.dim() == 3:  # N x tokens x C
            salience = salience.mean(1, keepdim=True)
        return (salience.softmax(channel) * x.shape[channel] * self.rho).clamp_max(1)

    def perturb(self, x: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
        noise = torch.empty_like(x)
        # For speed: a channels_last tensor is filled through its view N x H x W x C
        view = noise if noise.is_contiguous() else noise.movedim(1, -1)
        view.normal_()
        chosen = torch.rand_like(x) < self.chance(x)
        return x + noise.mul_(std).add_(mean).mul_(chosen).mul_(strength)

    def injected(self, strength: float):
        """A context in which every layer's input is perturbed; strength is lambda."""

        def before(layer, inputs):
            mean, std = self.statistics[layer]
            return self.perturb(inputs[0], mean, std, strength)

        return hooked(self.statistics.keys(), before=before)


# Each method has a function that returns the loss of a batch: images N x 3 x 32 x 32, labels N.
# Some also have a noise on the weights or on the activations.


def plain(model: nn.Module, images: Tensor, labels: Tensor, args: Namespace) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=args.label_smoothing)


def sam(model: nn.Module, images: Tensor, labels: Tensor, args: Namespace) -> Tensor:
    """A rival, sharpness-aware minimisation, at twice the cost."""
    return common.sam_loss(model, images, labels, args.sam_rho, args.label_smoothing)


METHODS = {
    "sgd": plain,  # no noise
    "weight": plain,  # half of DNQ: differential noise on the weights
    "additive": plain,  # the same noise, removed before the step
    "isotropic": plain,  # a control: noise of one variance for all weights
    "wrong-bits": plain,  # a control: the noise of "weight", but for --noise-bits
    "activation": plain,  # the other half: noise on the activations
    "weight+activation": plain,  # DNQ
    "sam": sam,  # a rival without noise
}
WEIGHT_NOISES = {
    "weight": DifferentialWeightNoise,
    "weight+activation": DifferentialWeightNoise,
    "wrong-bits": DifferentialWeightNoise,
    "additive": AdditiveWeightNoise,
    "isotropic": IsotropicWeightNoise,
}
ACTIVATION_NOISES = ["activation", "weight+activation"]


# ----------------------------------------------------------------------------------- the training


def swa_start(args: Namespace) -> int:
    """The first epoch that SWA averages: it takes the last half of them."""
    return args.fp_epochs // 2


def learning_rate(args: Namespace, step: int, steps_per_epoch: int) -> float:
    """The learning rate as a share of its peak; `step` counts from the start of training.

    After a warm-up [choice], a cosine down to 0 at the end. With --swa-rate r: a cosine down to 0
    where SWA starts, but never below r, and r from then on.
    """
    if not args.swa_rate:
        return common.cosine(step, args.fp_epochs * steps_per_epoch, warmup=0.1)
    held_from = swa_start(args) * steps_per_epoch
    if step >= held_from:
        return args.swa_rate
    return max(args.swa_rate, common.cosine(step, held_from, warmup=0.1))


def weight_noise_bits(args: Namespace, method: str) -> int:
    """The bits whose rounding error the weight noise imitates."""
    return args.noise_bits if method == "wrong-bits" else args.wbits


def linear_ramp(t: float, T: float) -> float:
    """t / T, at most 1; t and T in epochs."""
    return min(1, t / T) if T else 1.0


def train(args: Namespace, data: Data, method: str, seed: int) -> dict[str, tuple]:
    """Returns {method: (network, row of results), method+swa: (average, row of results)}.

    One run from an untrained network gives both, because averaging does not touch training.
    """
    model, optimizer = common.new_network(args, data, seed, args.device)
    average = AveragedModel(model)
    bits = weight_noise_bits(args, method)
    # A method without noise has both objects too. They are never measured, and so add nothing.
    weight_noise = WEIGHT_NOISES.get(method, DifferentialWeightNoise)(model, bits)
    activation_noise = ActivationNoise(model, args.abits, args.rho, args.quantizer, args.mask)
    checkpoint = Checkpoint(
        args, data, method, seed, args.fp_epochs, model=model, optimizer=optimizer, average=average
    )
    steps = data.steps(args.batch_size)
    done = checkpoint.load()  # how many epochs its file has done; 0 to start anew

    for epoch in range(done, args.fp_epochs):
        model.train()
        draws = common.epoch_draws("training", seed, epoch)
        progress = Progress(f"{method:<17} seed {seed}  epoch {epoch + 1}/{args.fp_epochs}", steps)
        # Statistics of the errors that the current weights and their activations would have
        if method in WEIGHT_NOISES:
            weight_noise.measure()
        if method in ACTIVATION_NOISES:
            activation_noise.measure(data.sample(100)[0])
        batches = data.batches(args.batch_size, draws, args.augment)
        for i, (images, labels) in enumerate(batches):
            step = epoch * steps + i
            # Learning rate, and strength of the noise: lambda, after a linear ramp
            common.set_rate(optimizer, optimizer.defaults["lr"] * learning_rate(args, step, steps))
            strength = args.noise_lambda * linear_ramp(step / steps, args.ramp_epochs)
            # Noise added: the weights become w + n_t
            weight_noise.add(strength)
            # Gradient at w + n_t, with noise on the activations
            with activation_noise.injected(strength):
                loss = METHODS[method](model, images, labels, args)
            optimizer.zero_grad()
            loss.backward()
            # Step; only additive noise is removed before it
            weight_noise.before_step()
            optimizer.step()
            # Noise removed: w has made its step
            weight_noise.remove()
            progress.add(loss=loss)
        # SWA: into the average
        if epoch >= swa_start(args):
            average.update_parameters(model)
        # Evaluation on some test images, checkpoint, a printed row
        common.end_epoch(checkpoint, progress)
    # New statistics for batch norm, evaluation on all test images, a line of results.jsonl
    full = {"wbits": 32, "abits": 32, "quantizer": None}
    row = common.finish(checkpoint, **full)
    averaged = common.finish(checkpoint, average.module, f"{method}+swa", **full)
    return {method: (model.eval(), row), f"{method}+swa": (average.module.eval(), averaged)}


# ------------------------------------------------------------------- quantization after training


def ptq(args: Namespace, data: Data, network: nn.Module, wbits: int, abits: int) -> nn.Module:
    """Post-training quantization: weights rounded to nearest, per channel; inputs per tensor.

    100 training images calibrate it; batch norm keeps its running statistics.
    """
    quantized = common.quantize(network, wbits, abits, args.quantizer)
    common.calibrate(quantized, data.sample(100)[0], batch_stats=False)
    return quantized.eval()


def quantized_rows(args: Namespace, data: Data, network: nn.Module, row: dict) -> list[dict]:
    """Rows of results after PTQ, one for each pair of bits, with the flatness before PTQ.

    noise_wbits, noise_abits: the bits whose error the method's noise imitates, or None without it.
    acc_batch_norm: accuracy with batch norm's statistics from the calibration images [choice]. They
    are few and not augmented: in our study this costs 1.5 to 2.2 points at W8A8, where rounding
    costs nothing.
    """
    common.say(f"{row['method']}: flatness, then post-training quantization")
    trace, error, top = common.sharpness(network, data, PROBES, ITERATIONS)
    flatness = {"trace": trace, "trace_error": error, "top_eigenvalue": top}
    pairs = [(args.wbits, args.abits)] + (MORE_BITS if args.more_bits else [])
    rows = []
    method = row["method"].removesuffix("+swa")
    noise = {
        "noise_wbits": weight_noise_bits(args, method) if method in WEIGHT_NOISES else None,
        "noise_abits": args.abits if method in ACTIVATION_NOISES else None,
    }
    for wbits, abits in dict.fromkeys(pairs):
        quantized = ptq(args, data, network, wbits, abits)
        figures = {"quantizer": args.quantizer, "wbits": wbits, "abits": abits}
        figures["acc"], figures["loss"] = common.evaluate(quantized, data)
        update_bn([data.sample(100)[0]], quantized)
        figures["acc_batch_norm"], _ = common.evaluate(quantized, data)
        rows.append(row | flatness | noise | figures)
        common.record(args, rows[-1])
    return rows


@torch.no_grad()
def print_errors(args: Namespace, data: Data, network: nn.Module) -> None:
    """The decomposition per layer, and how far the errors are from independent Gaussians.

    A layer's x is its input in `network`, which is in full precision. The step sizes are fitted to
    it, as for the noise; in `ptq` they fit the inputs of a quantized network.
    """
    images, _ = data.sample(100)
    quantized = ptq(args, data, network, args.wbits, args.abits)
    inputs = layer_inputs(network, images)
    print(
        f"\n{args.method[0]}, last seed: errors at W{args.wbits}A{args.abits} over ||W x||^2, and "
        "their shape\n(Gaussian: excess kurtosis 0; independent of the weights: correlation 0)"
    )
    common.print_row("AQE", "WQE", "cross", "total", "kurt. dW", "kurt. dx", "corr(dW, W)", "layer")
    for name, layer in weight_layers(quantized).items():
        dw = layer.weight_quantizer(layer.weight) - layer.weight
        dx = quantization_error(inputs[name], layer.input_quantizer)
        pair = torch.stack([layer.weight.flatten(), dw.flatten()])
        figures = [
            *error_decomposition(layer, inputs[name]).values(),
            excess_kurtosis(dw.flatten(1)),
            excess_kurtosis(dx.reshape(1, -1)),
            torch.corrcoef(pair)[0, 1].item(),
        ]
        common.print_row(*[f"{figure:.4f}" for figure in figures], name)


def main() -> None:
    args = parse_args()
    # For the time left, which `end_epoch` prints
    args.epochs_left = len(args.seed) * len(args.method) * args.fp_epochs
    source = common.read_images(args)
    rows = []
    for seed in args.seed:
        data = common.make_data(args, source, seed)
        networks = {}
        for method in args.method:
            networks |= train(args, data, method, seed)
        last = {}
        for name, (network, row) in networks.items():
            after = quantized_rows(args, data, network, row)
            rows += [row, *after]
            last[name] = after[0]
    # Averages are compared with an average, so that the gain of SWA is not the noise's
    averaged = [row for row in rows if row["method"].endswith("+swa")]
    others = [row for row in rows if not row["method"].endswith("+swa")]
    headings = {"acc": "acc %", "acc_batch_norm": "new batch norm"}
    common.print_table(others, args.method[0], **headings)
    common.print_table(averaged, f"{args.method[0]}+swa", **headings)
    # `networks` and `last` are those of the last seed
    print("\nlast seed: points lost by PTQ, and flatness before it")
    common.print_row("drop", "trace", "± its error", "eigenvalue", "method")
    for name, after in last.items():
        drop = networks[name][1]["acc"] - after["acc"]
        figures = (drop, after["trace"], after["trace_error"], after["top_eigenvalue"])
        common.print_row(*[f"{figure:.2f}" for figure in figures], name)
    if args.diagnose:  # of the first method, "sgd" by default
        print_errors(args, data, networks[args.method[0]][0])


if __name__ == "__main__":
    common.entry(main)
