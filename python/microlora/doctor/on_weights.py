"""Checks of shapes and numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np

from microlora.doctor.facts import FACTOR_DTYPES, Facts, Tensor
from microlora.doctor.names import shown
from microlora.doctor.repair import NUMPY, Draft
from microlora.exceptions import UnrepairableError

Said = Iterator[tuple[str, tuple[str, ...]]]

#: A layer whose delta is this much below (above) the median of all is dead (an outlier).
DEAD, OUTLIER = 1e-4, 100.0


def shapes(facts: Facts) -> Said:
    """Factors that do not fit together."""
    for path, m in facts.modules.items():
        if facts.file is None and m.whole and m.rank is None:
            a, b = m.a[0], m.b[0]
            yield (
                f"{path}: A {list(a.shape)} and B {list(b.shape)}, expected (rank, in) and (out, rank)",
                (a.name, b.name),
            )


def ranks(facts: Facts) -> Said:
    """Tensors that contradict the settings."""
    found = [m for m in facts.modules.values() if m.rank is not None and m.said_rank not in (None, m.rank)]
    if found:
        said = ", ".join(dict.fromkeys(f"{m.said_rank} said, {m.rank} held" for m in found))
        yield f"settings name another rank than the tensors have ({said})", tuple(m.path for m in found)


def correct_ranks(facts: Facts, draft: Draft) -> None:
    """Writes the ranks of the tensors into the settings; alphas stay."""
    if draft.config is None:
        raise UnrepairableError(
            f"{facts.path}: fix: ranks in the header of a single file contradict its tensors"
        )
    found = {m.path: m.rank for m in facts.modules.values() if m.rank is not None}
    every = list(found.values())
    if len(set(every)) == 1:
        draft.config["r"] = every[0]
        draft.config["rank_pattern"] = {}
    else:
        common = max(set(every), key=every.count)
        draft.config["r"] = common
        outer = {path.split(".base_layer.", 1)[0]: rank for path, rank in found.items()}
        draft.config["rank_pattern"] = {
            "^" + path.replace(".", r"\."): rank for path, rank in outer.items() if rank != common
        }
    draft.say("set r and rank_pattern to the ranks that the tensors have; alpha stays as it was")


def nonfinite(facts: Facts) -> Said:
    """NaN or infinity."""
    found = [t for t in facts.tensors if t.bad]
    if found:
        count = sum(t.bad for t in found)
        what = "1 number is" if count == 1 else f"{count:,} numbers are"
        yield f"{what} NaN or infinite", tuple(t.name for t in found)


def switch_off(facts: Facts, draft: Draft) -> None:
    """Zeroes what is not finite, and B of the layers concerned: half a layer is another layer."""
    bad = {m.path for m in facts.modules.values() if m.bad}
    for item in draft.items:
        off = item.key.path in bad and item.key.factor == "B"
        if item.tensor.bad or off:
            values = draft.numbers(item)
            values[...] = 0 if off else np.where(np.isfinite(values), values, 0)
            draft.put(item, values, item.dtype)
    draft.say(f"switched off layers with NaN or infinity (B set to zero): {shown(sorted(bad))}")


def dtypes(facts: Facts) -> Said:
    """Factors of a type that nothing runs."""
    found = [t for t in facts.factors if t.dtype not in FACTOR_DTYPES]
    if found:
        kinds = ", ".join(sorted({t.dtype for t in found}))
        yield f"factors stored as {kinds}, expected F32, F16 or BF16", tuple(t.name for t in found)


def convert_dtypes(facts: Facts, draft: Draft) -> None:
    """F64 becomes F32; other types cannot be told apart from packed numbers."""
    for item in draft.items:
        if item.key.factor and item.dtype not in FACTOR_DTYPES:
            if item.dtype not in NUMPY:
                raise UnrepairableError(
                    f"{facts.path}: fix: {item.tensor.name} is {item.dtype}: not converted"
                )
            draft.put(item, draft.numbers(item), "F32")
    draft.say("rounded F64 factors to F32")


def mixed_dtypes(facts: Facts) -> Said:
    """More than one type, which often means that two saves were mixed."""
    kinds = sorted({t.dtype for t in facts.factors})
    if len(kinds) > 1 and facts.kind != "other":
        yield f"factors of {len(kinds)} types", tuple(kinds)


def _narrow(facts: Facts) -> str:
    wide = facts.factors
    if facts.kind == "other" or not wide or any(t.dtype != "F32" or not t.numbers or t.bad for t in wide):
        return ""
    if not any(t.numbers and t.numbers.max_abs > 0 for t in wide):
        return ""
    if all(t.numbers and t.numbers.fits_bf16 for t in wide):
        return "BF16"
    return "F16" if all(t.numbers and t.numbers.fits_f16 for t in wide) else ""


def upcast(facts: Facts) -> Said:
    """PEFT upcasts 16-bit adapters when it loads them, and saves what it has."""
    if kind := _narrow(facts):
        size = 2 * sum(t.elements for t in facts.factors)
        yield f"every F32 number is a {kind} as well: {size:,} bytes say nothing", ()


def narrow(facts: Facts, draft: Draft) -> None:
    """Stores them in the smaller type, exactly."""
    kind = _narrow(facts)
    for item in draft.items:
        if item.key.factor:
            draft.put(item, draft.numbers(item), kind)
    draft.say(f"stored factors as {kind}, which changes no number")


def _delta(facts: Facts) -> float:
    live = [v for v in facts.deltas.values() if v > 0]
    return statistics.median(live) if live else 0.0


def untrained(facts: Facts) -> Said:
    """All layers are zero: saved before it was trained, or trained by nothing."""
    norms = [m.norm for m in facts.modules.values()]
    if norms and all(norm == 0 for norm in norms) and not any(m.bad for m in facts.modules.values()):
        yield "every layer's delta is zero: this adapter changes nothing", ()


def zero_layers(facts: Facts) -> Said:
    """Some layers are zero."""
    found = [m for m in facts.modules.values() if m.norm == 0 and not m.bad]
    if found and any(m.norm for m in facts.modules.values()):
        sides = {"B" if _zero(m.b) else "A" if _zero(m.a) else "B A" for m in found}
        yield (
            f"layers that change nothing ({' or '.join(sorted(sides))} is zero)",
            tuple(m.path for m in found),
        )


def _zero(tensors: list[Tensor]) -> bool:
    return all(t.numbers is not None and t.numbers.max_abs == 0 for t in tensors)


def dead(facts: Facts) -> Said:
    """Layers that hardly change anything beside the others."""
    middle = _delta(facts)
    found = [path for path, value in facts.deltas.items() if 0 < value < DEAD * middle]
    if found and len(facts.deltas) >= 3:
        yield f"|delta| below {DEAD:g} of the median ({middle:.3g})", tuple(found)


def outliers(facts: Facts) -> Said:
    """Layers that drown the others."""
    middle = _delta(facts)
    found = [path for path, value in facts.deltas.items() if value > OUTLIER * middle > 0]
    if found and len(facts.deltas) >= 3:
        yield f"|delta| above {OUTLIER:g} times the median ({middle:.3g})", tuple(found)
