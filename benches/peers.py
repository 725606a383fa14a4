"""The peers that the table compares with: straightforward NumPy, torch eager, PEFT's layer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import microlora as ml

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> Any:
    """Standard normal float32."""
    return RNG.standard_normal(shape, dtype=np.float32)


def learned(hidden: int, rank: int, dtype: str = "f32") -> ml.MicroLoRA:
    """An adapter whose B is no longer zero."""
    config = ml.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=("q_proj",), dtype=dtype)
    lora = ml.MicroLoRA(config, hidden_dim=hidden)
    for _ in range(4):
        lora.adapt(numbers(hidden), ml.Gradient(numbers(hidden)))
    lora.apply_updates(0.1)
    return lora


class NumpyLora:
    """The usual two products, factors in the orientation that BLAS likes."""

    def __init__(self, lora: ml.MicroLoRA) -> None:
        handle = lora["q_proj"]
        self.a = np.ascontiguousarray(handle.lora_a.T)
        self.b = np.ascontiguousarray(handle.lora_b.T)
        self.s = np.float32(handle.scaling)
        self.p = np.eye(handle.rank, dtype=np.float64)

    def forward(self, x: Any) -> Any:
        """``s (x A) B``."""
        return self.s * ((x @ self.a) @ self.b)

    def rls(self, x: Any, t: Any) -> None:
        """One RLS event, as one would write it."""
        u = self.s * (x @ self.a)
        pu = self.p @ u
        k = pu / (1.0 + u @ pu)
        self.b += np.outer(k, t - u @ self.b).astype(np.float32)
        self.p -= np.outer(k, pu)


class TorchPeers:
    """torch and PEFT on the same factors; ``None`` where they are not installed."""

    def __init__(self, lora: ml.MicroLoRA) -> None:
        import torch
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
        from torch.nn import functional

        torch.set_num_threads(1)
        handle = lora["q_proj"]
        self.torch, self.linear = torch, functional.linear
        self.a = torch.tensor(handle.lora_a)
        self.b = torch.tensor(handle.lora_b)
        self.s = handle.scaling
        base = torch.nn.Linear(handle.in_features, handle.out_features, bias=False)
        config = LoraConfig(r=handle.rank, lora_alpha=handle.alpha, lora_dropout=0.0)
        self.peft = Linear(base, "default", config=config, r=handle.rank, lora_alpha=handle.alpha)
        self.base = base
        with torch.no_grad():
            self.peft.lora_A["default"].weight.copy_(self.a)
            self.peft.lora_B["default"].weight.copy_(self.b)
        self.peft.eval()
        self.train_a = self.a.clone().requires_grad_()
        self.train_b = self.b.clone().requires_grad_()
        self.sgd = torch.optim.SGD([self.train_a, self.train_b], lr=1e-6)
        self.grad_a, self.grad_b = torch.zeros_like(self.a), torch.zeros_like(self.b)

    def forward(self, x: Any) -> Any:
        """Functional, to be called in inference mode."""
        return self.linear(self.linear(x, self.a), self.b) * self.s

    def autograd_step(self, x: Any, t: Any) -> None:
        """Forward, loss, backward and SGD on both factors."""
        self.sgd.zero_grad(set_to_none=True)
        y = self.linear(self.linear(x, self.train_a), self.train_b) * self.s
        (0.5 * (y - t).square().sum()).backward()
        self.sgd.step()

    def manual_step(self, x: Any, t: Any) -> None:
        """The same step by hand, in inference mode."""
        torch = self.torch
        u = torch.mv(self.a, x) * self.s
        g = torch.mv(self.b, u) - t
        w = torch.mv(self.b.T, g) * self.s
        self.b.addr_(g, u, alpha=-1e-9)
        self.a.addr_(w, x, alpha=-1e-9)


class PeftMerge:
    """`add_weighted_adapter` of PEFT on the very factors of some adapters, over base weights of zeros."""

    def __init__(self, adapters: Mapping[str, ml.Adapter]) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.set_num_threads(1)
        self.torch, self.names = torch, list(adapters)
        first = next(iter(adapters.values()))
        self.modules = {module: f"m{i}" for i, module in enumerate(first.modules())}
        base = torch.nn.Module()
        for module, at in self.modules.items():
            linear = torch.nn.Linear(*first.dims[module], bias=False)
            linear.weight.data.zero_()
            base.add_module(at, linear)
        self.model: Any = None
        for name, adapter in adapters.items():
            info = adapter.info(adapter.modules()[0])
            targets = list(self.modules.values())
            config = LoraConfig(r=info.rank, lora_alpha=info.alpha, target_modules=targets)
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
            for module in self.modules:
                a, b = adapter.factors(module)
                layer = self._layer(module)
                layer.lora_A[name].weight.data = torch.tensor(a)
                layer.lora_B[name].weight.data = torch.tensor(b)

    def _layer(self, module: str) -> Any:
        return getattr(self.model.base_model.model, self.modules[module])

    def merge(
        self,
        kind: str,
        weights: Sequence[float],
        *,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
    ) -> tuple[dict[str, tuple[Any, Any, float]], float]:
        """One merge by PEFT.

        Args:
            kind: Its combination type.
            weights: One per adapter.
            rank: `svd_rank` of the types that have one.
            density: Share of the entries that are kept.
            seed: Of torch's generator, for DARE's masks.

        Returns:
            ``{module: (lora_a, lora_b, scaling)}``, and the seconds of the one call.
        """
        self.torch.manual_seed(seed)
        start = time.perf_counter()
        self.model.add_weighted_adapter(
            self.names, list(weights), "merged", combination_type=kind, svd_rank=rank, density=density
        )
        seconds = time.perf_counter() - start
        out = {}
        for module in self.modules:
            layer = self._layer(module)
            factors = (getattr(layer, f"lora_{v}")["merged"].weight.detach().numpy().copy() for v in "AB")
            out[module] = (*factors, float(layer.scaling["merged"]))
        self.model.delete_adapter("merged")
        return out, seconds
