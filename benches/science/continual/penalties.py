"""What the reference holds on to, kind by kind, in NumPy.

One unit: mean loss + `strength / 2 * sum F d^2`, F a mean over samples of squared per-sample gradients. The
definitions are written out (a loop over anchors, no sums folded together), so that they can be checked
against the native ones, which are arranged otherwise.
"""

from __future__ import annotations

import numpy as np

from .network import Floats, Network, Views, softmax

#: Rows whose gradients for all classes are worked on at once.
BLOCK = 128


class Moments:
    """Exact expectations over the classes, means over samples.

    Attributes:
        squares: Squared per-sample gradients of every factor; None where they were not asked for.
        a: Of each layer, `E[x_i^2]` of its inputs.
        c: Of each layer, `E[g_j^2]` of the gradients at its outputs.
    """

    def __init__(self, net: Network, f: Views, x: Floats, squares: bool) -> None:
        layers = range(net.last + 1)
        merged = [w + net.scaling * (f.a[i] @ f.b[i]) for i, w in enumerate(net.w)]
        self.squares = f.like() if squares else None
        self.a = [np.zeros(len(w), np.float32) for w in net.w]
        self.c = [np.zeros(w.shape[1], np.float32) for w in net.w]
        for k in range(0, len(x), BLOCK):
            t = net.forward(x[k : k + BLOCK], f)
            p = softmax(t.z)
            n, classes = p.shape
            # Row (sample, class): sqrt(p_c) (p - e_c), whose squares carry the weight p_c.
            g = np.broadcast_to(p[:, None, :], (n, classes, classes)).copy()
            g[:, np.arange(classes), np.arange(classes)] -= 1
            g *= np.sqrt(p)[:, :, None]
            g = g.reshape(n * classes, classes)
            for i in reversed(layers):
                gg = np.square(g).reshape(n, classes, -1).sum(axis=1)
                hh = np.square(t.h[i])
                self.a[i] += hh.sum(axis=0)
                self.c[i] += gg.sum(axis=0)
                if self.squares is not None:
                    w = g @ f.b[i].T
                    w *= net.scaling
                    ww = np.square(w, out=w).reshape(n, classes, -1).sum(axis=1)
                    self.squares.a[i] += hh.T @ ww
                    self.squares.b[i] += np.square(t.u[i]).T @ gg
                if i:
                    g = g @ merged[i].T
                    g.reshape(n, classes, -1)[:] *= (t.h[i] > 0)[:, None, :]
        for sums in (*self.a, *self.c, *([] if self.squares is None else [self.squares.flat])):
            sums *= np.float32(1 / len(x))


class Penalty:
    """None: the base of the others.

    Attributes:
        active: Whether a task is held.
        squares: Whether `seen` wants every batch's squared gradients.
        path: Whether `moved` wants every step.
    """

    squares = path = False

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        self.net, self.strength, self.active = net, strength, False
        self._x = np.empty_like(start.flat)

    def add_gradient(self, f: Views, grad: Views) -> None:
        """Adds the penalty's gradient."""

    def seen(self, sums: Views, n: int) -> None:
        """Sums of squared per-sample gradients of a batch of n, at the weights before its step."""

    def moved(self, grad: Floats, before: Floats, after: Floats) -> None:
        """A step, with the loss's gradient alone."""

    def end_task(self, f: Views, x: Floats) -> None:
        """Holds on to what was learned on x."""


class _Anchored(Penalty):
    """Pairs of importance and weights, summed one by one."""

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.anchors: list[tuple[Floats, Floats]] = []

    def add_gradient(self, f: Views, grad: Views) -> None:
        for importance, anchor in self.anchors:
            np.subtract(f.flat, anchor, out=self._x)
            self._x *= importance
            grad.flat += self._x

    def hold(self, importance: Floats, f: Views, *, only: bool) -> None:
        """Adds an anchor, or leaves only it."""
        pair = (importance * np.float32(self.strength), f.flat.copy())
        self.anchors = [pair] if only else [*self.anchors, pair]
        self.active = True


class L2(_Anchored):
    """Every weight counts the same; the latest anchor."""

    def end_task(self, f: Views, x: Floats) -> None:
        self.hold(np.ones_like(f.flat), f, only=True)


class Ewc(_Anchored):
    """Exact Fisher, an anchor per task (Kirkpatrick 2017)."""

    def end_task(self, f: Views, x: Floats) -> None:
        self.hold(self.fisher(f, x), f, only=False)

    def fisher(self, f: Views, x: Floats) -> Floats:
        """Exact Fisher of every factor."""
        squares = Moments(self.net, f, x, squares=True).squares
        assert squares is not None
        return squares.flat


class OnlineEwc(Ewc):
    """Exact Fisher summed over tasks, the latest anchor (Schwarz 2018), gamma 1."""

    total: Floats | None = None

    def end_task(self, f: Views, x: Floats) -> None:
        task = self.fisher(f, x)
        self.total = task if self.total is None else self.total + task
        self.hold(self.total, f, only=True)


class EwcEma(_Anchored):
    """Squares of the training batches in a moving average that never starts again (Chaudhry 2018)."""

    squares = True
    KEEP = 0.98

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.mean, self.steps = np.zeros_like(start.flat), 0

    def seen(self, sums: Views, n: int) -> None:
        self.mean *= self.KEEP
        self.mean += sums.flat * np.float32((1 - self.KEEP) / n)
        self.steps += 1

    def end_task(self, f: Views, x: Floats) -> None:
        self.hold(self.mean * np.float32(1 / (1 - self.KEEP**self.steps)), f, only=True)


