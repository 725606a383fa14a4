"""What other numbers in the factors change: norms out of Grams, never a dense weight change.

With ``D = s A^T B``, A (r, in), B (r, out), and stored factors ``A + dA``, ``B + dB``, the change is
``s [A; dA]^T K [B; dB]`` with ``K = [[0, I], [I, I]]``. Its squared norm under second moments ``G`` of the
inputs is ``s^2 tr(P K Q K)`` with ``P = [A; dA] G [A; dA]^T`` and ``Q = [B; dB] [B; dB]^T``: matrices of
twice the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microlora._checks import near
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError, ShapeError
from microlora.gram import Gram
from microlora.quantizing.types import Floats, Name, Pair, stored

__all__ = ["Measured", "inputs_of"]

Wide = NDArray[np.float64]
#: ``rows -> rows G rows^T``
Moment = Callable[[Wide], Wide]
#: Rows of inputs taken at a time.
BLOCK = 4096


def inputs_of(calibration: object, dims: Mapping[str, tuple[int, int]]) -> dict[str, Moment]:
    """Second moments of the inputs of the modules that have calibration inputs.

    Args:
        calibration: None, an array (n, in_features) that every module reads, or ``{module: array or Gram}``.
        dims: Widths of the modules.

    Raises:
        ConfigError: A module that the adapter does not have.
        ShapeError: Another width, or no rows.
        DTypeError: Not floating point.
        NonFiniteError: NaN or infinity.
    """
    if calibration is None:
        return {}
    if not isinstance(calibration, Mapping):
        shared: dict[int, Moment] = {}
        for module, (width, _) in dims.items():
            if width not in shared:
                shared[width] = _moment(f"calibration, module {module}", calibration, width)
        return {module: shared[width] for module, (width, _) in dims.items()}
    for module in calibration:
        if module not in dims:
            hint = near(module, dims) if isinstance(module, str) else ""
            raise ConfigError(
                f"calibration: got module {module!r}, expected some of {', '.join(list(dims)[:9])}{hint}"
            )
    return {m: _moment(f"calibration[{m!r}]", x, dims[m][0]) for m, x in calibration.items()}


def _moment(where: str, value: Any, width: int) -> Moment:
    if isinstance(value, Gram):
        if value.features != width:
            raise ShapeError(f"{where}: got a Gram of {value.features} features, expected {width}")
        gram = value
        return lambda rows: np.asarray(rows @ gram.apply(rows).astype(np.float64).T)
    x = np.asarray(value)
    if x.dtype.kind != "f":
        raise DTypeError(f"{where}: got dtype {x.dtype}, expected floating point")
    if x.ndim != 2 or x.shape[1] != width or not len(x):
        raise ShapeError(f"{where}: got shape {x.shape}, expected (n, {width}) with n at least 1")
    if not np.isfinite(x).all():
        raise NonFiniteError(f"{where}: contains NaN or infinity")

    def moment(rows: Wide) -> Wide:
        out = np.zeros((len(rows), len(rows)))
        for start in range(0, len(x), BLOCK):
            u = x[start : start + BLOCK].astype(np.float64) @ rows.T
            out += u.T @ u
        return out / len(x)

    return moment


def _plain(rows: Wide) -> Wide:
    return rows @ rows.T


def _crossed(q: Wide) -> Wide:
    """``K Q K`` of a matrix of four blocks."""
    r = len(q) // 2
    aa, ab, ba, bb = q[:r, :r], q[:r, r:], q[r:, :r], q[r:, r:]
    return np.block([[bb, ba + bb], [ab + bb, aa + ab + ba + bb]])


@dataclass
class Measured:
    """One module of an adapter, and what storing its factors in other types does to it.

    Attributes:
        name: The module.
        a: float32 (rank, in_features).
        b: float32 (rank, out_features).
        scaling: Of the module.
        moment: Of its inputs, None where there are none.
        dtypes: How the factors are stored now.
        b_along_rank: Whether blocks of B lie along the rank.
    """

    name: str
    a: Floats
    b: Floats
    scaling: float
    dtypes: Pair
    moment: Moment | None = None
    b_along_rank: bool = False
    _sides: dict[tuple[str, str], tuple[Wide, Wide | None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, adapter: Adapter, module: str, moment: Moment | None, *, b_along_rank: bool = False
    ) -> Measured:
        """A module of an adapter."""
        info, (a, b) = adapter.info(module), adapter.factors(module)
        dtypes = Pair(info.dtype_a, info.dtype_b)
        return cls(module, a, np.ascontiguousarray(b.T), info.scaling, dtypes, moment, b_along_rank)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and width of A and B as they are stored: blocks lie along the width."""
        (rank, n_in), (_, n_out) = self.a.shape, self.b.shape
        return (rank, n_in), (n_out, rank) if self.b_along_rank else (rank, n_out)

    def _side(self, side: str, kind: str) -> tuple[Wide, Wide | None]:
        """The matrix P or Q of a factor in a type: plain, and for A under the inputs' moments."""
        key = (side, kind)
        if key not in self._sides:
            x = self.a if side == "lora_a" else self.b
            turned = side == "lora_b" and self.b_along_rank
            back = stored(np.ascontiguousarray(x.T) if turned else x, kind, Name(self.name, side))
            wide = x.astype(np.float64)
            rows = np.vstack([wide, (back.T if turned else back) - wide])
            of_inputs = self.moment(rows) if self.moment is not None and side == "lora_a" else None
            self._sides[key] = (_plain(rows), of_inputs)
        return self._sides[key]

    def _norms(self, types: Pair, *, outputs: bool) -> tuple[float, float]:
        """Norms of the change and of the whole, of weight changes or of root-mean-square outputs."""
        plain, of_inputs = self._side("lora_a", types.lora_a)
        p = of_inputs if outputs else plain
        assert p is not None
        q, _ = self._side("lora_b", types.lora_b)
        r = len(p) // 2
        change = float((p * _crossed(q).T).sum())
        whole = float((p[:r, :r] * q[:r, :r].T).sum())
        return abs(self.scaling) * math.sqrt(max(change, 0.0)), abs(self.scaling) * math.sqrt(max(whole, 0.0))

    def delta(self, types: Pair) -> tuple[float, float]:
        """Frobenius norms of what changes of the weight change, and of the weight change."""
        return self._norms(types, outputs=False)

    def output(self, types: Pair) -> tuple[float, float] | None:
        """The same of the outputs on the calibration inputs (root of the mean over rows); None without."""
        return None if self.moment is None else self._norms(types, outputs=True)


def relative(norms: tuple[float, float]) -> float:
    """Error over size; nothing off nothing is 0."""
    error, size = norms
    return error / size if size > 0 else 0.0
