"""The encoder of text against dense and exact twins, its files, and bad input."""

from __future__ import annotations

import io
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlora.encoders import LsaEncoder, TextEncoder, encode_checked, fit_cached
from microlora.encoders.features import count_features, split_words
from microlora.encoders.sparse import Csr
from microlora.encoders.svd import right_singular_vectors
from microlora.exceptions import (
    CancelledError,
    ConfigError,
    DTypeError,
    FormatError,
    NonFiniteError,
    ShapeError,
)
from microlora.progress import CancelToken

TEXTS = [
    "open(path):\nreturn file_handle(path)",
    "openFile(name, mode):\nhandle = open(name)\nreturn handle",
    "parse_header(line):\nkey, value = line.split(':')\nreturn key, value",
    "parseHeaders(lines):\nreturn [parse_header(line) for line in lines]",
    "send_message(sock, message):\nsock.send(message)",
    "sendAll(sock, messages):\nfor message in messages:\n    send_message(sock, message)",
    "close(handle):\nhandle.close()",
    "read lines of a file",
]


@pytest.fixture(scope="module")
def fitted():
    return LsaEncoder(4, min_documents=1).fit(TEXTS)


def dense(matrix):
    out = np.zeros(matrix.shape)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    np.add.at(out, (rows, matrix.indices), matrix.data)
    return out


triples = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(-4, 4)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(triples, st.integers(0, 10**6))
def test_sparse_products_equal_the_dense_ones(items, seed):
    rows, cols, values = (
        np.array(x, np.int64) for x in (zip(*items, strict=True) if items else ([], [], []))
    )
    want = np.zeros((6, 9))
    np.add.at(want, (rows, cols), values)
    got = Csr.from_triples(rows, cols, values, (6, 9))
    rng = np.random.default_rng(seed)
    right, left = rng.standard_normal((9, 3), np.float32), rng.standard_normal((6, 3), np.float32)
    np.testing.assert_allclose(dense(got), want)
    np.testing.assert_allclose(got.dot(right), want @ right, atol=1e-4)
    np.testing.assert_allclose(got.transpose().dot(left), want.T @ left, atol=1e-4)
    np.testing.assert_allclose(dense(Csr.stack([got, got], 9)), np.vstack([want, want]))
    kept = np.array([1, 4, 8])
    np.testing.assert_allclose(dense(got.keep_columns(kept)), want[:, kept])
    lengths = np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(dense(got.normalized()), want / np.where(lengths > 0, lengths, 1), atol=1e-6)


def test_a_product_of_many_blocks_equals_the_dense_one():
    rng = np.random.default_rng(0)
    want = np.where(rng.random((400, 300)) < 0.5, rng.standard_normal((400, 300)), 0).astype(np.float32)
    want[7] = 0
    rows, cols = np.nonzero(want)
    right = rng.standard_normal((300, 5), np.float32)
    got = Csr.from_triples(rows, cols, want[rows, cols], want.shape).dot(right)
    np.testing.assert_allclose(got, want.astype(np.float64) @ right, atol=1e-4)
    assert not got[7].any()


def test_singular_vectors_equal_numpys():
    rng = np.random.default_rng(1)
    spectrum = 0.8 ** np.arange(40)
    u, v = (np.linalg.qr(rng.standard_normal((n, 40))).Q for n in (60, 50))
    want = (u * spectrum) @ v.T
    rows, cols = np.nonzero(want)
    got = right_singular_vectors(
        Csr.from_triples(rows, cols, want[rows, cols], want.shape), 8, 3, 20, 0, lambda _: None
    )
    np.testing.assert_allclose(got.T @ got, np.eye(8), atol=1e-4)
    np.testing.assert_allclose(np.abs(got.T @ v[:, :8]), np.eye(8), atol=2e-3)
    assert (got[np.abs(got).argmax(0), np.arange(8)] > 0).all()


def test_words_split_at_case_and_underscore():
    assert split_words("HTTPServer.do_GET2 naïveÜbung x") == [
        "http", "server", "do", "get", "2", "naïveübung", "x"
    ]  # fmt: skip


