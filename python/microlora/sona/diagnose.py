"""What may be wrong with a loop, from what it measured, each with the setting to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from microlora._checks import FrozenMap
from microlora._core import Reward, Target
from microlora.adapter import Adapter
from microlora.sona.consolidation import Consolidation
from microlora.sona.spectrum import Fit, fit_of

if TYPE_CHECKING:
    from microlora.sona.config import SonaConfig
    from microlora.sona.loop import SonaLoop
    from microlora.sona.stats import SonaStats

__all__ = ["Finding", "diagnose"]

#: Fewer samples say nothing about a stream.
ENOUGH = 20
#: Fewer rollbacks, or refusals in a row, happen on a stream that is sound.
ROLLBACKS, REFUSALS = 3, 5
#: A share of the error of no adapter that is no trouble, and one that is hardly better than none.
LITTLE, HARDLY = 0.02, 0.95


@dataclass(frozen=True)
class Finding:
    """One thing that may be wrong.

    Attributes:
        code: A short name that stays.
        message: What was seen, and what to do about it.
        setting: The setting to change, or what to call.
        evidence: The numbers behind it.
    """

    code: str
    message: str
    setting: str
    evidence: Mapping[str, float] = field(default_factory=FrozenMap)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.code} ({self.setting}): {self.message}" + (f" [{shown}]" if shown else "")


class Facts:
    """What the checks look at, measured once."""

    def __init__(self, loop: SonaLoop) -> None:
        self.loop = loop
        self.config: SonaConfig = loop.config
        self.stats: SonaStats = loop.stats()
        self.running = loop.running

    @cached_property
    def left(self) -> float:
        """Held-out loss of the live weights as a share of that of no adapter; NaN where none is measured."""
        adapter = self.loop.adapter()
        zeros = {m: (adapter.lora_a(m), np.zeros_like(adapter.lora_b(m))) for m in self.loop.modules()}
        loss, nothing = self.loop.evaluate(), self.loop.evaluate(Adapter.from_factors(zeros, alpha=1.0))
        return loss / nothing if loss is not None and nothing else math.nan

    @property
    def steps_matter(self) -> bool:
        """Whether most of what is learned is learned by NLMS; RLS has no step size."""
        return self.stats.nlms_steps > 0.5 * self.stats.instant_applied

    @cached_property
    def samples(self) -> list[Any]:
        """What is remembered for training, as `SonaLoop.samples` gives it."""
        return self.loop.samples(False)

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """How well each module's rank holds its stream, where there are enough targets to tell."""
        found = {}
        adapter = self.loop.adapter()
        for module in self.loop.modules():
            rows = [
                (x, feedback.t if base is None else feedback.t - base)
                for _, x, feedback, base, named, _, _ in self.samples
                if named in (None, module)
                and isinstance(feedback, Target)
                and feedback.loss == "mse"
                and (len(x), feedback.width) == adapter.dims[module]
            ]
            if len(rows) >= max(2 * ENOUGH, 3 * adapter.info(module).rank):
                found[module] = fit_of(
                    np.array([x for x, _ in rows], np.float64),
                    np.array([t for _, t in rows], np.float64),
                    adapter.lora_a(module).astype(np.float64),
                )
        return found


class Row(NamedTuple):
    """One check: its code, and what it says of the facts (nothing, or some findings)."""

    code: str
    check: Callable[[Facts], Iterator[tuple[str, str, dict[str, float]]]]


Said = Iterator[tuple[str, str, dict[str, float]]]


def _constant(facts: Facts) -> Said:
    rewards = [f.r for _, _, f, *_ in facts.samples if isinstance(f, Reward)]
    if len(rewards) >= ENOUGH and np.ptp(rewards) <= 1e-6 * max(1.0, abs(rewards[0])):
        yield (
            "quality",
            "every reward is the same, so that none says what is better: pass qualities that differ",
            {"rewards": len(rewards), "value": rewards[0]},
        )
    targets = [f.t for _, _, f, *_ in facts.samples if isinstance(f, Target)]
    if len(targets) >= ENOUGH and all(np.array_equal(t, targets[0]) for t in targets):
        message = "every target is the same vector, which needs no adapter: pass what each input should give"
        yield "feedback", message, {"targets": len(targets)}


