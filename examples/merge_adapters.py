"""Two adapters that learned different things become one, and the report tells what that cost."""

import numpy as np

import microlora as ml


def learned(seed: int) -> tuple[ml.Adapter, np.ndarray, np.ndarray]:
    """An adapter that maps its own inputs to its own targets, with a few of both held out."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((160, 6)) @ rng.standard_normal((6, 64))).astype(np.float32)
    t = (x @ rng.standard_normal((64, 48)) / 40).astype(np.float32)
    lora = ml.MicroLoRA(
        ml.LoraConfig(rank=8, target_modules=["q_proj"]), dims={"q_proj": (64, 48)}, seed=seed
    )
    lora.fit_input_basis(x)
    for row, target in zip(x[:120], t[:120], strict=True):
        lora.instant(row, ml.Target(target))
    return lora.adapter(), x, t


def left(adapter: ml.Adapter, x: np.ndarray, t: np.ndarray) -> float:
    """Share of the held-out targets that is not explained."""
    y = ml.MicroLoRA(adapter).forward(x[120:], "q_proj")
    return float(((y - t[120:]) ** 2).sum() / (t[120:] ** 2).sum())


def main() -> None:
    tasks = {"a": learned(1), "b": learned(2)}
    adapters = {name: adapter for name, (adapter, _, _) in tasks.items()}
    grams = {n: {"q_proj": ml.collect_gram(ml.MicroLoRA(one), x[:120])} for n, (one, x, _) in tasks.items()}
    merged = {
        "average": ml.merge(adapters, method="average"),
        "ties": ml.merge(adapters, method="ties", density=0.5, rank=16),
        "regmean": ml.merge(adapters, method="regmean", statistics=grams),
    }
    print(f"unexplained of a and b  {'own adapter':>11s}" + "".join(f"{name:>9s}" for name in merged))
    for name, (own, x, t) in tasks.items():
        shares = [left(result.adapter, x, t) for result in merged.values()]
        print(f"  held out of {name}         {left(own, x, t):11.3f}" + "".join(f"{s:9.3f}" for s in shares))
    print(merged["regmean"].report)
    small = ml.resize(merged["regmean"].adapter, energy=0.99)
    print(small.report)


if __name__ == "__main__":
    main()
