"""Hyperparameter sweeps: files in W&B's sweep format, run locally with Optuna (docs/sweeps.md)."""
