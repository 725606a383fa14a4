"""``microlora verify`` and ``microlora sign``: whether a file is the one that was meant, and who says so."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from microlora.cli.words import in_flags
from microlora.exceptions import VerificationError

__all__ = ["add_parser", "run_sign", "run_verify"]

EXIT_DIFFERS = 1
_VERIFY = """Checks an adapter against its header's fingerprint and whatever else is given. Exit code: 0 when
all is as it should be, 1 when something differs or nothing can be checked, 2 where the command itself
failed."""
_SIGN = """Writes a detached Ed25519 signature of a file, or of all files of a directory (extra: signing).
Make a key with: openssl genpkey -algorithm ed25519 -out key.pem
and its public half with: openssl pkey -in key.pem -pubout -out pub.pem"""


def add_parser(commands: Any) -> None:
    """Add both commands to the subparsers of `microlora.cli.build_parser`."""
    parser = commands.add_parser(
        "verify", help="check that a file is the one that was meant", description=_VERIFY
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a file, or the directory of a PEFT adapter")
    add("--sha256", metavar="HEX", help="of the whole file")
    add("--manifest", type=Path, metavar="M.json", help="{file: sha256} of a directory's files")
    add("--public-key", metavar="KEY", help="of the signer: a PEM file, or 64 hex digits")
    add("--signature", type=Path, metavar="FILE.sig", help="where it lies (PATH.sig)")
    parser.set_defaults(run=run_verify, fail=parser.error)
    parser = commands.add_parser("sign", help="sign an adapter file", description=_SIGN)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a file or directory")
    add("--key", metavar="KEY.pem", help="private key: a PEM file")
    add("--out", type=Path, metavar="FILE.sig", help="where the signature goes (PATH.sig)")
    add(
        "--manifest",
        action="store_true",
        help="sign nothing: print the manifest that verify --manifest takes",
    )
    add("--overwrite", action="store_true", help="replace an older signature")
    parser.set_defaults(run=run_sign, fail=parser.error)


def run_verify(args: argparse.Namespace) -> int:
    """Verify; the exit code."""
    from microlora.trust import verify

    try:
        done = verify(
            args.path,
            sha256=args.sha256,
            manifest=args.manifest,
            public_key=args.public_key,
            signature=args.signature,
        )
    except VerificationError as err:
        print(f"microlora: {in_flags(str(err), vars(args))}", file=sys.stderr)
        return EXIT_DIFFERS
    print(in_flags(str(done), vars(args)))
    return 0


def run_sign(args: argparse.Namespace) -> int:
    """Sign, or print the manifest; the exit code."""
    from microlora import trust

    if args.manifest == (args.key is not None):
        args.fail("give one of --key and --manifest")
    if args.manifest and (args.out is not None or args.overwrite):
        args.fail("--out and --overwrite go with --key; --manifest prints: add > FILE.json")
    if args.manifest:
        print(json.dumps(trust.manifest(args.path), indent=2))
    else:
        print(trust.sign(args.path, args.key, out=args.out, overwrite=args.overwrite))
    return 0
