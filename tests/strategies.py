"""Hypothesis strategies of valid settings, shared by tests."""

from hypothesis import strategies as st

from microlora.config import InstantConfig, LoraConfig
from microlora.metadata import AdapterMetadata, Metric
from microlora.target import TargetModule

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
full_texts = texts.filter(lambda value: value.strip())
tuples_of_texts = st.lists(full_texts, max_size=4, unique=True).map(tuple)
shares = st.floats(1e-30, 1.0)
wide = st.floats(1e-30, 1e30)
ranks = st.integers(1, 65_536)
part = st.text("abcdefghijklmnopqrstuvwxyz_0123456789-", min_size=1, max_size=8)
modules = st.one_of(
    st.sampled_from([str(member) for member in TargetModule]),
    st.lists(part, min_size=1, max_size=5).map(".".join),
)


@st.composite
def instants(draw):
    rule = draw(st.sampled_from(["auto", "rls", "nlms"]))
    return InstantConfig(
        rule=rule,
        forgetting=draw(shares),
        rho=draw(wide),
        mu=draw(st.none() | shares),
        train="b" if rule == "rls" else draw(st.sampled_from(["b", "both"])),
        kappa=draw(wide),
        baseline_rate=draw(shares),
        max_grad_norm=draw(st.none() | wide),
    )


@st.composite
def configs(draw):
    targets = draw(st.lists(modules, min_size=1, max_size=6, unique=True))
    return LoraConfig(
        rank=draw(ranks),
        alpha=draw(wide),
        target_modules=targets,
        dropout=draw(st.floats(0.0, 1.0, exclude_max=True)),
        use_rslora=draw(st.booleans()),
        dtype=draw(st.sampled_from(["f32", "f16", "bf16"])),
        name=draw(texts),
        description=draw(texts),
        tags=draw(tuples_of_texts),
        module_ranks=draw(st.dictionaries(st.sampled_from(targets), ranks)),
        module_alphas=draw(st.dictionaries(st.sampled_from(targets), wide)),
        instant=draw(instants()),
    )


metrics = st.builds(
    Metric, name=full_texts, data_hash=full_texts, value=st.floats(allow_nan=False, allow_infinity=False)
)

metadata = st.builds(
    AdapterMetadata,
    name=texts,
    version=texts,
    base_model=texts,
    base_fingerprint=texts,
    task_types=tuples_of_texts,
    training_size=st.integers(0, 2**63 - 1),
    metrics=st.lists(metrics, max_size=3).map(tuple),
    created=st.just("") | st.datetimes().map(lambda when: when.isoformat() + "Z"),
    parents=tuples_of_texts,
    recipe=st.sampled_from(["", '{"merge": {"method": "ties"}}']),
)


@st.composite
def training_configs(draw):
    from microlora.training import OPTIMIZERS, LearningRateSchedule, TrainingConfig

    schedule = draw(st.sampled_from(["constant", "warmup_constant", "linear", "cosine", "step", "one_cycle"]))
    rate = draw(st.floats(1e-6, 1.0))
    warm = {"constant": 0, "one_cycle": 0, "warmup_constant": 5}.get(schedule, draw(st.integers(0, 50)))
    uses_low = schedule not in ("constant", "one_cycle")
    low = rate * draw(st.floats(0.0, 1.0)) if uses_low else 0.0
    optimizer = OPTIMIZERS[draw(st.sampled_from(sorted(OPTIMIZERS)))]
    return TrainingConfig(
        batch_size=draw(st.integers(1, 512)),
        epochs=draw(st.integers(1, 10)),
        max_steps=draw(st.none() | st.integers(1, 10**6)),
        learning_rate=rate,
        schedule=LearningRateSchedule(schedule, min_lr=low),
        warmup=warm,
        epoch_decay=draw(st.floats(0.1, 1.0)),
        optimizer=optimizer(lora_plus_ratio=draw(st.floats(1e-3, 1e3))),
        weight_decay=draw(st.none() | st.floats(0.0, 1.0)),
        gradient_accumulation=draw(st.integers(1, 16)),
        max_grad_norm=draw(st.none() | st.floats(1e-3, 1e3)),
        quality_threshold=draw(st.floats(0.0, 1.0, exclude_max=True)),
        ewc_lambda=draw(st.none() | st.floats(0.0, 1e6)),
        ewc_every=draw(st.integers(1, 100)),
        ewc_kind=draw(st.sampled_from(["delta", "factor", "l2", "si", "mas"])),
        online_ewc_gamma=draw(st.floats(0.0, 1.0)),
        fisher=draw(st.sampled_from(["auto", "exact", "sample", "empirical"])),
        fisher_samples=draw(st.none() | st.integers(1, 10**6)),
        incremental_update=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@st.composite
def run_configs(draw):
    from microlora.training import AdapterTrainingConfig, ReplayConfig

    weights = st.floats(0.0, 1e6)
    replay = st.builds(
        ReplayConfig,
        capacity=st.integers(0, 2**31 - 1),
        logit_weight=weights,
        label_weight=weights,
        seed=st.integers(0, 2**63 - 1),
    )
    folder = draw(st.none() | full_texts)
    return AdapterTrainingConfig(
        training=draw(training_configs()),
        epochs=draw(st.integers(1, 100)),
        validation_interval=draw(st.none() | st.integers(1, 1000)),
        early_stopping_patience=draw(st.integers(0, 20)),
        min_improvement=draw(st.floats(0.0, 1.0, exclude_max=True)),
        gradient_checkpointing=draw(st.booleans()),
        mixed_precision=draw(st.sampled_from([None, "bf16", "f16"])),
        save_best=draw(st.booleans()),
        output_dir=folder,
        checkpoint_every=None if folder is None else draw(st.none() | st.integers(1, 1000)),
        replay=draw(st.none() | replay),
    )
