"""From text to counted features: words, split at camelCase and snake_case, and their character 4-grams."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from microlora.encoders.sparse import Csr
from microlora.exceptions import ConfigError, DTypeError
from microlora.progress import CancelToken

__all__ = ["check_texts", "count_features", "split_words"]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_GRAM = 4
_BLOCK = 512  # texts counted at a time, which bounds the memory of counting


def split_words(text: str) -> list[str]:
    """Lower-case words of ``text``; ``HTTPServer.do_GET`` gives http, server, do, get."""
    return [word.lower() for word in _WORD.findall(text)]


def check_texts(texts: Sequence[str], name: str = "texts") -> list[str]:
    """``texts`` as a list.

    Raises:
        ConfigError: it is a single string, which would be taken letter by letter.
        DTypeError: an item is not a string; the message gives its place.
    """
    if isinstance(texts, (str, bytes)):
        raise ConfigError(f"{name} is one {type(texts).__name__}; a sequence of str is wanted: [text]")
    out = list(texts)
    for i, text in enumerate(out):
        if not isinstance(text, str):
            raise DTypeError(f"{name}[{i}] is {type(text).__name__}; str is wanted")
    return out


def _title(text: str) -> tuple[str, str]:
    """A text of several lines has a title: its first line up to the first bracket, if any."""
    head, newline, _ = text.partition("\n")
    if not newline:
        return "", text
    title = head.partition("(")[0]
    return title, text[len(title) :]


def _columns_of(word: str, buckets: int) -> list[int]:
    """The word's own column, then those of its 4-grams, which live in a second space of ``buckets``."""
    padded = f" {word} "
    grams = (padded[i : i + _GRAM] for i in range(len(padded) - _GRAM + 1))
    return [zlib.crc32(word.encode("utf-8", "replace")) % buckets] + [
        buckets + zlib.crc32(gram.encode("utf-8", "replace")) % buckets for gram in grams
    ]


def count_features(
    texts: Sequence[str], buckets: int, title_weight: float, cancel: CancelToken | None = None
) -> Csr:
    """Count each text's words and 4-grams.

    CRC-32 chooses the column (feature hashing, Weinberger et al. 2009), so that the same text has the same
    features on every machine and no vocabulary need be kept.

    Args:
        texts: n strings.
        buckets: columns for words; as many follow for 4-grams.
        title_weight: how often a word counts in the title of a text of several lines, which is its first
            line up to an opening bracket: the name of a function, or the heading of a page.
        cancel: looked at every few hundred texts.

    Returns:
        Counts, (n, 2 * buckets).
    """
    parts = []
    for lo in range(0, len(texts), _BLOCK):
        if cancel is not None:
            cancel.raise_if_cancelled("encoding")
        parts.append(_count_block(texts[lo : lo + _BLOCK], buckets, title_weight))
    return Csr.stack(parts, 2 * buckets)


def _count_block(texts: Sequence[str], buckets: int, title_weight: float) -> Csr:
    word_ids: dict[str, int] = {}
    ids: list[int] = []
    lengths: list[int] = []
    title_lengths: list[int] = []
    for text in texts:
        title, rest = _title(text)
        head, tail = split_words(title), split_words(rest)
        ids.extend(word_ids.setdefault(word, len(word_ids)) for word in head)
        ids.extend(word_ids.setdefault(word, len(word_ids)) for word in tail)
        lengths.append(len(head) + len(tail))
        title_lengths.append(len(head))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    in_title = np.arange(len(ids)) - np.repeat(starts, lengths) < np.repeat(title_lengths, lengths)
    weights = np.where(in_title, title_weight, 1.0)

    # one row of columns for each distinct word, then each use of the word stands for its row
    per_word = [_columns_of(word, buckets) for word in word_ids]
    sizes = np.array([len(columns) for columns in per_word], np.int64)
    flat = np.array([column for columns in per_word for column in columns], np.int64)
    used = np.array(ids, np.int64)
    repeat = sizes[used]
    first = (np.cumsum(sizes) - sizes)[used]
    within = np.arange(int(repeat.sum())) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    cols = flat[np.repeat(first, repeat) + within]
    shape = (len(lengths), 2 * buckets)
    return Csr.from_triples(np.repeat(rows, repeat), cols, np.repeat(weights, repeat), shape)
