"""What a file holds, gathered once for all checks, however broken it is."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import microlora._core as _core
from microlora._checks import read_json
from microlora.adapter import Adapter
from microlora.doctor.base import Base
from microlora.doctor.names import Key, is_foreign, key_of, ours
from microlora.exceptions import FormatError, MicroLoraError, UnsupportedVariantError
from microlora.files import load
from microlora.formats.file import AdapterFile
from microlora.formats.limits import Limits
from microlora.quantized import QuantizedAdapter

__all__ = ["CONFIG", "WEIGHTS", "Facts", "Module", "Numbers", "Tensor"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
#: Most bytes of a configuration that is read.
MOST_TEXT = 64 << 20
#: Element types that factors may have.
FACTOR_DTYPES = ("F32", "F16", "BF16")
#: Containers that a scan of safetensors names and does not read, and the formats in them.
OTHERS = {"a GGUF file": "gguf", "a NumPy archive": "npz"}
#: What a reader says of a tensor where its container is broken.
TORN = (": truncated", ": offset ", "outside of the file", "appears twice")


class Numbers(NamedTuple):
    """The numbers of a tensor; norms are of the finite ones."""

    norm: float
    max_abs: float
    nan: int
    inf: int
    zeros: int
    fits_f16: bool
    fits_bf16: bool


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file, at its place in the scan."""

    at: int
    key: Key
    dtype: str
    shape: tuple[int, ...]
    numbers: Numbers | None

    @property
    def name(self) -> str:
        """Its key in the file."""
        return self.key.name

    @property
    def bad(self) -> int:
        """How many of its numbers are not finite."""
        return self.numbers.nan + self.numbers.inf if self.numbers else 0

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        out = 1
        for n in self.shape:
            out *= n
        return out


@dataclass
class Module:
    """The factors of one module, found by name, and what the settings say of it."""

    path: str
    kind: str = "linear"
    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    said_rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    norm: float | None = None
    packed: bool = False

    @property
    def whole(self) -> bool:
        """Whether it has one A and one B."""
        return len(self.a) == len(self.b) == 1

    @property
    def rank(self) -> int | None:
        """Rank by its tensors, or None where they do not say one."""
        if not self.whole or self.packed:
            return None
        a, b, lead = self.a[0].shape, self.b[0].shape, int(self.kind == "experts")
        if len(a) < 2 + lead or len(b) < 2 + lead or 0 in a or 0 in b:
            return None
        return a[lead] if a[lead] == b[lead + 1] else None

    @property
    def scaling(self) -> float | None:
        """What the product of its factors is multiplied with."""
        if self.rank is None or self.alpha is None:
            return None
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def delta(self) -> float | None:
        """Frobenius norm of its delta."""
        return None if self.norm is None or self.scaling is None else abs(self.scaling) * self.norm

    @property
    def bad(self) -> int:
        """Numbers that are not finite."""
        return sum(t.bad for t in (*self.a, *self.b))


