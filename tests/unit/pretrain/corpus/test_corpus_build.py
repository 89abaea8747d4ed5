import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from experiment.errors import StoppedError, UserError
from experiment.hub_data import load_rows
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from experiment.storage import StorageError
from hub_server import HubServer, use_hub_for_data
from launcher.cli import main
from pretrain.corpus import build, build_plan, passes, shards, splits, tasks
from pretrain.corpus.announcement import announce_sources, is_hard_wrapped
from pretrain.corpus.build import build_corpus
from pretrain.corpus.build_plan import BuildTokenizer
from pretrain.corpus.options import CorpusOptions, TextOptions
from pretrain.corpus.origins import cleanings_of, short_names
from pretrain.corpus.reader import open_corpus
from pretrain.corpus.sources import find_sources
from small_disk import SmallDisk
from waiting import LIMIT

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small shards, splits and batches, so that little text gives many."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(splits, "MIN_SPLIT_BYTES", 1300)
    monkeypatch.setattr(tasks, "BATCH_BYTES", 500)


@pytest.fixture
def source(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("\n".join([*lines[:100], "", " ", *lines[100:], "\x00"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def corpus(source: Path, vocabulary_folder: Path, tmp_path: Path) -> Build:
    """build_corpus with defaults for everything but the output."""

    def call(name: str, **flags: Any) -> Any:
        settings = {"source": source, "tokenizer": vocabulary_folder, "workers": 1} | flags
        return build_corpus(CorpusOptions(output=tmp_path / name, **settings))

    return call


@pytest.fixture(scope="module")
def finished() -> dict[Any, Path]:
    """The folders in which `whole` has built, by text and flags."""
    return {}


@pytest.fixture
def whole(corpus: Build, tmp_path: Path, finished: dict[Any, Path]) -> Callable[..., None]:
    """Builds `whole` without an interruption, or copies it from an earlier test with the same text."""

    def make(**flags: Any) -> None:
        texts = tuple(file.read_bytes() for file in sorted(tmp_path.glob("*.txt")))
        key = (str(flags).replace(str(tmp_path), ""), texts)
        if key not in finished:
            corpus("whole", **flags)
            finished[key] = tmp_path
        else:
            for built in finished[key].glob("whole*"):
                shutil.copytree(built, tmp_path / built.name)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Path and bytes of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_corpus_equals_tokenizer_output(
    corpus: Build, tmp_path: Path, lines: list[str], vocabulary_folder: Path
) -> None:
    """Catches documents that are lost, reordered or truncated, or get special tokens."""
    import datasets

    manifest = corpus("c")
    rows = datasets.load_from_disk(str(tmp_path / "c"))
    tokenizer = load_tokenizer(vocabulary_folder)
    expected = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert rows["input_ids"] == expected
    lengths = [len(row) for row in expected]
    assert len(manifest.shards) > 3
    assert (manifest.documents, manifest.tokens) == (len(lines), sum(lengths))
    assert manifest.empty_documents == 3  # an empty line, a line of spaces, a control character
    assert manifest.tokens_per_word == pytest.approx(sum(lengths) / sum(len(line.split()) for line in lines), rel=0.01)
    for percentile, length in manifest.length_percentiles.items():
        assert length == np.percentile(lengths, float(percentile), method="inverted_cdf")
    recorded = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert recorded["fingerprint"] == open_corpus(tmp_path / "c").fingerprint == manifest.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "source.txt"]


def test_the_most_frequent_unknown_texts_are_named(
    corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a share of unknown tokens that does not say what to add, and a list that workers change."""
    source = tmp_path / "unknown.txt"
    source.write_text("".join(f"the river ŧ{' ŋ' * (number % 2)} of\n" for number in range(600)), encoding="utf-8")
    manifest = corpus("a", source=source)
    assert list(manifest.unknown_texts) == ["ŧ", "ŋ"]
    assert "% unknown tokens (in a sample, most often 'ŧ', 'ŋ'), " in capsys.readouterr().out
    corpus("b", source=source, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert corpus("c", source=source, holdout=10).unknown_texts
    assert not open_corpus(tmp_path / "c-heldout").manifest.unknown_texts
    monkeypatch.setattr(build, "_FEW_UNKNOWN", 0.9)
    assert "unknown tokens, " in build.summary(tmp_path / "a", manifest)


def test_a_build_takes_no_torch(source: Path, vocabulary_folder: Path, tmp_path: Path) -> None:
    """Catches an import of torch, which takes a second, and a message of transformers that torch is missing."""
    flags = ["--source", str(source), "--tokenizer", str(vocabulary_folder), "--output", str(tmp_path / "c")]
    flags += ["--workers", "1"]
    code = f"import sys; from launcher.cli import main; main({['corpus', *flags]}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("False", "")
    save_tokenizer(load_tokenizer(vocabulary_folder), tmp_path / "saved")
    assert contents(tmp_path / "c" / "tokenizer") == contents(tmp_path / "saved")


def test_the_manifest_says_what_a_source_was_decontaminated_against(corpus: Build, tmp_path: Path) -> None:
    """Catches a record that is lost between the cleaning and the corpus, one in manifests of other text, and one that
    stays as it was after the text was cleaned again with the same result."""
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "data.jsonl").write_text('{"text": "the river"}\n')
    (clean / "more.jsonl").write_text('{"text": "the town"}\n')
    for against in ({}, {"sst2": "12ab"}, {"sst2": "12ab", "cola": "34cd"}):
        steps = [{"name": "decontaminate", "against": against}]
        (clean / "clean.json").write_text(json.dumps({"recipe": "", "read": 1, "kept": 1, "steps": steps}))
        assert corpus("a", source=clean, holdout=1).decontaminated == against
        for folder in (tmp_path / "a", tmp_path / "a-heldout"):
            assert open_corpus(folder).manifest.decontaminated == against
            assert cleanings_of(folder)[0]["steps"] == [{**steps[0], "rules": {}}]
    corpus("new", source=clean, holdout=1)
    assert contents(tmp_path / "new") == contents(tmp_path / "a")
    assert corpus("b").decontaminated is None
    assert "decontaminated" not in (tmp_path / "b" / "manifest.json").read_text()


def test_small_pieces_share_a_shard() -> None:
    """Catches a shard for each split, of which a large source has thousands."""
    pieces = [shards.Piece("", 1, tokens, 0, 1, 1, "") for tokens in (60, 40, 1, 99, 101, 5)]
    groups = shards.compose_shards(pieces, 100)
    assert [[piece.tokens for piece in group] for group in groups] == [[60, 40], [1, 99], [101], [5]]


def test_sources_and_cleanings_are_recorded(
    corpus: Build, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches documents of a source that are counted for another one or not at all, and records that depend on where
    files are or that keep long lists of matches."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    rule = {"dropped": 3, "changed": 0, "examples": [{"id": "a:1", "text": "x", "detail": ""}] * 20}
    step = {"name": "length", "read": 5, "dropped": 3, "changed": 0, "rules": {"short": rule}, "matches": ["x"] * 500}
    for place in ("here", "there/again"):
        for name in ("wiki", "books"):
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            (folder / "data.jsonl").write_text('{"text": "the river"}\n{"text": "the town he"}\n')
            summary = {"recipe": "", "read": 5, "kept": 2, "steps": [step]}
            (folder / "clean.json").write_text(json.dumps(summary))
    items = [str(tmp_path / "here" / name) for name in ("wiki", "books")]
    manifest = corpus("a", source=(*items, source), holdout=30)
    heldout = open_corpus(tmp_path / "a-heldout").manifest
    assert [found.name for found in manifest.sources] == ["wiki", "books", "source.txt"]
    for part in (manifest, heldout):
        assert sum(found.documents for found in part.sources) == part.documents
        assert sum(found.tokens for found in part.sources) == part.tokens
    both = zip(manifest.sources, heldout.sources, strict=True)
    assert [one.documents + other.documents for one, other in both] == [2, 2, 300]
    assert "sources, share of the tokens: wiki 0." in capsys.readouterr().out
    found = cleanings_of(tmp_path / "a")
    assert [cleaning["folder"] for cleaning in found] == ["wiki", "books"]
    assert len(found[0]["steps"][0]["rules"]["short"]["examples"]) == 10
    assert "matches" not in found[0]["steps"][0]

    items = [str(tmp_path / "there" / "again" / name) for name in ("wiki", "books")]
    corpus("b", source=(*items, source), holdout=30, workers=2)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert corpus("c").sources == ()
    assert cleanings_of(tmp_path / "c") == []


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/data/a", "/data/b/"], ["a", "b"]),
        (["/data/a/train.txt", "s3://bucket/b/train.txt"], ["a/train.txt", "b/train.txt"]),
        (
            ["books/*.txt", "/data/wiki/**/*.jsonl", "a/b.zip::x/*.txt"],
            ["books/*.txt", "wiki/**/*.jsonl", "a/b.zip::x/*.txt"],
        ),
        (["a", "b/a"], ["a", "b/a"]),
    ],
)
def test_names_of_sources_are_short(names: list[str], short: list[str]) -> None:
    """Catches names that depend on where a collection is, and two sources of one name."""
    assert short_names(names) == short


def test_unknown_tokens_are_counted(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches an unknown-token rate that is always 0."""
    (tmp_path / "a.txt").write_text("the ŧ river ŧ\n")
    options = CorpusOptions(source=tmp_path / "a.txt", tokenizer=vocabulary_folder, output=tmp_path / "c", workers=1)
    assert build_corpus(options).unknown_token_rate == 0.5


def test_capitals_that_become_unknown_tokens(
    tmp_path: Path, vocabulary_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches words with capitals that are lost without a warning, as with bert-base-chinese, also if ten other unknown
    texts are more frequent, and a warning about text that has none, also if it has other unknown tokens."""
    cased = tmp_path / "cased"
    shutil.copytree(vocabulary_folder, cased)
    (cased / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    for name, text in (
        ("few", "the GPU\n"),
        ("many", f"{' '.join('ŧŋđħĸłðøæþ')}\n" * 3 + "the GPU\n"),
        ("none", "the river\n"),
        ("other", "the ŧ\n"),
    ):
        (tmp_path / name).write_text(text)
        for tokenizer in (cased, vocabulary_folder):
            output = tmp_path / f"{name}-{tokenizer.name}"
            build_corpus(CorpusOptions(source=tmp_path / name, tokenizer=tokenizer, output=output, workers=1))
            is_lost = name in ("few", "many") and tokenizer == cased
            assert ("keeps capital letters, but its vocabulary has none" in capsys.readouterr().err) == is_lost


def test_bytes_do_not_depend_on_workers_or_path(
    corpus: Build, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches results taken in the order of completion, and paths or times inside the files."""
    corpus("one", workers=1)
    moved = tmp_path / "elsewhere" / "other.txt"
    moved.parent.mkdir()
    moved.write_bytes(source.read_bytes())
    monkeypatch.setattr(tasks, "BATCH_BYTES", 1300)
    corpus("deep/two", workers=2, source=str(moved))
    assert contents(tmp_path / "one") == contents(tmp_path / "deep" / "two")


class Killed(BaseException):
    """Stands for SIGKILL: error handlers must not catch it."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, before: bool) -> None:
    """Raise Killed right before or after the `call`-th call of a function."""
    real = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and before:
            raise Killed
        result = real(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


DEATHS = [
    (shards, "write_shard", 1, True),
    (shards, "write_shard", 5, False),
    (tasks, "write_json", 1, True),
    (tasks, "write_json", 4, False),
    (tasks, "join_pieces", 2, True),
    (tasks, "join_pieces", 2, False),
    (BuildTokenizer, "save", 1, False),
    (build, "write_manifest", 1, False),
    (build, "fsync", 3, True),  # the held-out corpus has its name, the main one has not
    (build.shutil, "rmtree", 1, True),
]


def finished_splits(partial: Path) -> int:
    return len(list(partial.glob("?" * 32 + ".json")))


@pytest.mark.parametrize(
    "death", DEATHS, ids=lambda death: f"{death[1]}-{death[2]}-{'before' if death[3] else 'after'}"
)
def test_killed_build_resumes_to_same_bytes(
    corpus: Build, whole: Callable[..., None], tmp_path: Path, death: tuple[Any, ...]
) -> None:
    """Catches shards that are lost, duplicated or tokenized again after a kill at any stage, publishing included."""
    flags = {"holdout": 40, "limit": 200}
    whole(**flags)
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, *death)
        with pytest.raises(Killed):
            corpus("killed", **flags)
    done = finished_splits(tmp_path / "killed.partial")
    tokenized: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = tasks._tokenize
        patch.setattr(tasks, "_tokenize", lambda *args: tokenized.append(1) or real(*args))
        corpus("killed", **flags)
    planned = len(splits.plan_splits(find_sources(tmp_path / "source.txt"), TextOptions()))
    assert planned > 5
    if death[:2] != (tasks, "join_pieces"):  # where a piece may have become a shard that is not recorded
        assert len(tokenized) == planned - done
    for part in ("", "-heldout"):
        assert contents(tmp_path / f"killed{part}") == contents(tmp_path / f"whole{part}")
    assert not list(tmp_path.glob("*.partial"))


def test_sigkill_leaves_no_workers(tmp_path: Path, source: Path, vocabulary_folder: Path, corpus: Build) -> None:
    """Catches workers that outlive a killed parent, and a real kill that cannot be resumed."""
    script = (
        "import sys; from contextlib import contextmanager; from pretrain.corpus.options import CorpusOptions\n"
        "from pretrain.corpus import build, passes, shards, splits; shards.SHARD_TOKENS = 700\n"
        "splits.MIN_SPLIT_BYTES = 1300\n"
        "@contextmanager\n"
        "def progress(*_, **__):\n    yield lambda *_: print('split', flush=True) or sys.stdin.readline()\n"
        "passes.reading_progress = progress\n"
        "o = CorpusOptions(source=sys.argv[1], tokenizer=sys.argv[2], output=sys.argv[3], workers=2)\n"
        "if __name__ == '__main__': build.build_corpus(o)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(vocabulary_folder), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert "split\n" in iter(process.stdout.readline, "")
    process.stdin.write("\n")
    process.stdin.flush()
    assert "split\n" in iter(process.stdout.readline, "")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=LIMIT)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert finished_splits(tmp_path / "killed.partial") >= 2
    corpus("killed")
    corpus("whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def interrupted(corpus: Build, name: str, **flags: Any) -> None:
    """Run a build that is killed after three splits."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, tasks, "write_json", 3, False)
        with pytest.raises(Killed):
            corpus(name, **flags)


@pytest.mark.parametrize("change", ["flags", "sample", "tokenizer", "names"])
def test_unfinished_build_with_other_arguments(
    corpus: Build, tmp_path: Path, source: Path, vocabulary_folder: Path, change: str
) -> None:
    """Catches shards of two different inputs in one corpus, and work that is deleted because of a mistyped flag."""
    interrupted(corpus, "c")
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.txt").write_text((vocabulary_folder / "vocab.txt").read_text() + "New\n")
    (other / "source.txt").write_bytes(source.read_bytes())
    flags: dict[str, Any] = {
        "flags": {"document": "blank_line"},
        "sample": {"limit": 100},
        "tokenizer": {"tokenizer": other},
        "names": {"source": other / "source.txt"},
    }[change]
    before = contents(tmp_path / "c.partial")
    with pytest.raises(UserError, match="unfinished build"):
        corpus("c", **flags)
    assert contents(tmp_path / "c.partial") == before
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("mistake", ["damaged file", "too many held out"])
def test_counts_outlive_a_mistake(
    corpus: Build, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Catches hours of counting that are lost because of one bad file, or of a mistyped number."""
    last = tmp_path / "b.txt"
    last.write_bytes(b"bad \xff" if mistake == "damaged file" else b"the river")
    flags = {"source": f"{source},{last}", "limit": 100}
    with pytest.raises(UserError, match=r"b\.txt:1: not UTF-8|--holdout 301"):
        corpus("c", **flags, holdout=301)
    last.write_bytes(b"the river\n")
    counted = list[str]()
    real = passes.count_split
    monkeypatch.setattr(
        passes, "count_split", lambda job, split: counted.append(split.spans[0].source.name) or real(job, split)
    )
    corpus("c", **flags, holdout=20)
    assert counted == [str(last)]
    corpus("whole", **flags, holdout=20)
    for part in ("", "-heldout"):
        assert contents(tmp_path / f"c{part}") == contents(tmp_path / f"whole{part}")


@pytest.mark.parametrize("flags", [{}, {"limit": 100}], ids=["all", "sample"])
def test_a_damaged_file_may_be_removed(
    corpus: Build, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int]
) -> None:
    """Catches hours of work that are lost because of a file that cannot be repaired."""
    (tmp_path / "bad.txt").write_bytes(b"bad \xff")
    (tmp_path / "last.txt").write_text("the river\n")
    with pytest.raises(UserError, match=r"bad\.txt:1: not UTF-8"):
        corpus("c", source=f"{source},{tmp_path}/bad.txt,{tmp_path}/last.txt", **flags)
    read = list[str]()
    function = "count_split" if flags else "tokenize_split"
    real = getattr(passes, function)

    def note(job: tasks.BuildJob, task: Any) -> Any:
        read.append((task if flags else task.split).spans[0].source.name)
        return real(job, task)

    monkeypatch.setattr(passes, function, note)
    for name in ("c", "whole"):
        corpus(name, source=f"{source},{tmp_path}/last.txt", **flags)
        assert (read == [f"{tmp_path}/last.txt"]) == (name == "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_commit_between_a_kill_and_the_restart(
    corpus: Build, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches finished splits that are deleted in silence, and tasks of an array that read two commits."""
    use_hub_for_data(monkeypatch, hub.url, tmp_path / "data-cache")
    monkeypatch.setattr(splits, "_HUB_ROWS", 7)
    repository = hub.repository("org/rivers", "dataset")
    rows = "".join(f'{{"text": "the river {number}"}}\n' for number in range(50))
    commit = repository.push({"README.md": b"Rivers\n", "train.jsonl": rows.encode()})
    interrupted(corpus, "c", source="hub:org/rivers")
    repository.push({"README.md": b"Rivers\n", "train.jsonl": b'{"text": "the town"}\n'})
    load_rows.cache_clear()
    tokenized: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = tasks._tokenize
        patch.setattr(tasks, "_tokenize", lambda *args: tokenized.append(1) or real(*args))
        assert corpus("c", source="hub:org/rivers").documents == 50
    assert len(tokenized) == 8 - 3
    message = f"c.partial was begun with hub:org/rivers@{commit}:train; delete it to read a newer commit"
    assert message in capsys.readouterr().err
    assert corpus("d", source="hub:org/rivers").documents == 1


def test_a_build_with_a_pattern_that_matches_nothing_starts_over(corpus: Build, tmp_path: Path) -> None:
    """Catches a corrected pattern that is refused because of the tokens of the wrong one."""
    with pytest.raises(UserError, match="matches no line"):
        corpus("c", document_start="^=")
    assert not (tmp_path / "c.partial").exists()
    assert corpus("c", document_start="^the").documents > 0


def test_archives_without_members_to_read(
    corpus: Build, tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches days of work that are deleted because of an empty archive among thousands, or of a mistyped pattern; a
    corrected pattern that is refused; and a pattern that is wrong in silence."""
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.txt", "the river\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.zip: no member matches '\*\.csv'"):
        corpus("c", source=f"{source},{tmp_path}/a.zip::*.csv")
    done = finished_splits(tmp_path / "c.partial")
    assert done > 5
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, tasks, "_tokenize", 2, before=True)
        assert corpus("c", source=f"{source},{tmp_path}/a.zip::*.txt").documents == 301
    assert corpus("d", source=f"{tmp_path}/*.zip").documents == 2
    with zipfile.ZipFile(tmp_path / "b.zip", "w"):
        pass
    assert corpus("e", source=f"{tmp_path}/*.zip").documents == 1
    assert f"{tmp_path}/b.zip: no member matches '*'" in caplog.text
    (tmp_path / "mixed").mkdir()
    (tmp_path / "b.zip").rename(tmp_path / "mixed" / "b.zip")
    (tmp_path / "mixed" / "a.txt").write_text("the river\n")
    assert corpus("f", source=f"{tmp_path}/mixed/*").documents == 1


@pytest.mark.parametrize("change", ["a word", "shorter", "longer", "damaged piece"])
@pytest.mark.parametrize("stage", ["tokenizing", "joining", "publishing"])
def test_source_that_changed_since_an_interruption(
    corpus: Build, whole: Callable[..., None], tmp_path: Path, source: Path, change: str, stage: str
) -> None:
    """Catches text of two versions of a file in one corpus, and a piece that was damaged meanwhile."""
    where = {
        "tokenizing": (tasks, "write_json", 3),
        "joining": (tasks, "join_pieces", 2),
        "publishing": (build, "fsync", 1),
    }
    (tmp_path / "b.txt").write_text("the river and the town\n" * 200)
    flags = {"source": f"{source},{tmp_path / 'b.txt'}"}
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, *where[stage], False)
        with pytest.raises(Killed):
            corpus("c", **flags)
    text = source.read_text()
    if change == "a word":
        source.write_text(text.replace("actor", "river", 1))
    elif change == "damaged piece":
        file = min((tmp_path / "c.partial").rglob("*.arrow"))
        file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    else:
        source.write_text(text[: len(text) // 2] if change == "shorter" else text + "the river is by the town\n" * 90)
    corpus("c", **flags)
    whole(**flags)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert not (tmp_path / "c.partial").exists()


def test_pieces_of_an_earlier_version_of_a_source_are_deleted(corpus: Build, tmp_path: Path, source: Path) -> None:
    """Catches a partial folder that grows with each repair of a source until the disk is full."""
    text = source.read_text()
    for repair in range(3):
        source.write_text(f"{text}the river {repair}\n")
        interrupted(corpus, "c")
        assert len({path.name[:32] for path in (tmp_path / "c.partial").glob("*-main-*.arrow")}) <= 4
    corpus("c")
    corpus("whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_source_that_is_added_changes_the_sample_of_the_others(
    corpus: Build, tmp_path: Path, lines: list[str]
) -> None:
    """Catches held-out documents of an earlier sample: other documents in pieces that are called the same."""
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    sources[0].write_text("\n".join(lines[:40]))
    sources[1].write_text("the river and the town " * 100)
    flags: dict[str, Any] = {"holdout": 2, "seed": 1}  # draws other lines of a.txt then, and none of b.txt
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, build, "_write_metadata", 1, before=True)
        with pytest.raises(Killed):
            corpus("c", source=sources[0], **flags)
    for output in ("c", "whole"):
        corpus(output, source=",".join(map(str, sources)), **flags)
    for part in ("", "-heldout"):
        assert contents(tmp_path / f"c{part}") == contents(tmp_path / f"whole{part}")


def test_temporary_files_of_killed_writers_are_not_published(corpus: Build, tmp_path: Path) -> None:
    """Catches a corpus with gigabytes that no manifest lists: a machine died while it joined a shard."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, tasks, "join_pieces", 2, before=False)
        with pytest.raises(Killed):
            corpus("c", holdout=40)
    for part in ("main", "heldout"):
        (tmp_path / "c.partial" / part).mkdir(exist_ok=True)
        (tmp_path / "c.partial" / part / ".data-00000-of-00009.arrow.node-7.99").touch()
    corpus("c", holdout=40)
    corpus("whole", holdout=40)
    for part in ("", "-heldout"):
        assert contents(tmp_path / f"c{part}") == contents(tmp_path / f"whole{part}")


@pytest.mark.parametrize("problem", ["changed", "outage"])
def test_source_that_changes_while_it_is_read(
    corpus: Build, source: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    """Catches splits of two versions of a file, and lines that are counted for hours for a message that names none."""
    real, calls = tasks._tokenize, iter(range(100))

    def changing(*args: Any) -> Any:
        if next(calls) == 3:
            if problem == "outage":
                raise StorageError("source.txt: no success in 5 attempts")
            source.write_text(source.read_text() + "more\n")
        return real(*args)

    monkeypatch.setattr(tasks, "_tokenize", changing)
    monkeypatch.setattr(tasks, "locate_lines", lambda _: pytest.fail("counts lines"))
    with pytest.raises(UserError, match=r"source\.txt(: no success| changed while it was read)"):
        corpus("c")


def test_existing_corpus(corpus: Build, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a finished corpus that is rebuilt, or overwritten by another."""
    first = corpus("c", holdout=10)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert corpus("c", holdout=10) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == stamps
    assert "already exists" in capsys.readouterr().out
    corpus("all")
    for name, holdout in (("c", 11), ("all", 10)):
        with pytest.raises(UserError, match=rf"{name} already holds another corpus \(another holdout"):
            corpus(name, holdout=holdout)
    source.write_text("something else\nand more\n" * 20)
    with pytest.raises(UserError, match=r"another corpus \(other documents"):
        corpus("c", holdout=10)


def test_output_folder_with_other_files(corpus: Build, tmp_path: Path) -> None:
    """Catches a user's files deleted or mixed with shards, and an empty folder rejected."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already holds something"):
        corpus("c")
    assert contents(tmp_path / "c") == {"thesis.tex": b"years of work"}
    (tmp_path / "empty").mkdir()
    assert corpus("empty").documents == 300
    with pytest.raises(UserError, match=r"^--output /: expected a folder that can be created$"):
        corpus("/")


def test_concurrent_builds(corpus: Build, tmp_path: Path) -> None:
    """Catches two processes that write the same shards."""
    with FileLock(tmp_path / ".c.lock"), pytest.raises(UserError, match="another process is writing it"):
        corpus("c")


def test_full_disk(corpus: Build, tmp_path: Path) -> None:
    """Catches a traceback instead of a message, and finished shards that are deleted."""
    real, calls = shards.write_shard, iter(range(9))

    def full(*args: Any, **options: Any) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", full)
        with pytest.raises(UserError, match=r"--output .*c: disk full"):
            corpus("c")
    assert not (tmp_path / "c").exists()
    assert finished_splits(tmp_path / "c.partial") == 2
    corpus("c")
    corpus("whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_partial_folder_that_cannot_be_removed(corpus: Build, tmp_path: Path, undeletable: Any) -> None:
    """Catches a traceback after the corpus has its name, on NFS, and a rest that stays."""
    with undeletable(".partial"):
        assert corpus("c").documents == 300
    assert (tmp_path / "c.partial").exists()
    corpus("c")
    assert not (tmp_path / "c.partial").exists()


@pytest.mark.parametrize("pages", [0, 1, 4, 8, 12])
def test_a_build_continues_when_a_full_disk_has_room_again(
    corpus: Build, whole: Callable[..., None], tmp_path: Path, small_disk: SmallDisk, pages: int
) -> None:
    """Catches a traceback at some file of the build, and a shard that is cut off but keeps its space."""
    small_disk.fill(leave=pages * 4096)
    with pytest.raises(UserError, match=r"--output .*small-disk/c: .*disk full"):
        corpus("small-disk/c")
    assert list(small_disk.path.glob("c.partial/.*")) == []
    small_disk.free()
    corpus("small-disk/c")
    whole()
    assert contents(small_disk.path / "c") == contents(tmp_path / "whole")


def test_no_space_for_temporary_files(
    vocabulary_folder: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a full disk without its name, so that one looks at the disk of --output."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk.path))
    small_disk.fill(leave=2 * 4096)
    message = f"^the folder for temporary files, {small_disk.path}: .*disk full; set TMPDIR to another one$"
    with pytest.raises(UserError, match=message):
        build_plan._load(vocabulary_folder, None)


class KillsItsWorker:
    """A function that kills the process which receives it. To get one of this file, it would import the file."""

    def __call__(self, *_: object) -> None:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., None], tuple[signal.Signals]]:
        return signal.raise_signal, (signal.SIGKILL,)


def test_killed_worker(corpus: Build, tmp_path: Path) -> None:
    """Catches a build that hangs, or ends with a traceback, when the system kills a worker for its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "tokenize_split", KillsItsWorker())
        with pytest.raises(StoppedError, match="killed"):
            corpus("c", workers=2)
    assert corpus("c").documents == 300


def test_killed_loader_of_the_tokenizer(vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice that does not fit: there is no shard yet, and one process whatever --workers says."""
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(build_plan, "_load_without_torch", KillsItsWorker())
    with pytest.raises(StoppedError, match=r"killed.*run the same command again") as stopped:
        build_plan.load_build_tokenizer(str(vocabulary_folder), None)
    assert not re.search("shard|workers", str(stopped.value))


def test_tokenizer_with_several_chat_templates(corpus: Build, vocabulary_folder: Path, tmp_path: Path) -> None:
    """Catches a traceback for a tokenizer whose folder has a folder, and files in it that the corpus loses."""
    tokenizer = load_tokenizer(vocabulary_folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # type: ignore[assignment]
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    template = Path("additional_chat_templates") / "tools.jinja"
    assert (tmp_path / "tokenizer" / template).is_file()
    corpus("c", tokenizer=tmp_path / "tokenizer")
    assert (tmp_path / "c" / "tokenizer" / template).read_text(encoding="utf-8") == "{{ tools }}"


@pytest.mark.parametrize("text", ["", " \n\n", "\x00\n\u200b\n"])
def test_empty_source(tmp_path: Path, corpus: Build, text: str) -> None:
    """Catches a corpus without documents."""
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError, match="none of its documents gives a token"):
        corpus("c", source=path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "source.txt"]


def test_documents_whose_letters_are_no_tokens(tmp_path: Path, corpus: Build) -> None:
    """Catches documents without tokens that are counted where they are drawn: letters of an alphabet without a token
    for unknown text may give none."""
    tokens = {f"{role}_token": f"<{role}>" for role in ("cls", "sep", "pad", "mask")}
    vocabulary = {token: number for number, token in enumerate([*tokens.values(), *"ACGT"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(tmp_path / "letters")
    path = tmp_path / "a.txt"
    path.write_text("NNNN\n" * 5 + "\n")
    with pytest.raises(UserError, match="none of its documents gives a token"):
        corpus("a", source=path, tokenizer=tmp_path / "letters")


def test_bad_input_late_in_the_source(tmp_path: Path, corpus: Build, source: Path) -> None:
    """Catches a corpus that looks complete although its source was damaged, and a build that cannot resume."""
    good = source.read_bytes()
    source.write_bytes(good + b"\xe9t\xe9\n")
    with pytest.raises(UserError, match=r"source\.txt:304: not UTF-8"):
        corpus("c")
    assert not (tmp_path / "c").exists()
    source.write_bytes(good)
    assert corpus("c").documents == 300


def test_half_a_surrogate_pair_is_rejected(tmp_path: Path, corpus: Build) -> None:
    """Catches a traceback from the tokenizer for JSON with an escape that is not a character."""
    (tmp_path / "a.jsonl").write_text('{"text": "the \\ud800 river"}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: expected Unicode text, found half of a surrogate pair; `deepcloze clean`"
    ):
        corpus("c", source=tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "flag", ["--workers=0", "--limit=-1", "--holdout=many", "--seed=1.5", "--document=page", "--segmenter=jeiba"]
)
def test_invalid_options(
    tmp_path: Path, source: Path, vocabulary_folder: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """Catches invalid values that are rounded, ignored or found late."""
    arguments = ["--source", str(source), "--tokenizer", str(vocabulary_folder), "--output", str(tmp_path / "c"), flag]
    assert main(["corpus", *arguments]) == 2
    assert f"{flag.partition('=')[0]}: expected" in capsys.readouterr().err
    assert not list(tmp_path.glob("c*"))


def rows(folder: Path) -> list[tuple[int, ...]]:
    import datasets

    return [tuple(row) for row in datasets.load_from_disk(str(folder))["input_ids"]]


def test_holdout_and_limit(tmp_path: Path, corpus: Build) -> None:
    """Catches documents in both parts, an ignored seed, and held-out documents that depend on the limit."""
    corpus("all")
    corpus("a", holdout=50)
    corpus("b", holdout=50, limit=100)
    corpus("c", holdout=50, limit=100, seed=7)
    everything, a, b = rows(tmp_path / "all"), rows(tmp_path / "a"), rows(tmp_path / "b")
    heldout = rows(tmp_path / "a-heldout")
    assert len(heldout) == 50
    assert sorted(a + heldout) == sorted(everything)
    assert [row for row in everything if row in set(a)] == a  # in source order
    assert rows(tmp_path / "b-heldout") == heldout
    assert len(b) == 100
    assert set(b) < set(a)
    assert rows(tmp_path / "c-heldout") != heldout
    with pytest.raises(UserError, match="--holdout 300: the source has only 300"):
        corpus("d", holdout=300)


SENTENCES = [f"The {number}th run of the long night was slower than the one before it." for number in range(200)]


def test_wrapped_text_is_recognized() -> None:
    """Catches a book whose lines become documents of ten words."""
    assert is_hard_wrapped(textwrap.wrap(" ".join(SENTENCES), 72))
    assert is_hard_wrapped(textwrap.wrap("今天我们在图书馆里学习自然语言处理的新方法天气很好" * 200, 60))


@pytest.mark.parametrize(
    "lines",
    [
        SENTENCES,  # equally long, but complete
        [f"word {'x' * (number % 60)}" for number in range(200)],  # titles, search queries: all lengths
        [" ".join(SENTENCES[:9])] * 100,  # paragraphs
        textwrap.wrap(" ".join(SENTENCES[:5]), 72),  # too few to tell
    ],
)
def test_other_text_is_not(lines: list[str]) -> None:
    """Catches a warning about text with a document on each line."""
    assert not is_hard_wrapped(lines)


def test_a_list_of_many_files_is_no_name(tmp_path: Path) -> None:
    """Catches a list that is taken for the name of a file, which is too long for one."""
    names = [f"{tmp_path}/{number:0>200}.txt" for number in range(30)]
    for name in names:
        Path(name).touch()
    assert [source.name for source in find_sources(",".join(names))] == names
    with pytest.raises(UserError, match="no such file or folder"):
        find_sources([",".join(names)])
    with pytest.raises(UserError, match="no such archive"):
        find_sources(f"{'a' * 300}.zip::*.txt")


def test_sources_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a glob that names other files than meant, without a sign of it, and names that change the terminal."""
    for number in range(12):
        (tmp_path / f"{number:02}\x1b[2J.txt").write_text("\n".join(textwrap.wrap(" ".join(SENTENCES), 72)))
    announce_sources(find_sources(tmp_path), TextOptions())
    printed, warnings = capsys.readouterr()
    assert printed.startswith("reading 12 sources, 0.2 MB:\n")
    assert rf"  {tmp_path}/09\x1b[2J.txt" + "\n  … and 2 more\n" in printed
    assert rf"warning: the lines of {tmp_path}/00\x1b[2J.txt look like parts of paragraphs" in warnings
    announce_sources(find_sources(tmp_path), TextOptions(document="blank_line"))
    assert "warning" not in capsys.readouterr().err
