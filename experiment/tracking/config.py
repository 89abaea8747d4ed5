"""The `tracking:` section of both pretraining and fine-tuning."""

from typing import Literal, Self

from pydantic import model_validator

from experiment.config import Section


class TrackingConfig(Section):
    """Where metrics go. The console log and metrics.jsonl are always written. See docs/tracking.md."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Log to Weights & Biases; `offline` writes local files for `wandb sync`."""

    tensorboard: bool = False
    """Write event files of TensorBoard to RUN/tensorboard; needs the extra `tensorboard`."""

    project: str = "deepcloze"
    """Weights & Biases project."""

    name: str | None = None
    """Name of the run in Weights & Biases; default: the name of the run folder."""

    tags: tuple[str, ...] = ()
    """Tags of the run in Weights & Biases."""

    artifacts: bool = False
    """Save config, provenance and report as an artifact of the run in Weights & Biases."""

    @model_validator(mode="after")
    def _wandb_is_enabled(self) -> Self:
        if self.artifacts and self.wandb == "disabled":
            raise ValueError("artifacts: needs wandb: online or offline")
        return self
