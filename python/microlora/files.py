"""Saving and loading adapters: PEFT directories and single safetensors files, failing closed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora._checks import layer_paths as check_layer_paths
from microlora._destinations import check_destination, format_of_name, remove_other_weights
from microlora._file_checks import check_allow, check_kinds, check_reading, path_text, unknown_kinds
from microlora.adapter import Adapter
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FormatError,
    UnsupportedVariantError,
    UnusedTensorWarning,
)

if TYPE_CHECKING:
    from microlora.formats.limits import Limits
    from microlora.micro_lora import MicroLoRA
    from microlora.quantized import QuantizedAdapter

PathLike = str | os.PathLike[str]

_Bounds = tuple[int, int, int, int]

_log = logging.getLogger(__name__)


def save(
    adapter: Adapter | QuantizedAdapter | MicroLoRA,
    path: PathLike,
    format: str | None = None,
    *,
    layer_paths: Mapping[str, str | Sequence[str]] | None = None,
) -> None:
    """Writes an adapter through a temporary sibling and a rename: a crash never leaves a half file.

    Args:
        adapter: What to save; a learner is saved as it stands now, a quantised adapter as one file.
        path: A file name for ``"safetensors"``, a directory for ``"peft"``, in a folder that exists.
        format: ``"safetensors"`` (one file with settings and metadata), ``"peft"`` (a directory that Hugging
            Face PEFT loads), or ``None``: safetensors where the name ends in ``.safetensors``, else peft.
            Weights of another format that lie in the directory (MLX's, a pickle) are removed.
        layer_paths: With ``"peft"``: the model's module paths of each short name, one or several
            (``{"q_proj": "model.layers.0.self_attn.q_proj"}``). Without it names are written as they are.

    Raises:
        ConfigError: An unknown format, a name of another one (``.gguf``, ``.safetensors`` for a directory),
            or ``layer_paths`` that do not fit.
        DTypeError: No adapter, or no path.
        MissingPathError: The folder of ``path`` is not there.
        DestinationExistsError: A file where a directory is written, or the other way round.
        OSError: The system refused; an older file at ``path`` is left whole.
    """
    if isinstance(adapter, _core.MicroLora):
        adapter = adapter.adapter()
    if isinstance(adapter, _core.QuantizedAdapter):
        _save_quantized(adapter, path, format, layer_paths is not None)
        return
    if not isinstance(adapter, _core.Adapter):
        raise DTypeError(f"adapter: got {type(adapter).__name__}, expected an Adapter or a MicroLoRA")
    if format is None:
        format = _by_name(path)
    if format == "safetensors":
        if layer_paths is not None:
            raise ConfigError(
                "layer_paths: got names for a single file, expected none (they belong to format='peft')"
            )
        _core.save_single(adapter, os.fspath(check_destination("path", path, format, overwrite=None)))
    elif format == "peft":
        paths = check_layer_paths(layer_paths)
        base = Adapter(adapter).metadata.base_model or None
        place = check_destination("path", path, format, overwrite=None)
        _core.save_peft(adapter, os.fspath(place), paths, base)
        for note in remove_other_weights(place, format):
            _log.info("%s: %s", place, note)
    else:
        raise ConfigError(
            f"format: got {format!r}, expected 'safetensors' or 'peft' "
            "(microlora.convert writes other formats)"
        )


def _by_name(path: PathLike) -> str:
    """One of the two formats of :func:`save`; a name of another one is refused."""
    where = path_text("path", path)
    format = format_of_name(where)
    if format not in ("safetensors", "peft"):
        raise ConfigError(
            f"path: got {where!r}, expected a name that ends in .safetensors, or that of a directory for "
            f"PEFT (microlora.convert(..., format={format!r}) writes others)"
        )
    return format


def _save_quantized(
    adapter: _core.QuantizedAdapter, path: PathLike, format: str | None, layer_paths: bool
) -> None:
    if format not in (None, "safetensors") or layer_paths:
        got = f"format={format!r}" + (" with layer_paths" if layer_paths else "")
        raise ConfigError(
            f"format: got {got} for a quantised adapter, expected 'safetensors' alone "
            "(microlora.convert and its own save() write other formats)"
        )
    place = check_destination("path", path, "safetensors", overwrite=None)
    adapter.save_single(os.fspath(place))


def load(
    path: PathLike,
    *,
    mmap: bool = False,
    strict: bool = True,
    limits: Limits | None = None,
    alpha: float | None = None,
    orientation: str | None = None,
    base_config: Mapping[str, Any] | PathLike | None = None,
    names: str | None = None,
    allow: Sequence[str] = (),
) -> Adapter | QuantizedAdapter:
    """Loads an adapter; the content decides what it is, not the name.

    Args:
        path: A file or directory of any format that is read: PEFT, our single file, GGUF, MLX, Kohya,
            diffusers, flat ``lora_a``/``lora_b``, ``.npz``.
        mmap: Leave tensors that are not factors in the mapped file instead of copying them; the file must
            then not be written to while the adapter lives. Factors are copied into the kernels' layout.
        strict: Refuse a file with anything that nothing here uses. Otherwise such tensors are kept, and
            listed in an :class:`~microlora.exceptions.UnusedTensorWarning`. Variants that change the
            mathematics (DoRA, PiSSA and so on) are refused either way;
            :meth:`AdapterFile.read <microlora.AdapterFile.read>` keeps them.
        limits: What the file may ask for; by default :class:`microlora.Limits`.
        alpha: Scaling numerator, for formats that carry none.
        orientation: ``"rank_first"`` or ``"rank_last"``, for flat files whose shapes do not say.
        base_config: Of a GGUF file: the base model's ``config.json`` (its path, or its content), which gives
            the model's own module names and row order back (needs the gguf package).
        names: ``"gguf"`` keeps llama.cpp's names and row order as they are.
        allow: Variants to leave out, by the names that the refusal lists (``["drop:modules_to_save"]``). What
            is left is another network than the file's.

    Returns:
        The adapter, with the file's dtypes; a :class:`QuantizedAdapter` where the file holds
        factors in blocks.

    Raises:
        FormatError: The file is broken: it names the file, the tensor or key, and the reason.
        UnsupportedVariantError: The file is of a kind that must not be applied as plain LoRA.
        ConfigError: A setting of another type, or ``allow`` with a kind that there is not.
        DTypeError: ``path`` is none.
        OSError: The file cannot be read.
    """
    bounds = None
    if limits is not None:
        from microlora.formats.limits import Limits

        bounds = Limits.of(limits).as_tuple()
    where, number = check_reading(path, mmap, strict, alpha, orientation, names)
    left_out = check_allow(allow)
    if unknown_kinds(left_out):
        check_kinds(left_out, _kinds_in(where, bounds, number, orientation))
    adapter: _core.Adapter | _core.QuantizedAdapter
    if base_config is None and names is None:
        adapter, unused, notes = _core.load_any(where, mmap, strict, bounds, number, orientation, left_out)
    else:
        from microlora.formats import AdapterFile

        file = AdapterFile.read(
            path,
            mmap=mmap,
            strict=strict,
            limits=limits,
            alpha=alpha,
            orientation=orientation,
            base_config=base_config,
            names=names,
        )
        adapter, unused, notes = _core.gguf_adapter(file, left_out), file.unused, file.notes
    for note in notes:
        _log.info("%s: %s", os.fspath(path), note)
    if unused:
        warnings.warn(f"{os.fspath(path)}: unused: {', '.join(unused)}", UnusedTensorWarning, stacklevel=2)
    value: Adapter | QuantizedAdapter
    if isinstance(adapter, _core.QuantizedAdapter):
        from microlora.quantized import QuantizedAdapter

        value = QuantizedAdapter(adapter)
    else:
        value = Adapter(adapter)
    # Settings and metadata of ours are read now, so that a file that lies about itself is refused here.
    try:
        _ = value.config_json and value.config, value.metadata
    except ConfigError as e:
        raise FormatError(f"{os.fspath(path)}: {e}") from e
    return value


def _kinds_in(path: str, bounds: _Bounds | None, alpha: float | None, orientation: str | None) -> list[str]:
    """Kinds of variants of a file, which may name some of its own; none where it cannot be read whole."""
    try:
        file = _core.AdapterFile.open(path, False, False, bounds, alpha, orientation)
    except FormatError:
        return []
    return [kind for kind, _, _ in file.variant_rows()]


def load_plain(path: PathLike, **options: Any) -> Adapter:
    """:func:`load` where plain weights are needed.

    Raises:
        UnsupportedVariantError: The file holds a quantised adapter.
    """
    value = load(path, **options)
    if isinstance(value, Adapter):
        return value
    raise UnsupportedVariantError(
        f"{os.fspath(path)}: a quantised adapter, expected plain weights: "
        "microlora.load(path).dequantize() gives them"
    )
