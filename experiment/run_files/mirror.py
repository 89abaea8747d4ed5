"""Checkpoints in object storage: `checkpoint.mirror`, and URLs of checkpoints.

    MIRROR/step-00000100/…    the files of a checkpoint; COMPLETE is uploaded last and deleted first
    MIRROR/best               as RUN/checkpoints/best
    MIRROR/run/…              the files of the run folder that a resumed run continues

A checkpoint is complete if it has a COMPLETE file, as on a disk.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock

from experiment.downloads import Download, download_files
from experiment.errors import UserError
from experiment.files import cache_folder, check_relative, fsync_tree, json_digest, parse_json, write_file, write_text
from experiment.run_files.checkpoints import (
    BEST,
    COMPLETE,
    checkpoint_step,
    complete_checkpoints,
    files_below,
    is_checkpoint_name,
    verify,
    verify_name,
)
from experiment.run_files.provenance import parse_provenance, read_provenance
from experiment.run_files.retention import Retention, abandon, discard, drop_scores
from experiment.run_files.run_folder import RunFolder
from experiment.storage import (
    DamagedError,
    MissingError,
    delete,
    exists,
    join,
    list_files,
    list_folders,
    read_bytes,
    upload,
    write_bytes,
)

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 4
_RUN = "run"


class Mirror:
    def __init__(self, url: str) -> None:
        self.url = url

    def complete(self) -> dict[str, bytes]:
        """Return the complete checkpoints, oldest first: name -> content of COMPLETE. Raises StorageError."""
        found = {}
        for name in sorted(filter(is_checkpoint_name, list_folders(self.url)), key=checkpoint_step):
            with suppress(MissingError):
                found[name] = read_bytes(join(self.url, name, COMPLETE))
        return found

    def incomplete(self, known: Collection[str]) -> list[str]:
        """Return the checkpoints without a COMPLETE file, of uploads that did not finish. `known`: complete ones, not
        looked at. Raises StorageError."""
        names = [name for name in list_folders(self.url) if is_checkpoint_name(name) and name not in known]
        return [name for name in names if not exists(join(self.url, name, COMPLETE))]

    def upload(self, checkpoint: Path, known: bytes | None = None) -> bytes:
        """Copy a complete checkpoint, in place of another one of its name, and return the content of COMPLETE.

        known: the content of COMPLETE of the one that is there, if any: files with the same checksum are not copied.
        Raises StorageError, and OSError if the checkpoint is deleted meanwhile.
        """
        marker = (checkpoint / COMPLETE).read_bytes()
        target = join(self.url, checkpoint.name)
        there: Mapping[str, str] = {}
        if known is not None:
            with suppress(DamagedError):
                there = _checksums(target, known)
        changed = [name for name, checksum in _checksums(target, marker).items() if there.get(name) != checksum]
        delete(join(target, COMPLETE))
        with ThreadPoolExecutor(_FILES_AT_ONCE, "mirror") as pool:  # after an error, files that wait are not copied
            list(pool.map(lambda name: upload(checkpoint / name, join(target, name)), changed))
        write_bytes(join(target, COMPLETE), marker)
        return marker

    def upload_config(self, folder: RunFolder) -> None:
        """Copy the config, which does not make the mirror that of the run."""
        upload(folder.config, join(self.url, _RUN, folder.config.name))

    def upload_run_files(self, folder: RunFolder) -> None:
        """Copy the files that a resumed run continues."""
        for path in _run_files(folder):
            with suppress(FileNotFoundError):
                upload(path, join(self.url, _RUN, path.name))

    def best(self) -> str | None:
        """Return the name that the mirror has for the best checkpoint; None if it has none. Raises StorageError."""
        with suppress(MissingError):
            return read_bytes(join(self.url, BEST)).decode(errors="replace").strip()
        return None

    def write_best(self, name: str) -> None:
        write_bytes(join(self.url, BEST), f"{name}\n".encode())

    def provenance(self) -> dict[str, Any] | None:
        """Return the provenance of the run in the mirror; None if it is missing or damaged. Raises StorageError."""
        url = join(self.url, _RUN, "provenance.json")
        try:
            content = read_bytes(url)
        except MissingError:
            return None
        with suppress(UserError):
            return parse_provenance(content, url)
        return None

    def check_owner(self, folder: RunFolder) -> bool:
        """Return whether the run was continued from the mirror in another folder, and this one has older checkpoints.

        A mirror without provenance belongs to no run. Raises UserError if it belongs to another run, if this folder has
        checkpoints of attempts that the mirror lacks, or if the mirror's checkpoints of later attempts are not of later
        steps than those of this folder; StorageError.
        """
        found, own = self.provenance(), read_provenance(folder)
        if found is None:
            return False
        if own is None or found["run_id"] != own["run_id"]:
            raise UserError(
                f"checkpoint.mirror: {self.url} belongs to another run (id {found['run_id']}) than {folder.path}; "
                "choose another checkpoint.mirror. To continue that run, choose an empty run.dir"
            )
        theirs: list[Any] = found["attempts"]
        if own["attempts"][: len(theirs)] == theirs:
            return False
        checkpoints = complete_checkpoints(folder.checkpoints)
        saved = [_attempts(checkpoint / "state.json") for checkpoint in checkpoints]
        if any(attempts != theirs[: len(attempts)] for attempts in saved):
            raise self.diverged(folder)
        if checkpoints:
            # The newest one is of the last attempt that saved: it deletes those of later steps than its own.
            states = ((name, _attempts(join(self.url, name, "state.json"))) for name in reversed(list(self.complete())))
            newest, attempts = next(((name, found) for name, found in states if found), (None, []))
            is_later = newest is not None and checkpoint_step(newest) > checkpoint_step(checkpoints[-1])
            if len(attempts) > max(map(len, saved)) and not is_later:
                raise self.diverged(folder)
        return True

    def diverged(self, folder: RunFolder) -> UserError:
        """Return the error about a run that was continued both here and in another folder."""
        return UserError(
            f"checkpoint.mirror: the run in {self.url} was continued in another folder than {folder.path}, which has "
            "continued it too. To keep the mirror's checkpoints, choose an empty run.dir; to keep those of this "
            "folder, choose another checkpoint.mirror"
        )

    def delete(self, name: str) -> None:
        delete(join(self.url, name, COMPLETE))
        delete(join(self.url, name))

    def apply_retention(self, names: Sequence[str], keep: Retention, newest: int, drop_later: bool) -> list[str]:
        """Delete the checkpoints of `names` that need not be kept, see `Retention.superseded`. Returns their names.

        drop_later: also delete those of steps after `newest`.
        """
        steps = {checkpoint_step(name): name for name in names}
        later = [step for step in steps if drop_later and step > newest]
        superseded = [steps[step] for step in (*keep.superseded(list(steps), newest), *later)]
        for name in superseded:
            self.delete(name)
        return superseded

    def restore(self, folder: RunFolder, on_progress: Callable[[], None], is_ahead: bool = False) -> None:
        """Copy the run to a folder: the newest undamaged checkpoint, the best one, and the run's files.

        is_ahead: the folder is behind, see `check_owner`: its files are replaced, and only checkpoints of later steps
        than its own are copied; with them, its own are deleted that differ from those of the same steps in the mirror,
        and the scores of all steps that were trained again.
        Else it has no checkpoints, and its files stay.

        An interrupted copy is repeated. Raises UserError if all are damaged, and OSError.
        """
        copies: dict[str, Path] = {}  # name -> temporary folder

        def copy(name: str) -> bool:
            """Copy a checkpoint. Returns False if it is damaged."""
            try:
                copies[name] = self._fetch(folder.checkpoints / name, on_progress)
            except DamagedError as error:
                log.warning("skipping damaged checkpoint %s: %s", name, error)
            return name in copies

        own, found = complete_checkpoints(folder.checkpoints), self.complete()
        later = [name for name in found if not own or checkpoint_step(name) > checkpoint_step(own[-1])]
        if later and not any(copy(name) for name in reversed(later)) and not own:
            raise UserError(f"all {len(later)} checkpoints in {self.url} are damaged")
        stale = [path for path in own if copies and found.get(path.name) not in (None, (path / COMPLETE).read_bytes())]
        kept = [path for path in own if path not in stale]
        best = self.best() if copies else None
        if best in found and best not in copies and folder.checkpoints / best not in kept:
            copy(best)
        contents = {}
        for path in _run_files(folder) if copies or not own else [folder.provenance]:  # own metrics reach further
            with suppress(MissingError):
                if is_ahead or not path.exists():
                    contents[path] = read_bytes(join(self.url, _RUN, path.name))
        if contents and (is_ahead or not folder.provenance.exists()):
            write_text(folder.restored, str(folder.path))  # first: see `check_run_folder`
        provenance = contents.pop(folder.provenance, None)
        for path, content in contents.items():
            write_file(path, content)
        named = [folder.checkpoints / BEST] if best in copies or folder.checkpoints / str(best) in kept else []
        copied = [folder.checkpoints / name for name in copies]
        for path in stale:
            abandon(path)
        if is_ahead and copies and provenance is not None:
            _drop_scores(folder, parse_provenance(provenance, self.url)["attempts"])
        # If this is interrupted, it is repeated in a folder that had checkpoints until it has the newest one. An empty
        # folder resumes from what it has, which must be the newest.
        for path in (*named, *reversed(copied)) if own else (*copied, *named):
            if path.name == BEST:
                write_text(path, f"{best}\n")
            else:
                _replace(path, copies[path.name])  # which may be there, but incomplete
        if provenance is not None:
            write_file(folder.provenance, provenance)  # last: with it, the folder is not behind

    def repair(self, checkpoint: Path, on_progress: Callable[[], None]) -> bool:
        """Replace a damaged checkpoint by its copy. Returns False if there is none of the same content, as far as its
        COMPLETE file says. Raises StorageError, such as DamagedError, and OSError."""
        try:
            is_same = read_bytes(join(self.url, checkpoint.name, COMPLETE)) == (checkpoint / COMPLETE).read_bytes()
        except MissingError:
            return False
        if is_same:
            _replace(checkpoint, self._fetch(checkpoint, on_progress))
        return is_same

    def _fetch(self, checkpoint: Path, on_progress: Callable[[], None]) -> Path:
        """Copy the checkpoint of this name to a temporary folder beside it. Raises StorageError and OSError."""
        url, partial = join(self.url, checkpoint.name), checkpoint.with_name(f".{checkpoint.name}.partial")
        log.info("copying %s to %s", url, checkpoint.parent)
        fetch(url, partial, lambda _: True, on_progress)
        fsync_tree(partial, on_progress)
        if problem := verify_name(partial, has_state=True):
            raise DamagedError(f"{url} is damaged: {problem}")
        return partial


def fetch(
    url: str, folder: Path, is_wanted: Callable[[str], bool], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Copy files of a complete checkpoint, and COMPLETE last. Raises StorageError, such as DamagedError.

    `is_wanted`: whether to copy a file, by its path in the checkpoint.
    """
    marker = read_bytes(join(url, COMPLETE))
    sizes = {name[len(url) + 1 :]: found.size for name, found in list_files(url).items()}
    files = []
    for name, checksum in _checksums(url, marker).items():
        if is_wanted(name):
            if name not in sizes:
                raise DamagedError(f"{join(url, name)} does not exist")
            files.append(Download(join(url, name), folder / name, sizes[name], checksum))
    download_files(files, f"copying {url}", xxhash.xxh3_128, on_progress)
    write_file(folder / COMPLETE, marker)


