"""What the tests of the hot-swap manager share."""

import microlora as ml
from support import make, normal, rng

N = 24
X, ROWS = normal(rng(1), N), normal(rng(2), 5, N)


def adapter(seed=0, rank=4, names=("q_proj", "v_proj"), n_in=N, n_out=None, **settings):
    return make(n_in, n_out, rank, seed=seed, names=names, **settings).adapter()


def state(manager):
    """All that a refused call must leave as it was."""
    pinned = manager.pin()
    return (
        manager.generation,
        pinned.adapter,
        manager.standby,
        manager.previous,
        manager.is_swapping,
        manager.modules(),
    )


def in_service():
    """Generation 2 of 2, with one to go back to and one that stands by."""
    m = ml.HotSwapManager(adapter(1))
    m.set_active(adapter(2))
    m.prepare_standby(adapter(3), background=False)
    return m
