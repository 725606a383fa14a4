"""From the standard library to an encoded task: read, split, fit or fetch the encoder, encode."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlora.demo.corpus import Corpus, read_corpus, split_corpus
from microlora.demo.task import Task
from microlora.encoders import LsaEncoder, TextEncoder, encode_checked, fit_cached
from microlora.exceptions import ConfigError
from microlora.progress import CancelToken, Progress

__all__ = ["Session", "default_cache_dir", "make_encoder", "prepare"]


@dataclass(frozen=True, slots=True)
class Session:
    """A task that is ready, and how it came to be.

    Attributes:
        corpus: the pairs.
        encoder: fitted.
        task: the encoded pairs.
        encoder_seconds: time to fit the encoder or to fetch it, without reading the corpus.
        encoder_cached: whether it came from the cache.
    """

    corpus: Corpus
    encoder: TextEncoder
    task: Task
    encoder_seconds: float
    encoder_cached: bool


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/microlora``, or ``~/.cache/microlora``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "microlora"


def make_encoder(spec: str) -> TextEncoder:
    """An encoder by name.

    Args:
        spec: ``"lsa"``, or ``"module:attribute"``: a callable without arguments that makes a `TextEncoder`.
            If what it makes has a method ``fit``, `prepare` calls it with the documents.

    Raises:
        ConfigError: another name, no such module or attribute, or what it makes is no `TextEncoder`.
    """
    if spec == "lsa":
        return LsaEncoder()
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"encoder is {spec!r}; 'lsa' or 'module:attribute' is wanted")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, TypeError, ValueError) as err:
        raise ConfigError(f"encoder {spec!r} cannot be imported: {err}") from err
    if not callable(factory):
        raise ConfigError(f"encoder {spec!r} is {type(factory).__name__}; a callable is wanted")
    try:
        with contextlib.suppress(ValueError):  # some builtins show no signature
            inspect.signature(factory).bind()
    except TypeError as err:
        raise ConfigError(f"encoder {spec!r} is called without arguments: {err}") from err
    encoder = factory()
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(
            f"encoder {spec!r} made {type(encoder).__name__}, which lacks one of name, dim, encode(texts)"
        )
    return encoder


def prepare(
    encoder: TextEncoder,
    personas: int,
    seed: int,
    cache_dir: Path,
    *,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Session:
    """Read the corpus, split it by ``seed`` and encode it.

    The encoder is fitted on the documents alone: it sees no query, neither held out nor of the stream, so one
    fit serves every split.

    Args:
        encoder: an `LsaEncoder`, cached in ``cache_dir / "encoders"``, or any other.
        personas: the largest modules take part.
        seed: of the split.
        cache_dir: made if need be.
        corpus: pairs to use instead of the standard library's.
        progress: called with (done, total, what) of each phase.
        cancel: looked at between steps.

    Raises:
        ConfigError: more personas than modules, or no corpus.
        CancelledError: ``cancel`` was set.
        OSError: the cache cannot be written.
    """
    corpus = corpus or read_corpus(progress=progress, cancel=cancel)
    names = tuple(corpus.largest_modules(personas))
    documents = corpus.documents
    begin = time.perf_counter()
    cached = False
    if isinstance(encoder, LsaEncoder):
        encoder, cached = fit_cached(
            encoder, documents, cache_dir / "encoders", progress=progress, cancel=cancel
        )
    elif hasattr(encoder, "fit"):
        encoder.fit(documents)
    seconds = time.perf_counter() - begin
    if progress is not None:
        progress(0, None, "encoding the corpus")
    split = split_corpus([pair.module for pair in corpus.pairs], seed)
    task = Task(
        queries=encode_checked(encoder, corpus.queries),
        documents=encode_checked(encoder, documents),
        split=split,
        personas=names,
    )
    return Session(corpus, encoder, task, seconds, cached)
