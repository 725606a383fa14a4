"""``microlora quantize``: an adapter in few bits, and what it lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from microlora.cli.convert import add_reading, progress
from microlora.exceptions import ConfigError

__all__ = ["add_parser", "calibration_of", "run"]

_TEXT = """Writes an adapter with its factors in blocks of few bits, which run as they are, and prints what
was lost by it. Give --type, or --target-error for the smallest types that meet it. Exit code: 0 when it was
written, 2 when it was not."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `microlora.cli.build_parser`."""
    parser = commands.add_parser("quantize", help="store an adapter in few bits", description=_TEXT)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a file or directory of any format")
    add("target", type=Path, metavar="DST", help="single file to write (.safetensors)")
    add("--type", metavar="T", help="q8_0, q6_k, q5_k, q4_k, q4_1, q4_0, q4_k_m, f16, bf16")
    add("--target-error", type=float, metavar="E", help="take the smallest types within this relative error")
    add(
        "--calibration",
        type=Path,
        metavar="X.npz",
        help="inputs: one array for all modules (n, in), or one per module by its name",
    )
    add(
        "--b-along-rank",
        action="store_true",
        help="blocks of B along the rank, as GGUF has them (the rank is then whole blocks)",
    )
    add_reading(add)
    add("--overwrite", action="store_true", help="replace what lies at DST")
    parser.set_defaults(run=run, fail=parser.error)


def calibration_of(path: Path) -> Any:
    """Inputs from a ``.npz``: its only array, or all by their names.

    Raises:
        ConfigError: Not an archive of arrays, or a damaged one.
        FormatError: Not a regular file.
        MissingPathError: There is no such file.
        OSError: It cannot be read.
    """
    import zipfile
    import zlib

    import numpy as np

    from microlora._file_checks import regular

    regular("calibration", path, "an .npz of float arrays")
    # RuntimeError is an encrypted archive, NotImplementedError among them another compression
    broken = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, MemoryError)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, AttributeError, TypeError, *broken):
        raise ConfigError(
            f"calibration: got {str(path)!r}, which is none or damaged, expected an .npz of float arrays"
        ) from None
    if not arrays:
        raise ConfigError(f"calibration: got {str(path)!r}, which is empty, expected at least one array")
    only = list(arrays) == ["arr_0"] or list(arrays) == ["x"]
    return next(iter(arrays.values())) if only else arrays


def run(args: argparse.Namespace) -> int:
    """Quantise; the exit code."""
    if (args.type is None) == (args.target_error is None):
        args.fail("give one of --type and --target-error")
    import microlora as ml
    from microlora._destinations import check_destination
    from microlora.files import load_plain

    check_destination("dst", args.target, "safetensors", overwrite=args.overwrite)

    calibration = None if args.calibration is None else calibration_of(args.calibration)
    source = load_plain(
        args.source,
        base_config=args.base_config,
        allow=args.allow,
        alpha=args.alpha,
        orientation=args.orientation,
    )
    with progress() as tell:
        made = ml.quantize(
            source,
            args.type,
            calibration=calibration,
            target_error=args.target_error,
            b_along_rank=args.b_along_rank,
            progress=tell,
        )
        ml.save(made.adapter, args.target, "safetensors")
    print(made.report)
    return 0
