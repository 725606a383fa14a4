"""`semantics="peft"` against PEFT's own `add_weighted_adapter`, on the same factors."""

import warnings

import numpy as np
import pytest

import microlora as ml
from merge_support import delta, distance
from microlora import _core
from support import normal, rng

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SHAPES = {"q_proj": (24, 20), "up_proj": (16, 40)}
DETERMINISTIC = ("linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
ONE_RANK = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
WEIGHTS = {"a": 0.7, "b": 0.4, "c": -0.3}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (n_in, n_out) in SHAPES.items():
            setattr(self, name, torch.nn.Linear(n_in, n_out, bias=False))

    def forward(self, x):
        return x


def make(names, ranks, alphas, rslora=False, seed=0):
    """The same adapters in PEFT and here."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, ours = None, {}
    for i, name in enumerate(names):
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(SHAPES), use_rslora=rslora)
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        r, pairs = rng(100 * seed + i), {}
        for module, (n_in, n_out) in SHAPES.items():
            pairs[module] = normal(r, rank, n_in), normal(r, n_out, rank)
            layer = getattr(model.base_model.model, module)
            layer.lora_A[name].weight.data = torch.tensor(pairs[module][0])
            layer.lora_B[name].weight.data = torch.tensor(pairs[module][1])
        ours[name] = ml.Adapter.from_factors(pairs, alpha=alpha, use_rslora=rslora)
    return model, ours


def theirs(model, method, weights, **settings):
    """Deltas of PEFT's result."""
    names = list(weights)
    density = settings.get("density")
    model.base_model.add_weighted_adapter(
        names,
        [weights[n] for n in names],
        "merged",
        combination_type=method,
        svd_rank=settings.get("rank"),
        density=density,
        majority_sign_method=settings.get("majority", "total"),
    )
    layers = {m: getattr(model.base_model.model, m) for m in SHAPES}
    out = {m: layer.get_delta_weight("merged").detach().numpy() for m, layer in layers.items()}
    model.delete_adapter("merged")
    return out


def check(model, ours, method, weights, limit=1e-5, **settings):
    want = theirs(model, method, weights, **settings)
    got = ml.merge(ours, method=method, semantics="peft", weights=weights, dtype="f32", **settings)
    for module in SHAPES:
        assert distance(delta(got.adapter, module), want[module]) <= limit, module
    return got.report


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("seed", range(3))
def test_deterministic_types(method, seed):
    ranks = (4,) if method in ONE_RANK else (4, 3, 6)
    model, ours = make("abc", ranks, (8.0, 3.0, 16.0), seed=seed)
    settings = {} if method in ("linear", "cat", "svd") else {"density": 0.37}
    check(model, ours, method, WEIGHTS, **settings)
    check(model, ours, method, {"a": 1.0, "b": 1.0, "c": 1.0}, **settings)


@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_signs_by_frequency(method):
    model, ours = make("abc", (4,), (8.0, 3.0, 16.0))
    check(model, ours, method, WEIGHTS, density=0.5, majority="frequency")


@pytest.mark.parametrize("rank", [2, 5, 9])
@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_rank_of_the_decomposition(method, rank):
    model, ours = make("abc", (4,), (8.0,))
    check(model, ours, method, WEIGHTS, rank=rank, **({} if method == "svd" else {"density": 0.6}))


def with_our_masks(monkeypatch, method, names, seed, density):
    """PEFT asks torch for its masks: it gets ours, in the order in which it asks."""
    masks = []
    for module, (n_in, n_out) in SHAPES.items():
        if method.endswith("_svd"):
            parts = [(module, n_out, n_in)]
        else:
            parts = [(f"{module}.lora_a", 4, n_in), (f"{module}.lora_b", n_out, 4)]
        for what, rows, cols in parts:
            masks += [_core.merge_mask(seed, what, name, rows, cols, density) for name in names]
    order = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda like: torch.tensor(next(order)).to(like.dtype))
    return order


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("seed", [0, 7])
def test_random_types_with_the_same_masks(monkeypatch, method, seed):
    model, ours = make("abc", (4,), (8.0, 3.0, 16.0), seed=seed)
    order = with_our_masks(monkeypatch, method, "abc", seed, 0.6)
    check(model, ours, method, WEIGHTS, density=0.6, seed=seed)
    assert next(order, None) is None


