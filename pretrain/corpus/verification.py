"""Verify corpora: once on each host before they are used, and on request.

The cache folder of the user has a record for each host and corpus that the host has verified: a corpus may
be read-only, and a home folder shared by hosts of which one reads it wrongly. The record holds as long as every shard
keeps its size and modification time.
"""

import logging
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from experiment.config.field_types import expand_home
from experiment.errors import UserError
from experiment.files import cache_folder, json_digest, read_json, write_json
from experiment.formatting import counted
from experiment.progress import progress
from pretrain.corpus.reader import Corpus, open_corpus

log = logging.getLogger(__name__)

_THREADS = 4  # they hash without the interpreter lock; a disk is rarely faster


def verified_shards(corpora: Iterable[Corpus], show_progress: bool) -> Iterator[Path]:
    """Verify the corpora that this host has not verified yet: each step of the iterator reads a shard and yields it.

    Raises UserError for the first damaged shard.
    """
    for corpus in {corpus.path: corpus for corpus in corpora}.values():
        if not is_verified(corpus):
            for shard, damage in _find_damage(corpus, show_progress):
                if damage is not None:
                    raise UserError(damage)
                yield shard


def is_verified(corpus: Corpus) -> bool:
    """Return whether this host has verified the corpus, and no shard has changed since."""
    path, content = _record(corpus)
    try:
        return bool(content == read_json(path))
    except (OSError, ValueError):
        return False


def verify_command(folders: str) -> None:
    """`deepcloze corpus --verify`: verify corpora (comma-separated folders), whatever was verified before.

    Prints the undamaged ones. Raises UserError that names every damaged shard and tokenizer.
    """
    damaged: list[str] = []
    for name in map(expand_home, filter(None, map(str.strip, folders.split(",")))):
        try:
            corpus = open_corpus(name)
            damages = [corpus.find_tokenizer_damage(), *(damage for _, damage in _find_damage(corpus, True))]
            found = [damage for damage in damages if damage is not None]
        except UserError as error:
            found = [str(error)]
        if not found:
            print(f"{name}: undamaged, {counted(len(corpus.manifest.shards), 'shard')} with {corpus.tokens:,} tokens")
        damaged += found
    if damaged:
        raise UserError("\n".join(damaged))


def _find_damage(corpus: Corpus, show_progress: bool) -> Iterator[tuple[Path, str | None]]:
    """Yield each shard and its damage, None without any. Records a corpus without damage."""
    path, content = _record(corpus)
    undamaged, shards = True, corpus.manifest.shards
    with suppress(OSError):
        path.unlink(missing_ok=True)
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    bar = progress(f"verifying {corpus.name}", megabytes, "MB", show_progress)
    with ThreadPoolExecutor(_THREADS) as pool, bar as advance:
        for shard, damage in zip(shards, pool.map(corpus.find_damage, shards), strict=True):
            undamaged = undamaged and damage is None
            advance(shard.bytes / 1e6)
            yield corpus.path / shard.file, damage
    if undamaged:
        try:
            write_json(path, content)
        except OSError as error:
            log.warning("cannot record in %s that a corpus is verified: %s", path.parent, error.strerror)


def _record(corpus: Corpus) -> tuple[Path, dict[str, object]]:
    """Return the file that records that this host has verified a corpus, and its content, with the shards as they are
    now."""
    name = json_digest([platform.node(), str(corpus.path)])
    stats = [(shard, (corpus.path / shard.file).stat()) for shard in corpus.manifest.shards]
    return cache_folder() / "verified" / f"{name}.json", {
        "host": platform.node(),
        "corpus": str(corpus.path),
        "vocabulary_size": corpus.manifest.vocabulary_size,
        "shards": [[shard.file, shard.sha256, stat.st_size, stat.st_mtime_ns] for shard, stat in stats],
    }
