"""Everything the doctor looks for, one row each. A new check is one function and one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from microlora.doctor import on_base, on_files, on_names, on_settings, on_weights
from microlora.doctor.facts import Facts
from microlora.doctor.repair import Draft
from microlora.doctor.report import Finding

__all__ = ["CHECKS", "Check", "examine"]


class Check(NamedTuple):
    """One check.

    Attributes:
        code: A short name that stays.
        severity: How bad what it finds is.
        what: What it looks for, in words.
        todo: What to do about it.
        look: What it says of the facts: messages, each with the places.
        repair: Takes it out of a copy, or None.
        asked: The repair is made only when it is asked for by its code, because it changes what the adapter
            does or how it is stored.
    """

    code: str
    severity: str
    what: str
    todo: str
    look: Callable[[Facts], Iterator[tuple[str, tuple[str, ...]]]]
    repair: Callable[[Facts, Draft], None] | None = None
    asked: bool = False

    @property
    def way(self) -> str:
        """``"yes"``, ``"asked"`` or ``"no"``: whether `fix=` takes it out."""
        return "no" if self.repair is None else "asked" if self.asked else "yes"


_F, _N, _W, _S, _B = on_files, on_names, on_weights, on_settings, on_base
_E, _WARN, _I = "error", "warning", "info"

CHECKS: tuple[Check, ...] = (
    # containers and files
    Check("damaged", _E, "container that cannot be read (truncated, overlapping, of no known format)",
          "fetch it again; nothing of it can be trusted", _F.damaged),
    Check("unsaid", _E, "flat or .npz file without its alpha, or whose shapes do not say the orientation",
          "give it to ml.load or ml.convert, which writes a copy that says it", _F.unsaid),
    Check("pickle", _E, "weights that are a pickle",
          "convert it where it is trusted: torch.load(weights_only=True), then safetensors", _F.pickled),
    Check("no_weights", _E, "directory without weights", "pass the directory that holds the weights",
          _F.no_weights),
    Check("pickle_beside", _WARN, "pickles beside the weights", "delete them", _F.pickle_beside,
          _F.leave_files),
    Check("link", _WARN, "symbolic links", "copy the files themselves", _F.links, _F.copy_links),
    Check("executable", _I, "files that may be run", "chmod a-x", _F.executables, _F.copy_modes),
    Check("weights_changed", _E, "other weights than the header's fingerprint names",
          "fetch it again, or find out who changed it", _F.changed, _F.rehash, True),
    # names
    Check("empty", _E, "no factor of a LoRA", "look whether this is a whole model, or another method",
          _N.empty),
    Check("mixed_styles", _E, "keys of two writers in one file", "split the file", _N.mixed),
    Check("prefix_missing", _E, "keys without base_model.model.", "put it in front", _N.missing_prefix,
          _N.add_prefix),
    Check("prefix_doubled", _E, "keys with base_model.model. more than once", "write it once",
          _N.doubled_prefix, _N.single_prefix),
    Check("adapter_name", _WARN, "`.default.` left in keys", "save with save_pretrained, or take it off",
          _N.adapter_name, _N.drop_adapter_name),
    Check("other_adapter_name", _E, "the name of another adapter left in keys",
          "save with save_pretrained, or take it off", _N.other_adapter_name, _N.drop_adapter_name),
    Check("duplicate", _E, "two tensors for one factor", "keep the one that is meant", _N.duplicates,
          _N.merge_duplicates),
    Check("orphan", _E, "A without B, or B without A",
          "fetch the file again; without its partner it is of no use", _N.orphans, _N.drop_orphans),
    Check("unused", _WARN, "tensors that are no part of a LoRA", "leave them out, or load with strict=False",
          _N.unused, _N.drop_unused),
    Check("layer_gap", _I, "a kind of layer that few layers lack", "look whether something was lost",
          _N.gaps),
    # numbers
    Check("bad_shape", _E, "factors whose shapes do not fit each other", "fetch the file again", _W.shapes),
    Check("rank_contradicts", _E, "ranks in the settings that the tensors have not",
          "set r and rank_pattern to what the tensors have", _W.ranks, _W.correct_ranks),
    Check("nonfinite", _E, "NaN or infinity",
          "train again with smaller steps; no repair brings the layer back", _W.nonfinite, _W.switch_off,
          True),
    Check("dtype", _E, "factors of a type other than F32, F16, BF16", "convert them", _W.dtypes,
          _W.convert_dtypes),
    Check("mixed_dtypes", _I, "factors of several types", "look whether two saves were mixed",
          _W.mixed_dtypes),
    Check("upcast", _I, "F32 numbers that are all 16-bit ones",
          "store them in 16 bits: half the size, nothing lost", _W.upcast, _W.narrow, True),
    Check("untrained", _WARN, "all deltas are zero", "look whether it was saved before it was trained",
          _W.untrained),
    Check("zero_layer", _WARN, "some deltas are zero", "look whether these layers got gradients",
          _W.zero_layers),
    Check("dead_layer", _WARN, "deltas far below the others", "look whether these layers got gradients",
          _W.dead),
    Check("outlier_layer", _WARN, "deltas far above the others", "look at the training of these layers",
          _W.outliers),
    # settings
    Check("config_missing", _E, "no adapter_config.json", "put it beside the weights", _S.missing),
    Check("config_broken", _E, "adapter_config.json that is no JSON object", "fetch it again", _S.broken),
    Check("not_lora", _E, "another method than LoRA", "convert it to LoRA with PEFT", _S.not_lora),
    Check("invalid_setting", _E, "settings of the wrong kind", "correct it in adapter_config.json",
          _S.invalid),
    Check("pattern_refused", _E, "patterns that engines read differently", "write plain paths",
          _S.pattern_refused),
    Check("pattern_unmatched", _WARN, "pattern keys that match nothing",
          "remove them, or correct them where a layer was meant", _S.pattern_unmatched, _S.drop_patterns),
    Check("target_uncovered", _E, "modules that no target names", "add them to target_modules",
          _S.target_uncovered, _S.set_targets),
    Check("target_unmatched", _WARN, "targets without weights", "remove them", _S.target_unmatched,
          _S.drop_targets),
    Check("base_mutating", _E, "initialisations that changed the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ)",
          "save again with path_initial_model_for_weight_conversion, or ml.convert_to_plain with the start",
          _S.base_mutating),
    Check("variant", _WARN,
          "DoRA, biases, saved modules and whatever else is not plain LoRA on linear layers",
          "AdapterFile.read keeps it; ml.load runs plain LoRA only", _S.variants),
    Check("unknown_setting", _WARN, "settings that nothing knows",
          "correct the name, or remove it; until then ml.load takes the file with strict=False alone",
          _S.unknown, _S.drop_unknown, True),
    Check("alpha", _WARN, "alpha that is 0, negative, or above 64 ranks", "look whether it is meant",
          _S.alphas),
    Check("rslora_scaling", _WARN, "rsLoRA with a scaling above 8", "look whether use_rslora is meant",
          _S.rslora),
    Check("saved_modules_missing", _WARN, "modules_to_save without a tensor", "save again with those modules",
          _S.nothing_saved),
    Check("transposed", _I, "base layers that store (in, out)", "transpose before fusing", _S.transposed),
    Check("no_base_name", _I, "no base model named", "name it in base_model_name_or_path", _S.no_base),
    Check("no_peft_version", _I, "no version of PEFT named", "remember which one wrote it", _S.no_version),
    # the base
    Check("base_names", _E, "modules that the base has not", "rename them", _B.names, _B.rename, True),
    Check("base_shapes", _E, "deltas that do not fit the base's layers",
          "take the base that it was trained on", _B.shapes),
    Check("base_layers", _E, "layers beyond the base's last", "take the base that it was trained on",
          _B.layers),
    Check("base_name", _WARN, "another base named than the one given", "look whether they are the same",
          _B.other_name),
    # what is left
    Check("refused", _E, "whatever else the reader refuses", "see the message", _F.refused),
)  # fmt: skip


def examine(facts: Facts) -> list[Finding]:
    """What every check says, in the order of the table."""
    ours = facts.kind in ("peft", "single")  # whose copies can be written
    for check in CHECKS:
        for message, where in check.look(facts):
            way = check.way if ours else "no"
            facts.found.append(Finding(check.severity, check.code, message, tuple(where), check.todo, way))
    return list(facts.found)
