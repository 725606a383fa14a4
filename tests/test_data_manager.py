import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlora.data import (
    AdapterDataset,
    CharacterNoise,
    DataSource,
    Duplicates,
    EmbeddingNoise,
    Length,
    NearDuplicateEmbeddings,
    NearDuplicates,
    Score,
    TemplateParaphrase,
    TrainingDataManager,
    TrainingSample,
    WordDropout,
)
from microlora.data.filters import FILTERS
from microlora.data.manager import apportion
from microlora.data.near import jaccard, shingles
from microlora.data.variations import VARIATIONS, vary
from microlora.exceptions import ConfigError, LeakageError, ShapeError
from support import normal, rng
from test_data_sample import Words

WORDS = [
    "open",
    "close",
    "read",
    "write",
    "send",
    "fetch",
    "parse",
    "build",
    "test",
    "the",
    "a",
    "file",
    "socket",
    "header",
    "table",
    "tree",
]


def question(r, n=8):
    return " ".join(r.choice(WORDS, n))


def questions(n, seed=0, **fields):
    r = rng(seed)
    return [TrainingSample(query=question(r), label=i % 3, id=f"{seed}-{i}", **fields) for i in range(n)]


# -- filters --

short = st.text("ab c", max_size=6)
samples = st.lists(
    st.builds(
        lambda q, v, s, p: (q, v, s, p),
        st.none() | short,
        st.none() | st.lists(st.integers(-2, 2), min_size=2, max_size=2),
        st.floats(0, 1),
        st.sampled_from(["", "x", "y"]),
    ),
    max_size=25,
).map(
    lambda rows: [
        TrainingSample(v, query=q, quality=s, parent_id=p, id=str(i)) for i, (q, v, s, p) in enumerate(rows)
    ]
)


@pytest.mark.parametrize("name", FILTERS)
@given(samples)
def test_a_filter_lets_through_again_what_it_let_through(name, rows):
    item = FILTERS[name]()
    reasons = item.check(rows)
    assert len(reasons) == len(rows)
    kept = [row for row, why in zip(rows, reasons, strict=True) if why is None]
    assert item.check(kept) == [None] * len(kept)
    assert item.check(rows) == reasons


@given(samples)
def test_duplicates_leave_each_content_once(rows):
    kept = [r for r, why in zip(rows, Duplicates().check(rows), strict=True) if why is None]

    def content(r):
        text = None if r.query is None else " ".join(r.query.split())
        vector = None if r.input_embedding is None else tuple(r.input_embedding.tolist())
        return (text, vector)

    full = [content(r) for r in kept if content(r) != (None, None)]
    assert len(set(full)) == len(full)
    assert set(full) == {content(r) for r in rows} - {(None, None)}


def test_duplicates_say_what_is_the_same():
    a = TrainingSample([1.0, 2.0], query="How  are YOU")
    b = a.replace(query="how are you", input_embedding=[1.0, 2.0 + 1e-7])
    c = a.replace(input_embedding=[5.0, 2.0])
    assert Duplicates().check([a, b, c]) == [None, "same text and embedding", None]
    assert Duplicates(of="text").check([a, b, c]) == [None, "same text", "same text"]
    assert Duplicates(of="embedding").check([a, b, c]) == [None, "same embedding", None]
    assert Duplicates().check([a, a.replace(response="fine")]) == [None, None]


def test_near_duplicates_are_those_with_a_high_jaccard_index():
    r = rng(1)
    base = [question(r, 30) for _ in range(40)]
    texts = [t for text in base for t in (text, text + " now", " ".join(text.split()[:12]))]
    rows = [TrainingSample(query=t, id=str(i)) for i, t in enumerate(texts)]
    got = NearDuplicates(0.8).check(rows)
    sets = [shingles(t + " ") for t in texts]
    kept, want = [], []
    for words in sets:  # the definition, every pair measured
        hit = any(jaccard(words, other) >= 0.8 for other in kept)
        want.append("nearly the same text" if hit else None)
        kept += [] if hit else [words]
    assert got == want
    assert sum(why is not None for why in got) == 40
    family = [row.replace(parent_id="p") for row in rows]
    assert NearDuplicates(0.8).check(family) == [None] * len(rows)


def test_near_embeddings_are_those_with_a_high_cosine():
    r = rng(2)
    base = normal(r, 50, 32)
    near = base + 0.05 * normal(r, 50, 32)
    rows = [TrainingSample(v) for v in (*base, *near, np.zeros(32), np.zeros(32), np.ones(3))]
    rows = [row.replace(id=str(i)) for i, row in enumerate(rows)]
    got = NearDuplicateEmbeddings(0.98).check(rows)
    assert got == [None] * 50 + ["nearly the same embedding"] * 50 + [None] * 3


