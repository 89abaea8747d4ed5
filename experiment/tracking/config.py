"""The `tracking:` section of both pretraining and fine-tuning."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator

from experiment.config import Section

WANDB_NAME, WANDB_GROUP = "WANDB_NAME", "WANDB_RUN_GROUP"
"""Variables with the name of the run in Weights & Biases, unless `tracking.name` is set, and with its group."""

RUN_SET = "DEEPCLOZE_RUN_SET"
"""A variable that sweeps and comparisons set with these two for their runs; the name is then used in any case."""

AlertEvent = Literal["crash", "stall", "bad_batch", "no_checkpoint", "mirror", "finish"]


def _check_addresses(text: str) -> str:
    for address in text.split(","):
        if not re.fullmatch(r"([^@<>;]*<)?[^@\s<>;]+@[^@\s<>;]+>?", address.strip()):  # or Name <address>
            raise ValueError(f"expected mail addresses separated by commas, such as me@example.org, found {text!r}")
    return text


MailAddresses = Annotated[str, AfterValidator(_check_addresses)]


class AlertsConfig(Section):
    """Messages to people about a run. Servers and passwords are environment variables, see docs/tracking.md."""

    email: MailAddresses | None = None
    """Address to send mail to, or several separated by commas. The mail server is in DEEPCLOZE_SMTP_HOST."""

    webhook: bool = False
    """POST alerts as JSON to the URL in DEEPCLOZE_WEBHOOK_URL, for example one of Slack or Mattermost."""

    apprise: bool = False
    """Send alerts to the services with Apprise URLs in DEEPCLOZE_APPRISE_URLS: Slack, Teams, Discord and others."""

    wandb: bool = False
    """Send alerts through Weights & Biases."""

    events: tuple[AlertEvent, ...] = get_args(AlertEvent)
    """Events that send alerts."""

    no_checkpoint_hours: PositiveFloat = 6.0
    """Hours of training without a new checkpoint after which `no_checkpoint` is sent."""


class TrackingConfig(Section):
    """Where metrics and alerts go. The console log and metrics.jsonl are always written. See docs/tracking.md."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Log to Weights & Biases; `offline` writes local files for `wandb sync`."""

    tensorboard: bool = False
    """Write event files of TensorBoard to RUN/tensorboard; needs the extra `tensorboard`."""

    project: str = "deepcloze"
    """Weights & Biases project. WANDB_ENTITY names the team."""

    name: str | None = None
    """Name of the run in Weights & Biases; default: `WANDB_NAME`, or the name of the run folder. Runs of a sweep or
    comparison are named POINT or ROW/TASK, and grouped."""

    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()  # as W&B takes them
    """Tags of the run in Weights & Biases."""

    artifacts: bool = False
    """Save config, provenance and report as an artifact of the run in Weights & Biases."""

    alerts: AlertsConfig = AlertsConfig()

    @field_validator("project")
    @classmethod
    def _wandb_takes_it(cls, project: str) -> str:
        if len(project) > 128 or re.search(r"[/\\#?%:]", project):  # as `wandb.Settings`
            raise ValueError(
                rf"expected at most 128 characters, none of / \ # ? % :, found {project!r}; name a team as WANDB_ENTITY"
            )
        return project

    @model_validator(mode="after")
    def _wandb_is_enabled(self) -> Self:
        if self.artifacts and self.wandb == "disabled":
            raise ValueError("artifacts: needs wandb: online or offline")
        if self.alerts.wandb and self.wandb != "online":
            raise ValueError(f"alerts.wandb: needs wandb: online, found {self.wandb}")
        return self