def test_counts_equal_a_plain_count():
    buckets, weight = 97, 3.0
    got = dense(count_features(TEXTS, buckets, weight))
    want = np.zeros_like(got)
    for row, text in enumerate(TEXTS):
        head = text.partition("\n")[0].partition("(")[0] if "\n" in text else ""
        for part, w in ((head, weight), (text[len(head) :], 1.0)):
            for word in re.findall(r"[A-Z]?[a-z]+", part):
                word = word.lower()
                want[row, zlib.crc32(word.encode()) % buckets] += w
                for i in range(len(word) - 1):
                    want[row, buckets + zlib.crc32(f" {word} "[i : i + 4].encode()) % buckets] += w
    np.testing.assert_allclose(got, want)


def test_encode_equals_a_dense_float64_twin(fitted):
    counts = dense(count_features(TEXTS, 1 << 15, 4.0))
    df = (counts > 0).sum(0)
    used = df >= 1
    tf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)[:, used]
    idf = np.log((1 + len(TEXTS)) / (1 + df[used])) + 1
    x = tf * idf * np.where(np.flatnonzero(used) < 1 << 15, 1, 0.75)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    v = np.linalg.svd(x, full_matrices=False)[2][:4].T
    want = x @ v
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    got = fitted.encode(TEXTS)
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-4)


def test_vectors_have_length_one_and_rows_are_independent(fitted):
    got = fitted.encode(TEXTS)
    assert got.dtype == np.float32
    assert got.shape == (8, 4)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    one_by_one = np.vstack([fitted.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(one_by_one, got, atol=1e-6)


def test_like_texts_are_near(fitted):
    messages, header = fitted.encode(["send the messages", "parse header lines"])
    documents = fitted.encode(TEXTS)
    assert int((documents @ messages).argmax()) in (4, 5)
    assert int((documents @ header).argmax()) in (2, 3)


def test_edges(fitted):
    assert fitted.encode([]).shape == (0, 4)
    assert not fitted.encode(["", "zzqx"]).any()
    wide = LsaEncoder(64, min_documents=1).fit(TEXTS)
    got = wide.encode(TEXTS)
    assert got.shape == (8, 64)
    assert not got[:, 8:].any()
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert fitted.encode(["\ud800 open"]).any()


def test_same_seed_same_bits_other_seed_same_space(fitted):
    again = LsaEncoder(4, min_documents=1).fit(TEXTS)
    assert (again.encode(TEXTS) == fitted.encode(TEXTS)).all()
    other = LsaEncoder(4, min_documents=1, seed=5).fit(TEXTS).encode(TEXTS)
    np.testing.assert_allclose(other @ other.T, fitted.encode(TEXTS) @ fitted.encode(TEXTS).T, atol=1e-3)


def test_it_is_a_text_encoder(fitted):
    assert isinstance(fitted, TextEncoder)
    assert (fitted.name, fitted.dim) == ("lsa", 4)
    assert "columns" in repr(fitted)
    assert "not fitted" in repr(LsaEncoder())


def test_saved_and_loaded_gives_the_same_bits(fitted, tmp_path):
    path = tmp_path / "e.npz"
    fitted.save(path)
    loaded = LsaEncoder.load(path)
    assert (loaded.encode(TEXTS) == fitted.encode(TEXTS)).all()
    assert loaded.settings == fitted.settings
    assert [f.name for f in tmp_path.iterdir()] == ["e.npz"]


def test_a_failed_save_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    path = tmp_path / "e.npz"
    path.write_bytes(b"old")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        fitted.save(path)
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["e.npz"]


def test_cache_is_used_and_told_apart(tmp_path):
    def fit(encoder, texts=TEXTS):
        return fit_cached(encoder, texts, tmp_path / "new")

    first, from_file = fit(LsaEncoder(4, min_documents=1))
    assert not from_file
    second, from_file = fit(LsaEncoder(4, min_documents=1))
    assert from_file
    assert (first.encode(TEXTS) == second.encode(TEXTS)).all()
    assert not fit(LsaEncoder(4, min_documents=1), TEXTS[:-1])[1]
    assert not fit(LsaEncoder(5, min_documents=1))[1]
    for file in (tmp_path / "new").iterdir():
        file.write_bytes(b"damaged")
    assert not fit(LsaEncoder(4, min_documents=1))[1]
    assert fit(LsaEncoder(4, min_documents=1))[1]


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _rewrite(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, value in changes.items():
        arrays[name] = value(arrays[name])
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:500]),
        lambda p: _rewrite(p, meta=lambda m: np.array(str(m).replace("microlora-encoder", "another"))),
        lambda p: p.write_bytes(_npy(np.zeros(3))),
        lambda p: np.savez(p, meta=np.array(["x"], dtype=object), columns=np.zeros(1)),
        lambda p: np.savez(p, meta=np.array("{}")),
        lambda p: _rewrite(p, meta=lambda m: np.array(str(m).replace('"version": 1', '"version": 2'))),
        lambda p: _rewrite(p, meta=lambda m: np.array(str(m).replace('"dim": 4', '"dim": 0'))),
        lambda p: _rewrite(p, projection=lambda a: a * np.float32(np.nan)),
        lambda p: _rewrite(p, projection=lambda a: a.astype(np.float64)),
        lambda p: _rewrite(p, scale=lambda a: a[1:]),
        lambda p: _rewrite(p, columns=lambda a: a[::-1]),
        lambda p: _rewrite(p, columns=lambda a: a + (1 << 17)),
        lambda p: _rewrite(p, columns=lambda a: a[:, None]),
    ],
)
def test_a_wrong_file_is_refused_by_name(fitted, tmp_path, damage):
    path = tmp_path / "e.npz"
    fitted.save(path)
    damage(path)
    with pytest.raises(FormatError, match=r"e\.npz"):
        LsaEncoder.load(path)


