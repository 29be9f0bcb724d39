"""What the files of a run folder are called."""

from __future__ import annotations

CONFIG, ENVIRONMENT, METRICS, EVALUATION = "config.json", "environment.json", "metrics.jsonl", "evaluation.json"
MODEL, TRAINING_STATE, FIGURES = "model.safetensors", "training_state.safetensors", "figures"
LOCK = ".lock"  # there while a process writes to the folder
PREVIOUS_STATE = "training_state.previous.safetensors"  # the checkpoint before the newest


def per_image(split: str) -> str:
    """The file of one split's evaluation that has a number for each image."""
    return f"evaluation-{split}.safetensors"
