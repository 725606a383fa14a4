"""The demo's corpus, measure and experiment, on small pieces; learning is shown and can fail."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from microlora.demo import report
from microlora.demo.corpus import Corpus, Pair, read_corpus, split_corpus
from microlora.demo.evaluate import best_hits, mrr, ranks_of
from microlora.demo.experiment import learn, run_persona, start
from microlora.demo.session import default_cache_dir, make_encoder, prepare
from microlora.demo.task import Task, default_api
from microlora.encoders import LsaEncoder
from microlora.exceptions import CancelledError, ConfigError, NonFiniteError, ShapeError
from microlora.progress import CancelToken
from numpy_lora import NumpyLora, numpy_api

SOURCE = '''
class Box:
    """A box."""

    def open(self, key, *, force=False):
        """Open the box with a key.

        More words that no query holds.
        """
        if force:
            return True
        return key == self.key

    def shut(self):
        """Too short."""
        return None

    def empty(self):
        """Only a docstring and nothing that does anything."""

async def fetch(url):
    """Fetch the page at an address. And a second sentence."""
    return await get(url)

def bare():
    return 1
'''


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def synthetic(n_modules=3, per_module=60, dim=24, shift=0.8, seed=0):
    """Documents of a module lie off their queries by the module's own low-rank map."""
    rng = np.random.default_rng(seed)
    q, d, modules = [], [], []
    for m in range(n_modules):
        x = rng.standard_normal((per_module, dim))
        move = rng.standard_normal((dim, 4)) @ rng.standard_normal((4, dim)) * shift / 4
        q.append(x)
        d.append(x + x @ move + 0.05 * rng.standard_normal(x.shape))
        modules += [f"m{m}"] * per_module
    queries, documents = (
        (np.vstack(z) / np.linalg.norm(np.vstack(z), axis=1, keepdims=True)).astype(np.float32)
        for z in (q, d)
    )
    names = tuple(f"m{m}" for m in range(n_modules))
    return Task(queries, documents, split_corpus(modules, seed), names)


class Constant(NumpyLora):
    """The stub that a learning test must catch: every event adds one constant, whatever it says."""

    def instant(self, x, feedback, *, base):
        self.B += 0.01


def test_corpus_holds_the_documented_functions(tmp_path):
    write(tmp_path, "pack/__init__.py", SOURCE)
    write(tmp_path, "pack/again.py", SOURCE)
    write(tmp_path, "test/x.py", SOURCE)
    write(tmp_path, "broken.py", "def (")
    (tmp_path / "latin.py").write_bytes(b"# \xff\xfe")
    seen = []
    got = read_corpus(tmp_path, progress=lambda *step: seen.append(step)).pairs
    assert [p.query for p in got] == ["Open the box with a key.", "Fetch the page at an address."]
    first = got[0]
    assert first.code.startswith("open(self, key, *, force=False):\nif force:")
    assert "box" not in first.code
    assert (first.module, first.where) == ("pack", "pack.Box.open")
    assert seen[-1][0] == seen[-1][1]


def test_corpus_of_this_interpreter():
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    corpus = read_corpus(root)
    assert len(corpus) > 50
    assert len(set(corpus.queries)) == len(corpus)
    assert all("\n" in code and len(code) > 5 for code in corpus.documents)


def test_corpus_refuses_and_stops(tmp_path):
    with pytest.raises(ConfigError, match="no function"):
        read_corpus(tmp_path)
    write(tmp_path, "a.py", SOURCE)
    token = CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        read_corpus(tmp_path, cancel=token)
    with pytest.raises(ConfigError, match="personas is 3"):
        Corpus(tuple(Pair(str(i), "", "m", "") for i in range(5))).largest_modules(3)


def test_split_halves_each_module_and_keeps_apart():
    modules = ["a"] * 11 + ["b"] * 6
    split = split_corpus(modules, 3)
    for name, count in (("a", 11), ("b", 6)):
        stream, held = split.stream[name], split.held_out[name]
        assert len(stream) == count // 2
        assert len(stream) + len(held) == count
        assert not set(stream) & set(held)
        assert all(modules[i] == name for i in (*stream, *held))
    assert not set(split.all_stream()) & set(np.concatenate(list(split.held_out.values())))
    again = split_corpus(modules, 3)
    assert (again.stream["a"] == split.stream["a"]).all()


