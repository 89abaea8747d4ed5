"""Weights & Biases. It may be slow, misconfigured or out of reach: the run must not notice.

Everything that talks to W&B happens in one daemon thread that is fed by a queue. `log` therefore costs the training
loop nothing, whatever the network does, and `close` waits for a bounded time.
"""

import logging
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

from experiment.run_folder import Outcome, RunFolder
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
        self._options: dict[str, Any] = {
            "project": config.project,
            "name": config.name or folder.path.name,
            "tags": config.tags,
            "id": run_id,
            "resume": "allow",  # offline too: `wandb sync` appends a later attempt instead of replacing the first
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

    def log(self, metrics: Mapping[str, Any]) -> None:
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
                run.mark_preempting()  # to be resumed: neither finished nor failed
            run.finish(exit_code=event.exit_code)
        except Exception as error:
            self._warn(f"is switched off for this run: {_described(error)}")
            self._off = True

    def _start(self, online: bool) -> Any:
        """The W&B run. One that cannot be reached is kept offline, for `wandb sync`."""
        import wandb

        settings = wandb.Settings(**self._settings)
        run = None
        if online:
            try:
                wandb.setup(settings)  # `login` takes from here that it should say nothing
                if not wandb.login(prompt=False):
                    raise RuntimeError("no API key; `wandb login` stores one")
                run = wandb.init(mode="online", settings=settings, **self._options)
            except Exception as error:
                self._warn(
                    f"is out of reach, its files are kept in {self._files} for `wandb sync`: {_described(error)}"
                )
        if run is None:
            run = wandb.init(mode="offline", settings=settings, **self._options)
        # A resumed run logs some steps again, which W&B would drop if they were its own, ever growing step.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _warn(self, what: str) -> None:
        if not self._off:
            logger.warning("W&B %s", what)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