class Facts:
    """A file as it lies there.

    ``kind`` is ``"peft"`` (a directory of PEFT's, or the weights of one), ``"single"`` (our single file) or
    ``"other"`` (whatever a reader understood, or nothing).
    """

    def __init__(self, path: Path, limits: Limits, base: Base | None) -> None:
        self.path, self.limits, self.base = path, limits, base
        self.found: list[Any] = []  # findings so far, for the last checks
        self.folder: Path | None = None
        self.weights = path
        self.config: dict[str, Any] | None = None
        self.config_error = ""
        self.file: AdapterFile | None = None
        self.refusal: MicroLoraError | None = None
        self.scan: _core.Scan | None = None
        self.expanded = "unknown"  # format of a quantised file, which is looked at as plain numbers
        self.blocks: QuantizedAdapter | None = None  # the same as it is stored
        self._open()
        self.damage = self.scan.damage if self.scan is not None else None
        if self.damage is not None and self.refusal is not None:
            # The scan knows safetensors only; of the others the reader says what is wrong.
            kinds = (kind for what, kind in OTHERS.items() if what in self.damage)
            if kind := next(kinds, ""):
                self.expanded, self.damage = kind, None if self.reader_says_content else str(self.refusal)
        self.header: dict[str, str] = self.scan.header if self.scan is not None else {}
        read = key_of if self.kind != "single" else ours
        rows: list[Any] = self.scan.rows() if self.scan is not None else []
        self.tensors = [
            Tensor(i, read(name), dtype, tuple(shape), Numbers(*n) if n else None)
            for i, (name, dtype, shape, n) in enumerate(rows)
        ]
        self.modules = self._modules()
        if self.kind == "peft" and self.file is not None:
            # What the reader keeps as it lies (packed experts, stacked blocks) is no plain product.
            plain = {m.path for m in self.file.modules}
            for module in self.modules.values():
                module.packed = module.path not in plain
        for module in self.modules.values():
            if module.packed:
                continue
            if module.whole and self.scan is not None:
                a, b = module.a[0].at, module.b[0].at
                module.norm = self.scan.delta_norm(a, b, module.kind == "experts")

    # -- opening ---------------------------------------

    def _open(self) -> None:
        self.path.stat()  # what is not there is the caller's mistake, not a finding
        if self.path.is_dir():
            self.folder = self.path
            self.weights = self.path / WEIGHTS
        elif self.path.name == WEIGHTS and (self.path.parent / CONFIG).exists():
            self.folder = self.path.parent
        self.kind = "other"
        try:
            self.file = AdapterFile.read(self.path, limits=self.limits)
        except MicroLoraError as e:
            self.refusal = e
        self.lenient = self.file
        if self.file is None:
            with contextlib.suppress(MicroLoraError):
                self.lenient = AdapterFile.read(self.path, strict=False, limits=self.limits)
        named: dict[str, Any] = {"names": "gguf"}
        if self.file is not None and self.file.format == "gguf" and self.base and self.base.config:
            # The base's own names, where the package that knows them is there.
            with contextlib.suppress(MicroLoraError):
                config = self.base.config
                self.file = AdapterFile.read(self.path, limits=self.limits, base_config=config)
                named = {"base_config": config}
        if self.file is not None and self.file.format == "gguf":
            with contextlib.suppress(MicroLoraError):
                loaded = load(self.path, limits=self.limits, **named)
                self.blocks = loaded if isinstance(loaded, QuantizedAdapter) else None
        if self.folder is not None and (self.folder / CONFIG).exists():
            self._read_config(self.folder / CONFIG)
        if self.folder is not None and self._is_mlx():
            self.weights = self.folder / MLX_WEIGHTS
        if self.weights.is_file() or not self.weights.is_dir():
            self._scan()

    def _scan(self) -> None:
        if not self.weights.exists():
            self._scan_read()
            return
        self.scan = _core.scan_file(os.fspath(self.weights), self.limits.as_tuple())
        names = [row[0] for row in self.scan.rows()] if self.scan.damage is None else []
        if self.scan.header.get("format") == "microlora":
            self.kind = "single"
            if self.scan.header.get("format_version", "1") != "1":
                self._scan_quantized()
        elif self.file is None and self.reader_says_variant and self.scan.damage is not None:
            self._scan_quantized()
        elif self.file is not None and self.file.format not in ("peft", "safetensors"):
            self._scan_read()
        elif self.folder is not None:
            self.kind = "other" if self._is_mlx() else "peft"
        elif any("lora_A" in n or "lora_B" in n for n in names):
            # Without PEFT's prefix these are the keys of diffusers and of its kin.
            self.kind = "peft" if any(n.startswith("base_model.") for n in names) else "other"

    def _scan_quantized(self) -> None:
        """Blocks are looked at as the numbers that they stand for."""
        ours = self.scan is not None and self.scan.header.get("format") == "microlora"
        self.kind, self.expanded = "other", "safetensors" if ours else "gguf"
        try:
            loaded = load(self.path, limits=self.limits)
            if isinstance(loaded, Adapter):
                self.file = AdapterFile.from_adapter(loaded)
            else:
                self.file, self.blocks = self.file or AdapterFile.from_adapter(loaded), loaded
        except MicroLoraError as e:
            self.file, self.refusal = None, e
        else:
            self.refusal, self.scan = None, _core.Scan.of(self.file)

    def _scan_read(self) -> None:
        if self.file is not None:
            self.scan = _core.Scan.of(self.file)
        elif self.folder is not None and not self._is_mlx():
            self.kind = "peft"

    def _is_mlx(self) -> bool:
        """Whether the settings are MLX's, whose weights have another name."""
        config = self.config or {}
        return "peft_type" not in config and not config.keys().isdisjoint(
            ("fine_tune_type", "lora_parameters")
        )

    def _read_config(self, path: Path) -> None:
        if not path.is_file() or path.stat().st_size > MOST_TEXT:
            self.config_error = "not a file of a sensible size"
            return
        try:
            self.config = read_json(CONFIG, path.read_bytes())
        except (FormatError, UnicodeDecodeError) as e:
            self.config_error = str(e)

    # -- modules ---------------------------------------

    def _modules(self) -> dict[str, Module]:
        found: dict[str, Module] = {}
        for tensor in self.tensors:
            key = tensor.key
            if key.factor:
                kind = "embedding" if key.variant == "embedding" else "linear"
                if kind == "linear" and key.variant:
                    kind = "experts?"  # packed as PEFT packs experts: its numbers are not a plain product
                elif kind == "linear" and len(tensor.shape) > 2:
                    kind = "conv"
                module = found.setdefault(key.path, Module(key.path, kind))
                (module.a if key.factor == "A" else module.b).append(tensor)
        if self.kind == "peft":
            self._scalings_of_config(found)
        elif self.kind == "single":
            self._scalings_of_header(found)
        elif self.file is not None:
            for row in self.file.modules:
                module = found.setdefault(row.path, Module(row.path))
                module.kind, module.said_rank = row.kind, row.rank
                module.alpha, module.rslora = row.alpha, row.use_rslora
        return found

    def _scalings_of_config(self, found: Mapping[str, Module]) -> None:
        if self.config is None:
            return
        paths = list(found)
        ranks, alphas = (self.pattern(name, paths).of for name in ("rank_pattern", "alpha_pattern"))
        rslora = self.config.get("use_rslora") is True
        for path, module in found.items():
            rank = ranks.get(path, self.config.get("r", 8))
            alpha = alphas.get(path, self.config.get("lora_alpha", 8))
            module.said_rank = rank if is_count(rank) else None
            module.alpha = float(alpha) if is_number(alpha) else None
            module.rslora = rslora

    def _scalings_of_header(self, found: Mapping[str, Module]) -> None:
        try:
            rows = read_json("modules", '{"rows": ' + self.header.get("modules", "[]") + "}")["rows"]
        except FormatError:
            return
        for row in rows if isinstance(rows, list) else []:
            module = found.get(str(row.get("path"))) if isinstance(row, dict) else None
            if module is not None:
                module.said_rank = row["rank"] if is_count(row.get("rank")) else None
                module.alpha = float(row["alpha"]) if is_number(row.get("alpha")) else None
                module.rslora = row.get("use_rslora") is True

    class Patterns(NamedTuple):
        """One pattern table against the modules: values by path, keys of no use, keys refused with why."""

        of: dict[str, Any]
        unmatched: list[str]
        refused: list[tuple[str, str]]

    def pattern(self, name: str, paths: Sequence[str] | None = None) -> Facts.Patterns:
        """``rank_pattern`` or ``alpha_pattern`` against the modules of the file."""
        table = (self.config or {}).get(name)
        if not isinstance(table, dict) or not table:
            return Facts.Patterns({}, [], [])
        paths = list(self.modules) if paths is None else paths
        # PEFT matches the wrapper of a wrapped layer.
        outer = [path.split(".base_layer.", 1)[0] for path in paths]
        keys, values = list(table), list(table.values())
        try:
            hits, unmatched, refused = _core.match_patterns(keys, outer)
        except FormatError as e:
            return Facts.Patterns({}, [], [(name, str(e))])
        of = {path: values[hit] for path, hit in zip(paths, hits, strict=True) if hit is not None}
        said = [(keys[i], why) for i, why in refused]
        return Facts.Patterns(of, [keys[i] for i in unmatched], said)

    # -- what several checks ask ---------------------------------------

    @property
    def format(self) -> str:
        """Name of the format, as far as it can be told."""
        if self.file is not None:
            return self.file.format or self.expanded
        known = {"peft": "peft", "single": "safetensors"}
        if self.kind == "other" and self.lenient is not None and self.lenient.format:
            return self.lenient.format
        return known.get(self.kind, "mlx" if self._is_mlx() else self.expanded)

    @cached_property
    def factors(self) -> list[Tensor]:
        """Tensors that are factors."""
        return [t for t in self.tensors if t.key.factor]

    @cached_property
    def foreign(self) -> list[Tensor]:
        """Tensors with keys of another writer than PEFT."""
        return [t for t in self.tensors if self.kind == "peft" and is_foreign(t.name)]

    @cached_property
    def deltas(self) -> dict[str, float]:
        """Norms of deltas by module, where they can be told; without alpha those of the plain products."""
        out = {}
        for path, module in self.modules.items():
            value = module.delta if module.delta is not None else module.norm
            if value is not None and not module.bad:
                out[path] = value
        return out

    @cached_property
    def beside(self) -> list[Path]:
        """Other files of the folder, sorted; symbolic links are not followed."""
        if self.folder is None:
            return []
        return sorted(p for p in self.folder.iterdir() if p.is_symlink() or p.is_file())

    @property
    def reader_says_variant(self) -> bool:
        """Whether the reader refused it as a sound file of another kind."""
        return isinstance(self.refusal, UnsupportedVariantError)

    @property
    def reader_says_content(self) -> bool:
        """Whether the reader refused what the file holds, not how its container lies."""
        said = str(self.refusal).removeprefix(f"{self.path}: ")
        named = isinstance(self.refusal, FormatError) and said.startswith(("tensor ", 'tensors "', "module "))
        return self.reader_says_variant or (named and not any(mark in said for mark in TORN))

    @property
    def reader_knows_style(self) -> bool:
        """Whether the reader knew whose names these are, and refused the file for another reason."""
        knows = isinstance(self.refusal, FormatError) and self.kind == "other"
        return knows and "no tensor has a name of a style" not in str(self.refusal)

    @property
    def unsaid(self) -> str:
        """What the reader has to be told of a sound file, in its words; empty where it is nothing."""
        said = str(self.refusal) if self.file is None and self.refusal is not None else ""
        return said if "; pass alpha=" in said or "; pass orientation=" in said else ""

    def text(self, key: str) -> str:
        """A text of the configuration, empty where there is none."""
        value = (self.config or {}).get(key)
        return value if isinstance(value, str) else ""


def is_count(value: object) -> bool:
    """A whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300


def is_executable(path: Path) -> bool:
    """Whether anybody may run the file."""
    mode = path.stat().st_mode if path.exists() else 0
    return stat.S_ISREG(mode) and bool(mode & 0o111)