def test_ranks_equal_a_sort_and_scale_does_not_matter():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((700, 8)).astype(np.float32)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    gold = rng.permutation(700)[:600]
    q = (d[gold] + 0.8 * rng.standard_normal((600, 8))).astype(np.float32)
    got = ranks_of(q, d, gold)
    order = np.argsort(-(q.astype(np.float64) @ d.T), axis=1)
    want = np.array([np.flatnonzero(row == g)[0] for row, g in zip(order, gold, strict=True)])
    assert (got != want).mean() < 0.01  # equals within float32 may change places
    assert (ranks_of(7 * q, d, gold) != got).mean() < 0.01
    assert [i for i, _ in best_hits(q[0], d, 5)] == order[0, :5].tolist()


def test_a_query_of_zeros_earns_nothing():
    d = np.eye(20, dtype=np.float32)
    assert mrr(ranks_of(np.zeros((2, 20), np.float32), d, np.array([0, 5]))) == 0


def test_mrr_by_hand():
    assert mrr(np.array([0, 1, 9, 10])) == pytest.approx((1 + 0.5 + 0.1) / 4)
    with pytest.raises(ConfigError, match="mrr of 0 ranks"):
        mrr(np.zeros(0, np.int64))


def test_measure_refuses_bad_input():
    d = np.eye(4, dtype=np.float32)
    with pytest.raises(ShapeError, match="differ in width"):
        ranks_of(np.zeros((1, 3), np.float32), d, np.array([0]))
    with pytest.raises(ShapeError, match="gold"):
        ranks_of(d, d, np.array([0]))
    with pytest.raises(NonFiniteError, match="queries"):
        ranks_of(np.full((1, 4), np.nan, np.float32), d, np.array([0]))


def mean_uplift(task, api, rank=16):
    return float(np.mean([run_persona(task, p, rank, 0, api)[0].uplift for p in task.personas]))


def test_the_adapter_learns_and_the_constant_stub_does_not():
    task = synthetic()
    core, twin = mean_uplift(task, default_api()), mean_uplift(task, numpy_api())
    assert core > 0.1
    assert core == pytest.approx(twin, abs=0.02)
    assert mean_uplift(task, numpy_api(cls=Constant)) < 0.02


def test_a_persona_is_measured_as_said():
    task = synthetic()
    result, learner = run_persona(task, "m1", 8, 0, numpy_api())
    held = task.split.held_out["m1"]
    assert (result.clicks, result.held_out) == (30, 30)
    assert result.before == task.mrr(None, held)
    assert result.after == task.mrr(learner, held)
    assert result.event_ns.shape == (30,)
    assert (result.event_ns > 0).all()
    ten = start(task, 8, 0, numpy_api())
    learn(ten, task, task.split.stream["m1"][:10], numpy_api())
    assert result.early == task.mrr(ten, held)
    others = np.concatenate([task.split.held_out["m0"], task.split.held_out["m2"]])
    assert result.others_after == task.mrr(learner, others)


def test_held_out_pairs_never_reach_the_learner():
    task = synthetic()
    seen = []

    class Spy(NumpyLora):
        def fit_input_basis(self, X):
            seen.extend(map(bytes, X))
            super().fit_input_basis(X)

        def instant(self, x, feedback, *, base):
            seen.append(bytes(x))
            super().instant(x, feedback, base=base)

    run_persona(task, "m0", 4, 0, numpy_api(cls=Spy))
    held = np.concatenate(list(task.split.held_out.values()))
    assert seen
    assert not {bytes(x) for x in task.queries[held]} & set(seen)


def test_a_diverging_baseline_is_told_as_such():
    result, _ = run_persona(synthetic(), "m0", 4, 0, numpy_api(), sgd_rate=1e30)
    assert np.isnan(result.sgd_after)
    assert np.isfinite(result.after)


