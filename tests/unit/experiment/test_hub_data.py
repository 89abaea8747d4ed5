"""Data sets of the Hub, against a server on this machine."""

import time
from pathlib import Path

import datasets.utils
import pytest
from huggingface_hub import HfFileSystem, constants, snapshot_download

from experiment.errors import UserError
from experiment.hub_data import HubData, load_rows, read_cells
from experiment.storage import open_url
from hub_server import HubServer, use_hub_for_data
from pretrain.corpus.documents import read_documents
from pretrain.corpus.formats import ReadStats
from pretrain.corpus.options import TextOptions
from pretrain.corpus.sources import Span, find_sources

NAME = "org/reviews"
CARD = b"""---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
---
"""


def files(*rows: tuple[str, int]) -> dict[str, bytes]:
    lines = [f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows]
    return {"README.md": CARD, "train.jsonl": "".join(lines).encode()}


@pytest.fixture
def commit(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit of a data set."""
    use_hub_for_data(monkeypatch, hub.url, tmp_path / "data-cache")
    load_rows.cache_clear()
    return hub.repository(NAME, "dataset").push(files(("a", 1), ("b", 0), ("c", -1)))


def texts(source: str) -> list[str]:
    spans = map(Span, find_sources(source))
    return [document.text for document in read_documents(spans, TextOptions(), ReadStats())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:glue", HubData("glue")),
        ("hub:org/set:test", HubData("org/set", None, "test")),
        ("hub:org/set/small@v1:validation", HubData("org/set/small", "v1", "validation")),
        ("hub:org/set@refs/convert/parquet", HubData("org/set", "refs/convert/parquet")),
    ],
)
def test_names(text: str, expected: HubData) -> None:
    """Catches a configuration, a revision or a split that is taken for another part of the name."""
    assert HubData.parse(text) == expected
    assert HubData.parse(str(expected)) == expected
    assert expected.repository == (("org/set", "small") if "small" in text else (expected.name, None))


def test_rows_are_of_one_commit(hub: HubServer, commit: str) -> None:
    """Catches a revision that is ignored, rows of another commit, and labels that are numbers."""
    data = HubData.parse(f"hub:{NAME}").pinned()
    assert str(data) == f"hub:{NAME}@{commit}:train"
    new = hub.repository(NAME, "dataset").push(files(("new", 1)))
    assert list(read_cells(load_rows(data), ["text", "label"])) == [["a", "good"], ["b", "bad"], ["c", None]]
    assert not datasets.utils.are_progress_bars_disabled(), "the choice of the caller"
    (source,) = find_sources(f"hub:{NAME}")
    assert source.version == new
    assert texts(f"hub:{NAME}") == ["new"]
    assert texts(f"hub:{NAME}@{commit}:train") == ["a", "b", "c"]
    assert HubData(NAME, split="test").pinned([data]).revision == commit, "all splits of a data set are of one commit"


def test_another_commit_in_the_cache(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of another commit: datasets loads any that is cached if it cannot reach the one it is asked for."""
    load_rows(HubData.parse(f"hub:{NAME}").pinned())
    data = HubData(NAME, hub.repository(NAME, "dataset").push(files(("new", 1))))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^{data}: cannot be downloaded now; the cache has commit {commit} only"):
        load_rows(data)
    load_rows.cache_clear()
    assert len(load_rows(HubData(NAME, commit))) == 3


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """Catches advice that does not help: datasets does not read what `hf download` has cached."""
    snapshot_download(NAME, repo_type="dataset")
    snapshot_download(NAME, repo_type="dataset", local_dir=tmp_path / "reviews")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the attempts of the libraries
    for source, name in (("org/none", "org/none"), (NAME, f"{NAME} --revision {commit}")):
        with pytest.raises(UserError) as raised:
            texts(f"hub:{source}")
        command = f"hf download {name} --repo-type dataset --local-dir FOLDER"
        assert str(raised.value).endswith(f"with `{command}` and use `hub:FOLDER:SPLIT`")
    assert texts(f"hub:{tmp_path / 'reviews'}:train") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:", "--source hub:: expected hub:NAME or hub:NAME:SPLIT"),
        ("hub:org/reviws", "--source hub:org/reviws:train: org/reviws: .* no such dataset on the Hugging Face Hub"),
        ("hub:org/reviews@v2", "--source hub:org/reviews@v2:train: org/reviews@v2: there is no revision 'v2'"),
        ("hub:org/reviews:dev", 'hub:org/reviews@.*:dev: datasets cannot load it: Unknown split "dev"'),
    ],
)
def test_mistakes(commit: str, source: str, message: str) -> None:
    """Catches a traceback or several lines."""
    with pytest.raises(UserError, match=f"^{message}") as raised:
        texts(source)
    assert "\n" not in str(raised.value)


def test_files_by_url(hub: HubServer) -> None:
    """Catches URLs that begin with hf:// and cannot be listed, read in ranges, or told from missing ones."""
    HfFileSystem.clear_instance_cache()  # of another test's server
    hub.repository(NAME, "dataset").push({"a.txt": b"one\ntwo\n", "b.md": b"none"})
    url = f"hf://datasets/{NAME}"
    assert texts(f"{url}/*.txt") == texts(f"{url}/a.txt") == ["one", "two"]
    assert [source.name for source in find_sources(url)] == [f"{url}/a.txt"]
    with open_url(f"{url}/a.txt", start=4) as file:
        assert file.read() == b"two\n"
    with pytest.raises(UserError, match=r"hf://datasets/org/none/a.txt does not exist"):
        find_sources("hf://datasets/org/none/a.txt")
