"""Adapters in block types: chosen or searched, measured, and made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from microlora._checks import flag, real, wrong
from microlora._file_checks import check_calls
from microlora.exceptions import ConfigError, DTypeError
from microlora.gram import Gram
from microlora.merging.parents import Source, as_adapter
from microlora.progress import CancelToken, Progress
from microlora.quantized import QuantizedAdapter
from microlora.quantizing.measure import Measured, inputs_of, relative
from microlora.quantizing.profiles import QuantizationProfile
from microlora.quantizing.report import QuantizationReport, QuantizedModule
from microlora.quantizing.search import smallest
from microlora.quantizing.types import Pair, asked, fitting, size_of

__all__ = ["Quantization", "quantize"]

#: One module's types: a name, a pair of names for A and B, or a mapping from lora_a and lora_b.
ModuleTypes = str | tuple[str, str] | Mapping[str, str]
Types = str | QuantizationProfile | Mapping[str, ModuleTypes]
Calibration = ArrayLike | Mapping[str, ArrayLike | Gram]


class Quantization(NamedTuple):
    """A quantised adapter and what it lost."""

    adapter: QuantizedAdapter
    report: QuantizationReport


def quantize(
    adapter: Source,
    type: Types | None = None,
    *,
    calibration: Calibration | None = None,
    target_error: float | None = None,
    b_along_rank: bool = False,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Quantization:
    """The adapter with its factors in blocks of few bits, which run as they are.

    Blocks lie along in_features of A and along out_features of B; the bytes of each are llama.cpp's. Where a
    width is not whole blocks, the type gives way to ``q8_0`` and that to 16 bits; the report says so.

    Args:
        adapter: An :class:`Adapter`, a :class:`MicroLoRA` or the path of a file.
        type: For all factors ``"q8_0"``, ``"q6_k"``, ``"q5_k"``, ``"q4_k"``, ``"q4_1"``, ``"q4_0"``,
            ``"f16"``, ``"bf16"`` or ``"f32"``; ``"q4_k_m"``: A in q4_k, B in q6_k;
            ``{"lora_a": name, "lora_b": name}``; ``{module: any of these}`` with ``"*"`` for the others; or a
            :class:`QuantizationProfile`.
        calibration: Inputs (n, in_features) that every module reads, or ``{module: inputs or Gram}``: the
            report then has the error of outputs on them.
        target_error: Instead of a type: the smallest types whose relative error, over all modules together,
            is at most this. Of outputs where there is calibration, else of weight changes.
        b_along_rank: Lay the blocks of B along the rank, as GGUF files have them: then it is the rank that
            must be whole blocks.
        progress: Called with ``(done, total, what)`` between modules.
        cancel: A token looked at between modules.

    Returns:
        The quantised adapter and a :class:`QuantizationReport`.

    Raises:
        ConfigError: Neither or both of type and target_error, unknown names, or a target that no types
            reach (the message has the least error that some do).
        NonFiniteError: Numbers that a type cannot hold, or NaN or infinity in the calibration.
        ShapeError: Calibration of another width.
        DTypeError: Calibration that is not floating point, no adapter, or a type that is no name.
        CancelledError: The token was set.
    """
    if isinstance(adapter, QuantizedAdapter):
        raise DTypeError("adapter: is quantised already, expected the adapter that it was made of")
    if (type is None) == (target_error is None):
        got = "neither" if type is None else "both"
        raise ConfigError(f"type, target_error: got {got}, expected one of them")
    turned = flag("b_along_rank", b_along_rank)
    check_calls(progress, cancel)
    target = None if target_error is None else _target(target_error)
    value = as_adapter("adapter", adapter)
    moments = inputs_of(calibration, value.dims)
    modules = [Measured.of(value, name, moments.get(name), b_along_rank=turned) for name in value.modules()]
    wanted: dict[str, Pair] | None = None
    facts: dict[str, Any] = {}
    if target is not None:
        found = smallest(modules, target, progress, cancel)
        types = found.types
        facts = {"target_error": target, "reached_error": found.error, "measure": found.measure}
        recipe = f"smallest types with {found.measure} error at most {target:g}"
    else:
        said = type.recipe if isinstance(type, QuantizationProfile) else type
        if isinstance(type, QuantizationProfile):
            facts = {"quality_threshold": type.quality_threshold}
        wanted = asked(said, value.modules())
        types = {m.name: _fitted(m, wanted[m.name]) for m in modules}
        recipe = said.lower() if isinstance(said, str) else "types by module"
    rows = []
    for i, module in enumerate(modules):
        if cancel is not None:
            cancel.raise_if_cancelled("quantize")
        rows.append(_row(module, None if wanted is None else wanted[module.name], types[module.name]))
        if progress is not None:
            progress(i + 1, len(modules), f"quantised {module.name}")
    made = QuantizedAdapter.from_adapter(value, types, b_along_rank=turned)
    report = QuantizationReport(
        recipe=recipe,
        modules=tuple(rows),
        memory_before=value.memory_bytes,
        memory_after=made.memory_bytes,
        **facts,
    )
    return Quantization(made, report)


def _target(value: object) -> float:
    want = "a number above 0 and below 1"
    target = real("target_error", value, want)
    if not 0.0 < target < 1.0:
        raise wrong("target_error", value, want)
    return target


def _fitted(module: Measured, pair: Pair) -> Pair:
    widths = [shape[1] for shape in module.shapes]
    return Pair(*(fitting(t, w, d) for t, w, d in zip(pair, widths, module.dtypes, strict=True)))


def _row(module: Measured, wanted: Pair | None, types: Pair) -> QuantizedModule:
    delta, output = module.delta(types), module.output(types)
    before, after = (
        sum(size_of(kind, shape) for kind, shape in zip(kinds, module.shapes, strict=True))
        for kinds in (module.dtypes, types)
    )
    return QuantizedModule(
        name=module.name,
        rank=len(module.a),
        in_features=module.a.shape[1],
        out_features=module.b.shape[1],
        asked=None if wanted is None else (wanted.lora_a, wanted.lora_b),
        types=(types.lora_a, types.lora_b),
        delta_error=relative(delta),
        delta_norm=delta[1],
        output_error=None if output is None else relative(output),
        output_norm=None if output is None else output[1],
        bytes_before=before,
        bytes_after=after,
    )
