"""What the four scripts share, but no method: quantizers, networks, data, runs (flags, seeds,
checkpoints, results), evaluation, flatness. Equation numbers are those of FPQ (feature-perturbed
quantization, arXiv 2503.11159), whose protocol we use for all. [choice] marks our own decisions."""

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
import time
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image  # comes with torchvision, which reads images with it
from torch import Tensor, nn
from torch.backends import cuda, cudnn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import Conv2dNormActivation

TINY = 1e-12  # no step size is smaller, so x / s stays finite should one become 0

# ---------------------------------------------------------------------------------- 1. Quantizers


def fake_quantize_definition(x: Tensor, step_size: Tensor, zero_point: float, qmin: int,
                             qmax: int) -> Tensor:
    """Fake quantization (Eq. 3) with LSQ's gradients (learned step size quantization, Esser et al.
    2020), unscaled: rounds x to a grid of q_max - q_min + 1 floats. s > 0 broadcasts against x. z
    is whole, so we may clip before we round. The straight-through estimator: round has gradient 1.

        x_hat = (clip(round(x/s) + z, q_min, q_max) - z) * s"""
    v = torch.clamp(x / step_size, qmin - zero_point, qmax - zero_point)  # gradient 0 outside
    v = v + (v.round() - v).detach()  # forward: round(v); backward: the gradient of v
    return v * step_size


def fake_quantize(x: Tensor, step_size: Tensor, zero_point: Tensor | float, qmin: int, qmax: int,
                  grad_scale: float = 1.0) -> Tensor:
    """`fake_quantize_definition` in fewer passes over memory, and twice differentiable. It differs
    only where x lies exactly on a bound: such an x counts as outside. step_size > 0 and zero_point
    broadcast against x; dL/ds is multiplied by grad_scale. A zero_point that is a number is whole;
    a tensor may hold 1/2 (a one-bit weight, see `Quantizer`).

        dx_hat/dx = 1 if q_min < x/s + z < q_max else 0             compares x/s, not round(x/s)
        dx_hat/ds = x_hat/s - x/s inside, q_min - z below, q_max - z above"""
    if not isinstance(zero_point, Tensor):
        qmin, qmax, zero_point = qmin - zero_point, qmax - zero_point, None
    return FakeQuantize.apply(x, step_size, zero_point, qmin, qmax, grad_scale)


class FakeQuantize(torch.autograd.Function):
    """The autograd function of `fake_quantize`. It saves only what adjacent layers hold anyway."""

    @staticmethod
    def forward(ctx, x, step_size, zero_point, qmin, qmax, grad_scale):
        v = x / step_size
        if zero_point is None:
            v.round_().clamp_(qmin, qmax)
        else:
            part = zero_point % 1  # 0, or 1/2 on the grid of a one-bit weight
            v.add_(part).round_().add_(zero_point - part).clamp_(qmin, qmax).sub_(zero_point)
        x_hat = v.mul_(step_size)  # Eq. 3
        ctx.save_for_backward(x, x_hat, step_size, zero_point)
        ctx.bounds, ctx.grad_scale = (qmin, qmax), grad_scale
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        x, x_hat, step_size, zero_point = ctx.saved_tensors
        v = x / step_size
        if zero_point is not None:
            v.add_(zero_point)
        # dL/dx is grad where v is inside the bounds: the derivative of a hard tanh, in one pass.
        grad_x = torch.ops.aten.hardtanh_backward(grad, v, *ctx.bounds)
        # dL/ds = (<grad, x_hat> - <grad_x, x>) / s, as s dx_hat/ds is x_hat - x inside and x_hat
        # outside: two inner products in place of a tensor of derivatives; 1 / s comes last.
        if step_size.numel() == 1:
            # Flattened by pixel: in channels_last order that makes views, not copies.
            a, b, c, d = ((t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1)
                          for t in (grad, x_hat, grad_x, x))
            grad_s = (a @ b - c @ d).reshape_as(step_size)
        else:
            grad_s = (grad * x_hat - grad_x * x).sum_to_size(step_size.shape)
        return grad_x, grad_s * (ctx.grad_scale / step_size), None, None, None, None


def scale_gradient(t, scale):
    """Return t unchanged; the gradient that flows back to it is multiplied by `scale`."""
    scaled = t * scale
    return t.detach() + (scaled - scaled.detach())  # the difference is exactly 0


