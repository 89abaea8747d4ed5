"""What all seeds of a run share, and the results of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiment.run_folder import RunFolder
from finetune.config import FinetuneConfig
from finetune.device import Device
from finetune.metrics.scores import LabelScores
from finetune.model import ModelSpec
from finetune.splits import Task


@dataclass(frozen=True)
class Setup:
    """What all seeds of a run share."""

    config: FinetuneConfig
    model: ModelSpec
    task: Task
    device: Device
    folder: RunFolder
    settings: dict[str, Any]  # see `finetune.seed_run.result_settings`


@dataclass(frozen=True)
class SeedRecord:
    """The results of a finished seed, stored in `seed-N/COMPLETE`."""

    settings: dict[str, Any]  # see `finetune.seed_run.result_settings`
    best_epoch: float
    epochs: list[dict[str, float]]
    scores: dict[str, dict[str, float]]  # split -> metric -> value, of the best epoch
    intervals: dict[str, dict[str, Sequence[float]]]  # split -> metric -> [low, high], of 95 % confidence
    confusion: dict[str, list[list[int]]]  # split -> counts: rows by label, columns by predicted label
    label_scores: dict[str, LabelScores]  # split -> label -> precision, recall, f1, support
    collapsed: list[str]  # splits for which the same is predicted for all records
    temperature: float | None  # fitted on validation; None if the kind has no probabilities of labels
    calibration: dict[str, dict[str, float]]  # split -> `ece`, `calibrated_ece`
