"""Twins of the block codecs, from the published layouts: NumPy float32, sums in element order.

Many blocks at once: ``x`` is (blocks, elements) float32, codes are (blocks, bytes) uint8. Dequantised in
float64, the numbers are those of the layout's formula without rounding.
"""

from __future__ import annotations

import numpy as np

f32 = np.float32
#: name: (numbers per block, bytes per block, number in ggml)
TYPES = {
    "q8_0": (32, 34, 8),
    "q6_k": (256, 210, 14),
    "q5_k": (256, 176, 13),
    "q4_k": (256, 144, 12),
    "q4_1": (32, 20, 3),
    "q4_0": (32, 18, 2),
}
#: Relative RMSE of Gaussian numbers.
GAUSSIAN = {"q8_0": 0.0054, "q6_k": 0.0178, "q5_k": 0.0363, "q4_k": 0.0715, "q4_1": 0.0782, "q4_0": 0.0862}


def nearest(v):
    """To the nearest integer, ties to even, by a float32 magic number as ggml does."""
    bits = (np.asarray(v, f32) + f32(12582912.0)).view(np.int32)
    return (bits & 0x7FFFFF) - 0x400000


def truncate(v):
    """To int32 as x86 does it."""
    v = np.asarray(v, f32)
    fits = (v > f32(-2147483904.0)) & (v < f32(2147483648.0))
    return np.where(fits, np.where(fits, v, 0).astype(np.int64), -(2**31)).astype(np.int32)


def half(v):
    """Float32 to the bytes of f16, and the number read back."""
    h = np.asarray(v, f32).astype("<f2")
    return h.reshape(-1, 1).view(np.uint8), h.astype(f32)


def total(x, start=None):
    """Sum over the last axis in element order."""
    s = np.zeros(x.shape[:-1], f32) if start is None else start
    for i in range(x.shape[-1]):
        s = s + x[..., i]
    return s