def local_checkpoint(name: str) -> Path:
    """Return a copy of a model in the user's cache folder, without the state of the optimizer.

    name: URL of a checkpoint, or of a mirror, whose newest one is meant. Raises UserError.
    """
    url = name.rstrip("/").removesuffix("/hf")
    if not exists(join(url, COMPLETE)):
        if not (names := list(Mirror(url).complete())):
            raise UserError(f"{name}: expected a checkpoint with a {COMPLETE} file, or a mirror with some")
        url = join(url, names[-1])
    digest = json_digest([url, read_bytes(join(url, COMPLETE)).decode(errors="replace")])
    folder = cache_folder() / "checkpoints" / digest[:16] / url.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not (folder / COMPLETE).exists() or verify(folder, files_below("hf")):
            fetch(url, folder, lambda name: name.startswith("hf/") or "/" not in name)
    return folder / "hf"


def _checksums(url: str, marker: bytes) -> dict[str, str]:
    """Return the content of a COMPLETE file. Raises DamagedError."""
    try:
        found: dict[str, str] = parse_json(marker)
        if not found:
            raise ValueError("it lists no files")
        for name in found:
            check_relative(name)
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{join(url, COMPLETE)} is damaged: {error}") from None
    return found


def _attempts(state: Path | str) -> list[Any]:
    """Return the attempts of a run up to the one that saved a checkpoint; none if its state.json, a file or URL, is
    missing or damaged. Raises StorageError."""
    try:
        content = state.read_bytes() if isinstance(state, Path) else read_bytes(state)
    except (OSError, MissingError):
        return []
    with suppress(ValueError, KeyError, TypeError):
        return list(parse_json(content)["provenance"]["attempts"])
    return []


def _replace(checkpoint: Path, copied: Path) -> None:
    if checkpoint.exists():
        discard(checkpoint)
    copied.rename(checkpoint)


def _drop_scores(folder: RunFolder, attempts: Sequence[Mapping[str, Any]]) -> None:
    """Delete the scores of steps that the attempts in another folder have trained again. attempts: all of the run."""
    own = (read_provenance(folder) or {"attempts": []})["attempts"]
    if begun := [attempt.get("step", 0) for attempt in attempts if attempt not in own]:
        drop_scores(folder, min(begun))


def _run_files(folder: RunFolder) -> tuple[Path, ...]:
    return folder.config, folder.provenance, folder.metrics
