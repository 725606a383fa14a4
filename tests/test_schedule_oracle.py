"""The schedules give torch's rates."""

import pytest

from microlora.training.schedule import LearningRateSchedule

pytestmark = pytest.mark.oracle

BASE, LOW, TOTAL = 0.3, 0.02, 200


def torch_rates(make, base=BASE, steps=TOTAL):
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CASES = {
    "linear": (
        LearningRateSchedule("linear", base_lr=BASE, total=TOTAL, min_lr=LOW),
        lambda s, o: s.LinearLR(o, start_factor=1.0, end_factor=LOW / BASE, total_iters=TOTAL),
        TOTAL + 20,
    ),
    "cosine": (
        LearningRateSchedule("cosine", base_lr=BASE, total=TOTAL, min_lr=LOW),
        lambda s, o: s.CosineAnnealingLR(o, T_max=TOTAL, eta_min=LOW),
        TOTAL + 1,
    ),
    "exponential": (
        LearningRateSchedule("exponential", base_lr=BASE, decay=0.98),
        lambda s, o: s.ExponentialLR(o, gamma=0.98),
        TOTAL,
    ),
    "step": (
        LearningRateSchedule("step", base_lr=BASE, milestones=(20, 50, 51), gamma=0.3),
        lambda s, o: s.MultiStepLR(o, milestones=[20, 50, 51], gamma=0.3),
        TOTAL,
    ),
    **{
        f"one_cycle {total}": (
            LearningRateSchedule("one_cycle", base_lr=BASE, total=total),
            lambda s, o, total=total: s.OneCycleLR(o, max_lr=BASE, total_steps=total),
            total,
        )
        for total in (4, 7, 10, 33, 200)
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_torch(case):
    ours, theirs, steps = CASES[case]
    want = torch_rates(theirs, steps=steps)
    assert ours.lrs(range(steps)).tolist() == pytest.approx(want, rel=1e-6, abs=1e-6 * BASE * 1e-3)
