"""Search pairs from the running interpreter's standard library: a docstring's first sentence and its code."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from microlora.exceptions import ConfigError
from microlora.progress import CancelToken, Progress

__all__ = ["Corpus", "Pair", "Split", "read_corpus", "split_corpus"]

_SKIPPED = frozenset({"test", "tests", "_vendor", "site-packages", "dist-packages"}) | frozenset(
    {"idlelib", "lib2to3", "__phello__", "turtledemo", "tkinter"}
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n\s*\n")
_BODY_CHARACTERS = 700


@dataclass(frozen=True, slots=True)
class Pair:
    """One function of the library.

    Attributes:
        query: the first sentence of its docstring.
        code: ``name(arguments):`` and the body without the docstring, cut at 700 characters.
        module: its top-level module, which serves as the persona.
        where: its dotted name, to show.
    """

    query: str
    code: str
    module: str
    where: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """All pairs, in the order of files and of the code in them."""

    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def queries(self) -> list[str]:
        """The query of each pair."""
        return [pair.query for pair in self.pairs]

    @property
    def documents(self) -> list[str]:
        """The code of each pair."""
        return [pair.code for pair in self.pairs]

    def largest_modules(self, n: int) -> list[str]:
        """The n modules with most pairs, largest first, equals by name.

        Raises:
            ConfigError: n is not from 1 to the number of modules that have at least 4 pairs.
        """
        counts = Counter(pair.module for pair in self.pairs)
        ranked = sorted((m for m, c in counts.items() if c >= 4), key=lambda m: (-counts[m], m))
        if not 1 <= n <= len(ranked):
            raise ConfigError(f"personas is {n}; from 1 to {len(ranked)} can be had from this library")
        return ranked[:n]


@dataclass(frozen=True, slots=True)
class Split:
    """Each module's pairs, half as the stream of clicks in its order, half held out; int64 indices."""

    stream: dict[str, npt.NDArray[np.int64]]
    held_out: dict[str, npt.NDArray[np.int64]]

    def all_stream(self) -> npt.NDArray[np.int64]:
        """The stream pairs of every module, in increasing order: queries that may be seen unlabelled."""
        return np.sort(np.concatenate(list(self.stream.values())))


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of the module and of its classes, with their qualified names, in the order of the source."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child

    yield from walk(tree, "")


def _pairs_of(source: str, module: str, dotted: str) -> Iterator[Pair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    for qualified, node in _functions(tree):
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2:
            continue
        query = _SENTENCE_END.split(doc.strip())[0].replace("\n", " ").strip()
        if 4 <= len(query.split()) <= 40:
            body = ast.unparse(ast.Module(node.body[1:], []))[:_BODY_CHARACTERS]
            code = f"{node.name}({ast.unparse(node.args)}):\n{body}"
            yield Pair(query, code, module, f"{dotted}.{qualified}")


def read_corpus(
    root: Path | None = None, *, progress: Progress | None = None, cancel: CancelToken | None = None
) -> Corpus:
    """Read every function with a docstring and a body; of equal queries the first is kept.

    Tests, vendored code and the graphical packages are left out. Python 3.11 gives about 4,470 pairs in 3 s.

    Args:
        root: folder of Python files; the standard library by default.
        progress: called with (files done, files in all, what).
        cancel: looked at between files.

    Raises:
        ConfigError: no pair was found, for instance where the library is stored without its sources.
        CancelledError: ``cancel`` was set.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    files = [f for f in sorted(root.rglob("*.py")) if not _SKIPPED & set(f.relative_to(root).parts)]
    found: dict[str, Pair] = {}
    for i, file in enumerate(files):
        if cancel is not None:
            cancel.raise_if_cancelled("reading the standard library")
        if progress is not None and i % 16 == 0:
            progress(i, len(files), "reading the standard library")
        try:
            source = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        parts = file.relative_to(root).with_suffix("").parts
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        for pair in _pairs_of(source, parts[0], dotted):
            found.setdefault(pair.query, pair)
    if not found:
        raise ConfigError(f"no function with a docstring was found under {root}")
    if progress is not None:
        progress(len(files), len(files), "reading the standard library")
    return Corpus(tuple(found.values()))


def split_corpus(modules: Sequence[str], seed: int) -> Split:
    """Halve each module's pairs at random: a stream, in random order, and the held-out rest.

    Args:
        modules: the module of each pair.
        seed: of the one permutation that decides it all.
    """
    names = np.asarray(modules)
    order = np.random.default_rng(seed).permutation(len(names))
    stream, held_out = {}, {}
    for module in sorted(set(modules)):
        mine = order[names[order] == module]
        stream[module], held_out[module] = mine[: len(mine) // 2], mine[len(mine) // 2 :]
    return Split(stream, held_out)