def test_length_and_score():
    rows = [TrainingSample(query=q, response=a) for q, a in (("a b", None), ("a", "x y"), ("a b", "x " * 9))]
    got = Length(min_words=2, max_words=5).check(rows)
    assert got == [None, "query too short", "response too long"]
    assert Length(min_words=2, max_words=5, field="query").check(rows) == [None, "query too short", None]
    assert Length(max_chars=2).check(rows)[0] == "query too long"
    assert Score(0.5).check([TrainingSample(quality=q) for q in (0.4, 0.5)]) == ["score too low", None]
    assert Score(3, of=lambda s: len(s.query)).check(rows) == [None, "score too low", None]
    with pytest.raises(ConfigError, match="'i': score"):
        Score(of=lambda s: float("nan")).check([TrainingSample(id="i")])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Duplicates(of="colour"), "duplicates: of"),
        (lambda: Duplicates(decimals=-1), "decimals"),
        (lambda: NearDuplicates(0.0), "threshold"),
        (lambda: NearDuplicateEmbeddings(1.5), "threshold"),
        (lambda: Length(min_words=5, max_words=4), "max_words"),
        (lambda: Score(float("nan")), "minimum"),
        (lambda: Score(of="quality"), "score: of"),
        (lambda: TemplateParaphrase(templates=("no place",)), "query"),
        (lambda: TemplateParaphrase(copies=7), "copies"),
        (lambda: WordDropout(rate=0.0), "rate"),
        (lambda: CharacterNoise(copies=0), "copies"),
        (lambda: EmbeddingNoise(sigma=float("nan")), "sigma"),
        (lambda: DataSource("", []), "name"),
        (lambda: DataSource("a", [], weight=0), "weight"),
        (lambda: TrainingDataManager([]), "sources"),
        (lambda: TrainingDataManager([[]]), r"sources\[0\]"),
        (lambda: TrainingDataManager([DataSource("a", [])] * 2), "'a' appears twice"),
        (lambda: TrainingDataManager([DataSource("a", [])], filters=[1]), r"filters\[0\]"),
        (lambda: TrainingDataManager([DataSource("a", [])], variations=[WordDropout] * 2), "variations"),
        (lambda: TrainingDataManager([DataSource("a", [])], seed=-1), "seed"),
    ],
)
def test_settings_out_of_range_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# -- variations --


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_keeps_the_target_and_names_its_parent(name):
    item = VARIATIONS[name](copies=3)
    rows = [s.replace(input_embedding=normal(rng(i), 16)) for i, s in enumerate(questions(60))]
    made, reasons = vary(item, rows, seed=5)
    assert len(made) + sum(reasons.values()) == 180
    assert len(made) > 100
    assert len({s.id for s in made}) == len(made)
    parents = {s.id: s for s in rows}
    for s in made:
        parent = parents[s.parent_id]
        assert s.label == parent.label
        assert (s.input_embedding is None) == item.changes_text
        assert (s.query != parent.query) == item.changes_text
    assert vary(item, rows, seed=5)[0] == made
    assert vary(item, rows[::-1], seed=5)[0][-1].id in {s.id for s in made}
    assert {s.id: s for s in vary(item, rows[::-1], seed=5)[0]} == {s.id: s for s in made}
    if name != "template_paraphrase":
        assert vary(item, rows, seed=6)[0] != made


def test_what_each_variation_does():
    r = rng(3)
    sample = TrainingSample(query=" ".join(f"word{i}" for i in range(2000)), id="x")
    words = WordDropout(0.2).make(sample, 0, r).query.split()
    assert 0.76 < len(words) / 2000 < 0.84
    assert [w for w in sample.query.split() if w in set(words)] == words
    letters = CharacterNoise(0.1).make(sample, 0, r).query
    assert abs(len(letters) - len(sample.query)) < 300
    assert letters != sample.query
    three = [TemplateParaphrase(copies=3).make(sample, i, r).query for i in range(3)]
    assert len(set(three)) == 3
    assert all(sample.query in q for q in three)
    x = normal(r, 4000)
    noisy = EmbeddingNoise(0.1).make(TrainingSample(x), 0, r).input_embedding
    assert np.linalg.norm(noisy - x) / np.linalg.norm(x) == pytest.approx(0.1, rel=0.05)
    assert WordDropout(1.0).make(TrainingSample(query="a b c"), 0, r).query in ("a", "b", "c")


