"""Two users of one frozen model, each with a small adapter that learns only from its owner."""

import numpy as np

import microlora as ml

DIM, EVENTS = 256, 200
rng = np.random.default_rng(7)
config = ml.LoraConfig(rank=8, target_modules=["q_proj"])
users = {name: ml.MicroLoRA(config, hidden_dim=DIM, seed=1) for name in ("ada", "bob")}

# Inputs of real models lie near few directions; each user wants another map of them.
basis = rng.standard_normal((8, DIM)) / np.sqrt(DIM)
wanted = {name: rng.standard_normal((8, DIM)) for name in users}


def event(name: str) -> tuple[np.ndarray, np.ndarray]:
    """An input and the output that this user would have liked to see added."""
    z = rng.standard_normal(8)
    return (z @ basis).astype(np.float32), (0.1 * z @ wanted[name]).astype(np.float32)


def error(name: str, adapter: ml.MicroLoRA) -> float:
    """Root mean square of what is still missing, relative to what was wanted, on new events."""
    missing, total = 0.0, 0.0
    for x, t in (event(name) for _ in range(100)):
        missing += float(np.sum((adapter.forward(x) - t) ** 2))
        total += float(np.sum(t**2))
    return (missing / total) ** 0.5


# A few unlabelled inputs choose A, so that a small rank sees what matters.
sample = np.stack([event("ada")[0] for _ in range(64)])
for lora in users.values():
    lora.fit_input_basis(sample)

for name, lora in users.items():
    for _ in range(EVENTS):
        x, t = event(name)
        lora.instant(x, ml.Target(t))

print("error on new events, by the adapter that answers")
for name in users:
    row = "  ".join(f"{owner}'s {error(name, lora):5.3f}" for owner, lora in users.items())
    print(f"  events of {name}: {row}")
    others = [lora for owner, lora in users.items() if owner != name]
    assert error(name, users[name]) < 0.05
    assert all(error(name, lora) > 0.5 for lora in others)
print(f"each adapter: {users['ada'].param_count:,} parameters, {users['ada'].memory_bytes:,} bytes")
