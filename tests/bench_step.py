"""How much a quantization-aware training step costs: python tests/bench_step.py [--models ...]

For each network, one run with interleaved repetitions: the time of a training step as a ratio to
the full-precision step next to it, median of the ratios, so that a machine that changes its speed
changes little. W2A2, batch 128, channels_last, this machine's device. Then peak memory as a ratio,
each variant in a process of its own, and the seconds from process start to the end of the first
step.
Peers are timed if they can be imported (pip install brevitas torchao) and named with their version.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import cr_qat  # noqa: E402
import flat_quant  # noqa: E402
import fpq  # noqa: E402
import mec_quant  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

BATCH = 128


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    narrow = name == "resnet18/4"  # resnet18 at a quarter of its width
    model = common.CifarResNet([2, 2, 2, 2], 10, 16) if narrow else common.build_model(name, 10)
    return model.to(DEVICE, memory_format=torch.channels_last)


def replaced(model: nn.Module, wrap) -> nn.Module:
    """A copy of model with every convolution and linear layer passed through `wrap`."""
    model = copy.deepcopy(model)
    for name, layer in common.product_layers(model).items():
        model.set_submodule(name, wrap(layer))
    return model


class Peer(nn.Module):
    """A layer around two fake quantizers, of its input and of its weight."""

    def __init__(self, layer: nn.Module, of_input: nn.Module, of_weight: nn.Module):
        super().__init__()
        self.layer, self.of_input, self.of_weight = layer, of_input, of_weight

    def forward(self, x):
        x, weight = self.of_input(x), self.of_weight(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


class Composite(nn.Module):
    """LSQ out of elementary operations and detach, as most repositories have it."""

    def __init__(self, channels: int | None, dims: int):
        super().__init__()
        self.step = nn.Parameter(torch.full([channels] + [1] * (dims - 1) if channels else [], 0.3))

    def forward(self, x):
        scale = (x.numel() / self.step.numel() * 3) ** -0.5
        step = (self.step - self.step * scale).detach() + self.step * scale
        v = torch.clamp(x / step, 0, 3)
        return ((v.round() - v).detach() + v) * step


class TorchOp(nn.Module):
    """torch's own learnable fake-quant operators."""

    def __init__(self, channels: int | None):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels or 1,), 0.3))
        self.zero_point = nn.Parameter(torch.zeros(channels or 1))
        self.channels = channels

    def forward(self, x):
        if self.channels:
            return torch._fake_quantize_learnable_per_channel_affine(
                x, self.scale, self.zero_point, 0, 0, 3, 1.0)
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, 0, 3, 1.0)


def composite(layer):
    return Peer(layer, Composite(None, 4), Composite(len(layer.weight), layer.weight.dim()))


def torch_op(layer):
    return Peer(layer, TorchOp(None), TorchOp(len(layer.weight)))


def torchao(layer):
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize
    return Peer(layer, LearnableFakeQuantize(MinMaxObserver, 0, 3, dtype=torch.uint8),
                LearnableFakeQuantize(PerChannelMinMaxObserver, 0, 3, dtype=torch.uint8,
                                      qscheme=torch.per_channel_affine, ch_axis=0))


def brevitas(layer):
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
    options = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 2,
               "weight_scaling_impl_type": "parameter_from_stats", "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        quantized = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        quantized = qnn.QuantConv2d(layer.in_channels, layer.out_channels, layer.kernel_size,
                                    layer.stride, layer.padding, **options)
    of_input = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=2)
    return nn.Sequential(of_input, quantized)


PEERS = {"composite": composite, "torch op": torch_op, "torchao": torchao, "brevitas": brevitas}


def peer_version(name: str) -> str | None:
    """The version to print, "" for torch's own, None (with a message) if it cannot be imported."""
    if name not in ("torchao", "brevitas"):
        return ""
    try:
        return __import__(name).__version__
    except ImportError as error:
        print(f"{name} is skipped: {error}")
        return None