def test_what_cannot_be_varied_says_why():
    rows = [TrainingSample(query=q, id=str(i)) for i, q in enumerate(["one", "", None, "1 2"])]
    assert vary(WordDropout(1e-9), rows, 0) == ([], {"fewer than two words": 3, "unchanged": 1})
    assert vary(CharacterNoise(), rows[1:], 0) == ([], {"no text": 3})
    assert vary(TemplateParaphrase(), rows[1:3], 0) == ([], {"no text": 2})
    assert vary(EmbeddingNoise(), rows[:1], 0) == ([], {"no embedding": 1})


# -- the manager --


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_are_exact_and_within_one_of_the_proportion(count, weights):
    parts = apportion(count, weights)
    assert sum(parts) == count
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - count * weight / sum(weights)) < 1 + 1e-6


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.integers(1, 9)), min_size=1, max_size=5))
@settings(max_examples=30)
def test_sources_are_drawn_in_proportion(sizes):
    sources = [DataSource(f"s{i}", questions(n, i), w) for i, (n, w) in enumerate(sizes)]
    manager = TrainingDataManager(sources)
    weights = [n if w is None else w for n, w in sizes]
    if not sum(n for n, _ in sizes):
        with pytest.raises(ConfigError, match="no samples"):
            manager.prepare(validation=None)
        return
    if any(w and not n for (n, _), w in zip(sizes, weights, strict=True)):
        return
    dataset, report = manager.prepare(validation=None)
    drawn = [row["rows_out"] for row in report.rows]
    assert drawn == apportion(sum(drawn), weights)
    assert len(dataset) == sum(drawn)
    assert any(part == n for part, (n, _) in zip(drawn, sizes, strict=True)) or sum(drawn) > 0
    more = apportion(sum(drawn) + 1, weights)
    assert any(part > n for part, (n, _) in zip(more, sizes, strict=True))
    with pytest.raises(ConfigError, match=r"expected .* for its weight"):
        manager.prepare(sum(drawn) + 1)


def prepared(**options):
    chat = questions(80, 1, session_id="s")
    noise = [*questions(3, 1), TrainingSample(query="x y", label=0, quality=0.1), *questions(20, 2)]
    same = [TrainingSample(query=f"{chat[i].query} ", label=0) for i in (3, 4)]
    manager = TrainingDataManager(
        [DataSource("chat", chat), DataSource("web", lambda: iter([*noise[3:], *same]))],
        [TemplateParaphrase(copies=2), WordDropout(0.2), CharacterNoise(0.1)],
        [Length(min_words=2), Score(0.5), Duplicates(), NearDuplicates(0.9)],
        seed=3,
    )
    return manager.prepare(**options)


def test_every_sample_is_accounted_for():
    dataset, report = prepared(validation=0.25)
    flow = None
    for row in report.rows:
        lost = sum(row["reasons"].values())
        if row["kind"] == "variation":
            copies = 2 if row["name"] == "template_paraphrase" else 1
            assert row["rows_in"] * copies == row["rows_out"] + lost
        else:
            assert row["rows_in"] == row["rows_out"] + lost
        if row["kind"] == "filter":
            assert flow is None or row["rows_in"] == flow
            flow = row["rows_out"]
    by_name = {(row["kind"], row["name"]): row for row in report.rows}
    assert by_name["filter", "score"]["reasons"] == {"score too low": 1}
    assert by_name["filter", "duplicates"]["reasons"] == {"same text": 2}
    assert report.examples == len(dataset)
    assert report.validation == len(dataset.validation)
    assert report.variations == sum(1 for s in dataset if s.parent_id)
    assert report.examples + report.validation - report.variations == flow
    assert json.loads(json.dumps(report.to_dict())) == dataset.metadata["prepared"]
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 2
    assert "score too low" in str(report)
    assert f"{len(dataset)} to train on" in lines[-1]


def test_the_same_settings_prepare_the_same_dataset():
    assert prepared()[0] == prepared()[0]


def test_nothing_held_out_is_varied():
    dataset, _ = prepared(validation=0.3)
    held = {s.id for s in dataset.validation}
    assert not any(s.parent_id for s in dataset.validation)
    assert not any(s.root_id in held for s in dataset)
    texts = {(s.query or "").split().__str__() for s in dataset.validation}
    assert not any((s.query or "").split().__str__() in texts for s in dataset)


class Shout:
    """A variation that says what a held-out sample says."""

    name = "shout"
    copies = 1
    changes_text = True

    def __init__(self, query):
        self.query = query

    def make(self, sample, copy, rng):
        return sample.replace(query=self.query)


def test_a_variation_that_repeats_a_held_out_text_is_dropped():
    rows = questions(20)
    held = AdapterDataset([TrainingSample(query="the very text", label=1, id="h")])
    manager = TrainingDataManager([DataSource("a", rows)], [Shout("The very  TEXT")])
    dataset, report = manager.prepare(validation=held)
    assert report.rows[-1]["reasons"] == {"text of a held-out sample": 20}
    assert len(dataset) == 20
    assert dataset.validation.texts("id") == ["h"]


