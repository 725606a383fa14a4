"""The twins of merging against numbers worked by hand and against what the papers promise."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import microlora as ml
import reference_merge as twin
from support import rng


def deltas(m=3, out=5, n_in=7, seed=0):
    r = rng(seed)
    return [r.standard_normal((out, 3)) @ r.standard_normal((3, n_in)) for _ in range(m)]


A = np.array([[4.0, -1.0], [2.0, 0.5]])
B = np.array([[1.0, 3.0], [-4.0, 0.25]])


# -- sums --


def test_sums_by_hand():
    assert_allclose(twin.average([A, B]), [[2.5, 1.0], [-1.0, 0.375]])
    assert_allclose(twin.weighted([A, B], [3, 1]), (3 * A + B) / 4)
    assert_allclose(twin.linear([A, B]), (A + B) / 2)
    assert_allclose(twin.linear([A, B], [3, 1]), 3 * A + B)
    assert_allclose(twin.linear([A, B], [3, 1], normalize=True), (3 * A + B) / 4)
    assert_allclose(twin.task_arithmetic([A, B], [1, -1], lam=0.5), (A - B) / 2)
    assert_allclose(twin.cat([A, B]), A + B)


# -- the sphere --


def test_slerp_ends_and_middle():
    assert_allclose(twin.slerp([A, B], 0.0), A)
    assert_allclose(twin.slerp([A, B], 1.0), B)
    x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 2.0]])
    assert_allclose(twin.slerp([x, y], 0.5), [[np.sqrt(2), np.sqrt(2)]])


def test_slerp_keeps_the_length_of_equally_long_ones():
    a, b = (d / twin.norm(d) for d in deltas(2))
    for t in (0.1, 0.5, 0.8):
        assert twin.norm(twin.slerp([a, b], t)) == pytest.approx(1.0)


def test_slerp_falls_back_to_the_line():
    assert_allclose(twin.slerp([A, 3 * A], 0.25), 1.5 * A)
    assert_allclose(twin.slerp([A, -A], 0.25), 0.5 * A)
    assert_allclose(twin.slerp([A, 0 * A], 0.25), 0.75 * A)


def test_nuslerp_is_slerp_of_equal_lengths_and_has_the_mean_length():
    a, b = (d / twin.norm(d) for d in deltas(2))
    assert_allclose(twin.nuslerp([a, b], [1, 3]), twin.slerp([a, b], 0.75))
    assert twin.norm(twin.nuslerp([2 * a, 4 * b], [1, 1])) == pytest.approx(3.0)


@pytest.mark.parametrize("method", [twin.karcher, twin.multislerp, twin.average])
def test_a_mean_of_equals_is_itself(method):
    assert_allclose(method([A, A, A]), A)


def test_karcher_of_two_is_the_middle_of_the_arc():
    a, b = (d / twin.norm(d) for d in deltas(2))
    assert_allclose(twin.karcher([a, b]), twin.slerp([a, b], 0.5), atol=1e-12)
    assert_allclose(twin.multislerp([a, b]), twin.slerp([a, b], 0.5), atol=1e-12)


def test_karcher_is_where_the_tangents_cancel():
    d = deltas(4)
    mean = twin.karcher(d)
    mu = mean / twin.norm(mean)
    assert twin.norm(sum(twin.log_map(mu, x / twin.norm(x)) for x in d)) < 1e-10
    assert twin.norm(mean) == pytest.approx(np.mean([twin.norm(x) for x in d]))


def test_log_and_exp_are_inverse():
    a, b = (d / twin.norm(d) for d in deltas(2))
    assert_allclose(twin.exp_map(a, twin.log_map(a, b)), b, atol=1e-14)


def test_model_stock_by_hand():
    x, y = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])  # cosine 0.6
    assert_allclose(twin.model_stock([x, y]), 2 * 0.6 / 1.6 * (x + y) / 2)
    assert_allclose(twin.model_stock([x, x]), x)
    assert_allclose(twin.model_stock([x, -x + 0.1 * y]), 0 * x, atol=1e-15)


# -- statistics --


def test_regmean_solves_the_least_squares_of_all_inputs():
    r, d = rng(1), deltas(2)
    xs = [r.standard_normal((40, 7)) for _ in d]
    grams = [x.T @ x for x in xs]
    # The ridge is rows that every parent has seen besides: 1e-2 of the mean diagonal, in every direction.
    ridge = np.sqrt(1e-2 * np.mean([np.diag(g).mean() for g in grams])) * np.eye(7)
    xs = [np.vstack([x, ridge]) for x in xs]
    want = np.linalg.lstsq(
        np.vstack(xs), np.vstack([x @ di.T for x, di in zip(xs, d, strict=True)]), rcond=None
    )[0]
    assert_allclose(twin.regmean(d, grams, rho=1.0), want.T, atol=1e-10)
    assert_allclose(twin.regmean(d, [np.eye(7)] * 2), twin.average(d), atol=1e-12)


def test_fisher_by_hand():
    imp = [(np.array([1.0, 3.0]), np.array([1.0, 1.0])), (np.array([1.0, 1.0]), np.array([1.0, 3.0]))]
    f, g = np.array([[0.5, 1.5], [0.5, 1.5]]), np.array([[0.5, 0.5], [1.5, 1.5]])
    assert_allclose(twin.fisher([A, B], imp), (f * A + g * B) / (f + g))
    assert_allclose(twin.fisher([A, B], [imp[0], imp[0]]), (A + B) / 2)
    nothing = (np.zeros(2), np.zeros(2))
    assert_allclose(twin.fisher([A, B], [imp[0], nothing]), A)
    assert_allclose(twin.fisher([A, B], [nothing, nothing]), 0 * A)


# -- element-wise, two by two --


def test_ties_by_hand():
    # Half is kept: 4, 2 of A; 3, -4 of B. Position (1, 0): 2 - 4 < 0, so B's -4 alone.
    assert_allclose(twin.ties([A, B], density=0.5), [[4.0, 3.0], [-4.0, 0.0]])
    # By weight 3 to 1: 6 - 4 > 0, so A's.
    assert_allclose(twin.ties([A, B], [3, 1], density=0.5), [[4.0, 3.0], [2.0, 0.0]])
    # By number: a draw, which is positive.
    assert_allclose(twin.ties([A, B], density=0.5, majority="frequency"), [[4.0, 3.0], [2.0, 0.0]])
    # All kept: (0,0) mean 2.5; (0,1) 3 against -1; (1,1) mean.
    assert_allclose(twin.ties([A, B], density=1.0), [[2.5, 3.0], [-4.0, 0.375]])
    assert_allclose(twin.ties([A, B], density=1.0, normalize=False, lam=2.0), [[10.0, 6.0], [-8.0, 1.5]])


def test_ties_mean_is_by_weight_of_those_that_agree():
    assert_allclose(twin.ties([A, B], [3, 1], density=1.0), [[3.25, 3.0], [2.0, 0.4375]])  # (0, 1) is a draw


def test_nothing_is_never_nan():
    zero = [0 * A, 0 * A]
    for got in (
        twin.ties(zero),
        twin.sce(zero),
        twin.karcher(zero),
        twin.multislerp(zero),
        twin.model_stock(zero),
        twin.dare_ties(zero, [A > 0, B > 0]),
        twin.breadcrumbs_ties(zero),
        twin.slerp(zero),
        twin.nuslerp(zero),
    ):
        assert_allclose(got, 0 * A)


def test_dare_by_hand_and_in_the_mean():
    k, n = np.array([[True, False], [True, True]]), np.array([[True, True], [False, False]])
    assert_allclose(twin.dare_linear([A, B], [k, n], [1, 1]), [[2 * (4 + 1), 2 * 3], [2 * 2, 2 * 0.5]])
    r, total = rng(2), 0 * A
    for _ in range(4000):
        total = total + twin.dare_linear([A, B], r.random((2, 2, 2)) < 0.7, [1, 1], density=0.7)
    assert_allclose(total / 4000, A + B, atol=0.2)


def test_mergekit_keeps_the_sum_of_magnitudes():
    k = np.array([[True, False], [True, False]])
    got = twin.drop(A, k, 0.5, "mergekit")
    assert np.abs(got).sum() == pytest.approx(np.abs(A).sum())
    assert_allclose(got, [[5.0, 0.0], [2.5, 0.0]])


def test_della_probabilities_rise_with_the_rank_in_the_row():
    d = np.array([[3.0, -1.0, 2.0], [0.1, 0.2, -0.3]])
    p = twin.della_probability(d, 0.5, 0.2)
    assert_allclose(p, [[0.6, 0.4, 0.5], [0.4, 0.5, 0.6]])
    everything = np.zeros(d.shape)
    assert_allclose(twin.della_linear([d], [everything], [1.0]), d / p)
    assert_allclose(twin.della([d], [np.ones(d.shape)]), 0 * d)


def test_breadcrumbs_drops_both_ends():
    d = np.array([[5.0, -4.0], [3.0, -2.0]])
    assert_allclose(twin.breadcrumbs([d], density=0.5, gamma=0.25), [[0.0, -4.0], [3.0, 0.0]])
    assert_allclose(twin.breadcrumbs([d], density=1.0, gamma=0.0), d)


def test_magnitude_prune_by_hand():
    assert_allclose(twin.magnitude_prune([A, B], [1, 1], density=0.5), [[4.0, 3.0], [-2.0, 0.0]])


def test_sce_by_hand():
    # Variances 2.25, 4, 9, .016: half are (0, 1) and (1, 0). Squares: 1 + 4 = 5 and 9 + 16 = 25.
    got = twin.sce([A, B], density=0.5)
    assert_allclose(got, [[0.0, 25 / 30 * 3.0], [25 / 30 * -4.0, 0.0]])
    assert_allclose(twin.sce([A, B], density=0.5, semantics="mergekit"), [[0.0, 3.0], [-4.0, 0.0]])
    assert_allclose(twin.sce([A, A], density=0.25), A)  # equal variances stay together


def test_a_share_is_rounded_down():
    assert [twin.kept(10, d) for d in (0.01, 0.1, 0.25, 0.999, 1.0)] == [0, 1, 2, 9, 10]
    assert twin.kept(100, 0.29) == 29
    assert_allclose(twin.ties([A, B], density=0.1), 0 * A)


def test_a_negative_weight_turns_its_parent():
    np.testing.assert_allclose(
        twin.ties([A, -B], [1, -1], density=0.5), twin.ties([A, B], [1, 1], density=0.5)
    )


def test_chacha_has_its_published_words():
    # Key and nonce of zeros, 8 rounds: draft-strombergson-chacha-test-vectors, TC1.
    words = twin.chacha8([0] * 8, 0, 20)
    assert words[:8].tobytes().hex() == "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"
    assert np.array_equal(words[:7], twin.chacha8([0] * 8, 0, 7))
    assert not np.array_equal(words, twin.chacha8([0] * 8, 1, 20))
    assert twin.key_of(1) != twin.key_of(2)
    share = (twin.uniforms(3, ("m", "a"), (100, 80)) < 0.3).mean()
    assert abs(share - 0.3) < 0.02


def test_a_seed_and_a_name_give_what_a_learner_starts_from():
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["q_proj"]), hidden_dim=8, seed=5)
    drawn = twin.uniforms(5, ["q_proj"], (2, 8))
    assert_allclose(lora["q_proj"].lora_a, (2 * drawn - 1) / np.sqrt(8), atol=1e-7)


# -- the rest --


def test_policies_for_missing_modules():
    parents = {"a": {"m": A, "n": A}, "b": {"m": B}}
    assert [n for n, _ in twin.present(parents, "n", "skip")] == ["a"]
    (_, first), (name, zero) = twin.present(parents, "n", "zero")
    assert name == "b"
    assert_allclose(zero, 0 * first)
    assert twin.present(parents, "n", "common") is None
    assert len(twin.present(parents, "m", "common")) == 2
    with pytest.raises(KeyError):
        twin.present(parents, "n", "error")


def test_resize_is_the_best_there_is():
    d = np.diag([4.0, 2.0, 1.0, 0.0])
    got = twin.resize(d, rank=2)
    assert_allclose(got.delta, np.diag([4.0, 2.0, 0.0, 0.0]), atol=1e-12)
    assert got.energy == pytest.approx(20 / 21)
    assert got.error == pytest.approx(np.sqrt(1 / 21))
    assert [twin.resize(d, energy=e).rank for e in (0.5, 16 / 21 + 1e-6, 0.99, 1.0)] == [1, 2, 3, 3]
    assert [twin.resize(d, max_error=e).rank for e in (0.9, 0.4, 0.2, 1e-9)] == [1, 2, 3, 3]


def test_angles_of_known_planes():
    c, s = np.cos(0.3), np.sin(0.3)
    a, b = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]), np.array([[c, 0, s, 0], [0, 0, 0, 1.0]])
    assert_allclose(twin.angles(a, b), [0.3, np.pi / 2], atol=1e-12)
    assert_allclose(twin.angles(a, 3 * a[::-1]), [0, 0], atol=1e-12)


def test_interference_is_measured_where_the_parent_lives():
    d = np.diag([2.0, 0.0])
    assert twin.interference(d + np.diag([0.0, 9.0]), d) == pytest.approx(0.0)
    assert twin.interference(np.diag([1.0, 0.0]), d) == pytest.approx(0.5)


def test_composition_of_functions():
    r = rng(3)
    d = [r.standard_normal((4, 4)) for _ in range(3)]
    x = r.standard_normal(4)
    y = x
    for di in d:
        y = y + di @ y
    assert_allclose(x + twin.compose_sequential(d) @ x, y)
    assert_allclose(twin.compose_sequential(d, residual=False), d[2] @ d[1] @ d[0])


def test_routing_by_hand():
    got = twin.route([[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 5.0]], temperature=0.5)
    assert_allclose(got, [[1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], [0.5, 0.5]])
    assert_allclose(twin.route([1.0, 0.1], [[2.0, 0.0], [0.0, 5.0]], hard=True), [[1.0, 0.0]])
