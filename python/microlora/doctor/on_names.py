"""Checks of what tensors are called."""

from __future__ import annotations

from collections.abc import Iterator

from microlora.doctor.facts import Facts, Tensor
from microlora.doctor.names import shown, template
from microlora.doctor.repair import Draft
from microlora.exceptions import UnrepairableError

Said = Iterator[tuple[str, tuple[str, ...]]]


def _named(facts: Facts) -> list[Tensor]:
    return [t for t in facts.tensors if t.key.path] if facts.kind == "peft" else []


def empty(facts: Facts) -> Said:
    """Nothing of an adapter in it."""
    if facts.unsaid or facts.reader_knows_style:
        return  # whose names these are is known: the reader says what is wrong
    if facts.scan is not None and facts.damage is None and not facts.modules:
        yield "no tensor is a factor of a LoRA", tuple(t.name for t in facts.tensors[:3])


def mixed(facts: Facts) -> Said:
    """Keys of two writers in one file."""
    if facts.foreign and facts.factors:
        yield (
            "keys of two styles are mixed, PEFT's and another",
            (facts.factors[0].name, *(t.name for t in facts.foreign)),
        )


def missing_prefix(facts: Facts) -> Said:
    """PEFT looks for `base_model.model.` before every path."""
    found = tuple(t.name for t in _named(facts) if t.key.prefix == 0)
    if found:
        yield "keys lack base_model.model., so that PEFT finds none of them and applies nothing", found


def add_prefix(facts: Facts, draft: Draft) -> None:
    """Writes it once."""
    hit = [i for i in draft.items if i.key.path and i.key.prefix == 0]
    for item in hit:
        draft.rename(item, prefix=1)
    draft.say(f"put base_model.model. before {len(hit)} keys")


def doubled_prefix(facts: Facts) -> Said:
    """A model that was wrapped twice."""
    found = tuple(t.name for t in facts.tensors if facts.kind == "peft" and t.key.prefix > 1)
    if found:
        yield "keys repeat base_model.model., so that PEFT finds none of them and applies nothing", found


def single_prefix(facts: Facts, draft: Draft) -> None:
    """Writes it once."""
    hit = [i for i in draft.items if i.key.prefix > 1]
    for item in hit:
        draft.rename(item, prefix=1)
    draft.say(f"wrote base_model.model. once in {len(hit)} keys")


def adapter_name(facts: Facts) -> Said:
    """A state dict that was saved as it stood in memory."""
    found = tuple(t.name for t in _named(facts) if t.key.adapter == "default")
    if found:
        yield "keys still carry the adapter's name (default): PEFT forgives it, other programs do not", found


def other_adapter_name(facts: Facts) -> Said:
    """The same of an adapter that was not called default: PEFT looks for its own name only."""
    found = [t for t in _named(facts) if t.key.adapter not in ("", "default")]
    if found:
        names = ", ".join(sorted({t.key.adapter for t in found}))
        yield (
            f"keys carry the name of another adapter ({names}), so that PEFT finds none of them",
            tuple(t.name for t in found),
        )


def drop_adapter_name(facts: Facts, draft: Draft) -> None:
    """Takes the name off."""
    hit = [i for i in draft.items if i.key.adapter]
    for item in hit:
        tail = item.key.tail
        if item.key.variant == "dora":
            tail = "lora_magnitude_vector"
        draft.rename(item, adapter="", tail=tail)
    if hit:
        draft.say(f"took the adapter's name off {len(hit)} keys")


def duplicates(facts: Facts) -> Said:
    """Two tensors that are one factor."""
    for module in facts.modules.values():
        for tensors in (module.a, module.b):
            if len(tensors) > 1:
                yield f"two tensors are the same factor of {module.path}", tuple(t.name for t in tensors)


def merge_duplicates(facts: Facts, draft: Draft) -> None:
    """Keeps one of several that hold the same bytes."""
    for module in facts.modules.values():
        for tensors in (module.a, module.b):
            items = [i for i in draft.items if i.tensor in tensors]
            if len(items) > 1:
                if len({(i.dtype, i.shape, draft.bytes_of(i)) for i in items}) > 1:
                    names = " and ".join(i.tensor.name for i in items)
                    raise UnrepairableError(
                        f"{facts.path}: fix: {names} differ; nobody can say which is meant"
                    )
                draft.drop(i.tensor.name for i in items[1:])
                draft.say(f"kept one of {len(items)} equal tensors of {module.path}")


def orphans(facts: Facts) -> Said:
    """A factor without its partner: the layer cannot be applied."""
    found = [t.name for m in facts.modules.values() if not (m.a and m.b) for t in (*m.a, *m.b)]
    if found:
        yield "a factor without its partner", tuple(found)


def drop_orphans(facts: Facts, draft: Draft) -> None:
    """Leaves them out: without the partner there is nothing to apply."""
    found = [t.name for m in facts.modules.values() if not (m.a and m.b) for t in (*m.a, *m.b)]
    draft.drop(found)
    draft.say(f"dropped {shown(found)}: without a partner there was nothing to apply")


def _unused(facts: Facts) -> list[str]:
    if facts.kind == "peft" and facts.lenient is not None:
        names = {t.name for t in facts.tensors}
        return [name for name in facts.lenient.unused if name in names]
    if facts.kind == "peft":
        # No reader takes it: what may be a saved layer of the base is not called useless.
        foreign = {t.name for t in facts.foreign}
        return [
            t.name
            for t in facts.tensors
            if not (t.key.path or t.key.variant or t.name in foreign)
            and not (t.key.prefix and t.name.endswith((".weight", ".bias")))
        ]
    if facts.kind == "single":
        return [t.name for t in facts.tensors if not t.key.path and not t.name.startswith("extra.")]
    return list(facts.file.unused) if facts.file is not None else []


def unused(facts: Facts) -> Said:
    """Tensors that nothing gives a meaning to."""
    found = _unused(facts)
    if found and facts.modules:
        yield "tensors that no part of a LoRA is made of", tuple(found)


def drop_unused(facts: Facts, draft: Draft) -> None:
    """Leaves them out."""
    found = _unused(facts)
    draft.drop(found)
    draft.say(f"dropped {shown(found)}: no part of a LoRA")


def gaps(facts: Facts) -> Said:
    """A kind of layer that is adapted everywhere but in few places."""
    by_kind: dict[str, set[int]] = {}
    for path in facts.modules:
        kind, layer = template(path)
        if layer is not None:
            by_kind.setdefault(kind, set()).add(layer)
    every = set().union(*by_kind.values()) if by_kind else set()
    if len(every) < 4 or every != set(range(min(every), max(every) + 1)):
        return
    found = []
    for kind, layers in by_kind.items():
        lost = sorted(every - layers)
        if lost and len(lost) <= len(every) // 4:
            found += [kind.replace("*", str(n), 1) for n in lost]
    if found:
        yield "few layers lack what all others have", tuple(found)
