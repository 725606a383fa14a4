"""LoraChain against torch autograd, and its DoRA against PEFT's."""

import itertools

import numpy as np
import pytest

import microlora as ml
from microlora import _core

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

F = np.float32
WIDTHS = (20, 16, 12, 5)


def torch_network(activation="relu"):
    torch.manual_seed(0)
    act = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "tanh": torch.nn.Tanh}[activation]
    layers = []
    for i, o in itertools.pairwise(WIDTHS):
        layers += [torch.nn.Linear(i, o), act()]
    return torch.nn.Sequential(*layers[:-1])


def pairs(network):
    linear = [m for m in network if isinstance(m, torch.nn.Linear)]
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linear]


def data(seed=0, n=64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, WIDTHS[0])).astype(F), rng.integers(0, WIDTHS[-1], n)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_a_hundred_steps_match_peft_and_torch(activation, dora):
    peft = pytest.importorskip("peft")
    network = torch_network(activation)
    chain = ml.LoraChain(pairs(network), rank=4, activation=activation, use_dora=dora, seed=1)
    rng = np.random.default_rng(2)
    chain.set_factors(
        {n: (a, (0.1 * rng.standard_normal(b.shape)).astype(F)) for n, (a, b) in chain.factors().items()}
    )
    names = [str(i) for i, m in enumerate(network) if isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=dora)
    model = peft.get_peft_model(network, config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in zip(names, chain.factors().values(), strict=True):
            prefix = f"base_model.model.{name}."
            parameters[prefix + "lora_A.default.weight"].copy_(torch.tensor(a))
            parameters[prefix + "lora_B.default.weight"].copy_(torch.tensor(b))
    x, y = data()
    if dora:
        # PEFT takes the magnitudes from the weights it is given at the start, where B is 0.
        magnitudes = [parameters[f"base_model.model.{n}.lora_magnitude_vector.default.weight"] for n in names]
        for ours, theirs in zip(chain.magnitudes(), magnitudes, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)
    want = model(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(chain.forward(x), want, rtol=1e-5, atol=1e-5)
    _, _, gradients = chain.gradients(x, y)
    torch.nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
    for name, (ga, gb, gm) in zip(names, gradients, strict=True):
        prefix = f"base_model.model.{name}."
        np.testing.assert_allclose(ga, parameters[prefix + "lora_A.default.weight"].grad, atol=1e-5)
        np.testing.assert_allclose(gb, parameters[prefix + "lora_B.default.weight"].grad, atol=1e-5)
        if gm is not None:
            theirs = parameters[prefix + "lora_magnitude_vector.default.weight"].grad
            np.testing.assert_allclose(gm, theirs, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    optimizer = _core.Optimizer(chain, "adamw", weight_decay=0.01)
    order = np.random.default_rng(3).integers(0, len(x), 100 * 16)
    for rows in order.reshape(100, 16):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.tensor(x[rows])), torch.tensor(y[rows])).backward()
        theirs.step()
    optimizer.train(chain, x, y, order, [1e-3] * 100, batch_size=16)
    np.testing.assert_allclose(chain.forward(x), model(torch.tensor(x)).detach().numpy(), atol=2e-3)
    fused = model.merge_and_unload()
    for (w, _), name in zip(chain.fuse(), names, strict=True):
        np.testing.assert_allclose(w, fused[int(name)].weight.detach().numpy(), atol=5e-4)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_optimisers_match_torch(kind):
    rng = np.random.default_rng(0)
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=16)
    x, t = (rng.standard_normal((40, 16)).astype(F) for _ in range(2))
    a = torch.tensor(lora["q_proj"].lora_a.copy(), requires_grad=True)
    b = torch.tensor(lora["q_proj"].lora_b.copy(), requires_grad=True)
    s = lora["q_proj"].scaling
    make = {
        "sgd": lambda: torch.optim.SGD([a, b], lr=0.05, weight_decay=0.02),
        "momentum": lambda: torch.optim.SGD([a, b], lr=0.05, weight_decay=0.02, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW([a, b], lr=0.05, weight_decay=0.02),
    }
    theirs, ours = make[kind](), _core.Optimizer(lora, kind, weight_decay=0.02)
    for rows in np.arange(40).reshape(10, 4):
        theirs.zero_grad()
        y = s * torch.tensor(x[rows]) @ a.T @ b.T
        (0.5 * ((y - torch.tensor(t[rows])) ** 2).sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_([a, b], 1.0)
        theirs.step()
        ours.train(lora, x, t, rows, [0.05], batch_size=4, max_grad_norm=1.0)
    np.testing.assert_allclose(lora["q_proj"].lora_a, a.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(lora["q_proj"].lora_b, b.detach().numpy(), atol=2e-5)


def test_lora_plus_is_a_rate_of_its_own_for_b():
    rng = np.random.default_rng(1)
    x, t = (rng.standard_normal((8, 16)).astype(F) for _ in range(2))

    def run(ratio, lr):
        lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=16)
        opt = _core.Optimizer(lora, "adamw", lora_plus_ratio=ratio)
        opt.train(lora, x, t, np.arange(8), [lr], batch_size=8)
        return lora["q_proj"]

    plain, plus = run(1.0, 0.16), run(16.0, 0.01)
    np.testing.assert_array_equal(plain.lora_b, plus.lora_b)
    np.testing.assert_array_equal(run(1.0, 0.01).lora_a, plus.lora_a)
