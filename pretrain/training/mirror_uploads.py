"""Copy the checkpoints of a run to `checkpoint.mirror` while training continues.

Rank 0 copies all files: they are on a disk that the hosts share. Its thread looks for checkpoints that the mirror lacks
when one is saved, and after a failure some time later. If uploads are slower than saves, it skips to the newest one.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from experiment.errors import UserError
from experiment.run_files.checkpoints import COMPLETE, checkpoint_step, complete_checkpoints
from experiment.run_files.mirror import Mirror
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from experiment.tracking.alerts import Alert

log = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0
CLOSE_SECONDS = 600.0  # for the last upload


class MirrorUploads:
    """Keeps a mirror up to date in a thread."""

    def __init__(
        self, mirror: Mirror, folder: RunFolder, alert: Callable[[Alert], None], retry_seconds: float = _RETRY_SECONDS
    ) -> None:
        self._mirror = mirror
        self._folder = folder
        self._alert = alert
        self._retry_seconds = retry_seconds
        self._known: dict[str, bytes] | None = None  # name -> COMPLETE, of the mirror; None: not looked up
        self._keep: Retention | None = None  # of the newest checkpoint
        self._newest, self._has_saved = 0, False
        self._wanted = threading.Condition()
        self._is_wanted, self._is_closing = False, False
        self.uploading: int | None = None  # step
        self.problem: str | None = None  # of the last attempt
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def update(self, keep: Retention, newest: int, is_new: bool = True) -> None:
        """Upload the checkpoint of step `newest`, and older ones. Returns at once.

        is_new: it was just saved, so that later ones are of steps that the run has trained again.
        """
        with self._wanted:
            self._keep, self._newest, self._is_wanted = keep, newest, True
            self._has_saved |= is_new
            self._wanted.notify()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the upload of the newest checkpoint, for at most `seconds`."""
        with self._wanted:
            self._is_closing = True
            self._wanted.notify()
        self._thread.join(1.0)
        if self._thread.is_alive():
            log.info("waiting for the last upload to %s, at most %.0f s", self._mirror.url, seconds)
            self._thread.join(seconds)
        if self._thread.is_alive() or self.problem is not None:
            problem = self.problem or f"not done after {seconds:.0f} s"
            log.warning("the mirror %s lacks checkpoints: %s; the next start copies them", self._mirror.url, problem)

    def _work(self) -> None:
        while True:
            with self._wanted:
                failed = self.problem is not None
                self._wanted.wait_for(
                    lambda: self._is_wanted or self._is_closing, self._retry_seconds if failed else None
                )
                if self._is_closing and not self._is_wanted:
                    return
                self._is_wanted, keep, newest = False, self._keep, self._newest
            if keep is not None:
                self._try(keep, newest)

    def _try(self, keep: Retention, newest: int) -> None:
        try:
            self._upload(keep, newest)
            self.problem = None
        except Exception as error:  # training continues, whatever it is
            self.problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            text = f"checkpoints cannot be copied to {self._mirror.url}: {self.problem}"
            log.warning("%s; trying again in %.0f s", text, self._retry_seconds)
            self._alert(Alert("mirror", text))
        finally:
            self.uploading = None

    def _upload(self, keep: Retention, newest: int) -> None:
        """Copy the missing checkpoints, the newest one first; later ones are damaged, or the run would have resumed
        from them. Leaves out older ones if there is a newer one. Raises UserError if the mirror is another run's."""
        self._mirror.check_owner(self._folder)  # each time: two runs may have found the mirror empty
        if self._known is None:
            self._known = self._mirror.complete()
        known = self._known
        found = {checkpoint_step(path): path for path in complete_checkpoints(self._folder.checkpoints)}
        superseded = keep.superseded(list(found), newest)
        wanted = [step for step in sorted(found, reverse=True) if step <= newest and step not in superseded]
        self._mirror.upload_run_files(self._folder)  # first: a resumed run drops the events that follow its checkpoint
        for step in wanted:
            if step != newest and self._is_wanted:
                break
            self.uploading = step
            self._upload_one(found[step], known)
        self._mirror.upload_best(self._folder)
        for name in self._mirror.apply_retention(list(known), keep, newest, drop_later=self._has_saved):
            del known[name]

    def _upload_one(self, checkpoint: Path, known: dict[str, bytes]) -> None:
        """Copy a checkpoint unless the mirror has it. `known`: its content, which this updates."""
        name, start = checkpoint.name, time.monotonic()
        try:
            if known.get(name) != (checkpoint / COMPLETE).read_bytes():
                known[name] = self._mirror.upload(checkpoint, known.pop(name, None))
                log.info("copied %s to %s in %.0f s", checkpoint, self._mirror.url, time.monotonic() - start)
        except FileNotFoundError:  # retention has deleted it
            if name not in known:
                self._mirror.delete(name)
