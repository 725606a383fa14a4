"""The reference network in NumPy, float32 throughout: frozen layers, LoRA on each, Adam.

Rows are samples: `z = h W + b + s (h A) B` with A (in, r) and B (r, out). All factors lie in one flat vector,
and their gradients in another, so that the optimiser is a dozen calls whatever the number of layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def softmax(z: Floats) -> Floats:
    """Probabilities of each row."""
    out: Floats = z - z.max(axis=1, keepdims=True)
    np.exp(out, out=out)
    out /= out.sum(axis=1, keepdims=True)
    return out


def residual(z: Floats, y: NDArray[np.int64]) -> Floats:
    """`dL/dz` of each row's cross-entropy, not divided by the number of rows."""
    g = softmax(z)
    g[np.arange(len(y)), y] -= 1
    return g


class Views:
    """A flat vector with every layer's A and B as views into it."""

    def __init__(self, widths: Sequence[int], rank: int) -> None:
        pairs = list(itertools.pairwise(widths))
        shapes = [(i, rank) for i, _ in pairs] + [(rank, o) for _, o in pairs]
        ends = np.cumsum([i * o for i, o in shapes])
        self.widths, self.rank = tuple(widths), rank
        self.flat: Floats = np.zeros(int(ends[-1]), np.float32)
        parts = [p.reshape(s) for p, s in zip(np.split(self.flat, ends[:-1]), shapes, strict=True)]
        self.a, self.b = parts[: len(pairs)], parts[len(pairs) :]

    def like(self) -> Views:
        """Zeros of the same shapes."""
        return Views(self.widths, self.rank)

    def copy(self) -> Views:
        """The same numbers elsewhere."""
        out = self.like()
        out.flat[:] = self.flat
        return out


@dataclass
class Trace:
    """What backward needs of a forward: each layer's input h and s h A, and the logits."""

    h: list[Floats]
    u: list[Floats]
    z: Floats


class Network:
    """Frozen weights W (in, out) and b; ReLU between layers."""

    def __init__(self, weights: Sequence[Floats], biases: Sequence[Floats], scaling: float) -> None:
        self.w, self.bias, self.scaling = list(weights), list(biases), scaling
        self.last = len(self.w) - 1

    def forward(self, x: Floats, f: Views) -> Trace:
        """All that backward needs."""
        h, hs, us = x, [], []
        for i, (w, bias) in enumerate(zip(self.w, self.bias, strict=True)):
            u = h @ f.a[i]
            u *= self.scaling
            z = h @ w
            z += bias
            z += u @ f.b[i]
            hs.append(h)
            us.append(u)
            if i < self.last:
                np.maximum(z, 0, out=z)
            h = z
        return Trace(hs, us, h)

    def backward(self, t: Trace, g: Floats, f: Views, out: Views, squares: Views | None = None) -> None:
        """Writes the mean gradient of the factors to `out`.

        A sample's gradient is an outer product, so the sum of its squares over samples costs the product of
        squared rows: `squares` takes it.

        Args:
            t: The forward.
            g: `dL/dz` of each row, not divided by their number.
            f: The factors.
            out: Where the mean gradient goes.
            squares: Where the sums of squared per-sample gradients go.
        """
        share = np.float32(1.0 / len(g))
        for i in range(self.last, -1, -1):
            w = g @ f.b[i].T
            w *= self.scaling
            np.matmul(t.h[i].T, w * share, out=out.a[i])
            np.matmul((t.u[i] * share).T, g, out=out.b[i])
            if squares is not None:
                np.matmul(np.square(t.h[i]).T, np.square(w), out=squares.a[i])
                np.matmul(np.square(t.u[i]).T, np.square(g), out=squares.b[i])
            if i:
                g = g @ self.w[i].T
                g += w @ f.a[i].T
                g *= t.h[i] > 0

    def predict(self, x: Floats, f: Views) -> NDArray[np.int64]:
        """Class of each row."""
        out: NDArray[np.int64] = self.forward(x, f).z.argmax(axis=1)
        return out


class Adam:
    """Adam of Kingma & Ba 2015 on a flat vector, in place; what AdamW is without weight decay."""

    def __init__(self, size: int, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m, self.v = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self._x, self._y = np.empty(size, np.float32), np.empty(size, np.float32)

    def step(self, p: Floats, g: Floats) -> None:
        """One step on `p` along `g`."""
        self.t += 1
        m, v, x, y = self.m, self.v, self._x, self._y
        m *= 0.9
        np.multiply(g, 0.1, out=x)
        m += x
        v *= 0.999
        np.multiply(g, g, out=x)
        x *= 0.001
        v += x
        np.sqrt(v, out=x)
        x *= 1 / math.sqrt(1 - 0.999**self.t)
        x += 1e-8
        np.divide(m, x, out=y)
        y *= self.lr / (1 - 0.9**self.t)
        p -= y


def pretrain(
    widths: Sequence[int],
    x: Floats,
    y: NDArray[np.int64],
    epochs: int,
    rng: np.random.Generator,
    lr: float = 1e-3,
    batch: int = 32,
) -> tuple[list[Floats], list[Floats]]:
    """Weights (in, out) and biases of a network that has learned the base domain; He's start, Adam."""
    pairs = list(itertools.pairwise(widths))
    sizes = [i * o for i, o in pairs] + [o for _, o in pairs]
    ends = np.cumsum(sizes)[:-1]
    flat, grad = np.zeros(sum(sizes), np.float32), np.zeros(sum(sizes), np.float32)

    def split(v: Floats) -> tuple[list[Floats], list[Floats]]:
        parts = np.split(v, ends)
        return [p.reshape(s) for p, s in zip(parts, pairs, strict=False)], parts[len(pairs) :]

    (w, b), (gw, gb) = split(flat), split(grad)
    for p, (i, _) in zip(w, pairs, strict=True):
        p[:] = rng.standard_normal(p.shape) * math.sqrt(2 / i)
    adam = Adam(len(flat), lr)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for k in range(0, len(x), batch):
            rows = order[k : k + batch]
            hs = [x[rows]]
            for i, (wi, bi) in enumerate(zip(w, b, strict=True)):
                z = hs[-1] @ wi + bi
                hs.append(np.maximum(z, 0) if i + 1 < len(w) else z)
            g = residual(hs[-1], y[rows])
            g *= np.float32(1 / len(rows))
            for i in range(len(w) - 1, -1, -1):
                np.matmul(hs[i].T, g, out=gw[i])
                g.sum(axis=0, out=gb[i])
                if i:
                    g = g @ w[i].T
                    g *= hs[i] > 0
            adam.step(flat, grad)
    return [p.copy() for p in w], [p.copy() for p in b]