def first_largest(x):
    """The number of largest magnitude, the first of them; (…, 1)."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)


def inverse(d):
    return np.where(d == 0, f32(0), f32(1) / np.where(d == 0, f32(1), d))


def q8_0(x):
    d = np.abs(x).max(-1, keepdims=True) / f32(127)
    y = x * inverse(d)
    # Half away from zero: |y| is small enough for the half to be added exactly.
    rounded = np.trunc(np.abs(y.astype(np.float64)) + 0.5) * np.sign(y)
    return np.hstack([half(d)[0], truncate(rounded.astype(f32)).astype(np.uint8)])


def nibbles(codes):
    n = codes.shape[-1] // 2
    return (codes[..., :n] | codes[..., n:] << 4).astype(np.uint8)


def q4_0(x):
    m = first_largest(x)
    # A block of zeros has a scale of -0.
    d = np.where(np.abs(m) > 0, m, f32(0)) / f32(-8)
    codes = np.minimum(truncate(x * inverse(d) + f32(8.5)).astype(np.int8), 15).astype(np.uint8)
    return np.hstack([half(d)[0], nibbles(codes)])


def q4_1(x):
    # The first of equals, for the sign of a zero.
    low = np.take_along_axis(x, x.argmin(-1)[:, None], -1)
    high = np.take_along_axis(x, x.argmax(-1)[:, None], -1)
    d = (high - low) / f32(15)
    codes = np.minimum(truncate((x - low) * inverse(d) + f32(0.5)).astype(np.int8), 15).astype(np.uint8)
    return np.hstack([half(d)[0], half(low)[0], nibbles(codes)])


def fit_min(x, top, start, steps):
    """Scale, minimum (as subtracted) and codes of parts (…, 32)."""
    mean = np.sqrt(total(x * x) / f32(32))
    w = mean[..., None] + np.abs(x)
    wx = w * x
    sum_w, sum_x = total(w[..., 1:], w[..., 0]), total(wx[..., 1:], wx[..., 0])
    low, high = np.minimum(x.min(-1), f32(0)), x.max(-1)
    flat = high == low
    span = np.where(flat, f32(1), high - low)
    inv = f32(top) / span
    scale = f32(1) / inv
    codes = np.clip(nearest(inv[..., None] * (x - low[..., None])), 0, top)
    best = total(w * (scale[..., None] * codes.astype(f32) + low[..., None] - x) ** 2)
    for step in range(steps + 1):
        inv = (f32(start) + f32(0.1) * f32(step) + f32(top)) / np.where(flat, f32(1), high - low)
        tried = np.clip(nearest(inv[..., None] * (x - low[..., None])), 0, top)
        t = tried.astype(f32)
        sum_l, sum_l2, sum_xl = total(w * t), total(w * t * t), total(w * t * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        some = det > 0
        safe = np.where(some, det, f32(1))
        s, m = (sum_w * sum_xl - sum_x * sum_l) / safe, (sum_l2 * sum_x - sum_l * sum_xl) / safe
        above = m > 0
        s = np.where(above, sum_xl / np.where(sum_l2 > 0, sum_l2, f32(1)), s)
        m = np.where(above, f32(0), m)
        error = total(w * (s[..., None] * t + m[..., None] - x) ** 2)
        won = some & (error < best)
        best, scale, low = np.where(won, error, best), np.where(won, s, scale), np.where(won, m, low)
        codes = np.where(won[..., None], tried, codes)
    return np.where(flat, f32(0), scale), -low, np.where(flat[..., None], 0, codes)


def pack_scales(sc, m):
    """(…, 8) and (…, 8) of 6 bits to (…, 12) bytes."""
    first = sc[..., :4] | sc[..., 4:] >> 4 << 6
    second = m[..., :4] | m[..., 4:] >> 4 << 6
    third = (sc[..., 4:] & 15) | (m[..., 4:] & 15) << 4
    return np.concatenate([first, second, third], -1).astype(np.uint8)


def unpack_scales(p):
    a, b, c = p[..., :4], p[..., 4:8], p[..., 8:]
    sc = np.concatenate([a & 63, (c & 15) | a >> 6 << 4], -1)
    return sc, np.concatenate([b & 63, c >> 4 | b >> 6 << 4], -1)


def k_min(x, top, start, steps):
    """The 16 bytes at the head of q4_k and q5_k, and the codes (blocks, 8, 32)."""
    parts = x.reshape(-1, 8, 32)
    scale, minimum, codes = fit_min(parts, top, start, steps)
    high, deep = np.maximum(scale.max(-1), f32(0)), np.maximum(minimum.max(-1), f32(0))

    def six(v, top):
        inv = np.where(top > 0, f32(63) / np.where(top > 0, top, f32(1)), f32(0))
        return np.minimum(nearest(inv[:, None] * v).astype(np.uint8), 63)

    sc, m = six(scale, high), six(minimum, deep)
    (d_bytes, d), (m_bytes, dmin) = half(high / f32(63)), half(deep / f32(63))
    step, off = d[:, None] * sc.astype(f32), dmin[:, None] * m.astype(f32)
    zero = step == 0
    again = np.clip(nearest((parts + off[..., None]) / np.where(zero, f32(1), step)[..., None]), 0, top)
    codes = np.where(zero[..., None], codes, again).astype(np.uint8)
    return np.hstack([d_bytes, m_bytes, pack_scales(sc, m)]), codes


def q4_k(x):
    head, c = k_min(x, 15, -1.0, 20)
    return np.hstack([head, (c[:, 0::2] | c[:, 1::2] << 4).reshape(len(x), 128)])


def q5_k(x):
    head, c = k_min(x, 31, -0.5, 15)
    low = c & 15
    high = np.zeros((len(x), 32), np.uint8)
    for j in range(8):
        high |= c[:, j] >> 4 << j
    return np.hstack([head, high, (low[:, 0::2] | low[:, 1::2] << 4).reshape(len(x), 128)])


def q6_k(x):
    parts = x.reshape(-1, 16, 16)
    m = first_largest(parts)[..., 0]
    small = np.abs(m) < f32(1e-15)
    safe = np.where(small, f32(1), m)
    w = parts * parts

    def tried(inv):
        codes = np.clip(nearest(inv[..., None] * parts), -32, 31)
        t = codes.astype(f32)
        return codes, total(w * parts * t), total(w * t * t)

    codes, xl, ll = tried(f32(-32) / safe)
    scale = np.where(ll == 0, f32(0), xl / np.where(ll == 0, f32(1), ll))
    best = scale * xl
    for step in [s for s in range(-9, 10) if s]:
        other, xl, ll = tried(-(f32(32) + f32(0.1) * f32(step)) / safe)
        won = (ll > 0) & (xl * xl > best * ll)
        scale = np.where(won, xl / np.where(ll > 0, ll, f32(1)), scale)
        best = np.where(won, scale * xl, best)
        codes = np.where(won[..., None], other, codes)
    scale, codes = np.where(small, f32(0), scale), np.where(small[..., None], -32, codes)
    top = first_largest(scale)
    zero = np.abs(top) < f32(1e-15)
    inv = f32(-128) / np.where(zero, f32(1), top)
    d_bytes, d = half(f32(1) / inv)
    sc = np.minimum(nearest(inv * scale), 127).astype(np.int8)
    step = d.reshape(-1, 1) * sc.astype(f32)
    again = np.clip(nearest(parts / np.where(step == 0, f32(1), step)[..., None]), -32, 31)
    codes = (np.where((step == 0)[..., None], codes, again) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], -1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    n = len(x)
    out = np.hstack([ql.reshape(n, 128), qh.reshape(n, 64), sc.view(np.uint8), d_bytes])
    return np.where(zero, np.uint8(0), out)


QUANTIZE = {"q8_0": q8_0, "q6_k": q6_k, "q5_k": q5_k, "q4_k": q4_k, "q4_1": q4_1, "q4_0": q4_0}


def field(blocks, at, kind):
    """The f16 at byte ``at`` of every block, as a column of ``kind``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(kind)


