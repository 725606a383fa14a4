"""The mathematics of microlora once more, in float64 NumPy and as plain as it gets: the oracle of the tests.

Row vectors, PEFT shapes: ``a`` is (rank, in), ``b`` is (out, rank), ``y = base + s x a.T b.T``.
"""

from dataclasses import dataclass, field

import numpy as np


def f64(v):
    return np.asarray(v, np.float64)


def unit(v):
    return f64(v) / np.linalg.norm(f64(v), axis=-1, keepdims=True)


def forward(x, a, b, s):
    return s * (f64(x) @ f64(a).T) @ f64(b).T


def delta_weight(a, b, s):
    return s * f64(b) @ f64(a)


def chain(x, a, b, s, g):
    """(dL/da, dL/db) in PEFT shapes from g = dL/dy."""
    u0 = f64(a) @ f64(x)
    return s * np.outer(f64(g) @ f64(b), f64(x)), s * np.outer(f64(g), u0)


# -- losses: each returns (L, dL/dy); every direction is normalised first --


def mse(y, t):
    e = f64(y) - f64(t)
    return 0.5 * e @ e, e


def _cosine_gradient(y, rows, dc):
    n = np.linalg.norm(y)
    c = rows @ y / n
    return (dc @ rows - (dc @ c) * y / n) / n


def cosine(y, t):
    y, rows = f64(y), unit(t)[None]
    c = rows @ y / np.linalg.norm(y)
    return 1.0 - c[0], _cosine_gradient(y, rows, np.array([-1.0]))


def reward(dy, r, response, baseline=0.0, kappa=0.3):
    e = unit(response)
    error = e @ f64(dy) - kappa * (r - baseline)
    return 0.5 * error**2, error * e


def sigmoid(m):
    return 1.0 / (1.0 + np.exp(-m))


def preference(y, chosen, rejected, p=1.0, beta=20.0):
    y, rows = f64(y), np.stack([unit(chosen), unit(rejected)])
    c = rows @ y / np.linalg.norm(y)
    m = beta * (c[0] - c[1])
    loss = p * np.logaddexp(0.0, -m) + (1.0 - p) * np.logaddexp(0.0, m)
    d = beta * (sigmoid(m) - p)
    return loss, _cosine_gradient(y, rows, np.array([d, -d]))


def contrastive(y, positive, negatives, tau=0.05):
    y, rows = f64(y), unit(np.vstack([positive, negatives]))
    z = rows @ y / np.linalg.norm(y) / tau
    top = z.max()
    total = np.exp(z - top).sum()
    p = np.exp(z - top) / total
    p[0] -= 1.0
    return np.log(total) + top - z[0], _cosine_gradient(y, rows, p / tau)


def loss_of(feedback, dy, base=None, baseline=0.0, kappa=0.3):
    """(L, dL/dy) of a feedback object of the package at the delta ``dy``; L is None for a bare gradient."""
    y = f64(dy) + (0.0 if base is None else f64(base))
    match type(feedback).__name__:
        case "Target":
            return (mse if feedback.loss == "mse" else cosine)(y, feedback.t)
        case "Gradient":
            return None, f64(feedback.g)
        case "Reward":
            return reward(dy, feedback.r, feedback.response, baseline, kappa)
        case "Preference":
            return preference(y, feedback.chosen, feedback.rejected, feedback.p, feedback.beta)
        case "Contrastive":
            return contrastive(y, feedback.positive, feedback.negatives, feedback.tau)
    raise TypeError(feedback)


def default_mu(feedback):
    match type(feedback).__name__:
        case "Reward":
            return 0.1
        case "Preference":
            return min(4.0 / feedback.beta**2, 0.3)
        case "Contrastive":
            return min(4.0 * feedback.tau**2, 0.3)
    return 0.3


def is_angular(feedback):
    kind = type(feedback).__name__
    return kind in ("Preference", "Contrastive") or (kind == "Target" and feedback.loss == "cosine")


@dataclass
class Baseline:
    """Plain mean of the first rewards, then a moving average; 0 before the first."""

    rate: float = 0.02
    count: int = 0
    value: float = 0.0

    def update(self, r):
        self.count += 1
        self.value += max(self.rate, 1.0 / self.count) * (r - self.value)


