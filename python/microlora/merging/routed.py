"""Adapters whose weights depend on the input: members stay apart, outputs are mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

import microlora._core as _core
from microlora._checks import SCHEMA_KEY, check_document, near, read_json, wrong
from microlora.adapter import Adapter
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FormatError,
    LayoutError,
    NonFiniteError,
    ShapeError,
    UnknownModuleError,
)
from microlora.files import load_plain
from microlora.merging.parents import Parents, Source, listed
from microlora.merging.router import CentroidRouter, Router
from microlora.micro_lora import MicroLoRA

__all__ = ["RoutedEnsemble"]

Floats = NDArray[np.float32]

SCHEMA_VERSION = 1
FILE = "ensemble.json"


class RoutedEnsemble:
    """Members side by side, mixed by weights that depend on the input: ``y = sum_k pi_k(x) y_k``.

    No weights are merged. Members whose weight is exactly 0 for a row are not evaluated on it. With one
    member of weight 1 it is that member; with equal weights it is :func:`compose_parallel`'s average.

    Args:
        adapters: Members, in the router's order: :class:`Adapter`, :class:`MicroLoRA` (as it stands now) or
            paths. One that lacks a module adds nothing to it.
        router: An object with ``weights(x) -> (n, K)``, or a function of x.

    Raises:
        ConfigError: No members, or other base weights.
        ShapeError: Modules of one name with different widths; centroids for another number of members.
        DTypeError: No router.
    """

    __slots__ = ("_members", "_parents", "_router")

    def __init__(self, adapters: Sequence[Source], router: Router | Any) -> None:
        members = listed(adapters)
        if not (hasattr(router, "weights") or callable(router)):
            raise DTypeError(
                f"router: got {type(router).__name__}, expected an object with weights(x) or a function of x"
            )
        self._parents = Parents.of([(str(i), a) for i, a in enumerate(members)])
        self._members = [MicroLoRA(a) for a in self._parents.adapters.values()]
        if isinstance(router, CentroidRouter) and len(router.centroids) != len(self._members):
            raise ShapeError(
                f"router: got {len(router.centroids)} centroids, expected {len(self._members)}, "
                "one for each member"
            )
        self._router = router

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The members."""
        return tuple(self._parents.adapters.values())

    @property
    def router(self) -> Router | Any:
        """What weighs them."""
        return self._router

    def modules(self) -> list[str]:
        """Modules that any member has."""
        return list(self._parents.modules)

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """``{module: (in_features, out_features)}``."""
        return dict(self._parents.dims)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"RoutedEnsemble({len(self)} members, {len(self.modules())} modules, {self._router!r})"

    def weights(self, x: ArrayLike) -> Floats:
        """The router's weights, checked: float32 (n, K), or (K,) for one row.

        Raises:
            ShapeError: Not one weight for each member and row.
            NonFiniteError: NaN or infinity among them.
        """
        with np.errstate(over="ignore"):
            rows = np.asarray(x, np.float32)
        many = np.atleast_2d(rows)
        route = getattr(self._router, "weights", self._router)
        given = cast(Any, route)(many)
        with np.errstate(over="ignore"):
            pi = np.asarray(given, np.float32)
        if pi.shape != (len(many), len(self)):
            raise ShapeError(f"router: got weights of shape {pi.shape}, expected ({len(many)}, {len(self)})")
        if not np.isfinite(pi).all():
            raise NonFiniteError("router: weights contain NaN or infinity")
        return pi[0] if rows.ndim == 1 else pi

    def forward(self, x: ArrayLike, module: str | None = None, out: Floats | None = None) -> Floats:
        """The mixed output ``dY``.

        Args:
            x: Floating point (in_features,) or (n, in_features).
            module: Name of the module; None where there is only one.
            out: float32, C-contiguous, of the result's shape: written to and returned.

        Returns:
            float32 (out_features,) or (n, out_features).

        Raises:
            UnknownModuleError: No member has such a module.
            ShapeError: Another width, or an ``out`` of another shape.
            LayoutError: ``out`` is not a writable, contiguous float32 array.
            NonFiniteError: NaN or infinity in x or in the weights. ``out`` is then as it was.
        """
        name = self._name(module)
        n_in, n_out = self._parents.dims[name]
        rows = np.asarray(x)
        if rows.dtype.kind != "f":
            raise DTypeError(f"x: got dtype {rows.dtype}, expected floating point")
        if rows.ndim not in (1, 2) or rows.shape[-1] != n_in:
            raise ShapeError(f"x: got shape {rows.shape}, expected ({n_in},) or (n, {n_in})")
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
            many = np.ascontiguousarray(np.atleast_2d(rows), np.float32)
        if not np.isfinite(many).all():
            raise NonFiniteError("x: contains NaN or infinity")
        shape = (n_out,) if rows.ndim == 1 else (len(many), n_out)
        if out is not None:
            _check_out(out, shape)
        pi = self.weights(many)
        total = np.zeros((len(many), n_out), np.float32)
        for k, member in enumerate(self._members):
            share = pi[:, k]
            live = share != 0
            if str(k) not in self._parents.modules[name] or not live.any():
                continue
            if live.all():
                total += share[:, None] * member.forward(many, name)
            else:
                total[live] += share[live, None] * member.forward(np.ascontiguousarray(many[live]), name)
        if out is None:
            return total.reshape(shape)
        out[...] = total.reshape(shape)
        return out

    def _name(self, module: str | None) -> str:
        names = self.modules()
        if module is None:
            if len(names) != 1:
                raise wrong("module", None, f"one of {', '.join(names[:9])}")
            return names[0]
        if module not in self._parents.modules:
            raise UnknownModuleError(
                f"module: got {module!r}, expected one of {', '.join(names[:9])}{near(str(module), names)}"
            )
        return module

    # -- files --

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a directory: a file for each member, and last ``ensemble.json`` with the router.

        Raises:
            ConfigError: A router that is no :class:`CentroidRouter`; others cannot be written.
            OSError: The system refused.
        """
        if not isinstance(self._router, CentroidRouter):
            raise ConfigError(
                f"router: got {type(self._router).__name__}, expected a CentroidRouter; "
                "others cannot be written"
            )
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        files = [f"member_{i}.safetensors" for i in range(len(self))]
        for file, adapter in zip(files, self.adapters, strict=True):
            _core.save_single(adapter, folder / file)
        document = {SCHEMA_KEY: SCHEMA_VERSION, "members": files, "router": self._router.to_dict()}
        _core.write_file(folder / FILE, json.dumps(document).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutedEnsemble:
        """Reads what :meth:`save` wrote.

        Raises:
            FormatError: Not such a directory, or a newer version.
            OSError: A file cannot be read.
        """
        folder = Path(path)
        document = read_json(str(folder / FILE), (folder / FILE).read_bytes())
        try:
            values = check_document("ensemble", document, ("members", "router"), SCHEMA_VERSION)
            files = values.get("members")
            if not isinstance(files, list) or not all(
                isinstance(f, str) and Path(f).name == f for f in files
            ):
                raise wrong("members", files, "names of files in the directory")
            router = CentroidRouter.from_dict(values.get("router", {}))
            return cls([load_plain(folder / file) for file in files], router)
        except (ConfigError, ShapeError, NonFiniteError) as e:
            raise FormatError(f"{folder / FILE}: {e}") from e


def _check_out(out: object, shape: tuple[int, ...]) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != np.float32:
        came = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise DTypeError(f"out: got {came}, expected a float32 array")
    if out.shape != shape:
        raise ShapeError(f"out: got shape {out.shape}, expected {shape}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise LayoutError("out: got a read-only or strided array, expected a writable, C-contiguous one")
