"""Streams of clicks and the people who make them.

A user sees the ten best documents for a query, as the adapter ranks them at that moment, and says something:
``user(bench, rng, pair, moved query) -> (feedback, quality) or None`` where nothing was clicked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import microlora as ml

from .plan import MODULE, Bench, Indices, Server, Setting

SHOWN, TEMPERATURE = 10, 0.05
#: Chance of a click on an examined document that was not wanted.
SLIP = 0.1
#: Beta distributions of ratings: what was wanted, and what was not. They overlap: 16 % of the wrong are rated
#: above 0.5, and 10 % of the right below.
RIGHT, WRONG = (6.0, 2.5), (2.5, 5.0)

Said = tuple[Any, float | None]
User = Callable[[Bench, np.random.Generator, int, Any], Said | None]


def shown(bench: Bench, y: Any) -> Indices:
    """The ten best documents, best first."""
    scores = bench.task.documents @ y
    best = np.argpartition(-scores, SHOWN)[:SHOWN]
    return best[np.argsort(-scores[best], kind="stable")]


def right(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said:
    """Clicks what was wanted."""
    return ml.Target(bench.task.documents[pair]), None


def cosine(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said:
    """The same, learned by its angle alone."""
    return ml.Target(bench.task.documents[pair], loss="cosine"), None


def _drawn(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> tuple[Any, float]:
    best = shown(bench, y)
    scores = bench.task.documents[best] @ y
    p = np.exp((scores - scores.max()) / TEMPERATURE)
    pick = rng.choice(best, p=p / p.sum())
    return bench.task.documents[pick], float(pick == pair)


def rewarded(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said:
    """Rates one document, drawn from the ten best: 1 if it was wanted, else 0. All that is known is that."""
    document, quality = _drawn(bench, rng, pair, y)
    return ml.Reward(quality, document), quality


def imitated(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said:
    """The same document as a target that weighs by its quality."""
    document, quality = _drawn(bench, rng, pair, y)
    return ml.Target(document), quality


def noisy(share: float, rated: bool) -> User:
    """Clicks another of the ten documents with this chance; may rate what was clicked, noisily."""

    def user(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said:
        wrong = rng.random() < share
        others = shown(bench, y)
        pick = int(rng.choice(others[others != pair])) if wrong else pair
        rating = float(rng.beta(*(WRONG if wrong else RIGHT)))
        return ml.Target(bench.task.documents[pick]), rating if rated else None

    return user


def biased(eta: float, quality: str) -> User:
    """Reads from the top and clicks what is wanted, or by mistake something else; may click nothing.

    The document at rank k = 0, 1, ... is examined with the propensity ``1 / (k + 1) ** eta``, independently
    (the position-based model: Richardson et al. 2007; Joachims et al. 2017). An examined document is clicked
    if it is the wanted one, and otherwise with the chance 0.1; the first click ends the search.
    ``quality`` is ``""``, ``"rating"`` (as of `noisy`), or ``"ips"``: the weight of the click is the inverse
    of its propensity, scaled so that the tenth rank weighs 1.
    """

    def user(bench: Bench, rng: np.random.Generator, pair: int, y: Any) -> Said | None:
        best = shown(bench, y)
        propensity = (np.arange(SHOWN) + 1.0) ** -eta
        examined, slips = rng.random(SHOWN) < propensity, rng.random(SHOWN) < SLIP
        rating = rng.beta(*RIGHT), rng.beta(*WRONG)
        for k in np.flatnonzero(examined & (slips | (best == pair))):
            wanted = best[k] == pair
            value = {
                "": None,
                "rating": float(rating[0] if wanted else rating[1]),
                # Turned into the weight again by the threshold of 0.5.
                "ips": float(0.5 + 0.5 * propensity[-1] / propensity[k]),
            }[quality]
            return ml.Target(bench.task.documents[best[k]]), value
        return None

    return user


def flipped(first: int, last: int) -> Callable[[int], User]:
    """From event ``first`` up to ``last`` the target is turned round: -t."""

    def at(number: int) -> User:
        if not first <= number < last:
            return right
        return lambda bench, rng, pair, y: (ml.Target(-bench.task.documents[pair]), None)

    return at


def in_turn(bench: Bench, personas: Sequence[str]) -> Indices:
    """One persona's clicks after the other's."""
    return np.concatenate([bench.task.split.stream[name] for name in personas])


def mixed(bench: Bench, personas: Sequence[str]) -> Indices:
    """All clicks in random order."""
    return bench.rng(3).permutation(in_turn(bench, personas))


def serve(
    bench: Bench,
    setting: Setting,
    loop: Server,
    clicks: Indices,
    user: User | Callable[[int], User],
    look: Callable[[int, Any], None] | None = None,
    *,
    changing: bool = False,
    key: int = 4,
    module: str = MODULE,
) -> int:
    """Lets a loop learn from a stream.

    Args:
        bench: The task.
        setting: Says whether the background loop runs.
        loop: Learns in place.
        clicks: Pairs looked for, in order.
        user: What is said of each; with ``changing`` it is asked for by the number of the event.
        look: Called after every event with its number, from 1, and the background's result or None.
        changing: See ``user``.
        key: Of the user's draws.
        module: The module that ranks.

    Returns:
        Events that were learned from.
    """
    rng, told = bench.rng(key), 0
    for n, i in enumerate(clicks):
        x = bench.task.queries[i]
        y = x + loop.forward(x, module)
        speaks: Any = user(n) if changing else user  # type: ignore[call-arg, arg-type]
        said = speaks(bench, rng, int(i), y)
        done = None
        if said is not None:
            feedback, quality = said
            loop.instant_adapt(x, feedback, quality, None, x)
            told += 1
            done = loop.maybe_background() if setting.background else None
        if look is not None:
            look(n + 1, done)
    return told
