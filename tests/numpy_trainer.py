"""A float64 NumPy twin of the core's optimiser, evaluation and penalty, on which the loops are tested.

It holds its own masters in float64, so it also serves as reference for the compiled one: `NumpyOptimizer` has
the same arguments and writes what it learned into the learner after every call.
"""

from __future__ import annotations

import json

import numpy as np

from microlora.exceptions import ConfigError, NonFiniteError, SampleError
from support import set_weights


class NumpyOptimizer:
    def __init__(
        self, lora, kind, *, momentum=0.9, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, lora_plus_ratio=1.0
    ):
        if kind not in ("sgd", "momentum", "adamw"):
            raise ConfigError(kind)
        self.kind, self.beta, self.betas, self.eps = kind, momentum, betas, eps
        self.weight_decay, self.ratio = weight_decay, lora_plus_ratio
        self.steps = 0
        self.slots = {}

    def move(self, key, w, g, lr):
        """One tensor's step, as the core's table of rules has it."""
        m, v, t = self.slots.get(key, (np.zeros_like(w), np.zeros_like(w), 0))
        t += 1
        if self.kind == "sgd":
            w = w * (1 - lr * self.weight_decay) - lr * g
        elif self.kind == "momentum":
            m = self.beta * m + g + self.weight_decay * w
            w = w - lr * m
        else:
            b1, b2 = self.betas
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            mean, square = m / (1 - b1**t), v / (1 - b2**t)
            w = w * (1 - lr * self.weight_decay) - lr * mean / (np.sqrt(square) + self.eps)
        self.slots[key] = (m, v, t)
        return f64(w.astype(np.float32))  # as stored, so that chunks of a run give what one call gives

    def apply(self, weights, grads, lr, max_grad_norm):
        norm = np.sqrt(sum((g**2).sum() for pair in grads.values() for g in pair))
        clip = max_grad_norm / norm if max_grad_norm is not None and norm > max_grad_norm else 1.0
        for name, (ga, gb) in grads.items():
            a, b = weights[name]
            weights[name] = (
                self.move(f"{name}.a", a, clip * ga, lr),
                self.move(f"{name}.b", b, clip * gb, lr * self.ratio),
            )
        self.steps += 1
        return norm

    def train(
        self,
        target,
        x,
        y,
        order,
        lrs,
        *,
        batch_size,
        accumulation=1,
        modules=None,
        weights=None,
        base=None,
        max_grad_norm=None,
        ewc=None,
        ewc_every=1,
        accumulate_fisher=False,
        replay=None,
        progress=None,
        cancel=None,
    ):
        assert ewc_every == 1, "the twin's penalty acts in every step"
        assert replay is None, "the twin remembers no rows"
        assert not accumulate_fisher, "the twin estimates nothing while it trains"
        names = list(target.modules()) if modules is None else list(modules)
        now = {n: (f64(target[n].lora_a), f64(target[n].lora_b)) for n in names}
        scale = {n: target[n].scaling for n in names}
        per_step = batch_size * accumulation
        parts = [order[i : i + per_step] for i in range(0, len(order), per_step)]
        assert len(lrs) == len(parts)
        losses, norms = [], []
        try:
            for done, (rows, lr) in enumerate(zip(parts, lrs, strict=True)):
                if cancel is not None:
                    cancel.raise_if_cancelled("training")
                for row in rows:
                    if not (np.isfinite(x[row]).all() and np.isfinite(y[row]).all()):
                        raise SampleError("x: not finite", row=int(row), steps_done=done)
                grads, loss = gradients(now, scale, x, y, rows, weights, base)
                if ewc is not None:
                    ewc.add(now, grads)
                norms.append(self.apply(now, grads, lr, max_grad_norm))
                losses.append(loss)
                if progress is not None:
                    progress(done + 1, len(parts), "training")
        finally:
            set_weights(target, now)
        return np.asarray(losses, np.float32), np.asarray(norms, np.float32)

    def step(self, lora, lr, *, max_grad_norm=None, ewc=None, ewc_every=1):
        assert self.kind == "sgd", "the twin applies what adapt accumulated by plain descent only"
        assert ewc_every == 1, "the twin's penalty acts in every step"
        assert ewc is None or ewc.anchor is None, "the twin applies no penalty to what adapt accumulated"
        self.steps += 1
        return lora.apply_updates(lr, max_grad_norm), 0.0

    def to_bytes(self):
        slots = {k: [m.tolist(), v.tolist(), t] for k, (m, v, t) in self.slots.items()}
        return json.dumps({"steps": self.steps, "slots": slots}).encode()

    def restore(self, data):
        read = json.loads(data)
        self.steps = read["steps"]
        self.slots = {k: (np.asarray(m), np.asarray(v), t) for k, (m, v, t) in read["slots"].items()}


