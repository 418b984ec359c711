"""What the four scripts share: quantizers, networks, data, flatness, runs.

"The paper" is that of FPQ, feature-perturbed quantization (arXiv 2503.11159). Its quantizer is LSQ,
an earlier method, which all four scripts use by default. Equation numbers are the paper's. Three
scripts train a quantized network (QAT); flat_quant.py quantizes after training. [choice] marks a
decision of ours.

    1. Quantizers    fake_quantize, Quantizer, quantize, calibrate: what the equations need
    2. Networks      build_model
    3. Data          read_images, make_data, Data
    4. Evaluation    evaluate, hessian_trace, hessian_top_eigenvalue, sam_loss
    5. Runs          flags, learning rate, Checkpoint, end_epoch, finish, full_precision, load
"""

import os

# Threads of OpenMP spin while they wait for work, which starves other programs. A short spin costs
# nothing on an idle machine. OpenMP reads this variable when torch is imported, so it comes first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import copy
import ctypes
import hashlib
import io
import json
import math
import platform
import shlex
import socket
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps  # comes with torchvision, which reads images with it
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import Conv2dNormActivation

try:
    import fcntl
except ImportError:  # on Windows: two commands at once may write a row twice
    fcntl = None

TINY = 1e-12  # no step size is smaller, so that x / s stays finite if one becomes 0


# ---------------------------------------------------------------------------------- 1. Quantizers


def fake_quantize(
    x: Tensor, step_size: Tensor, zero_point: Tensor, qmin: int, qmax: int, grad_scale: float = 1.0
) -> Tensor:
    """Fake quantization (Eq. 3) with the gradients of LSQ (learned step size quantization, 2020).

    x has any shape. step_size s > 0 and zero_point z, the integer that stands for 0, broadcast
    against x.

        x_int = clip(round(x/s) + z, q_min, q_max)
        x_hat = (x_int - z) * s

    The grid is the set of values that x_hat can take. We say that x lies inside the grid if
    q_min < x/s + z < q_max. The straight-through estimator takes the derivative of rounding as 1.
    So d round(x/s)/ds = -x/s^2. Inside, x_hat is s round(x/s), and the product rule gives
    dx_hat/ds = round(x/s) + s (-x/s^2).

        dx_hat/dx = 1                   inside
        dx_hat/dx = 0                   outside
        dx_hat/ds = x_hat/s - x/s       inside
        dx_hat/ds = x_hat/s             outside: this is q_min - z below, q_max - z above

    The gradient of s is summed over the elements that share s, and multiplied by grad_scale.
    """
    return FakeQuantize.apply(x, step_size, zero_point, qmin, qmax, grad_scale)


class FakeQuantize(torch.autograd.Function):
    """Forward and backward of `fake_quantize`.

    The backward pass consists of differentiable operations too, so that a Hessian can be taken. In
    it x_hat has these same gradients once more.
    """

    @staticmethod
    def forward(ctx, x, step_size, zero_point, qmin, qmax, grad_scale):
        x_int = (x / step_size).round_().add_(zero_point).clamp_(qmin, qmax)
        x_hat = x_int.sub_(zero_point).mul_(step_size)  # Eq. 3
        ctx.save_for_backward(x, x_hat, step_size, zero_point)
        ctx.qmin = qmin
        ctx.qmax = qmax
        ctx.grad_scale = grad_scale
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        x, x_hat, step_size, zero_point = ctx.saved_tensors
        # grad * dx_hat/dx: grad inside, 0 outside and on the bounds, as for a hard tanh
        v = (x / step_size).add_(zero_point)
        grad_x = torch.ops.aten.hardtanh_backward(grad, v, ctx.qmin, ctx.qmax)
        # grad * dx_hat/ds: grad_x is grad inside and 0 outside, so the difference is
        # grad (x_hat - x) inside and grad x_hat outside
        grad_s = (grad * x_hat - grad_x * x).sum_to_size(step_size.shape) / step_size
        return grad_x, grad_s * ctx.grad_scale, None, None, None, None


