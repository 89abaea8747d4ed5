"""The tokenizer of a corpus build, as plain data.

It is loaded in a worker process without torch, which transformers would import and which takes a second and 200 MB.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment.files import fsync_tree
from experiment.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, vocabulary_size
from pretrain.corpus.tokenization import TokenizerSpec, tokenizer_spec
from pretrain.corpus.workers import worker_pool


@dataclass(frozen=True)
class BuildTokenizer:
    """What a build needs to know about its tokenizer."""

    spec: TokenizerSpec
    fingerprint: str
    vocabulary_size: int
    files: Mapping[str, bytes]  # of its Hugging Face folder, by path in it

    def save(self, folder: Path) -> None:
        """Write the Hugging Face folder, and wait until it is on disk."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        fsync_tree(folder)


def load_build_tokenizer(path: Path, segmenter: str | None) -> BuildTokenizer:
    """Load a tokenizer folder. Raises UserError as `load_tokenizer`, and StoppedError if the process is killed."""
    with worker_pool(1, "free some, and run the same command again") as pool:
        return pool.submit(_load, path, segmenter).result()


def _load(path: Path, segmenter: str | None) -> BuildTokenizer:
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch is missing
    sys.modules["torch"] = None  # type: ignore[assignment]
    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tokenizer(tokenizer, folder)
        files = {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }
    return BuildTokenizer(
        tokenizer_spec(tokenizer, segmenter), tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer), files
    )
