#!/usr/bin/env python3
"""Makes golden.safetensors: small matrices, and what bitsandbytes' CPU build makes of them.

    python common/tests/nf4/make.py          # rewrites golden.safetensors beside this file
    python common/tests/nf4/make.py count    # holds formulas.py against bitsandbytes on random numbers, and counts

In the file, of each matrix NAME: `NAME.weights` (float32 or bfloat16), `.codes`, `.absmax`; where absmax is quantised,
too, `.double.absmax`, `.double.nested_absmax`, `.double.offset`; and of the weights that come back those that fit into
600 KiB: `.dequantised`, `.dequantised.bf16`, `.dequantised.double`, `.dequantised.double.bf16`. Besides `map.nf4`,
`map.fp4`, `map.dynamic`, and 8-bit codes by themselves: `dynamic.values`, `dynamic.codes`, `dynamic.absmax`. `made` in
the metadata is JSON: versions, and each matrix's block size and type.

Needs torch, bitsandbytes and safetensors. Facts, as of bitsandbytes 0.50.2 (each is checked here, on every case and by
`count`; the formulas are in formulas.py):

(a) 4-bit codes. There is no C++ for it on a CPU: the fallback in torch runs. scaled = w * (1 / max(absmax, 1e-38)),
    clamped; code = number of midpoints below it, so a tie goes to the lower code. A short last block is *divided* by
    its absmax, and the floor of 1e-38 goes into its stored absmax. An odd count is filled with the code of 0 (7 in
    NF4). In FP4, zero and a little below is code 0, a little above is code 8, and both are 0.
(b) 8-bit codes of absmax - offset. C++ runs: v = x * (1 / absmax) without a floor, place = trunc((v + 1) * 0.5 * 65535
    + 0.5), and a table of 65,536 codes, made of value = -1 + 2 i / 65535 and midpoints, a tie to the lower. A block of
    zeros has the codes 0. The nearest by midpoints differs in 1 to 2 of 1,000 values, by up to 3 codes.
(c) offset = torch.mean(absmax): a float32 sum in an order of its own, divided by the count. It is the correctly rounded
    mean for 11 of the 16 matrices here, and for one half to two thirds of random ones. With more than one thread and
    32,768 blocks or more, the order follows the threads.
(d) absmax = map[code] * nested_absmax, rounded, + offset, rounded. Weight = code * absmax in float32, then rounded to
    the dtype (AVX512-BF16 makes 0 of a subnormal). **On AVX512, columns that are a multiple of 16 but not of the block
    size are dequantised wrongly** (each row's blocks are taken to begin with the row): no case has such a shape.
"""

import json
import os
import sys
from pathlib import Path

# The fallbacks in torch as written, not compiled.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes
import formulas
import numpy as np
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
from safetensors.torch import save_file

CPU = torch.device("cpu")
DYNAMIC = functional.create_dynamic_map()
MAPS = {name: functional.get_4bit_type(name, CPU) for name in ("nf4", "fp4")}
ORDERS = {name: _get_4bit_quantize_bounds(name, CPU)[1].numpy() for name in MAPS}
DTYPES = {"32": torch.float32, "16": torch.bfloat16}
LARGEST_FILE = 600 * 1024


def on_midpoints(scale):
    """A block whose values are the midpoints of NF4, the floats next to them, and the codes."""
    code_map = MAPS["nf4"].numpy()
    middle = formulas.midpoints(code_map)
    above, below = (np.nextafter(middle, np.float32(side)) for side in (2, -2))
    row = np.concatenate([[1.0], middle, above, below, code_map, [0.0, -0.0]]).astype(np.float32)
    return torch.tensor(row) * scale


def normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def cases():
    """Name, weights, block size, type, and what is kept of the dequantised: (p)lain or (d)ouble, in 32 or 16 bits."""
    draw = torch.Generator().manual_seed(4)
    yield "normal", normal(draw, 96, 128), 64, "nf4", "p32 d16"
    yield "small_bf16", (0.02 * normal(draw, 64, 192)).bfloat16(), 64, "nf4", "p16 d32"
    yield "many_blocks", 0.05 * normal(draw, 160, 128), 64, "nf4", "d16"
    yield "uniform", 2 * torch.rand(24, 64, generator=draw) - 1, 64, "nf4", "p32 p16 d32 d16"
    zeros = normal(draw, 12, 64)
    zeros[3] = 0
    zeros[7] = -0.0
    yield "blocks_of_zeros", zeros, 64, "nf4", "p32 p16 d32 d16"
    wide = normal(draw, 16, 64) * torch.tensor([[10.0**power] for power in range(-30, 34, 4)])
    wide[5, ::2] = 1e30 * normal(draw, 32)
    wide[6, ::2] *= 1e-30
    yield "huge_and_tiny", wide, 64, "nf4", "p32 p16 d32 d16"
    below_normal = torch.tensor([1e-39, 3e-38, 1e-38, 2e-45]).view(4, 1) * normal(draw, 4, 64)
    yield "below_the_floor", below_normal, 64, "nf4", "p32"
    ties = torch.stack([on_midpoints(2.0**power) for power in (0, -5, 3, -20, 0, -1, 7, -9)])
    ties[4:] *= -1
    yield "on_midpoints", ties, 64, "nf4", "p32 p16 d32 d16"
    yield "short_last_block", normal(draw, 7, 50), 64, "nf4", "p32 p16 d32 d16"
    short_zeros = normal(draw, 3, 44)
    short_zeros.view(-1)[128:] = 0
    yield "short_block_of_zeros", short_zeros, 64, "nf4", "p32 d32"
    yield "odd", normal(draw, 3, 7), 64, "nf4", "p32 p16 d32 d16"
    yield "across_rows_bf16", normal(draw, 24, 72).bfloat16(), 64, "nf4", "p32 p16 d32 d16"
    yield "across_rows", 0.3 * normal(draw, 13, 40), 64, "nf4", "p32 p16 d32 d16"
    minus = normal(draw, 8, 64)
    minus[:, ::5] = -0.0
    minus[2:, 9] = -torch.arange(3.0, 9.0)
    yield "negative_largest_and_minus_zero", minus, 64, "nf4", "p32 p16 d32 d16"
    yield "block_of_32", normal(draw, 8, 64), 32, "nf4", "p32 d16"
    yield "block_of_128", normal(draw, 24, 128), 128, "nf4", "p32 d16"
    yield "fp4", normal(draw, 16, 64), 64, "fp4", "p32 p16 d32 d16"


def same(found, expected, what):
    found, expected = (np.ascontiguousarray(values).reshape(-1) for values in (found, expected))
    # By value: the sign of a zero is not the same in all of bitsandbytes' own kernels.
    assert np.array_equal(found, expected), f"{what}: {(found != expected).sum()} of {found.size} differ"


def dequantised(packed, state, absmax, blocksize, weights, dtype):
    """By bitsandbytes, and held against the formula."""
    state.dtype = dtype
    made = functional.dequantize_4bit(packed, state)
    ours = formulas.dequantise(packed.numpy().reshape(-1), absmax, state.code.numpy(), blocksize, weights.numel())
    same(made.float().numpy(), torch.tensor(ours).to(dtype).float().numpy(), "dequantised")
    return made


def make_case(name, weights, blocksize, kind, kept):
    code_map = MAPS[kind].numpy()
    tensors = {"weights": weights}
    ours, our_absmax = formulas.quantise(weights.float().numpy(), code_map, ORDERS[kind], blocksize)
    for double in (False, True):
        wanted = [dtype for mark, dtype in DTYPES.items() if "pd"[double] + mark in kept]
        if double and not wanted:
            continue
        packed, state = functional.quantize_4bit(weights, None, None, blocksize, double, kind)
        same(packed.numpy(), ours, f"{name}: codes")
        tensors["codes"] = packed
        absmax = our_absmax
        if double:
            absmax = nested(name, state, our_absmax, tensors)
        else:
            same(state.absmax.numpy(), our_absmax, f"{name}: absmax")
            tensors["absmax"] = state.absmax
        for dtype in wanted:
            key = "dequantised" + ".double" * double + ".bf16" * (dtype == torch.bfloat16)
            tensors[key] = dequantised(packed, state, absmax, blocksize, weights, dtype)
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def nested(name, state, plain, tensors):
    """Adds the twice quantised absmax to the tensors, and returns what it stands for."""
    offset = state.offset.numpy()
    same(offset, formulas.torch_mean(plain), f"{name}: offset")
    codes, absmax = formulas.quantise_dynamic(plain - offset, DYNAMIC.numpy())
    same(state.absmax.numpy(), codes, f"{name}: codes of absmax")
    same(state.state2.absmax.numpy(), absmax, f"{name}: nested absmax")
    same(state.state2.code.numpy(), DYNAMIC.numpy(), "dynamic map")
    tensors["double.absmax"] = state.absmax
    tensors["double.nested_absmax"] = state.state2.absmax
    tensors["double.offset"] = state.offset.reshape(1)
    return formulas.dequantise_dynamic(codes, absmax, DYNAMIC.numpy(), offset)


def dynamic_values(generator):
    """Blocks of 256 for the 8-bit codes: random; where the table of 65,536 changes; zeros; a short one."""
    table = formulas.lookup(DYNAMIC.numpy())
    edge = (np.flatnonzero(np.diff(table.astype(int))) + 0.5) / (formulas.LOOKUP_SIZE - 1) * 2 - 1
    edge = edge.astype(np.float32)
    near = [np.nextafter(edge, np.float32(side)) for side in (2, -2)]
    parts = [torch.tensor(np.append(np.resize(values, 255), np.float32(1))) for values in (edge, *near)]
    return torch.cat([normal(generator, 512), *parts, torch.zeros(256), 3 * normal(generator, 40)])