def dequantize(name, blocks, kind=f32):
    """Numbers of (blocks, bytes): ``kind`` float32 gives ggml's bits, float64 the exact values."""
    n = len(blocks)
    if name == "q8_0":
        return field(blocks, 0, kind) * blocks[:, 2:].view(np.int8).astype(kind)
    if name == "q4_0":
        codes = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4])
        return field(blocks, 0, kind) * (codes.astype(kind) - kind(8))
    if name == "q4_1":
        codes = np.hstack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4])
        return field(blocks, 0, kind) * codes.astype(kind) + field(blocks, 2, kind)
    if name == "q6_k":
        ql, qh = blocks[:, :128].reshape(n, 2, 2, 32), blocks[:, 128:192].reshape(n, 2, 1, 32)
        low = np.concatenate([ql & 15, ql >> 4], 2)
        codes = low | ((qh >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3) << 4
        step = field(blocks, 208, kind) * blocks[:, 192:208].view(np.int8).astype(kind)
        parts = codes.reshape(n, 16, 16).astype(kind) - kind(32)
        return (step[..., None] * parts).reshape(n, 256)
    sc, m = unpack_scales(blocks[:, 4:16])
    step, off = field(blocks, 0, kind) * sc.astype(kind), field(blocks, 2, kind) * m.astype(kind)
    qs = blocks[:, -128:].reshape(n, 4, 1, 32)
    codes = np.concatenate([qs & 15, qs >> 4], 2).reshape(n, 8, 32)
    if name == "q5_k":
        bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
        codes = codes | (blocks[:, 16:48].reshape(n, 1, 32) >> bits & 1) << 4
    return (step[..., None] * codes.astype(kind) - off[..., None]).reshape(n, 256)