def test_leakage_is_refused_not_hidden():
    rows = questions(20)
    manager = TrainingDataManager([DataSource("a", rows)])
    with pytest.raises(LeakageError, match="'0-3'"):
        manager.prepare(validation=AdapterDataset([rows[3]]))
    with pytest.raises(LeakageError, match="the same text"):
        manager.prepare(validation=AdapterDataset([rows[3].replace(id="other")]))
    with pytest.raises(LeakageError, match="variation"):
        manager.prepare(validation=AdapterDataset([TrainingSample(query="z", label=0, parent_id="0-3")]))
    copies = [row.replace(id=f"c{row.id}") for row in rows]
    with pytest.raises(LeakageError, match="the same text"):
        TrainingDataManager([DataSource("a", [*rows, *copies])]).prepare()


def test_sources_may_share_a_sample_but_not_an_id():
    rows = questions(5)
    both = [DataSource("a", rows), DataSource("b", rows[:2])]
    dataset, report = TrainingDataManager(both).prepare(validation=None)
    assert len(dataset) == 5
    assert report.rows[2]["reasons"] == {"same sample": 2}
    both[1] = DataSource("b", [rows[0].replace(query="another")])
    with pytest.raises(ConfigError, match="two different samples"):
        TrainingDataManager(both).prepare()


def test_domains_choose_sources():
    sources = [DataSource("a", questions(5, 1), domains=("code",)), DataSource("b", questions(5, 2))]
    assert len(TrainingDataManager(sources).prepare(validation=None, domain="code")[0]) == 10
    law = [*sources, DataSource("c", questions(5, 3), domains=("law",))]
    assert len(TrainingDataManager(law).prepare(validation=None, domain="law")[0]) == 10
    for some in (sources, sources[:1], sources[1:]):
        with pytest.raises(ConfigError, match="domain: got 'law', expected one that a source names"):
            TrainingDataManager(some).prepare(domain="law")


@pytest.mark.parametrize("what", ["filters", "variations"])
def test_a_class_is_no_filter(what):
    from microlora.data import Duplicates, WordDropout

    cls = Duplicates if what == "filters" else WordDropout
    with pytest.raises(ConfigError, match=rf"{what}\[0\]: got .*{cls.__name__}.*as {cls.__name__}\(\) makes"):
        TrainingDataManager([DataSource("a", questions(5, 1))], **{what: [cls]})


def test_texts_and_their_variations_become_vectors():
    rows = [s.replace(label=None, response="fine") for s in questions(30)]
    manager = TrainingDataManager([DataSource("a", rows)], [WordDropout(0.3)])
    dataset, _ = manager.prepare(encoder=Words(), validation=0.3)
    assert dataset.has_arrays
    for part in (dataset, dataset.validation):
        for s in list(part)[:5]:
            plain = TrainingSample(query=s.query, response=s.response).encoded(Words())
            np.testing.assert_array_equal(s.input_embedding, plain.input_embedding)
            np.testing.assert_array_equal(s.output_embedding, plain.output_embedding)
    vectors = [s.encoded(Words()) for s in rows]
    with pytest.raises(ConfigError, match=r"encoder: got None.*word_dropout"):
        TrainingDataManager([DataSource("a", vectors)], [WordDropout(0.3)]).prepare()
    assert (
        len(TrainingDataManager([DataSource("a", vectors)], [WordDropout()]).prepare(encoder=Words())[0]) > 30
    )


def test_what_prepare_refuses():
    with pytest.raises(ConfigError, match="no sample passed"):
        TrainingDataManager([DataSource("a", questions(5))], filters=[Score(1.0, of=lambda s: 0)]).prepare()
    with pytest.raises(ConfigError, match="source 'a': has 5 samples, expected 6"):
        TrainingDataManager([DataSource("a", questions(5))]).prepare(6)
    with pytest.raises(ConfigError, match="would be empty"):
        TrainingDataManager([DataSource("a", questions(1))]).prepare()
    mixed = [TrainingSample([1.0], label=0, id="a"), TrainingSample([1.0, 2.0], label=0, id="b")]
    with pytest.raises(ShapeError, match="width"):
        TrainingDataManager([DataSource("a", mixed)]).prepare()
    bad = type("Bad", (), {"name": "bad", "check": lambda self, samples: []})()
    with pytest.raises(ConfigError, match="gave 0 answers"):
        TrainingDataManager([DataSource("a", questions(5))], filters=[bad]).prepare()
