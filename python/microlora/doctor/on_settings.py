"""Checks of `adapter_config.json`, and of the scaling wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterator

import microlora._core as _core
from microlora._checks import near
from microlora.doctor.facts import CONFIG, Facts, is_count, is_number
from microlora.doctor.names import shown
from microlora.doctor.repair import Draft
from microlora.exceptions import ConfigError

Said = Iterator[tuple[str, tuple[str, ...]]]

#: Initialisations after which the product still refers to the untouched base.
SOUND_INITS = ("gaussian", "eva", "orthogonal", "mica")
#: Scalings beyond these are seldom meant.
MOST_SCALING, MOST_RSLORA = 64.0, 8.0

#: Settings that PEFT writes for LoRA (0.21), and older ones.
# fmt: off
KNOWN = frozenset((
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
))
# fmt: on
#: Settings that make it something else than plain LoRA on linear layers: the variant, and why.
VARIANTS = {
    "use_dora": "DoRA, which needs the base weights at inference",
    "use_qalora": "QALoRA, which pools its input",
    "use_bdlora": "BD-LoRA, whose factors are blocks",
    "alora_invocation_tokens": "an activated LoRA, which tokens of the prompt switch on",
    "arrow_config": "Arrow, which routes between adapters",
    "target_parameters": "LoRA on raw parameters, which packs experts",
    "layer_replication": "names of a replicated layer stack",
    "monteclora_config": "MonteCLoRA, whose factors are drawn",
    "kasa_config": "KaSA, which truncates the base",
    "lora_bias": "biases in the adapter",
    "modules_to_save": "whole modules of the base are replaced",
    "trainable_token_indices": "rows of the embedding are replaced",
}


def _config(facts: Facts) -> dict[str, object]:
    return facts.config or {} if facts.kind == "peft" else {}


def missing(facts: Facts) -> Said:
    """Without it nobody knows the scaling."""
    if facts.kind == "peft" and facts.modules and facts.config is None and not facts.config_error:
        yield f"no {CONFIG} beside the weights, so that nobody knows the scaling", ()


def broken(facts: Facts) -> Said:
    """A configuration that cannot be read."""
    if facts.config_error:
        yield facts.config_error, (CONFIG,)


def not_lora(facts: Facts) -> Said:
    """Another method than LoRA."""
    config = _config(facts)
    if config and config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, expected 'LORA'", ("peft_type",)


def invalid(facts: Facts) -> Said:
    """Settings of a kind that PEFT never writes."""
    config = _config(facts)
    if "r" in config and not is_count(config["r"]):
        yield f"r is {config['r']!r}, expected a whole number of at least 1", ("r",)
    if "lora_alpha" in config and not is_number(config["lora_alpha"]):
        yield f"lora_alpha is {config['lora_alpha']!r}, expected a number", ("lora_alpha",)
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (None, True, False):
            yield f"{key} is {config[key]!r}, expected true or false", (key,)
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        yield f"bias is {config['bias']!r}, expected none, all or lora_only", ("bias",)
    for key, good in (("rank_pattern", is_count), ("alpha_pattern", is_number)):
        table = config.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            yield f"{key} is a {type(table).__name__}, expected an object", (key,)
        elif bad := [k for k, v in table.items() if not good(v)]:
            yield f"{key} has values that are no {'rank' if key[0] == 'r' else 'alpha'}", tuple(bad)


def pattern_refused(facts: Facts) -> Said:
    """Patterns that mean something else, or nothing, in another engine."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key, why in facts.pattern(name).refused:
            yield f"{name}: {why}", (key,)


def pattern_unmatched(facts: Facts) -> Said:
    """A rank or alpha that was meant for a layer, and goes to none."""
    for name in ("rank_pattern", "alpha_pattern"):
        if found := facts.pattern(name).unmatched:
            yield f"{name}: keys that match no module, so that their values go nowhere", tuple(found)


