"""Consolidation once more, in float64 NumPy, one sample at a time: the oracle of its tests.

PEFT shapes: ``a`` is (rank, in), ``b`` is (out, rank).
"""

import numpy as np

import reference as ref
from reference import f64


def squares(x, g, a, b, s, f=np.square):
    """Means over samples of f(per-sample gradient): of a and of b. ``g`` may be (passes, n, out)."""
    passes = f64(g)[None] if np.ndim(g) == 2 else f64(g)
    total = [np.zeros(np.shape(a)), np.zeros(np.shape(b))]
    for rows in passes:
        for xi, gi in zip(f64(x), rows, strict=True):
            for t, one in zip(total, ref.chain(xi, a, b, s, gi), strict=True):
                t += f(one)
    return [t / len(x) for t in total]


def outcomes(feedback, y):
    """``[(probability, dL/dy)]`` of every outcome that the model expects at the output ``y``."""
    y = f64(y)
    match type(feedback).__name__:
        case "Target":
            return [(1.0, row) for row in np.eye(len(y))]
        case "Preference":
            rows = np.stack([ref.unit(feedback.chosen), ref.unit(feedback.rejected)])
            c = rows @ y / np.linalg.norm(y)
            p = ref.sigmoid(feedback.beta * (c[0] - c[1]))
            of = lambda q: ref.preference(y, *rows, p=q, beta=feedback.beta)[1]  # noqa: E731
            return [(p, of(1.0)), (1.0 - p, of(0.0))]
        case "Contrastive":
            rows = ref.unit(np.vstack([feedback.positive, feedback.negatives]))
            z = rows @ y / np.linalg.norm(y) / feedback.tau
            p = np.exp(z - z.max())
            p /= p.sum()
            out = []
            for i, probability in enumerate(p):
                others = np.delete(rows, i, axis=0)
                out.append((probability, ref.contrastive(y, rows[i], others, feedback.tau)[1]))
            return out
    raise TypeError(feedback)


def exact(x, feedback, a, b, s, base=None):
    """One event's share of the exact Fisher, of a and of b."""
    y = ref.forward(x, a, b, s) + (0.0 if base is None else f64(base))
    total = [np.zeros(np.shape(a)), np.zeros(np.shape(b))]
    for p, g in outcomes(feedback, y):
        for t, one in zip(total, ref.chain(x, a, b, s, g), strict=True):
            t += p * one**2
    return total


def delta_penalty(a, b, anchor, s, ai, cj):
    """``1/2 sum_ij c_i a_j (dW - dW*)_ij^2``, formed densely (rows are outputs, as in PEFT)."""
    d = ref.delta_weight(a, b, s) - ref.delta_weight(*anchor, s)
    return 0.5 * (f64(cj)[:, None] * f64(ai) * d**2).sum()


def delta_gradient(a, b, anchor, s, ai, cj):
    """Its gradient in a and in b."""
    d = ref.delta_weight(a, b, s) - ref.delta_weight(*anchor, s)
    weighed = f64(cj)[:, None] * f64(ai) * d
    return [s * f64(b).T @ weighed, s * weighed @ f64(a).T]


def quadratic_penalty(th, fisher, anchor):
    return 0.5 * sum((f * (f64(p) - q) ** 2).sum() for f, p, q in zip(fisher, th, anchor, strict=True))


def quadratic_gradient(th, fisher, anchor):
    return [f * (f64(p) - q) for f, p, q in zip(fisher, th, anchor, strict=True)]


class Method:
    """The continual-learning methods of the published family as their papers' pseudo-code has them.

    ``end(x, g, th)`` closes a task whose samples are x, g; ``step(g, before, after)`` is one optimiser step.
    """

    def __init__(self, name, s, lam, gamma=1.0, decay=0.9, start=None):
        self.name, self.s, self.lam, self.gamma, self.decay = name, s, lam, gamma, decay
        self.anchors, self.sum, self.anchor = [], None, None
        self.ema, self.batches, self.tasks = None, 0, 0
        self.start = [f64(p) for p in start] if start is not None else None
        self.path = None if start is None else [np.zeros_like(p) for p in self.start]
        self.omega = None if start is None else [np.zeros_like(p) for p in self.start]

    def batch(self, x, g, th):
        fisher = squares(x, g, *th, self.s)
        self.batches += 1
        old = self.ema or [np.zeros_like(f) for f in fisher]
        self.ema = [self.decay * e + (1 - self.decay) * f for e, f in zip(old, fisher, strict=True)]

    def step(self, gradient, before, after):
        for w, g, p, q in zip(self.path, gradient, after, before, strict=True):
            w -= f64(g) * (f64(p) - f64(q))

    def end(self, x, g, th):
        th = [f64(p).copy() for p in th]
        fisher = squares(x, g, *th, self.s)
        moments = (f64(x) ** 2).mean(0), (f64(g) ** 2).mean(0)
        match self.name:
            case "l2":
                self.anchors = [([1.0, 1.0], th)]
            case "ewc":
                self.anchors.append((fisher, th))
            case "oewc" | "ewc++sum":
                old = self.sum or [0.0, 0.0]
                self.sum = [self.gamma * a + b for a, b in zip(old, fisher, strict=True)]
                self.anchors = [(self.sum, th)]
            case "ewc++":
                corrected = [e / (1 - self.decay**self.batches) for e in self.ema]
                self.anchors = [(corrected, th)]
            case "si":
                for o, w, p, q in zip(self.omega, self.path, th, self.start, strict=True):
                    o += np.maximum(w, 0) / ((p - q) ** 2 + 1e-3)
                    w[:] = 0
                self.anchors, self.start = [([o.copy() for o in self.omega], th)], th
            case "dwewc":
                self.anchors.append((moments, th))
            case "dwoewc":
                a, c = moments
                if self.anchors:
                    (pa, pc), _ = self.anchors[0]
                    a = self.gamma * pa + a
                    c = (self.gamma * pc * self.tasks + c) / (self.tasks + 1)
                self.anchors = [((a, c), th)]
        self.tasks += 1

    def gradient(self, th):
        total = [np.zeros(np.shape(p)) for p in th]
        for importance, anchor in self.anchors:
            if self.name.startswith("dw"):
                one = delta_gradient(*th, anchor, self.s, *importance)
            else:
                one = quadratic_gradient(th, importance, anchor)
            total = [t + self.lam * o for t, o in zip(total, one, strict=True)]
        return total
