import errno
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from experiment.errors import UserError
from launcher.cli import main
from pretrain.corpus import shards
from pretrain.corpus.build import build_corpus
from pretrain.corpus.manifest import Shard
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.corpus.verification import verified_shards


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, vocabulary_folder: Path) -> Path:
    """A corpus of several shards."""
    root = tmp_path_factory.mktemp("verification")
    (root / "a.txt").write_text("\n".join("the river and the town " * (1 + i % 9) for i in range(100)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 600)
        build_corpus(CorpusOptions(source=root / "a.txt", tokenizer=vocabulary_folder, output=root / "c", workers=1))
    return root / "c"


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "corpus"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Verifies a corpus as a run does, and returns how many shards were read for it."""
    count = 0
    original = Corpus.find_damage

    def spy(*args: Corpus) -> str | None:
        nonlocal count
        count += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Corpus, "find_damage", spy)

    def verify(path: Path) -> int:
        before = count
        assert sum(1 for _ in verified_shards([open_corpus(path)] * 2, show_progress=False)) == count - before
        return count - before

    return verify


def flip(path: Path, at: int = -100, keep_times: bool = False) -> None:
    """Change one bit, as a bad cable or disk does."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shard(corpus: Path, number: int = 1) -> Path:
    return sorted(corpus.glob("data-*.arrow"))[number]


def test_a_corpus_is_read_once(corpus: Path, shards_read: Callable[[Path], int]) -> None:
    """Catches a start that reads terabytes again, and a corpus that is verified twice if it has two roles."""
    total = len(open_corpus(corpus).manifest.shards)
    assert total > 2
    assert [shards_read(corpus), shards_read(corpus)] == [total, 0]


@pytest.mark.parametrize("change", ["time", "host", "place", "record"])
def test_a_record_does_not_hold_for_anything_else(
    corpus: Path, shards_read: Callable[[Path], int], cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Catches a host that trusts what another has read, a shard that was replaced, and a torn record."""
    total = shards_read(corpus)
    if change == "time":
        os.utime(shard(corpus), ns=(1, 1))
    elif change == "host":
        monkeypatch.setattr(platform, "node", lambda: "another")
    elif change == "place":
        corpus = Path(shutil.copytree(corpus, corpus.with_name("copy")))
    else:
        (file,) = cache.rglob("*.json")
        file.write_text(file.read_text()[:40])
    assert [shards_read(corpus), shards_read(corpus)] == [total, 0]


def test_a_flipped_bit_is_refused(corpus: Path, shards_read: Callable[[Path], int]) -> None:
    """Catches training on damaged text, a message that does not name the shard, and damage that is accepted at the
    second start."""
    expected = open_corpus(corpus).manifest.shards[1].sha256
    flip(shard(corpus))
    message = rf"data-00001-of-\d+\.arrow is damaged: its SHA-256 is [0-9a-f]{{64}}, expected {expected}; restore it"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            shards_read(corpus)
    flip(shard(corpus))
    assert shards_read(corpus) == len(open_corpus(corpus).manifest.shards)


def test_shards_are_read_at_the_same_time(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that reads terabytes with one core, shards that are yielded out of order, and damage that is lost
    because another shard was read faster."""
    first_two, original = threading.Barrier(2), Corpus.find_damage
    manifest = open_corpus(corpus).manifest
    flip(shard(corpus, 2))

    def meet(self: Corpus, one: Shard) -> str | None:
        if one in manifest.shards[:2]:
            first_two.wait(60)
        return original(self, one)

    monkeypatch.setattr(Corpus, "find_damage", meet)
    found = verified_shards([open_corpus(corpus)], show_progress=False)
    assert [next(found).name, next(found).name] == [one.file for one in manifest.shards[:2]]
    with pytest.raises(UserError, match=r"data-00002-of-\d+\.arrow is damaged"):
        next(found)


def test_a_shard_that_cannot_be_read_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for a bad sector."""

    def bad_sector(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pretrain.corpus.reader.sha256", bad_sector)
    with pytest.raises(UserError, match=r"data-00000-of-\d+\.arrow cannot be read: Input/output error; restore it"):
        list(verified_shards([open_corpus(corpus)], show_progress=False))


def test_ids_outside_the_vocabulary_are_refused(corpus: Path) -> None:
    """Catches an IndexError in a data worker, hours into a run."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    largest = max(shards.map_shard(path).ids.max() for path in corpus.glob("data-*.arrow"))
    for size, fits in ((largest + 1, True), (largest, False)):
        manifest["tokenizer"]["vocabulary_size"] = int(size)
        (corpus / "manifest.json").write_text(json.dumps(manifest))
        if fits:
            assert len(list(verified_shards([open_corpus(corpus)], show_progress=False))) > 2
        else:
            with pytest.raises(UserError, match=rf"arrow has a token with id {largest}, expected less than {largest}"):
                list(verified_shards([open_corpus(corpus)], show_progress=False))


def test_a_cache_that_cannot_be_written_costs_time_only(
    corpus: Path, shards_read: Callable[[Path], int], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that cannot start because the home folder is read-only or full."""
    cache.write_text("a file where the folder should be")
    total = len(open_corpus(corpus).manifest.shards)
    assert shards_read(corpus) == total
    assert "cannot record in" in caplog.text


def test_the_command_verifies_always(corpus: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches damage that changes no time and is trusted because of an earlier start, and a corpus or shard that is not
    reported because another one is damaged."""
    assert main(["corpus", "--verify", f"{built}, {corpus}"]) == 0
    count = len(open_corpus(corpus).manifest.shards)
    assert capsys.readouterr().out.count(f"undamaged, {count} shards with") == 2
    for number in (1, 2):
        flip(shard(corpus, number), keep_times=True)
    assert list(verified_shards([open_corpus(corpus)], show_progress=False)) == [], (
        "recorded, and unchanged to all looks"
    )
    assert main(["corpus", "--verify", f"{corpus},{corpus / 'none'},{built}"]) == 2
    said = capsys.readouterr()
    assert said.out == f"{built}: undamaged, {count} shards with {open_corpus(built).tokens:,} tokens\n"
    parts = (f"{shard(corpus, 1)} is damaged", f"{shard(corpus, 2)} is damaged", "none is not a corpus")
    for line, part in zip(said.err.splitlines(), parts, strict=True):
        assert part in line
    with pytest.raises(UserError, match="is damaged"):
        list(verified_shards([open_corpus(corpus)], show_progress=False))


@pytest.mark.parametrize("damage", ["other", "torn", "missing", "unreadable"])
def test_the_command_verifies_the_tokenizer(
    corpus: Path, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy of a corpus whose tokenizer gives texts other ids, damage of a shard that it hides, and the advice
    to build the corpus again because a disk has failed once."""
    file = corpus / "tokenizer" / "tokenizer.json"
    if damage == "other":
        content = json.loads(file.read_text())
        ids = content["model"]["vocab"]
        ids["river"], ids["town"] = ids["town"], ids["river"]
        file.write_text(json.dumps(content))
    elif damage == "torn":
        file.write_text(file.read_text()[:100])
    elif damage == "unreadable":
        error = OSError(errno.EIO, "Input/output error", str(file))
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Mock(side_effect=error))
    else:
        shutil.rmtree(file.parent)
    flip(shard(corpus))
    expected = open_corpus(corpus).tokenizer_fingerprint
    assert main(["corpus", "--verify", str(corpus)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    parts = {
        "other": f"deepcloze: {file.parent} has the fingerprint ",
        "torn": f"deepcloze: tokenizer: cannot load {file.parent}: ",
        "missing": f"deepcloze: {file.parent} is missing; ",
        "unreadable": f"deepcloze: tokenizer: cannot load {file.parent}: {file}: Input/output error",
    }
    about_tokenizer, about_shard = said.err.splitlines()
    assert about_tokenizer.startswith(parts[damage])
    assert damage != "other" or f", expected {expected}; restore it" in about_tokenizer
    has_advice = "restore it from a copy, or build the corpus again" in about_tokenizer
    assert has_advice == (damage != "unreadable")
    assert f"{shard(corpus)} is damaged" in about_shard


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("corpus --source a.txt --output c", "missing: --tokenizer ("),
        ("corpus", "expected --source, --tokenizer and --output to build a corpus, --verify"),
        ("corpus --verify c --workers 2", "--verify builds nothing; expected no other flag"),
        ("corpus --verify s3://b/c", "--verify: expected a path on a disk, found the URL s3://b/c"),
    ],
)
def test_flags_either_build_or_verify(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where a flag is missing, and flags without effect."""
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