class Quantizer(nn.Module):
    """LSQ: a learned step size and a fixed zero point, per tensor or, with `channels`, per channel
    (dim 0). The levels are 0 to qmax = 2^bits - 1, with 1 to 8 bits. step_size is NaN until
    `initialize`; only its magnitude counts. A one-bit weight (with `channels`) has z = 1/2 and is
    -s/2 or s/2; a one-bit activation is 0 or s (or -s or 0) [choice]. 8-bit step sizes stay as
    calibrated [choice]: LSQ makes them grow until few levels are used."""

    decays = False  # whether weight decay applies to the learned parameters [choice]

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits should be from 1 to 8, not {bits}")
        self.bits, self.channels, self.qmax = bits, channels, 2**bits - 1
        shape = [channels] if channels else []
        self.step_size = nn.Parameter(torch.full(shape, math.nan), requires_grad=bits < 8)
        self.register_buffer("zero_point", torch.zeros(shape))
        self.number = None  # zero_point as a number, read once: reading waits for the device

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.number = None

    def grid(self, x):
        """(step size, zero point), shaped to broadcast against x."""
        shape = [-1] + [1] * (x.dim() - 1) if self.channels else []
        return self.step_size.abs().clamp_min(TINY).reshape(shape), self.zero_point.reshape(shape)

    def grad_scale(self, x):
        """LSQ's 1 / sqrt(N q_max), where N elements of x share one step size. For activations N
        counts the batch, too, as in MQBench but not in LSQ's text [choice]. Weights also have
        q_max = 2^bits - 1, because their grid is not LSQ's signed one [choice]."""
        return (x.numel() / self.step_size.numel() * self.qmax) ** -0.5

    def forward(self, x):
        step_size, zero_point = self.grid(x)
        if self.number is None:
            if self.step_size.isnan().any():
                raise RuntimeError("no step size yet: first call common.calibrate(qmodel, images)")
            self.number = zero_point.tolist()
        return fake_quantize(x, step_size, zero_point if self.channels else self.number, 0,
                             self.qmax, self.grad_scale(x))

    @torch.no_grad()
    def initialize(self, x, candidates=100):
        """Set step size and zero point from x by Eq. 4-5. Of `candidates` fractions a of the range
        we keep the one with the least squared error [choice; the paper has a = 1]. The range always
        contains 0 [choice], so that zero padding and the zeros of a ReLU stay exact.

            s = a S,  S = (x_max - x_min) / (2^bits - 1),  z = round(q_max - x_max / S)"""
        rows = x.reshape(self.channels or 1, -1)
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        one_bit_weight = self.bits == 1 and self.channels
        if one_bit_weight:
            high = torch.maximum(-low, high)
            low = -high
        s = (high - low) / self.qmax  # Eq. 4
        # A channel of zeros has no range: its S is the largest of the other channels, or 1.
        s = torch.where(s > TINY, s, s.max() if s.max() > TINY else s + 1)
        z = s * 0 + 0.5 if one_bit_weight else (self.qmax - high / s).round()  # Eq. 5
        rows = rows[:, ::rows.shape[1] // 65536 | 1]  # a sample; an odd stride meets all columns
        sizes = s * (torch.arange(candidates, 0, -1, device=x.device) / candidates)[:, None]
        values = (fake_quantize(rows, a[:, None], z[:, None], 0, self.qmax) for a in sizes)
        best = torch.stack([(v - rows).square().sum(1) for v in values]).argmin(0, keepdim=True)
        self.step_size.copy_(sizes.gather(0, best).reshape_as(self.step_size))
        self.zero_point.copy_(z.reshape_as(self.step_size))
        self.number = None

    def integers(self, x):
        """(n, s, z) with x_hat = (n - z) * s bit for bit, n from 0 to qmax; LSQ+ takes x - beta."""
        s, z = self.grid(x)
        part = z % 1
        return (x / s + part).round().add(z - part).clamp(0, self.qmax), s, z


class LSQPlus(Quantizer):
    """LSQ+ (Bhalgat et al. 2020), for activations: the grid also has a learned offset beta, which
    starts at 0, and whose gradient has the scale of the step size's [choices].

        x_hat = fake_quantize(x - beta) + beta      dx_hat/dbeta = 0 inside the grid, 1 outside"""

    def __init__(self, bits):
        super().__init__(bits)
        self.offset = nn.Parameter(torch.tensor(0.0), requires_grad=bits < 8)

    def forward(self, x):
        beta = scale_gradient(self.offset, self.grad_scale(x))
        return super().forward(x - beta) + beta


class PACT(Quantizer):
    """PACT (parameterized clipping activation, Choi et al. 2018): only clipped values move alpha.
    The parameter is s = alpha / n, with n = q_max - z. Its gradient n dL/dalpha is divided by n^2,
    so that alpha = n s moves as if it were the parameter. It starts at LSQ's upper end; if z > 0,
    we also clip at -z s [choices].

        x_hat = round(clip(x, 0, alpha) / s) s,  s = alpha / n       dx_hat/dalpha = [x >= alpha]"""

    decays = True  # as in the paper: weight decay keeps alpha, and so the rounding error, small

    def forward(self, x):
        x_hat, (s, z) = super().forward(x), self.grid(x)
        levels = (self.qmax - z).clamp_min(1)  # above zero; none if all data were negative
        s = scale_gradient(s, levels**-2)
        clipped = torch.where(x >= s * levels, s * levels, torch.where(x <= -z * s, -z * s, x))
        return clipped + (x_hat - clipped).detach()


QUANTIZERS = {"lsq": Quantizer, "lsq+": LSQPlus, "pact": PACT}  # of activations; weights have LSQ's
LAYERS = nn.Conv2d, nn.Linear  # the kinds that `quantize` quantizes


class QuantLayer(nn.Module):
    """`layer` with quantized input and weight; product(x, weight, bias=None) is its operation."""

    def __init__(self, layer, wbits, abits, quantizer="lsq"):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.input_quantizer = QUANTIZERS[quantizer](abits)
        self.weight_quantizer = Quantizer(wbits, channels=len(layer.weight))
        self.product = F.linear if isinstance(layer, nn.Linear) else partial(
            F.conv2d, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
            groups=layer.groups)

    def forward(self, x):
        return self.product(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class Product(nn.Module):
    """The matrix product a @ b of two activations. `quantize` puts quantizers on both."""

    def __init__(self):
        super().__init__()
        self.a_quantizer, self.b_quantizer = nn.Identity(), nn.Identity()

    def forward(self, a, b):
        return self.a_quantizer(a) @ self.b_quantizer(b)


@contextmanager
def hooked(modules, before=None, after=None):
    """Inside this context every call of one of `modules` runs before(module, inputs) or else
    after(module, inputs, output). What that returns, if anything, replaces inputs or output."""
    with ExitStack() as stack:  # which removes the hooks
        for m in modules:
            stack.enter_context(m.register_forward_pre_hook(before) if before
                                else m.register_forward_hook(after))
        yield


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by a weight, quantized or not, by name in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (*LAYERS, QuantLayer))}


