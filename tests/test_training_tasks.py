"""Which task a run belongs to, what its importance is estimated on, and that checkpoints carry both.

The penalty is a NumPy stand-in that keeps a record; what penalties do to weights has its own tests.
"""

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import CancelledError, ConfigError
from microlora.training import engine
from numpy_trainer import NumpyEwc, NumpyOptimizer
from runs import N, Sample, config, learner, problem
from support import make, normal, rng, state_of

Trainer = ml.AdapterTrainer


@pytest.fixture
def made(monkeypatch):
    """Every stand-in that was made, in order."""
    found = []

    class Recorded(NumpyEwc):
        def __init__(self, lora, **settings):
            super().__init__(lora, **settings)
            self.calls = []
            found.append(self)

        def accumulate_fisher(self, x, feedback, module=None, base=None):
            super().accumulate_fisher(x, feedback, module, base)
            weights = self.lora.export_weights()
            self.calls.append((np.asarray(x).tobytes(), feedback, module, weights))

    class Optimizer(NumpyOptimizer):
        peak_activation_bytes = 0

    monkeypatch.setattr("microlora.ewc.EwcPlusPlus", Recorded)
    monkeypatch.setattr(ml, "EwcPlusPlus", Recorded)
    monkeypatch.setattr(engine._core, "Optimizer", Optimizer)
    return found


def settings(training=None, **more):
    return config({"ewc_lambda": 3.0, "optimizer": "sgd", "schedule": "constant", **(training or {})}, **more)


def test_other_data_are_a_new_task(made):
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    lora, trainer = learner(), Trainer(settings(epochs=1))
    tasks = [trainer.train(lora, data).task for data in (first, second, second, first)]
    assert tasks == [0, 1, 1, 2]
    assert len(made) == 1
    assert made[0].task_count == 2
    assert trainer.ewc is made[0]


def test_the_same_data_again_are_counted_once(made):
    """The importance of a task that goes on is that of its last weights alone."""
    data = problem()[0]
    lora, trainer = learner(), Trainer(settings(epochs=1))
    trainer.train(lora, data)
    once = made[0].seen
    trainer.train(lora, data)
    assert made[0].seen == pytest.approx(once)


def test_another_learner_has_its_own_tasks(made):
    trainer = Trainer(settings(epochs=1))
    assert [trainer.train(learner(), problem(seed=s)[0]).task for s in (1, 2)] == [0, 0]
    assert len(made) == 2
    trainer.reset()
    assert trainer.ewc is None


def test_importance_is_estimated_on_the_last_weights(made):
    (x, y), held = problem()
    lora = learner()
    Trainer(settings({"fisher_samples": 20})).train(lora, (x, y), held)
    calls = made[0].calls
    rows = {row.tobytes(): i for i, row in enumerate(x)}
    chosen = [rows[call[0]] for call in calls]
    assert len(set(chosen)) == 20
    for row, (_, feedback, module, weights) in zip(chosen, calls, strict=True):
        assert (feedback.t == y[row]).all()
        assert module == "m"
        assert weights == lora.export_weights()


def test_all_samples_and_all_modules_where_nothing_is_capped(made):
    data = problem(n=40)[0]
    lora = make(16, 16, 4, names=("q", "v"))
    Trainer(settings({"fisher_samples": None})).train(lora, data)
    assert [call[2] for call in made[0].calls] == ["q", "v"] * 40


def test_the_settings_reach_the_penalty(made):
    training = {"ewc_kind": "factor", "online_ewc_gamma": 0.9, "fisher": "empirical", "seed": 4}
    Trainer(settings(training)).train(learner(), problem()[0])
    assert made[0].settings == {
        "ewc_lambda": 3.0,
        "kind": "factor",
        "gamma": 0.9,
        "fisher": "empirical",
        "fisher_samples": 1024,
        "seed": 4,
    }
    Trainer(settings({"ewc_lambda": 0.0})).train(learner(), problem()[0])
    assert len(made) == 1


def test_an_anchor_holds_later_runs_back(made):
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    moved = {}
    for strength in (0.01, 30.0):
        lora = learner()
        trainer = Trainer(settings({"ewc_lambda": strength, "learning_rate": 0.02}, epochs=5))
        trainer.train(lora, first)
        before = lora["m"].lora_b.copy()
        trainer.train(lora, second)
        moved[strength] = np.linalg.norm(lora["m"].lora_b - before)
    assert moved[30.0] < moved[0.01] / 5


