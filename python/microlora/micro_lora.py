"""The live learner: adapters that serve and learn at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

import microlora._core as _core
from microlora import device as _device
from microlora import files, presets
from microlora.adapter import Adapter, Snapshot
from microlora.config import LoraConfig
from microlora.exceptions import ConfigError, DTypeError
from microlora.metadata import AdapterMetadata

Dims = Mapping[str, tuple[int, int]]


class MicroLoRA(_core.MicroLora):
    """A set of LoRA modules that learns per request.

    Outputs are exact zeros until something is learned. Any number of threads may read while one learns; every
    read sees one whole version. Learning happens in float32 whatever the storage dtype.

    Args:
        config: Settings, or an :class:`Adapter` to go on from.
        hidden_dim: Width of every module (in and out), the short form of ``dims``.
        dims: ``{module: (in_features, out_features)}``; either this or ``hidden_dim``.
        seed: Seed of A's initialisation and of dropout (ChaCha8; the same numbers on every machine).
        device: ``"cpu"`` or ``"auto"``.

    Raises:
        ConfigError: Settings out of range, or dims that do not fit them.
        DeviceError: A device that is not installed.

    Example:
        >>> import numpy as np, microlora as ml
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=64)
        >>> float(np.abs(lora.forward(np.ones(64, np.float32), "q_proj")).max())
        0.0
    """

    _config: LoraConfig
    _metadata: AdapterMetadata
    _device: str

    def __new__(
        cls,
        config: LoraConfig | Adapter,
        hidden_dim: int | None = None,
        dims: Dims | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> Self:
        """Makes the modules; see the class."""
        where = _device.resolve(device)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed: got {seed!r}, expected an integer in [0, 2**64)")
        modules: list[tuple[str, int, int, int, float]] | _core.Adapter
        metadata = AdapterMetadata()
        if isinstance(config, _core.Adapter):
            if hidden_dim is not None or dims is not None:
                raise ConfigError(
                    "hidden_dim, dims: got one with an adapter, expected none (its weights have shapes)"
                )
            adapter = Adapter(config)
            modules, metadata = adapter, adapter.metadata
            config = adapter.config
        elif isinstance(config, LoraConfig):
            resolved = config.resolve_dims(hidden_dim=hidden_dim, dims=dims)
            modules = [(m, i, o, config.rank_of(m), config.alpha_of(m)) for m, (i, o) in resolved.items()]
        else:
            raise DTypeError(f"config: got {type(config).__name__}, expected LoraConfig or Adapter")
        i = config.instant
        self = super().__new__(
            cls,
            modules,
            use_rslora=config.use_rslora,
            dtype=config.dtype,
            seed=int(seed),
            dropout=config.dropout,
            instant=(
                i.rule,
                i.train,
                i.forgetting,
                i.rho,
                i.mu,
                i.kappa,
                i.baseline_rate,
                i.max_grad_norm,
            ),
        )
        self._config, self._metadata, self._device = config, metadata, where
        return self

    @property
    def config(self) -> LoraConfig:
        """The settings it was made with."""
        return self._config

    @property
    def metadata(self) -> AdapterMetadata:
        """Metadata that :meth:`adapter` and :meth:`save` attach."""
        return self._metadata

    @metadata.setter
    def metadata(self, value: AdapterMetadata) -> None:
        if not isinstance(value, AdapterMetadata):
            raise DTypeError(f"metadata: got {type(value).__name__}, expected AdapterMetadata")
        self._metadata = value

    @property
    def device(self) -> str:
        """Where the weights are: ``"cpu"``."""
        return self._device

    def _json(self) -> tuple[str, str]:
        return self._config.to_json(), self._metadata.to_json()

    def adapter(self) -> Adapter:  # type: ignore[override]
        """The present weights as a value; they are shared until the next step, which then copies."""
        return Adapter(super().adapter(*self._json()))

    def snapshot(self) -> Snapshot:  # type: ignore[override]
        """Weights and all that the rules remember, for :meth:`restore`; costs no copy until the next step."""
        return Snapshot(super().snapshot(*self._json()))

    def copy(self) -> MicroLoRA:
        """An independent learner in the same state."""
        twin = type(self)(self.adapter(), device=self._device)
        twin.restore(self.snapshot())
        twin.enabled = self.enabled
        return twin

    def save(self, path: files.PathLike, format: str | None = None, **options: Any) -> None:
        """Saves the present weights; see :func:`microlora.save`."""
        files.save(self.adapter(), path, format, **options)

    @classmethod
    def load(cls, path: files.PathLike, *, seed: int = 0, device: str = "cpu", **options: Any) -> Self:
        """A learner that goes on from a file; see :func:`microlora.load`.

        Args:
            path: File or directory.
            seed: Seed of dropout.
            device: See the class.
            **options: ``mmap`` and ``strict`` of :func:`microlora.load`.
        """
        return cls(files.load_plain(path, **options), seed=seed, device=device)

    def export_weights(self) -> bytes:
        """The present weights as bytes: our single-file format."""
        return self.adapter().to_bytes()

    def import_weights(self, data: bytes) -> None:
        """Takes the weights of :meth:`export_weights`, whole or not at all; the rules start afresh.

        Args:
            data: Bytes of an adapter with the same modules, shapes, ranks, alphas and dtypes.

        Raises:
            FormatError: Not an adapter.
            ShapeError: An adapter of other shapes. Nothing changes then.
        """
        if not isinstance(data, bytes):
            raise DTypeError(f"data: got {type(data).__name__}, expected bytes")
        self.restore(Adapter(data))

    def __copy__(self) -> MicroLoRA:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), self.snapshot(), self.enabled, self._device)

    def __repr__(self) -> str:
        """Sizes, never weights."""
        names = self.modules()
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} modules)" if len(names) > 4 else "")
        name = f"{self._config.name}: " if self._config.name else ""
        sizes = f"{self.param_count:,} parameters, {self.memory_bytes:,} bytes"
        return f"MicroLoRA({name}{shown}; {sizes}, version {self.version})"


def _unpickle(cls: type[MicroLoRA], snapshot: Snapshot, enabled: bool, device: str) -> MicroLoRA:
    lora = cls(snapshot, device=device)
    lora.restore(snapshot)
    lora.enabled = enabled
    return lora


def create_lora(
    preset: str,
    hidden_dim: int | None = None,
    *,
    dims: Dims | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> MicroLoRA:
    """A learner from a preset's settings.

    Args:
        preset: A name of :func:`microlora.presets.names`.
        hidden_dim: Width of every module.
        dims: ``{module: (in_features, out_features)}`` instead.
        seed: Seed of the initialisation.
        device: See :class:`MicroLoRA`.

    Raises:
        UnknownPresetError: No such preset; the message carries near names.
    """
    return MicroLoRA(presets.get(preset), hidden_dim=hidden_dim, dims=dims, seed=seed, device=device)