def quantize(model: nn.Module, wbits: int, abits: int, quantizer: str = "lsq",
             example: Tensor | None = None) -> nn.Module:
    """Return a copy of `model` whose Conv2d, Linear and `Product` modules quantize both factors.
    The first and the last layer that `example` (zeros, 1 x 3 x 32 x 32, if None) reaches get 8
    bits. Warns of layers left in full precision: of other kinds, with weights computed in each pass
    (weight_norm), or never reached."""
    model, order, new, left = copy.deepcopy(model), [], {}, []
    like, probe = next(model.parameters()), copy.deepcopy(model).eval()
    names = {layer: name for name, layer in weight_layers(probe).items()}
    with torch.no_grad(), hooked(names, before=lambda layer, _: order.append(names[layer])):
        probe(like.new_zeros(1, 3, 32, 32) if example is None else example)
    for name, m in list(model.named_modules(remove_duplicate=False)):  # one may have two names
        if isinstance(m, Product):
            m.a_quantizer, m.b_quantizer = (QUANTIZERS[quantizer](abits).to(like) for _ in "ab")
        elif name in order and type(m) in LAYERS and getattr(m, "padding_mode", "zeros") == "zeros":
            bits = (8, 8) if name in (order[0], order[-1]) else (wbits, abits)
            new[m] = QuantLayer(m, *bits, quantizer).to(like)
        elif m not in new and (isinstance(m, LAYERS) or any(
                "weight" in key and p.dim() > 1 for key, p in m.named_parameters(recurse=False))):
            left.append(f"{name} ({type(m).__name__})")
        if m in new and name:
            model.set_submodule(name, new[m])
    if left:
        warnings.warn(f"left in full precision: {', '.join(left)}", stacklevel=2)
    return new.get(model, model)  # the model may be a single layer


@torch.no_grad()
def calibrate(qmodel: nn.Module, images: Tensor, candidates: int = 100, batch_stats: bool = True):
    """Set all step sizes and zero points in one pass of `images`, N x 3 x 32 x 32 (N = 100 in the
    paper). Each layer sees quantized inputs. Batch norm normalises by this batch, as training will
    by its own [choice]; with batch_stats=False, for no training, by its running statistics."""
    quantizers = [m for m in qmodel.modules() if isinstance(m, Quantizer)]
    # The pass would move running statistics, so we run it on a copy that shares the quantizers.
    probe = copy.deepcopy(qmodel, {id(q): q for q in quantizers})
    for m in probe.modules():
        m.training = batch_stats and isinstance(m, nn.modules.batchnorm._BatchNorm)
    with hooked(quantizers, before=lambda q, inputs: q.initialize(inputs[0], candidates)):
        probe(images)