def test_run_refuses_and_stops():
    task = synthetic()
    with pytest.raises(ConfigError, match="persona is 'x'"):
        run_persona(task, "x", 4, 0, numpy_api())
    with pytest.raises(ConfigError, match="rank is 25"):
        run_persona(task, "m0", 25, 0, numpy_api())
    token = CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        run_persona(task, "m0", 4, 0, numpy_api(), cancel=token)


def test_a_lone_persona_has_no_others(tmp_path):
    task = synthetic(n_modules=1)
    result, _ = run_persona(task, "m0", 4, 0, numpy_api())
    assert np.isnan(result.others_before)


def small_corpus():
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs = []
    for package in ("email", "logging", "http"):
        pairs += [
            Pair(p.query, p.code, package, f"{package}.{p.where}") for p in read_corpus(root / package).pairs
        ]
    return Corpus(tuple({p.query: p for p in pairs}.values()))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return prepare(LsaEncoder(96), 3, 0, tmp_path_factory.mktemp("cache"), corpus=small_corpus())


def test_session_fits_on_documents_alone_and_caches(session, tmp_path):
    corpus = session.corpus
    want = LsaEncoder(96).fit(corpus.documents).encode(corpus.queries)
    np.testing.assert_allclose(session.task.queries, want, atol=1e-6)
    assert not session.encoder_cached
    first = prepare(LsaEncoder(96), 2, 0, tmp_path, corpus=corpus)
    second = prepare(LsaEncoder(96), 2, 1, tmp_path, corpus=corpus)
    assert not first.encoder_cached
    assert second.encoder_cached


def test_real_code_search_improves(session):
    before = session.task.mrr(None, np.concatenate(list(session.task.split.held_out.values())))
    assert before > 0.2
    assert mean_uplift(session.task, default_api()) > 0.01


def test_report_saves_adapters_that_rank_the_same(session, tmp_path):
    seen = []
    got = report.run(
        session,
        session.task.personas,
        8,
        0,
        tmp_path / "a",
        default_api(),
        progress=lambda *step: seen.append(step),
    )
    assert got["saved"]["reloaded_ranks_equal"] is True
    assert got["saved"]["weight_bytes"] == 4 * 8 * 2 * 96
    assert sorted(f.stem for f in (tmp_path / "a").iterdir()) == sorted(session.task.personas)
    assert got["overall"]["after_all"] == pytest.approx(np.mean([r["after_all"] for r in got["personas"]]))
    assert seen[-1][:2] == (3, 3)


def test_report_notices_a_file_that_ranks_differently(session, tmp_path):
    class Forgetful(NumpyLora):
        def save(self, path):
            kept, self.B = self.B, self.B * 0
            super().save(path)
            self.B = kept

    got = report.run(session, session.task.personas, 8, 0, tmp_path, numpy_api(cls=Forgetful))
    assert got["saved"]["reloaded_ranks_equal"] is False


def test_answer_shows_hits_with_and_without(session):
    got = report.answer(session, "parse a header", ("email",), 8, 0, default_api(), hits=4)
    assert len(got["without"]) == 4
    assert len(got["with"][0]["hits"]) == 4
    assert got["without"] != got["with"][0]["hits"]
    with pytest.raises(ConfigError, match="knows no word"):
        report.answer(session, "!!", ("email",), 8, 0, numpy_api())
    with pytest.raises(ConfigError, match="persona is 'nobody'"):
        report.choose_personas(session, "nobody")
    assert report.choose_personas(session, None) == session.task.personas


@pytest.mark.parametrize(
    "spec",
    ["bert", ":x", "json:", "no_such_module_:x", "json:no_such", "json:__name__", "builtins:dict", ".:x"],
)
def test_an_encoder_that_cannot_be_had_is_named(spec):
    with pytest.raises(ConfigError, match="encoder"):
        make_encoder(spec)


def test_an_encoder_of_ones_own():
    assert isinstance(make_encoder("lsa"), LsaEncoder)
    assert isinstance(make_encoder("microlora.encoders:LsaEncoder"), LsaEncoder)


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "microlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "microlora"