def test_a_cancelled_run_leaves_no_task_behind(made):
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    lora, trainer, token = learner(), Trainer(settings()), ml.CancelToken()
    with pytest.raises(CancelledError):
        trainer.train(lora, first, cancel=token, callbacks=[lambda _: token.cancel()])
    assert not made[0].calls
    assert trainer.train(lora, second).task == 0


def test_a_penalty_that_was_given_is_used(made):
    lora = learner()
    ewc = ml.EwcPlusPlus(lora, **settings().training.ewc_kwargs())
    ewc.accumulate_fisher(np.ones(16, np.float32), None)
    ewc.start_new_task()
    trainer = Trainer(settings(), ewc=ewc)
    assert trainer.train(lora, problem()[0]).task == 1
    assert trainer.ewc is ewc
    assert len(made) == 1


def test_a_checkpoint_carries_the_penalty(made, tmp_path):
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    how = settings(checkpoint_every=5, output_dir=str(tmp_path))
    whole, cut, token = learner(), learner(), ml.CancelToken()
    trainer = Trainer(how.replace(checkpoint_every=None))
    trainer.train(whole, first)
    want = trainer.train(whole, second)

    def stop(event):
        if event.step >= 17:
            token.cancel()

    class Stop:
        on_step = staticmethod(stop)

    trainer = Trainer(how)
    trainer.train(cut, first)
    with pytest.raises(CancelledError):
        trainer.train(cut, second, cancel=token, callbacks=Stop())
    fresh, later = learner(), Trainer(how)
    got = later.train(fresh, second, resume=True)
    assert (got.task, want.task) == (1, 1)
    assert fresh.export_weights() == whole.export_weights()
    assert later.ewc.export_state() == made[0].export_state()
    third = problem(seed=3)[0]
    assert later.train(fresh, third).task == 2


# -- the pipeline --


def test_a_pipeline_estimates_at_the_end_of_a_task(made):
    (x, y), _ = problem(n=60)
    lora = learner()
    training = settings({"fisher_samples": 20, "batch_size": 4}).training
    pipeline = ml.TrainingPipeline(training).init_for_lora(lora)
    pipeline.train_batch(lora, x, y)
    assert not made[0].calls
    assert pipeline.stats().fisher_samples == 20
    pipeline.train_step(lora, x[0], ml.Target(y[0]))
    pipeline.start_new_task(lora)
    assert pipeline.stats().pending == 0
    assert pipeline.ewc.task_count == pipeline.stats().tasks == 1
    rows = {row.tobytes() for row in x}
    assert len(made[0].calls) == 20
    for row, _, _, weights in made[0].calls:
        assert row in rows
        assert weights == lora.export_weights()
    with pytest.raises(ConfigError, match="got no event since the last task"):
        pipeline.start_new_task(lora)