@torch.no_grad()
def export_int(qmodel: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{layer: (weight as int8, scale, zero point)}; (weight - zero point) * scale is bit-equal to
    what the network multiplies by. Scale and zero point broadcast against the weight."""
    integers = {}
    for name, layer in weight_layers(qmodel).items():
        if isinstance(layer, QuantLayer):
            n, scale, zero = layer.weight_quantizer.integers(layer.weight)
            shift = 2 ** (layer.weight_quantizer.bits - 1)  # 0 to 255 becomes -128 to 127
            integers[name] = (n - shift).to(torch.int8), scale, zero - shift
    return integers


# ------------------------------------------------------------------------------------ 2. Networks

MODELS = "resnet8 resnet20 resnet18 resnet50 mobilenet_v1 mobilenet_v2 vit_tiny".split()


def cifar_resnet(blocks, classes):
    """CIFAR ResNet (He et al. 2016, 4.2), three stages of `blocks`; 1 x 1 shortcuts [choice]."""
    layers, inputs = [Conv2dNormActivation(3, 16, 3)], 16
    for outputs in [16] * blocks + [32] * blocks + [64] * blocks:
        stride = 2 if outputs > inputs else 1
        shortcut = Conv2dNormActivation(
            inputs, outputs, 1, stride, activation_layer=None) if stride == 2 else None
        layers.append(BasicBlock(inputs, outputs, stride, shortcut))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def mobilenet_v1(classes, stem):
    """MobileNet (Howard et al. 2017, table 1): depthwise 3 x 3, pointwise 1 x 1 convolutions."""
    layers, inputs = [Conv2dNormActivation(3, 32, 3, 1 if stem == "cifar" else 2)], 32
    for outputs in (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024):
        stride = 2 if outputs > inputs > 32 else 1
        layers += [Conv2dNormActivation(inputs, inputs, 3, stride, groups=inputs),
                   Conv2dNormActivation(inputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))


class Attention(nn.Module):
    """Self-attention of N x T x width, called as torch's own is. `quantize` finds `Product`s."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scores, self.mix = heads, Product(), Product()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, *_, **__):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (self.scores(q, k.transpose(2, 3)) * q.shape[3] ** -0.5).softmax(3)
        return self.proj(self.mix(weights, v).transpose(1, 2).flatten(2)), None


def build_model(name: str, classes: int, depth: int = 4, stem: str = "cifar") -> nn.Module:
    """A new network for N x 3 x 32 x 32 images, `name` from MODELS. depth: blocks of vit_tiny. stem
    is for ResNet-18, ResNet-50 and MobileNets: "imagenet" keeps their first layers; "cifar" gives
    ResNets a 3 x 3 convolution without pooling, and sets the first stride (v2: first two) to 1."""
    if name == "vit_tiny":  # patches of 4 x 4; width 192 and 3 heads as DeiT-Ti, of depth 12
        model = torchvision.models.VisionTransformer(32, 4, depth, 3, 192, 768, num_classes=classes)
        for block in model.encoder.layers:
            block.self_attention = Attention(192, 3)
        return model
    if name == "mobilenet_v1":
        return mobilenet_v1(classes, stem)
    if name in ("resnet8", "resnet20"):  # resnet8 is that of MLPerf Tiny, 78 k parameters
        return cifar_resnet(1 if name == "resnet8" else 3, classes)
    # With "cifar", blocks start as the identity [choice]: first steps threw a ResNet-50 far off.
    options = {"dropout": 0.0} if name == "mobilenet_v2" else {
        "zero_init_residual": stem == "cifar"}
    model = torchvision.models.get_model(name, num_classes=classes, **options)
    if stem == "cifar" and name == "mobilenet_v2":
        model.features[0][0].stride = model.features[2].conv[1][0].stride = (1, 1)
    elif stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


# ---------------------------------------------------------------------------------------- 3. Data


class UsageError(Exception):
    """Something the user can put right: reported in one line, exit code 2, no traceback."""


def random_stream(*key) -> int:
    """A 32-bit seed, hashed from a purpose, seed and epoch; torch's CPU generator uses 32 bits."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16)


@dataclass
class Data:
    """A data set, whole on one device. Images are uint8 N x 32 x 32 x 3, those for training with
    `pad` black pixels around them; labels are int64 N."""

    name: str
    classes: int
    train_padded: Tensor
    train_labels: Tensor
    test_images: Tensor  # or, with --val, held-out training images
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    pad: int
    split: str  # what test_images are: "test" or "val"
    fingerprint: int  # of all pixels and labels used, for checkpoints

    def normalize(self, images):
        """uint8 N x H x W x 3 -> float N x 3 x H x W, a view in channels_last order."""
        return images.float().div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    def steps(self, batch_size):
        """Batches per epoch, at least 1. We drop an incomplete last one: it distorts batch norm."""
        return max(1, len(self.train_labels) // batch_size)

    def order(self, batch_size, draws):
        """The training images of an epoch, by index, in random order. cr_qat.py has another."""
        return torch.randperm(len(self.train_labels), generator=draws)

    def batches(self, batch_size, draws, views=("crop+flip",)):
        """One shuffled epoch of (images N x 3 x 32 x 32 for each of `views`, labels N). A view is
        cropped and flipped if its name says so. `draws` is on the CPU, so equal on all devices."""
        order, moves = self.order(batch_size, draws).to(self.train_labels.device), []
        for view in views:  # rows and columns to move by, whether to mirror
            shift = torch.randint(-self.pad, self.pad + 1, (2, len(order)), generator=draws)
            mirror = torch.randint(2, (1, len(order)), generator=draws)
            move = torch.cat([shift * ("crop" in view), mirror * ("flip" in view)])
            moves.append(move.to(order.device))
        for i in range(self.steps(batch_size)):  # everything is on the device: no step waits
            at = slice(i * batch_size, (i + 1) * batch_size)
            images = [self.cut(order[at], *move[:, at]) for move in moves]
            yield *images, self.train_labels[order[at]]

    def cut(self, index, row, column, mirrored):
        """Training images `index`, moved by (row, column) and mirrored where `mirrored` is 1."""
        line = torch.arange(32, device=index.device)
        rows = self.pad + row[:, None, None] + line[:, None]
        columns = self.pad + column[:, None] + torch.where(mirrored[:, None] > 0, 31 - line, line)
        return self.normalize(self.train_padded[index[:, None, None], rows, columns[:, None]])

    def sample(self, count):
        """`count` fixed random training images, not augmented: for calibration and diagnosis."""
        draws, labels = torch.Generator().manual_seed(random_stream("sample")), self.train_labels
        index = torch.randperm(len(labels), generator=draws)[:count].to(labels.device)
        return self.cut(index, *index.new_zeros(3, len(index))), labels[index]


def load_data(args: Namespace) -> Data:
    """Load the data set of the flags. "auto" is CIFAR-10 or, if that fails, `shapes`, and says so.
    --fp-seed draws subset and held-out images. Raises UsageError for bad data or sizes."""
    name = "cifar10" if args.dataset == "auto" else args.dataset
    read = {"folder": read_folder, "shapes": draw_shapes}.get(name, read_cifar)
    try:
        x, y, test_x, test_y = read(args.data_dir, name)
    except UsageError as error:
        if args.dataset != "auto":
            raise
        print(f"!! {error}\n!! Using 'shapes' instead; it is unlike CIFAR-10.", file=sys.stderr)
        name, (x, y, test_x, test_y) = "shapes", draw_shapes()
    classes = int(y.max()) + 1
    if args.val:
        test_x, test_y, x, y = split(x, y, args.val, args.fp_seed, "--val")
    if args.train_size:
        x, y, *_ = split(x, y, args.train_size, args.fp_seed, "--train-size")
    if args.dry_run:  # 64 to 127 images, if there are, evenly spaced: they may be sorted by class
        x, y, test_x, test_y = (t[::max(1, len(t) // 64)] for t in (x, y, test_x, test_y))
    content = b"".join(t.numpy().tobytes() for t in (x, y, test_x, test_y))
    pixels = x[::1 + len(x) // 10_000].float().div(255).flatten(0, 2)
    x = F.pad(x, (0, 0, *[args.pad] * 4))
    mean, std = pixels.mean(0), pixels.std(0).clamp_min(1e-3)
    parts = (t.to(args.device) for t in (x, y, test_x, test_y, mean, std))
    return Data(name, classes, *parts, args.pad, "val" if args.val else "test", zlib.crc32(content))


def split(x, y, size, seed, flag):
    """`size` random images and labels, as class-balanced as the data allows, and the others."""
    if not y.max() < size < len(y):
        raise UsageError(f"{flag} {size} should be from {y.max() + 1}, the number of classes, to "
                         f"{len(y) - 1}, all training images but one")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    one_hot = F.one_hot(y[order])
    rank = (one_hot.cumsum(0) * one_hot).sum(1)  # the number of each image within its class
    picked = torch.zeros_like(y, dtype=torch.bool)
    picked[order[rank.argsort(stable=True)[:size]]] = True
    return x[picked], y[picked], x[~picked], y[~picked]


def read_cifar(data_dir, name):
    """cifar10 or cifar100, which torchvision downloads, if need be, and verifies."""
    socket.setdefaulttimeout(5)  # a host that does not answer should fail, not hang
    try:
        parts = [getattr(torchvision.datasets, name.upper())(data_dir, train, download=True)
                 for train in (True, False)]
    except Exception as error:  # torchvision and the network raise half a dozen kinds
        raise UsageError(f"{name} cannot be read from {data_dir} or downloaded ({error}); try "
                         "--dataset shapes, which needs no download") from None
    return [torch.as_tensor(a) for part in parts for a in (part.data, part.targets)]


def read_image(path):
    """An image of 8 bits per channel as uint8 32 x 32 x 3."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # PIL would clip these silently
                raise ValueError("it has more than 8 bits per channel")
            return np.asarray(image.convert("RGB").resize((32, 32)))
    except Exception as error:  # PIL raises many kinds for a damaged image
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def read_folder(data_dir, name):
    """DIR/train/<class>/* and DIR/test/<class>/*, as torchvision's ImageFolder finds them."""
    try:
        train, test = (torchvision.datasets.ImageFolder(data_dir / part, loader=read_image)
                       for part in ("train", "test"))
    except OSError as error:
        raise UsageError(f"--data-dir {data_dir} should hold train/<class>/* and test/<class>/*: "
                         f"{str(error).splitlines()[0]}") from None
    if train.classes != test.classes or len(train.classes) < 2:
        raise UsageError(f"{data_dir} should have the same classes, two or more, in train and test")
    return [torch.from_numpy(np.stack(a)) for part in (train, test) for a in zip(*part)]


def draw_shapes(*_, train=2560, test=1000, seed=0):
    """Ten classes: 0, 2, 3, 4 or 6 lobes, filled or hollow (h = -1 or 0.55), random but for that.

        drawn where  h < rho / (r (1 + 0.4 cos(lobes * theta))) < 1"""
    rng, n = np.random.default_rng(seed), train + test
    kind, u = rng.permutation(np.arange(n) % 10)[:, None, None], rng.random((6, n, 1, 1))
    lobes, h = np.array([0, 2, 3, 4, 6])[kind % 5], np.where(kind > 4, 0.55, -1)
    dx, dy = np.arange(32) - 12 - 7 * u[0], np.arange(32)[:, None] - 12 - 7 * u[1]
    wave = np.cos(lobes * (np.arctan2(dy, dx) + 7 * u[3]))
    rho, edge = np.hypot(dx, dy), (6 + 4 * u[2]) * (1 + 0.4 * wave)
    cover = (0.5 + np.minimum(edge - rho, rho - h * edge)).clip(0, 1)  # soft edge
    image = (1 - cover) * 0.5 * u[4] + cover * (0.5 + 0.5 * u[5])
    image = rng.normal(image, 0.06, (3, *image.shape)).clip(0, 1).transpose(1, 2, 3, 0)
    x, y = torch.from_numpy((255 * image).astype(np.uint8, "C")), torch.from_numpy(kind.flatten())
    return x[:train], y[:train], x[train:], y[train:]


# --------------------------------------------------------------------------------------- 4. A run


class Parser(ArgumentParser):
    def error(self, message):  # argparse prints the whole usage first; one line is clearer
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, high):
    """An argparse type: a `kind` (int or float) within [low, high]; nan is refused."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        word = "a whole number" if kind is int else "a number"
        raise ArgumentTypeError(f"{text!r} should be {word} from {low:g} to {high:g}")
    return parse


def add_flags(parser, title, *flags):
    """A group of flags (name, type, default, help). A list as type holds the choices, a list as
    default allows several values, bool makes a switch."""
    group = parser.add_argument_group(title)
    for name, kind, default, text in flags:
        how = ({"action": "store_true"} if kind is bool
               else {"choices": kind} if isinstance(kind, list) else {"type": kind})
        if isinstance(default, list):
            how["nargs"] = "+"
        shown = f" (default: {default})" if default or default == 0 and kind is not bool else ""
        group.add_argument(name, default=default, help=text + shown, **how)


def base_parser(description: str, fewest_bits: int = 2) -> Parser:
    """The flags that all scripts share."""
    p = Parser(description=description, allow_abbrev=False)
    bits, count, seed = number(int, fewest_bits, 8), number(int, 1, 10**9), number(int, 0, 2**31)
    rate, decay = number(float, 1e-9, 1e3), number(float, 0, 1)
    add_flags(p, "data",
              ("--dataset", ["auto", "cifar10", "cifar100", "folder", "shapes"], "auto",
               "auto: cifar10 if it is in --data-dir or downloads, else shapes"),
              ("--data-dir", Path, "data", "folder of the data set; downloads go there too"),
              ("--train-size", count, None, "size of a class-balanced subset to train on"),
              ("--val", count, None, "hold out this many training images; evaluate on them only"),
              ("--augment", ["none", "flip", "crop+flip"], "crop+flip", "of the training images"),
              ("--pad", number(int, 0, 16), 2, "how many pixels a crop moves an image at most"))
    add_flags(p, "network",
              ("--model", MODELS, "resnet8", "the network"),
              ("--depth", number(int, 1, 48), 4, "blocks of vit_tiny"),
              ("--stem", ["cifar", "imagenet"], "cifar", "first layers for small or large images; "
                                                         "resnet8, resnet20, vit_tiny ignore it"),
              ("--bits", bits, None, "bits of weights and activations (default: 2)"),
              ("--wbits", bits, None, "bits of weights, in place of --bits"),
              ("--abits", bits, None, "bits of activations, in place of --bits"),
              ("--quantizer", list(QUANTIZERS), "lsq", "for activations; weights always have lsq"))
    add_flags(p, "training",
              ("--fp-epochs", count, 15, "epochs of full-precision training"),
              ("--fp-lr", rate, 0.2, "its peak learning rate; vit_tiny takes 1/200 of it (AdamW)"),
              ("--fp-weight-decay", decay, 1e-4, "its weight decay; vit_tiny always has 0.05"),
              ("--epochs", count, 6, "epochs of quantization-aware training (QAT), which follows"),
              ("--lr", rate, 0.02, "peak learning rate of QAT"),
              ("--weight-decay", decay, 5e-4, "weight decay of QAT"),
              ("--batch-size", number(int, 2, 10**6), 128, "images per step"),
              ("--seed", seed, [0], "one or more seeds; each method trains once with each"),
              ("--fp-seed", lambda text: text if text == "same" else seed(text), 0,
               "seed of full precision and of the subsets; same: take each --seed"),
              ("--recipe", ["paper"], None, "use the published settings as defaults"))
    add_flags(p, "output",
              ("--out", Path, "runs", "folder for checkpoints and results.jsonl"),
              ("--resume", bool, False, "continue where the same command stopped"),
              ("--dry-run", bool, False, "one epoch on about 64 images, written to OUT/dry-run"),
              ("--device", str, "auto", "cpu, cuda, cuda:1, mps, ..."),
              ("--tf32", bool, False, "faster, less exact matrix products (NVIDIA TensorFloat-32)"),
              ("--deterministic", bool, False, "use only cuDNN's deterministic algorithms; slower"))
    return p


def parse(parser: Parser, recipe: dict) -> Namespace:
    """Parse the command line, set up torch and make --out. `--recipe paper` makes `recipe` the
    defaults and prints it; other flags override it, --bits its wbits and abits. On CIFAR-100 the
    stem is "cifar" [choice]: the published full-precision accuracy suggests it."""
    args = parser.parse_args()
    if args.recipe:
        bits = {"wbits": None, "abits": None} if args.bits else {}
        if args.dataset == "cifar100":
            recipe = recipe | {"stem": "cifar"}
        parser.set_defaults(**recipe | bits)
        args = parser.parse_args()
    args.wbits, args.abits = args.wbits or args.bits or 2, args.abits or args.bits or 2
    if args.recipe:
        print("--recipe paper:", *(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in recipe))
    args.script, args.command = parser.prog, shlex.join(["python", parser.prog, *sys.argv[1:]])
    args.seed = list(dict.fromkeys(args.seed))
    if args.device == "auto":
        args.device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        parser.error(f"--device {args.device} cannot be used here "
                     f"({str(error).splitlines()[0]}); try --device cpu")
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = args.tf32
    cudnn.deterministic, cudnn.benchmark = args.deterministic, not args.deterministic
    if args.dry_run:
        args.out, args.epochs, args.fp_epochs = args.out / "dry-run", 1, 1
        args.batch_size = min(args.batch_size, 32)
    args.out.mkdir(parents=True, exist_ok=True)
    open(args.out / "results.jsonl", "a").close()  # an --out that cannot be written shows here
    return args


def entry(main):
    """Run main. User errors are one line; exit codes: 2 input or disk, 3 loss, 130 Ctrl-C."""
    if sys.platform == "linux":
        # Else glibc returns large blocks to the kernel; page faults cost 10 to 20 % of a CPU step.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the kernel
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB
    try:
        return main()
    except (UsageError, OSError) as error:
        code, line = 2, f"error: {error}"
    except FloatingPointError as error:
        code, line = 3, f"stopped: {error}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted; add --resume to continue after the last whole epoch"
    print(f"\n{line}", file=sys.stderr)
    sys.exit(code)


def sgd(model: nn.Module, lr: float, weight_decay: float, **options) -> torch.optim.SGD:
    """SGD, momentum 0.9; no weight decay on quantizers' parameters, except on PACT's [choice]."""
    free = {p for m in model.modules() if not getattr(m, "decays", True) for p in m.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in free]},
              {"params": [p for p in model.parameters() if p in free], "weight_decay": 0}]
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, **options)


def fp_optimizer(args, model):
    """Of full precision: Nesterov SGD, or AdamW for vit_tiny [choice]."""
    if args.model == "vit_tiny":
        return torch.optim.AdamW(model.parameters(), args.fp_lr / 200, weight_decay=0.05)
    return sgd(model, args.fp_lr, args.fp_weight_decay, nesterov=True)


def cosine_lr(step, total, peak, warmup=0.0):
    """Linear to `peak` over the first `warmup` share of `total` steps, then cosine to 0."""
    ramp = warmup * total
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / (total - ramp)))


# What full precision depends on, so that all scripts, methods and seeds can share one network.
FP_FLAGS = ("model depth stem augment pad batch_size fp_epochs fp_lr fp_weight_decay fp_seed "
            "tf32").split()
# These do not shape training, nor does any switch but --tf32. A fingerprint identifies the data.
NOT_SHAPING = "out data_dir dataset train_size val device recipe bits seed method command".split()


class Run:
    """The bookkeeping of one training run, so that a script's loop has only the paper's lines.
    `parts` is all that training changes, "model" and "optimizer" at least. Random numbers depend on
    (seed, epoch) only, so resuming is bit-identical, at least on the CPU. The file name ends in a
    hash of all that shapes training; `shared` (full precision) reads it without --resume.

        run = Run(args, data, "fpq", seed, args.epochs, model=..., optimizer=...)
        for epoch in run.epochs():                 # seeds, row, evaluation, checkpoint, resume
            for images, labels in run.batches():   # augmented batches, learning rate
                ...
                run.log(loss=loss)                 # a mean over the epoch; no device is waited for
        result = run.finish()                      # batch norm, evaluation, results.jsonl"""

    def __init__(self, args, data, method, seed, epochs, warmup=0.0, shared=False, **parts):
        self.args, self.data, self.method, self.seed, self.parts = args, data, method, seed, parts
        self.total, self.warmup, self.shared = epochs, warmup, shared
        self.peak, self.history, self.results = parts["optimizer"].defaults["lr"], [], {}
        self.identity = {"method": method, "seed": seed, "data": data.fingerprint} | {
            k: v for k, v in sorted(vars(args).items())
            if k in FP_FLAGS or not (shared or k in NOT_SHAPING or isinstance(v, bool))}
        digest = random_stream(self.identity)
        self.path = args.out / f"{method}-{args.model}-{data.name}-s{seed}-{digest:08x}.pt"
        if (args.resume or shared) and self.path.exists():
            self.load()

    def load(self):
        try:
            damaged = zipfile.ZipFile(self.path).testzip()  # torch.load checks no sums
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if damaged or state["identity"] != self.identity:
                raise ValueError
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.history, self.results = state["history"], state["results"]
        except Exception:  # half a dozen kinds for a damaged or incomplete file
            raise UsageError(f"{self.path} is damaged or from another command; delete it") from None

    def save(self):
        state = {"identity": self.identity, "history": self.history, "results": self.results}
        whole = io.BytesIO()  # since torch.save hides why a file cannot be written
        torch.save(state | {name: part.state_dict() for name, part in self.parts.items()}, whole)
        part_file = self.path.with_suffix(f".{os.getpid()}.part")  # so `path` is whole or absent
        try:
            part_file.write_bytes(whole.getbuffer())
            os.replace(part_file, self.path)
        finally:
            part_file.unlink(missing_ok=True)

    def stream(self, purpose):
        stage = "full precision" if self.shared else "method"
        return random_stream(stage, purpose, self.seed, self.epoch)

    def epochs(self):
        for self.epoch in range(len(self.history), self.total):
            torch.manual_seed(self.stream("noise"))
            self.sums, self.notes = {}, {}
            self.parts["model"].train()
            yield self.epoch
            every = 1 + len(self.data.test_labels) // 2500  # a row by epoch need not see them all
            done, (acc, loss) = self.epoch + 1, evaluate(self.parts["model"], self.data, every)
            self.check(loss)
            self.history.append(self.means | self.notes | {
                "epoch": done, "eval_loss": loss, "acc": acc, "seconds": self.seconds})
            self.save()
            left = int((self.total - done) * self.seconds)
            means = "  ".join(f"{k} {v:.4f}" for k, v in self.means.items())
            self.show(f"epoch {done:>3}/{self.total}  {means}  {self.data.split} loss {loss:.4f}  "
                      f"acc {acc:5.2f} %  {self.seconds:5.1f} s  left {left // 60}:{left % 60:02d}")

    def show(self, text):
        print(f"{self.method:<9} seed {self.seed}  {text}", flush=True)

    def batches(self, views=None):
        """The batches of the epoch, one image tensor for each of `views`, by default --augment."""
        started = time.perf_counter()
        size, steps = self.args.batch_size, self.data.steps(self.args.batch_size)
        draws = torch.Generator().manual_seed(self.stream("batches"))
        for i, batch in enumerate(self.data.batches(size, draws, views or (self.args.augment,))):
            self.time = self.epoch + i / steps  # epochs so far, for ramps
            rate = cosine_lr(self.epoch * steps + i, self.total * steps, self.peak, self.warmup)
            for group in self.parts["optimizer"].param_groups:
                group["lr"] = rate
            yield batch
        self.means = {k: v.item() / steps for k, v in self.sums.items()}  # waits, once per epoch
        self.seconds = time.perf_counter() - started
        self.check(*self.means.values())

    def check(self, *losses):
        """FloatingPointError, which ends the script, if a loss is not finite."""
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"{self.method}: the loss is not finite in epoch {self.epoch + 1}; the learning "
                f"rate peaks at {self.peak:g}, try a smaller one (--lr; full precision: --fp-lr)")

    def log(self, **losses):
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def finish(self, model=None, **row):
        """Evaluate the network, or `model`, and write its result, with the entries of `row`, as one
        line of results.jsonl. First, one fixed pass over the training images renews batch norm's
        statistics [choice]: those of the last batches move accuracy by up to a point."""
        a, model, method = self.args, model or self.parts["model"], row.get("method", self.method)
        if method not in self.results:
            draws = torch.Generator().manual_seed(random_stream("batch norm"))
            update_bn(self.data.batches(a.batch_size, draws, (a.augment,)), model)
            acc, loss = evaluate(model, self.data)
            self.results[method] = self.identity | {
                "dataset": self.data.name, "split": self.data.split,
                "train_size": len(self.data.train_labels), "acc": acc, "loss": loss,
                "command": a.command,
                "seconds_per_epoch": float(np.mean([h["seconds"] for h in self.history]))} | row
            self.save()
        r = self.results[method]
        self.show(f"{method}: {r['split']} loss {r['loss']:.4f}  acc {r['acc']:.2f} %")
        return record(a.out, r)