def drop_patterns(facts: Facts, draft: Draft) -> None:
    """Leaves out keys that match nothing."""
    for name in ("rank_pattern", "alpha_pattern"):
        table, gone = (draft.config or {}).get(name), facts.pattern(name).unmatched
        if gone and isinstance(table, dict) and draft.config is not None:
            lost = set(gone)
            draft.config[name] = {k: v for k, v in table.items() if k not in lost}
            draft.say(f"removed {shown(gone)} from {name}: no module matched")


def _outer(facts: Facts) -> list[str]:
    return [path.split(".base_layer.", 1)[0] for path in facts.modules]


def _ends(path: str) -> set[str]:
    """A path and all that follows one of its dots: what PEFT compares targets with."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _lost(facts: Facts, targets: list[object]) -> list[str]:
    """Targets that name no module of the file."""
    ends: set[str] = set().union(*(_ends(path) for path in _outer(facts)))
    return [str(t) for t in targets if str(t) not in ends]


def target_unmatched(facts: Facts) -> Said:
    """Targets without weights: PEFT makes a fresh, empty layer for them."""
    targets = _config(facts).get("target_modules")
    if isinstance(targets, list) and facts.modules:
        gone = _lost(facts, targets)
        if gone and len(gone) < len(targets):
            yield "target_modules names layers that have no weights in the file", tuple(gone)


def target_uncovered(facts: Facts) -> Said:
    """Weights that PEFT leaves aside, because no target names their layer."""
    config = _config(facts)
    if not config or not facts.modules or config.get("target_parameters"):
        return
    if config.get("ensure_weight_tying"):
        return  # a tied layer is adapted with the one that is named
    found = _uncovered(config.get("target_modules"), _outer(facts))
    if found:
        yield "no entry of target_modules names these modules, so that PEFT leaves their weights aside", found


def _uncovered(targets: object, paths: list[str]) -> tuple[str, ...]:
    if isinstance(targets, list):
        named = {str(t) for t in targets}
        return tuple(p for p in paths if named.isdisjoint(_ends(p)))
    if not isinstance(targets, str):
        return tuple(paths)
    if targets.lower() == "all-linear":
        return ()
    try:
        hits = _core.match_whole(targets, paths)
    except ConfigError:
        return ()  # an expression that only Python runs: nothing can be said
    return tuple(p for p, hit in zip(paths, hits, strict=True) if not hit)


def set_targets(facts: Facts, draft: Draft) -> None:
    """Names exactly the modules that the copy has."""
    if draft.config is None:
        return
    paths = {i.key.path.split(".base_layer.", 1)[0] for i in draft.items if i.key.factor}
    draft.config["target_modules"] = sorted(paths)
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if draft.config.get(key) is not None:
            draft.config[key] = None
    draft.say(f"set target_modules to the {len(paths)} modules of the file")


def drop_targets(facts: Facts, draft: Draft) -> None:
    """Leaves out targets without weights."""
    targets = (draft.config or {}).get("target_modules")
    if draft.config is not None and isinstance(targets, list):
        gone = _lost(facts, targets)
        if not gone:
            return  # another repair has named the modules anew
        draft.config["target_modules"] = [t for t in targets if str(t) not in gone]
        draft.say(f"removed {shown(gone)} from target_modules: no weights")


def base_mutating(facts: Facts) -> Said:
    """PiSSA and its like subtract the start from the base: the product refers to another model."""
    value = _config(facts).get("init_lora_weights")
    if value in (None, True, False) or (isinstance(value, str) and value.lower() in SOUND_INITS):
        if facts.kind != "peft" and facts.file is not None:
            for v in facts.file.variants:
                if v.kind.startswith("init:"):
                    yield v.why, (v.at,)
        return
    yield (
        f"init_lora_weights is {value!r}, which changed the base weights before training: the product does "
        "not refer to the original model",
        ("init_lora_weights",),
    )


def variants(facts: Facts) -> Said:
    """What is not plain LoRA on linear layers."""
    config = _config(facts)
    for key, what in VARIANTS.items():
        value = config.get(key)
        if value is not None and (value or key == "alora_invocation_tokens"):
            yield f"{what} ({key})", (key,)
    kinds: dict[str, list[str]] = {}
    for t in facts.tensors:
        if t.key.variant and t.key.variant != "training":
            kinds.setdefault(t.key.variant, []).append(t.name)
        elif facts.kind == "peft" and t.key.factor and len(t.shape) in (3, 4, 5):
            kinds.setdefault("conv", []).append(t.name)
    said = {name for names in kinds.values() for name in names} | {k for k in VARIANTS if config.get(k)}
    for v in facts.file.variants if facts.file is not None else ():
        if v.at not in said and not v.kind.startswith("init:") and (facts.kind == "other" or not kinds):
            kinds.setdefault(v.kind, []).append(v.at)
    for kind, names in kinds.items():
        yield f"tensors of {kind}, which plain LoRA has not", tuple(dict.fromkeys(names))
    if facts.foreign:
        yield "keys of another writer (Kohya, diffusers or LyCORIS)", tuple(t.name for t in facts.foreign)


def unknown(facts: Facts) -> Said:
    """Settings that nothing here knows, and that are switched on."""
    for key, value in _config(facts).items():
        if key not in KNOWN and value:
            yield f"unknown setting{near(key, KNOWN)}; it may change the mathematics", (key,)


def drop_unknown(facts: Facts, draft: Draft) -> None:
    """Leaves them out, as PEFT does."""
    if draft.config is not None:
        gone = [k for k, v in draft.config.items() if k not in KNOWN and v]
        draft.config = {k: v for k, v in draft.config.items() if k not in gone}
        draft.say(f"removed the settings {shown(gone)}, which PEFT does not know either")


def alphas(facts: Facts) -> Said:
    """Scalings that are seldom meant."""
    zero, negative, large = [], [], []
    for path, m in facts.modules.items():
        if m.alpha == 0:
            zero.append(path)
        elif m.alpha is not None and m.alpha < 0:
            negative.append(path)
        elif m.alpha is not None and m.rank and not m.rslora and m.alpha / m.rank > MOST_SCALING:
            large.append(path)
    if zero:
        yield "alpha is 0, so that nothing is applied", tuple(zero)
    if negative:
        yield "alpha is negative, which takes away what was learned", tuple(negative)
    if large:
        yield f"alpha / rank is above {MOST_SCALING:g}", tuple(large)


def rslora(facts: Facts) -> Said:
    """RsLoRA multiplies what is usual for plain LoRA by the root of the rank."""
    found = [m for m in facts.modules.values() if m.rslora and (m.scaling or 0) > MOST_RSLORA]
    if found:
        most = max(m.scaling or 0 for m in found)
        yield (
            f"use_rslora with scaling up to {most:.4g}: alpha was perhaps chosen for alpha / rank",
            tuple(m.path for m in found),
        )


def transposed(facts: Facts) -> Said:
    """Base layers that store their weights the other way round."""
    if _config(facts).get("fan_in_fan_out") is True:
        yield "the base layers store (in, out): transpose the delta before it is added", ("fan_in_fan_out",)


def no_base(facts: Facts) -> Said:
    """Nobody can tell what it is for."""
    config = _config(facts)
    if config and not facts.text("base_model_name_or_path"):
        yield "no base model is named", ("base_model_name_or_path",)


def no_version(facts: Facts) -> Said:
    """What an old file means depends on the PEFT that wrote it."""
    config = _config(facts)
    if config and not facts.text("peft_version"):
        yield "no peft_version is named", ("peft_version",)


def nothing_saved(facts: Facts) -> Said:
    """Modules that should be in the file, and are not."""
    modules = _config(facts).get("modules_to_save")
    if isinstance(modules, list):
        lost = [str(m) for m in modules if not any(f".{m}." in f".{t.name}" for t in facts.tensors)]
        if lost:
            yield "modules_to_save names modules without a tensor in the file", tuple(lost)