def _low_quality(facts: Facts) -> Said:
    low = sum(n for reason, n in facts.stats.skipped.items() if "quality" in reason)
    count = facts.stats.instant_count + low  # what was passed over was not counted as an event
    if count >= ENOUGH and low > 0.5 * count:
        yield (
            "quality_threshold",
            "most events are passed over, because their quality is below the threshold: lower it",
            {"passed_over": low, "events": count, "quality_threshold": facts.config.quality_threshold},
        )


def _rising(facts: Facts) -> Said:
    stats, config = facts.stats, facts.config
    first, last = stats.heldout_loss_first, stats.heldout_loss_last
    least = stats.heldout_loss_least
    if not (math.isfinite(first) and math.isfinite(last) and (last > 1.1 * first or last > 1.5 * least)):
        return
    if facts.left <= LITTLE:
        return
    evidence = {"first": first, "least": least, "last": last}
    if config.consolidation not in (Consolidation.EWC_MERGE, Consolidation.ENSEMBLE):
        setting, way = "consolidation", "take 'ewc_merge', or 'ensemble' for uses that have little in common"
    elif config.reservoir_capacity == 0 and config.canonical_lambda == 0.0:
        setting, way = "ewc_lambda", "nothing holds what was learned earlier: raise it, or keep a reservoir"
    elif config.reservoir_capacity == 0:
        setting, way = "reservoir_capacity", "remember samples: they hold more than a penalty does"
    elif config.replay_ratio == 0.0:
        setting, way = "replay_ratio", "remembered samples have no weight beside new ones: raise it"
    elif facts.steps_matter:
        setting, way = "instant_lr", "take smaller steps, or look whether the feedback is right"
    else:
        setting = "feedback"
        way = "look whether it is right, and whether inputs decide it; lora.instant.rho holds RLS back"
    yield setting, f"the held-out loss rises with what is learned lately: {way}", evidence


def _rolled_back(facts: Facts) -> Said:
    stats = facts.stats
    if stats.rolled_back >= ROLLBACKS:
        yield (
            "feedback",
            "what was learned made held-out events worse and was taken back: some feedback contradicts "
            "the rest (wrong, poisoned, or a change of mind): look at what came then (audit), and forget it",
            {"rolled_back": stats.rolled_back, "of": stats.background_count},
        )


def _nothing(facts: Facts) -> Said:
    stats = facts.stats
    many = stats.background_count >= 2 * REFUSALS and stats.held_out_samples >= ENOUGH
    # Where the live weights are good already, a candidate that is no better is refused, and nothing is wrong.
    if (many or stats.refused_in_a_row >= REFUSALS) and facts.left > HARDLY:
        yield (
            "feedback",
            "held-out events are hardly better off with the live weights than with none: look whether the "
            "feedback is right, and whether the inputs say what is wanted",
            {
                "share_of_no_adapter": facts.left,
                "refused": stats.refused,
                "of": stats.background_count,
                "in_a_row": stats.refused_in_a_row,
            },
        )


def _large_steps(facts: Facts) -> Said:
    stats, rule = facts.stats, facts.config.learner.instant
    if stats.nlms_steps < ENOUGH:
        return
    halved, refused = stats.nlms_halvings / stats.nlms_steps, stats.refused_steps / stats.nlms_steps
    if halved > 0.5 or refused > 0.05:
        evidence = {"halved_share": halved, "refused_share": refused}
        if rule.mu is not None:
            evidence["mu"] = rule.mu
        yield "instant_lr", "steps overshoot and are halved or refused: take a smaller one", evidence


def _small_steps(facts: Facts) -> Said:
    stats, mu = facts.stats, facts.config.learner.instant.mu
    first, last = stats.prequential_loss_first, stats.prequential_loss
    flat = math.isfinite(first) and math.isfinite(last) and last > 0.95 * first
    if mu is not None and mu < 0.05 and flat and stats.instant_applied >= 5 * ENOUGH:
        yield (
            "instant_lr",
            "the loss of new events does not fall and steps are small: take a larger one",
            {"mu": mu, "first": first, "last": last},
        )


def _rank(facts: Facts) -> Said:
    for module, fit in facts.fits.items():
        remains = fit.held > LITTLE * fit.nothing
        if remains and fit.whole < 0.8 * fit.held and fit.whole < 0.9 * fit.nothing:
            yield (
                "lora.rank",
                f"{module}: the inputs hold more of what is wanted than rank {fit.rank} lets through: raise "
                "it, or choose A from the inputs (warmup_inputs)",
                {
                    "energy": fit.energy,
                    "error_at_rank": fit.held,
                    "error_without_limit": fit.whole,
                    "error_of_nothing": fit.nothing,
                },
            )


