"""Bitsandbytes' 4-bit numbers in NumPy, one float32 operation after the other, as its CPU build computes them.

In: weights, a code map, a block size. Out: the bytes that bitsandbytes makes, and the weights that it makes of them.
make.py beside it holds each of these against bitsandbytes itself.
"""

import numpy as np

F32 = np.float32
FLOOR = F32(1e-38)
NESTED_BLOCK = 256
LOOKUP_SIZE = 65536


def in_blocks(values, size):
    """Rows of `size` values, the last one filled with zeros."""
    blocks = np.zeros((-(-values.size // size), size), F32)
    blocks.reshape(-1)[: values.size] = values
    return blocks


def midpoints(sorted_map):
    return (sorted_map[:-1] + sorted_map[1:]) / F32(2)


def quantise(weights, code_map, order, blocksize):
    """Bytes and absmax. `order` says which code each place of the sorted map has."""
    values = weights.astype(F32).reshape(-1)
    blocks = in_blocks(values, blocksize)
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks * (F32(1) / np.maximum(absmax, FLOOR))[:, None]
    if values.size % blocksize:
        # A short last block is divided, and its floor is stored.
        absmax[-1] = max(absmax[-1], FLOOR)
        scaled[-1] = blocks[-1] / absmax[-1]
    scaled = np.clip(scaled, F32(-1), F32(1)).reshape(-1)[: values.size]
    if values.size % 2:
        scaled = np.append(scaled, F32(0))
    # The number of midpoints below the value: a tie goes to the lower code.
    codes = order[np.searchsorted(midpoints(code_map[order]), scaled, side="left")].astype(np.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantise(packed, absmax, code_map, blocksize, count):
    """In float32; for a narrower type it is rounded once, to nearest even."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    return code_map[codes] * np.repeat(absmax, blocksize)[:count]


def lookup(dynamic_map):
    """The code of each of the 65,536 places that [-1, 1] is cut into."""
    place = np.arange(LOOKUP_SIZE).astype(F32)
    value = F32(-1) + (F32(2) * place) / F32(LOOKUP_SIZE - 1)
    return np.searchsorted(midpoints(dynamic_map), value, side="left").astype(np.uint8)


def quantise_dynamic(values, dynamic_map, nearest=False):
    """Bytes and absmax in blocks of 256. `nearest` takes the map's midpoints in place of the 65,536 places."""
    blocks = in_blocks(values, NESTED_BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    zero = absmax == 0
    scaled = np.clip(blocks * (F32(1) / np.where(zero, F32(1), absmax))[:, None], F32(-1), F32(1))
    if nearest:
        codes = np.searchsorted(midpoints(dynamic_map), scaled, side="left").astype(np.uint8)
    else:
        place = (scaled + F32(1)) * F32(0.5) * F32(LOOKUP_SIZE - 1) + F32(0.5)
        codes = lookup(dynamic_map)[place.astype(np.int64)]
    codes[zero] = 0
    return codes.reshape(-1)[: values.size], absmax


def dequantise_dynamic(codes, absmax, dynamic_map, offset):
    """A product and a sum, each rounded."""
    return dynamic_map[codes] * np.repeat(absmax, NESTED_BLOCK)[: codes.size] + offset


def torch_mean(values):
    """`torch.mean` of float32 in one thread: 4 sums of 8 lanes each (of 1 lane below 8 values), in levels; divided."""
    lanes = 8 if values.size >= 8 else 1
    rows = values[: values.size // lanes * lanes].reshape(-1, lanes)
    whole = len(rows) // 4
    partial = levels(rows[: whole * 4].reshape(whole, 4 * lanes)).reshape(4, lanes)
    for row in rows[whole * 4 :]:
        partial[0] += row
    total = partial[0]
    for other in partial[1:]:
        total = total + other
    result = F32(0)
    for value in [*values[len(rows) * lanes :], *total]:
        result = F32(result + value)
    return F32(result / F32(values.size))


def levels(rows, count=4):
    """Sums of the rows, carried over to the next of four levels after each 2^power, 2^(2 power), ... rows."""
    power = max(4, max(len(rows) - 1, 0).bit_length() // count)
    step = 1 << power
    sums = np.zeros((count, rows.shape[1]), F32)
    done = 0
    while done + step <= len(rows):
        for row in rows[done : done + step]:
            sums[0] += row
        done += step
        for level in range(1, count):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if done & ((step - 1) << (level * power)):
                break
    for row in rows[done:]:
        sums[0] += row
    for level in range(1, count):
        sums[0] += sums[level]
    return sums[0]


def rounded_mean(values):
    return F32(values.astype(np.float64).sum() / values.size)
