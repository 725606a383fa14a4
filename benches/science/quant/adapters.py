"""The adapter of one seed, trained as in the continual-learning benchmark, and the network that runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from continual.plan import Plan, Task
from merging.parents import Floats, inputs, train

import microlora as ml

from .rows import DOMAIN

#: Widths are filled up to a multiple of this.
BLOCK = 256


def filled(x: Floats, width: int) -> Floats:
    """Columns of zeros up to a width."""
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def whole(adapter: ml.Adapter) -> ml.Adapter:
    """The same weight changes between widths that are multiples of 256."""
    factors = {}
    for module in adapter.modules():
        a, b = adapter.factors(module)
        up = [-(-n // BLOCK) * BLOCK for n in (a.shape[1], b.shape[0])]
        factors[module] = filled(a, up[0]), np.ascontiguousarray(filled(b.T, up[1]).T)
    alpha = {module: adapter.info(module).alpha for module in adapter.modules()}
    return ml.Adapter.from_factors(factors, alpha=alpha)


class Bench:
    """The adapter of one seed and its test rows."""

    def __init__(self, plan: Plan, domain: int = DOMAIN) -> None:
        self.plan = plan
        chain = train(plan, plan.feed(domain), 0)
        self.task: Task = plan.tasks()[domain]
        self.adapter = chain.lora.adapter()
        self.whole = whole(self.adapter)
        reads = inputs(chain, self.task.x)
        #: Inputs of every layer on training rows.
        self.inputs: dict[str, Floats] = dict(zip(self.adapter.modules(), reads, strict=True))
        self.labels = self.predict(self.adapter)

    def logits(self, adapter: Any, x: Floats) -> Floats:
        """Outputs of the frozen network with an adapter of these widths, or of widths filled up."""
        h, last = x, len(self.plan.weights) - 1
        for i, (w, b) in enumerate(zip(self.plan.weights, self.plan.biases, strict=True)):
            module = f"layers.{i}"
            width = adapter.dims[module][0]
            z = h @ w + b + adapter.forward(filled(h, width), module)[:, : len(b)]
            h = np.maximum(z, 0) if i < last else z
        return np.asarray(h, np.float32)

    def predict(self, adapter: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Class of each test row; a plain adapter runs as a learner of its weights."""
        if isinstance(adapter, ml.Adapter):
            adapter = Plain(adapter)
        return np.asarray(self.logits(adapter, self.task.x_test).argmax(axis=1), np.int64)

    def accuracy(self, predicted: Any) -> float:
        """Share of test rows that are right."""
        return float((predicted == self.task.y_test).mean())


class Plain:
    """An adapter that runs by its factors."""

    def __init__(self, adapter: ml.Adapter) -> None:
        self.adapter, self.dims = adapter, adapter.dims

    def forward(self, x: Floats, module: str) -> Floats:
        """The output of one module."""
        a, b = self.adapter.factors(module)
        return np.asarray(np.float32(self.adapter.info(module).scaling) * ((x @ a.T) @ b.T), np.float32)