def record(out, result):
    """Append result to OUT/results.jsonl unless it is there already."""
    line = json.dumps(result).encode() + b"\n"
    with open(out / "results.jsonl", "a+b", buffering=0) as file:
        file.seek(0)
        if line not in file.read():  # a kill after the last checkpoint may have come before this
            written = file.write(line)  # appended whole: two processes do not mix
            if written < len(line):
                file.truncate(file.seek(0, os.SEEK_END) - written)
                raise OSError(f"{out / 'results.jsonl'}: disk full; free space, then add --resume")
    return result


def full_precision(args: Namespace, data: Data) -> tuple[nn.Module, dict]:
    """The full-precision network in eval mode and its result; trained once, then read."""
    torch.manual_seed(random_stream("weights", args.fp_seed))
    model = build_model(args.model, data.classes, args.depth, args.stem)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = fp_optimizer(args, model)
    run = Run(args, data, "fp", args.fp_seed, args.fp_epochs, warmup=0.1, shared=True,
              model=model, optimizer=optimizer)  # the rate rises for a tenth of the steps [choice]
    for _ in run.epochs():
        for images, labels in run.batches():
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    return model.eval(), run.finish(wbits=32, abits=32, quantizer=None)


def per_seed(args):
    """(args, seed, data) for every --seed. Where --fp-seed is "same", it is that seed."""
    data, same = None, args.fp_seed == "same"
    for seed in args.seed:
        if same:
            args.fp_seed = seed
        data = load_data(args) if same or data is None else data
        yield args, seed, data


