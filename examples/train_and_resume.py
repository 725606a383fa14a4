"""Train a preset on a task with a known optimum; stop in the middle; go on from the checkpoint."""

import tempfile

import microlora as ml

dataset = ml.SyntheticDataGenerator(64, seed=42).generate("coder", 1000)

with tempfile.TemporaryDirectory() as folder:
    config = ml.AdapterTrainingConfig.stable().replace(output_dir=folder, checkpoint_every=50)

    token = ml.CancelToken()
    lora = ml.create_lora("coder", 64)
    try:
        ml.AdapterTrainer(config).train(
            lora, dataset, progress=lambda done, total, what: done > 300 and token.cancel(), cancel=token
        )
    except ml.exceptions.CancelledError as stopped:
        print(stopped)

    resumed = ml.create_lora("coder", 64)
    result = ml.AdapterTrainer(config).train(resumed, dataset, resume=True)
    straight = ml.create_lora("coder", 64)
    again = ml.AdapterTrainer(config.replace(output_dir=None, checkpoint_every=None)).train(straight, dataset)

print(f"stopped: {result.stop_reason}; validation loss {result.best_val_loss:.3f}")
print(f"best possible {dataset.optimum.best_loss:.3f}, without an adapter {dataset.optimum.zero_loss:.3f}")
print("the same bits as a run that was never stopped:", resumed.adapter() == straight.adapter())
print("steps:", result.total_steps, again.total_steps)
