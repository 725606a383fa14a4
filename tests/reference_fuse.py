"""What fusing must give, in float64 NumPy: one order of sums, one rounding."""

import numpy as np

from support import from_bf16

BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def widen(raw, dtype):
    """float64 numbers of stored bits."""
    bits = np.frombuffer(bytes(raw), BITS[dtype])
    if dtype == "BF16":
        return from_bf16(bits).astype(np.float64)
    return bits.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float64)


def narrow(x, dtype):
    """Stored bits of float64 numbers, rounded once to nearest even."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "F32":
            return x.astype(np.float32).tobytes()
        if dtype == "F16":
            return x.astype(np.float16).tobytes()
        # bfloat16: eight bits, or multiples of 2^-133 where numbers are subnormal; `rint` takes ties to even.
        _, exponent = np.frexp(x)
        grid = np.maximum(exponent - 8, -133)
        rounded = np.ldexp(np.rint(np.ldexp(x, -grid)), grid)
        bits = np.where(rounded == 0, np.copysign(0.0, x), rounded).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16).tobytes()


def delta(a, b, scale, layout):
    """``scale sum_r b_r a_r`` in the file's layout; a (rank, in), b (out, rank), sums by rising r."""
    total = np.zeros((b.shape[0], a.shape[1]))
    for r in range(a.shape[0]):
        total = total + np.outer(b[:, r].astype(np.float64), a[r].astype(np.float64))
    return scale * (total if layout == "out_in" else total.T)


def fused(raw, dtype, a, b, scale, layout):
    """Bytes of a tensor after fusing."""
    d = delta(a, b, scale, layout)
    return narrow(widen(raw, dtype).reshape(d.shape) + d, dtype)
