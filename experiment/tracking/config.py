"""The `tracking:` section that pretraining and fine-tuning share."""

from typing import Literal

from experiment.config import Section


class TrackingConfig(Section):
    """Weights & Biases; console and JSONL are always written."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "deepcloze"
    name: str | None = None  # default: the name of the run folder
    tags: tuple[str, ...] = ()
