"""Learning that lasts: penalties that hold an adapter near what its earlier tasks needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

import microlora._core as _core
from microlora._checks import integer, read_json, real, text, wrong
from microlora.exceptions import DTypeError, FeedbackError, FormatError, ShapeError
from microlora.files import PathLike
from microlora.gram import Gram
from microlora.progress import CancelToken, Progress

__all__ = ["EwcPlusPlus"]

Floats = NDArray[np.float32]


class EwcPlusPlus(_core.Ewc):
    """Elastic weight consolidation and its relatives, in one unit: mean loss + ``lambda/2 sum F d^2``.

    F is a mean over samples of squared per-sample gradients (never the square of a batch's mean), so lambda
    means the same whatever the batch size. Forgetting gets less; it does not stop, and class-incremental
    tasks (new classes in one head) are beyond every kind here.

    =========  =======  =====================================================================================
    kind       lambda   importance F, and what it is about
    =========  =======  =====================================================================================
    "delta"    100      ``s^2 a_i c_j`` (means of ``x_i^2`` and ``g_j^2``) of the weight change A B itself:
                        the same for every (A Q, Q^-1 B); Kronecker-factored Laplace (arXiv 1805.07810)
    "factor"   10       diagonal Fisher of A and B (Kirkpatrick 2017); charges harmless changes of basis too
    "l2"       1        1: the baseline
    "si"       0.2      path integral of the loss's fall (Zenke 2017); fed by the optimiser's steps alone
    "mas"      0.03     mean ``|d |y|^2 / d th|`` (Aljundi 2018); needs no labels
    =========  =======  =====================================================================================

    With ``anchors="online"`` a task adds ``F <- gamma F + F_task`` and the anchor moves to the latest weights
    (Schwarz 2018, arXiv 1805.06370; "delta" sums a and averages c). ``"separate"`` keeps every task's anchor:
    the sum of penalties stays two vectors for kinds on A and B, and grows by one pair of factors a task for
    "delta". With ``fisher_decay=d`` F is a moving average over calls (in training over steps), ``F <- d F +
    (1 - d) F_batch``, bias-corrected and taken as it stands at a boundary, neither summed nor reset (EWC++,
    Chaudhry 2018, arXiv 1801.10112): it forgets old tasks' importance.

    Explicit gradient steps need ``ewc_lambda * max_importance * lr < 2`` for kinds on A and B; with
    ``step="proximal"`` any lambda is stable.

    Args:
        lora: A :class:`MicroLoRA` or :class:`LoraChain`. Its present weights begin the first task. Of DoRA
            layers A and B are held, their magnitudes stay free.
        ewc_lambda: Strength, 0 or above; None takes the table's. Other systems: an F summed over N samples
            needs lambda N here; squared means of batches of b without a 1/2 need about 2 lambda / b.
        kind: A row of the table.
        gamma: Share of the earlier importance that a new task leaves, 0 to 1.
        fisher: Outcomes that the squares are averaged over: ``"exact"`` (all, weighted by the model's
            probabilities), ``"sample"`` (one draw), ``"empirical"`` (the observed one), or ``"auto"``: exact
            up to 32 outcomes, else sample. Squared error counts as unit Gaussian noise.
        fisher_normalize: ``"max"`` divides a task's F by its largest value over all modules.
        fisher_decay: d of the moving average, between 0 and 1; None is a mean per task.
        step: ``"gradient"``, or ``"proximal"``: ``th <- (th + lr lambda F th*) / (1 + lr lambda F)`` after
            the optimiser's step; not for "delta".
        anchors: ``"online"`` or ``"separate"``.
        fisher_samples: Most samples per module and task; later ones are ignored and counted.
        seed: Seed of drawn outcomes.

    Raises:
        ConfigError: Settings out of range or without a meaning together.

    Example:
        >>> import numpy as np, microlora as ml
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["m"]), hidden_dim=8)
        >>> ewc = ml.EwcPlusPlus(lora, kind="delta")
        >>> _ = ewc.adapt(np.ones(8, np.float32), ml.Target(np.ones(8, np.float32)))
        >>> _ = lora.apply_updates(0.1)
        >>> ewc.start_new_task()
        >>> ewc.task_count, ewc.penalty()
        (1, 0.0)
    """

    grams: dict[str, Gram]
    _target: _core.MicroLora | _core.Chain

    def __new__(
        cls,
        lora: _core.MicroLora | _core.Chain,
        ewc_lambda: float | None = None,
        kind: str = "delta",
        gamma: float = 1.0,
        fisher: str = "auto",
        fisher_normalize: str = "none",
        fisher_decay: float | None = None,
        step: str = "gradient",
        anchors: str = "online",
        fisher_samples: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Nothing to hold yet; see the class."""
        learner = getattr(lora, "_lora", None) if isinstance(lora, _core.Chain) else lora
        if not isinstance(learner, _core.MicroLora):
            raise DTypeError(f"lora: got {type(lora).__name__}, expected a MicroLoRA or a LoraChain")
        self = super().__new__(
            cls,
            learner,
            ewc_lambda=None if ewc_lambda is None else real("ewc_lambda", ewc_lambda, "a number, 0 or above"),
            kind=text("kind", kind),
            gamma=real("gamma", gamma, "0 <= gamma <= 1"),
            fisher=text("fisher", fisher),
            fisher_normalize=text("fisher_normalize", fisher_normalize),
            fisher_decay=None
            if fisher_decay is None
            else real("fisher_decay", fisher_decay, "0 < decay < 1"),
            step=text("step", step),
            anchors=text("anchors", anchors),
            fisher_samples=(
                None if fisher_samples is None else integer("fisher_samples", fisher_samples, 1, 2**53)
            ),
            seed=integer("seed", seed, 0, 2**64 - 1),
        )
        self._target = lora
        self.grams = {}
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, defaults filled in."""
        return dict(json.loads(self.settings_json))

    @property
    def ewc_lambda(self) -> float:
        """Strength of the penalty."""
        return float(self.settings["ewc_lambda"])

    @property
    def kind(self) -> str:
        """What the importance is, and where it acts."""
        return str(self.settings["kind"])

    def accumulate_fisher(
        self,
        x: ArrayLike,
        feedback: Any = None,
        module: str | None = None,
        base: ArrayLike | None = None,
        *,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Adds samples to the running task's importance; the learner does not change.

        Squares are those of each sample's gradient at the present weights, at the cost of its backward.

        Args:
            x: float32 (in_features,) or (n, in_features).
            feedback: On a learner: a feedback object for one x; or per-sample gradients ``dL/dy`` (n,
                out_features), not divided by n, with ``fisher="empirical"`` or ``"auto"``; or (passes, n,
                out_features) of gradients that the caller has weighted by the roots of its own
                probabilities. On a chain: labels (n,) or targets (n, out). Kind "mas" needs none.
            module: Name of the module; None where there is only one. Chains take all their layers.
            base: float32 (out_features,) or (n, out_features): output of the frozen layer.
            progress: Called with ``(done, total, message)`` between batches of a chain.
            cancel: A token looked at between them.

        Raises:
            FeedbackError: Feedback that is no likelihood (a gradient, a cosine target, a reward) where the
                Fisher is ``"exact"`` or ``"sample"``; ``"auto"`` takes the observed gradient then.
            ShapeError: Widths or rows that do not fit.
            NonFiniteError: NaN or infinity, or squares beyond float32. Nothing is counted in any error,
                except that a chain keeps its batches of 256 before a row whose squares overflow.
        """
        if isinstance(self._target, _core.Chain):
            if module is not None or base is not None:
                raise wrong("module, base", (module, base), "none with a chain")
            if feedback is None:
                if self.kind != "mas":
                    raise wrong("feedback", None, "labels or targets")
                rows = np.asarray(x)
                feedback = np.zeros((*rows.shape[:-1], self._target.out_features), np.float32)
                if self._labelled(self._target):
                    feedback = np.zeros(len(rows), np.int64)
            self.observe_chain(self._target, x, feedback, progress, cancel)
        elif isinstance(feedback, _core.FeedbackBase):
            if self.observe_event(x, feedback, module, base) is False:
                return
        elif feedback is None:
            self._need_mas()
            self.observe_batch(x, None, module, base)
        else:
            self.observe_batch(x, self._passes(feedback), module, None)

    @staticmethod
    def _labelled(chain: _core.Chain) -> bool:
        return getattr(chain, "head", "mse") == "cross_entropy"

    def _need_mas(self) -> None:
        if self.kind != "mas":
            raise wrong("feedback", None, 'feedback or gradients (only kind "mas" needs none)')

    def _passes(self, feedback: Any) -> list[Any]:
        array = np.asarray(feedback)
        if array.dtype.kind != "f":
            raise DTypeError(
                f"feedback: got {type(feedback).__name__} of dtype {array.dtype}, expected a feedback object "
                "or an array of gradients"
            )
        if array.ndim == 3 and len(array):
            return list(array)
        if array.ndim not in (1, 2):
            raise ShapeError(f"feedback: got shape {array.shape}, expected (n, out) or (passes, n, out)")
        mode = self.settings["fisher"]
        if mode not in ("auto", "empirical") and self.kind != "mas":
            raise FeedbackError(
                f"feedback: bare gradients are no likelihood, so fisher={mode!r} has no probabilities for "
                'them: make it with fisher="auto" or "empirical", or pass (passes, n, out) with each '
                "pass weighted by the roots of your own probabilities"
            )
        return [array]

    def save(self, path: PathLike) -> str:
        """Writes the state beside an adapter, whole or not at all.

        Args:
            path: An adapter's directory (the file in it is ``ewc_state.safetensors``) or its single file
                ``<stem>.safetensors`` (the file beside it is ``<stem>.ewc.safetensors``).

        Returns:
            The name of the file.

        Raises:
            OSError: The system refused; an older file is left whole.
        """
        file = _sidecar(path)
        _core.write_file(file, self.export_state())
        return file

    @classmethod
    def load(cls, lora: _core.MicroLora | _core.Chain, path: PathLike) -> Self:
        """A consolidation that goes on from :meth:`save`, with the settings of the file.

        Args:
            lora: A learner or chain with the same modules and shapes.
            path: As for :meth:`save`.

        Raises:
            FormatError: Not a state, or one of a newer version.
            ConfigError: Other modules.
            ShapeError: Other shapes.
            OSError: The file cannot be read.
        """
        data = Path(_sidecar(path)).read_bytes()
        self = cls(lora, **json.loads(_core.Ewc.settings_of(data)))
        self.import_state(data)
        return self

    def export_state(self) -> bytes:
        """Everything as safetensors bytes: means, open sums, anchors, paths, generator and :attr:`grams`.

        The header states the unit: ``"fisher": "per_sample_mean"``.
        """
        extra = [
            (f"{module}/{name}", list(array.shape), np.ascontiguousarray(array, "<f4").tobytes())
            for module, gram in self.grams.items()
            for name, array in gram.arrays().items()
        ]
        facts = {module: gram.facts() for module, gram in self.grams.items()}
        return self.export(extra, json.dumps(facts) if facts else None)

    def import_state(self, data: bytes) -> None:
        """Goes on bit for bit from :meth:`export_state`.

        Strength, gamma, Fisher, step, sample cap and seed stay this one's own; kind, anchors, moving average
        and normalisation must be equal, because the numbers mean something else otherwise.

        Args:
            data: The bytes.

        Raises:
            FormatError: Not a state, or one of a newer version.
            ConfigError: Another kind or other modules.
            ShapeError: Other shapes. Nothing changes in any error.
        """
        if not isinstance(data, bytes):
            raise DTypeError(f"data: got {type(data).__name__}, expected bytes")
        before = self.export([], None)
        extra, note = self.restore(data)
        try:
            self.grams = _grams(extra, note)
        except FormatError:
            self.restore(before)
            raise

    def __repr__(self) -> str:
        """Settings and sizes, never numbers of the state."""
        return (
            f"{type(self).__name__}(kind={self.kind!r}, ewc_lambda={self.ewc_lambda:g}, "
            f"tasks={self.task_count}, samples={self.n_samples}, {self.memory_bytes:,} bytes)"
        )


def _grams(extra: list[tuple[str, list[int], bytes]], note: str | None) -> dict[str, Gram]:
    facts: Mapping[str, Any] = {} if note is None else read_json("ewc state: grams", note)
    arrays: dict[str, dict[str, Floats]] = {module: {} for module in facts}
    for name, shape, raw in extra:
        module, _, what = name.rpartition("/")
        if module not in arrays or len(raw) != 4 * int(np.prod(shape)):
            raise FormatError(f"ewc state: unknown tensor {name!r}")
        arrays[module][what] = np.frombuffer(raw, "<f4").reshape(shape)
    return {module: Gram.of(arrays[module], facts[module]) for module in facts}


def _sidecar(path: PathLike) -> str:
    name = os.fspath(path)
    if name.endswith((".ewc.safetensors", "ewc_state.safetensors")):
        return name
    if name.endswith(".safetensors") and not os.path.isdir(name):
        return name.removesuffix(".safetensors") + ".ewc.safetensors"
    return os.path.join(name, "ewc_state.safetensors")
