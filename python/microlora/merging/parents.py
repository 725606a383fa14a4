"""The adapters of a merge: named, loaded, and checked against each other before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import microlora._core as _core
from microlora._checks import text, wrong
from microlora._file_checks import path_text
from microlora.adapter import Adapter, config_of
from microlora.exceptions import ConfigError, DTypeError, ShapeError
from microlora.files import load_plain
from microlora.metadata import AdapterMetadata, utc_now
from microlora.micro_lora import MicroLoRA

__all__ = ["Parents", "as_adapter", "described", "listed"]

_NOTHING = AdapterMetadata()

Source = Adapter | MicroLoRA | str | os.PathLike[str]


def as_adapter(name: str, source: object) -> Adapter:
    """An adapter from an adapter, a learner (as it stands now) or the path of a file.

    Raises:
        DTypeError: Anything else.
        FormatError: A file that is none of an adapter.
        UnsupportedVariantError: One that is not relative to the plain base weights (PiSSA, DoRA ...).
    """
    if isinstance(source, MicroLoRA):
        return source.adapter()
    if isinstance(source, Adapter):
        return source
    if isinstance(source, _core.Adapter):
        return Adapter(source)
    if isinstance(source, str | os.PathLike):
        return load_plain(path_text(name, source))
    if isinstance(source, _core.QuantizedAdapter):
        raise DTypeError(f"{name}: got a quantised adapter, expected plain weights: .dequantize() gives them")
    raise DTypeError(f"{name}: got {type(source).__name__}, expected an Adapter, a MicroLoRA or a path")


def listed(adapters: object) -> list[Any]:
    """Adapters that go by their places.

    Raises:
        DTypeError: No list of these; a mapping goes by names.
        ConfigError: None at all.
    """
    unordered = isinstance(adapters, str | bytes | Mapping | set | frozenset)
    if unordered or not isinstance(adapters, Iterable):
        raise DTypeError(f"adapters: got {type(adapters).__name__}, expected a list of adapters")
    items = list(adapters)
    if not items:
        raise wrong("adapters", items, "a list of at least one adapter")
    return items


@dataclass(frozen=True)
class Parents:
    """Named adapters that fit one another.

    Attributes:
        adapters: By name, in the order in which they came.
        paths: Of those that were given by path.
    """

    adapters: Mapping[str, Adapter]
    paths: Mapping[str, str]

    @classmethod
    def of(cls, sources: object, *, check_shapes: bool = True) -> Parents:
        """From ``{name: adapter, learner or path}`` or pairs of these.

        Args:
            sources: The adapters.
            check_shapes: Whether modules of one name must have the same widths.

        Raises:
            ConfigError: None at all, a name that is empty or came twice, or other base weights.
            ShapeError: Modules of one name with different widths.
            MicroLoraError: As :func:`as_adapter`.
        """
        want = "{name: adapter} or pairs (name, adapter)"
        if isinstance(sources, Mapping):
            pairs = list(sources.items())
        elif isinstance(sources, str | bytes) or not isinstance(sources, Iterable):
            raise DTypeError(f"adapters: got {type(sources).__name__}, expected {want}")
        else:
            pairs = list(sources)
        if not pairs:
            raise wrong("adapters", {}, f"{want}, at least one")
        adapters: dict[str, Adapter] = {}
        paths: dict[str, str] = {}
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DTypeError(f"adapters: got {type(pair).__name__} in it, expected {want}")
            name = text("adapters: name", pair[0], empty=False)
            if name in adapters:
                raise ConfigError(f"adapters: {name!r} came twice, expected every name once")
            adapters[name] = as_adapter(f"adapters[{name!r}]", pair[1])
            if isinstance(pair[1], str | os.PathLike):
                paths[name] = os.fspath(pair[1])
        self = cls(adapters, paths)
        self._one_base()
        if check_shapes:
            _ = self.dims
        return self

    @cached_property
    def _said(self) -> dict[str, AdapterMetadata]:
        return {name: a.metadata if a.metadata_json else _NOTHING for name, a in self.adapters.items()}

    def _one_base(self) -> None:
        prints = {name: m.base_fingerprint for name, m in self._said.items()}
        known = {name: value for name, value in prints.items() if value}
        if len(set(known.values())) > 1:
            shown = ", ".join(f"{name!r}: {value}" for name, value in known.items())
            raise ConfigError(
                f"adapters: got changes of different base weights ({shown}), expected one base_fingerprint; "
                "convert them to one base, or clear it with Adapter.with_metadata"
            )

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """``{module: names of those that have it}`` in the order of first appearance."""
        out: dict[str, list[str]] = {}
        for name, adapter in self.adapters.items():
            for module in adapter.modules():
                out.setdefault(module, []).append(name)
        return out

    @cached_property
    def dims(self) -> dict[str, tuple[int, int]]:
        """``{module: (in_features, out_features)}``."""
        out: dict[str, tuple[int, int]] = {}
        for module, names in self.modules.items():
            shapes = {name: self.adapters[name].describe(module)[:2] for name in names}
            first, *rest = shapes.values()
            if any(shape != first for shape in rest):
                shown = ", ".join(f"{i} -> {o} in {name!r}" for name, (i, o) in shapes.items())
                raise ShapeError(f"{module}: got {shown}, expected one shape (in_features -> out_features)")
            out[module] = first
        return out

    def rank(self, name: str, module: str) -> int:
        """Rank of one module of one adapter."""
        return self.adapters[name].describe(module)[2]

    def dtype(self, module: str) -> str:
        """The one dtype of a module's factors in all that have it, or ``"f32"``."""
        infos = [self.adapters[name].info(module) for name in self.modules[module]]
        kinds = {kind for info in infos for kind in (info.dtype_a, info.dtype_b)}
        return kinds.pop() if len(kinds) == 1 else "f32"

    def notes(self) -> tuple[str, ...]:
        """What a merge of these leaves behind."""
        out = []
        for name, adapter in self.adapters.items():
            extra = list(adapter.extra_tensors())
            if extra:
                more = "" if len(extra) < 4 else f", ... ({len(extra)} in all)"
                out.append(
                    f"tensors of {name!r} that are no factors are left out: {', '.join(extra[:3])}{more}"
                )
        return tuple(out)

    def metadata(self) -> AdapterMetadata:
        """What holds for all, and who they are."""
        each = list(self._said.values())

        def common(field: str) -> str:
            values = {getattr(m, field) for m in each}
            return values.pop() if len(values) == 1 else ""

        tasks = dict.fromkeys(task for m in each for task in m.task_types)
        return AdapterMetadata(
            base_model=common("base_model"),
            # Parents that do not know theirs take the one that is known, so that sums of sums are checked.
            base_fingerprint=max(m.base_fingerprint for m in each),
            task_types=tuple(tasks),
            training_size=min(sum(m.training_size for m in each), 2**63 - 1),
            created=utc_now(),
            parents=tuple(self.adapters),
        )


def described(core: _core.Adapter, metadata: AdapterMetadata, description: str = "") -> Adapter:
    """A result of the core with settings that fit its weights, and metadata."""
    config = config_of(Adapter(core), description)
    return Adapter(core.with_json(config.to_json(), metadata.to_json()))
