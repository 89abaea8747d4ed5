"""The whole cleaning: same bytes however it is run, nothing is lost, and what is in the way is refused."""

import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import ftfy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trafilatura
import zstandard

from experiment.config import build_config
from experiment.errors import UserError
from experiment.storage import stat_file
from pretrain.cleaning import near_duplicates, parts, passes, run
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.parts import read_documents, write_documents
from pretrain.cleaning.reading import find_inputs
from pretrain.cleaning.step import Document
from pretrain.corpus import formats, sources
from pretrain.corpus.compression import has_several_members
from pretrain.corpus.sources import find_sources
from small_disk import SmallDisk

STEPS = [
    {"ftfy": {}},
    {"exact_dedup": {}},
    {"length": {"min_words": 2}},
    {"minhash": {"ngram": 3}},
    {"line_dedup": {}},
    {"sample": {"rate": 0.9}},
]


def texts_of(folder: Path) -> list[str]:
    return [document.text for path in sorted(folder.glob("*.jsonl.zst")) for document in read_documents(path)]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CleanConfig:
    """A source of 600 lines in two files, a third of them duplicates."""
    monkeypatch.setattr(passes, "_PART_DOCUMENTS", 50)
    for name, start in (("a.txt", 0), ("b.txt", 200)):
        lines = [" ".join(f"{word}{number % 400}" for word in "abcdefgh") for number in range(start, start + 300)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    source = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    return build_config(CleanConfig, {"source": source, "output": str(tmp_path / "out"), "steps": STEPS})


def clean(config: CleanConfig, folder: Path, workers: int = 1) -> dict[str, str]:
    run.clean(config.model_copy(update={"output": str(folder)}), lambda name: [], workers)
    return digests(folder)


def test_worker_processes_write_the_same_bytes(config: CleanConfig, tmp_path: Path) -> None:
    """Catches results in the order of their arrival, and steps that cannot be sent to a process."""
    assert clean(config, tmp_path / "one", 1) == clean(config, tmp_path / "two", 2)


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """The limit of open files of this process, lowered to 20 more than it has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len([*Path("/proc/self/fd").iterdir()]) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_parts_than_open_files(
    clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_open_files: int
) -> None:
    """Catches a collection of gigabytes that fails because the arrays of all of its parts are open at once, by
    descriptors or memory maps."""
    monkeypatch.setattr(passes, "_PART_DOCUMENTS", 1)
    compare, mapped = near_duplicates._compare_band, list[int]()

    def counted(*arguments: Any) -> None:
        compare(*arguments)
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(sum(str(tmp_path) in line and line.endswith(".npy") for line in lines))

    monkeypatch.setattr(near_duplicates, "_compare_band", counted)
    numbers = range(few_open_files + 20)
    distinct = [" ".join(f"{word}{number}" for word in ("unlike", "any", *"abcdefgh")) for number in numbers]
    lines = [*distinct, distinct[3], f"{distinct[5]}!"]
    found = clean(lines, {"exact_dedup": {}}, {"minhash": {}}, {"line_dedup": {}})
    assert [step["dropped"] for step in found["steps"]] == [1, 1, 0]
    assert {*mapped} == {0}
    assert texts_of(tmp_path / "out") == distinct


def test_tallies_are_not_read_to_decide(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches JSON with thousands of examples that is parsed at each access to a part."""
    monkeypatch.setattr(passes, "_PART_DOCUMENTS", 1)
    decide, parse = passes._decide, parts.parse_record
    parsed, counts = list[Any](), list[int]()

    def counted(*arguments: Any) -> None:
        parsed.clear()
        decide(*arguments)
        counts.append(len(parsed))

    def recorded(*arguments: Any) -> Any:
        parsed.append(arguments)
        return parse(*arguments)

    monkeypatch.setattr(passes, "_decide", counted)
    monkeypatch.setattr(parts, "parse_record", recorded)
    clean([f"line {number}" for number in range(9)], {"minhash": {}}, {"line_dedup": {}})
    assert counts == [0, 0]


def test_parts_of_other_machines(config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tally of another machine that a network file system reports as missing, because it was when the part
    was handed out."""
    missing = set[Path]()
    is_finished, read_tally, list_names = parts.PassFolder.is_finished, parts.PassFolder.tally, passes.names_in

    def cached(files: parts.PassFolder, part: int) -> bool:
        found = is_finished(files, part)
        if not found:
            missing.add(files._tally(part))
        return found

    def read(files: parts.PassFolder, part: int) -> Any:
        assert files._tally(part) not in missing
        return read_tally(files, part)

    def listed(folder: Path) -> list[str]:
        missing.difference_update([path for path in missing if path.parent == folder])
        return list_names(folder)

    monkeypatch.setattr(parts.PassFolder, "is_finished", cached)
    monkeypatch.setattr(parts.PassFolder, "tally", read)
    monkeypatch.setattr(passes, "names_in", listed)
    clean(config, tmp_path / "out")


def test_an_interrupted_cleaning_resumes_with_the_same_bytes(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts that are done again, lost or taken twice, wherever the process was killed."""
    whole = clean(config, tmp_path / "whole")
    process, calls = passes._process, list[tuple[int, int]]()

    def interrupted(job: Any, part: Any) -> int:
        if len(calls) % 7 == 6:
            calls.append((-1, -1))
            raise KeyboardInterrupt
        calls.append((part.pass_number, part.number))
        return process(job, part)

    monkeypatch.setattr(passes, "_process", interrupted)
    for _ in range(20):
        try:
            found = clean(config, tmp_path / "out")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    assert found == whole
    done = [call for call in calls if call != (-1, -1)]
    assert len(done) == len(set(done)) > 30
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.partial" / "pass-0").mkdir(parents=True)  # killed after the result got its name
    assert clean(config, tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_duplicates_go_and_everything_is_counted(clean: Any, tmp_path: Path) -> None:
    """Catches documents that are lost without being counted, and counts that do not add up."""
    lines = ["first line of text", "second line of text", "", "first line of text", "x"]
    found = clean(lines, {"exact_dedup": {}}, {"length": {"min_characters": 2}})
    assert (found["read"], found["kept"]) == (4, 2)
    assert [(step["name"], step["read"], step["dropped"]) for step in found["steps"]] == [
        ("exact_dedup", 4, 1),
        ("length", 3, 1),
    ]
    (example,) = found["steps"][0]["rules"]["duplicate"]["examples"]
    assert (example["id"], example["detail"]) == (f"{tmp_path}/in.txt:4", f"of {tmp_path}/in.txt:1")
    assert texts_of(tmp_path / "out") == lines[:2]
    assert json.loads((tmp_path / "out" / "clean.json").read_text()) == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert "first line of text" in page
    assert "second line of text" not in page


def test_pages_without_text_are_counted(clean: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches pages that vanish because no text is found in them."""
    (tmp_path / "pages").mkdir()
    for name, body in (("a", "<p>A page about the sea and its animals.</p>"), ("b", ""), ("c", "<nav></nav>")):
        (tmp_path / "pages" / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    found = clean([], {"length": {}}, source=str(tmp_path / "pages"))
    assert (found["read"], found["kept"], found["empty"]) == (1, 1, 2)
    assert "1 of 1 documents kept, 2 pages without text" in capsys.readouterr().out
    assert "without text" in (tmp_path / "out" / "report.html").read_text()


def test_the_result_is_a_source_of_a_corpus(clean: Any, tmp_path: Path) -> None:
    """Catches clean.json being read as text."""
    clean(["one text"], {"exact_dedup": {}})
    assert [Path(source.name).name for source in find_sources(str(tmp_path / "out"))] == ["data-00000.jsonl.zst"]


def test_a_full_disk(clean: Any, small_disk: SmallDisk) -> None:
    """Catches a traceback for an array that does not fit; numpy's error has no number."""
    lines, output = [" ".join(f"w{number}" for number in range(30_000))], str(small_disk.path / "out")
    small_disk.fill(leave=1 << 16)
    with pytest.raises(UserError, match=rf"^output {output}: .*ngrams\.npy: disk full; the same command resumes"):
        clean(lines, {"minhash": {}}, output=output)
    small_disk.free()
    assert clean(lines, {"minhash": {}}, output=output)["kept"] == 1


def test_folders_that_cannot_be_removed(clean: Any, tmp_path: Path, undeletable: Any) -> None:
    """Catches a traceback on NFS, also after the result has its name, and a rest that stays."""
    expected = "pass-1: Directory not empty; the same command resumes"
    with undeletable("pass-1"), pytest.raises(UserError, match=expected):
        clean(["one text"], {"exact_dedup": {}})
    with undeletable("pass-0"):
        assert clean(["one text"], {"exact_dedup": {}})["kept"] == 1
    assert (tmp_path / "out.partial").exists()
    clean(["one text"], {"exact_dedup": {}})
    assert not (tmp_path / "out.partial").exists()


def test_languages_of_what_is_left_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches documents that are dropped by the last step and still counted, and parts that are not added up."""
    monkeypatch.setattr(passes, "_PART_DOCUMENTS", 2)
    rows = [
        {"text": "a text"},
        *({"text": f"text {number}", "language": "zh" if number > 4 else "en"} for number in range(8)),
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"language": None, **row}) + "\n" for row in [*rows, {"text": "x"}])
    )
    tree = {"source": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "out"), "metadata": ["language"]}
    steps = [{"exact_dedup": {}}, {"length": {"min_characters": 2}}]
    found = run.clean(build_config(CleanConfig, {**tree, "steps": steps}), lambda name: [], 1)
    assert (found["kept"], found["languages"]) == (9, {"en": 5, "zh": 3})
    assert "Languages" in (tmp_path / "out" / "report.html").read_text()


def test_each_rule_has_twenty_examples_of_all_parts(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches examples that are the first ones."""
    monkeypatch.setattr(passes, "_PART_DOCUMENTS", 40)
    found = clean([f"{number}" for number in range(400)], {"length": {"min_characters": 10}})
    examples = found["steps"][0]["rules"]["too_few_characters"]["examples"]
    assert len(examples) == 20
    assert len({int(example["text"]) // 40 for example in examples}) > 4
    assert found["kept"] == 0


def test_a_finished_result_is_kept_and_another_one_refused(clean: Any, tmp_path: Path) -> None:
    """Catches a result that is overwritten, or taken for that of another config or source."""
    first = clean(["a text"], {"exact_dedup": {}})
    assert clean(["a text"], {"exact_dedup": {}}) == first
    with pytest.raises(UserError, match="another config or version, or of other sources"):
        clean(["a text"], {"length": {}})
    with pytest.raises(UserError, match="another config or version, or of other sources"):
        clean(["b text"], {"exact_dedup": {}})
    (tmp_path / "out" / "clean.json").write_text("[]")
    with pytest.raises(UserError, match=r"clean.json is damaged; delete .*/out to start over$"):
        clean(["a text"], {"exact_dedup": {}})
    (tmp_path / "out" / "clean.json").unlink()
    with pytest.raises(UserError, match="already holds something that is not cleaned documents"):
        clean(["a text"], {"exact_dedup": {}})


def test_a_folder_in_the_way_is_left_as_it_is(clean: Any, tmp_path: Path) -> None:
    """Catches a cleaning that deletes the unfinished corpus of the same name, or other files in `DIR.partial`, and one
    that was killed in its first write and cannot be started again."""
    other = tmp_path / "out.partial" / "build.json"
    other.parent.mkdir()
    assert clean(["a text"], {"exact_dedup": {}})["kept"] == 1  # empty
    shutil.rmtree(tmp_path / "out")
    other.parent.mkdir()
    (other.parent / ".recipe.json.host.1234").touch()
    assert clean(["a text"], {"exact_dedup": {}})["kept"] == 1
    other.parent.mkdir()
    other.touch()
    clean(["a text"], {"exact_dedup": {}})  # the result is kept
    assert other.exists()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.partial holds something that is no unfinished cleaning; move it, or"):
        clean(["a text"], {"exact_dedup": {}})
    assert list(other.parent.iterdir()) == [other]


@pytest.mark.parametrize("change", ["times", "damage", "no file"])
def test_a_finished_result_is_compared_without_reading(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Catches a crawl that is decompressed for hours to find that its cleaning is finished, and a result of sources of
    other times, or without them, that is taken for that of these sources."""
    found = clean(config, tmp_path / "out")
    monkeypatch.setattr(run, "read_inputs", lambda *_: pytest.fail("the sources are read again"))
    assert clean(config, tmp_path / "out") == found
    recorded = tmp_path / "out" / ".sources.json"
    if change == "times":
        os.utime(tmp_path / "a.txt", ns=(1, 1))
    elif change == "damage":
        recorded.write_text("")
    else:
        recorded.unlink()
    with pytest.raises(UserError, match=r"also if files were changed or copied since; name a new folder or delete it$"):
        clean(config, tmp_path / "out")


def test_sources_of_unknown_versions_are_not_taken_for_the_same(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the old documents of a file on a web server that has changed, but has the same size."""
    monkeypatch.setattr(sources, "stat_file", lambda name: stat_file(name)._replace(version=""))
    clean(config, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"the server of .*/a\.txt gives neither ETag nor Last-Modified, so the file may"
    ):
        clean(config, tmp_path / "out")


def test_a_flipped_bit_is_no_text(tmp_path: Path) -> None:
    """Catches documents without a checksum: of most flipped bits, zstd alone makes other text."""
    path = tmp_path / "a.jsonl.zst"
    write_documents(path, [Document(str(number), "s", f"text {number}") for number in range(200)])
    whole = path.read_bytes()
    for place in range(20, len(whole) - 8, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises((zstandard.ZstdError, ValueError)):
            list(read_documents(path))


def test_results_are_read_in_parallel(tmp_path: Path) -> None:
    """Catches files that `deepcloze corpus` takes for one large part, which a single worker reads."""
    path = tmp_path / "a.jsonl.zst"
    text = random.Random(1).randbytes(2 << 20).hex()
    write_documents(path, [Document("1", "s", text)])
    with path.open("rb") as file:
        assert has_several_members(file, "zst")
    assert [document.text for document in read_documents(path)] == [text]
    write_documents(path, [])
    assert list(read_documents(path)) == []


def test_metadata_count_when_documents_are_compared() -> None:
    """Catches a part with the metadata of before that is kept for sources with other ones."""
    digests = {
        passes._digest([Document("1", "s", "a text", metadata)])
        for metadata in ({}, {"language": "en"}, {"language": "de"})
    }
    assert len(digests) == 3


def test_an_unfinished_cleaning_of_another_text_is_refused(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts of two texts in one result. The file keeps its size."""

    def fail(*arguments: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_join", fail)
        with pytest.raises(KeyboardInterrupt):
            clean(config, tmp_path / "out")
    text, modified = (tmp_path / "a.txt").read_text(), (tmp_path / "a.txt").stat().st_mtime_ns
    (tmp_path / "a.txt").write_text(text.replace("a0", "z0"))
    os.utime(tmp_path / "a.txt", ns=(modified + 1, modified + 1))
    with pytest.raises(UserError, match="another config or version, or of other sources"):
        clean(config, tmp_path / "out")


def test_a_damaged_source_is_repaired_or_left_out(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cleaning that starts over, or that keeps parts of other documents, because of one damaged file."""
    monkeypatch.setattr(formats, "_FEW_INVALID", 0)
    monkeypatch.setattr(formats, "_SHARE_INVALID", 0)
    file, process, done = tmp_path / "b.txt", passes._process, list[int]()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10] + b"\xff" + whole[-9:])

    def recorded(job: Any, part: Any) -> int:
        if part.pass_number == 0:
            done.append(part.number)
        return process(job, part)

    monkeypatch.setattr(passes, "_process", recorded)
    with pytest.raises(UserError, match=r"b\.txt"):
        clean(config, tmp_path / "out")
    shutil.copytree(tmp_path / "out.partial", tmp_path / "short.partial")
    assert done == [*range(11)]
    file.write_bytes(whole)
    assert clean(config, tmp_path / "out") == clean(config, tmp_path / "repaired")
    assert done == [*range(11), 11, *range(12)]
    done.clear()
    first = config.model_copy(update={"source": f"{tmp_path}/a.txt"})
    assert clean(first, tmp_path / "short") == clean(first, tmp_path / "alone")
    assert done == [*range(6)]


@pytest.mark.parametrize("is_killed", [False, True])
def test_parts_of_other_documents_are_made_again(
    config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    """Catches parts of two texts in one result, also if the part of the second one was only begun."""
    whole = (tmp_path / "a.txt").read_text()

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def killed(module: ModuleType, function: str, text: str) -> None:
        (tmp_path / "a.txt").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(module, function, fail)
            with pytest.raises(KeyboardInterrupt):
                clean(config, tmp_path / "out")

    killed(passes, "_merged", whole)
    if is_killed:
        killed(parts, "write_json", whole.replace("a0", "z0"))
        (tmp_path / "a.txt").write_text(whole)
    else:
        (tmp_path / "a.txt").write_text(whole.replace("a0", "z0").replace("a9", "a9 a9"))
    assert clean(config, tmp_path / "out") == clean(config, tmp_path / "fresh")


def test_a_damaged_part_is_one_message(config: CleanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and documents that are lost silently."""
    with monkeypatch.context() as patch:
        patch.setattr(passes, "_decide", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            clean(config, tmp_path / "out")
    for name in ("000001.jsonl.zst", "000001.json", "done.json"):
        path = tmp_path / "out.partial" / "pass-0" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        with pytest.raises(UserError, match=rf"^{path} is damaged; delete {tmp_path}/out.partial to start over$"):
            clean(config, tmp_path / "out")
        path.write_bytes(whole)


def test_a_missing_package_is_one_message(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from a worker."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"steps.0.ftfy: ftfy is not installed; run: pip install 'deepcloze\[clean\]'"):
        clean(["a"], {"ftfy": {}})


def test_a_library_that_fails_names_the_document(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftfy.fix_text", lambda *arguments, **keys: 1 / 0)
    with pytest.raises(UserError, match=r"in.txt:1: the step ftfy fails on this document: ZeroDivisionError"):
        clean(["a", "b"], {"ftfy": {}})


def failing(function: Callable[..., Any], on: str) -> Callable[..., Any]:
    """The function of a library that fails on texts with a word."""

    def call(text: str, *arguments: Any, **keys: Any) -> Any:
        if on in text:
            raise RecursionError(f"too deep {text * 99}")
        return function(text, *arguments, **keys)

    return call


def test_documents_that_a_library_fails_on_are_dropped(
    clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cleaning of millions that one page ends, and one that is lost without being counted."""
    (tmp_path / "pages").mkdir()
    for name in ("sea", "deep", "land", "odd", "empty"):
        body = "" if name == "empty" else f"<p>A page about the {name} and its animals.</p>"
        (tmp_path / "pages" / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    monkeypatch.setattr("trafilatura.extract", failing(trafilatura.extract, "deep"))
    monkeypatch.setattr("ftfy.fix_text", failing(ftfy.fix_text, "odd"))
    found = clean([], {"ftfy": {}}, source=str(tmp_path / "pages"))
    assert (found["read"], found["kept"], found["empty"]) == (4, 2, 1)
    assert [(step["name"], step["read"], step["dropped"]) for step in found["steps"]] == [
        ("markup", 4, 1),
        ("ftfy", 3, 1),
    ]
    for counted, name in zip(found["steps"], ("deep", "odd"), strict=True):
        (example,) = counted["rules"]["failed"]["examples"]
        assert example["id"] == f"{tmp_path}/pages/{name}.html:1"
        assert example["detail"].startswith("RecursionError('too deep ")
        assert len(example["detail"]) == 200
    assert texts_of(tmp_path / "out") == [f"A page about the {name} and its animals." for name in ("land", "sea")]
    assert "failed: 1 of 1 dropped" in (tmp_path / "out" / "report.html").read_text()


def test_a_library_that_fails_on_all_documents_ends_the_cleaning(
    clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a result without documents because a library does not work, and the only document that an earlier step
    has left in a part that ends a cleaning."""
    monkeypatch.setattr("ftfy.fix_text", lambda *arguments, **keys: 1 / 0)
    with pytest.raises(UserError, match=r"in.txt:2: the step ftfy fails on this document: ZeroDivisionError"):
        clean(["a", "two words", "two words"], {"length": {"min_words": 2}}, {"ftfy": {}})
    found = clean(["a", "two words"], {"length": {"min_words": 2}}, {"ftfy": {}})
    assert found["steps"][1]["rules"]["failed"]["dropped"] == 1
    monkeypatch.setattr("trafilatura.extract", lambda *arguments, **keys: 1 / 0)
    for name in "ab":
        (tmp_path / f"{name}.html").write_text("<p>a page</p>")
    with pytest.raises(UserError, match=r"a.html:1: removing markup fails on this document: ZeroDivisionError"):
        clean([], source=str(tmp_path / "*.html"), output=str(tmp_path / "other"))
    clean([], source=str(tmp_path / "a.html"), output=str(tmp_path / "large"))  # a large document is a part of its own


def test_a_disk_error_of_a_step_ends_the_cleaning(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches documents that are dropped because a disk is full."""

    def fail(text: str, **keys: Any) -> str:
        if text == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return text

    monkeypatch.setattr("ftfy.fix_text", fail)
    with pytest.raises(UserError, match=r"^output .*: disk full; the same command resumes"):
        clean(["a", "b"], {"ftfy": {}})


def test_metadata_that_json_lacks(tmp_path: Path) -> None:
    """Catches a TypeError for a date or a decimal number in a column of a Parquet file, and NaN, which most readers of
    JSON refuse."""
    columns = {"text": ["a b"], "day": [date(2024, 1, 31)], "price": [Decimal("1.50")], "score": [[0.5, math.nan]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    tree = {"source": str(tmp_path / "a.parquet"), "output": str(tmp_path / "out"), "metadata": [*columns][1:]}
    run.clean(build_config(CleanConfig, tree), lambda name: [], 1)
    (document,) = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert document.metadata == {"day": "2024-01-31", "price": "1.50", "score": [0.5, None]}


def test_results_can_be_cleaned_again(config: CleanConfig, tmp_path: Path) -> None:
    """Catches report.html and clean.json that are read as documents, in a cleaning of cleaned folders together."""
    run.clean(config, lambda _: [], 1)
    again = build_config(CleanConfig, {"source": config.output, "output": str(tmp_path / "again")})
    assert [source.name for source in find_inputs(again)] == [f"{config.output}/data-00000.jsonl.zst"]


def test_examples_do_not_show_what_is_masked(clean: Any, tmp_path: Path) -> None:
    """Catches a report that publishes the addresses that a step masks."""
    found = clean([f"{'word ' * 100}Write to a.b@c.org at 8.8.8.8", "From x@y.org."], {"pii": {}})
    examples = found["steps"][0]["rules"]["masked"]["examples"]
    shown = sorted(example["text"] for example in examples)
    assert shown[0] == "From email@example.com."
    assert shown[1].endswith("word Write to email@example.com at 192.0.2.1")
    assert not any("after" in example for example in examples)
    for name in ("clean.json", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "email@example.com" in text
        assert not any(address in text for address in ("a.b@c", "x@y", "8.8.8.8"))


def test_examples_of_changed_texts_show_the_change(clean: Any, tmp_path: Path) -> None:
    """Catches examples that show the start of a long text, in which nothing changed, or only the text before."""
    start, end = "word " * 100, "other words " * 100
    found = clean([f"{start}a<br />line{end}", "<b>short"], {"html_tags": {}})
    (rule,) = found["steps"][0]["rules"].values()
    long, short = sorted(rule["examples"], key=lambda example: -len(example["text"]))
    unchanged = f"{start}a"[-80:]
    assert long["text"].startswith(f"…{unchanged}<br />line")
    assert long["after"].startswith(f"…{unchanged}")
    assert "<br" not in long["after"]
    assert max(len(long["text"]), len(long["after"])) == 401
    assert (short["text"], short["after"]) == ("<b>short", "short")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "before:\n&lt;b&gt;short\nafter:\nshort" in page
