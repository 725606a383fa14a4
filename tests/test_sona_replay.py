"""State that survives: restored, replayed bit for bit, killed at any moment, damaged at any byte."""

import os
import random
import shutil
import signal
import struct
import time
import zlib
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microlora as ml
from microlora.sona import JournalConfig, SonaLoop
from sona_core_support import (
    NAMES,
    STRATEGIES,
    WIDTH,
    core_config,
    core_loop,
    digest,
    essence,
    feed,
    mixed,
    same_state,
    targets,
)
from support import normal, rng

JOURNAL = JournalConfig(segment_bytes=16384)
OPTIONS = {"max_ms": 1e-9, "ensemble_size": 3, "pattern_threshold": 0.3, "max_pending_samples": 60}
SETTINGS = st.fixed_dictionaries(
    {
        "consolidation": st.sampled_from(STRATEGIES),
        "dtype": st.sampled_from(["f32", "f16", "bf16"]),
        "warmup_inputs": st.sampled_from([0, 12]),
        "holdout": st.sampled_from([0.0, 0.1, 0.3]),
        "gate_tolerance": st.sampled_from([0.01, 1e9]),
        "reservoir_capacity": st.sampled_from([0, 20, 512]),
        "reservoir_dtype": st.sampled_from(["f32", "f16"]),
        "reservoir_balance": st.booleans(),
    }
)
SEEDS = st.integers(0, 50)
OPS = st.lists(
    st.tuples(
        st.sampled_from(["targets", "mixed", "patterns", "turn", "turn", "choose", "deep", "step"]), SEEDS
    ),
    min_size=1,
    max_size=12,
)


def trained(sona, seed):
    """Another adapter for the loop's modules."""
    lora = ml.MicroLoRA(sona.config.learner, hidden_dim=WIDTH, seed=seed)
    for call in targets(8, seed):
        for m in NAMES:
            lora.instant(call.x, call.feedback, module=m)
    return lora.export_weights()


def act(sona, op):
    kind, seed = op
    r = rng(seed)
    if kind == "targets":
        feed(sona, targets(9, seed))
    elif kind == "patterns":
        feed(sona, targets(25, seed, patterns=3, quality=0.9))
    elif kind == "mixed":
        feed(sona, mixed(9, seed))
    elif kind == "turn":
        result = sona.maybe_background(force=True)
        while result is not None and result.outcome == "goes_on":
            result = sona.maybe_background()
    elif kind == "step":
        sona.maybe_background(force=True)
    elif kind == "choose":
        for _ in range(3):
            choice = sona.choose(normal(r, WIDTH), ["a", "b", "c"], module="v_proj")
            sona.reward(choice.id, float(r.uniform()))
        sona.choose(normal(r, WIDTH), ["a", "d"], module="v_proj")
    elif kind == "deep":
        sona.install(ml.Adapter(trained(sona, seed)), 8, bool(seed % 2))
    elif kind == "checkpoint":
        sona.checkpoint()


def whole(sona):
    """Ends what is under way."""
    act(sona, ("turn", 0))
    return sona


@given(SETTINGS, OPS, OPS)
def test_a_restored_loop_goes_on_bit_for_bit(chosen, before, after):
    sona = core_loop(**OPTIONS, **chosen)
    for op in before:
        act(sona, op)
    whole(sona)
    again = core_loop(**OPTIONS, **chosen)
    again.restore(sona.to_bytes())
    same_state(again, sona)
    assert again.stats().accepted == sona.stats().accepted
    for op in after:
        act(sona, op)
        act(again, op)
    same_state(again, sona)
    assert again.choices() == sona.choices()


def test_a_saved_loop_goes_on_bit_for_bit(tmp_path):
    sona = core_loop(warmup_inputs=12)
    for op in [("patterns", 1), ("turn", 0), ("mixed", 2), ("turn", 0), ("targets", 3)]:
        act(sona, op)
    sona.save(tmp_path / "s")
    again = SonaLoop.load(tmp_path / "s")
    for op in [("targets", 4), ("turn", 0), ("mixed", 5), ("choose", 6), ("turn", 0)]:
        act(sona, op)
        act(again, op)
    same_state(again, sona)


@given(SETTINGS, OPS, st.integers(0, 12), st.booleans())
def test_a_journal_gives_the_loop_again(tmp_path_factory, chosen, ops, checkpoint_at, read_only):
    folder = tmp_path_factory.mktemp("loop")
    sona = SonaLoop.open(folder, core_config(**OPTIONS, **chosen), journal=JOURNAL)
    for i, op in enumerate(ops):
        if i == checkpoint_at:
            sona.checkpoint()
        act(sona, op)
    alive = digest(sona)
    sona.close()
    under_way = sona.stats().consolidating
    sona = whole(sona) if not under_way else sona
    again = SonaLoop.open(folder, journal=None if read_only else JOURNAL)
    assert again.opened.exact
    ended = [text.split(":")[0] for text in again.opened.warnings]
    assert ended == (["opened without a journal"] if read_only else [])
    assert digest(again) == alive
    if not under_way:
        act(again, ("turn", 0))
        same_state(again, sona)
        assert again.choices() == sona.choices()
    again.close()