class Quantizer(nn.Module):
    """LSQ: a learned step size and a fixed zero point, for integers from 0 to qmax = 2^bits - 1.

    One pair serves the whole tensor or, with `channels`, each channel (dim 0): the paper has one
    for each output channel of a weight and one for all activations of a layer. Step size and zero
    point are NaN until `calibrate`. If training makes a step size negative, its absolute value is
    used.

    At 8 bits the step size is a buffer and stays as calibrated [choice]. When we learned it, it
    grew ninefold.

    Raises ValueError for bits outside 1 to 8 or, with `channels`, outside 2 to 8.
    """

    decays = False  # no weight decay on step sizes [choice]; see `sgd`

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        fewest = 2 if channels else 1
        if not fewest <= bits <= 8:
            raise ValueError(f"bits should be from {fewest} to 8, not {bits}")
        self.bits = bits
        self.channels = channels
        self.qmax = 2**bits - 1
        shape = [channels] if channels else []
        self.add_value("step_size", torch.full(shape, math.nan))
        self.register_buffer("zero_point", torch.full(shape, math.nan))

    def add_value(self, name: str, value: Tensor) -> None:
        """Add self.`name`: a parameter, which is learned, or at 8 bits a buffer, which is not."""
        if self.bits < 8:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positive step size and zero point, shaped to broadcast against x."""
        # Only on the CPU: elsewhere the test would wait for the device in each training step.
        if self.zero_point.device.type == "cpu" and self.zero_point.isnan().any():
            raise RuntimeError("no step size yet: first call common.calibrate(qmodel, images)")
        shape = [-1] + [1] * (x.dim() - 1) if self.channels else []
        step_size = self.step_size.abs().clamp_min(TINY).reshape(shape)
        return step_size, self.zero_point.reshape(shape)

    def grad_scale(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(N q_max), where N elements of x share a step size.

        The gradient of s is a sum over N elements. Without this factor a step size would move much
        faster, relative to its size, than weights do. For activations N counts the whole batch, as
        in MQBench, the library of FPQ's authors; LSQ's text counts one image [choice]. We
        take q_max = 2^bits - 1 for weights as well [choice]. LSQ has 2^(bits - 1) - 1, as its
        integers for weights are signed.
        """
        sharing = max(1, x.numel() // self.step_size.numel())
        return (sharing * self.qmax) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        step_size, zero_point = self.grid(x)
        return fake_quantize(x, step_size, zero_point, 0, self.qmax, self.grad_scale(x))

    @torch.no_grad()
    def initialize(self, x: Tensor, candidates: int = 100) -> None:
        """Set step size and zero point from the values of x.

            s = a S,   S = (x_max - x_min) / q_max     Eq. 4
            z = round(q_max - x_max / S)               Eq. 5

        The paper has a = 1. We try `candidates` values, a = 1, 0.99, 0.98, ..., and take the one
        with the least squared error [choice]. z is the same for each a, so a smaller a shrinks the
        grid around 0. The range always holds 0 [choice], so that padding and the zeros of a ReLU
        stay exact.
        """
        rows = spaced_values(x, self.channels or 1)
        low = rows.amin(1).clamp_max(0)
        high = rows.amax(1).clamp_min(0)
        width = high - low
        widest = width.max() if width.max() > TINY else 1
        # A channel of zeros has no width: it gets the range from -widest to 0
        low = torch.where(width > TINY, low, -widest)
        # 0 must not be the upper bound of the grid, where x gets no gradient. So a channel without
        # values above 0 gets one level there; a single bit has none to spare. At the lower bound
        # nothing is lost: zeros there come from a ReLU, which passes no gradient at 0 either.
        if self.bits > 1:
            high = torch.where(high > 0, high, -low / (self.qmax - 1))
        S = (high - low) / self.qmax  # Eq. 4
        z = (self.qmax - high / S).round()  # Eq. 5
        fractions = torch.arange(candidates, 0, -1, device=x.device) / candidates
        errors = []
        for a in fractions:
            s = a * S
            x_hat = fake_quantize(rows, s[:, None], z[:, None], 0, self.qmax)
            errors.append((x_hat - rows).square().sum(1))
        best = fractions[torch.stack(errors).argmin(0)]
        self.step_size.copy_((best * S).reshape_as(self.step_size))
        self.zero_point.copy_(z.reshape_as(self.zero_point))


def spaced_values(x: Tensor, channels: int, most: int = 65536) -> Tensor:
    """The values of x, channels x values. Of a large x: evenly spaced ones, and the extremes."""
    rows = x.reshape(channels, -1)
    count = max(1024, most // channels)
    if rows.shape[1] <= count:
        return rows
    last = rows.shape[1] - 1
    index = torch.arange(count, device=x.device) * last // (count - 1)
    low = rows.amin(1, keepdim=True)
    high = rows.amax(1, keepdim=True)
    return torch.cat([rows[:, index], low, high], 1)


def scale_gradient(t: Tensor, scale: float | Tensor) -> Tensor:
    """Return t; the gradient that flows back to it is multiplied by `scale`."""
    scaled = t * scale
    return t.detach() + (scaled - scaled.detach())  # the bracket is 0, but has the gradient


class LSQPlus(Quantizer):
    """LSQ+ (Bhalgat et al. 2020), for activations: the grid has a learned offset beta as well.

        x_hat = fake_quantize(x - beta) + beta
        dx_hat/dbeta = 0 inside the grid, 1 outside

    beta starts at 0. Its gradient is scaled like that of the step size [choices].
    """

    def __init__(self, bits: int):
        super().__init__(bits)
        self.add_value("offset", torch.tensor(0.0))

    @torch.no_grad()
    def initialize(self, x: Tensor, candidates: int = 100) -> None:
        self.offset.zero_()
        super().initialize(x, candidates)

    def forward(self, x: Tensor) -> Tensor:
        beta = scale_gradient(self.offset, self.grad_scale(x))
        return super().forward(x - beta) + beta


class PACT(Quantizer):
    """PACT (parameterized clipping activation, Choi et al. 2018): only clipped values move alpha.

        x_hat = round(clip(x, 0, alpha) / s) * s,   s = alpha / n
        dx_hat/dalpha = 1 where x >= alpha, else 0

    n is the number of levels above 0: q_max - z, where z is 0 unless the data are signed.

    We store s instead of alpha = n s. SGD moves s by lr dL/ds = lr n dL/dalpha, and so alpha by lr
    n^2 dL/dalpha. Therefore we divide the gradient of s by n^2. alpha starts where LSQ's grid ends.
    If the data are signed, we clip at -z * s as well, and values below that move s too [choices].
    """

    decays = True  # as in PACT's paper: weight decay keeps alpha, and so the rounding error, small

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x_hat = super().forward(x)
        step_size, zero_point = self.grid(x)
        n = (self.qmax - zero_point).clamp_min(1)  # it may be 0 with a single bit
        step_size = scale_gradient(step_size, n**-2)
        low = -zero_point * step_size
        alpha = n * step_size
        clipped = torch.where(x >= alpha, alpha, torch.where(x <= low, low, x))
        return clipped + (x_hat - clipped).detach()


QUANTIZERS = {"lsq": Quantizer, "lsq+": LSQPlus, "pact": PACT}  # of activations; weights have lsq
LAYERS = (nn.Conv2d, nn.Linear)  # the kinds that `quantize` quantizes


class QuantLayer(nn.Module):
    """A Conv2d or Linear layer with quantized input and weight; it keeps the layer's parameters."""

    def __init__(self, layer: nn.Module, wbits: int, abits: int, quantizer: str = "lsq"):
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.input_quantizer = QUANTIZERS[quantizer](abits)
        self.weight_quantizer = Quantizer(wbits, channels=len(layer.weight))
        self.product = F.linear
        if isinstance(layer, nn.Conv2d):
            self.product = partial(
                F.conv2d,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class Product(nn.Module):
    """The matrix product a @ b of two activations. `quantize` puts quantizers on both."""

    def __init__(self):
        super().__init__()
        self.a_quantizer = nn.Identity()
        self.b_quantizer = nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a_quantizer(a) @ self.b_quantizer(b)


@contextmanager
def hooked(modules, before=None, after=None):
    """A context in which every call of one of `modules` runs a function of ours.

    It is before(module, inputs) or after(module, inputs, output). What it returns, if anything,
    replaces the inputs or the output.
    """
    with ExitStack() as stack:  # a hook's handle is a context that removes it
        for module in modules:
            if before:
                stack.enter_context(module.register_forward_pre_hook(before))
            if after:
                stack.enter_context(module.register_forward_hook(after))
        yield


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by a weight, quantized or not, by name, in order of definition."""
    kinds = (*LAYERS, QuantLayer)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def feature_layers(model: nn.Module) -> list[nn.Module]:
    """All `weight_layers` but the classifier, which is the last one defined."""
    return list(weight_layers(model).values())[:-1]


def layer_bits(model: nn.Module, bits: int) -> dict[str, int]:
    """{layer: bits}: 8 for the first and the last one defined, as in FPQ; else `bits`."""
    names = list(weight_layers(model))
    ends = (names[0], names[-1])
    return {name: 8 if name in ends else bits for name in names}


def quantizers_of(model: nn.Module) -> dict[str, Quantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}


def quantize(model: nn.Module, wbits: int, abits: int, quantizer: str = "lsq") -> nn.Module:
    """A copy of `model` whose Conv2d, Linear and `Product` modules quantize both factors.

    The first and the last layer in order of definition get 8 bits. Call `calibrate` next.

    These layers stay in full precision:
    - a convolution whose padding is not zeros
    - a layer of a class derived from Conv2d or Linear, as it may compute something else
    - a layer whose weight is computed anew in each pass: weight_norm, spectral_norm, pruning

    A warning names each parameter of two or more dimensions that stays in full precision. Raises
    ValueError if `model` is quantized already. If it has an nn.TransformerEncoderLayer, torch's
    fast path for these is switched off, for all networks.
    """
    if quantizers_of(model):
        raise ValueError("the network is quantized already")
    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:  # torch copies no tensor that hangs on a graph of gradients
        raise RuntimeError(
            "the network cannot be copied; if it keeps a result (self.feature = x) or computes a "
            "weight, run it once under torch.no_grad() before quantize"
        ) from error
    weight_bits = layer_bits(model, wbits)
    input_bits = layer_bits(model, abits)
    quantized = {}  # {layer: what replaces it}
    for name, layer in weight_layers(model).items():
        own_weight = type(layer) in LAYERS and isinstance(layer.weight, nn.Parameter)
        if own_weight and getattr(layer, "padding_mode", "zeros") == "zeros":
            new = QuantLayer(layer, weight_bits[name], input_bits[name], quantizer)
            quantized[layer] = new.to(layer.weight)
    # A module that is stored under two names is replaced under both
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Product):
            like = next(model.parameters())
            module.a_quantizer = QUANTIZERS[quantizer](abits).to(like)
            module.b_quantizer = QUANTIZERS[quantizer](abits).to(like)
        elif module in quantized and module is not model:
            model.set_submodule(name, quantized[module])
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        # In evaluation its fast path would read the weights past their quantizers
        torch.backends.mha.set_fastpath_enabled(False)
    weights = {layer.weight for layer in quantized.values()}
    left = [name for name, p in model.named_parameters() if p.dim() > 1 and p not in weights]
    if left:
        warnings.warn(f"left in full precision: {', '.join(left)}", stacklevel=2)
    return quantized.get(model, model)  # a network may be a single layer


@torch.no_grad()
def calibrate(
    qmodel: nn.Module, images: Tensor, candidates: int = 100, batch_stats: bool = True
) -> None:
    """Set the step sizes and zero points of weights and inputs by one pass of `images`.

    FPQ's paper calibrates with 100 images. Just before a quantizer is called, with a weight or an
    input, it is initialized from that tensor. So each layer sees the quantized output of those
    before it. If a quantizer is called twice, both tensors count. Batch norm normalises by this
    batch, as training will [choice]. Give batch_stats=False if no training follows: then it takes
    its running statistics. A quantizer that the pass never reaches is named in a warning and
    removed. Raises ValueError for values that are not finite.
    """
    if len(images) == 0:
        raise ValueError("calibration: there are no images")
    # A pass changes running statistics, so we run it on a copy, and copy the values of its
    # quantizers back.
    probe = copy.deepcopy(qmodel).eval()
    for module in probe.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = batch_stats
    quantizers = quantizers_of(probe)
    name_of = {quantizer: name for name, quantizer in quantizers.items()}
    seen = {name: [] for name in quantizers}

    def fit(quantizer, inputs):
        name = name_of[quantizer]
        if not inputs[0].isfinite().all():
            raise ValueError(f"calibration: {name} meets values that are not finite")
        seen[name].append(spaced_values(inputs[0], quantizer.channels or 1))
        quantizer.initialize(torch.cat(seen[name], 1), candidates)

    with hooked(quantizers.values(), before=fit):
        probe(images)
    for name, quantizer in quantizers.items():
        if seen[name]:
            qmodel.get_submodule(name).load_state_dict(quantizer.state_dict())
        else:
            qmodel.set_submodule(name, nn.Identity())
    missed = [name for name in seen if not seen[name]]
    if missed:
        warnings.warn(
            "calibration never reached these, which stay in full precision: " + ", ".join(missed),
            stacklevel=3,  # no_grad adds a level
        )


@torch.no_grad()
def export_int(qmodel: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{layer: (weight as int8, scale, zero point)} of all quantized layers.

    (weight - zero point) * scale is bit-equal to what the network multiplies by. Both integers are
    2^(bits - 1) smaller than x_int and z of `fake_quantize`, to fit into int8. Scale and zero point
    broadcast against the weight.
    """
    integers = {}
    for name, layer in weight_layers(qmodel).items():
        quantizer = getattr(layer, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer):
            step_size, zero_point = quantizer.grid(layer.weight)
            n = (layer.weight / step_size).round().add(zero_point).clamp(0, quantizer.qmax)
            shift = 2 ** (quantizer.bits - 1)  # at 8 bits: from 0..255 to -128..127
            integers[name] = ((n - shift).to(torch.int8), step_size, zero_point - shift)
    return integers


# ------------------------------------------------------------------------------------ 2. Networks

MODELS = ["resnet8", "resnet20", "resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "vit_tiny"]


def cifar_resnet(blocks: int, classes: int) -> nn.Module:
    """CIFAR ResNet (He et al. 2016, 4.2), three stages of `blocks`; 1 x 1 shortcuts [choice]."""
    layers = [Conv2dNormActivation(3, 16, 3)]
    inputs = 16
    for outputs in [16] * blocks + [32] * blocks + [64] * blocks:
        if outputs == inputs:
            layers.append(BasicBlock(inputs, outputs))
        else:
            shortcut = Conv2dNormActivation(inputs, outputs, 1, stride=2, activation_layer=None)
            layers.append(BasicBlock(inputs, outputs, stride=2, downsample=shortcut))
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def mobilenet_v1(classes: int, stem: str) -> nn.Module:
    """MobileNet (Howard et al. 2017, table 1): depthwise 3 x 3, then pointwise 1 x 1."""
    layers = [Conv2dNormActivation(3, 32, 3, stride=1 if stem == "cifar" else 2)]
    inputs = 32
    for outputs in [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]:
        # Each doubling of the width comes with a stride, except the first doubling
        stride = 2 if outputs > inputs > 32 else 1
        layers.append(Conv2dNormActivation(inputs, inputs, 3, stride, groups=inputs))
        layers.append(Conv2dNormActivation(inputs, outputs, 1))
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes)]
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Self-attention of N x T x width, called as torch's own, nn.MultiheadAttention, is.

    `quantize` finds its `Product`s.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.scores = Product()
        self.mix = Product()

    def forward(self, x: Tensor, *_, **__) -> tuple[Tensor, None]:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = q.shape[3] ** -0.5
        scores = self.scores(q, k.transpose(2, 3)) * scale
        mixed = self.mix(scores.softmax(3), v)
        return self.proj(mixed.transpose(1, 2).flatten(2)), None


def build_model(name: str, classes: int, depth: int = 4, stem: str = "cifar") -> nn.Module:
    """A new network for N x 3 x 32 x 32 images; `name` is one of MODELS.

    depth: blocks of vit_tiny. stem is for ResNet-18, ResNet-50 and the MobileNets. "imagenet"
    keeps their first layers. "cifar" gives ResNets a 3 x 3 convolution without pooling, and sets
    the first stride of MobileNets, in v2 the first two, to 1.
    """
    if name == "resnet8":  # that of MLPerf Tiny, 78,000 parameters
        return cifar_resnet(1, classes)
    if name == "resnet20":
        return cifar_resnet(3, classes)
    if name == "mobilenet_v1":
        return mobilenet_v1(classes, stem)
    if name == "vit_tiny":  # width and heads as in DeiT-Ti
        model = torchvision.models.VisionTransformer(
            image_size=32,
            patch_size=4,
            num_layers=depth,
            num_heads=3,
            hidden_dim=192,
            mlp_dim=768,
            num_classes=classes,
        )
        for block in model.encoder.layers:
            block.self_attention = Attention(192, 3)
        return model
    if name == "mobilenet_v2":
        model = torchvision.models.mobilenet_v2(num_classes=classes, dropout=0.0)
        if stem == "cifar":
            model.features[0][0].stride = (1, 1)
            model.features[2].conv[1][0].stride = (1, 1)  # of the first block that has a stride
        return model
    # With "cifar", residual blocks start as the identity [choice]: if not, a ResNet-50 diverges.
    model = torchvision.models.get_model(
        name, num_classes=classes, zero_init_residual=stem == "cifar"
    )
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


# ---------------------------------------------------------------------------------------- 3. Data


class UsageError(Exception):
    """Something the user can put right: reported in one line, exit code 2, no traceback."""


def hashed(*key) -> int:
    """A number of 32 bits that stands for `key`: a seed, or a part of a file's name."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return int(digest[:8], 16)


def checksum(tensors) -> int:
    """A number of 32 bits that differs if a value in one of `tensors` does."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), crc)
    return crc


@dataclass
class Data:
    """A data set, whole on one device. Images are uint8, N x 32 x 32 x 3; labels are int64, N.

    Training images have `pad` black pixels on each side. With --val, test_images are held-out
    training images; the field `split` says which, "test" or "val". fingerprint: a checksum of all
    pixels and labels in use.
    """

    name: str
    class_names: list[str]
    train_padded: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    pad: int
    split: str
    fingerprint: int

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 N x H x W x 3 -> float N x 3 x H x W, a view in channels_last order."""
        pixels = images.float().div_(255)
        pixels = pixels.sub_(self.mean).div_(self.std)
        return pixels.permute(0, 3, 1, 2)

    def steps(self, batch_size: int) -> int:
        """Batches per epoch, at least 1. We drop an incomplete last one: it distorts batch norm."""
        return max(1, len(self.train_labels) // batch_size)

    def batches(self, batch_size: int, draws: torch.Generator, *views: str, order=None):
        """One epoch of batches: (images N x 3 x 32 x 32, labels N).

        `views` say how to augment, like "crop+flip". With two of them a batch is (images, the same
        images augmented anew, labels). `draws` is the generator for this epoch, on the CPU, so that
        all devices see equal batches. `order` has the indices of the epoch's images; without it
        they are shuffled.
        """
        if order is None:
            order = torch.randperm(len(self.train_labels), generator=draws)
        order = order.to(self.train_labels.device)
        # Each view has a generator of its own, with a seed next to that of `draws`, so that a
        # second view does not change the first.
        seed = draws.initial_seed() + 1
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(views))]
        for i in range(max(1, len(order) // batch_size)):
            index = order[i * batch_size : (i + 1) * batch_size]
            images = [self.view(index, view, own) for view, own in zip(views, generators)]
            yield *images, self.train_labels[index]

    def view(self, index: Tensor, augment: str, draws: torch.Generator) -> Tensor:
        """Training images `index`, each cropped and flipped at random if `augment` says so.

        A crop moves the window of 32 x 32 pixels by up to `pad`; a flip mirrors its columns.
        """
        n = len(index)
        # shift[0] is that of rows, shift[1] that of columns
        shift = torch.randint(-self.pad, self.pad + 1, (2, n, 1, 1), generator=draws)
        flip = torch.randint(2, (n, 1, 1), generator=draws)
        shift = shift * ("crop" in augment) + self.pad
        # A copy to CUDA need not be waited for
        row, column = shift.to(index.device, non_blocking=index.is_cuda)  # N x 1 x 1 each
        flip = (flip * ("flip" in augment)).to(index.device, non_blocking=index.is_cuda)
        line = torch.arange(32, device=index.device)
        rows = row + line[:, None]  # N x 32 x 1
        columns = column + torch.where(flip > 0, 31 - line, line)  # N x 1 x 32
        pixels = self.train_padded[index[:, None, None], rows, columns]  # N x 32 x 32 x 3
        return self.normalize(pixels)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` fixed random training images, not augmented, and labels: for calibration."""
        draws = torch.Generator().manual_seed(hashed("sample"))
        index = torch.randperm(len(self.train_labels), generator=draws)[:count]
        index = index.to(self.train_labels.device)
        return self.view(index, "none", draws), self.train_labels[index]


def read_images(args: argparse.Namespace) -> tuple:
    """(name, class names, images, labels, test images, test labels) of --dataset.

    A command reads them once, for all its seeds. "auto" is CIFAR-10 or, if that is not to be had,
    `shapes`, and says so. Raises UsageError.
    """
    say(f"reading the images of {args.dataset}")
    try:
        if args.dataset == "shapes":
            return draw_shapes()
        if args.dataset == "folder":
            return read_folder(args.data_dir)
        return read_cifar(args.data_dir, "cifar10" if args.dataset == "auto" else args.dataset)
    except UsageError as error:
        if args.dataset != "auto":
            raise
        print(f"!! {error}\n!! Using 'shapes' instead; it is unlike CIFAR-10.", file=sys.stderr)
        return draw_shapes()


def make_data(args: argparse.Namespace, images: tuple, seed: int) -> Data:
    """The subset that the flags ask for, drawn by `seed`, on --device. Raises UsageError."""
    name, class_names, x, y, test_x, test_y = images
    if args.val:
        test_x, test_y, x, y = pick_balanced(x, y, args.val, seed, "--val")
    if args.train_size:
        x, y, *_ = pick_balanced(x, y, args.train_size, seed, "--train-size")
    tensors = [x, y, test_x, test_y]
    if args.dry_run:  # 64 to 127 images, evenly spaced as they may be sorted by class
        tensors = [tensor[:: max(1, len(tensor) // 64)] for tensor in tensors]
    x, y, test_x, test_y = tensors
    pixels = x[:: 1 + len(x) // 10_000].flatten(0, 2)
    pixels = pixels.float().div(255)
    pad = args.pad
    return Data(
        name=name,
        class_names=class_names,
        # F.pad counts from the last dimension: 0 for colours, pad for columns, pad for rows
        train_padded=F.pad(x, (0, 0, pad, pad, pad, pad)).to(args.device),
        train_labels=y.to(args.device),
        test_images=test_x.to(args.device),
        test_labels=test_y.to(args.device),
        mean=pixels.mean(0).to(args.device),
        std=pixels.std(0).clamp_min(1e-3).to(args.device),
        pad=pad,
        split="val" if args.val else "test",
        fingerprint=checksum(tensors),
    )


def pick_balanced(x: Tensor, y: Tensor, size: int, seed: int, flag: str) -> tuple:
    """`size` random images and labels, as class-balanced as the data allows; then the others.

    Raises UsageError for a bad size, or if a class has no image left to train on. flag: for this
    message, and because with "--val" the others are trained on, else the images that are picked.
    """
    classes = int(y.max()) + 1
    if not classes <= size < len(y):
        raise UsageError(
            f"{flag} {size} should be from {classes}, the number of classes, to "
            f"{len(y) - 1}, all training images but one"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    # The rank of an image is its place among the shuffled images of its class: 0, 1, 2, ... The
    # lowest ranks are one image of every class, then a second one, and so on.
    shuffled = y[order]
    rank = torch.empty_like(y)
    for number in range(classes):
        members = order[shuffled == number]
        rank[members] = torch.arange(len(members))
    taken = rank.argsort(stable=True)[:size]
    picked = torch.zeros_like(y, dtype=torch.bool)
    picked[taken] = True
    training = y[~picked] if flag == "--val" else y[picked]
    missing = classes - len(training.unique())
    if missing:
        raise UsageError(f"{flag} {size} leaves {missing} of {classes} classes without an image")
    return x[picked], y[picked], x[~picked], y[~picked]


@contextmanager
def lock(path: Path):
    """A context that only one process can be in; if that is killed, the next one enters."""
    with open(path, "ab") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_cifar(data_dir: Path, name: str) -> tuple:
    """cifar10 or cifar100, which torchvision downloads, if need be, and verifies."""
    socket.setdefaulttimeout(5)  # a host that does not answer should fail, not hang

    def parts(**options):
        dataset = getattr(torchvision.datasets, name.upper())
        return [dataset(data_dir, train=train, **options) for train in (True, False)]

    try:
        try:
            train, test = parts()
        except RuntimeError:  # it is not there, or another command is unpacking it
            data_dir.mkdir(parents=True, exist_ok=True)
            with lock(data_dir / ".lock"):
                train, test = parts(download=True)
    except Exception as error:  # torchvision and the network raise half a dozen kinds
        raise UsageError(
            f"{name} cannot be read from {data_dir} or downloaded ({error}); try "
            "--dataset shapes, which needs no download"
        ) from None
    arrays = []
    for part in (train, test):
        arrays += [torch.as_tensor(part.data), torch.as_tensor(part.targets)]
    return name, train.classes, *arrays


def read_folder(data_dir: Path) -> tuple:
    """DIR/train/CLASS/* and DIR/test/CLASS/*. Names that begin with a dot are skipped."""
    train_names, train_samples = list_images(data_dir / "train")
    names, test_samples = list_images(data_dir / "test")
    if names != train_names or len(names) < 2:
        raise UsageError(f"{data_dir} should have the same classes, two or more, in train and test")
    samples = train_samples + test_samples
    folders = [data_dir / part / name for part in ("train", "test") for name in names]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    if len(files) > len(samples):
        skipped = len(files) - len(samples)
        say(f"{skipped} of {len(files)} files are skipped: no images, or hidden")
    pixels = np.empty((len(samples), 32, 32, 3), np.uint8)
    for i, (path, _) in enumerate(samples):
        pixels[i] = read_image(path)
        if i % 1000 == 0:
            rewrite(f"image {i} of {len(samples)}")
    sizes = [len(train_samples), len(test_samples)]
    x, test_x = torch.from_numpy(pixels).split(sizes)
    y, test_y = torch.tensor([label for _, label in samples]).split(sizes)
    return f"folder {data_dir.name}", names, x, y, test_x, test_y


def list_images(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (path, class) of every image. Raises UsageError."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        names = [path.name for path in folders if not path.name.startswith(".")]
        numbers = {name: i for i, name in enumerate(names)}
        samples = make_dataset(root, numbers, extensions=IMG_EXTENSIONS)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--data-dir {root.parent} should hold train/<class>/* and test/<class>/*: "
            f"{str(error).splitlines()[0]}"
        ) from None
    hidden = f"{os.sep}."
    return names, [sample for sample in samples if hidden not in sample[0].removeprefix(str(root))]


def read_image(path: str) -> np.ndarray:
    """An image as uint8, 32 x 32 x 3, turned as its EXIF data say."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits; PIL would clip them silently
                raise ValueError("it has more than 8 bits per channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB").resize((32, 32)))
    except Exception as error:  # PIL raises many kinds for a damaged image
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def draw_shapes(train: int = 2560, test: int = 1000, seed: int = 0) -> tuple:
    """Ten classes of noisy images: shapes of none to six lobes, filled or hollow.

    Place, size and angle are random. The shape is, in polar coordinates around its centre, where

        inner < rho / edge(theta) < 1,   edge = r (1 + 0.4 cos(lobes theta))

    inner is -1 for filled shapes and 0.55 for hollow ones.
    """
    rng = np.random.default_rng(seed)
    n = train + test
    kind = rng.permutation(np.arange(n) % 10)
    lobes = np.array([0, 2, 3, 4, 6])[kind % 5, None, None]
    inner = np.where(kind > 4, 0.55, -1)[:, None, None]
    left, top, size, angle = rng.random((4, n, 1, 1))
    dx = np.arange(32) - 12 - 7 * left
    dy = np.arange(32)[:, None] - 12 - 7 * top
    theta = np.arctan2(dy, dx) + 7 * angle
    edge = (6 + 4 * size) * (1 + 0.4 * np.cos(lobes * theta))
    share = np.hypot(dx, dy) / edge
    bright = (share > inner) & (share < 1)
    mean = 0.3 + 0.4 * bright[..., None]
    image = rng.normal(mean, 0.27, (n, 32, 32, 3)).clip(0, 1)
    x = torch.from_numpy((255 * image).astype(np.uint8))
    y = torch.from_numpy(kind)
    names = [f"{n} lobes, {fill}" for fill in ("filled", "hollow") for n in (0, 2, 3, 4, 6)]
    return "shapes", names, x[:train], y[:train], x[train:], y[train:]


# --------------------------------------------------------------------- 4. Evaluation and flatness


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, every: int = 1) -> tuple[float, float]:
    """(accuracy in %, mean cross-entropy) on every `every`-th test image.

    Leaves training mode as it was.
    """
    training = model.training
    labels = data.test_labels[::every]
    model.eval()
    logits = []
    for images in data.test_images[::every].split(250):
        logits.append(model(data.normalize(images)))
    logits = torch.cat(logits)
    model.train(training)
    right = (logits.argmax(1) == labels).sum().item()
    return 100 * right / len(labels), F.cross_entropy(logits, labels).item()


def gradient_of(loss: Tensor, params: list[Tensor], **options) -> Tensor:
    """The gradient of `loss` in all entries of `params`, as one vector."""
    grads = torch.autograd.grad(loss, params, materialize_grads=True, **options)
    return torch.cat([g.flatten() for g in grads])


def hessian_trace(
    loss_fn, params: list[Tensor], probes: int, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Hutchinson's estimate of the trace of the Hessian H, and its standard error.

    H is the Hessian of loss_fn() with respect to all entries of `params`. The loss of a quantized
    network is a step function, whose true Hessian is 0 almost everywhere. For such a network we
    differentiate the straight-through gradient once more, and call the result H [choice].

    The estimate is the mean of v.Hv over random vectors v of entries -1 and 1. probes: how many, at
    least 2. generator: on the device of `params`.
    """
    gradient = gradient_of(loss_fn(), params, create_graph=True)
    samples = []
    for _ in range(probes):
        v = 2 * torch.zeros_like(gradient).bernoulli_(0.5, generator=generator) - 1
        samples.append(v @ gradient_of(gradient @ v, params, retain_graph=True))
    samples = torch.stack(samples)
    error = samples.std() / math.sqrt(probes)
    return samples.mean().item(), error.item()


def hessian_top_eigenvalue(
    loss_fn, params: list[Tensor], iters: int, generator: torch.Generator | None = None
) -> float:
    """The eigenvalue of largest magnitude of the same H, by `iters` steps of power iteration."""
    gradient = gradient_of(loss_fn(), params, create_graph=True)
    hv = torch.zeros_like(gradient).normal_(generator=generator)  # a random start
    for _ in range(iters):
        v = hv / hv.norm().clamp_min(TINY)
        hv = gradient_of(gradient @ v, params, retain_graph=True)
    return (v @ hv).item()  # the Rayleigh quotient, as |v| = 1


def sharpness(model: nn.Module, data: Data, probes: int = 4, iters: int = 0) -> list[float]:
    """[trace, its standard error] of the loss's Hessian with respect to the layers' weights.

    This is the trace of FPQ's Fig. 5. With iters > 0 the top eigenvalue is the third entry.
    Loss and batch norm's statistics are of 256 training images [choice]. Works on a copy of
    `model`. If weights before batch norm are scaled, the network computes the same, but the trace
    changes. So it also tells how large the weights are.
    """
    images, labels = data.sample(256)
    model = copy.deepcopy(model)
    update_bn([images], model)
    model.eval()
    weights = [layer.weight for layer in weight_layers(model).values()]
    draws = torch.Generator(images.device).manual_seed(0)

    def loss_fn():
        return F.cross_entropy(model(images), labels)

    found = [*hessian_trace(loss_fn, weights, probes, draws)]
    if iters:
        found.append(hessian_top_eigenvalue(loss_fn, weights, iters, draws))
    return found


def gradient_ratio(loss: Tensor, cross_entropy: Tensor, model: nn.Module) -> float:
    """The strength of what a method adds to the cross-entropy, as a ratio of gradients:

        |grad (loss - cross_entropy)| / |grad cross_entropy|

    The gradients are with respect to the weights of all layers.
    """
    weights = [layer.weight for layer in weight_layers(model).values()]
    own = gradient_of(cross_entropy, weights, retain_graph=True)
    added = gradient_of(loss, weights, retain_graph=True) - own
    return (added.norm() / own.norm()).item()


def sam_loss(
    model: nn.Module, images: Tensor, labels: Tensor, rho: float, label_smoothing: float = 0.0
) -> Tensor:
    """Sharpness-aware minimisation (Foret et al. 2021): the loss at w + rho g / |g|.

    g is the gradient at w, where w are all parameters, step sizes as well [choice]. No gradient
    flows through the shift, so that backward() gives the gradient at the shifted place. Both passes
    move batch norm's running statistics, but `finish` renews those [choice].
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    grads = torch.autograd.grad(loss, params.values(), materialize_grads=True)
    scale = rho / nn.utils.get_total_norm(grads).clamp_min(TINY)
    shifted = {name: p + scale * g for (name, p), g in zip(params.items(), grads)}
    logits = torch.func.functional_call(model, shifted, images)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


# ---------------------------------------------------------------------------------------- 5. Runs


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the whole usage first; one line is clearer
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind: type, low: float, high: float):
    """An argparse type: an int or a float, as `kind` says, from low to high; nan is refused."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} should be {word} from {low:g} to {high:g}")
        return value

    return parse


def base_parser(description: str, methods: list[str], default: list[str]) -> Parser:
    """The flags that all scripts share. methods[0] is plain training."""
    def method(text):
        if text in QUANTIZERS:  # as in --method lsq
            raise argparse.ArgumentTypeError(
                f"{text} is a --quantizer; training without a paper's method is {methods[0]}")
        return text

    parser = Parser(description=description, allow_abbrev=False)
    flag = parser.add_argument
    flag("--method", nargs="+", type=method, choices=methods, default=default, metavar="METHOD",
         help=f"what to train, one after another, of {', '.join(methods)} "
              f"(default: {' '.join(default)})")
    flag("--ablate", action="store_true", help="train all methods")
    flag("--diagnose", action="store_true", help="print what the script's paper draws, as numbers")
    flag("--recipe", choices=["paper"],
         help="take the published settings as defaults, and our guesses where there are none")
    flag("--resume", action="store_true", help="continue where the same command was stopped")
    flag("--dry-run", action="store_true", help="one epoch of about 64 images, in OUT/dry-run")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda, else cpu)")
    flag("--out", type=Path, default=Path("runs"),
         help="folder for checkpoints and results.jsonl (default: runs)")
    flag("--seed", type=number(int, 0, 2**31), nargs="+", default=[0],
         help="one or more; each has its own network, subset and batches (default: 0)")
    data_flags(parser)
    network_flags(parser)
    return parser


def data_flags(parser: Parser) -> None:
    flag = parser.add_argument
    flag("--dataset", choices=["auto", "cifar10", "cifar100", "folder", "shapes"], default="auto",
         help="auto (default): cifar10 if it is in --data-dir or downloads, else shapes")
    flag("--data-dir", type=Path, default=Path("data"),
         help="where the data set is or goes; a folder has train/CLASS/* and test/CLASS/*")
    flag("--train-size", type=number(int, 1, 10**9),
         help="train on a class-balanced subset of this size")
    flag("--val", type=number(int, 1, 10**9),
         help="hold out this many training images; evaluate on them only")
    flag("--augment", choices=["none", "flip", "crop+flip"], default="crop+flip",
         help="of the training images (default: crop+flip)")
    flag("--pad", type=number(int, 0, 16), default=2,
         help="how many pixels a crop moves an image at most (default: 2)")
    flag("--batch-size", type=number(int, 2, 10**6), default=128,
         help="images per step (default: 128)")


def network_flags(parser: Parser) -> None:
    """The network, its bits, and its training in full precision."""
    flag = parser.add_argument
    flag("--model", choices=MODELS, default="resnet8", metavar="MODEL",
         help=f"the network, one of {', '.join(MODELS)} (default: resnet8)")
    flag("--depth", type=number(int, 1, 48), default=4, help="blocks of vit_tiny (default: 4)")
    flag("--stem", choices=["cifar", "imagenet"], default="cifar",
         help="first layers of the larger networks, for small (default) or large images")
    flag("--bits", type=number(int, 2, 8), default=2,
         help="of weights and activations (default: 2)")
    flag("--wbits", type=number(int, 2, 8), help="bits of weights, in place of --bits")
    flag("--abits", type=number(int, 1, 8), help="bits of activations, in place of --bits")
    flag("--quantizer", choices=list(QUANTIZERS), default="lsq",
         help="of activations (default: lsq); weights always have lsq")
    flag("--fp-epochs", type=number(int, 1, 10**9), default=15,
         help="epochs of full-precision training (default: 15)")
    flag("--fp-lr", type=number(float, 1e-9, 1e3), default=0.2,
         help="its peak learning rate (default: 0.2); vit_tiny takes 1/200 of it, with AdamW")
    flag("--fp-weight-decay", type=number(float, 0, 1), default=1e-4,
         help="its weight decay (default: 0.0001); vit_tiny always has 0.05")


def qat_flags(parser: Parser) -> None:
    """Quantization-aware training (QAT), which follows full precision."""
    flag = parser.add_argument
    flag("--epochs", type=number(int, 1, 10**9), default=6,
         help="epochs of quantization-aware training (default: 6)")
    flag("--lr", type=number(float, 1e-9, 1e3), default=0.02,
         help="its peak learning rate (default: 0.02)")
    flag("--weight-decay", type=number(float, 0, 1), default=5e-4,
         help="its weight decay (default: 0.0005)")


def parse(parser: Parser, methods: list[str], recipe: dict) -> argparse.Namespace:
    """Parse the command line and make --out. `--recipe paper` makes `recipe` the defaults."""
    if any(word.startswith("--recipe") for word in sys.argv):
        parser.set_defaults(**recipe)
    args = parser.parse_args()
    if args.recipe:
        flags = [f"--{flag.replace('_', '-')} {getattr(args, flag)}" for flag in recipe]
        print("--recipe paper:", *flags)
    args.wbits = args.wbits or args.bits
    args.abits = args.abits or args.bits
    args.seed = list(dict.fromkeys(args.seed))
    args.method = methods if args.ablate else list(dict.fromkeys(args.method))
    args.epochs_left = 0  # of the whole command; `main` sets it, and each epoch takes one off
    args.script = parser.prog
    args.command = shlex.join(["python", parser.prog, *sys.argv[1:]])
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # else a GPU's digits are far from a CPU's
    torch.backends.cudnn.deterministic = True  # so that --resume repeats them
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        parser.error(
            f"--device {args.device} cannot be used here "
            f"({str(error).splitlines()[0]}); try --device cpu"
        )
    if args.dry_run:
        args.out = args.out / "dry-run"
        args.fp_epochs = args.epochs = 1
        args.batch_size = min(args.batch_size, 32)
    args.out.mkdir(parents=True, exist_ok=True)
    with lock(args.out / "results.jsonl"):  # an --out that cannot be written or locked shows here
        pass
    return args


def keep_freed_memory() -> None:
    """Tell glibc not to return large blocks to the kernel: it saves 10 to 20 % of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB


def entry(main) -> None:
    """Run main. What a user can put right is one line on stderr.

    Exit codes: 2 for bad input or a full disk, 3 for a loss that is not finite. Ctrl-C gives 130,
    and a reader that is gone, as after `| head`, gives 141.
    """
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # end without a word, as other programs do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UsageError, OSError) as error:
        fail(2, f"error: {error}")
    except FloatingPointError as error:
        fail(3, f"stopped: {error}")
    except KeyboardInterrupt:
        fail(130, "interrupted; add --resume to continue after the last whole epoch")


def fail(code: int, line: str) -> None:
    print(f"\n{line}", file=sys.stderr)
    sys.exit(code)


def say(text: str) -> None:
    """Print a line, in place of one that `rewrite` left."""
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    print(clear + text, flush=True)


def rewrite(text: str) -> None:
    """On a terminal a line that the next one replaces; nothing in a pipe or file."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def sgd(model: nn.Module, lr: float, weight_decay: float, **options) -> torch.optim.SGD:
    """SGD, momentum 0.9. Of the quantizers' parameters, only PACT's have weight decay [choice]."""
    quantizers = quantizers_of(model).values()
    undecayed = {p for q in quantizers if not q.decays for p in q.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p not in undecayed]},
        {"params": [p for p in model.parameters() if p in undecayed], "weight_decay": 0},
    ]
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, **options)


def cosine(step: int, total: int, warmup: float = 0.0) -> float:
    """The learning rate as a share of its peak.

    It rises linearly in the first `warmup` share of all steps, then falls to 0 as a cosine.
    """
    ramp = warmup * total
    if step < ramp:
        return (step + 1) / (ramp + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (total - ramp)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def epoch_draws(stage: str, seed: int, epoch: int) -> torch.Generator:
    """Seed torch's own generator for the noise of an epoch; return another for its batches.

    Both depend on stage, seed and epoch alone. So all methods see the same batches, and a resumed
    run draws what an undisturbed one does.
    """
    torch.manual_seed(hashed(stage, "noise", seed, epoch))
    return torch.Generator().manual_seed(hashed(stage, "batches", seed, epoch))


class Progress:
    """The means of an epoch's losses, kept on the device; on a terminal a line that shows them."""

    def __init__(self, name: str, steps: int):
        self.name = name
        self.steps = steps
        self.done = 0
        self.sums = {}
        self.started = time.perf_counter()
        self.shown = self.started

    def add(self, **losses: Tensor) -> None:
        """Count one step and its losses. Only printing waits for the device, once a second."""
        self.done += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        now = time.perf_counter()
        if sys.stdout.isatty() and now > self.shown + 1:
            self.shown = now
            left = (now - self.started) * (self.steps / self.done - 1)
            rewrite(f"{self.name}  batch {self.done}/{self.steps}  {self}  {left:.0f} s left")

    def means(self) -> dict[str, float]:
        return {name: value.item() / self.done for name, value in self.sums.items()}

    def __str__(self):
        return "  ".join(f"{name} {mean:.4f}" for name, mean in self.means().items())


# The flags that full precision depends on. No others are in the settings of its checkpoint, so that
# the three QAT scripts can share one network; flat_quant.py trains its own.
FP_FLAGS = "model depth stem augment pad batch_size fp_epochs fp_lr fp_weight_decay".split()
# Flags, of any script, that are left out of a checkpoint's settings. Most do not change training.
# Those that do are in the settings in another form: --bits as wbits and abits; --train-size, --val
# and --dataset as the checksum "data". --seed and --method are lists; this run has one of each.
NOT_SETTINGS = (
    "out data_dir dataset train_size val device recipe bits seed method ablate ablate_views "
    "diagnose more_bits resume dry_run script command epochs_left"
).split()


class Checkpoint:
    """One training run in one file, written whole after each epoch.

    `parts` are all that training changes, "model" and "optimizer" at least. These are `settings`:

    - Method and seed.
    - A checksum of the data.
    - A checksum of the network `start` that training starts from, if it is given.
    - All flags but those in NOT_SETTINGS; for full precision, which is shared, those in FP_FLAGS.

    The file's name ends in a hash of the settings, so that runs of other settings have other files.
    Code is not among them: after a change of code, delete old files.
    """

    def __init__(self, args, data, method, seed, epochs, start=None, shared=False, **parts):
        self.args = args
        self.data = data
        self.method = method
        self.epochs = epochs
        self.resume = args.resume or shared
        self.parts = parts
        self.history = []
        self.results = {}
        flags = FP_FLAGS if shared else sorted(vars(args).keys() - set(NOT_SETTINGS))
        self.settings = {"method": method, "seed": seed, "data": data.fingerprint}
        if start is not None:
            self.settings["start"] = checksum(start.state_dict().values())
        self.settings |= {flag: getattr(args, flag) for flag in flags}
        self.name = f"{method}-{args.model}-{data.name.replace(' ', '-')}-s{seed}"
        self.path = args.out / f"{self.name}-{hashed(self.settings):08x}.pt"

    def load(self) -> int:
        """Restore all parts from the file; return the number of epochs done, or 0.

        A finished run is always restored, an unfinished one with --resume or if it is shared. A dry
        run, which tries the code, is restored with --resume alone.
        Raises UsageError for a damaged file, or a renamed one, which has other settings.
        """
        if not self.path.exists() or (self.args.dry_run and not self.args.resume):
            return 0
        state = read_checkpoint(self.path)
        for flag in self.settings | state["settings"]:
            theirs = state["settings"].get(flag)
            mine = self.settings.get(flag)
            if theirs != mine:
                raise UsageError(f"{self.path} has {flag} {theirs}, not {mine}; delete it")
        done = len(state["history"])
        if done < self.epochs and not self.resume:
            say(f"{self.path} has {done} of {self.epochs} epochs; without --resume it starts anew")
            return 0
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UsageError(f"{self.path} is damaged ({error}); delete it") from None
        self.history = state["history"]
        self.results = state["results"]
        self.args.epochs_left -= done
        say(f"{self.method}: read {done} of {self.epochs} epochs; to train anew delete {self.path}")
        return done

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "settings": self.settings,
            "history": self.history,
            "results": self.results,
            "quantized": bool(quantizers_of(self.parts["model"])),
            "class_names": self.data.class_names,
            "mean": self.data.mean,
            "std": self.data.std,
        }
        whole = io.BytesIO()  # torch.save to a file would hide why it cannot be written
        torch.save(state, whole)
        write_whole(self.path, whole)


def write_whole(path: Path, content: io.BytesIO) -> None:
    """Write or replace a file at once: whenever the process is killed, it is the old or the new."""
    part = path.with_suffix(f".{os.urandom(4).hex()}.part")  # no other process has this name
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict:
    """What `Checkpoint.save` wrote. Runs no code from the file. Raises UsageError if damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load checks no sums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"settings", "history", "results", "model"} <= state.keys():
            raise ValueError("entries are missing")
        return state
    except OSError:  # not damaged, but not readable
        raise
    except Exception as error:  # half a dozen kinds for a damaged file
        line = (str(error).splitlines() or ["unreadable"])[0]
        raise UsageError(f"{path} is damaged ({line}); delete it") from None


def end_epoch(checkpoint: Checkpoint, progress: Progress, **notes) -> None:
    """Evaluate, append the epoch's row and `notes` to the history, save, print the row.

    Batch norm's running statistics are those of training, under noise if the method has some. So
    compare methods by the result of `finish`, not by the history.
    Raises FloatingPointError, which ends the script, if a loss is not finite.
    """
    args = checkpoint.args
    data = checkpoint.data
    means = progress.means()  # waits for the device, once per epoch
    seconds = time.perf_counter() - progress.started
    every = 1 + len(data.test_labels) // 2500  # at most 2,500 images, to be quick
    acc, loss = evaluate(checkpoint.parts["model"], data, every)
    epoch = len(checkpoint.history) + 1
    if not all(math.isfinite(value) for value in (loss, *means.values())):
        flag = "--lr" if "lr" in checkpoint.settings else "--fp-lr"  # full precision has no lr
        raise FloatingPointError(
            f"{checkpoint.method}: the loss is not finite in epoch {epoch}; try a smaller {flag}"
        )
    row = {"epoch": epoch, **means, "eval_loss": loss, "acc": acc, "seconds": seconds, **notes}
    checkpoint.history.append(row)
    checkpoint.save()
    args.epochs_left -= 1
    left = int(args.epochs_left * seconds)
    say(
        f"{progress.name}  {progress}  {data.split} loss {loss:.4f}  acc {acc:5.2f} %  "
        f"{seconds:.1f} s  whole command {left // 60}:{left % 60:02d} left"
    )


def finish(
    checkpoint: Checkpoint, model: nn.Module | None = None, method: str | None = None, **entries
) -> dict:
    """Evaluate the network on all test images; write and return a row of results.

    First, one pass over the training images, always with the same seed, renews batch norm's
    statistics [choice]. Training leaves those of its last batches, which can change accuracy by a
    point. cr_qat.py and flat_quant.py also evaluate an average of the network's weights. They pass
    it as `model`, and its name in the results as `method`. entries: more columns of the row, such
    as the bits of full precision.
    """
    args = checkpoint.args
    data = checkpoint.data
    model = checkpoint.parts["model"] if model is None else model
    method = method or checkpoint.method
    if method not in checkpoint.results:  # a run that was read from its file may have this already
        rewrite(f"{method}: renewing batch norm and evaluating on all {data.split} images")
        draws = torch.Generator().manual_seed(hashed("batch norm"))
        update_bn(data.batches(args.batch_size, draws, args.augment), model)  # ignores the labels
        acc, loss = evaluate(model, data)
        checkpoint.results[method] = checkpoint.settings | {
            "script": args.script,
            "command": args.command,
            "dataset": data.name,
            "classes": len(data.class_names),
            "split": data.split,
            "train_size": len(data.train_labels),
            "method": method,
            "acc": acc,
            "loss": loss,
            "seconds_per_epoch": float(np.mean([row["seconds"] for row in checkpoint.history])),
            "history": checkpoint.history,
            "run": checkpoint.path.stem,
            # What the last digits depend on
            "torch": str(torch.__version__),  # by itself a class of its own
            "threads": torch.get_num_threads(),
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "device": args.device,
            **entries,
        }
        checkpoint.save()
    row = checkpoint.results[method]
    record(args, row)
    say(f"{method}: {data.split} loss {row['loss']:.4f}  acc {row['acc']:.2f} %")
    return row


def record(args: argparse.Namespace, row: dict) -> None:
    """Append `row` to OUT/results.jsonl, unless its run, method, bits and loss are there."""
    key = f"{row['run']} {row['method']} W{row['wbits']}A{row['abits']} {row['loss']:.6g}"
    # The key comes last, so the row is there already if some line ends in it
    line = json.dumps(row | {"key": key}) + "\n"
    ending = json.dumps(key) + "}\n"
    path = args.out / "results.jsonl"
    with lock(path), open(path, "a+b", buffering=0) as file:
        file.seek(0)
        before = file.read()
        if ending.encode() in before:
            return
        if before and not before.endswith(b"\n"):  # a line that was cut off stays alone
            line = "\n" + line
        written = file.write(line.encode())
        if written < len(line):  # leave nothing half-written
            file.truncate(len(before))
            raise OSError(f"{path}: disk full; free space, then add --resume")


def full_precision(args: argparse.Namespace, data: Data, seed: int) -> tuple[nn.Module, dict]:
    """The full-precision network in eval mode and its result; trained once, then read."""
    # Only these flags, so that no other one can shape the network that the QAT scripts share
    flags = argparse.Namespace(**{flag: getattr(args, flag) for flag in FP_FLAGS})
    model, optimizer = new_network(flags, data, seed, args.device)
    checkpoint = Checkpoint(
        args, data, "fp", seed, flags.fp_epochs, shared=True, model=model, optimizer=optimizer
    )
    steps = data.steps(flags.batch_size)
    for epoch in range(checkpoint.load(), flags.fp_epochs):
        model.train()
        draws = epoch_draws("full precision", seed, epoch)
        progress = Progress(f"full precision  seed {seed}  epoch {epoch + 1}", steps)
        batches = data.batches(flags.batch_size, draws, flags.augment)
        for i, (images, labels) in enumerate(batches):
            # Learning rate: up for a tenth of the steps, then a cosine down to 0 [choice]
            share = cosine(epoch * steps + i, flags.fp_epochs * steps, warmup=0.1)
            set_rate(optimizer, optimizer.defaults["lr"] * share)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.add(loss=loss)
        end_epoch(checkpoint, progress)
    row = finish(checkpoint, wbits=32, abits=32, quantizer=None)
    return model.eval(), row


def new_network(flags, data, seed, device):
    """An untrained network and its optimizer: Nesterov SGD, or AdamW for vit_tiny [choice]."""
    torch.manual_seed(hashed("weights", seed))
    model = build_model(flags.model, len(data.class_names), flags.depth, flags.stem)
    model = model.to(device, memory_format=torch.channels_last)
    if flags.model == "vit_tiny":
        return model, torch.optim.AdamW(model.parameters(), flags.fp_lr / 200, weight_decay=0.05)
    return model, sgd(model, flags.fp_lr, flags.fp_weight_decay, nesterov=True)


def load(path: str | Path) -> tuple[nn.Module, Tensor, Tensor, list[str]]:
    """(network in eval mode, mean, std, class names) of a checkpoint.

    The network takes (images - mean) / std. The images are floats from 0 to 1, N x 3 x 32 x 32.
    It is always the network of the last epoch, not an average of its weights. From a file of
    flat_quant.py, which quantizes after training, it is in full precision.
    """
    state = read_checkpoint(Path(path))
    flags = state["settings"]
    model = build_model(flags["model"], len(state["class_names"]), flags["depth"], flags["stem"])
    if state["quantized"]:
        model = quantize(model, flags["wbits"], flags["abits"], flags["quantizer"])
    model.load_state_dict(state["model"])
    mean, std = (state[name].reshape(3, 1, 1) for name in ("mean", "std"))
    return model.eval(), mean, std, state["class_names"]


def mean_and_error(values: list[float], sign: str = "") -> str:
    """mean ± standard error of the mean, if there are two values or more."""
    text = f"{np.mean(values):{sign}.2f}" if values else ""
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"
    return text


def print_row(*cells) -> None:
    print(" ".join(f"{cell:<11}" for cell in cells).rstrip())


def print_by_epoch(names: list[str], histories: list[list[dict]], key: str, cell) -> None:
    """A row per epoch, a column per method; `cell` formats the epoch's figure `key`."""
    print_row("epoch", *names)
    for rows in zip(*histories):
        cells = [cell(row[key]) if key in row else "not recorded" for row in rows]
        print_row(rows[0]["epoch"], *cells)


def print_table(rows: list[dict], reference: str = "baseline", **figures: str) -> None:
    """A row per method and bits: its figures, and their differences to `reference` by seed.

    figures: {key in a row: heading}, by default the accuracy.
    """
    figures = figures or {"acc": "acc %"}
    row = rows[-1]  # not the first, as full precision has no quantizer
    print(
        f"\n{row['dataset']}, {row['train_size']} training images, {row['model']}, "
        f"{row['quantizer']}, {row['augment']}; {row['split']} accuracy ± standard error"
    )
    headings = "".join(f"{title:<16}{'vs ' + reference:<16}" for title in figures.values())
    print(f"{'method':<24}{'W/A':<7}{headings}seeds")
    groups = {}
    for row in rows:
        key = (row["method"], f"{row['wbits']}/{row['abits']}")
        groups.setdefault(key, {})[row["seed"]] = row
    for (method, bits), by_seed in groups.items():
        theirs = groups.get((reference, bits), {}) if method != reference else {}
        line = f"{method:<24}{bits:<7}"
        for key in figures:
            ours = {seed: row[key] for seed, row in by_seed.items() if key in row}
            gains = [value - theirs[seed][key] for seed, value in ours.items() if seed in theirs]
            line += f"{mean_and_error([*ours.values()]):<16}{mean_and_error(gains, '+'):<16}"
        print(f"{line}{len(by_seed)}")
