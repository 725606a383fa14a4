"""A small stand-in for the core's loops with the same interface; used only where the core has none."""

import json
import threading
import time
from dataclasses import dataclass, field

import numpy as np

import microlora as ml
from microlora import _core


@dataclass(frozen=True)
class Result:
    applied: bool
    loop_type: str
    latency_us: float = 1.0
    quality_delta: float = float("nan")
    samples_used: int = 0
    notes: tuple = ()
    event: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    version: int = 0


@dataclass
class State:
    lora: object
    manager: object
    settings: dict
    slow: object
    lock: object = field(default_factory=threading.RLock)
    events: int = 0
    applied: int = 0
    accepted: int = 0
    refused: int = 0
    deep: int = 0
    quality: float = 0.0
    skipped: dict = field(default_factory=dict)
    window: list = field(default_factory=list)
    train: list = field(default_factory=list)
    held: list = field(default_factory=list)
    last: float = 0.0
    paused: int = 0
    first: float | None = None
    after: float | None = None
    overflow: int = 0


def loss_of(adapter, x, feedback, base, module):
    """1/2 |base + dY - t|^2 of a target; None for other feedback."""
    if not isinstance(feedback, ml.Target) or feedback.loss != "mse":
        return None
    y = ml.MicroLoRA(ml.Adapter(adapter)).forward(x, module) + (0 if base is None else base)
    return 0.5 * float(((y - feedback.t) ** 2).sum())


class Sona:
    def __new__(cls, lora, manager, settings_json):
        self = object.__new__(cls)
        self._fake = State(lora, manager, json.loads(settings_json), lora.adapter())
        return self

    def instant_adapt(self, x, feedback, quality=None, module=None, base=None):
        if isinstance(x, str):
            return self._adapt_text(x, feedback, quality, module)
        s = self._fake
        x = np.ascontiguousarray(x, np.float32)
        if quality is not None and not 0.0 <= quality <= 1.0:
            raise ml.exceptions.FeedbackError(f"quality: got {quality}, expected a number from 0 to 1")
        with s.lock:
            event = s.events + 1
            low = quality is not None and quality < s.settings["quality_threshold"]
            if low and isinstance(feedback, ml.Target):
                s.events, s.skipped = event, {**s.skipped, "quality": s.skipped.get("quality", 0) + 1}
                return Result(False, "instant", notes=("quality below the threshold",), event=event)
            sample = (event, x, feedback, base, module, quality, 1.0)
            every = round(1 / s.settings["holdout"]) if s.settings["holdout"] else 0
            if every and event % every == 0:
                s.held.append(sample)
                step = None
            else:
                names = [module] if module else s.lora.modules()
                for name in names:
                    step = s.lora.instant(x, feedback, name, base)
                s.window.append(sample)
                s.train.append(sample)
                s.applied += 1
                if len(s.window) > s.settings["max_pending_samples"]:
                    s.window.pop(0)
                    s.overflow += 1
            s.events, s.quality = event, s.quality + (1.0 if quality is None else quality)
        if step is None:
            return Result(False, "instant", notes=("held out",), event=event)
        return Result(
            step.applied, "instant", 1.0, 0.0, 1, (), event, step.loss_before, step.loss_after, s.lora.version
        )

    def forward(self, x, module=None, out=None):
        return self._fake.lora.forward(x, module, out)

    def forward_add(self, x, module=None, out=None):
        self._fake.lora.forward_add(x, module, out)

    def modules(self):
        return self._fake.lora.modules()

    def maybe_background(self, force=False):
        s = self._fake
        with s.lock:
            due = len(s.window) >= s.settings["background_min_samples"]
            late = (time.monotonic() - s.last) * 1000 >= s.settings["background_interval_ms"]
            if s.paused or not s.window or not (force or (due and late)):
                return None
            s.last, n = time.monotonic(), len(s.window)
            before, after = self.evaluate(s.slow), self.evaluate()
            s.window.clear()
            s.first = before if s.first is None else s.first
            s.after = after
            if before is not None and after is not None and after > before * 1.01:
                s.refused += 1
                s.lora.restore(s.slow)
                notes = ("the held-out loss rose",)
                return Result(False, "background", 1.0, 0.0, n, notes, None, before, after, s.lora.version)
            s.accepted += 1
            s.slow = s.lora.adapter()
            s.manager._publish(s.slow, None, False)
            delta = float("nan") if after is None else before - after
            return Result(True, "background", 1.0, delta, n, (), None, before, after, s.lora.version)

    def pause(self):
        self._fake.paused += 1

    def resume(self):
        self._fake.paused -= 1

    def stats(self):
        s = self._fake
        return {
            "instant_count": s.events,
            "instant_applied": s.applied,
            "skipped": dict(s.skipped),
            "background_count": s.accepted + s.refused,
            "accepted": s.accepted,
            "refused": s.refused,
            "deep_count": s.deep,
            "pending_samples": len(s.window),
            "overflowed_samples": s.overflow,
            "accumulated_quality": s.quality,
            "reservoir_samples": len(s.train),
            "held_out_samples": len(s.held),
            "heldout_loss_first": s.first,
            "heldout_loss_last": s.after,
            "version": s.lora.version,
            "bytes": {"adapter": s.lora.memory_bytes},
            "of_a_newer_core": 1,
        }

    def samples(self, held_out):
        return list(self._fake.held if held_out else self._fake.train)

    def evaluate(self, adapter=None):
        s = self._fake
        adapter = s.lora.adapter() if adapter is None else adapter
        found = [
            loss
            for _, x, f, base, m, _, _ in s.held
            for name in ([m] if m else s.lora.modules())
            if (loss := loss_of(adapter, x, f, base, name)) is not None
        ]
        return float(np.mean(found)) if found else None

    def install(self, adapter, samples_used, gate):
        s = self._fake
        with s.lock:
            before, after = self.evaluate(), self.evaluate(adapter)
            ok = not gate or before is None or after <= before * 1.01
            if ok:
                s.lora.restore(ml.Adapter(adapter))
                s.slow = s.lora.adapter()
                s.manager._publish(s.slow, None, False)
                s.quality, s.deep = 0.0, s.deep + 1
            delta = float("nan") if before is None else before - after
            notes = () if ok else ("the held-out loss rose",)
            return Result(ok, "deep", 1.0, delta, samples_used, notes, None, before, after, s.lora.version)

    def adapter(self, config_json=None, metadata_json=None):
        return _core.MicroLora.adapter(self._fake.lora, config_json, metadata_json)

    def consolidated(self, config_json=None, metadata_json=None):
        return self._fake.slow.with_json(config_json, metadata_json)

    def ensemble(self):
        return self._fake.settings.get("_members", [])

    def to_bytes(self):
        return self._fake.lora.snapshot().to_bytes()

    def restore(self, data):
        self._fake.lora.restore(ml.Snapshot(data))


def install():
    """Puts the stand-ins where the core has none."""
    if not hasattr(_core, "Sona"):
        _core.Sona = Sona
        _core.AdaptationResult = Result


install()
