"""Checks against the base model that the adapter is for."""

from __future__ import annotations

from collections.abc import Iterator

from microlora.doctor.base import nearest
from microlora.doctor.facts import Facts, Module
from microlora.doctor.names import shown, template
from microlora.doctor.repair import Draft
from microlora.exceptions import UnrepairableError

Said = Iterator[tuple[str, tuple[str, ...]]]


def _judged(facts: Facts) -> list[str]:
    """Modules of whose names the base can tell whether it has them."""
    if facts.base is None or not facts.base.modules:
        return []
    every = facts.base.modules
    if facts.base.complete:
        return list(facts.modules)
    # A configuration tells the decoder's layers only: what lies elsewhere is not judged.
    known = {template(path)[0].rpartition(".")[2] for path in every}
    return [p for p in facts.modules if p in every or p.rpartition(".")[2] in known]


def _unknown(facts: Facts) -> list[str]:
    every = facts.base.modules if facts.base is not None else {}
    return [path for path in _judged(facts) if path not in every]


def _sized(facts: Facts) -> dict[str, tuple[int, ...]]:
    """Modules whose shapes are compared, with the base's shape of each."""
    base, out = facts.base, {}
    for path, m in facts.modules.items() if base is not None else ():
        want = base.modules.get(path) if base is not None else None
        if want is None and base is not None and base.widths is not None and not base.modules:
            want = base.widths.get(path.rpartition(".")[2])
        if want is not None and m.rank is not None and m.kind == "linear" and len(want) == 2:
            out[path] = tuple(want)
    return out


def compared(facts: Facts) -> str:
    """What of an adapter could be held against the base, in one line; empty without a base."""
    base = facts.base
    if base is None:
        return ""
    n = len(facts.modules)
    parts = [
        f"{len(found)} of {n} {what}"
        for found, what in ((_judged(facts), "names"), (_sized(facts), "shapes"))
        if found
    ]
    if base.layers is not None:
        parts.append(f"{base.layers} layers")
    said = ", ".join(parts) if n else ""
    return f"{base.source}: {said or 'nothing, it does not tell what its layers are'}"


def names(facts: Facts) -> Said:
    """Paths that the base model has not: PEFT applies nothing there, and says little."""
    lost = _unknown(facts)
    if not lost or facts.base is None:
        return
    found, change = nearest(lost, facts.base, facts.modules)
    message = f"{len(lost)} of {len(facts.modules)} modules are not in {facts.base.source}"
    if change is not None:
        old, new = (repr(part) for part in change)
        message += f"; with {new} in place of {old} in front all of them would be"
    elif found:
        message += "; nearest: " + shown(f"{path} -> {near}" for path, near in found.items())
    yield message, tuple(lost)


def rename(facts: Facts, draft: Draft) -> None:
    """Replaces the beginning of paths, where one change mends all."""
    lost = _unknown(facts)
    change = nearest(lost, facts.base, facts.modules)[1] if facts.base is not None else None
    if change is None:
        raise UnrepairableError(f"{facts.path}: fix: no one change of names makes {shown(lost)} fit the base")
    old, new = change
    gone = set(lost)
    for item in draft.items:
        path = item.key.path
        if path in gone:
            draft.rename(item, path=new + path.removeprefix(old))
    config = draft.config
    if config is not None:
        for key in ("rank_pattern", "alpha_pattern"):
            table = config.get(key)
            if isinstance(table, dict) and any(k.startswith("^") or "." in k for k in table):
                raise UnrepairableError(
                    f"{facts.path}: fix: {key} has keys with paths, which would not follow"
                )
        targets = config.get("target_modules")
        if not isinstance(targets, list) or any("." in str(t) for t in targets):
            config["target_modules"] = sorted({i.key.path for i in draft.items if i.key.factor})
    draft.say(f"renamed {len(gone)} modules: {new!r} in place of {old!r} in front")


def shapes(facts: Facts) -> Said:
    """Layers of another size: the adapter of another model."""
    base = facts.base
    if base is None:
        return
    wrong = []
    for path, want in _sized(facts).items():
        got = _size(facts.modules[path])
        if got not in (want, tuple(reversed(want))):
            wrong.append(f"{path} {list(got)} for {list(want)}")
    if wrong:
        yield f"deltas (out, in) that do not fit the layers of {base.source}", tuple(wrong)


def _size(module: Module) -> tuple[int, int]:
    return module.b[0].shape[0], module.a[0].shape[1]


def layers(facts: Facts) -> Said:
    """Layers beyond the last of the base."""
    base = facts.base
    if base is None or base.layers is None:
        return
    found = [p for p in facts.modules if ".layers." in f".{p}" and (template(p)[1] or 0) >= base.layers]
    if found:
        yield f"the base has {base.layers} layers", tuple(found)


def other_name(facts: Facts) -> Said:
    """The file names another base."""
    named = facts.text("base_model_name_or_path")
    if facts.base is not None and facts.base.name and named and named != facts.base.name:
        yield f"the file is for {named!r}, the base calls itself {facts.base.name!r}", ()
