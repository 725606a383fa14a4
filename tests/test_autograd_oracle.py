"""Gradients and losses against torch.autograd, and one step against torch's own SGD."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from support import KINDS, close, feedback_kinds, make, normal, rng

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
F = torch.nn.functional


def tensor(v):
    return torch.tensor(np.asarray(v, np.float64))


def torch_loss(fb, dy, base, baseline=0.0, kappa=0.3):
    y = dy + base
    cos = lambda d: F.cosine_similarity(y, d, dim=-1)  # noqa: E731
    match type(fb).__name__:
        case "Target" if fb.loss == "mse":
            return 0.5 * F.mse_loss(y, tensor(fb.t), reduction="sum")
        case "Target":
            return 1 - cos(tensor(fb.t))
        case "Gradient":
            return (tensor(fb.g) * y).sum()
        case "Reward":
            return (
                0.5 * ((F.normalize(tensor(fb.response), dim=0) * dy).sum() - kappa * (fb.r - baseline)) ** 2
            )
        case "Preference":
            m = fb.beta * (cos(tensor(fb.chosen)) - cos(tensor(fb.rejected)))
            return F.binary_cross_entropy_with_logits(m, torch.tensor(fb.p, dtype=torch.float64))
        case "Contrastive":
            rows = tensor(np.vstack([fb.positive, fb.negatives]))
            return F.cross_entropy((cos(rows) / fb.tau)[None], torch.tensor([0]))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 9999), rank=st.integers(1, 8), events=st.integers(1, 4))
def test_adapt_and_apply_is_autograd_and_sgd(kind, seed, rank, events):
    r = rng(seed)
    lora = make(20, 12, rank, seed=seed)
    a, b = (tensor(v).requires_grad_() for v in (lora["m"].lora_a, lora["m"].lora_b))
    losses, baseline = [], 0.0
    for n in range(events):
        x, base, fb = normal(r, 20), normal(r, 12), feedback_kinds(r, 12)[kind]
        loss = torch_loss(fb, lora["m"].scaling * (a @ tensor(x)) @ b.T, tensor(base), baseline)
        losses.append(loss)
        got = lora.adapt(x, fb, "m", base=base)
        if kind != "gradient":
            close(got.loss_before, loss.item(), 1e-5, 1e-6)
        if kind == "reward":
            baseline += (fb.r - baseline) / (n + 1)
    optimiser = torch.optim.SGD([a, b], lr=0.01)
    torch.stack(losses).mean().backward()
    optimiser.step()
    assert lora.apply_updates(0.01) == events
    close(lora["m"].lora_a, a.detach().numpy(), 1e-5)
    close(lora["m"].lora_b, b.detach().numpy(), 1e-5)


def test_a_host_s_gradient_drives_the_adapter():
    """Gradient(g) with g from autograd of a host model through this module."""
    r = rng(3)
    lora = make(16, 8, 4)
    w, head, x = tensor(normal(r, 8, 16)), tensor(normal(r, 3, 8)), normal(r, 16)
    a, b = (tensor(v).requires_grad_() for v in (lora["m"].lora_a, lora["m"].lora_b))
    y = w @ tensor(x) + lora["m"].scaling * (a @ tensor(x)) @ b.T
    y.retain_grad()
    F.cross_entropy((head @ torch.tanh(y))[None], torch.tensor([1])).backward()
    lora.adapt(x, ml.Gradient(y.grad.float()), "m")
    lora.apply_updates(1.0)
    close(lora["m"].lora_a, (a - a.grad).detach().numpy(), 1e-5)
    close(lora["m"].lora_b, (b - b.grad).detach().numpy(), 1e-5)
