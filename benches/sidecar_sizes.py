"""What side-cars take, by dtype and size of the delta: `python benches/sidecar_sizes.py --out FILE`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import microlora as ml
from rows.fusing import RANK, adapter_of, write_base

WIDTH = 2048
#: Deviation of the delta, as a share of the weights'.
RATIOS = (1e-3, 1e-2, 1e-1, 1e3)


def main() -> None:
    """One line for each dtype and ratio; every fused file is unfused and compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="FILE")
    path, lines = Path(parser.parse_args().out), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in ("F32", "BF16", "F16"):
            write_base(folder / "base", WIDTH, dtype, 1)
            for ratio in RATIOS:
                for old in ("out", "out.unfuse", "back"):
                    (folder / old).unlink(missing_ok=True)
                done = ml.fuse(folder / "base", adapter_of(WIDTH, ratio, 1), out=folder / "out")
                ml.unfuse(folder / "out", folder / "out.unfuse", out=folder / "back")
                line = {
                    "dtype": dtype,
                    "ratio": ratio,
                    "width": WIDTH,
                    "rank": RANK,
                    "lossy": sum(t.lossy for t in done.tensors) / WIDTH**2,
                    "residual": done.residual_bytes / done.touched_bytes,
                    "adapter": done.adapter_bytes / done.touched_bytes,
                    "exact": (folder / "back").read_bytes() == (folder / "base").read_bytes(),
                }
                lines.append(json.dumps(line))
                print(lines[-1], flush=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