def f64(values):
    return np.asarray(values, np.float64)


def outputs(weights, scale, name, x):
    a, b = weights[name]
    return scale[name] * f64(x) @ a.T @ b.T


def gradients(now, scale, x, y, rows, weights=None, base=None):
    """Mean gradients and loss of ``1/2 |base + dY - t|^2`` over rows; the loss is the mean over modules."""
    w = np.ones(len(rows)) if weights is None else f64(weights)[rows]
    grads, loss = {}, 0.0
    for name, (a, b) in now.items():
        out = outputs(now, scale, name, x[rows]) + (0.0 if base is None else f64(base)[rows])
        g = (out - f64(y[rows])) * w[:, None] / len(rows)
        loss += (0.5 * w * ((out - f64(y[rows])) ** 2).sum(axis=1)).mean() / len(now)
        s = scale[name]
        grads[name] = (s * (g @ b).T @ f64(x[rows]), s * g.T @ (f64(x[rows]) @ a.T))
    return grads, loss


def evaluate(target, x, y, *, modules=None, base=None, progress=None, cancel=None):
    names = list(target.modules()) if modules is None else list(modules)
    now = {n: (f64(target[n].lora_a), f64(target[n].lora_b)) for n in names}
    scale = {n: target[n].scaling for n in names}
    total = 0.0
    for n in names:
        out = outputs(now, scale, n, x) + (0.0 if base is None else f64(base))
        total = total + 0.5 * ((out - f64(y)) ** 2).sum(axis=1) / len(names)
    if not np.isfinite(total).all():
        raise NonFiniteError("x: the loss is not finite")
    return np.asarray(total, np.float32)


class NumpyEwc:
    """A quadratic anchor on the factors, weighted by how much input there was: enough to see that it acts."""

    def __init__(self, lora, **settings):
        self.lora, self.settings = lora, settings
        self.strength = 10.0 if settings["ewc_lambda"] is None else settings["ewc_lambda"]
        self.task_count, self.seen, self.anchor, self.samples = 0, 0.0, None, []

    def accumulate_fisher(self, x, feedback, module=None, base=None):
        self.seen += float(np.square(f64(x)).mean())
        self.samples.append((np.asarray(x).tobytes(), module))

    def start_new_task(self):
        if not self.seen:
            raise ConfigError("start_new_task: nothing accumulated")
        self.task_count += 1
        self.anchor = {n: (f64(self.lora[n].lora_a), f64(self.lora[n].lora_b)) for n in self.lora.modules()}
        self.samples = []

    def add(self, now, grads):
        for name in grads if self.anchor else ():
            pairs = zip(grads[name], now[name], self.anchor[name], strict=True)
            grads[name] = tuple(g + self.strength * (w - old) for g, w, old in pairs)

    def export_state(self):
        anchor = {k: [v.tolist() for v in pair] for k, pair in (self.anchor or {}).items()}
        return json.dumps({"tasks": self.task_count, "seen": self.seen, "anchor": anchor}).encode()

    def import_state(self, data):
        read = json.loads(data)
        self.task_count, self.seen = read["tasks"], read["seen"]
        pairs = read["anchor"].items()
        self.anchor = {k: tuple(np.asarray(v) for v in pair) for k, pair in pairs} or None
