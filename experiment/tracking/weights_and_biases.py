"""Weights & Biases. It may be slow, misconfigured or out of reach: the run must not notice.

Everything that talks to W&B happens in one daemon thread that is fed by a queue. `log` therefore costs the training
loop nothing, whatever the network does, and `close` waits for a bounded time.
"""

import logging
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

from experiment.folder import Outcome, RunFolder
from experiment.tracking.config import TrackingConfig

logger = logging.getLogger(__name__)

INIT_SECONDS = 60.0  # to reach the server before the run is kept offline
FINISH_SECONDS = 30.0  # to upload the rest when the run ends


class WandbTracker:
    """Logs to the W&B run `run_id`, online or offline, with `step` as the x axis; its files stand in RUN/wandb."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        run_id: str,
        parameters: Mapping[str, object],
        init_seconds: float = INIT_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._events: SimpleQueue[Mapping[str, Any] | Outcome] = SimpleQueue()
        self._finish_seconds = finish_seconds
        self._off = False
        self._files = folder.path / "wandb"
        options = {
            "project": config.project,
            "name": config.name or folder.path.name,
            "tags": config.tags,
            "id": run_id,
            "config": dict(parameters),
            "dir": str(folder.path),
        }
        settings = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "silent": True, "console": "off"}
        self._worker = threading.Thread(
            target=self._work, args=(config.wandb == "online", options, settings), name="wandb", daemon=True
        )
        self._worker.start()

    def log(self, metrics: Mapping[str, Any]) -> None:
        if not self._off:
            self._events.put(metrics)

    def close(self, outcome: Outcome) -> None:
        self._events.put(outcome)
        self._worker.join(self._finish_seconds)
        if self._worker.is_alive():
            logger.warning(
                "W&B did not finish within %.0f s; what is missing there can be uploaded with `wandb sync` from %s",
                self._finish_seconds,
                self._files,
            )

    def _work(self, online: bool, options: dict[str, Any], settings: dict[str, Any]) -> None:
        try:
            run = _start(online, options, settings)
            while not isinstance(event := self._events.get(), Outcome):
                run.log({key: value for key, value in event.items() if value is not None})
            if event is Outcome.STOPPED:
                run.mark_preempting()  # to be resumed, neither finished nor failed
            run.finish(exit_code=event.exit_code)
        except Exception as error:
            self._off = True
            logger.warning("W&B is switched off for this run: %s: %s", type(error).__name__, error)


def _start(online: bool, options: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The W&B run. One that cannot be reached is kept offline, for `wandb sync`."""
    import wandb

    run = None
    if online:
        try:
            if not wandb.login(prompt=False):
                raise RuntimeError("no API key; `wandb login` stores one")
            run = wandb.init(mode="online", resume="allow", settings=wandb.Settings(**settings), **options)
        except Exception as error:
            logger.warning(
                "W&B is out of reach, its files are kept in %s/wandb for `wandb sync`: %s", options["dir"], error
            )
    run = run or wandb.init(mode="offline", settings=wandb.Settings(**settings), **options)
    # A resumed run logs some steps again. W&B would drop them if they were its own, ever growing step.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
