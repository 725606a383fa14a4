"""Training: batches, optimiser, consolidation, chains, and what they keep in memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import microlora as ml
from microlora import _core
from peers import TorchPeers, learned, numbers
from report import Report, duration
from rows.read_path import torch_peers
from timing import Case, Clock

WIDTHS = (784, 256, 256, 10)


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    fisher(report, clock)
    penalty(report, clock)
    step(report, clock)
    chain(report, clock, smoke=smoke)
    checkpoints(report, clock)
    memory(report)


def consolidated(lora: ml.MicroLoRA, kind: str = "delta") -> ml.EwcPlusPlus:
    """A penalty that has one task behind it, and weights that have moved since."""
    ewc = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical")
    n_in, n_out = lora["q_proj"].in_features, lora["q_proj"].out_features
    ewc.accumulate_fisher(numbers(64, n_in), numbers(64, n_out))
    ewc.start_new_task()
    lora.adapt(numbers(n_in), ml.Gradient(numbers(n_out)))
    lora.apply_updates(1e-4)
    return ewc


def fisher(report: Report, clock: Clock) -> None:
    """Squared per-sample gradients beside the gradient, event by event."""
    report.section("importance of one event, 768 r16, empirical")
    x, target = numbers(768) / 28, ml.Target(numbers(768))
    for kind in ("delta", "factor"):
        plain, lora = learned(768, 16), learned(768, 16)
        ewc = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical")
        cases = {
            "adapt": Case("f(x, t)", {"f": plain.adapt, "x": x, "t": target}),
            "both": Case("f(x, t)", {"f": ewc.adapt, "x": x, "t": target}),
        }
        ns = clock.compare(cases)
        peer = f"adapt alone {duration(ns['adapt'])}"
        work = f"adapt with importance, {kind}"
        report.add(work, duration(ns["both"]), peer, ns["both"] / ns["adapt"], 1.5, below=True)


def steps_of(lora: ml.MicroLoRA, ewc: ml.EwcPlusPlus | None, every: int = 1, n: int = 64) -> Case:
    """n optimiser steps at batch 32 in one call."""
    hidden = lora["q_proj"].in_features
    optimizer = _core.Optimizer(lora, "adamw")
    x, t = numbers(320, hidden), numbers(320, hidden)
    names = {
        "f": optimizer.train,
        "args": (lora, x, t, np.arange(32 * n) % 320, np.full(n, 1e-9)),
        "options": {"batch_size": 32, "ewc": ewc, "ewc_every": every},
    }
    return Case("f(*args, **options)", names)


def penalty(report: Report, clock: Clock) -> None:
    """What the penalty adds to a step."""
    report.section("delta penalty inside training, 768 r16")
    lora = learned(768, 16)
    ewc, handle = consolidated(lora), lora["q_proj"]
    n = 64
    cases = {
        "without": steps_of(lora, None, n=n),
        "eighth": steps_of(lora, ewc, 8, n=n),
        "each": steps_of(lora, ewc, 1, n=n),
        "forward": Case("f(x, y)", {"f": handle.forward, "x": numbers(768), "y": np.empty(768, np.float32)}),
    }
    ns = clock.compare(cases)
    for name, every in (("eighth", "every 8th step"), ("each", "every step")):
        more = (ns[name] - ns["without"]) / n
        target = 8.0 if name == "eighth" else None
        peer = f"a forward {duration(ns['forward'])}"
        report.add(
            f"penalty {every}, per step", duration(more), peer, more / ns["forward"], target, below=True
        )


class TorchTraining:
    """The same step in torch: autograd, fused AdamW, the penalty through the same small Grams."""

    def __init__(self, peers: TorchPeers, importance: tuple[Any, Any] | None) -> None:
        self.torch, self.linear, self.s = peers.torch, peers.linear, peers.s
        self.a = peers.a.clone().requires_grad_()
        self.b = peers.b.clone().requires_grad_()
        self.opt = self.torch.optim.AdamW([self.a, self.b], lr=1e-9, weight_decay=0.0, fused=True)
        self.importance = importance
        self.anchor = peers.a.clone(), peers.b.clone()

    def step(self, x: Any, t: Any) -> None:
        """Forward, loss, penalty, backward, AdamW."""
        torch = self.torch
        self.opt.zero_grad(set_to_none=True)
        y = self.linear(self.linear(x, self.a), self.b) * self.s
        loss = 0.5 * (y - t).square().sum(1).mean()
        if self.importance is not None:
            in2, out2 = self.importance
            u = torch.cat([self.a, self.anchor[0]])
            v = torch.cat([self.b, -self.anchor[1]], dim=1)
            loss = loss + 50.0 * self.s**2 * ((u * in2) @ u.T * ((v.T * out2) @ v).T).sum()
        loss.backward()
        self.opt.step()


def step(report: Report, clock: Clock) -> None:
    """Whole steps at batch 32."""
    report.section("training step, batch 32, AdamW, 768 r16")
    lora = learned(768, 16)
    peers, ewc, n = torch_peers(lora), consolidated(lora), 64
    narrow = learned(768, 16)
    narrow.set_storage("bf16")
    cases = {
        "ours": steps_of(lora, None, n=n),
        "ewc": steps_of(lora, ewc, n=n),
        "bf16": steps_of(narrow, None, n=n),
    }
    if peers:
        torch = peers.torch
        x, t = torch.tensor(numbers(32, 768)), torch.tensor(numbers(32, 768))
        importance = torch.rand(768), torch.rand(768)
        for name, given in (("torch", None), ("torch_ewc", importance)):
            names = {"f": TorchTraining(peers, given).step, "x": x, "t": t}
            cases[name] = Case("f(x, t)", names)
    ns = clock.compare(cases)
    ours = {name: ns[name] / n for name in ("ours", "ewc", "bf16")}
    if peers:
        text = f"torch, fused AdamW {duration(ns['torch_ewc'])}"
        ratio = ns["torch_ewc"] / ours["ewc"]
        work = "forward, backward, AdamW, delta EWC"
        report.add(work, duration(ours["ewc"]), text, ratio, 6.0, headline=True)
        text = f"torch, fused AdamW {duration(ns['torch'])}"
        report.add("forward, backward, AdamW", duration(ours["ours"]), text, ns["torch"] / ours["ours"])
    text = f"float32 storage {duration(ours['ours'])}"
    report.add("bf16 storage, f32 master", duration(ours["bf16"]), text, ours["ours"] / ours["bf16"])


def layers() -> list[tuple[Any, Any]]:
    """A frozen network."""
    return [
        (numbers(o, i) * np.float32((2 / i) ** 0.5), np.zeros(o, np.float32))
        for i, o in itertools.pairwise(WIDTHS)
    ]


class TorchChain:
    """The same network with LoRA on every layer, trained by autograd and fused AdamW."""

    def __init__(self, torch: Any, chain: ml.LoraChain, weights: list[tuple[Any, Any]]) -> None:
        self.torch, self.linear = torch, torch.nn.functional.linear
        self.layers = [(torch.tensor(w), torch.tensor(b)) for w, b in weights]
        factors = [(torch.tensor(a), torch.tensor(b)) for a, b in chain.factors().values()]
        self.factors = [(a.requires_grad_(), b.requires_grad_()) for a, b in factors]
        self.s = chain.config.scaling()
        trained = [p for pair in self.factors for p in pair]
        self.opt = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def epoch(self, x: Any, y: Any, order: Any) -> None:
        """All rows in batches of 32."""
        for rows in order.split(32):
            h = x[rows]
            for i, ((w, bias), (a, b)) in enumerate(zip(self.layers, self.factors, strict=True)):
                z = self.linear(h, w, bias) + self.s * self.linear(self.linear(h, a), b)
                h = self.torch.relu(z) if i + 1 < len(self.layers) else z
            self.opt.zero_grad(set_to_none=True)
            self.torch.nn.functional.cross_entropy(h, y[rows]).backward()
            self.opt.step()


def chain(report: Report, clock: Clock, *, smoke: bool) -> None:
    """An epoch of a small network."""
    rows = 320 if smoke else 2000
    report.section(f"LoraChain {'-'.join(map(str, WIDTHS))}, r8, an epoch of {rows} rows, batch 32")
    weights = layers()
    x, y = abs(numbers(rows, WIDTHS[0])), np.arange(rows) % 10
    order = np.random.default_rng(0).permutation(rows)
    lrs = np.full(-(-rows // 32), 1e-4)
    cases, chains = {}, {}
    for name, dora in (("ours", False), ("dora", True)):
        chains[name] = ml.LoraChain(weights, rank=8, use_dora=dora)
        train = _core.Optimizer(chains[name], "adamw").train
        names = {"f": train, "args": (chains[name], x, y, order, lrs)}
        cases[name] = Case("f(*args, batch_size=32)", names)
    peers = torch_peers(learned(64, 8))
    if peers:
        torch = peers.torch
        other = TorchChain(torch, chains["ours"], weights)
        given = {"x": torch.tensor(x), "y": torch.tensor(y), "o": torch.tensor(order)}
        cases["torch"] = Case("f(x, y, o)", {"f": other.epoch, **given})
    ns = clock.compare(cases)
    if peers:
        text = f"torch, fused AdamW {duration(ns['torch'])}"
        report.add("epoch", duration(ns["ours"]), text, ns["torch"] / ns["ours"], 1 / 1.2, headline=True)
    report.add(
        "epoch with DoRA", duration(ns["dora"]), f"LoRA {duration(ns['ours'])}", ns["dora"] / ns["ours"]
    )


def checkpoints(report: Report, clock: Clock) -> None:
    """Memory and time of gradient checkpointing."""
    report.section("gradient checkpointing, width 256, r8, batch 32")
    for depth in (8, 16, 36):
        weights = [(numbers(256, 256) / 16, None) for _ in range(depth)]
        x, y = numbers(32, 256), np.arange(32)
        peak, cases = {}, {}
        for on in (False, True):
            net = ml.LoraChain(weights, rank=8, gradient_checkpointing=on)
            peak[on] = net.gradients(x, y)[1]
            args = (net, x, y, np.arange(32), [1e-9])
            train = _core.Optimizer(net, "adamw").train
            cases[str(on)] = Case("f(*a, batch_size=32)", {"f": train, "a": args})
        ns = clock.compare(cases)
        text = f"without {peak[False]:,} bytes"
        target = 0.5 if depth >= 16 else None
        work = f"peak of activations, {depth} layers"
        report.add(work, f"{peak[True]:,} bytes", text, peak[True] / peak[False], target, below=True)
        text = f"without {duration(ns['False'])}"
        report.add(f"step, {depth} layers", duration(ns["True"]), text, ns["True"] / ns["False"])


def padded(n: int) -> int:
    """Numbers of a stored row."""
    return -(-n // 16) * 16


def memory(report: Report) -> None:
    """Resident bytes against the documented formulas."""
    report.section("resident bytes of training, 768 r16")
    lora = learned(768, 16)
    weights = 4 * 16 * (padded(768) + padded(768))
    optimizer = _core.Optimizer(lora, "adamw")
    optimizer.train(lora, numbers(32, 768), numbers(32, 768), np.arange(32), [1e-9], batch_size=32)
    fresh = ml.MicroLoRA(lora.adapter())
    rows = [("A and B", fresh.memory_bytes, weights, "4 r (in + out)")]
    rows.append(("AdamW moments", optimizer.memory_bytes, 2 * weights, "8 r (in + out)"))
    d, t = 2 * 768, 2 * padded(768)
    sums, held = {"delta": 0, "factor": 2}, {"delta": weights + 4 * d, "factor": 2 * weights}
    for kind in ("delta", "factor"):
        want = 16 * d + 4 * t + sums[kind] * weights + held[kind]
        got = consolidated(learned(768, 16), kind).memory_bytes
        rows.append((f"EWC, {kind}, after a task", got, want, "formula of memory_bytes"))
    for work, got, want, text in rows:
        report.add(work, f"{got:,} bytes", f"{text} = {want:,}", got / want, 1.0, below=True)