def print_row(*cells):
    print(" ".join(f"{cell:<19}" for cell in cells).rstrip())


def mean_and_error(values, signed=""):
    """mean ± standard error of the mean, if there are two values or more."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):{signed}.2f}{error}" if values else ""


def result_table(results: list[dict]) -> str:
    """A row per method and bits: accuracy, and its difference to the baseline of the same seed."""
    first, groups = results[0], {}
    for r in results:
        groups.setdefault((r["method"], f"{r['wbits']}/{r['abits']}"), {})[r["seed"]] = r
    lines = [f"\n{first['dataset']}, {first['train_size']} training images, {first['model']}, "
             f"quantizer {results[-1]['quantizer']}, augment {first['augment']}; {first['split']} "
             "accuracy after the last epoch, batch norm renewed",
             f"{'method':<14}{'W/A':<7}{'acc %':<15}{'vs baseline':<15}seeds"]
    for (method, bits), group in groups.items():
        rows, reference = group.values(), groups.get(("baseline", bits), {})
        gains = [r["acc"] - reference[s]["acc"] for s, r in group.items() if s in reference]
        acc = mean_and_error([r["acc"] for r in rows])
        gain = mean_and_error(gains, "+") if method != "baseline" else ""
        lines.append(f"{method:<14}{bits:<7}{acc:<15}{gain:<15}{len(rows)}")
    if len({r["seed"] for r in results if r["method"] != "fp"}) > len(
            {r["fp_seed"] for r in results}):
        lines.append("± is over seeds of one full-precision network; other networks may differ")
    return "\n".join(lines)


# --------------------------------------------------------------------- 5. Evaluation and flatness


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, every: int = 1) -> tuple[float, float]:
    """(accuracy in %, mean cross-entropy) on all test images, or on one of `every` so many; leaves
    training mode as it was."""
    training, labels = model.training, data.test_labels[::every]
    model.eval()
    logits = torch.cat([model(data.normalize(x)) for x in data.test_images[::every].split(250)])
    model.train(training)
    right = logits.argmax(1) == labels
    return 100 * right.sum().item() / len(labels), F.cross_entropy(logits, labels).item()


def gradient_ratio(term: Tensor, cross_entropy: Tensor, model: nn.Module) -> float:
    """The force of a loss term: |d term / d w| / |d cross_entropy / d w|, w all layer weights."""
    weights = [layer.weight for layer in weight_layers(model).values()]
    grads = [torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
             for loss in (term, cross_entropy)]
    of_term, of_cross_entropy = map(nn.utils.get_total_norm, grads)
    return (of_term / of_cross_entropy).item()


def hessian_vector(loss_fn, params):
    """(function v -> H v, a zero vector like v). H is the Hessian of the scalar loss_fn() in all
    entries of `params`; a quantized network's H is that of its straight-through gradients."""
    def flat_grad(out, v=None):
        grads = torch.autograd.grad(out, params, v, create_graph=v is None, retain_graph=True,
                                    materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])
    gradient = flat_grad(loss_fn())
    return lambda v: flat_grad(gradient, v), torch.zeros_like(gradient)


