"""Whether a file is the one that was meant."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlora._checks import wrong
from microlora._file_checks import path_text
from microlora.exceptions import FormatError, VerificationError
from microlora.formats.file import AdapterFile
from microlora.formats.limits import Limits
from microlora.trust.hashing import PathLike, compare, digest, file_sha256, read_manifest

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What was checked, all of it in order.

    Attributes:
        path: What was verified.
        checked: Of ``"sha256"``, ``"manifest"``, ``"signature"`` and ``"weights"``, those that were checked;
            the last against the fingerprint that the file's own header has.
        fingerprint: SHA-256 of the weights; empty where the header has none to compare with.
        signer: Public key of the signature, 64 hex digits; empty without one.
        unread: Why the weights could not be read to compare them; empty where they were read.
    """

    path: str
    checked: tuple[str, ...]
    fingerprint: str = ""
    signer: str = ""
    unread: str = ""

    def __str__(self) -> str:
        """What was compared with what, in one line."""
        said = {
            "sha256": "the file has the SHA-256 that was given",
            "manifest": "all files are those of the manifest",
            "signature": f"signed by {self.signer[:16]}...",
            "weights": "the weights have the fingerprint of the file's own header "
            f"({self.fingerprint[:16]}...)",
        }
        lines = [said[what] for what in self.checked]
        if self.checked == ("weights",):
            lines.append("nothing from elsewhere was compared (sha256=, manifest=, public_key=)")
        elif self.unread:
            lines.append(f"the weights were not read: {self.unread}")
        elif "weights" not in self.checked:
            lines.append("no fingerprint of the weights was there to compare with")
        return f"{self.path}: {'; '.join(lines)}"


def verify(
    path: PathLike,
    *,
    sha256: str | None = None,
    manifest: Mapping[str, str] | PathLike | None = None,
    public_key: Any = None,
    signature: PathLike | None = None,
    limits: Limits | None = None,
) -> Verification:
    """Checks an adapter against whatever is known of it; anything that differs is an error.

    The fingerprint that our writers leave in the header is checked whenever there is one. By itself it finds
    damage, not malice: who changes the weights can change the header. Hashes and keys must come another way.

    Args:
        path: A file, or the directory of a PEFT adapter.
        sha256: SHA-256 of the whole file: 64 hex digits.
        manifest: ``{file: sha256}`` of all files of the directory, or the path of its JSON; a file that it
            does not name is an error too.
        public_key: Ed25519 key of the signer: a key of the ``cryptography`` package, PEM bytes, the path of
            a PEM file, or 64 hex digits. Then ``signature`` must be there and good.
        signature: What :func:`sign` wrote; by default ``<path>.sig``.
        limits: What the file may ask for.

    Returns:
        What was checked.

    Raises:
        VerificationError: Something differs (the message names the file), or nothing can be checked.
        ConfigError: An argument that is no hash, manifest or key.
        DTypeError: ``path`` or ``signature`` is no path.
        MissingPathError: There is no such manifest or key.
        FormatError: A file that cannot be read as what it should be.
        MissingExtraError: ``public_key`` without the ``cryptography`` package.
        OSError: A file cannot be read.
    """
    place = Path(path_text("path", path))
    Limits.of(limits)
    if signature is not None:
        path_text("signature", signature)
    place.stat()
    checked: list[str] = []
    signer = ""
    if sha256 is not None:
        want = digest("sha256", sha256)
        if place.is_dir():
            raise wrong("sha256", sha256, "manifest= for a directory, whose files have a hash each")
        found = file_sha256(place)
        if not hmac.compare_digest(found, want):
            raise VerificationError(f"{place}: SHA-256 is {found}, expected {want}")
        checked.append("sha256")
    if manifest is not None:
        compare(place, read_manifest(manifest))
        checked.append("manifest")
    if public_key is not None:
        from microlora.trust.signing import check_signature

        signer = check_signature(place, signature, public_key)
        checked.append("signature")
    elif signature is not None:
        raise wrong("signature", os.fspath(signature), "public_key= with it: who signed has to be known")
    weights, unread = _weights(place, limits, needed=not checked)
    if weights:
        checked.append("weights")
    if not checked:
        raise VerificationError(
            f"{place}: nothing to verify it against: no weights_sha256 in its header, and no sha256=, "
            "manifest= or public_key="
        )
    return Verification(os.fspath(path), tuple(checked), weights, signer, unread)


def _weights(place: Path, limits: Limits | None, *, needed: bool) -> tuple[str, str]:
    """The fingerprint, if the header claims one and it is right, and why no reader took the file."""
    try:
        file = AdapterFile.read(place, strict=False, limits=limits)
    except FormatError as e:
        if needed:
            raise
        return "", str(e)  # bytes were compared; whether they are an adapter is not asked
    if file.weights_sha256 is None:
        return "", ""
    found = file.fingerprint()
    if not hmac.compare_digest(found.encode(), file.weights_sha256.encode()):
        raise VerificationError(
            f"{place}: the weights are {found}, its header says {file.weights_sha256[:64]}"
        )
    return found, ""
