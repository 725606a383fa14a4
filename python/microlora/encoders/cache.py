"""A fit kept on disk, under a name that tells what it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from microlora.encoders.lsa import LsaEncoder
from microlora.exceptions import FormatError
from microlora.progress import CancelToken, Progress

__all__ = ["fit_cached"]


def fit_cached(
    encoder: LsaEncoder,
    texts: Sequence[str],
    folder: str | Path,
    *,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> tuple[LsaEncoder, bool]:
    """Fit ``encoder``, or read the same fit from ``folder``, where a new one is written.

    The file's name carries `LsaEncoder.key`, so other texts or settings never meet an old fit; a damaged
    file is replaced.

    Args:
        encoder: its settings are used; it is fitted in place where no file serves.
        texts: as for `LsaEncoder.fit`.
        folder: made if it does not exist.
        progress: as for `LsaEncoder.fit`.
        cancel: as for `LsaEncoder.fit`.

    Returns:
        A fitted encoder, and whether it came from a file.

    Raises:
        ConfigError: as for `LsaEncoder.fit`.
        DTypeError: as for `LsaEncoder.fit`.
        CancelledError: ``cancel`` was set; no file was written.
        OSError: ``folder`` cannot be written.
    """
    key = encoder.key(texts)
    path = Path(folder) / f"{encoder.name}-{key[:16]}.npz"
    try:
        stored = LsaEncoder.load(path)
        if stored.fitted_key == key:
            return stored, True
    except (FormatError, FileNotFoundError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder.fit(texts, progress=progress, cancel=cancel)
    encoder.save(path)
    return encoder, False
