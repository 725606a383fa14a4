"""Training: settings, the pipeline for streams, the trainer for datasets, and events.

`TrainingPipeline` takes samples as they come; `AdapterTrainer` goes through a dataset with validation, early
stopping and checkpoints. Both make the same optimiser steps, and both hold on to earlier tasks by EWC.
"""