def test_no_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        LsaEncoder.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dim", 0),
        ("dim", 3.5),
        ("dim", True),
        ("buckets", 0),
        ("title_weight", float("nan")),
        ("title_weight", "4"),
        ("gram_weight", -1.0),
        ("min_documents", 0),
        ("power", -1),
        ("oversample", 10**6),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ConfigError, match=setting):
        LsaEncoder(**{setting: value})


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        ("one string", ConfigError, "sequence"),
        (b"bytes", ConfigError, "sequence"),
        (["a", 3], DTypeError, r"texts\[1\] is int"),
        ([], ConfigError, "empty"),
        (["", "!"], ConfigError, "min_documents"),
    ],
)
def test_texts_that_cannot_be_fitted(fitted, texts, error, words):
    encoder = LsaEncoder(4, min_documents=1).fit(TEXTS)
    with pytest.raises(error, match=words):
        encoder.fit(texts)
    assert (encoder.encode(TEXTS) == fitted.encode(TEXTS)).all()


def test_not_fitted_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"fit\(texts\)"):
        LsaEncoder().encode(["x"])
    with pytest.raises(ConfigError, match="not fitted"):
        LsaEncoder().save(tmp_path / "e.npz")


def test_progress_rises_to_its_total_and_cancel_leaves_nothing(tmp_path):
    seen = []
    LsaEncoder(4, min_documents=1).fit(TEXTS, progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]

    for after in (0, 1, 3):
        token = CancelToken()
        encoder = LsaEncoder(4, min_documents=1)
        with pytest.raises(CancelledError):
            fit_cached(
                encoder,
                TEXTS,
                tmp_path,
                progress=lambda d, _t, _m, n=after, token=token: token.cancel() if d >= n else None,
                cancel=token,
            )
        assert not encoder.fitted
        assert not list(tmp_path.iterdir())


class Foreign:
    name = "foreign"
    dim = 3

    def __init__(self, result):
        self.result = result

    def encode(self, texts):
        return self.result


def test_a_foreign_encoder_is_held_to_its_contract():
    got = encode_checked(Foreign([[3.0, 0, 4], [0, 0, 0]]), ["a", "b"])
    np.testing.assert_allclose(got, [[0.6, 0, 0.8], [0, 0, 0]], atol=1e-6)
    for bad, error in (
        (np.zeros((1, 3)), ShapeError),
        (np.zeros((2, 4)), ShapeError),
        (np.full((2, 3), np.inf), NonFiniteError),
        ("no array", ConfigError),
        (None, (ConfigError, ShapeError)),
    ):
        with pytest.raises(error, match="foreign"):
            encode_checked(Foreign(bad), ["a", "b"])
