"""Alerts through Weights & Biases; also those of the launcher, when a run has ended whose rank 0 was killed.

The launcher sends them from a process of its own, which can be ended.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.own_process import own_environment
from experiment.provenance import read_provenance
from experiment.run_folder import RunFolder
from experiment.tracking.alerts import Alert

if TYPE_CHECKING:
    import wandb

_SECONDS = 25.0
_INIT_SECONDS, _FINISH_SECONDS = 12.0, 6.0
_TITLE_LENGTH = 63  # W&B takes no longer ones


def send_alert(run: "wandb.Run", alert: Alert, name: str) -> None:
    """Send an alert about the run called `name`."""
    title = f"{alert.event.replace('_', ' ')}: {name}"
    run.alert(title[:_TITLE_LENGTH], alert.text, "INFO" if alert.event == "finish" else "ERROR")


def send_last_alert(project: str, folder: RunFolder, alert: Alert) -> None:
    """Send an alert through the W&B run of a run that has failed, and mark it as failed there.

    Raises subprocess.SubprocessError if that fails, or takes too long.
    """
    provenance = read_provenance(folder)
    if provenance is None:  # rank 0 has not come to open a W&B run
        return
    request = [project, provenance["run_id"], str(folder.path), alert.event, alert.text]
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
    subprocess.run(
        command,
        env=own_environment(),
        input=json.dumps(request),
        text=True,
        capture_output=True,
        timeout=_SECONDS,
        check=True,
    )


def main() -> None:
    """Read an alert from stdin and send it."""
    import wandb

    project, run_id, folder, event, text = json.load(sys.stdin)
    settings = wandb.Settings(
        init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS, silent=True, console="off", x_disable_stats=True
    )
    run = wandb.init(project=project, id=run_id, dir=folder, resume="must", settings=settings)
    send_alert(run, Alert(event, text), Path(folder).name)
    run.finish(exit_code=1)