def test_the_events_kept_are_a_uniform_draw(made):
    """Early, middle and late events of a stream are kept alike."""
    lora = learner()
    kept = np.zeros(3)
    (x, y), _ = problem(n=90)
    where = {row.tobytes(): i // 30 for i, row in enumerate(x)}
    for seed in range(40):
        training = settings({"fisher_samples": 15, "seed": seed, "batch_size": 90}).training
        pipeline = ml.TrainingPipeline(training).init_for_lora(lora)
        pipeline.train_batch(lora, x, y)
        pipeline.start_new_task(lora)
        for call in made[-1].calls:
            kept[where[call[0]]] += 1
    assert kept.sum() == 40 * 15
    assert (np.abs(kept - 200) < 50).all()


def test_what_the_caller_writes_to_its_arrays_later_does_not_matter(made):
    lora = learner()
    (x, y), _ = problem(n=8)
    pipeline = ml.TrainingPipeline(settings().training).init_for_lora(lora)
    row = x[0].copy()
    pipeline.train_step(lora, row, ml.Target(y[0]))
    row[:] = 0.0
    pipeline.start_new_task(lora)
    assert made[0].calls[0][0] == x[0].tobytes()


@pytest.mark.parametrize("fisher", ["exact", "sample"])
def test_feedback_without_a_likelihood_needs_another_estimate(fisher, made):
    r = rng(6)
    lora = learner()
    reward = ml.Reward(0.5, response=normal(r, N))
    x = normal(r, N)
    how = settings({"batch_size": 1, "fisher": fisher})
    pipeline = ml.TrainingPipeline(how.training).init_for_lora(lora)
    pipeline.train_step(lora, x, reward)
    with pytest.raises(ConfigError, match=rf"fisher='{fisher}' can estimate.*fisher='empirical'"):
        pipeline.start_new_task(lora)
    pipeline.train_step(lora, x, ml.Preference(normal(r, N), normal(r, N)))
    pipeline.start_new_task(lora)
    assert [type(call[1]) for call in made[0].calls] == [ml.Preference]
    samples = [Sample(x, reward, "a"), Sample(x, reward, "b")]
    before = state_of(lora)
    with pytest.raises(ConfigError, match=rf"dataset: got no sample that fisher='{fisher}'"):
        Trainer(how).train(lora, samples)
    assert state_of(lora) == before


@pytest.mark.parametrize("fisher", ["auto", "empirical"])
def test_observed_gradients_are_counted(fisher, made):
    r = rng(6)
    lora = learner()
    x, reward = normal(r, N), ml.Reward(0.5, response=normal(r, N))
    how = settings({"batch_size": 1, "fisher": fisher})
    pipeline = ml.TrainingPipeline(how.training).init_for_lora(lora)
    pipeline.train_step(lora, x, reward)
    pipeline.start_new_task(lora)
    assert len(made[0].calls) == 1
    Trainer(how).train(learner(), [Sample(x, reward, "a"), Sample(x, ml.Gradient(x), "b")])
    assert len(made[1].calls) == 2


def test_rewards_are_learned_under_default_settings():
    r, lora = rng(6), learner()
    samples = [Sample(normal(r, N), ml.Reward(i % 2, response=normal(r, N)), str(i)) for i in range(9)]
    trainer = Trainer()
    trainer.train(lora, samples)
    assert trainer.ewc.n_samples == 9


@pytest.mark.parametrize("kind", ["l2", "si"])
def test_kinds_that_need_no_samples_get_none(kind, made):
    lora = learner()
    trainer = Trainer(settings({"ewc_kind": kind}))
    trainer.train(lora, problem(seed=1)[0])
    assert not made[0].calls


def test_a_dora_chain_has_tasks():
    from runs import chain, classes

    (data, _), (other, _) = classes(), classes(seed=5)
    net = chain(use_dora=True)
    trainer = Trainer(config({"ewc_lambda": None}))
    trainer.train(net, data)
    assert trainer.train(net, other).task == 1
    assert trainer.ewc.penalty() > 0


def test_a_given_penalty_keeps_its_own_settings():
    lora, data = learner(), problem()[0]
    ewc = ml.EwcPlusPlus(lora, kind="factor", ewc_lambda=7.0, fisher="empirical")
    with pytest.raises(ConfigError, match="ewc: got one of another learner"):
        Trainer(config({"ewc_lambda": None}), ewc=ewc).train(learner(), data)
    with pytest.raises(ConfigError, match="ewc: got one of another learner"):
        ml.TrainingPipeline().init_for_lora(learner(), ewc)
    for name, value in (
        ("ewc_lambda", 3.0),
        ("ewc_kind", "mas"),
        ("online_ewc_gamma", 0.5),
        ("fisher", "sample"),
    ):
        how = config({"ewc_lambda": None, name: value})
        with pytest.raises(ConfigError, match=rf"{name}: got {value!r} beside ewc="):
            Trainer(how, ewc=ewc).train(lora, data)
        with pytest.raises(ConfigError, match=rf"{name}: got {value!r} beside ewc="):
            ml.TrainingPipeline(how.training).init_for_lora(lora, ewc)
    for own in ({"ewc_lambda": None}, {"ewc_lambda": 7.0, "ewc_kind": "factor", "fisher": "empirical"}):
        trainer = Trainer(config(own), ewc=ewc)
        trainer.train(lora, data)
        assert trainer.ewc is ewc


def test_the_kind_of_a_given_penalty_says_what_it_needs():
    """Path integrals take no samples; the default kind of the settings would."""
    lora = learner()
    trainer = Trainer(config({"ewc_lambda": None}), ewc=ml.EwcPlusPlus(lora, kind="si"))
    trainer.train(lora, problem(seed=1)[0])
    assert trainer.train(lora, problem(seed=2)[0]).task == 1
