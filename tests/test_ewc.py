"""What consolidation promises: each formula against its float64 twin, and nothing lost in any refusal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
import reference_ewc as twin
from microlora import exceptions
from support import close, event_args, factors, feedback_kinds, make, move, normal, rng, scaling

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 20)
KINDS = ("delta", "factor", "l2", "si", "mas")


# -- the Fisher of events --


@pytest.mark.parametrize("kind", ["mse", "preference", "contrastive"])
@given(seed=seeds, n_in=sizes, n_out=sizes, rank=st.integers(1, 5), n=st.integers(1, 40), based=st.booleans())
def test_exact_events_average_over_the_models_outcomes(kind, seed, n_in, n_out, rank, n, based):
    r = rng(seed)
    lora = make(n_in, n_out, rank, seed=seed % 2**30)
    ewc = ml.EwcPlusPlus(lora, kind="factor", fisher="exact")
    want, whole = [0.0, 0.0], 0.0
    for _ in range(n):
        x, base = event_args(r, n_in, n_out)
        fb = feedback_kinds(r, n_out)[kind]
        ewc.accumulate_fisher(x, fb, base=base if based else None)
        a, b = factors(lora)
        y = ref.forward(x, a, b, scaling(lora)) + (base if based else 0.0)
        terms = sum(p * (g**2).sum() for p, g in twin.outcomes(fb, y))
        whole += terms * (b**2).sum() * (x**2).sum() * scaling(lora) ** 2
        one = twin.exact(x, fb, *factors(lora), scaling(lora), base if based else None)
        want = [w + o / n for w, o in zip(want, one, strict=True)]
    assert ewc.n_samples == n
    for got, one in zip(ewc.task_fisher("m"), want, strict=True):
        # Angular gradients can vanish along B altogether; float32 leaves crumbs.
        close(got, one, 2e-4, 1e-10 * whole)


@given(seed=seeds, kind=st.sampled_from(["mse", "cosine", "gradient", "reward", "preference", "contrastive"]))
def test_empirical_events_square_the_observed_gradient(seed, kind):
    r = rng(seed)
    lora = make(11, 7, 3, seed=seed % 2**30)
    ewc = ml.EwcPlusPlus(lora, kind="factor", fisher="empirical")
    x, base = event_args(r, 11, 7)
    fb = feedback_kinds(r, 7)[kind]
    ewc.accumulate_fisher(x, fb, "m", base)
    a, b = factors(lora)
    g = ref.loss_of(fb, ref.forward(x, a, b, scaling(lora)), base)[1]
    for got, want in zip(
        ewc.task_fisher("m"), twin.squares(x[None], g[None], a, b, scaling(lora)), strict=True
    ):
        close(got, want, 1e-4, 1e-7)
    first, second, n = ewc.moments("m")
    close(first, ref.f64(x) ** 2, 1e-6)
    close(second, g**2, 1e-4, 1e-7)
    assert n == 1


@pytest.mark.parametrize("kind", ["mse", "preference", "contrastive"])
def test_sampled_events_tend_to_the_exact_ones(kind):
    r = rng(5)
    lora = make(9, 6, 2, seed=4)
    exact, sample = (ml.EwcPlusPlus(lora, kind="factor", fisher=f, seed=3) for f in ("exact", "sample"))
    x, base = event_args(r, 9, 6)
    fb = feedback_kinds(r, 6)[kind]
    exact.accumulate_fisher(x, fb, base=base)
    for _ in range(4000):
        sample.accumulate_fisher(x, fb, base=base)
    for got, want in zip(sample.task_fisher("m"), exact.task_fisher("m"), strict=True):
        close(got, want, 0.1)
    assert sample.task_fisher("m")[0].tolist() != exact.task_fisher("m")[0].tolist()


@pytest.mark.parametrize("fisher", ["exact", "sample"])
@pytest.mark.parametrize("kind", ["cosine", "gradient", "reward"])
def test_feedback_without_probabilities_is_refused_with_the_way_out(kind, fisher):
    r = rng(1)
    lora = make(8)
    ewc = ml.EwcPlusPlus(lora, fisher=fisher)
    x, base = event_args(r, 8, 8)
    before = lora.snapshot().to_bytes(), ewc.export_state()
    for call in (ewc.accumulate_fisher, ewc.adapt):
        with pytest.raises(exceptions.FeedbackError, match='"empirical"'):
            call(x, feedback_kinds(r, 8)[kind], base=base)
    with pytest.raises(exceptions.FeedbackError, match='"empirical"'):
        ewc.accumulate_fisher(x, base)
    assert (lora.snapshot().to_bytes(), ewc.export_state()) == before


@pytest.mark.parametrize("kind", ["cosine", "gradient", "reward"])
def test_auto_takes_the_observed_gradient_where_there_is_no_likelihood(kind):
    r = rng(2)
    x, base = event_args(r, 8, 8)
    given_feedback = feedback_kinds(r, 8)[kind]
    # A learner each, because rewards move its baseline.
    auto, empirical = (ml.EwcPlusPlus(make(8), kind="factor", fisher=f) for f in ("auto", "empirical"))
    for ewc in (auto, empirical):
        ewc.accumulate_fisher(x, given_feedback, base=base)
        ewc.adapt(x, given_feedback, base=base)
        ewc.accumulate_fisher(x[None], base[None])
    assert auto.n_samples == empirical.n_samples == 3
    for got, want in zip(auto.task_fisher("m"), empirical.task_fisher("m"), strict=True):
        assert got.tolist() == want.tolist()
        assert got.any()


@given(seed=seeds, n=st.integers(1, 70), passes=st.integers(1, 4), kind=st.sampled_from(["factor", "mas"]))
def test_arrays_of_gradients_and_their_passes(seed, n, passes, kind):
    r = rng(seed)
    lora = make(13, 6, 2, seed=seed % 2**30)
    x, g = normal(r, n, 13), normal(r, passes, n, 6)
    f = np.square if kind == "factor" else np.abs
    ewc = ml.EwcPlusPlus(lora, kind=kind, fisher="exact")
    ewc.accumulate_fisher(x, g)
    for got, want in zip(
        ewc.task_fisher("m"), twin.squares(x, g, *factors(lora), scaling(lora), f), strict=True
    ):
        close(got, want, 1e-5)
    flat = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical")
    flat.accumulate_fisher(x, g[0])
    for got, want in zip(
        flat.task_fisher("m"), twin.squares(x, g[0], *factors(lora), scaling(lora), f), strict=True
    ):
        close(got, want, 1e-5)


@given(seed=seeds, n=st.integers(1, 40), based=st.booleans(), single=st.booleans())
def test_mas_needs_no_feedback(seed, n, based, single):
    r = rng(seed)
    lora = make(13, 6, 2, seed=seed % 2**30)
    x, base = normal(r, n, 13), normal(r, n, 6) if based else None
    a, b = factors(lora)
    y = ref.forward(x, a, b, scaling(lora)) + (0 if base is None else base)
    ewc = ml.EwcPlusPlus(lora, kind="mas")
    if single:
        for i in range(n):
            # Any feedback will do: only the output counts.
            fb = ml.Reward(1.0, response=normal(r, 6))
            ewc.adapt(x[i], fb, base=None if base is None else base[i])
    else:
        ewc.accumulate_fisher(x, base=base)
    assert ewc.n_samples == n
    for got, want in zip(
        ewc.task_fisher("m"), twin.squares(x, 2 * y, a, b, scaling(lora), np.abs), strict=True
    ):
        close(got, want, 1e-4)


# -- fused with adapt --


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, n=st.integers(1, 40))
def test_adapt_learns_what_the_learner_learns_and_counts_what_it_squares(kind, seed, n):
    r = rng(seed)
    lora, plain = make(10, 7, 2, seed=seed % 2**30), make(10, 7, 2, seed=seed % 2**30)
    ewc = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical")
    apart = ml.EwcPlusPlus(plain, kind=kind, fisher="empirical")
    for _ in range(n):
        x, base = event_args(r, 10, 7)
        fb = list(feedback_kinds(r, 7).values())[r.integers(6)]
        if type(fb).__name__ == "Reward":
            fb = ml.Target(normal(r, 7))  # the two-call way would see another baseline
        apart.accumulate_fisher(x, fb, base=base)
        assert ewc.adapt(x, fb, base=base) == plain.adapt(x, fb, base=base)
    assert lora.snapshot().to_bytes() == plain.snapshot().to_bytes()
    assert ewc.export_state() == apart.export_state()


def test_an_event_that_is_skipped_is_not_counted():
    lora = make(6, learned=False)
    ewc = ml.EwcPlusPlus(lora, fisher="empirical")
    result = ewc.adapt(np.ones(6, np.float32), ml.Target(np.ones(6, np.float32), loss="cosine"))
    assert not result.applied
    assert ewc.n_samples == 0
    with pytest.raises(exceptions.ConfigError, match="no samples"):
        ewc.start_new_task()


def test_a_large_contrastive_event_is_one_sample():
    r = rng(3)
    lora = make(9, 6, 2)
    fb = ml.Contrastive(normal(r, 6), normal(r, 50, 6), tau=0.3)
    x, base = event_args(r, 9, 6)
    for fisher, outcomes in (("exact", 51), ("auto", 1)):
        ewc = ml.EwcPlusPlus(lora, kind="factor", fisher=fisher)
        for _ in range(3):
            ewc.accumulate_fisher(x, fb, base=base)
        assert ewc.n_samples == 3
        close(ewc.moments("m")[0], ref.f64(x) ** 2, 1e-6)
        if outcomes > 1:
            want = twin.exact(x, fb, *factors(lora), scaling(lora), base)
            for got, one in zip(ewc.task_fisher("m"), want, strict=True):
                close(got, one, 1e-4)


# -- chains --


def chain_of(r, head, **options):
    layers = [(normal(r, 9, 6), normal(r, 9)), (normal(r, 4, 9), None)]
    chain = ml.LoraChain(layers, rank=2, head=head, activation="tanh", seed=3, **options)
    for name in chain.lora.modules():
        move(chain.lora, r, name, by=0.5)
    return chain


def gradients(chain, x, y):
    """``{layer: (of A, of B)}`` of one batch's mean loss."""
    return dict(zip(chain.lora.modules(), (g[:2] for g in chain.gradients(x, y)[2]), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("head", ["cross_entropy", "mse"])
def test_a_chains_fisher_is_the_mean_of_squared_single_gradients(head, fisher, checkpointing):
    r = rng(7)
    chain = chain_of(r, head, gradient_checkpointing=checkpointing)
    x = normal(r, 5, 6)
    y = r.integers(0, 4, 5) if head == "cross_entropy" else normal(r, 5, 4)
    ewc = ml.EwcPlusPlus(chain, kind="factor", fisher=fisher)
    ewc.accumulate_fisher(x, y)
    assert ewc.n_samples == 5
    want = {name: [0.0, 0.0] for name in chain.lora.modules()}
    for i in range(5):
        z = ref.f64(chain.forward(x[i : i + 1]))[0]
        if fisher == "empirical":
            labels = [(1.0, y[i : i + 1])]
        elif head == "cross_entropy":
            p = np.exp(z - z.max())
            labels = [(p[c] / p.sum(), np.array([c])) for c in range(4)]
        else:
            labels = [(1.0, (z - e)[None].astype(np.float32)) for e in np.eye(4)]
        for p, label in labels:
            for name, (ga, gb) in gradients(chain, x[i : i + 1], label).items():
                for side, g in enumerate((ga, gb)):
                    want[name][side] = want[name][side] + p * ref.f64(g) ** 2 / 5
    for name, pair in want.items():
        for got, one in zip(ewc.task_fisher(name), pair, strict=True):
            close(got, one, 2e-4)
    close(ewc.moments("layers.0")[0], (ref.f64(x) ** 2).mean(0), 1e-5)
    ewc.start_new_task()
    assert ewc.penalty() == 0.0
    assert ewc.is_active


def test_a_chain_measures_outputs_without_labels():
    r = rng(8)
    for head in ("mse", "cross_entropy"):
        chain = chain_of(r, head)
        x = normal(r, 6, 6)
        ewc = ml.EwcPlusPlus(chain, kind="mas")
        ewc.accumulate_fisher(x)
        assert ewc.n_samples == 6
        if head == "mse":
            zero = np.zeros((1, 4), np.float32)
            rows = [gradients(chain, x[i : i + 1], zero)["layers.0"][0] for i in range(6)]
            close(ewc.task_fisher("layers.0")[0], 2 * np.abs(np.array(rows, np.float64)).mean(0), 1e-4)
    with pytest.raises(exceptions.ConfigError, match="feedback"):
        ml.EwcPlusPlus(chain).accumulate_fisher(x)


def test_a_bad_row_of_a_chain_is_named():
    r = rng(9)
    chain = chain_of(r, "mse")
    x, y = normal(r, 5, 6), normal(r, 5, 4)
    ewc = ml.EwcPlusPlus(chain, kind="factor")
    ewc.accumulate_fisher(x, y)
    before = ewc.export_state()
    x[3, 2] = np.nan
    with pytest.raises(exceptions.NonFiniteError, match="3"):
        ewc.accumulate_fisher(x, y)
    assert ewc.export_state() == before


# -- every published method, by its formula --

METHODS = {
    "l2": {"kind": "l2"},
    "ewc": {"kind": "factor", "anchors": "separate"},
    "oewc": {"kind": "factor", "gamma": 0.7},
    "ewc++": {"kind": "factor", "fisher_decay": 0.9},
    "ewc++sum": {"kind": "factor"},
    "si": {"kind": "si"},
    "dwewc": {"kind": "delta", "anchors": "separate"},
    "dwoewc": {"kind": "delta", "gamma": 0.7},
}


@pytest.mark.parametrize("name", METHODS)
@given(seed=seeds, tasks=st.integers(1, 4), rank=st.integers(1, 4))
def test_every_method_is_its_formula(name, seed, tasks, rank):
    r = rng(seed)
    lora = make(9, 7, rank, seed=seed % 2**30)
    settings = METHODS[name]
    # Explicit steps against a strong path importance would diverge, as they must.
    lam = 0.02 if name == "si" else 2.5
    ewc = ml.EwcPlusPlus(lora, lam, fisher="empirical", **settings)
    want = twin.Method(name, scaling(lora), lam, settings.get("gamma", 1.0), start=factors(lora))
    opt = ml._core.Optimizer(lora, "sgd")
    for _ in range(tasks):
        move(lora, r)
        if name == "si":
            for _ in range(3):
                before = factors(lora)
                x, t = normal(r, 9), normal(r, 7)
                a, b = before
                g = ref.forward(x, a, b, scaling(lora)) - t
                gradient = ref.chain(x, a, b, scaling(lora), g)
                lora.adapt(x, ml.Target(t))
                lr = 0.02 / (1 + np.abs(g).max())
                # The penalty moves the weights too; only the loss's gradient counts for the path.
                opt.step(lora, lr, ewc=ewc)
                want.step(gradient, before, factors(lora))
        x, g = normal(r, 12, 9), normal(r, 12, 7)
        for start in range(0, 12, 4):
            part = slice(start, start + 4)
            ewc.accumulate_fisher(x[part], g[part])
            want.batch(x[part], g[part], factors(lora))
        ewc.start_new_task()
        want.end(x, g, factors(lora))
        move(lora, r, by=0.05)
        got = ewc.penalty_grad()["m"]
        for one, other in zip(got, want.gradient(factors(lora)), strict=True):
            close(one, other, 1e-3 if name == "si" else 1e-4)
    assert ewc.task_count == tasks
