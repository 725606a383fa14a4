"""Checks of containers, and of what lies beside the weights."""

from __future__ import annotations

from collections.abc import Iterator

from microlora.doctor.facts import Facts, is_executable
from microlora.doctor.names import shown
from microlora.doctor.repair import Draft
from microlora.exceptions import FormatError

Said = Iterator[tuple[str, tuple[str, ...]]]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def damaged(facts: Facts) -> Said:
    """The container cannot be read."""
    if facts.unsaid:
        return
    if facts.damage is not None and not facts.damage.split(": ", 1)[-1].startswith("a pickle"):
        yield facts.damage, ()
    elif facts.scan is None and facts.refusal is not None and facts.folder is None:
        yield str(facts.refusal), ()


def unsaid(facts: Facts) -> Said:
    """Sound, but a reader has to be told something that it does not say."""
    if facts.unsaid:
        yield facts.unsaid, ()


def pickled(facts: Facts) -> Said:
    """The weights themselves are a pickle."""
    if facts.damage is not None and facts.damage.split(": ", 1)[-1].startswith("a pickle"):
        yield "the weights are a pickle, which runs the code that it carries", (str(facts.weights),)
    elif facts.folder is not None and not facts.weights.exists():
        found = [p.name for p in facts.beside if p.suffix in PICKLES and p.name.startswith("adapter_model")]
        if found:
            yield "the weights are a pickle, which runs the code that it carries", tuple(found)


def no_weights(facts: Facts) -> Said:
    """A directory without weights."""
    if facts.folder is None or facts.weights.exists() or facts.file is not None:
        return
    if not any(p.suffix in PICKLES and p.name.startswith("adapter_model") for p in facts.beside):
        yield str(facts.refusal) if facts.refusal else "no weights in this directory", ()


def pickle_beside(facts: Facts) -> Said:
    """Pickles that another program may open."""
    if facts.weights.exists():
        found = tuple(p.name for p in facts.beside if p.suffix in PICKLES)
        if found:
            yield "pickles beside the weights run the code that they carry when a program opens them", found


def leave_files(facts: Facts, draft: Draft) -> None:
    """The copy has weights and settings only."""
    kept = {facts.weights.name, "adapter_config.json"}
    found = [p.name for p in facts.beside if p.suffix in PICKLES and p.name not in kept]
    draft.say(f"left out {shown(found)}")


def links(facts: Facts) -> Said:
    """Symbolic links: what is read lies elsewhere, and may change there."""
    places = [facts.path, *facts.beside] if facts.path.is_symlink() else facts.beside
    found = tuple(f"{p.name} -> {p.readlink()}" for p in places if p.is_symlink())
    if found:
        yield "symbolic links: what is loaded lies elsewhere", found


def copy_links(facts: Facts, draft: Draft) -> None:
    """A copy has files of its own."""
    draft.say("wrote plain files instead of symbolic links")


def executables(facts: Facts) -> Said:
    """Files that somebody may run."""
    places = facts.beside if facts.folder is not None else [facts.path]
    found = tuple(p.name for p in places if not p.is_symlink() and is_executable(p))
    if found:
        yield "files of an adapter need not be executable", found


def copy_modes(facts: Facts, draft: Draft) -> None:
    """New files are not executable."""
    draft.say("wrote files that are not executable")


def changed(facts: Facts) -> Said:
    """The header names other weights than those in the file."""
    file = facts.lenient  # under the file's own names, which is what the hash is of
    if facts.file is not None and file is not None and file.weights_sha256 is not None:
        found = file.fingerprint()
        if found != file.weights_sha256:
            yield (
                f"the header names weights {file.weights_sha256[:12]}..., these are {found[:12]}...",
                ("weights_sha256",),
            )


def rehash(facts: Facts, draft: Draft) -> None:
    """A copy makes no claim about weights that it has not."""
    draft.say("left the header's weights_sha256 out")


def refused(facts: Facts) -> Said:
    """Whatever else the reader refuses; the last check."""
    if facts.refusal is None or (facts.reader_says_variant and facts.kind != "other"):
        return
    if not any(f.severity == "error" for f in facts.found) and isinstance(facts.refusal, FormatError):
        yield str(facts.refusal), ()