@dataclass
class Twin:
    """One module that learns as the package documents it, in float64."""

    a: np.ndarray
    b: np.ndarray
    s: float
    rho: float = 1.0
    phi: float = 1.0
    kappa: float = 0.3
    mu: float | None = None
    train: str = "b"
    rule: str = "auto"
    basis_unit: float | None = None
    p: np.ndarray | None = None
    ridge: float | None = None
    baseline: Baseline = field(default_factory=Baseline)
    pending: list = field(default_factory=list)

    @classmethod
    def of(cls, handle, **settings):
        return cls(f64(handle.lora_a), f64(handle.lora_b), float(handle.scaling), **settings)

    def forward(self, x):
        return forward(x, self.a, self.b, self.s)

    def adapt(self, x, feedback, base=None):
        loss, g = loss_of(feedback, self.forward(x), base, self.baseline.value, self.kappa)
        self.pending.append(chain(x, self.a, self.b, self.s, g))
        if type(feedback).__name__ == "Reward":
            self.baseline.update(feedback.r)
        return loss

    def apply_updates(self, lr, max_grad_norm=None):
        if self.pending:
            da, db = (np.mean([g[i] for g in self.pending], axis=0) for i in (0, 1))
            norm = np.sqrt((da**2).sum() + (db**2).sum())
            if max_grad_norm is not None and norm > max_grad_norm:
                lr *= max_grad_norm / norm
            self.a, self.b = self.a - lr * da, self.b - lr * db
            self.pending, self.p = [], None

    def instant(self, x, feedback, base=None):
        """One event; returns (loss before, loss after)."""
        squared = type(feedback).__name__ == "Target" and feedback.loss == "mse"
        if squared and self.rule != "nlms" and self.train == "b":
            return self.rls(x, feedback.t, base)
        return self.nlms(x, feedback, base)

    def rls(self, x, t, base=None):
        u = self.s * self.a @ f64(x)
        if self.p is None:
            self.ridge = self.rho * (u @ u if self.basis_unit is None else self.basis_unit)
            self.p = np.eye(len(u)) / self.ridge
        e = f64(t) - (0.0 if base is None else f64(base)) - self.b @ u
        pu = self.p @ u
        k = pu / (self.phi + u @ pu)
        self.p = (self.p - np.outer(k, pu)) / self.phi
        self.p = (self.p + self.p.T) / 2
        if self.phi < 1:
            self.p *= min(1.0, len(u) / self.ridge / np.trace(self.p))
        self.b = self.b + np.outer(e, k)
        return 0.5 * e @ e, 0.5 * (e @ e) * (1 - u @ k) ** 2

    def nlms(self, x, feedback, base=None):
        x = f64(x)
        dy = self.forward(x)
        y = dy + (0.0 if base is None else f64(base))
        now = (base, self.baseline.value, self.kappa)
        loss, g = loss_of(feedback, dy, *now)
        if type(feedback).__name__ == "Reward":
            self.baseline.update(feedback.r)
        u = self.s * self.a @ x
        da, db = chain(x, self.a, self.b, self.s, g)
        curvature, slope = u @ u, (db**2).sum()
        if self.train == "both":
            curvature += self.s**2 * (x @ x) * (self.b**2).sum()
            slope += (da**2).sum()
        eta = default_mu(feedback) if self.mu is None else self.mu
        eta *= (y @ y if is_angular(feedback) else 1.0) / curvature
        after = None
        for _ in range(41):
            a = self.a - eta * da if self.train == "both" else self.a
            b = self.b - eta * db
            if loss is None:
                break
            after = loss_of(feedback, forward(x, a, b, self.s), *now)[0]
            if after <= loss - 0.25 * eta * slope:
                break
            eta /= 2
        self.a, self.b = a, b
        return loss, after


def ridge(u, t, lam, weights=None):
    """B (out, rank) that minimises sum_i w_i |t_i - B u_i|^2 + lam |B|^2."""
    u, t = f64(u), f64(t)
    w = np.ones(len(u)) if weights is None else f64(weights)
    gram = (u * w[:, None]).T @ u + lam * np.eye(u.shape[1])
    return np.linalg.solve(gram, (u * w[:, None]).T @ t).T


def principal_rows(x, rank):
    """Top right singular vectors (rank, in), not centred, and all squared singular values."""
    _, sv, vt = np.linalg.svd(f64(x), full_matrices=False)
    return vt[:rank], sv**2