def make_dynamic():
    values = dynamic_values(torch.Generator().manual_seed(8))
    codes, state = functional.quantize_blockwise(values, blocksize=formulas.NESTED_BLOCK)
    ours, absmax = formulas.quantise_dynamic(values.numpy(), DYNAMIC.numpy())
    same(codes.numpy(), ours, "dynamic codes")
    same(state.absmax.numpy(), absmax, "dynamic absmax")
    return {"dynamic.values": values, "dynamic.codes": codes, "dynamic.absmax": state.absmax}


def count():
    draw = torch.Generator().manual_seed(0)
    amount = 1 << 20
    for what, values in [
        ("normal", normal(draw, amount)),
        ("uniform", 2 * torch.rand(amount, generator=draw) - 1),
        ("bfloat16", normal(draw, amount).bfloat16()),
        ("odd count", normal(draw, amount + 33)),
        ("wide", normal(draw, amount) * torch.exp(30 * normal(draw, amount).clamp(-2.5, 2.5))),
    ]:
        for kind, blocksize in [("nf4", 32), ("nf4", 64), ("nf4", 128), ("nf4", 4096), ("fp4", 64)]:
            packed, state = functional.quantize_4bit(values.view(-1, 1), None, None, blocksize, False, kind)
            ours, absmax = formulas.quantise(values.float().numpy(), MAPS[kind].numpy(), ORDERS[kind], blocksize)
            bytes_off = (packed.view(-1).numpy() != ours).sum()
            absmax_off = (state.absmax.numpy() != absmax).sum()
            differ = f"{bytes_off} bytes and {absmax_off} absmax of {values.numel()} values differ"
            print(f"{kind} {blocksize}, {what}: {differ}")
    absmax = normal(draw, 1 << 17, 64).abs().amax(1)
    for what, values in [
        ("normal", normal(draw, amount)),
        ("uniform", 2 * torch.rand(amount, generator=draw) - 1),
        ("absmax - mean", absmax - absmax.mean()),
    ]:
        codes = functional.quantize_blockwise(values, blocksize=formulas.NESTED_BLOCK)[0].numpy()
        ours, nearest = (
            formulas.quantise_dynamic(values.numpy(), DYNAMIC.numpy(), flag)[0].astype(int) for flag in (False, True)
        )
        off, near = (np.abs(codes - other) for other in (ours, nearest))
        farther = f"from the nearest {(near > 0).sum()}, by up to {near.max()}"
        print(f"8-bit, {what}: {(off > 0).sum()} of {codes.size} differ; {farther}")
    for blocks in (3, 6, 24, 192, 320, 1000, 5000, 16384, 49152):
        runs = 200 if blocks < 2000 else 20
        sets = [normal(draw, blocks, 64).abs().amax(1) for _ in range(runs)]
        order = sum(formulas.torch_mean(values.numpy()) != values.mean().numpy() for values in sets)
        rounded = sum(formulas.rounded_mean(values.numpy()) != values.mean().numpy() for values in sets)
        print(f"mean of {blocks}: {order} of {runs} differ; from the correctly rounded: {rounded}")
    for columns in (40, 48, 64, 80):
        weights = normal(draw, 16, columns)
        packed, state = functional.quantize_4bit(weights, None, None, 64, False, "nf4")
        parts = (packed.view(-1).numpy(), state.absmax.numpy(), state.code.numpy())
        ours = formulas.dequantise(*parts, 64, weights.numel())
        off = (functional.dequantize_4bit(packed, state).view(-1).numpy() != ours).sum()
        capability = torch.backends.cpu.get_cpu_capability()
        print(f"dequantised, {columns} columns: {off} of {weights.numel()} differ ({capability})")


def main():
    torch.set_num_threads(1)
    if sys.argv[1:] == ["count"]:
        return count()
    tensors = {f"map.{name}": values for name, values in MAPS.items()} | {"map.dynamic": DYNAMIC} | make_dynamic()
    about = {}
    for name, weights, blocksize, kind, kept in cases():
        tensors |= make_case(name, weights, blocksize, kind, kept)
        about[name] = {"blocksize": blocksize, "quant_type": kind}
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    path = Path(__file__).parent / "golden.safetensors"
    # One entry: several are written in an order that differs from run to run.
    save_file(tensors, path, {"made": json.dumps(versions | {"cases": about})})
    assert path.stat().st_size < LARGEST_FILE, path.stat().st_size


if __name__ == "__main__":
    main()
