"""Copy the checkpoints of a run to `checkpoint.mirror` while training continues.

Rank 0 copies all files: they are on a disk that the hosts share. Its thread looks for checkpoints that the mirror lacks
when one is saved, and after a failure some time later. If uploads are slower than saves, it skips to the newest one.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from experiment.errors import UserError
from experiment.run_files.checkpoints import COMPLETE, checkpoint_step, complete_checkpoints, named_best
from experiment.run_files.mirror import Mirror
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from experiment.storage import DeniedError, StorageError
from experiment.tracking.alerts import Alert

log = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0  # before the next attempt; twice as long after each further failure
_MOST_RETRY_SECONDS = 900.0
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
        self._keep: Retention | None = None  # of the newest checkpoint; None: there is none
        self._newest, self._has_saved = 0, False
        self._wanted = threading.Condition()
        self._is_wanted, self._is_closing = False, False
        self.uploading: int | None = None  # step
        self.problem: str | None = None  # of the last attempt
        self._is_transient = False  # the problem, without a change of the config or of permissions
        self._failed_at = 0.0  # as time.monotonic()
        self._delay = retry_seconds  # before the next attempt
        self._logged: tuple[str, int | None] | None = None  # the problem and, if it does not pass by itself, the step
        self._end = math.inf  # of the attempts while closing, as time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Upload the config, so that a mirror that cannot be written gives its warning now, not at the first
        checkpoint. Returns at once."""
        with self._wanted:
            self._is_wanted = True
            self._wanted.notify()

    def update(self, keep: Retention, newest: int, is_new: bool = True) -> None:
        """Upload the checkpoint of step `newest`, and older ones. Returns at once.

        is_new: it was just saved, so that later ones are of steps that the run has trained again.
        """
        with self._wanted:
            self._keep, self._newest, self._is_wanted = keep, newest, True
            self._has_saved |= is_new
            self._wanted.notify()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the upload of the newest checkpoint, for at most `seconds`. Until then it is tried again after a
        failure that may pass. Without checkpoints, returns at once."""
        with self._wanted:
            has_checkpoints = self._keep is not None
            self._is_closing, self._end = True, time.monotonic() + seconds * has_checkpoints
            self._is_wanted |= self._is_transient and has_checkpoints
            self._wanted.notify()
        if not has_checkpoints:
            return
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
                timeout = None if self.problem is None else self._delay
                self._wanted.wait_for(lambda: self._is_wanted or self._is_over(), timeout)
                if self._is_over() and not self._is_wanted:
                    return
                self._is_wanted, keep, newest = False, self._keep, self._newest
            self._try(keep, newest)

    def _is_over(self) -> bool:
        """Return whether there is no attempt after the last one."""
        return self._is_closing and (not self._is_transient or self._failed_at + self._delay >= self._end)

    def _try(self, keep: Retention | None, newest: int) -> None:
        try:
            self._check_owner()
            if keep is None:
                self._mirror.upload_config(self._folder)
            else:
                # Before its checkpoints: a resumed run drops the events that follow its checkpoint.
                self._mirror.upload_run_files(self._folder)
                self._upload(keep, newest)
            self.problem, self._is_transient = None, False
        except Exception as error:  # training continues, whatever it is
            self.problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            is_refused = isinstance(error, UserError) and not isinstance(error, StorageError)
            self._is_transient = not is_refused and not isinstance(error, DeniedError)
        self.uploading = None
        if self.problem is None:
            self._delay, self._logged = self._retry_seconds, None
        else:
            self._report(self.problem, newest)

    def _report(self, problem: str, newest: int) -> None:
        """Send an alert about a failure. Log it if its problem is another one than before or, if that does not pass by
        itself, for each checkpoint."""
        self._failed_at, before = time.monotonic(), self._logged
        grows = before is not None and not self._is_closing
        self._delay = min(2 * self._delay, max(_MOST_RETRY_SECONDS, self._delay)) if grows else self._retry_seconds
        self._logged = problem, None if self._is_transient else newest
        text = f"checkpoints cannot be copied to {self._mirror.url}: {problem}"
        if self._logged != before:
            log.warning("%s%s", text, "" if self._is_over() else f"; trying again in {self._delay:.0f} s")
        self._alert(Alert("mirror", text))

    def _check_owner(self) -> None:
        """Raise UserError if the mirror is another run's, or was continued in another folder: two runs may have found
        it empty, and the storage may have been down at the start."""
        if self._mirror.check_owner(self._folder):
            raise self._mirror.diverged(self._folder)

    def _upload(self, keep: Retention, newest: int) -> None:
        """Delete what the mirror need not keep, and copy what it lacks."""
        if self._known is None:
            self._known = self._mirror.complete()
        known = self._known
        found = {checkpoint_step(path): path for path in complete_checkpoints(self._folder.checkpoints)}
        named = named_best(self._folder.checkpoints)
        if keep.best not in found and named is not None and named in found.values():
            keep = replace(keep, best=checkpoint_step(named))  # an earlier one: `keep.best` could not be saved
        superseded = keep.superseded({*found, *map(checkpoint_step, known)}, newest)
        wanted = {step for step in found if step <= newest and step not in superseded}
        try:  # first: the storage may be full
            self._make_room(known, keep, newest, wanted)
        finally:  # also without permission to delete
            self._copy(found, wanted, known, keep, newest)

    def _make_room(self, known: dict[str, bytes], keep: Retention, newest: int, wanted: Collection[int]) -> None:
        """Delete incomplete checkpoints, unless they are `wanted` and will be replaced, and superseded ones, except the
        one that the mirror names the best."""
        for name in self._mirror.incomplete(known):
            if checkpoint_step(name) not in wanted:
                self._mirror.delete(name)
        best = self._mirror.best()
        names = [name for name in known if name != best]
        for name in self._mirror.apply_retention(names, keep, newest, drop_later=False):
            del known[name]

    def _copy(
        self, found: dict[int, Path], wanted: Collection[int], known: dict[str, bytes], keep: Retention, newest: int
    ) -> None:
        """Copy the missing checkpoints: the newest one, the best one, then the others; later ones are damaged, or the
        run would have resumed from them. Leaves out the others if there is a newer one. The mirror keeps the one that
        it names the best until it has the new one, and the superseded ones until it has a newer one."""
        for step in sorted(wanted, key=lambda step: (step == newest, step == keep.best, step), reverse=True):
            if step not in (newest, keep.best) and self._is_wanted:
                break
            self.uploading = step
            self._upload_one(found[step], known)
        if keep.best in found and found[keep.best].name in known:
            self._mirror.write_best(found[keep.best].name)
        elif (best := self._mirror.best()) in known:
            keep = replace(keep, best=checkpoint_step(best))
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
