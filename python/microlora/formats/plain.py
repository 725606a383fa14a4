"""Adapters that start from factors taken out of the base weights, made plain again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import microlora._core as _core
from microlora._checks import flag
from microlora._file_checks import path_text
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, NonFiniteError, ShapeError, UnsupportedVariantError
from microlora.formats.conversion import read_source
from microlora.formats.file import AdapterFile, FileModule, PathLike

__all__ = ["convert_to_plain"]

Array = npt.NDArray[np.float32]
Factors = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]
Tensor = tuple[str, tuple[int, ...], bytes]

# Tensors beside the factors that mean the same whatever the factors are relative to.
_KEPT = {"bias", "modules_to_save", "trainable_tokens", "saved_embedding", "embedding"}


def convert_to_plain(
    file: PathLike | AdapterFile,
    initial: PathLike | AdapterFile | Adapter | Factors,
    dst: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> AdapterFile:
    """Makes an adapter of a changed base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) relative to the original.

    Such an initialisation takes ``s B0 A0`` out of the base weights, so what was learned is
    ``s (B A - B0 A0) = s [B, -B0] [A; A0]``: the rank doubles, and alpha grows so that the scaling ``s``
    stays (twice; with rsLoRA by the square root of 2). Meng et al., arXiv 2404.02948. Of LoftQ the part of
    the quantiser's error that the initial factors do not hold is not in the result either.

    Args:
        file: The trained adapter: a PEFT directory, or what was read from one.
        initial: The adapter as it was before training: a path, what was read from one, or
            ``{module: (A0 (rank, in), B0 (out, rank))}``.
        dst: Where to write the result: a PEFT directory, or a single file where the name ends in
            ``.safetensors``; by default nowhere.
        overwrite: Replace what lies at ``dst``.

    Returns:
        A plain LoRA. Factors keep their dtype where the initial ones fit into it, else they are float32.

    Raises:
        ConfigError: The file is not of that kind, or modules or scalings of the two differ.
        ShapeError: Ranks or sizes of the two differ.
        NonFiniteError: NaN or infinity in the initial factors.
        UnsupportedVariantError: Another variant besides, or rsLoRA together with rank or alpha patterns.
        FormatError: A file is broken.
        DestinationExistsError: ``dst`` exists and ``overwrite`` is false.
    """
    replace = flag("overwrite", overwrite)
    if dst is not None:
        path_text("dst", dst)
    trained = read_source(file, arg="file")
    config = _config(trained)
    start = _initial(initial, trained)
    modules = []
    growth = 2**0.5 if config.get("use_rslora") else 2
    for i, m in enumerate(trained.modules):
        a, b = (_widen(t) for t in _factors(trained, i, m))
        a0, b0 = start[m.path]
        for name, got, want in (("A0", a0, a.shape), ("B0", b0, b.shape)):
            if got.shape != want:
                raise ShapeError(f"initial[{m.path!r}].{name}: got shape {got.shape}, expected {want}")
            if not np.isfinite(got).all():
                raise NonFiniteError(f"initial[{m.path!r}].{name}: contains NaN or infinity")
        factor_a = _narrow(np.concatenate([a, a0]), m.dtype_a)
        factor_b = _narrow(np.concatenate([b, -b0], axis=1), m.dtype_b)
        modules.append((m.path, m.kind, m.alpha * growth, m.use_rslora, factor_a, factor_b))
    extra = [(*row, trained.extra_bytes(i)) for i, row in enumerate(trained.extra())]
    plain = AdapterFile.wrap(
        _core.AdapterFile.build(
            modules,
            extra,
            trained.config_json,
            trained.metadata_json,
            json.dumps(_grown(config, growth), indent=2, sort_keys=True),
            trained.prefix,
        )
    )
    if dst is not None:
        plain.save(dst, overwrite=replace)
    return plain


def _config(file: AdapterFile) -> dict[str, Any]:
    """The PEFT configuration of a file that can be made plain."""
    kinds = {v.kind for v in file.variants}
    if not any(kind.startswith("init:") for kind in kinds) or file.peft_config is None:
        raise ConfigError(
            f"file: got {file.file} without init_lora_weights of pissa, olora, corda, lora_ga or loftq, "
            "expected one of them; it is relative to the original base already"
        )
    for v in file.variants:
        if v.kind not in _KEPT and not v.kind.startswith("init:"):
            raise UnsupportedVariantError(f"{file.file}: {v.at} ({v.kind}): {v.why}; it cannot be made plain")
    config: dict[str, Any] = json.loads(file.peft_config)
    if config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise UnsupportedVariantError(
            f"{file.file}: use_rslora together with rank_pattern or alpha_pattern; it cannot be made plain"
        )
    return config


def _grown(config: dict[str, Any], growth: float) -> dict[str, Any]:
    """The configuration of the doubled rank."""
    patterns = {
        "rank_pattern": {k: 2 * v for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: growth * v for k, v in (config.get("alpha_pattern") or {}).items()},
    }
    scaling = {"r": 2 * config.get("r", 8), "lora_alpha": growth * config.get("lora_alpha", 8)}
    return config | scaling | patterns | {"init_lora_weights": True}


def _initial(initial: object, trained: AdapterFile) -> dict[str, tuple[Array, Array]]:
    """The initial factors of every module, in float32."""
    modules = {m.path: m for m in trained.modules}
    if isinstance(initial, Mapping):
        _same_modules(initial, modules)
        return {path: _pair(path, value) for path, value in initial.items()}
    source = read_source(initial, arg="initial")  # type: ignore[arg-type]
    have = {m.path: (i, m) for i, m in enumerate(source.modules)}
    _same_modules(have, modules)
    for path, (_, m) in have.items():
        want = modules[path]
        if (m.kind, m.rank) != (want.kind, want.rank):
            raise ShapeError(
                f"initial[{path!r}]: got {m.kind} of rank {m.rank}, expected {want.kind} of rank {want.rank}"
            )
        if (m.alpha, m.use_rslora) != (want.alpha, want.use_rslora):
            raise ConfigError(
                f"initial[{path!r}]: got alpha {m.alpha}, use_rslora {m.use_rslora}, expected {want.alpha}, "
                f"{want.use_rslora}"
            )
    widened = {}
    for path, (i, m) in have.items():
        a, b = _factors(source, i, m)
        widened[path] = (_widen(a), _widen(b))
    return widened


def _same_modules(got: Mapping[str, object], want: Mapping[str, object]) -> None:
    missing, unknown = sorted(want.keys() - got.keys()), sorted(map(str, got.keys() - want.keys()))
    if missing or unknown:
        raise ConfigError(
            f"initial: got modules without {missing[:5]} and with {unknown[:5]}, expected the same"
        )


def _pair(path: str, value: object) -> tuple[Array, Array]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ConfigError(f"initial[{path!r}]: got {type(value).__name__}, expected a pair (A0, B0)")
    try:
        a, b = (np.asarray(x).astype(np.float32, casting="same_kind") for x in value)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"initial[{path!r}]: {e}, expected two arrays of floats") from e
    return a, b


def _factors(file: AdapterFile, i: int, m: FileModule) -> tuple[Tensor, Tensor]:
    a, b = file.factor_bytes(i)
    return (m.dtype_a, m.shape_a, a), (m.dtype_b, m.shape_b, b)


def _widen(tensor: Tensor) -> Array:
    dtype, shape, data = tensor
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(shape)


def _narrow(values: Array, dtype: str) -> Tensor:
    """In that dtype where it holds every number, else in float32."""
    values = np.ascontiguousarray(values)
    bits = values.view(np.uint32)
    if dtype == "BF16" and not (bits & 0xFFFF).any():
        return "BF16", values.shape, (bits >> 16).astype("<u2").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if np.array_equal(half.astype(np.float32), values):
            return "F16", values.shape, half.tobytes()
    return "F32", values.shape, values.astype("<f4").tobytes()