class EwcSum(_Anchored):
    """Squares of the training batches, a mean per task, summed over tasks: no extra pass over the data."""

    squares = True

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.sums, self.n = np.zeros_like(start.flat), 0
        self.total = np.zeros_like(start.flat)

    def seen(self, sums: Views, n: int) -> None:
        self.sums += sums.flat
        self.n += n

    def end_task(self, f: Views, x: Floats) -> None:
        self.total += self.sums * np.float32(1 / self.n)
        self.sums[:], self.n = 0, 0
        self.hold(self.total, f, only=True)


class Si(_Anchored):
    """Synaptic intelligence: how much of the loss's fall each weight's path earned (Zenke 2017)."""

    path = True
    DAMPING = np.float32(1e-3)

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.earned, self.total = np.zeros_like(start.flat), np.zeros_like(start.flat)
        self.start = start.flat.copy()

    def moved(self, grad: Floats, before: Floats, after: Floats) -> None:
        np.subtract(before, after, out=self._x)
        self._x *= grad
        self.earned += self._x

    def end_task(self, f: Views, x: Floats) -> None:
        self.total += np.maximum(self.earned, 0) / ((f.flat - self.start) ** 2 + self.DAMPING)
        self.earned[:] = 0
        self.start = f.flat.copy()
        self.hold(self.total, f, only=True)


class Mas(_Anchored):
    """Mean size of the gradient of `|z|^2`, no labels (Aljundi 2018); summed over tasks, latest anchor."""

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.total = np.zeros_like(start.flat)

    def end_task(self, f: Views, x: Floats) -> None:
        sums = f.like()
        for k in range(0, len(x), BLOCK):
            t = self.net.forward(x[k : k + BLOCK], f)
            g = 2 * t.z
            for i in range(self.net.last, -1, -1):
                w = self.net.scaling * (g @ f.b[i].T)
                sums.a[i] += np.abs(t.h[i]).T @ np.abs(w)
                sums.b[i] += np.abs(t.u[i]).T @ np.abs(g)
                if i:
                    g = (g @ self.net.w[i].T + w @ f.a[i].T) * (t.h[i] > 0)
        self.total += sums.flat * np.float32(1 / len(x))
        self.hold(self.total, f, only=True)


class _Held:
    """One layer of one anchor: `k a_i c_j` is the importance of `(A B - A* B*)_ij`.

    With U = [Da A, Da A*] and V = [B Dc; -B* Dc] the gradients are `U (V B^T)` and `(A^T U) V`.
    """

    def __init__(self, k: float, a: Floats, c: Floats, lora_a: Floats, lora_b: Floats) -> None:
        r = len(lora_b)
        self.k, self.a, self.c, self.r = k, a[:, None], c, r
        self.u, self.v = np.empty((len(a), 2 * r), np.float32), np.empty((2 * r, len(c)), np.float32)
        self.u[:, r:], self.v[r:] = lora_a * self.a, -lora_b * c

    def add_gradient(self, lora_a: Floats, lora_b: Floats, ga: Floats, gb: Floats) -> None:
        np.multiply(lora_a, self.a, out=self.u[:, : self.r])
        np.multiply(lora_b, self.c, out=self.v[: self.r])
        left, right = self.v @ lora_b.T, lora_a.T @ self.u
        left *= self.k
        right *= self.k
        ga += self.u @ left
        gb += right @ self.v


class DeltaEwc(Penalty):
    """Importance `a_i c_j` of the weight change itself, an anchor per task; dense matrices never appear."""

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.anchors: list[list[_Held]] = []

    def add_gradient(self, f: Views, grad: Views) -> None:
        for layers in self.anchors:
            for held, *factors in zip(layers, f.a, f.b, grad.a, grad.b, strict=True):
                held.add_gradient(*factors)

    def end_task(self, f: Views, x: Floats) -> None:
        m = Moments(self.net, f, x, squares=False)
        self.anchors = [*self.anchors, self.hold(m.a, m.c, f)]
        self.active = True

    def hold(self, a: list[Floats], c: list[Floats], f: Views) -> list[_Held]:
        """An anchor at f."""
        k = self.strength * self.net.scaling**2
        return [_Held(k, *layer) for layer in zip(a, c, f.a, f.b, strict=True)]


class DeltaEwcOnline(DeltaEwc):
    """The same in constant memory: a summed, c averaged over tasks, the latest anchor."""

    def __init__(self, net: Network, start: Views, strength: float) -> None:
        super().__init__(net, start, strength)
        self.a = [np.zeros(len(w), np.float32) for w in net.w]
        self.c = [np.zeros(w.shape[1], np.float32) for w in net.w]
        self.tasks = 0

    def end_task(self, f: Views, x: Floats) -> None:
        m = Moments(self.net, f, x, squares=False)
        for a, c, new_a, new_c in zip(self.a, self.c, m.a, m.c, strict=True):
            a += new_a
            c += (new_c - c) / np.float32(self.tasks + 1)
        self.tasks += 1
        self.anchors = [self.hold(self.a, self.c, f)]
        self.active = True
