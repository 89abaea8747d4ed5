"""Checkpoints in object storage: `checkpoint.mirror`, and URLs of checkpoints.

    MIRROR/step-00000100/…    the files of a checkpoint; COMPLETE is uploaded last and deleted first
    MIRROR/best               as RUN/checkpoints/best
    MIRROR/run/…              the files of the run folder that a resumed run continues

A checkpoint is complete if it has a COMPLETE file, as on a disk.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import xxhash
from filelock import FileLock

from experiment.checkpoints import BEST, COMPLETE, checkpoint_step, files_below, is_checkpoint_name, verify
from experiment.errors import UserError
from experiment.files import cache_folder, fsync_tree, json_digest, parse_json, write_text
from experiment.progress import progress
from experiment.retention import Retention
from experiment.run_folder import RunFolder
from experiment.storage import (
    DamagedError,
    StorageError,
    delete,
    download,
    exists,
    is_url,
    join,
    list_files,
    list_folders,
    read_bytes,
    stat_file,
    upload,
    write_bytes,
)

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 4
_RUN = "run"


class Mirror:
    """The checkpoints of a run in object storage."""

    def __init__(self, url: str) -> None:
        self.url = url

    def complete(self) -> dict[str, bytes]:
        """The complete checkpoints, oldest first: name -> content of COMPLETE. Raises StorageError."""
        names = [name for name in list_folders(self.url) if is_checkpoint_name(name)]
        markers = {name: self._marker(name) for name in sorted(names, key=_step)}
        return {name: marker for name, marker in markers.items() if marker is not None}

    def _marker(self, name: str) -> bytes | None:
        """The content of COMPLETE; None if there is none, perhaps because it was just deleted."""
        url = join(self.url, name, COMPLETE)
        try:
            return read_bytes(url) if exists(url) else None
        except StorageError:
            if exists(url):
                raise
            return None

    def upload(self, checkpoint: Path, replaces: bool) -> bytes:
        """Copy a complete checkpoint, and return the content of COMPLETE. `replaces`: the mirror has another one.

        Raises StorageError, and OSError if the checkpoint is deleted meanwhile.
        """
        marker = (checkpoint / COMPLETE).read_bytes()
        target = join(self.url, checkpoint.name)
        if replaces:
            delete(join(target, COMPLETE))
        _call_each(lambda name: upload(checkpoint / name, join(target, name)), list(_checksums(target, marker)))
        write_bytes(join(target, COMPLETE), marker)
        return marker

    def upload_run_files(self, folder: RunFolder) -> None:
        """Copy the files that a resumed run continues, and the name of the best checkpoint."""
        files = {join(self.url, _RUN, path.name): path for path in _run_files(folder)}
        for url, path in {**files, join(self.url, BEST): folder.checkpoints / BEST}.items():
            with suppress(FileNotFoundError):
                upload(path, url)

    def delete(self, name: str) -> None:
        delete(join(self.url, name, COMPLETE))
        delete(join(self.url, name))

    def apply_retention(self, names: Sequence[str], keep: Retention, newest: int) -> list[str]:
        """Delete the checkpoints of `names` that need not be kept, see `Retention.superseded`. Returns their names."""
        steps = {_step(name): name for name in names}
        superseded = [steps[step] for step in keep.superseded(list(steps), newest)]
        for name in superseded:
            self.delete(name)
        return superseded

    def restore(self, folder: RunFolder, on_progress: Callable[[], None], show_progress: bool) -> Path | None:
        """Copy the newest undamaged checkpoint, and the best one, to a run folder without checkpoints.

        Returns the newest; None if there are none. Raises UserError if all are damaged, and OSError.
        """
        found = list(self.complete())
        if not found:
            return None
        best = read_bytes(join(self.url, BEST)).decode().strip() if exists(join(self.url, BEST)) else None
        newest = None
        for name in reversed(found):
            try:
                newest = self._restore_one(name, folder, on_progress, show_progress)
            except DamagedError as error:
                log.warning("skipping damaged checkpoint %s: %s", name, error)
            else:
                break
        if newest is None:
            raise UserError(f"all {len(found)} checkpoints in {self.url} are damaged")
        if best is not None and best != newest.name and best in found:
            self._restore_one(best, folder, on_progress, show_progress)
        if best is not None and (folder.checkpoints / best).is_dir():
            (folder.checkpoints / BEST).write_text(f"{best}\n", encoding="utf-8")
        for path in _run_files(folder):
            url = join(self.url, _RUN, path.name)
            if not path.exists() and exists(url):
                download(url, path, stat_file(url).size)
        return newest

    def _restore_one(self, name: str, folder: RunFolder, on_progress: Callable[[], None], show_progress: bool) -> Path:
        log.info("copying %s to %s", join(self.url, name), folder.checkpoints)
        partial = folder.checkpoints / f".{name}.partial"
        fetch(join(self.url, name), partial, lambda names: names, on_progress, show_progress)
        fsync_tree(partial)
        return partial.rename(folder.checkpoints / name)


def fetch(
    url: str,
    folder: Path,
    choose: Callable[[list[str]], Sequence[str]],
    on_progress: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> None:
    """Copy files of a complete checkpoint, and COMPLETE last. Raises StorageError, such as DamagedError.

    `choose`: from their paths in the checkpoint.
    """
    marker = read_bytes(join(url, COMPLETE))
    checksums = _checksums(url, marker)
    sizes = {name[len(url) + 1 :]: found.size for name, found in list_files(url).items()}
    names = choose(list(checksums))
    if missing := next((name for name in names if name not in sizes), None):
        raise DamagedError(f"{join(url, missing)} does not exist")
    bar = progress(f"copying {url}", sum(sizes[name] for name in names) / 1e6, "MB", show_progress)
    with bar as advance:

        def copied(count: int) -> None:
            on_progress()
            advance(count / 1e6)

        def copy(name: str) -> None:
            download(join(url, name), folder / name, sizes[name], checksums[name], xxhash.xxh3_128, copied)

        _call_each(copy, names)
    write_text(folder / COMPLETE, marker.decode("utf-8"))


def local_model(name: str) -> Path:
    """The path of a model. For the URL of a checkpoint, or of a mirror, whose newest one is meant, it is a copy in the
    user's cache folder, without the state of the optimizer. Raises UserError."""
    if not is_url(name):
        return Path(name)
    url = name.rstrip("/").removesuffix("/hf")
    if not exists(join(url, COMPLETE)):
        names = list(Mirror(url).complete())
        if not names:
            raise UserError(f"{name}: expected a checkpoint with a {COMPLETE} file, or a mirror with some")
        url = join(url, names[-1])
    digest = json_digest([url, read_bytes(join(url, COMPLETE)).decode(errors="replace")])
    folder = cache_folder() / "checkpoints" / digest[:16] / url.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not (folder / COMPLETE).exists() or verify(folder, files_below("hf")):
            fetch(url, folder, lambda names: [name for name in names if name.startswith("hf/") or "/" not in name])
    return folder / "hf"


def _call_each(function: Callable[[str], None], names: Sequence[str]) -> None:
    """Call a function for each name, a few at a time. Raises the first error, and calls it for no further ones."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, "mirror") as pool:
        calls = [pool.submit(function, name) for name in names]
        try:
            for call in as_completed(calls):
                call.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _checksums(url: str, marker: bytes) -> dict[str, str]:
    """The content of a COMPLETE file. Raises DamagedError."""
    try:
        found: dict[str, str] = parse_json(marker)
        if not found or any(".." in Path(name).parts or Path(name).is_absolute() for name in found):
            raise ValueError("it lists no files, or files elsewhere")
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{join(url, COMPLETE)} is damaged: {error}") from None
    return found


def _run_files(folder: RunFolder) -> tuple[Path, ...]:
    return folder.config, folder.provenance, folder.metrics


def _step(name: str) -> int:
    return checkpoint_step(Path(name))