@pytest.mark.parametrize("method", RANDOM)
def test_random_types_in_the_mean(method):
    """Two samples of a thousand: their means differ by what chance allows."""
    model, ours = make("ab", (4,), (8.0, 3.0))
    weights, n = {"a": 0.6, "b": 0.5}, 1000
    torch.manual_seed(1)
    settings = {"density": 0.5}
    mine, peers = [], []
    for seed in range(n):
        got = ml.merge(ours, method=method, semantics="peft", weights=weights, seed=seed, **settings).adapter
        mine.append(delta(got, "q_proj"))
        peers.append(theirs(model, method, weights, **settings)["q_proj"])
    mine, peers = np.array(mine), np.array(peers)
    spread = np.sqrt((mine.var(0) + peers.var(0)) / n)
    z = (mine.mean(0) - peers.mean(0)) / spread
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std() < 1.15
    assert np.abs(z).max() < 5.0


def test_defects_are_there_and_named():
    model, ours = make("abc", (4,), (8.0,), rslora=True)
    for method in ("linear", "svd", "ties", "ties_svd"):
        settings = {} if method in ("linear", "svd") else {"density": 0.5}
        report = check(model, ours, method, WEIGHTS, **settings)
        notes = " ".join(report["q_proj"].notes)
        assert "use_rslora" in notes
        assert "too strong" in notes
    model, ours = make("ab", (4,), (8.0,))
    weights = {"a": 0.7, "b": 0.3}
    report = check(model, ours, "linear", weights)
    assert "cross terms" in " ".join(report["q_proj"].notes)
    exact = ml.merge(ours, method="linear", weights=weights).adapter
    peft_ = ml.merge(ours, method="linear", weights=weights, semantics="peft").adapter
    assert distance(delta(peft_, "q_proj"), delta(exact, "q_proj")) > 0.3


def test_one_adapter_becomes_linear():
    model, ours = make("a", (4,), (8.0,))
    settings = {"density": 0.5}
    check(model, ours, "ties", {"a": 0.5}, **settings)


def test_cat_and_svd_are_exact_here_too():
    """Where PEFT is faithful to the deltas, both semantics are one."""
    _, ours = make("abc", (4, 3), (8.0, 3.0, 16.0))
    for method in ("cat", "svd"):
        rank = {} if method == "cat" else {"rank": 5}
        compat = ml.merge(ours, method=method, semantics="peft", weights=WEIGHTS, **rank).adapter
        exact = ml.merge(ours, method="linear", weights=WEIGHTS, **rank).adapter
        for module in SHAPES:
            assert distance(delta(compat, module), delta(exact, module)) <= 1e-5


def test_factors_of_different_ranks_are_refused_as_there():
    model, ours = make("abc", (4, 3), (8.0,))
    with pytest.raises(ValueError, match="same r"):
        theirs(model, "linear", WEIGHTS)
    with pytest.raises(ml.exceptions.ConfigError, match="rank"):
        ml.merge(ours, method="linear", semantics="peft", weights=WEIGHTS)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_default_rank_is_the_largest_of_any_adapter(method):
    """Where ranks differ by module and by adapter, PEFT allocates one for all."""
    model, ours = make("ab", (3, 6), (8.0, 3.0))
    settings = {} if method == "svd" else {"density": 0.5}
    weights = {"a": 0.7, "b": 0.3}
    check(model, ours, method, weights, **settings)
    # A module that only the adapter of the lower rank has.
    part = ml.Adapter.from_factors({"up_proj": ours["b"].factors("up_proj")}, alpha=3.0)
    lone = ml.merge({"a": ours["a"], "b": part}, method=method, semantics="peft", weights=weights, **settings)
    # A sum of one is exact at its own rank; entries that were thinned need all there is.
    assert lone.adapter.info("q_proj").rank == (3 if method == "svd" else 6)
