"""`microlora.inspect`: look at a file, say what is wrong, and write a repaired copy where one can be made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import microlora._core as _core
from microlora._checks import choice, texts, wrong
from microlora._destinations import check_destination, check_folder
from microlora._file_checks import path_text
from microlora.doctor.base import read_base
from microlora.doctor.checks import CHECKS, examine
from microlora.doctor.facts import Facts, Module, Tensor
from microlora.doctor.on_base import compared
from microlora.doctor.repair import Draft, Place
from microlora.doctor.report import SEVERITIES, ModuleRow, Report
from microlora.exceptions import ConfigError, DestinationExistsError, MicroLoraError, UnrepairableError
from microlora.formats.file import AdapterFile
from microlora.formats.limits import Limits
from microlora.metadata import AdapterMetadata
from microlora.quantized import QuantizedAdapter

__all__ = ["inspect"]

PathLike = str | os.PathLike[str]


def inspect(
    path: PathLike,
    *,
    base: PathLike | dict[str, Any] | None = None,
    limits: Limits | None = None,
    fix: PathLike | None = None,
    also: Iterable[str] = (),
) -> Report:
    """Looks at an adapter file, broken or not, and says what is wrong with it and what to do.

    Nothing is loaded and nothing is changed in place; a file that no reader takes is a report with errors,
    not an exception. All checks stand in ``microlora.doctor.CHECKS``.

    Args:
        path: A file or directory of any format.
        base: The base model that it is for: its directory, ``config.json``, safetensors file or shard
            index, or one of these as a mapping (``config.json``, or ``{tensor name: shape}``). Names and
            shapes are then compared, and the nearest names proposed.
        limits: What the file may ask for.
        fix: Where to write a repaired copy, in a folder that exists: a directory for PEFT's files, a file
            for ours. Everything that is an error is taken out, and whatever else can be without changing
            what the adapter does. Where there is nothing to repair, it is a copy, and the report says so.
        also: Codes of findings that are repaired only when asked for: ``"nonfinite"`` (switches the layer
            off), ``"upcast"`` (stores F32 as 16 bits, exactly), ``"unknown_setting"``, ``"base_names"``,
            ``"weights_changed"``.

    Returns:
        The report, of the file as it was; with ``fix`` it names the copy and what was done.

    Raises:
        UnrepairableError: With ``fix``: an error is left that no repair takes out; nothing was written.
        DestinationExistsError: ``fix`` exists.
        ConfigError: ``also`` names a code without a repair of that kind, ``base`` is not one, or ``fix`` is
            a name for another format or a place in the directory that is inspected.
        DTypeError: ``path`` or ``fix`` is no path.
        MissingPathError: ``base`` or the folder of ``fix`` is not there.
        FormatError: ``base`` cannot be understood.
        OSError: A file cannot be read or written.
    """
    place = Path(path_text("path", path))
    asked = _asked(also, fix)
    limits = Limits.of(limits)
    if fix is not None:
        if os.path.lexists(path_text("fix", fix)):
            raise DestinationExistsError(
                f"{os.fspath(fix)}: exists; a repaired copy is written beside it, not over it"
            )
        check_folder("fix", fix)
        if place.is_dir() and Path(fix).resolve().is_relative_to(place.resolve()):
            raise wrong("fix", os.fspath(fix), "a place outside of the directory that is inspected")
    known = None if base is None else read_base(base, limits)
    facts = Facts(place, limits, known)
    if fix is not None and facts.kind in ("peft", "single"):
        written = "peft" if facts.kind == "peft" else "safetensors"
        check_destination("fix", fix, written, overwrite=False)
    report = _report(facts)
    if fix is None:
        return report
    done = _repair(facts, report, Path(fix), asked)
    return replace(report, fixed=os.fspath(fix), repairs=tuple(done))


def _asked(also: Iterable[str], fix: PathLike | None) -> set[str]:
    codes = tuple(c.code for c in CHECKS if c.way == "asked")
    if isinstance(also, str):
        also = (also,)
    asked = {choice("also", code, codes) for code in texts("also", also)}
    if asked and fix is None:
        raise ConfigError(f"also: got {sorted(asked)}, expected none without fix=")
    return asked


def _report(facts: Facts) -> Report:
    found = examine(facts)
    found.sort(key=lambda f: SEVERITIES.index(f.severity))
    metadata = _metadata(facts)
    sizes = {
        "F64": 8,
        "I64": 8,
        "U64": 8,
        "F32": 4,
        "I32": 4,
        "U32": 4,
        "F16": 2,
        "BF16": 2,
        "I16": 2,
        "U16": 2,
    }
    return Report(
        path=os.fspath(facts.path),
        format=facts.format,
        base_model=facts.text("base_model_name_or_path") or metadata.base_model,
        tensors=len(facts.tensors),
        data_bytes=sum(_bytes(t.elements, kind, sizes) for t, kind in _stored(facts)),
        modules=tuple(_row(m, facts.blocks) for m in facts.modules.values()),
        findings=tuple(found),
        weights_sha256=_claimed(facts),
        parents=metadata.parents,
        recipe=metadata.recipe,
        compared=compared(facts),
    )


def _claimed(facts: Facts) -> str:
    """The fingerprint that the header claims."""
    if facts.lenient is not None:
        return facts.lenient.weights_sha256 or ""
    return facts.header.get("weights_sha256") or facts.header.get("microlora.weights_sha256") or ""


def _stored(facts: Facts) -> list[tuple[Tensor, str]]:
    """Every tensor and the type that it has in the file."""
    types: dict[int, str] = {}
    for m in facts.modules.values():
        if facts.blocks is not None and m.path in facts.blocks.modules():
            types |= {t.at: kind for t, kind in zip((*m.a, *m.b), facts.blocks.types(m.path), strict=False)}
    return [(t, types.get(t.at, t.dtype)) for t in facts.tensors]


def _bytes(elements: int, kind: str, sizes: dict[str, int]) -> int:
    for name, _, numbers, size in _core.block_types():
        if name == kind:
            return elements // numbers * size
    return elements * sizes.get(kind.upper(), 1)


def _metadata(facts: Facts) -> AdapterMetadata:
    text = facts.header.get("metadata") if facts.kind == "single" else facts.header.get("microlora.metadata")
    if text is None and facts.file is not None:
        text = facts.file.metadata_json
    try:
        return AdapterMetadata.from_json(text) if text else AdapterMetadata()
    except MicroLoraError:
        return AdapterMetadata()


def _row(m: Module, blocks: QuantizedAdapter | None) -> ModuleRow:
    stored = [t.dtype for t in (*m.a, *m.b)]
    if blocks is not None and m.path in blocks.modules():
        stored = [t.upper() for t in blocks.types(m.path)]
    kinds = list(dict.fromkeys(stored))
    norms = [t[0].numbers.norm if t and t[0].numbers is not None else None for t in (m.a, m.b)]
    return ModuleRow(
        path=m.path,
        kind=m.kind.rstrip("?"),
        rank=m.rank,
        alpha=m.alpha,
        scaling=m.scaling,
        use_rslora=m.rslora,
        dtype="/".join(kinds),
        norm_a=norms[0],
        norm_b=norms[1],
        norm_delta=m.delta,
        nonfinite=m.bad,
    )


def _repair(facts: Facts, report: Report, target: Path, asked: set[str]) -> list[str]:
    """Writes the copy, looks at it again, and only then puts it in its place."""
    draft = Draft.of(facts)
    codes = set(report.codes)
    stuck = [f for f in report.findings if f.severity == "error" and f.repair == "no" and f.code != "refused"]
    waits = [
        f for f in report.findings if f.severity == "error" and f.repair == "asked" and f.code not in asked
    ]
    if stuck or waits:
        why = "; ".join(f"{f.code}: {f.line}" for f in (*stuck, *waits))
        names = ", ".join(dict.fromkeys(repr(f.code) for f in waits))
        way = f" (also=[{names}] repairs {names})" if waits else ""
        raise UnrepairableError(f"{report.path}: fix: no repair takes out {why}{way}")
    for check in CHECKS:
        if check.code in codes and check.repair is not None and (not check.asked or check.code in asked):
            check.repair(facts, draft)
    if not any(i.key.factor for i in draft.items):
        raise UnrepairableError(f"{report.path}: fix: nothing of the adapter would be left")
    with Place(target) as place:
        draft.write(place.draft)
        again = Facts(place.draft, facts.limits, facts.base)
        left = [f for f in examine(again) if f.severity == "error"]
        if left:
            raise UnrepairableError(
                f"{report.path}: fix: the copy would still have {left[0].code}: {left[0].line}"
            )
        if not again.reader_says_variant:
            AdapterFile.read(place.draft, limits=facts.limits)
        place.keep()
    return draft.done