def test_events_without_a_journal_and_with_one(tmp_path):
    def run(i, journal):
        with closing(SonaLoop.open(tmp_path / "d", core_config(), journal=journal)) as sona:
            act(sona, ("targets", i))
            act(sona, ("turn", 0))
            if journal is None:
                sona.checkpoint()
            return essence(sona)

    for i, journal in enumerate([JOURNAL, None, JOURNAL, JOURNAL, None, None, JOURNAL]):
        state = run(i, journal)
        with closing(SonaLoop.open(tmp_path / "d", journal=journal)) as again:
            same_state(again, state)


# -- killed --

SCRIPT = [
    op
    for seed in range(6)
    for op in [
        ("targets", seed),
        ("step", 0),
        ("mixed", seed),
        ("turn", 0),
        ("choose", seed),
        ("deep", 2 * seed),
    ]
]


def single_steps():
    """The script, an event at a time."""
    for kind, seed in SCRIPT:
        if kind in ("targets", "mixed"):
            for call in (targets if kind == "targets" else mixed)(9, seed):
                yield lambda s, call=call: s.instant_adapt(*call)
        else:
            yield lambda s, op=(kind, seed): act(s, op)


def run(folder, config, journal, checkpoints):
    """Runs the script for ever, and says before and after each step what the weights are."""
    sona = SonaLoop.open(folder, config, journal=journal)
    yield digest(sona)
    while True:
        for i, step in enumerate(single_steps()):
            step(sona)
            if checkpoints and i % 40 == 33:
                sona.checkpoint()
            yield digest(sona)


