"""A float64 NumPy twin of the learner, to compare with and to run the demo's experiment without the core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microlora.demo.task import Api


@dataclass(frozen=True)
class Target:
    t: np.ndarray


class NumpyLora:
    """y = x + s (x A) B; `instant` is RLS on B with P0 = I / rho, rho in units of mean |u|^2."""

    def __init__(self, rank, dim, seed, alpha=None, rho=1.0):
        self.s = (2.0 * rank if alpha is None else alpha) / rank
        self.rho = rho
        self.A = np.random.default_rng(seed).uniform(-1, 1, (dim, rank)) / np.sqrt(dim)
        self.B = np.zeros((rank, dim))
        self.P = np.eye(rank) / rho
        self.pending = []

    @property
    def param_count(self):
        return self.A.size + self.B.size

    def fit_input_basis(self, X):
        X = np.asarray(X, np.float64)
        _, vectors = np.linalg.eigh(X.T @ X / len(X))
        rank = len(self.P)
        A = vectors[:, ::-1][:, :rank]
        self.A = A / (self.s * np.sqrt(np.square(X @ A).sum(axis=1).mean()))

    def forward(self, x):
        return (self.s * (np.asarray(x, np.float64) @ self.A) @ self.B).astype(np.float32)

    def instant(self, x, feedback, *, base):
        u = self.s * (np.asarray(x, np.float64) @ self.A)
        Pu = self.P @ u
        k = Pu / (1 + u @ Pu)
        self.B += np.outer(k, feedback.t - base - u @ self.B)
        self.P -= np.outer(k, Pu)

    def adapt(self, x, feedback, *, base):
        u = x @ self.A
        g = base + self.s * u @ self.B - feedback.t
        self.pending.append((self.s * np.outer(x, self.B @ g), self.s * np.outer(u, g)))

    def apply_updates(self, lr):
        self.A -= lr * np.mean([a for a, _ in self.pending], axis=0)
        self.B -= lr * np.mean([b for _, b in self.pending], axis=0)
        self.pending = []

    def save(self, path):
        with Path(path).open("wb") as file:
            np.savez(file, A=self.A, B=self.B, s=self.s)

    @classmethod
    def load(cls, path):
        with np.load(path) as file:
            out = cls(file["A"].shape[1], file["A"].shape[0], 0)
            out.A, out.B, out.s = file["A"], file["B"], float(file["s"])
        return out


def numpy_api(rho=1.0, cls=NumpyLora):
    return Api(
        make=lambda rank, dim, seed: cls(rank, dim, seed, rho=rho),
        load=cls.load,
        target=lambda t: Target(np.asarray(t, np.float64)),
    )
