"""What the tests of merging share: adapters by shape, their dense deltas, every method with its twin."""

import warnings

import numpy as np
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from microlora.gram import Gram
from microlora.merging import methods
from reference import f64
from support import normal, read_tensors, rng, write_tensors

METHODS = tuple(name for name, row in methods().items() if name == row.name)
FACTOR = tuple(name for name in METHODS if methods()[name].exact)
ELEMENT = tuple(name for name in METHODS if not methods()[name].exact)

TOLERANCE = {**dict.fromkeys(FACTOR, 1e-5), **dict.fromkeys(ELEMENT, 1e-4)}
GAUGE = {**dict.fromkeys(FACTOR, 1e-5), **dict.fromkeys(ELEMENT, 1e-2)}
TWO = {"slerp", "nuslerp"}


def factors(r, n_in, n_out, rank):
    return normal(r, rank, n_in) / np.sqrt(n_in), normal(r, n_out, rank) / np.sqrt(rank)


def adapter(shapes=None, seed=0, *, alpha=None, dtype="f32", use_rslora=False):
    """An adapter of random factors; ``shapes`` is {module: (in, out, rank)}."""
    shapes = {"m": (12, 10, 3)} if shapes is None else shapes
    r = rng(seed)
    pairs = {m: factors(r, *shape) for m, shape in shapes.items()}
    alpha = {m: 2.0 * shape[2] for m, shape in shapes.items()} if alpha is None else alpha
    return ml.Adapter.from_factors(pairs, alpha=alpha, dtype=dtype, use_rslora=use_rslora)


def parents(m=3, shapes=None, seed=0, **settings):
    names = "abcdefgh"[:m]
    return {name: adapter(shapes, 100 * seed + i, **settings) for i, name in enumerate(names)}


def some(method, seed=0, **settings):
    return parents(2 if method in TWO else 3, seed=seed, **settings)


def with_extra(one, folder, name="base_model.model.head.weight"):
    """The adapter with a tensor that is no factor."""
    ml.save(one, folder)
    file = folder / "adapter_model.safetensors"
    header, raw = read_tensors(file.read_bytes())
    header[name] = {"dtype": "F32", "shape": [3]}
    raw[name] = np.ones(3, "f4").tobytes()
    file.write_bytes(write_tensors(header, raw))
    with warnings.catch_warnings(action="ignore"):
        return ml.load(folder, strict=False)


def delta(one, module="m"):
    a, b = one.factors(module)
    return one.info(module).scaling * f64(b) @ f64(a)


def deltas(of, module="m"):
    return [delta(one, module) for one in of.values()]


def from_delta(dense, rank=None, module="m"):
    """An adapter with this delta."""
    u, s, v = np.linalg.svd(f64(dense), full_matrices=False)
    k = len(s) if rank is None else rank
    root = np.sqrt(s[:k])
    return ml.Adapter.from_factors({module: (root[:, None] * v[:k], u[:, :k] * root)}, alpha=float(k))


def distance(got, want):
    """Relative Frobenius distance; absolute where nothing is wanted."""
    size = np.linalg.norm(f64(want))
    return float(np.linalg.norm(f64(got) - f64(want)) / (size if size > 0 else 1.0))


def known(of, seed=7, shared=False):
    """Statistics for the methods that need them: Grams and importances of every module of every parent."""
    out = {}
    for i, (name, one) in enumerate(of.items()):
        r = rng(seed if shared else seed + i)
        grams, importance = {}, {}
        for module, (n_in, n_out) in one.dims.items():
            x, g = normal(r, 2 * n_in + 5, n_in), normal(r, 9, n_out)
            dense = (x.T @ x / len(x)).astype(np.float32)
            grams[module] = Gram(len(x), np.diag(dense).copy(), dense=dense)
            importance[module] = ((x**2).mean(0), (g**2).mean(0))
        out[name] = ml.merging.Statistics(grams, importance)
    return out


def merge(of, method, *, statistics=None, full=False, **settings):
    """A merge before truncation (of the highest rank there is), in float32."""
    row = methods()[method]
    if not row.statistics:
        statistics = None
    elif statistics is None:
        statistics = known(of)
    if full and not row.exact:
        settings["rank"] = min(next(iter(of.values())).dims["m"])
    return ml.merge(of, method=method, dtype="f32", statistics=statistics, **settings)


def dense_merge(of, method, **settings):
    return delta(merge(of, method, full=True, **settings).adapter)


def expected(of, method, *, weights=None, seed=0, statistics=None, semantics="exact", **settings):
    """The twin's result on the dense deltas."""
    dense, row = deltas(of), methods()[method]
    args = {
        "density": None,
        "lam": 1.0,
        **{k: v for k, v in row.defaults.items() if k not in ("rank", "seed")},
    }
    args.update(settings)
    args = {k: v for k, v in args.items() if k in row.defaults}
    w = None if weights is None else [weights[name] for name in of]
    if row.weights != "none":
        args["weights"] = w
    f = getattr(twin, method)
    statistics = known(of) if row.statistics and statistics is None else statistics
    if method == "regmean":
        return f(dense, [statistics[n].grams["m"].matrix() for n in of], **args)
    if method == "fisher":
        return f(dense, [statistics[n].importance["m"] for n in of], **args)
    if semantics == "mergekit" and method in ("dare_linear", "dare_ties", "della", "della_linear", "sce"):
        args["semantics"] = semantics
    drawn = [twin.uniforms(seed, ("m", name), d.shape) for name, d in zip(of, dense, strict=True)]
    if method.startswith("dare"):
        return f(dense, [u < args["density"] for u in drawn], **args)
    if method.startswith("della"):
        return f(dense, drawn, **args)
    return f(dense, **args)


def stable(of, method, **settings):
    """Whether rounding cannot turn a choice of the method: no two candidates nearly alike."""
    r = rng(5)
    moved = {
        n: from_delta(d * (1 + 1e-5 * r.standard_normal(d.shape)))
        for n, d in zip(of, deltas(of), strict=True)
    }
    args = {"weights": None, **settings}
    row = methods()[method]
    if row.statistics:
        return True
    shaken = None
    if args["weights"] is not None:
        shaken = {n: w * (1 + 1e-6 * r.standard_normal()) for n, w in args["weights"].items()}
    return (
        distance(expected(moved, method, **{**args, "weights": shaken}), expected(of, method, **args)) < 1e-3
    )


@st.composite
def cases(draw, most=4):
    """Parents of one module: any widths, ranks, alphas, scalings and dtypes."""
    n_in, n_out = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    m = draw(st.integers(2, most))
    out = {}
    for i in range(m):
        rank = draw(st.integers(1, min(n_in, n_out, 6)))
        out[f"p{i}"] = adapter(
            {"m": (n_in, n_out, rank)},
            draw(st.integers(0, 2**16)),
            alpha=draw(st.floats(0.1, 32.0)),
            dtype=draw(st.sampled_from(["f32", "f16", "bf16"])),
            use_rslora=draw(st.booleans()),
        )
    return out
