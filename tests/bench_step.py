"""How much a step of quantization-aware training costs: python tests/bench_step.py [FLAGS]

Each row is a script in its own process; the processes take turns, one step each, at W2A2 (2-bit
weights and activations), batch 128. The table has the seconds of a step, data included, over those
of the full-precision step of the same turn, as the median over turns: changes of the machine's
speed hardly matter. Students start from untrained networks, which cost the same. FLAGS are passed
on to the scripts (--device cpu). The last rows are the baseline with torch's learnable operators,
and with the quantizers of torchao and brevitas, if installed, which take 2 bits in every layer.
"""

import copy
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

MODELS, TURNS = ["resnet8", "resnet20"], 20


def torch_operators():
    def fake_quantize(x, s, z, low, high, scale=1.0):
        s = s.flatten()
        z = z.flatten()
        if len(s) == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(x, s, z, low, high, scale)
        return torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, low, high, scale)
    common.fake_quantize = fake_quantize


def torchao():
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize
    quantize = common.quantize

    def with_its_quantizers(network, *flags):
        student = quantize(network, *flags)
        for layer in common.weight_layers(student).values():
            a = LearnableFakeQuantize(MinMaxObserver, 0, 3, dtype=torch.uint8)
            w = LearnableFakeQuantize(PerChannelMinMaxObserver, 0, 3, dtype=torch.uint8,
                                      qscheme=torch.per_channel_affine)
            a.enable_range_learning()
            w.enable_range_learning()
            layer.input_quantizer, layer.weight_quantizer = a, w
        return student.to(layer.weight.device)
    common.quantize = with_its_quantizers
    common.calibrate = lambda student, images: student(images)  # the first pass makes step sizes


def brevitas():
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
    # Brevitas would collect statistics of inputs for 300 steps before it learns; here for one.
    options = {"input_quant": Uint8ActPerTensorFloat, "input_bit_width": 2,
               "input_collect_stats_steps": 1, "weight_quant": Int8WeightPerChannelFloat,
               "weight_bit_width": 2, "weight_scaling_impl_type": "parameter_from_stats"}
    kinds = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    common.quantize = lambda network, *flags: layerwise_quantize(copy.deepcopy(network), kinds)
    common.calibrate = lambda student, images: student.train()(images)


# Script, method and, for the rows of other libraries, the function that puts their quantizers in.
VARIANTS = {"full precision": ("flat_quant", "sgd"), "baseline": ("fpq", "baseline"),
            "fpq": ("fpq", "fpq"), "cr": ("cr_qat", "cr"), "mec-quant": ("mec_quant", "mec-quant"),
            "dnq": ("flat_quant", "weight+activation")}
VARIANTS |= {peer.__name__: ("fpq", "baseline", peer)
             for peer in (torch_operators, torchao, brevitas)}


def child(pipe, flags, script, method, peer=lambda: None):
    """Run the script. Send each step's seconds, then wait; or send why `peer` cannot load."""
    sys.argv = [script, *flags, "--method", method]
    sys.stdout = open(os.devnull, "w")
    batches = common.Data.batches

    def one_by_one(data, *args, **options):
        started = time.perf_counter()
        while True:
            for batch in batches(data, *args, **options):
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                pipe.send(time.perf_counter() - started)
                pipe.recv()
                started = time.perf_counter()
                yield batch

    def untrained(args, data, seed):
        model, _ = common.new_network(args, data, seed, args.device)
        return model.eval(), {}

    common.Data.batches = one_by_one
    common.full_precision = untrained
    try:
        peer()
    except ImportError as error:
        return pipe.send(str(error))
    common.entry(importlib.import_module(script).main)


def time_steps(flags: list) -> dict:
    """{variant: median over turns of its seconds over full precision's}; names those it skips."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, variant in VARIANTS.items():
        pipes[name], end = context.Pipe()
        context.Process(target=child, args=(end, flags, *variant), daemon=True).start()
        end.close()
        if isinstance(ready := pipes[name].recv(), str):
            print(f"{name} is skipped: {ready}")
            del pipes[name]
    # A variant makes a step when it is sent something. The first two turns only warm up.
    rows = [{name: pipe.send("go") or pipe.recv() for name, pipe in pipes.items()}
            for _ in range(2 + TURNS)][2:]
    for process in multiprocessing.active_children():
        process.terminate()
    return {name: statistics.median(row[name] / row["full precision"] for row in rows)
            for name in pipes}


if __name__ == "__main__":
    print(f"step / full precision, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as out:
        flags = ["--dataset", "shapes", "--out", out, *sys.argv[1:], "--model"]
        table = [time_steps([*flags, model]) for model in MODELS]
    print(f"{'':<18}" + "".join(f"{model:<13}" for model in MODELS))
    for name in table[0]:
        print(f"{name:<18}" + "".join(f"{ratios[name]:<13.2f}" for ratios in table))