def step_of(variant: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """A function that trains `variant` of `model` by one step."""
    teacher, compiled = copy.deepcopy(model).eval(), variant.endswith("compiled")
    kind = variant.split()[0] if variant not in PEERS else variant
    if kind in ("lsq", "fpq", "cr", "mec-quant"):
        student = common.quantize(model, 2, 2)
        common.calibrate(student, images)
        if kind == "fpq":
            fpq.attach_sfp(student, 0.1, "operand")
    else:
        student = replaced(model, PEERS[kind]).to(images.device) if kind in PEERS else model
    if kind in ("torchao", "brevitas"):
        student.eval() if kind == "torchao" else student.train()
        student(images)  # scales are made at the first use
        for module in student.modules():
            getattr(module, "enable_range_learning", lambda: None)()
    noise = lambda strength: nullcontext()  # noqa: E731
    if kind == "cr":
        average = cr_qat.averaged(student, 0.999)
    if kind == "dnq":
        weight_noise = flat_quant.DifferentialWeightNoise(student, 2)
        activation_noise = flat_quant.ActivationNoise(student, 2, 0.5)
        weight_noise.measure(), activation_noise.measure(student, images)
        noise, activation_noise.strength = weight_noise.injected, 1.0
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    options = argparse.Namespace(eps2=0.5, experts=3, order=None)

    def loss_of():
        if kind == "fpq":
            with fpq.layer_outputs(student) as z:
                logits = student(images)
            with torch.no_grad(), fpq.layer_outputs(teacher) as z_fp:
                teacher(images)
            return F.cross_entropy(logits, labels) + fpq.csd_loss(z, z_fp)
        if kind == "mec-quant":
            with mec_quant.penultimate(student) as features:
                logits = student(images)
            term = mec_quant.mec_term(options, features[0], None, "scale")
            return F.cross_entropy(logits, labels) - 0.1 * term
        logits = student(images)
        if kind == "cr":
            with torch.no_grad():
                other = average(images)
            return F.cross_entropy(logits, labels) + cr_qat.consistency_loss(logits, other)
        return F.cross_entropy(logits, labels)

    def step():
        common.use_compiled(compiled)
        with noise(1.0):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if kind == "cr":
            average.update_parameters(student)
        if images.is_cuda:
            torch.cuda.synchronize()
    return step


def batch():
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (BATCH,), device=DEVICE)


def time_steps(name: str, variants: list[str], repetitions: int) -> dict[str, float]:
    model, (images, labels) = network(name), batch()
    steps = {v: step_of(v, copy.deepcopy(model), images, labels) for v in variants}
    ratios = {v: [] for v in variants}
    for step in list(steps.values()) * 2:  # warm-up: compiles, fills caches
        step()
    for _ in range(repetitions):
        seconds = {}
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[variant] = time.perf_counter() - started
        for variant in variants:
            ratios[variant].append(seconds[variant] / seconds["full precision"])
    return {v: statistics.median(r) for v, r in ratios.items()}


def peak() -> float:
    """MiB at most held so far: on the accelerator, or by this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":  # ru_maxrss would begin with what the parent process held
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(name: str, variant: str) -> float:
    """MiB that ten training steps take beyond what the process held before."""
    images, labels = batch()
    before = peak()
    step = step_of(variant, network(name), images, labels)
    for _ in range(10):
        step()
    return peak() - before


def child(*flags: str) -> float:
    """The number that this script prints when it is run with `flags`."""
    command = [sys.executable, __file__, *flags]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet20", "resnet18/4"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.keep_memory()
    if args.memory_of:
        return print(peak_memory(*args.memory_of))
    if args.first_step:
        data = common.load_data("shapes", Path("data"))
        images, labels = next(data.batches(BATCH, torch.Generator().manual_seed(0)))
        step_of("full precision", network("resnet8"), images.to(DEVICE), labels.to(DEVICE))()
        return print(time.time())
    versions = {p: peer_version(p) for p in PEERS}
    variants = ["full precision", "lsq", "fpq", "cr", "mec-quant", "dnq"]
    if common.use_compiled(True):
        variants += ["lsq compiled", "fpq compiled", "cr compiled", "mec-quant compiled"]
    variants += [p for p, version in versions.items() if version is not None]
    print(f"one training step / full-precision step, W2A2, batch {BATCH}, {DEVICE}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    table = {name: time_steps(name, variants, args.repetitions) for name in args.models}
    print(f"{'':<20}" + "".join(f"{n:<13}" for n in table))
    for variant in variants:
        label = f"{variant} {versions.get(variant, '')}"
        print(f"{label:<20}" + "".join(f"{ratios[variant]:<13.2f}" for ratios in table.values()))
    print("\npeak memory of ten steps / full precision")
    for name in args.models[:2]:
        reference = child("--memory-of", name, "full precision")
        for variant in ("lsq", "fpq"):
            ratio = child("--memory-of", name, variant) / reference
            print(f"{name:<12}{variant:<8}{ratio:.2f}")
    started = time.time()
    print(f"\nprocess start to the end of the first step: {child('--first-step') - started:.1f} s")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":
    main()
