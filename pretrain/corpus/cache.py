"""Copies of corpora on a local disk, one for all ranks of a host: `corpus.cache`.

    CACHE/DIGEST/NAME/    the copy of a corpus folder; the digest is of its name and all its files
    CACHE/DIGEST/.lock    locked by a process that copies the corpus or uses the copy; its time is the last use

A copy is complete when all its shards have the sizes of the manifest, because each file is complete or does not exist.
An interrupted copy continues, at the byte where it was interrupted.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_128_hexdigest

from experiment.decontamination import CLEAN_SUMMARY
from experiment.downloads import Download, download_files
from experiment.errors import UserError, describe_disk_error
from experiment.file_locks import open_for_lock, try_lock
from experiment.files import cache_folder, json_digest, paths_below, write_file
from experiment.storage import is_url, join, list_files, read_bytes
from pretrain.config import CorpusConfig
from pretrain.corpus.manifest import MANIFEST, TOKENIZER, Manifest, parse_manifest, read_manifest
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.corpus.shards import DATASETS_METADATA
from pretrain.corpus.verification import is_verified

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LOCK = ".lock"
_METADATA = {MANIFEST, CLEAN_SUMMARY, *DATASETS_METADATA}


class Description(NamedTuple):
    """A corpus without its shards."""

    manifest: Manifest
    files: Mapping[str, bytes]  # path in the folder -> content, the manifest's too


class CacheFullError(UserError):
    """A corpus does not fit the cache, or its disk."""


@dataclass(frozen=True)
class CorpusCache:
    """A folder with copies of corpora."""

    folder: Path
    limit: float | None = None  # bytes of all copies together
    on_progress: Callable[[], None] = lambda: None  # called while something is copied, or another process copies it
    show_progress: bool = True

    def folder_of(self, source: str, description: Description) -> Path:
        """Return the folder of a corpus's copy. Another tokenizer, for example, has another folder, although the
        fingerprint of the corpus may be the same."""
        name = Path(source).name
        files = {path: xxh3_128_hexdigest(content) for path, content in sorted(description.files.items())}
        return self.folder / json_digest([name, files])[:16] / name

    def locate(self, source: str) -> Path:
        """Return the folder to open for a corpus: its copy, which is made if it is missing.

        If the disk is full, or cannot be written, it is the source itself, with a warning. Raises UserError if that is
        a URL, or cannot be read.
        """
        try:
            description = read_description(source)
            folder = self.folder_of(source, description)
            self._make(source, description, folder)
        except (CacheFullError, OSError) as error:
            refusal = str(error) if isinstance(error, CacheFullError) else describe_disk_error(error)
            if refusal is None:
                raise
            if is_url(source):
                raise UserError(f"corpus.cache: {source} cannot be copied to {self.folder}: {refusal}") from None
            log.warning("corpus.cache: %s; reading %s instead of a copy", refusal, source)
            return Path(source)
        return folder

    def _make(self, source: str, description: Description, folder: Path) -> None:
        """Copy the corpus unless that is done, and lock the copy until this process ends: no other one deletes it."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open_for_lock(folder.parent / _LOCK)
        except FileNotFoundError:
            lock = os.open(folder.parent / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # another user's
            os.utime(lock)
        try:
            self._copy_locked(lock, source, description, folder)
        except BaseException:
            os.close(lock)
            raise

    def _copy_locked(self, lock: int, source: str, description: Description, folder: Path) -> None:
        """Wait until the copy is complete and `lock` is shared."""
        announced = False
        while True:
            if (corpus := _locked_copy(lock, folder)) and (is_verified(corpus) or not os.access(folder, os.W_OK)):
                return
            # A lock that is not granted is lost, so two processes cannot wait for each other.
            locked = try_lock(lock)
            if locked or (locked is None and not _complete(folder)):  # None: a complete copy may be in use
                if not os.access(folder, os.W_OK):  # another user's: nothing is deleted to make space for it
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
                self._copy(source, description, folder)
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_SH)
                return
            if _locked_copy(lock, folder):  # in use, perhaps on a host with another name
                return
            if not announced:
                log.info("waiting for another process that copies %s to %s", source, folder)
                announced = True
            self.on_progress()
            time.sleep(_POLL_SECONDS)

    def _copy(self, source: str, description: Description, folder: Path) -> None:
        url = source if is_url(source) else f"file://{Path(source).absolute()}"
        shards = description.manifest.shards
        sizes = {shard.file: shard.bytes for shard in shards}
        sizes |= {name: len(content) for name, content in description.files.items()}
        label = f"copying {Path(source).name} to {self.folder}"
        try:
            self._make_space(sizes, folder)
            log.info("copying %s to %s", source, folder)
            files = [
                Download(join(url, shard.file), folder / shard.file, shard.bytes, shard.sha256) for shard in shards
            ]
            download_files(files, label, on_progress=self.on_progress, show_progress=self.show_progress)
            _write_description(description, folder)
        except (CacheFullError, OSError):
            if not is_url(source):
                shutil.rmtree(folder, ignore_errors=True)  # it will not be continued
            raise

    def _make_space(self, sizes: Mapping[str, int], folder: Path) -> None:
        """Delete the least recently used copies if there is a limit, and it or the disk has no room. Raises
        CacheFullError."""
        present = _bytes_below(folder)
        missing = max(0, sum(sizes.values()) - present)
        if self.limit is not None:
            expected, free = _bytes_below(self.folder) + missing, shutil.disk_usage(self.folder).free
            others = sorted(self.folder.glob(f"*/{_LOCK}"), key=lambda lock: lock.stat().st_mtime)
            for delete in (False, True):  # nothing is deleted if that would not be enough
                freed = 0
                for other in others:
                    if expected - freed <= self.limit and free + freed >= missing:
                        break
                    freed += _evict(other, delete)  # not this copy, which is locked
                if expected - freed > self.limit:
                    raise CacheFullError(
                        f"corpus.cache_gib allows {_readable(self.limit)}, expected {_readable(expected - freed)} with "
                        "what is in use or another user's"
                    )
                if free + freed < missing:
                    break
        if (free := shutil.disk_usage(self.folder).free) < missing:
            raise CacheFullError(f"{self.folder} has {_readable(free)} free, expected {_readable(missing)}")


