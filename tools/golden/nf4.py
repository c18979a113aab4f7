"""NF4 with and without double quantization: a NumPy transcription of its definition (Dettmers et al., NeurIPS 2023).

Blocks of 64 consecutive elements in row-major order, each scaled by its largest magnitude `a`; the code is the number
of midpoints between neighbouring levels strictly below x * (1 / a). An all-zero block has a = 0 and code 7. Two codes
share a byte, the earlier one in the high nibble; an odd count is padded with one zero element. Double quantization: the mean o of all a
is taken off and the rest coded in blocks of 256 with an 8-bit signed dynamic map. All arithmetic is in f32.

Tensors are named as `bitsandbytes` does on disk (`weight`, `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
`weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4`), and beside them `original`, `codes` (one a byte,
unpacked), `absmax` (as used to decode) and `dequantised`.
"""

import json

import numpy as np

from common import GOLDEN, fresh, rng, write_tensors

LEVELS = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                   -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                   0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                   0.7229568362236023, 1.0], dtype=np.float32)
BLOCK, NESTED_BLOCK = 64, 256


def dynamic_map():
    """256 levels: for i in 0..6 the midpoints of 2^i equal cells of [0.1, 1] times 10^(i-6), both signs, 0 and 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** i + 1)
        mid = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += list(mid) + list(-mid)
    levels = np.sort(np.array(levels, dtype=np.float32))
    assert len(levels) == 256 and levels[-1] == 1.0
    return levels


def blocks(flat, size):
    return [flat[i:i + size] for i in range(0, len(flat), size)]


def nearest(x, levels):
    """Number of midpoints strictly below x: a tie takes the lower code."""
    midpoints = (levels[1:] + levels[:-1]) / np.float32(2)
    return np.searchsorted(midpoints, x, side="left").astype(np.uint8)


def encode(flat):
    codes, absmax = [], []
    for b in blocks(flat, BLOCK):
        a = np.abs(b).max()
        scale = np.float32(1.0) / a if a > 0 else np.float32(0.0)
        codes.append(nearest(b * scale, LEVELS))
        absmax.append(a)
    return np.concatenate(codes), np.array(absmax, dtype=np.float32)


def decode(codes, absmax):
    return LEVELS[codes] * np.repeat(absmax, BLOCK)[:len(codes)]


def pack(codes):
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(7))  # the code of a zero
    return ((codes[0::2] << 4) | codes[1::2]).reshape(-1, 1)


def nest(absmax):
    """Codes, outer scales and offset of the second level, and the scales as decoding sees them."""
    levels, offset = dynamic_map(), absmax.mean(dtype=np.float32)
    codes, scales, decoded = [], [], []
    for b in blocks(absmax - offset, NESTED_BLOCK):
        a = np.abs(b).max()
        scale = np.float32(1.0) / a if a > 0 else np.float32(0.0)
        c = nearest(b * scale, levels)
        codes.append(c)
        scales.append(a)
        decoded.append(levels[c] * a + offset)
    return np.concatenate(codes), np.array(scales, dtype=np.float32), offset, np.concatenate(decoded).astype(np.float32)


def write(name, weight, double):
    flat = weight.reshape(-1)
    codes, absmax = encode(flat)
    out = {"original": weight, "codes": codes, "weight": pack(codes), "weight.quant_map": LEVELS}
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    if double:
        nested, scales, offset, absmax = nest(absmax)
        out |= {"weight.absmax": nested, "weight.nested_absmax": scales, "weight.nested_quant_map": dynamic_map()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        out["weight.absmax"] = absmax
    out |= {"absmax": absmax, "dequantised": decode(codes, absmax).reshape(weight.shape)}
    out["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    write_tensors(GOLDEN / "nf4" / f"{name}.safetensors", out)
    again, _ = encode(out["dequantised"].reshape(-1))
    if not double:
        assert (again == codes).all(), name  # every block holds a code of magnitude one, or is zero
    err = np.abs(out["dequantised"] - weight).max() / np.abs(weight).max()
    print(f"{name}: {weight.shape}, largest relative error {err:.3f}")


def make():
    fresh(GOLDEN / "nf4")
    shapes = {"square": (64, 64), "odd": (37, 53), "short_tail": (5, 131), "row": (1, 63), "wide": (3, 1000)}
    for name, shape in shapes.items():
        weight = rng("nf4", name).standard_normal(shape).astype(np.float32) * np.float32(0.05)
        write(name, weight, False)
        write(name + "_double", weight, True)
    many = rng("nf4", "many").standard_normal((141, 127)).astype(np.float32)  # 280 blocks: two outer blocks
    many *= rng("nf4", "many", "rows").uniform(0.001, 3.0, (141, 1)).astype(np.float32)
    write("many_blocks_double", many, True)
    special = rng("nf4", "special").standard_normal((4, 64)).astype(np.float32)
    special[0] = 0.0  # a block of zeros
    special[1, :15] = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)  # ties take the lower code
    special[1, 15:] = np.float32(0.25)
    special[1, 63] = -1.0
    special[2, :] = np.float32(-3.5)  # a constant block
    special[3, :] *= np.float32(1e-30)
    write("special", special, False)
