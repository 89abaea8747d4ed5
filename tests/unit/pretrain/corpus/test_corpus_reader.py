import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from experiment.errors import UserError
from pretrain.corpus import shards
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import Corpus, open_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocabulary_folder: Path) -> Path:
    """A corpus of several shards."""
    root = tmp_path_factory.mktemp("reader")
    lines = ["the river and the town " * (1 + i % 9) + str(i) for i in range(200)]
    (root / "a.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 600)
        build_corpus(
            CorpusOptions(source=root / "a.txt", tokenizer=vocabulary_folder, output=root / "corpus", workers=1)
        )
    return root / "corpus"


def all_tokens(corpus: Corpus) -> np.ndarray:
    return np.concatenate([shards.map_shard(corpus.path / shard.file)[0] for shard in corpus.manifest.shards])


def test_read_spans_of_all_shards(folder: Path) -> None:
    """Catches offsets that are off by a shard or a token, and spans in the wrong order."""
    corpus = open_corpus(folder)
    lengths = np.concatenate(list(corpus.document_lengths())).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = all_tokens(corpus)
    assert len(corpus.manifest.shards) > 3
    assert (corpus.documents, corpus.tokens) == (len(lengths), len(tokens)) == (200, lengths.sum())
    whole = corpus.read(starts, lengths)
    assert whole.dtype == np.int32
    assert (whole == tokens).all()
    order = np.random.default_rng(0).permutation(len(lengths))
    cut = np.maximum(lengths[order] - 3, 0)  # some spans are empty
    expected = [tokens[start + 2 : start + 2 + length] for start, length in zip(starts[order], cut, strict=True)]
    assert (corpus.read(starts[order] + 2, cut) == np.concatenate(expected)).all()
    assert corpus.read(starts[:0], lengths[:0]).shape == (0,)


@pytest.mark.parametrize("span", [(-1, 2), (0, 10**6), (10**9, 1), (0, -1)])
def test_spans_outside_a_shard_are_rejected(folder: Path, span: tuple[int, int]) -> None:
    """Catches other tokens, or uninitialized memory, in a batch."""
    corpus = open_corpus(folder)
    with pytest.raises(ValueError, match="end of its shard"):
        corpus.read(np.array([span[0]]), np.array([span[1]]))


def _checksum(corpus: Corpus) -> int:
    return int(corpus.read(np.array([0, 5]), np.array([5, 5])).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_read_in_worker_processes(folder: Path, method: str) -> None:
    """Catches memory maps that are pickled, or break in another process."""
    corpus = open_corpus(folder)
    here = _checksum(corpus)
    assert len(pickle.dumps(corpus)) < 20_000
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_checksum, (corpus,)) == here


def copy(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        if path.is_file():
            to.mkdir(exist_ok=True)
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_damage_is_detected(folder: Path, tmp_path: Path) -> None:
    """Catches training on a shard that is missing, truncated or modified."""
    damaged = copy(folder, tmp_path / "c")
    shard = sorted(damaged.glob("data-*.arrow"))[2]
    data = bytearray(shard.read_bytes())
    opened = open_corpus(damaged)
    assert {opened.find_damage(entry) for entry in opened.manifest.shards} == {None}
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    opened = open_corpus(damaged)
    assert shard.name in str(opened.find_damage(opened.manifest.shards[2]))
    shard.write_bytes(data[:-8])
    with pytest.raises(UserError, match=shard.name):
        open_corpus(damaged)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        open_corpus(damaged)


def test_folders_that_are_not_a_corpus(folder: Path, tmp_path: Path) -> None:
    """Catches a traceback for a mistyped path, and a manifest that is from a newer version or was edited."""
    with pytest.raises(UserError, match="is not a corpus"):
        open_corpus(tmp_path / "nowhere")
    edited = copy(folder, tmp_path / "c") / "manifest.json"
    text = edited.read_text()
    for wrong, message in [
        (text.replace('"format": 1', '"format": 99'), "format 99"),
        (text[: len(text) // 2], "damaged"),
        (text.replace('"rows": ', '"rows": 1'), "damaged"),
        (text.replace('"words": ', '"words": 0.'), r"damaged at shards\.0\.words"),
        (text.replace('"data-', '"../data-'), "damaged"),
        (text.replace('"data-', '"\\u0000data-'), "damaged"),
    ]:
        edited.write_text(wrong)
        with pytest.raises(UserError, match=message):
            open_corpus(edited.parent)


def test_fingerprint_covers_tokens_and_tokenizer(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches different corpora with the same fingerprint, and a fingerprint that depends on the folder name."""
    found = []
    for name, text in [("a", "the river\n"), ("b", "the\nriver\n"), ("c", "the river\n")]:
        (tmp_path / f"{name}.txt").write_text(text)
        build_corpus(
            CorpusOptions(
                source=tmp_path / f"{name}.txt", tokenizer=vocabulary_folder, output=tmp_path / name, workers=1
            )
        )
        found.append(open_corpus(tmp_path / name).fingerprint)
    assert found[0] == found[2] != found[1]
