"""A small network of frozen layers with adapters, trained without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

import microlora._core as _core
from microlora.adapter import Adapter
from microlora.config import LoraConfig
from microlora.exceptions import ConfigError, DTypeError, ShapeError, UnsupportedVariantError
from microlora.micro_lora import MicroLoRA

__all__ = ["LoraChain"]

LayerLike = tuple[ArrayLike, ArrayLike | None] | ArrayLike
Floats = NDArray[np.float32]


def layer_name(i: int) -> str:
    """Module name of the i-th layer."""
    return f"layers.{i}"


class LoraChain(_core.Chain):
    """Frozen linear layers ``z = h W^T + b``, each with a LoRA, activations between them, a loss at the end.

    Forward, backward and training run in the compiled core; :class:`AdapterTrainer` takes a chain wherever it
    takes a :class:`MicroLoRA`. The first forward equals the frozen network, because every B starts at 0.

    Args:
        layers: ``(W, b)`` pairs or bare ``W``: W float32 (out, in) as in ``torch.nn.Linear``, b (out,) or
            None.
        rank: Rank of every layer's adapter, cut to the smaller width where a layer is narrower; or one per
            layer.
        alpha: Scaling numerator of every layer, or by name (``{"layers.0": 16.0}``); None is twice each
            layer's rank.
        activation: ``"relu"``, ``"gelu"`` (exact, arXiv 1606.08415) or ``"tanh"``, between layers.
        head: ``"cross_entropy"`` (integer labels) or ``"mse"`` (targets; ``1/2 |z - t|^2`` per row).
        use_dora: For all layers, or one flag per layer: weight-decomposed adapters (DoRA, arXiv 2402.09353).
            A trained magnitude per output, equal to PEFT's; norms come from the factors, and backward holds
            them constant, as the paper does.
        use_rslora: Scaling ``alpha / sqrt(rank)``.
        dtype: How A and B are stored: ``"f32"``, ``"f16"`` or ``"bf16"`` (learning stays in float32).
        seed: Seed of A.
        gradient_checkpointing: Keep only every ``ceil(sqrt(L))``-th input and compute the others again in
            backward (arXiv 1604.06174): less memory, the same bits, up to one forward more.

    Raises:
        ShapeError: Widths that do not follow one another.
        ConfigError: Unknown names, settings out of range.
        NonFiniteError: NaN or infinity in a weight.

    Example:
        >>> import numpy as np, microlora as ml
        >>> rng = np.random.default_rng(0)
        >>> w = [rng.standard_normal((16, 8), np.float32), rng.standard_normal((3, 16), np.float32)]
        >>> chain = ml.LoraChain(w, rank=4)
        >>> chain.forward(np.ones((5, 8), np.float32)).shape
        (5, 3)
    """

    _lora: MicroLoRA
    _options: dict[str, Any]

    def __new__(
        cls,
        layers: Sequence[LayerLike],
        *,
        rank: int | Sequence[int] = 8,
        alpha: float | Mapping[str, float] | None = None,
        activation: str = "relu",
        head: str = "cross_entropy",
        use_dora: bool | Sequence[bool] = False,
        use_rslora: bool = False,
        dtype: str = "f32",
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Puts the layers together; see the class."""
        if not isinstance(layers, Sequence):
            raise DTypeError(
                f"layers: got {type(layers).__name__}, expected a list of (W, b) pairs; of a torch module "
                "[(m.weight, m.bias) for m in network if isinstance(m, torch.nn.Linear)]"
            )
        pairs = [_pair(i, layer) for i, layer in enumerate(layers)]
        if not pairs:
            raise ConfigError("layers: got none, expected at least one")
        names = [layer_name(i) for i in range(len(pairs))]
        cut = [min(w.shape) for w, _ in pairs]
        ranks = [min(rank, most) for most in cut] if isinstance(rank, int) else list(rank)
        if len(ranks) != len(pairs):
            raise ConfigError(f"rank: got {len(ranks)} ranks, expected one, or {len(pairs)} (one per layer)")
        first = ranks[0]
        alphas = _alphas(names, ranks, alpha)
        own = {n: r for n, r in zip(names, ranks, strict=True) if r != first}
        config = LoraConfig(
            rank=first,
            alpha=alphas[names[0]],
            target_modules=tuple(names),
            use_rslora=use_rslora,
            dtype=dtype,
            module_ranks=own,
            module_alphas={n: a for n, a in alphas.items() if a != alphas[names[0]]},
        )
        dims = {n: (w.shape[1], w.shape[0]) for n, (w, _) in zip(names, pairs, strict=True)}
        lora = MicroLoRA(config, dims=dims, seed=seed)
        flags = [use_dora] * len(pairs) if isinstance(use_dora, bool) else [bool(d) for d in use_dora]
        self = super().__new__(
            cls,
            lora,
            pairs,
            activation=activation,
            head=head,
            use_dora=flags,
            gradient_checkpointing=gradient_checkpointing,
        )
        self._lora = lora
        self._options = {
            "activation": activation,
            "head": head,
            "use_dora": flags,
            "seed": seed,
            "gradient_checkpointing": gradient_checkpointing,
        }
        return self

    @property
    def lora(self) -> MicroLoRA:
        """The learner that holds every layer's adapter, as modules ``layers.0``, ``layers.1``, ...

        Raises:
            UnsupportedVariantError: With DoRA, whose adapters mean nothing without their base weights.
        """
        if self.use_dora:
            raise UnsupportedVariantError(
                "lora: a DoRA layer is no plain LoRA, it needs its base weights and magnitudes; use "
                "chain.forward, chain.fuse() for plain weights, chain.export_state() to keep it"
            )
        return self._lora

    @property
    def config(self) -> LoraConfig:
        """Rank, alpha and dtype of the adapters."""
        return self._lora.config

    @property
    def use_dora(self) -> bool:
        """Whether any layer is DoRA."""
        return any(self._options["use_dora"])

    @property
    def digest(self) -> str:
        """SHA-256 of the frozen layers, activation, head and which layers are DoRA: which network it is."""
        import hashlib  # Loads OpenSSL, which `import microlora` need not wait for.

        sha = hashlib.sha256()
        for key in ("activation", "head", "use_dora"):
            sha.update(repr(self._options[key]).encode())
        for w, b in self.frozen():
            sha.update(repr((w.shape, b is None)).encode())
            sha.update(w.tobytes() + (b"" if b is None else b.tobytes()))
        return sha.hexdigest()

    @property
    def activation(self) -> str:
        """Function between layers."""
        return str(self._options["activation"])

    @property
    def head(self) -> str:
        """Loss at the end."""
        return str(self._options["head"])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether backward computes most inputs again."""
        return bool(self._options["gradient_checkpointing"])

    @property
    def version(self) -> int:
        """Counts every change of the weights."""
        return self._lora.version

    @property
    def param_count(self) -> int:
        """Numbers that learn: all factors, and with DoRA the magnitudes."""
        return self._lora.param_count + sum(m.size for m in self.magnitudes())

    @property
    def memory_bytes(self) -> int:
        """Resident bytes: frozen layers and the learner."""
        return self.frozen_bytes + self._lora.memory_bytes

    def modules(self) -> list[str]:
        """Names of the layers."""
        return self._lora.modules()

    def set_storage(self, dtype: str) -> None:
        """What forward reads: A and B rounded to ``dtype``, while learning goes on in float32."""
        self._lora.set_storage(dtype)

    def predict(self, x: ArrayLike) -> NDArray[np.int64]:
        """Class of the largest output of each row.

        Args:
            x: float32 (n, in_features).

        Returns:
            int64 (n,).
        """
        return np.asarray(self.forward(np.atleast_2d(np.asarray(x))).argmax(axis=1), np.int64)

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """Mean loss over rows; nothing is learned.

        Args:
            x: float32 (n, in_features).
            y: Integer labels (n,), or float32 targets (n, out_features) for the mse head.
        """
        return float(np.mean(_core.evaluate(self, x, y), dtype=np.float64))

    def set_factors(self, factors: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
        """Takes A and B of every layer, whole or not at all; what rules remember is forgotten.

        Args:
            factors: ``{"layers.0": (lora_a (rank, in), lora_b (out, rank)), ...}``, every layer once.

        Raises:
            ShapeError: Shapes or layers that do not fit.
        """
        config = self._lora.config
        unknown = [name for name in factors if name not in self._lora]
        if unknown:
            raise ShapeError(f"factors: got {', '.join(unknown)}, expected {', '.join(self._lora.modules())}")
        alphas = {name: config.alpha_of(name) for name in factors}
        self._lora.restore(
            Adapter.from_factors(factors, alpha=alphas, use_rslora=config.use_rslora, dtype=config.dtype)
        )

    def factors(self) -> dict[str, tuple[Floats, Floats]]:
        """Copies of A (rank, in) and B (out, rank) of every layer, float32."""
        return {name: (self._lora[name].lora_a, self._lora[name].lora_b) for name in self._lora.modules()}

    def snapshot(self) -> bytes:
        """All that learns (factors, float32 masters, magnitudes), for :meth:`restore`."""
        return self.export_state()

    def restore(self, state: bytes) -> None:
        """Goes back to a snapshot, whole or not at all."""
        self.import_state(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what learns (not the frozen layers) to one file, whole or not at all.

        Raises:
            OSError: The system refused; an older file is left whole.
        """
        _core.write_file(os.fspath(path), self.export_state())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes what :meth:`save` wrote, into a chain of the same shapes; whole or not at all.

        Raises:
            FormatError: Another file.
            ShapeError: Of another chain.
            ConfigError: DoRA where this one has none, or the other way round.
            OSError: It cannot be read.
        """
        self.import_state(Path(path).read_bytes())

    def copy(self) -> LoraChain:
        """An independent chain in the same state, with the frozen layers copied."""
        return _unpickle(self.frozen(), self._settings(), self.export_state())

    def _settings(self) -> dict[str, Any]:
        config = self.config
        names = self.modules()
        return {
            "rank": [config.rank_of(n) for n in names],
            "alpha": {n: config.alpha_of(n) for n in names},
            "use_rslora": config.use_rslora,
            "dtype": config.dtype,
            **self._options,
        }

    def __copy__(self) -> LoraChain:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraChain:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.frozen(), self._settings(), self.export_state())

    def __repr__(self) -> str:
        """Sizes, never weights."""
        widths = [self.in_features, *(self._lora[n].out_features for n in self._lora.modules())]
        dora = self._options["use_dora"]
        kind = "DoRA" if all(dora) else "LoRA and DoRA" if any(dora) else "LoRA"
        return (
            f"LoraChain({' -> '.join(map(str, widths))}, {self.activation}, {self.head}; {kind} rank "
            f"{self.config.rank}, {self.param_count:,} parameters, version {self.version})"
        )


def _alphas(
    names: list[str], ranks: Sequence[int], alpha: float | Mapping[str, float] | None
) -> dict[str, float]:
    if alpha is None:
        return {n: 2.0 * r for n, r in zip(names, ranks, strict=True)}
    if not isinstance(alpha, Mapping):
        return dict.fromkeys(names, alpha)
    if set(alpha) != set(names):
        raise ConfigError(f"alpha: got {', '.join(map(repr, alpha))}, expected {', '.join(names)}")
    return {n: alpha[n] for n in names}


def _unpickle(
    layers: list[tuple[Floats, Floats | None]], settings: dict[str, Any], state: bytes
) -> LoraChain:
    chain = LoraChain(layers, **settings)
    chain.restore(state)
    return chain


def _pair(i: int, layer: LayerLike) -> tuple[Floats, Floats | None]:
    if isinstance(layer, tuple) and len(layer) != 2:
        raise ShapeError(f"layers[{i}]: got {len(layer)} items, expected (W, b) or W")
    w, b = layer if isinstance(layer, tuple) else (layer, None)
    w = _floats(f"layers[{i}]", w)
    if w.ndim != 2:
        raise ShapeError(f"layers[{i}]: got shape {w.shape}, expected (out, in)")
    return w, None if b is None else _floats(f"layers[{i}] bias", b)


def _floats(arg: str, v: ArrayLike) -> Floats:
    if hasattr(v, "detach"):
        v = v.detach()
    a = np.asarray(v)
    if a.dtype.kind != "f":
        raise DTypeError(f"{arg}: got dtype {a.dtype}, expected float32")
    return np.ascontiguousarray(a, dtype=np.float32)
