"""Detached Ed25519 signatures (RFC 8032) over the hashes of files."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora._checks import flag, read_json, wrong
from microlora._destinations import check_folder
from microlora._file_checks import path_text, there
from microlora.cli.extras import require
from microlora.exceptions import ConfigError, DestinationExistsError, FormatError, VerificationError
from microlora.trust.hashing import Manifest, PathLike, compare, manifest, read_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["check_signature", "sign", "signature_path"]

#: What the signed text begins with, so that a signature of something else is none of an adapter.
HEAD = b"microlora signature 1\n"
_MOST = 64 << 20


def signature_path(path: PathLike) -> Path:
    """Where the signature of a file or directory lies: its name with ``.sig`` behind it."""
    place = Path(path)
    return place.with_name(place.name + ".sig")


def sign(
    path: PathLike,
    private_key: Any,
    *,
    out: PathLike | None = None,
    password: bytes | None = None,
    overwrite: bool = False,
) -> Path:
    """Signs a file, or all files of a directory, with Ed25519; the file itself stays as it is.

    Args:
        path: What to sign.
        private_key: A key of the ``cryptography`` package, PEM bytes, the path of a PEM file
            (``openssl genpkey -algorithm ed25519``), or 64 hex digits.
        out: Where the signature goes, a JSON file; by default ``<path>.sig``.
        password: Of an encrypted PEM.
        overwrite: Replace an older signature.

    Returns:
        Where the signature lies. It holds the names and SHA-256 of the files, the public key and the
        signature.

    Raises:
        MissingExtraError: The ``cryptography`` package is missing (extra ``signing``).
        ConfigError: Not an Ed25519 key.
        DTypeError: ``path`` or ``out`` is no path.
        MissingPathError: There is no such key file, or the folder of ``out`` is not there.
        DestinationExistsError: There is a signature already.
        OSError: A file cannot be read or written.
    """
    require("cryptography", "signing", "sign()")
    place = Path(path_text("path", path))
    replace = flag("overwrite", overwrite)
    if password is not None and not isinstance(password, bytes):
        raise wrong("password", "something that is no bytes", "bytes, or None")
    target = signature_path(place) if out is None else Path(path_text("out", out))
    check_folder("out", target)
    key = _private(private_key, password)
    if place.is_dir() and target.absolute().is_relative_to(place.absolute()):
        raise wrong("out", os.fspath(target), "a place outside of the directory that is signed")
    if target.exists() and not replace:
        raise DestinationExistsError(f"{target}: exists; pass overwrite=True to replace it")
    files = manifest(place)
    document = {
        "algorithm": "ed25519",
        "files": files,
        "public_key": _raw(key.public_key()).hex(),
        "schema_version": 1,
        "signature": base64.b64encode(key.sign(_text(files))).decode(),
    }
    _core.write_file(os.fspath(target), json.dumps(document, indent=2).encode())
    return target


def check_signature(place: Path, signature: PathLike | None, public_key: Any) -> str:
    """The signer's public key (64 hex digits), if the signature is theirs and the files are those signed.

    Raises:
        VerificationError: No signature, another signer, or other files.
        MissingExtraError: The ``cryptography`` package is missing.
    """
    require("cryptography", "signing", "public_key=")
    from cryptography.exceptions import InvalidSignature

    key = _public(public_key)
    where = signature_path(place) if signature is None else Path(signature)
    if not where.is_file() or where.stat().st_size > _MOST:
        raise VerificationError(f"{where}: no signature there")
    try:
        document = read_json(os.fspath(where), where.read_bytes())
        if set(document) != {"algorithm", "files", "public_key", "schema_version", "signature"}:
            raise FormatError(f"{where}: keys {sorted(document)}")
        if (document["algorithm"], document["schema_version"]) != ("ed25519", 1):
            raise FormatError(
                f"{where}: algorithm {document['algorithm']!r}, expected 'ed25519' of version 1"
            )
        if not isinstance(document["files"], dict):
            raise FormatError(f"{where}: files: expected an object")
        files = read_manifest(document["files"])
        mark = base64.b64decode(document["signature"], validate=True)
    except (FormatError, ConfigError, ValueError, TypeError) as e:
        raise VerificationError(f"{where}: not a signature: {e}") from None
    try:
        key.verify(mark, _text(files))
    except InvalidSignature:
        raise VerificationError(f"{where}: not signed by this key, or changed since") from None
    if document["public_key"] != _raw(key).hex():
        raise VerificationError(f"{where}: names another public key than the one that signed")
    compare(place, files)
    return _raw(key).hex()


def _text(files: Manifest) -> bytes:
    """What is signed: names and hashes, in one spelling."""
    return HEAD + json.dumps(files, sort_keys=True, separators=(",", ":")).encode()


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes_raw()


def _bytes(arg: str, value: Any) -> bytes | None:
    """PEM from bytes or a path, raw from hex; None for anything else."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdefABCDEF" for c in value):
        return bytes.fromhex(value)
    if not isinstance(value, str | os.PathLike):
        return None
    path = Path(there(arg, value, "a PEM file, or a key as 64 hex digits"))
    if not path.is_file():
        raise wrong(arg, os.fspath(value), "a PEM file, or a key as 64 hex digits")
    return path.read_bytes()


def _private(value: Any, password: bytes | None) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _bytes("private_key", value)
    try:
        if data is not None:
            value = (
                Ed25519PrivateKey.from_private_bytes(data)
                if len(data) == 32
                else load_pem_private_key(data, password)
            )
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(
            f"private_key: got something that cannot be read ({e}), expected an Ed25519 key"
        ) from None
    if not isinstance(value, Ed25519PrivateKey):
        raise ConfigError(f"private_key: got {type(value).__name__}, expected an Ed25519 key")
    return value


def _public(value: Any) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _bytes("public_key", value)
    try:
        if data is not None:
            value = Ed25519PublicKey.from_public_bytes(data) if len(data) == 32 else load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(
            f"public_key: got something that cannot be read ({e}), expected an Ed25519 key"
        ) from None
    if not isinstance(value, Ed25519PublicKey):
        raise ConfigError(f"public_key: got {type(value).__name__}, expected an Ed25519 key")
    return value
