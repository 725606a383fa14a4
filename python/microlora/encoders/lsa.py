"""Latent semantic analysis: TF-IDF over hashed words and 4-grams, reduced by a randomized SVD."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from microlora.encoders import store
from microlora.encoders.features import check_texts, count_features
from microlora.encoders.settings import LsaSettings
from microlora.encoders.sparse import Csr
from microlora.encoders.svd import right_singular_vectors
from microlora.exceptions import ConfigError, FormatError
from microlora.progress import CancelToken, Progress

__all__ = ["LsaEncoder"]

_ENCODE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class _State:
    columns: npt.NDArray[np.int64]  # hashed columns in use, increasing
    scale: npt.NDArray[np.float32]  # idf times the weight of the column's kind
    projection: npt.NDArray[np.float32]  # (columns, dim)
    key: str


class LsaEncoder:
    """Text to vectors by latent semantic analysis (Deerwester et al. 1990), with NumPy alone.

    Words and their character 4-grams are hashed to columns, weighted (1 + log count) * idf, scaled to length
    1 and projected on the leading right singular vectors of the fitted texts' matrix, which come from a
    randomized SVD (Halko, Martinsson & Tropp 2011). The same texts, settings and NumPy give the same bits;
    on another machine the last bits may differ, as its BLAS sums in another order.

    Cost: for the 4,472 functions of Python 3.11's standard library, of which 10,866 columns are in use, `fit`
    takes about 4 s on one core and at its peak 145 MB beyond the texts. That peak is near
    ``(dim + oversample) * (12 * columns + 28 * len(texts))`` bytes plus 50 MB, with at most ``2 * buckets``
    columns. The fitted encoder holds ``4 * dim * columns`` bytes, 17 MB there, as does its file.
    """

    def __init__(
        self,
        dim: int = 384,
        *,
        buckets: int = 1 << 15,
        title_weight: float = 4.0,
        gram_weight: float = 0.75,
        min_documents: int = 2,
        power: int = 2,
        oversample: int = 20,
        seed: int = 0,
    ) -> None:
        """Choose the settings; `fit` or `load` makes the encoder usable.

        Args:
            dim: length of the vectors; with fewer independent texts the last ones are zero.
            buckets: hashed columns for words, and as many for 4-grams.
            title_weight: how often a word counts in a text's title, the first line of several up to ``(``.
            gram_weight: weight of a 4-gram against a word.
            min_documents: features of fewer texts are dropped.
            power: power iterations of the randomized SVD.
            oversample: extra random directions of the randomized SVD.
            seed: of its random directions.

        Raises:
            ConfigError: a setting is out of its range.
        """
        self._settings = LsaSettings(
            dim, buckets, title_weight, gram_weight, min_documents, power, oversample, seed
        )
        self._settings.check()
        self._state: _State | None = None

    @property
    def name(self) -> str:
        """``"lsa"``."""
        return "lsa"

    @property
    def dim(self) -> int:
        """Length of each vector."""
        return self._settings.dim

    @property
    def fitted(self) -> bool:
        """Whether `encode` may be called."""
        return self._state is not None

    @property
    def fitted_key(self) -> str | None:
        """`key` of what it was fitted on; None before `fit`."""
        return None if self._state is None else self._state.key

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as a plain dict."""
        return asdict(self._settings)

    def __repr__(self) -> str:
        columns = "not fitted" if self._state is None else f"{len(self._state.columns)} columns"
        return f"LsaEncoder(dim={self.dim}, {columns})"

    def key(self, texts: Sequence[str]) -> str:
        """Hash (SHA-256, hex) of the settings and of ``texts`` in their order: the name of a cached fit."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for text in check_texts(texts):
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        return digest.hexdigest()

    def fit(
        self, texts: Sequence[str], *, progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> LsaEncoder:
        """Learn columns, idf and projection from ``texts``; an earlier fit is replaced only on success.

        Args:
            texts: n >= 1 strings.
            progress: called with (steps done, steps in all, what).
            cancel: looked at between steps.

        Returns:
            This encoder.

        Raises:
            ConfigError: no text, or none with a feature that ``min_documents`` of them share.
            DTypeError: an item is not a string.
            CancelledError: ``cancel`` was set.
        """
        texts = check_texts(texts)
        if not texts:
            raise ConfigError("texts is empty; at least one text is wanted")
        s = self._settings
        steps = 2 * s.power + 4
        tell = progress or (lambda _done, _total, _what: None)
        tell(0, steps, "counting words")
        counts = count_features(texts, s.buckets, s.title_weight, cancel)
        frequency = np.bincount(counts.indices, minlength=counts.columns)
        columns = np.flatnonzero(frequency >= s.min_documents)
        if not len(columns):
            raise ConfigError(
                f"texts have no feature that min_documents={s.min_documents} of them share; nothing to fit"
            )
        idf = np.log((1 + len(texts)) / (1 + frequency[columns])) + 1
        scale = (idf * np.where(columns < s.buckets, 1.0, s.gram_weight)).astype(np.float32)
        matrix = self._weigh(counts, columns, scale)
        del counts

        def step(done: int) -> None:
            if cancel is not None:
                cancel.raise_if_cancelled("fitting the encoder")
            tell(done + 1, steps, "randomized SVD")

        projection = right_singular_vectors(matrix, s.dim, s.power, s.oversample, s.seed, step)
        self._state = _State(columns, scale, projection, self.key(texts))
        tell(steps, steps, "encoder fitted")
        return self

    @staticmethod
    def _weigh(counts: Csr, columns: npt.NDArray[np.int64], scale: npt.NDArray[np.float32]) -> Csr:
        kept = counts.keep_columns(columns)
        # a count below 1 comes only from a title weight below 1; its logarithm would be negative
        tf = np.where(kept.data >= 1, 1 + np.log(np.maximum(kept.data, 1)), kept.data)
        return Csr(kept.indptr, kept.indices, tf * scale[kept.indices], kept.columns).normalized()

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of ``texts``.

        Returns:
            float32 (len(texts), dim), rows of length 1; a text of which nothing is known gives zeros.

        Raises:
            ConfigError: the encoder was not fitted, or ``texts`` is a single string.
            DTypeError: an item is not a string.
        """
        if self._state is None:
            raise ConfigError("the encoder is not fitted; call fit(texts), or LsaEncoder.load(path)")
        texts = check_texts(texts)
        state, s = self._state, self._settings
        out = np.zeros((len(texts), s.dim), np.float32)
        for lo in range(0, len(texts), _ENCODE_BLOCK):
            block = texts[lo : lo + _ENCODE_BLOCK]
            counts = count_features(block, s.buckets, s.title_weight)
            out[lo : lo + len(block)] = self._weigh(counts, state.columns, state.scale).dot(state.projection)
        lengths = np.linalg.norm(out, axis=1, keepdims=True)
        out /= np.where(lengths > 1e-6, lengths, np.inf)
        return out

    def save(self, path: str | Path) -> None:
        """Write the fitted encoder as ``.npz``, through a temporary sibling and a rename.

        Raises:
            ConfigError: not fitted.
            OSError: the file cannot be written; an older file at ``path`` is untouched.
        """
        if self._state is None:
            raise ConfigError("the encoder is not fitted; there is nothing to save")
        state = self._state
        arrays: dict[str, npt.NDArray[Any]] = {
            "columns": state.columns,
            "scale": state.scale,
            "projection": state.projection,
        }
        store.write(Path(path), {"settings": self.settings, "key": state.key}, arrays)

    @classmethod
    def load(cls, path: str | Path) -> LsaEncoder:
        """Read an encoder that `save` wrote.

        Raises:
            FormatError: the file is not one; the message says why. Pickled data are refused.
            OSError: the file cannot be read.
        """
        meta, arrays = store.read(Path(path), ("columns", "scale", "projection"))
        try:
            encoder = cls(**meta["settings"])
            key = str(meta["key"])
        except (KeyError, TypeError, ConfigError) as err:
            raise FormatError(f"{path}: settings cannot be used: {err}") from err
        columns, scale, projection = arrays["columns"], arrays["scale"], arrays["projection"]
        n = len(columns) if columns.ndim == 1 else -1
        store.check(path, "columns", columns, np.int64, (n,))
        store.check(path, "scale", scale, np.float32, (n,))
        store.check(path, "projection", projection, np.float32, (n, encoder.dim))
        if n < 1 or columns[0] < 0 or columns[-1] >= 2 * encoder._settings.buckets:
            raise FormatError(f"{path}: columns lie outside 0 to {2 * encoder._settings.buckets - 1}")
        if (np.diff(columns) <= 0).any():
            raise FormatError(f"{path}: columns are not increasing")
        encoder._state = _State(columns, scale, projection, key)
        return encoder