def _user_cache() -> CorpusCache:
    return CorpusCache(cache_folder() / "corpora")


def copy_urls(config: CorpusConfig) -> dict[str, Path]:
    """Copy the corpora whose names are URLs to `corpus.cache`. Returns their folders."""
    if config.cache is None:
        return {}
    cache = CorpusCache(Path(config.cache), config.cache_bytes)
    return {source: cache.locate(source) for source in config.sources if is_url(source)}


def open_metadata(source: str) -> Corpus:
    """Open a corpus, given as a folder or a URL, to read its manifest and tokenizer. For a URL, only these are copied,
    to the user's cache folder. Raises UserError."""
    if not is_url(source):
        return open_corpus(Path(source))
    description = read_description(source)
    folder = _user_cache().folder_of(source, description)
    _write_description(description, folder)
    return Corpus(folder, description.manifest)


def open_local(source: str) -> Corpus:
    """Open a corpus, given as a folder or a URL, which is copied to the user's cache folder. Raises UserError."""
    return open_corpus(_user_cache().locate(source) if is_url(source) else source)


def read_description(source: str) -> Description:
    """Read a corpus, given as a folder or a URL, without its shards. Raises UserError for its manifest."""
    if not is_url(source):
        manifest, folder = read_manifest(Path(source).absolute()), Path(source)
        paths = {str(path.relative_to(folder)): path for path in paths_below(folder) if path.is_file()}
        return Description(manifest, {name: path.read_bytes() for name, path in paths.items() if _is_copied(name)})
    manifest = parse_manifest(read_bytes(join(source, MANIFEST)), join(source, MANIFEST))
    names = (url[len(source.rstrip("/")) + 1 :] for url in list_files(source))
    return Description(manifest, {name: read_bytes(join(source, name)) for name in names if _is_copied(name)})


def _write_description(description: Description, folder: Path) -> None:
    """Write the files that are missing, the manifest last. Other processes may do the same."""
    for name in sorted(description.files, key=lambda name: name == MANIFEST):
        if not (folder / name).is_file():
            write_file(folder / name, description.files[name])


def _is_copied(name: str) -> bool:
    """Return whether a file, by its path in the folder, is part of a corpus and not a shard. Others may be large, and a
    URL can have paths that lead out of the folder, such as `/etc/x` and `tokenizer/../../x`."""
    return name in _METADATA or (name.startswith(f"{TOKENIZER}/") and "/." not in name)


def _complete(folder: Path) -> Corpus | None:
    try:
        return open_corpus(folder)
    except UserError:
        return None


def _locked_copy(lock: int, folder: Path) -> Corpus | None:
    """Return the copy, with `lock` shared; None, without a lock, if there is none, or another process writes it.

    Processes that find none take no lock, because they would refuse each other the right to copy.
    """
    if _complete(folder) and try_lock(lock, fcntl.LOCK_SH) is not False:
        if corpus := _complete(folder):
            return corpus
        try_lock(lock, fcntl.LOCK_UN)  # deleted in the meantime
    return None


def _evict(lock: Path, delete: bool) -> int:
    """Delete a copy, or only measure it, unless it is in use or another user's. Returns the bytes that deleting it
    frees."""
    if not os.access(lock.parent, os.W_OK):
        return 0
    descriptor = os.open(lock, os.O_RDWR)
    try:
        if not try_lock(descriptor):  # None: the copy may be in use
            return 0
        freed = _bytes_below(lock.parent)
        for copy in (path for path in lock.parent.iterdir() if delete and path.is_dir()):
            log.info("corpus.cache: deleting %s, the least recently used copy", copy)
            shutil.rmtree(copy)
        return freed
    finally:
        os.close(descriptor)


def _bytes_below(folder: Path) -> int:
    """Return the size of the files below a folder, in which other processes may rename and delete some meanwhile."""
    size = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(directory, name).stat().st_size
    return size


def _readable(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
