"""Weights & Biases. It may be slow, misconfigured or unreachable without affecting the run.

All calls to W&B are made in one daemon thread that reads a queue: `log` never blocks the training loop, and `close` has
a timeout.
"""

import logging
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from experiment.outcome_file import Outcome
from experiment.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from experiment.tracking.metrics import Metrics

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

INIT_SECONDS = 60.0  # timeout for reaching the server; the run is then logged offline
FINISH_SECONDS = 30.0  # timeout for uploading the rest when the run ends


class WandbTracker:
    """Logs to the W&B run `run_id`, online or offline, with `step` as the x axis. Its files are in RUN/wandb."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        run_id: str,
        parameters: Mapping[str, object],
        init_seconds: float = INIT_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._events: SimpleQueue[Metrics | Outcome] = SimpleQueue()
        self._finish_seconds = finish_seconds
        self._off = False
        self._files = folder.path / "wandb"
        self._options: dict[str, Any] = {
            "project": config.project,
            "name": config.name or folder.path.name,
            "tags": config.tags,
            "id": run_id,
            "resume": "allow",  # also offline: `wandb sync` then appends a later attempt instead of replacing the first
            "config": dict(parameters),
            "dir": str(folder.path),
        }
        self._settings: dict[str, Any] = {
            "init_timeout": init_seconds,
            "finish_timeout": finish_seconds,
            "silent": True,
            "console": "off",  # the terminal belongs to the console tracker and the rank logs
        }
        self._worker = threading.Thread(target=self._work, args=(config.wandb == "online",), name="wandb", daemon=True)
        self._worker.start()

    def log(self, metrics: Metrics) -> None:
        if not self._off:
            self._events.put(dict(metrics))

    def close(self, outcome: Outcome) -> None:
        self._events.put(outcome)
        self._worker.join(self._finish_seconds)
        if self._worker.is_alive():
            self._warn(f"did not finish in {self._finish_seconds:g} s; what it has not uploaded is in {self._files}")
            self._off = True

    def _work(self, online: bool) -> None:
        try:
            run = self._start(online)
            while not isinstance(event := self._events.get(), Outcome):
                run.log({key: value for key, value in event.items() if value is not None})
            if event is Outcome.STOPPED:
                run.mark_preempting()  # stopped but resumable: neither finished nor failed
            run.finish(exit_code=event.exit_code)
        except Exception as error:
            self._warn(f"is switched off for this run: {_describe(error)}")
            self._off = True

    def _start(self, online: bool) -> "wandb.Run":
        """Open the W&B run; offline, for a later `wandb sync`, if the server cannot be reached."""
        import wandb

        settings = wandb.Settings(**self._settings)
        run = None
        if online:
            try:
                wandb.setup(settings)  # so that `login` is silent too
                if not wandb.login(prompt=False):
                    raise RuntimeError("no API key; `wandb login` stores one")
                run = wandb.init(mode="online", settings=settings, **self._options)
            except Exception as error:
                self._warn(f"cannot be reached; run `wandb sync` on {self._files} later: {_describe(error)}")
        if run is None:
            run = wandb.init(mode="offline", settings=settings, **self._options)
        # A resumed run logs some steps a second time; W&B drops them unless `step` is an ordinary metric.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _warn(self, message: str) -> None:
        if not self._off:
            logger.warning("W&B %s", message)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
