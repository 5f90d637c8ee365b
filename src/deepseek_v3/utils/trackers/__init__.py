"""Experiment trackers beside metrics.jsonl: Weights & Biases, trackio, MLflow, and those of other packages."""