def _warm_up(facts: Facts) -> Said:
    stats, config = facts.stats, facts.config
    if stats.warmup_left > 0 and not stats.warmed_up and stats.instant_count >= config.background_min_samples:
        yield (
            "warmup_inputs",
            "A is as it was drawn until the warm-up has its inputs: lower it, or call warm_up with inputs",
            {"inputs": config.warmup_inputs, "left": stats.warmup_left},
        )


def _never(facts: Facts) -> Said:
    stats, config = facts.stats, facts.config
    collecting = stats.warmup_left > 0 and not stats.warmed_up
    waits = stats.background_count == 0 and stats.pending_samples >= 3 * config.background_min_samples
    if waits and not (collecting or facts.loop.visited):
        how = "the thread has not come to it" if facts.running else "nothing runs it"
        yield (
            "start()",
            f"no consolidation was ever made and {how}: call start(), or maybe_background() now and then",
            {"pending": stats.pending_samples, "background_min_samples": config.background_min_samples},
        )


def _overflow(facts: Facts) -> Said:
    lost = facts.stats.overflowed_samples
    if lost > 0:
        yield (
            "max_pending_samples",
            "events left the queue before a consolidation saw them: raise it, or consolidate more often",
            {"lost": lost, "max_pending_samples": facts.config.max_pending_samples},
        )


def _blind(facts: Facts) -> Said:
    stats, config = facts.stats, facts.config
    # A window that is rolled back takes its held-out samples with it: that is another trouble.
    few = stats.held_out_samples < config.gate_min_samples and not stats.rolled_back
    if few and stats.instant_count >= 10 * ENOUGH:
        yield (
            "holdout",
            "too few held-out samples to judge a consolidation by: raise it, or lower gate_min_samples",
            {"held_out": stats.held_out_samples, "gate_min_samples": config.gate_min_samples},
        )


def _unused(facts: Facts) -> Said:
    if facts.stats.instant_applied < ENOUGH or len(facts.loop.modules()) < 2:
        return
    adapter = facts.loop.adapter()
    idle = [module for module in facts.loop.modules() if not adapter.lora_b(module).any()]
    if idle and len(idle) < len(facts.loop.modules()):
        message = f"nothing was ever learned in {', '.join(idle)}: leave them out, or pass module="
        yield "lora.target_modules", message, {"events": facts.stats.instant_applied}


def _slow(facts: Facts) -> Said:
    stats, config = facts.stats, facts.config
    if stats.instant_p50_us > 1000.0:
        ranked = config.lora.rank > 2
        setting = "lora.rank" if ranked else "lora.target_modules"
        way = "lower the rank" if ranked else "adapt fewer modules"
        yield setting, f"an event takes more than a millisecond: {way}", {"p50_us": stats.instant_p50_us}
    interval = config.background_interval_ms
    busy = stats.background_avg_latency_us / 1000.0 / interval if interval > 0.0 else math.nan
    if stats.background_count >= 4 and busy > 0.5:
        yield (
            "background_interval_ms",
            "consolidations take more than half of the time between them: make it longer",
            {"share": busy, "interval_ms": interval},
        )


CHECKS: tuple[Row, ...] = (
    Row("constant_feedback", _constant),
    Row("below_threshold", _low_quality),
    Row("heldout_rising", _rising),
    Row("rolled_back", _rolled_back),
    Row("nothing_learned", _nothing),
    Row("step_too_large", _large_steps),
    Row("step_too_small", _small_steps),
    Row("rank_too_small", _rank),
    Row("warmup_not_reached", _warm_up),
    Row("background_never", _never),
    Row("pending_overflow", _overflow),
    Row("gate_blind", _blind),
    Row("module_unused", _unused),
    Row("high_latency", _slow),
)


def diagnose(loop: SonaLoop) -> list[Finding]:
    """What may be wrong with ``loop``; see `SonaLoop.diagnose`."""
    facts = Facts(loop)
    return [
        Finding(row.code, message, setting, FrozenMap((k, float(v)) for k, v in evidence.items()))
        for row in CHECKS
        for setting, message, evidence in row.check(facts)
    ]