def hessian_trace(loss_fn, params: list[Tensor], probes: int,
                  generator: torch.Generator | None = None) -> tuple[float, float]:
    """Hutchinson's estimate of Tr(H), H the Hessian of loss_fn() in `params`, which noise penalises
    (Eq. 7): mean and standard error of v.Hv over `probes` >= 2 random vectors v of entries ±1."""
    product, zeros = hessian_vector(loss_fn, params)
    signs = [2 * zeros.bernoulli(0.5, generator=generator) - 1 for _ in range(probes)]
    samples = torch.stack([v @ product(v) for v in signs])
    return samples.mean().item(), samples.std().item() / math.sqrt(probes)


def hessian_top_eigenvalue(loss_fn, params: list[Tensor], iters: int,
                           generator: torch.Generator | None = None) -> float:
    """The Hessian eigenvalue of largest magnitude, by `iters` steps of power iteration."""
    product, zeros = hessian_vector(loss_fn, params)
    hv = zeros.normal_(generator=generator)
    for _ in range(iters):
        v = hv / hv.norm().clamp_min(TINY)
        hv = product(v)
    return (v @ hv).item()  # the Rayleigh quotient, as |v| = 1


def sharpness(model: nn.Module, data: Data, probes: int = 4, iters: int = 0) -> tuple[float, ...]:
    """(trace, its standard error[, top eigenvalue if iters]) of the loss's Hessian in the layers'
    weights. Batch norm takes its statistics from the same 256 training images [choice]."""
    (images, labels), model = data.sample(256), copy.deepcopy(model)
    update_bn([images], model)
    model.eval()
    weights = [layer.weight for layer in weight_layers(model).values()]
    draws = torch.Generator(device=images.device).manual_seed(0)
    loss = lambda: F.cross_entropy(model(images), labels)  # noqa: E731
    found = hessian_trace(loss, weights, probes, draws)
    return (*found, hessian_top_eigenvalue(loss, weights, iters, draws)) if iters else found


@contextmanager
def shifted(params, shifts):
    """Adds shifts to params in a context; its exit removes them bit for bit, but keeps a step."""
    params = [p.detach() for p in params]  # the same memory
    latent = [p.clone() for p in params]
    moved = [p.add_(shift).clone() for p, shift in zip(params, shifts)]
    try:
        yield
    finally:
        for p, w, m in zip(params, latent, moved):
            p.copy_(w + (p - m))  # p - m is the step, if one was taken inside


@dataclass
class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient at w + rho g / |g|, w being
    all parameters, step sizes too [choice]."""

    model: nn.Module
    rho: float

    def ascended(self):
        """A context in which the parameters are w + rho g / |g|, g being their .grad on entry. Both
        passes move batch norm's running statistics, but `Run.finish` renews those [choice]."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params]).clamp_min(TINY)
        return shifted(params, [p.grad * (self.rho / norm) for p in params])
