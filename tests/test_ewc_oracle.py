"""EWC against a torch EWC on the same batches: 100 steps, step by step the same weights."""

import itertools

import numpy as np
import pytest

import microlora as ml
from microlora import _core

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

WIDTHS, RANK, CLASSES, STEPS, BATCH = (12, 20, 5), 3, 5, 100, 16
RATES = {"sgd": 0.2, "adamw": 2e-3}


def layers(rng):
    return [
        (
            (rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32),
            (0.1 * rng.standard_normal(o)).astype(np.float32),
        )
        for i, o in itertools.pairwise(WIDTHS)
    ]


class Net(torch.nn.Module):
    """The same frozen layers with adapters, in torch and float64."""

    def __init__(self, frozen, chain):
        super().__init__()
        to = lambda v: torch.tensor(np.array(v), dtype=torch.float64)  # noqa: E731
        self.frozen = [(to(w), to(b)) for w, b in frozen]
        self.scale = [float(chain.lora[n].scaling) for n in chain.lora.modules()]
        pairs = chain.factors().values()
        self.a = torch.nn.ParameterList([torch.nn.Parameter(to(a)) for a, _ in pairs])
        self.b = torch.nn.ParameterList([torch.nn.Parameter(to(b)) for _, b in pairs])

    def forward(self, x):
        for i, (w, b) in enumerate(self.frozen):
            x = x @ w.T + b + self.scale[i] * (x @ self.a[i].T) @ self.b[i].T
            if i + 1 < len(self.frozen):
                x = torch.tanh(x)
        return x

    def adapters(self):
        return [*self.a, *self.b]


def fisher(net, x):
    """Exact diagonal Fisher: every sample, every class, weighted by its probability."""
    total = [torch.zeros_like(p) for p in net.adapters()]
    for row in x:
        logp = torch.log_softmax(net(row), -1)
        for c in range(CLASSES):
            grads = torch.autograd.grad(logp[c], net.adapters(), retain_graph=True)
            for t, g in zip(total, grads, strict=True):
                t += logp[c].exp().detach() * g**2 / len(x)
    return total


def moments(net, x):
    """Second moments of each layer's inputs and output gradients, exact over classes."""
    ins, outs = [0.0] * len(net.frozen), [0.0] * len(net.frozen)
    for row in x:
        inputs, pre, h = [], [], row
        for i, (w, b) in enumerate(net.frozen):
            inputs.append(h.detach())
            z = h @ w.T + b + net.scale[i] * (h @ net.a[i].T) @ net.b[i].T
            pre.append(z)
            h = torch.tanh(z) if i + 1 < len(net.frozen) else z
        logp = torch.log_softmax(h, -1)
        for i, v in enumerate(inputs):
            ins[i] = ins[i] + v**2 / len(x)
        for c in range(CLASSES):
            for i, g in enumerate(torch.autograd.grad(logp[c], pre, retain_graph=True)):
                outs[i] = outs[i] + logp[c].exp().detach() * g**2 / len(x)
    return ins, outs


@pytest.mark.parametrize("kind", ["factor", "delta"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_hundred_steps_are_torchs(kind, optimizer):
    rng = np.random.default_rng(3)
    frozen = layers(rng)
    chain = ml.LoraChain(frozen, rank=RANK, activation="tanh", head="cross_entropy", seed=1)
    net = Net(frozen, chain)
    x = rng.standard_normal((2, 160, WIDTHS[0])).astype(np.float32)
    y = rng.integers(0, CLASSES, (2, 160))
    ewc = ml.EwcPlusPlus(chain, 20.0, kind=kind, fisher="exact")
    order = np.tile(np.arange(160), STEPS * BATCH // 160 + 1)[: STEPS * BATCH]
    worst, importance, anchor, rate = 0.0, None, None, RATES[optimizer]
    for task in range(2):
        opt = _core.Optimizer(chain, optimizer)
        if optimizer == "adamw":
            theirs = torch.optim.AdamW(net.adapters(), lr=rate, weight_decay=0.0)
        else:
            theirs = torch.optim.SGD(net.adapters(), lr=rate)
        for step in range(STEPS):
            rows = order[step * BATCH : (step + 1) * BATCH]
            opt.train(
                chain, x[task][rows], y[task][rows], np.arange(BATCH), [rate], batch_size=BATCH, ewc=ewc
            )
            theirs.zero_grad()
            xb = torch.tensor(x[task][rows], dtype=torch.float64)
            loss = torch.nn.functional.cross_entropy(net(xb), torch.tensor(y[task][rows]))
            if task:
                loss = loss + penalty(net, kind, importance, anchor)
            loss.backward()
            theirs.step()
            for i, (a, b) in enumerate(chain.factors().values()):
                worst = max(worst, np.abs(a - net.a[i].detach().numpy()).max())
                worst = max(worst, np.abs(b - net.b[i].detach().numpy()).max())
        if task == 0:
            data = torch.tensor(x[0], dtype=torch.float64)
            importance = fisher(net, data) if kind == "factor" else moments(net, data)
            anchor = [p.detach().clone() for p in net.adapters()]
            ewc.accumulate_fisher(x[0], y[0])
            ewc.start_new_task()
    assert worst < 1e-4
    ours, reference = ewc.penalty(), penalty(net, kind, importance, anchor).item()
    assert ours == pytest.approx(reference, rel=1e-2)
    assert reference > 1e-3


def penalty(net, kind, importance, anchor):
    """``lambda/2 sum F d^2`` on the factors, or on the weight change."""
    if kind == "factor":
        return 10.0 * sum(
            (f * (p - q) ** 2).sum() for f, p, q in zip(importance, net.adapters(), anchor, strict=True)
        )
    total, n = 0.0, len(net.frozen)
    for i in range(n):
        d = net.scale[i] * (net.b[i] @ net.a[i] - anchor[n + i] @ anchor[i])
        total = total + 10.0 * (importance[1][i][:, None] * importance[0][i] * d**2).sum()
    return total
