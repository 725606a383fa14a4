"""Adapters fused into the weights of a base model on disk, and taken off again bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import microlora._core as _core
from microlora._checks import layer_paths as check_layer_paths
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError
from microlora.files import PathLike, load_plain
from microlora.progress import CancelToken, Progress

if TYPE_CHECKING:
    from microlora.micro_lora import MicroLoRA


class FusedTensor(NamedTuple):
    """One weight that was changed.

    Attributes:
        tensor: Its name in the file.
        module: The adapter's module.
        dtype: ``"F32"``, ``"F16"`` or ``"BF16"``, as before.
        shape: As in the file.
        layout: ``"out_in"`` (a torch Linear) or ``"in_out"`` (GPT-2's Conv1D, embeddings).
        layout_from: What decided the layout: ``"shape"``; of square weights ``"argument"``,
            ``"peft_config"`` (its ``fan_in_fan_out``) or ``"default"`` (out, in); ``"sidecar"`` in `unfuse`.
        residual_bytes: What the side-car holds to undo the rounding.
        lossy: Weights that rounding lost, and that the residual brings back.
    """

    tensor: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    layout_from: str
    residual_bytes: int
    lossy: int


class FuseReport(NamedTuple):
    """What `fuse` or `unfuse` did.

    Attributes:
        out: The file or folder that was written.
        sidecar: The side-car, or None.
        tensors: The weights that changed, in the order of the files.
        model_bytes: Bytes of all weight files.
        touched_bytes: Bytes of the weights that changed.
        sidecar_bytes: Bytes of the side-car; 0 without one.
        adapter_bytes: Bytes of the adapter in the side-car.
        adapter_sha256: SHA-256 of these bytes, which are `Adapter.to_bytes`; empty without a side-car.
        peak_bytes: Largest memory that the streaming asked for: blocks, one module's factors, headers.
        seconds: Wall-clock time.
        notes: What is worth knowing and no error: a prefix that names were matched behind, how square weights
            were taken, files that were left out, tied embeddings.
    """

    out: str
    sidecar: str | None
    tensors: tuple[FusedTensor, ...]
    model_bytes: int
    touched_bytes: int
    sidecar_bytes: int
    adapter_bytes: int
    adapter_sha256: str
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def residual_bytes(self) -> int:
        """Bytes of all residuals."""
        return sum(t.residual_bytes for t in self.tensors)

    def __str__(self) -> str:
        """Sizes, speed and notes."""
        speed = self.model_bytes / max(self.seconds, 1e-9) / 1e9
        lines = [
            f"{self.out}: {len(self.tensors)} tensors, {self.touched_bytes:,} of {self.model_bytes:,} bytes "
            f"changed, {self.seconds:.2f} s ({speed:.2f} GB/s)"
        ]
        if self.sidecar is not None:
            share = self.sidecar_bytes / max(self.touched_bytes, 1)
            lines.append(
                f"{self.sidecar}: {self.sidecar_bytes:,} bytes, {share:.2%} of what changed "
                f"(adapter {self.adapter_bytes:,}, residuals {self.residual_bytes:,})"
            )
        return "\n".join([*lines, *self.notes])


def fuse(
    base: PathLike,
    adapter: Adapter | MicroLoRA | PathLike,
    *,
    out: PathLike,
    sidecar: PathLike | bool | None = None,
    layer_paths: Mapping[str, str | Sequence[str]] | None = None,
    fan_in_fan_out: bool | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> FuseReport:
    """Adds an adapter to the weights of a model: ``W + s B A``, rounded once to nearest even.

    The base is streamed in blocks of 512 KiB (or one row, where that is longer), tensor by tensor, shard by
    shard. The call holds at most five blocks, the file headers and one module's factors as float32, and for
    the side-car up to four copies of the adapter; a tensor is never held whole, whatever its size. Header,
    metadata, order of tensors and every tensor that no module touches are copied byte for byte, and so are
    the other files of a folder (settings, tokenizer, index); sub-folders and weights in other forms are left
    out and named in the report.

    Sums are taken in float64 in one order, so the same files give the same bits on every machine and
    instruction set; hashing runs beside the sums after ``set_num_threads(2)``.

    Files appear whole or not at all. A single file is written beside its place and renamed; a folder is
    written whole under a temporary name beside its place and renamed once. The side-car is renamed first, so
    no fused model is ever without one. An error or a cancelled call leaves nothing; a killed process may
    leave a ``.microlora-*.tmp``.

    Args:
        base: A safetensors file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``.
        adapter: What to add. Each module must match exactly one tensor ``<path>.weight``: under its own name,
            or all of them behind, or without, one common prefix.
        out: Where the new model goes: a file for a file (an older one is replaced), for a folder one that
            does not exist yet or is empty. The base itself is refused.
        sidecar: Where to write what `unfuse` needs; by default ``<out>.unfuse``. ``False``: nowhere, which
            also saves the hashing. An existing file is refused: it is the only way back for its model.
        layer_paths: The model's module paths of each short name, as in `save`.
        fan_in_fan_out: Whether square weights are stored (in, out). By default as the adapter's PEFT
            configuration says, else (out, in); refused where the other weights of the model contradict.
            Weights that are not square are told by their shape.
        progress: Called with ``(bytes done, bytes in all, "fuse")``.
        cancel: Stops the call between blocks.

    Returns:
        What was changed, how layouts were decided, sizes of the side-car, memory and time.

    Raises:
        ConfigError: A module without its one tensor (with the nearest names), or places that would overwrite
            the base, a non-empty folder or an older side-car.
        ShapeError: A weight that fits the module in neither layout.
        DTypeError: A touched weight that is not float32, float16 or bfloat16.
        NonFiniteError: NaN or infinity in a touched weight, in the adapter, or in the sum; names the tensor.
        UnsupportedVariantError: The adapter holds tensors beside its factors, which fusing would drop.
        FormatError: A broken file.
        CancelledError: The token was set; nothing is left behind.
        OSError: The system refused.
    """
    value = _adapter(adapter)
    place = _path("out", out)
    if fan_in_fan_out is not None and not isinstance(fan_in_fan_out, bool):
        raise ConfigError(f"fan_in_fan_out: got {fan_in_fan_out!r}, expected True, False or None")
    if sidecar is True:
        raise ConfigError("sidecar: got True, expected a path, None (beside out) or False (none)")
    # Without the separator that a folder's name may end in.
    default = os.path.join(os.path.dirname(place.rstrip(os.sep)), os.path.basename(place.rstrip(os.sep)))
    car = None if sidecar is False else f"{default}.unfuse" if sidecar is None else _path("sidecar", sidecar)
    paths = check_layer_paths(layer_paths)
    text = _core.fuse_model(_path("base", base), value, place, car, paths, fan_in_fan_out, progress, cancel)
    return _report(text, place, car)


def unfuse(
    fused: PathLike,
    sidecar: PathLike,
    *,
    out: PathLike,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> FuseReport:
    """Takes off what `fuse` added: the touched weights come back bit for bit.

    The side-car holds the adapter whole, SHA-256 of every touched tensor before and after, and what rounding
    lost. Fused tensors and restored ones are hashed while they are streamed, and no file gets its name unless
    every hash fits. Tensors are found by name, so the fused model may have been sharded anew; header, order
    and untouched tensors are those of ``fused``. Memory, files and their renaming are those of `fuse`.

    Args:
        fused: The fused model, a file or a folder.
        sidecar: The side-car that `fuse` wrote with it.
        out: Where the original goes; not the fused model itself.
        progress: Called with ``(bytes done, bytes in all, "unfuse")``.
        cancel: Stops the call between blocks.

    Returns:
        What was restored.

    Raises:
        FormatError: The fused model, the side-car or the adapter in it was changed, or they do not belong
            together; names the file and the tensor.
        ConfigError: Places that would overwrite the fused model or the side-car.
        CancelledError: The token was set; nothing is left behind.
        OSError: The system refused.
    """
    place, car = _path("out", out), _path("sidecar", sidecar)
    return _report(_core.unfuse_model(_path("fused", fused), car, place, progress, cancel), place, car)


def _path(arg: str, value: PathLike | bool) -> str:
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike):
        raise DTypeError(f"{arg}: got {type(value).__name__}, expected a path")
    path = os.fspath(value)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{arg}: got {path!r}, expected a path as text")
    return path


def _adapter(adapter: Adapter | MicroLoRA | PathLike) -> _core.Adapter:
    if isinstance(adapter, _core.MicroLora):
        return adapter.adapter()
    if isinstance(adapter, _core.Adapter):
        return adapter
    if isinstance(adapter, str | os.PathLike):
        return load_plain(adapter)
    raise DTypeError(f"adapter: got {type(adapter).__name__}, expected an Adapter, a MicroLoRA or a path")


def _report(text: str, out: str, sidecar: str | None) -> FuseReport:
    data: dict[str, Any] = json.loads(text)
    tensors = tuple(FusedTensor(**{**t, "shape": tuple(t["shape"])}) for t in data.pop("tensors"))
    return FuseReport(out=out, sidecar=sidecar, tensors=tensors, **{**data, "notes": tuple(data["notes"])})
