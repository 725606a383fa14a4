"""Adapters one after another, and side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

import microlora._core as _core
from microlora._checks import flag, real
from microlora.adapter import Adapter
from microlora.exceptions import DTypeError, ShapeError
from microlora.merging.parents import Parents, Source, described, listed
from microlora.merging.routed import RoutedEnsemble
from microlora.merging.router import Router

__all__ = ["compose_parallel", "compose_sequential"]

_log = logging.getLogger(__name__)


def compose_sequential(adapters: Sequence[Source], *, residual: bool = True) -> Adapter:
    """One adapter that does what several do one after another on the same layer.

    With the residual, ``y = x + a(x)`` and then ``y + b(y)``: the delta is ``(I + D_b)(I + D_a) - I``, its
    rank the sum of ranks. Without, ``b(a(x))``: the delta is ``D_b D_a``, its rank the smallest. Tensors that
    are no factors are left out, with a warning in the log.

    Args:
        adapters: In the order of their work: :class:`Adapter`, :class:`MicroLoRA` or paths.
        residual: Whether each sees its input too. Layers must then be square; a module that an adapter lacks
            stays as it is.

    Raises:
        ShapeError: Widths that do not follow one another.
        ConfigError: No adapters; without the residual: a module that one of them lacks.
    """
    flag("residual", residual)
    parents = _numbered(adapters, check=False)
    made = _core.compose(list(parents.adapters.values()), residual)
    return _made(made, parents, "composed one after another")


@overload
def compose_parallel(adapters: Sequence[Source], *, weights: ArrayLike | None = None) -> Adapter: ...
@overload
def compose_parallel(adapters: Sequence[Source], *, weights: Router) -> RoutedEnsemble: ...
def compose_parallel(
    adapters: Sequence[Source], *, weights: ArrayLike | Router | None = None
) -> Adapter | RoutedEnsemble:
    """Adapters side by side: ``y = sum w_k y_k``, exactly.

    Tensors of an adapter that are no factors are left out, with a warning in the log.

    Args:
        adapters: :class:`Adapter`, :class:`MicroLoRA` or paths. One that lacks a module adds nothing to it.
        weights: None averages; a number for each adapter; or a router whose weights depend on the input: an
            object with ``weights(x) -> (n, K)``, such as :class:`CentroidRouter`, or a function of x.

    Returns:
        An :class:`Adapter` of the sum of ranks, or a :class:`RoutedEnsemble` for a router.

    Raises:
        ConfigError: No adapters, or weights that are no finite numbers.
        ShapeError: Another number of weights; modules of one name with different widths.
    """
    if callable(weights) or hasattr(weights, "weights"):
        return RoutedEnsemble(adapters, weights)
    parents = _numbered(adapters)
    k = len(parents.adapters)
    shares = [1.0 / k] * k
    if weights is not None:
        given = np.asarray(weights)
        if given.dtype.kind not in "fiu":
            raise DTypeError(f"weights: got dtype {given.dtype}, expected numbers")
        if given.shape != (k,):
            raise ShapeError(f"weights: got shape {given.shape}, expected ({k},), one for each adapter")
        shares = [real(f"weights[{i}]", w, "a finite number") for i, w in enumerate(given.tolist())]
    made = _core.combine(list(zip(parents.adapters.values(), shares, strict=True)))
    return _made(made, parents, "composed side by side")


def _numbered(adapters: object, *, check: bool = True) -> Parents:
    """Adapters named by their places."""
    return Parents.of([(str(i), item) for i, item in enumerate(listed(adapters))], check_shapes=check)


def _made(core: _core.Adapter, parents: Parents, description: str = "") -> Adapter:
    """The result; a sum has no report, so that tensors that are left out are told in the log."""
    notes = parents.notes()
    if notes:
        _log.warning("%s", "; ".join(notes))
    return described(core, parents.metadata(), description)


def combine(terms: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The exact sum of adapters times numbers; what the operators of :class:`Adapter` do.

    Tensors that are no factors are left out, with a warning in the log.

    Raises:
        ShapeError: Modules of one name with different widths.
        ConfigError: A factor that is no finite number; different base weights.
    """
    parents = Parents.of([(str(i), adapter) for i, (adapter, _) in enumerate(terms)])
    made = _core.combine([(a, real("factor", c, "a finite number")) for a, c in terms])
    return _made(made, parents)