@pytest.mark.parametrize(
    ("options", "journal", "checkpoints"),
    [
        ({}, JOURNAL, False),
        ({"warmup_inputs": 20, "dtype": "f16"}, JOURNAL.replace(retain_bytes=0), True),
        ({"consolidation": "ensemble"}, JOURNAL.replace(fsync="events", every=10), True),
    ],
)
def test_a_process_that_is_killed_loses_at_most_one_step(tmp_path, options, journal, checkpoints):
    config = core_config(**OPTIONS, **options)
    pick = random.Random(3)
    for round_ in range(12):
        folder, path = tmp_path / f"d{round_}", tmp_path / f"log{round_}"
        log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        pid = os.fork()
        if pid == 0:
            try:
                for said in run(folder, config, journal, checkpoints):
                    os.write(log, f"{said}\n".encode())
            finally:
                os._exit(1)
        os.close(log)
        until = time.monotonic() + 30
        while path.stat().st_size < 66 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(pick.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        said = path.read_text().splitlines()
        with closing(SonaLoop.open(folder, journal=journal)) as again:
            assert again.opened.exact
            now = digest(again)
            if now != said[-1]:
                # One step further than it could say.
                twin = run(tmp_path / f"twin{round_}", config, journal, checkpoints)
                assert now == list(islice(twin, len(said) + 1))[-1]
            act(again, ("targets", 77))
            act(again, ("turn", 0))
            kept = digest(again)
        with closing(SonaLoop.open(folder)) as once_more:
            assert digest(once_more) == kept


# -- damaged --

#: Bytes of a record: its own, its number, an event's, two vectors.
SIZE = 32 + 8 + 48 + 4 * 2 * WIDTH


def written(folder, n=40, journal=JOURNAL):
    """A journal of events, and the weights after each of them."""
    sona = SonaLoop.open(folder, core_config(), journal=journal)
    after = [digest(sona)]
    for call in targets(n, 1):
        sona.instant_adapt(*call)
        after.append(digest(sona))
    sona.close()
    (segment,) = (folder / "journal-1").glob("journal-*.seg")
    return after, segment, segment.read_bytes()


def opened_prefix(folder, after, segment):
    """How many events are left, which is checked against the weights; what opening said of the damage."""
    with closing(SonaLoop.open(folder, journal=JOURNAL)) as sona:
        n = sona.stats().instant_count
        assert digest(sona) == after[n]
        warnings = sona.opened.warnings
        assert warnings == () or segment.name in " ".join(warnings)
        assert [line["event"] for line in sona.audit()] == list(range(1, n + 1))
        # And it goes on.
        assert sona.instant_adapt(*targets(1, 9)[0]).event == n + 1
        now = digest(sona)
    with closing(SonaLoop.open(folder, journal=JOURNAL)) as again:
        assert digest(again) == now
        assert again.opened.warnings == ()
    return n, warnings


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal") / "d"
    after, _, data = written(folder)
    (head,) = struct.unpack_from("<I", data, 12)
    end = head + 40 * SIZE
    assert not any(data[end:])
    assert any(data[end - 8 : end])
    return folder, after, data, head, end


def again_in(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (segment,) = (tmp_path / "journal-1").glob("journal-*.seg")
    return segment


@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_leaves_what_was_before_it(journal, tmp_path_factory, at, bit):
    folder, after, whole, head, end = journal
    at %= end
    tmp = tmp_path_factory.mktemp("flip")
    segment = again_in(folder, tmp)
    changed = bytearray(whole)
    changed[at] ^= 1 << bit
    segment.write_bytes(changed)
    n, warnings = opened_prefix(tmp, after, segment)
    assert warnings or n == len(after) - 1
    # No more is lost than from the damage on; a damaged head takes all of its segment.
    assert n >= (at - head) // SIZE or at < head
    shutil.rmtree(tmp)


@given(st.integers(0, 10**9), st.booleans())
def test_a_truncated_journal_leaves_what_was_before(journal, tmp_path_factory, at, late):
    folder, after, whole, head, end = journal
    at = end - at % (2 * SIZE) if late else at % end
    tmp = tmp_path_factory.mktemp("cut")
    segment = again_in(folder, tmp)
    segment.write_bytes(whole[:at])
    n, warnings = opened_prefix(tmp, after, segment)
    assert warnings or not at
    assert n == max(0, (at - head) // SIZE)
    shutil.rmtree(tmp)


def test_power_loss_as_zeros_behind_the_last_sync(journal, tmp_path):
    folder, after, whole, _, end = journal
    segment = again_in(folder, tmp_path)
    segment.write_bytes(whole[: end - 500] + bytes(len(whole) - end + 500))
    n, _ = opened_prefix(tmp_path, after, segment)
    assert 30 <= n < 40


def test_newer_formats_are_refused_and_left_alone(tmp_path):
    written(tmp_path / "d", 5)
    state = tmp_path / "d" / "state.safetensors"
    data = state.read_bytes()
    assert data.count(b'{"format":1,') == 1
    state.write_bytes(data.replace(b'{"format":1,', b'{"format":9,'))
    for make in (SonaLoop.open, SonaLoop.load):
        with pytest.raises(ml.exceptions.FormatError, match="layout 9"):
            make(tmp_path / "d")
    state.write_bytes(data)
    SonaLoop.open(tmp_path / "d", journal=JOURNAL).close()


def test_a_newer_journal_is_refused_and_left_alone(journal, tmp_path):
    segment = again_in(journal[0], tmp_path)
    data = bytearray(segment.read_bytes())
    magic, format_, head = struct.unpack_from("<8sII", data)
    assert (magic, format_) == (b"mlJournl", 1)
    struct.pack_into("<I", data, 8, 2)
    struct.pack_into("<I", data, 16, zlib.crc32(data[24:head], zlib.crc32(data[:16])))
    segment.write_bytes(data)
    with pytest.raises(ml.exceptions.FormatError, match="newer"):
        SonaLoop.open(tmp_path, journal=JOURNAL)
    assert segment.read_bytes() == data


def test_a_second_process_is_refused(tmp_path):
    with closing(SonaLoop.open(tmp_path / "d", core_config(), journal=JOURNAL)) as sona:
        feed(sona, targets(3))
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                SonaLoop.open(tmp_path / "d", journal=JOURNAL)
            except OSError as error:
                code = 0 if "in use" in str(error) else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        feed(sona, targets(3))
        kept = digest(sona)
    with closing(SonaLoop.open(tmp_path / "d")) as again:
        assert digest(again) == kept


CHANGED = {"holdout": 0.2, "seed": 1, "consolidation": "average", "ewc_lambda": 3.0, "max_ms": 2.0}


@pytest.mark.parametrize("key", CHANGED)
def test_other_settings_are_refused_by_name(key, tmp_path):
    sona = core_loop()
    feed(sona, targets(20))
    other = core_loop(**{key: CHANGED[key]})
    before = other.to_bytes()
    with pytest.raises(ml.exceptions.ConfigError, match=key):
        other.restore(sona.to_bytes())
    assert other.to_bytes() == before
    SonaLoop.open(tmp_path / "d", core_config()).close()
    with pytest.raises(ml.exceptions.ConfigError, match="other settings"):
        SonaLoop.open(tmp_path / "d", core_config(**{key: CHANGED[key]}))


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_state_is_refused_or_finite(data):
    sona = damaged_state()
    raw = bytearray(sona.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    fresh = core_loop(consolidation="ensemble", ensemble_size=3, pattern_threshold=0.3)
    before = fresh.to_bytes()
    try:
        fresh.restore(bytes(raw))
    except (ml.exceptions.MicroLoraError, ValueError):
        assert fresh.to_bytes() == before
        return
    act(fresh, ("targets", 3))
    act(fresh, ("turn", 0))
    fresh.evaluate()
    assert np.isfinite(fresh.forward(np.ones(WIDTH, np.float32), "q_proj")).all()


def damaged_state(made=[]):  # noqa: B006
    if not made:
        sona = core_loop(consolidation="ensemble", ensemble_size=3, pattern_threshold=0.3)
        for op in [("patterns", 1), ("turn", 0), ("mixed", 2), ("choose", 1)]:
            act(sona, op)
        made.append(sona)
    return made[0]
