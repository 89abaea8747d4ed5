"""Names of the Hub, against a server on this machine."""

import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars, logging

from experiment import progress
from experiment.errors import QUIET_VARIABLE, UserError, warn_once
from experiment.models.hub import call_hub, download_model, resolve_commit
from experiment.models.hub_names import HubName, meant_name
from experiment.models.model_names import local_model, local_tokenizer, record_model
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, write_best
from hub_server import HubServer, cut, status

NAME = HubName("org/bert-base-tiny")
WEIGHTS = bytes(range(256)) * 100
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "vocab.txt": b"[PAD]\n",
    "bpe.codes": b"a b\n",
    "README.md": b"a card",
    "LICENSE": b"a license",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "model.fp16.safetensors": b"other weights",
    "modeling_tiny.py": b"raise SystemExit('code has run')",
    "onnx/model.onnx": b"another format",
    "1_Pooling/config.json": b"{}",
    "2_Dense/model.safetensors": WEIGHTS,
    "2_Dense/pytorch_model.bin": b"a pickle",
    "openvino/config.json": b"{}",
}
ROOT = {"config.json", "tokenizer.json", "vocab.txt", "bpe.codes"}


@pytest.fixture
def commit(hub: HubServer) -> str:
    """The commit of a model."""
    return hub.repository(NAME.repository).push(FILES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(name: str) -> str:
    """The message about a name; a single line."""
    with pytest.raises(UserError) as raised:
        local_model(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bert-base-uncased", HubName("bert-base-uncased")),
        ("org/model.v2", HubName("org/model.v2")),
        ("org/model@v1.0", HubName("org/model", "v1.0")),
        ("model@refs/pr/4", HubName("model", "refs/pr/4")),
        ("/models/bert", None),
        ("../bert", None),
        ("./bert", None),
        ("a/b/c", None),
        ("~/bert", None),
        ("runs/first", None),
        ("here", None),
        ("org/model@", None),
    ],
)
def test_names(text: str, expected: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a path, or a missing one in a folder that exists, for which the Hub is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "here").mkdir()
    assert HubName.of_model(text) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hub:bert-base-chinese", "bert-base-chinese"),
        ("https://huggingface.co/org/bert-base-tiny/", "org/bert-base-tiny"),
        ("https://hf.co/org/bert-base-tiny/tree/v2", "org/bert-base-tiny@v2"),
        ("https://example.com/org/bert-base-tiny", None),
    ],
)
def test_the_address_of_a_page_is_no_name(text: str, name: str | None) -> None:
    """Catches advice on checkpoints in object storage for who gives a page of the Hub, or a model like data."""
    assert meant_name(text) == name


def test_downloads_what_is_needed_and_once(hub: HubServer, commit: str) -> None:
    """Catches pickles, code and other formats on the disk, the merges of PhoBERT's tokenizer or modules of
    sentence-transformers that are missing, and a second download of what is there."""
    assert resolve_commit(NAME) == HubName(NAME.repository, commit)
    folder = download_model(NAME)
    assert folder.name == commit
    assert contents(folder).keys() == ROOT | {"model.safetensors"}
    assert local_model(str(NAME), modules=True) == folder
    modules = {"1_Pooling/config.json", "2_Dense/model.safetensors"}
    assert contents(folder).keys() == ROOT | modules | {"model.safetensors"}
    hub.requests.clear()
    assert local_model(f"{NAME}@{commit}") == local_model(f"{NAME}@{commit}", modules=True) == folder
    assert hub.requests == [], "all files of a commit are known"


def test_a_tokenizer_comes_without_weights(hub: HubServer, commit: str) -> None:
    """Catches gigabytes of weights that nobody reads, and a model that then seems to be complete."""
    assert contents(local_tokenizer(str(NAME))).keys() == ROOT
    assert (local_model(str(NAME)) / "model.safetensors").read_bytes() == WEIGHTS


def test_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    """Catches a corpus that cannot be built with the tokenizer of the run or checkpoint in `model.init_from`."""
    checkpoint = checkpoint_path(tmp_path / "run" / "checkpoints", 2)
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "hf" / "config.json").touch()
    mark_complete(checkpoint)
    write_best(checkpoint.parent, 2)
    for name in (tmp_path / "run", checkpoint, checkpoint.parent / "best", checkpoint / "hf"):
        assert local_tokenizer(str(name)) == checkpoint / "hf"


def test_all_files_are_of_one_commit(hub: HubServer, commit: str) -> None:
    """Catches files of two commits if someone pushes between two requests."""

    def push(path: str) -> None:
        if path != f"/api/models/{NAME}":  # not the first one
            hub.repository(NAME.repository).push({name: b"new " + content for name, content in FILES.items()})

    hub.on_request = push
    folder = download_model(NAME)
    assert folder.name == commit
    assert all(content == FILES[name] for name, content in contents(folder).items())
    assert resolve_commit(NAME).revision != commit


def test_a_run_that_has_begun_keeps_its_commit(hub: HubServer, commit: str) -> None:
    """Catches a resume that takes the newest commit, and a name with another revision that is ignored."""
    recorded = record_model(str(NAME))
    assert recorded == f"{NAME}@{commit}"
    new = hub.repository(NAME.repository).push({**FILES, "vocab.txt": b"new"})
    assert record_model(str(NAME), earlier=recorded) == recorded
    assert record_model(recorded, earlier=f"{NAME}@{new}") == recorded
    for name, earlier in ((f"{NAME}@main", recorded), (f"{NAME}", f"org/other@{commit}"), (f"{NAME}", "/a/folder")):
        assert record_model(name, earlier) == f"{NAME}@{new}"


def test_a_folder_wins(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a download in place of the user's folder, a silent choice, and a warning for each use of the folder; a
    run's folder needs none."""
    warn_once.cache_clear()
    monkeypatch.chdir(tmp_path)
    for folder in ("org/bert-base-tiny", "tokenizer"):
        Path(folder).mkdir(parents=True)
    Path("org/bert-base-tiny/config.json").touch()
    for _ in range(2):
        assert record_model(str(NAME)) == str(tmp_path / "org" / "bert-base-tiny")
    assert caplog.messages == [
        "org/bert-base-tiny: using this folder, not a model of this name on the Hugging Face Hub"
    ]
    assert local_tokenizer("tokenizer") == Path("tokenizer")
    assert len(caplog.messages) == 1
    assert hub.requests == []


@pytest.mark.parametrize("faults", [[cut(1000), cut(5)], [status(429, Retry_After="0")], [status(503)] * 2])
def test_faults_during_a_download(hub: HubServer, commit: str, faults: list) -> None:  # type: ignore[type-arg]
    """Catches a download that is given up after a cut connection or an overloaded server, and a damaged file."""
    hub.fault("model.safetensors", *faults)
    assert (download_model(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.faults == []


def test_a_server_that_is_busy_at_first(hub: HubServer, commit: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a busy server that is taken for a missing model."""
    hub.fault("/api/models/", status(503), status(429))
    assert resolve_commit(NAME).revision == commit
    assert sum("trying again" in message for message in caplog.messages) == 2
    assert hub.faults == []


def test_a_server_that_stays_down(hub: HubServer, commit: str) -> None:
    """Catches an endless wait, or a traceback."""
    hub.fault("/api/", *[status(500)] * 3)
    assert refusal(str(NAME)).startswith(f"{NAME}: no success in 3 attempts: Server error '500 Internal Server Error'")


def test_a_cached_model_needs_no_server(
    hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a start that fails without a network although all files are there, and one that is to be offline and
    warns that it is."""
    folder = download_model(NAME)
    hub.fault("/api/", *[status(503)] * 3)
    assert download_model(NAME) == folder
    hub.faults.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download_model(NAME) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capfd.readouterr()
    assert download_model(NAME) == folder
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("code", [403, 503, None], ids=["refused", "busy", "offline"])
def test_missing_modules(
    hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int | None
) -> None:
    """Catches a model without its pooling after any fault of the Hub, and one that cannot be read without a network for
    lack of modules that only some commands need."""
    folder = download_model(NAME)
    capfd.readouterr()
    if code is None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.fault("1_Pooling/config.json", *[status(code)] * 99)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between the attempts of the library
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set" if code is None else str(NAME)):
        download_model(NAME, modules=True)
    assert ("downloading" in capfd.readouterr().err) == (code is not None)
    assert download_model(NAME) == folder
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("code", [503, None], ids=["busy", "offline"])
def test_unknown_modules(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """Catches the mean for a model whose pooling is not in the cache, since transformers does not need it; and a cache
    of sentence-transformers that is refused."""
    for file in (*ROOT, "model.safetensors"):
        hf_hub_download(NAME.repository, file)
    if code is None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.fault("/tree/", *[status(code)] * 99)
        monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=f"modules of sentence-transformers.*`hf download {NAME} --revision {commit}`$"):
        download_model(NAME, modules=True)
    folder = download_model(NAME)
    (folder / "1_Pooling").mkdir()
    assert download_model(NAME, modules=True) == folder


def test_without_a_network(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that does not say why, or what to do."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(f"{NAME}@v1")
    assert message.startswith(f"{NAME}@v1: no such folder, and no such model in {constants.HF_HUB_CACHE}; cannot reach")
    assert message.endswith(f"with `hf download {NAME.repository} --revision v1`")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "; HF_HUB_OFFLINE is set: download it on a machine with network" in refusal(str(NAME))
    assert "; HF_HUB_OFFLINE is set: " in refusal(f"{NAME}@{commit}")


def test_a_firewall_that_drops_packets(hub: HubServer) -> None:
    """Catches attempts that last for minutes, and a message without the command that downloads the model elsewhere."""

    def fail() -> None:
        raise LocalEntryNotFoundError("cannot find the files") from httpx2.ConnectTimeout("timed out")

    with pytest.raises(UserError, match=rf"cannot reach http.* \(timed out\): .*, with `hf download {NAME}`$"):
        call_hub(NAME, "model", fail)


def test_a_part_of_a_model_in_the_cache(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model without its weights, of which another program has cached the tokenizer."""
    local_tokenizer(str(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "; HF_HUB_OFFLINE is set: " in refusal(str(NAME))


@pytest.mark.parametrize("name", ["org/bert-base-tinny", "bert-base-tiny", "or/bert-base-tiny"])
def test_a_model_that_does_not_exist(hub: HubServer, commit: str, name: str) -> None:
    """Catches a message that does not say where the name was looked up, and more requests than needed."""
    assert refusal(name) == (
        f"{name}: no such folder, and no such model on the Hugging Face Hub (for a private one, log in with "
        "`hf auth login`, or set HF_TOKEN)"
    )
    assert hub.requests == [f"GET /api/models/{name}"]


@pytest.mark.parametrize("revision", ["v1.1", "0" * 40])
def test_a_revision_that_does_not_exist(hub: HubServer, commit: str, revision: str) -> None:
    """Catches a missing revision that is reported as a missing model."""
    assert refusal(f"{NAME}@{revision}") == f"{NAME}@{revision}: there is no revision '{revision}'"


def test_restricted_and_private_models(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that does not say how to get access, and one that has the token."""
    repository = hub.repository(NAME.repository)
    repository.gated = True
    assert refusal(str(NAME)) == (
        f"{NAME}: access is restricted: accept the conditions at {hub.url}/{NAME}, then log in with `hf auth login`, "
        "or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fault("/api/", status(401, X_Error_Message="Invalid credentials in Authorization header"))
    assert refusal(str(NAME)) == (
        f"{NAME}: the Hugging Face Hub rejects the token: log in with `hf auth login`, or set HF_TOKEN to another one"
    )
    repository.private = True
    assert download_model(NAME).name == commit
    assert set(hub.tokens) == {"hf_secret"}


def test_weights_in_other_formats(hub: HubServer) -> None:
    """Catches a pickle that is read, or a model that seems to have no weights for another reason."""
    hub.repository("old").push({"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    assert refusal("old@main") == (
        "old@main: there are no weights in safetensors (model.safetensors) on the Hugging Face Hub; others, such as "
        "pytorch_model.bin, are not read: a pickle may run code. If you trust it, run `hf download old "
        "--revision main --local-dir FOLDER` and name FOLDER; or name a pull request with safetensors, if there is "
        "one: old@refs/pr/N"
    )
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.bin"))
    hub.repository("empty").push({"README.md": b"nothing"})
    assert refusal("empty").startswith("empty: there is neither a config.json nor a tokenizer")


def test_an_onnx_model(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that `deepcloze export --format onnx --push` wrote and no command can use, and a download of both
    formats."""
    model = {name: FILES[name] for name in ROOT} | {"model.onnx": b"a graph", "model.onnx.data": WEIGHTS}
    hub.repository("onnx").push(model)
    assert refusal("onnx").startswith("onnx: there are no weights in safetensors (model.safetensors) on the Hugging")
    assert contents(local_model("onnx", onnx=True)) == model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert contents(local_model("onnx", onnx=True)) == model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repository("both").push({**model, "model.safetensors": WEIGHTS})
    assert contents(local_model("both", onnx=True)).keys() == ROOT | {"model.safetensors"}


def test_a_cache_that_cannot_be_written(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for a full disk or a folder of another user."""
    file = Path(constants.HF_HUB_CACHE)
    file.touch()
    assert refusal(str(NAME)).startswith(f"{NAME}: cannot write {file}: ")


def test_a_download_is_one_line(hub: HubServer, commit: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches progress bars in a log file, and a line for what is cached."""
    download_model(NAME)
    download_model(NAME)
    assert capfd.readouterr() == ("", f"deepcloze: downloading {NAME}@{commit} from the Hugging Face Hub\n")


def test_a_caller_keeps_the_settings_of_huggingface_hub(
    hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a notebook whose own downloads show no bar, and whose warnings are hidden, after a lookup of ours."""
    level = logging.get_verbosity()
    enable_progress_bars()
    resolve_commit(NAME)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    resolve_commit(NAME)
    assert not are_progress_bars_disabled()
    assert logging.get_verbosity() == level
    monkeypatch.setattr(progress, "terminal", lambda: SimpleNamespace(is_interactive=False, is_jupyter=True))
    assert call_hub(NAME, "model", are_progress_bars_disabled) is False
    monkeypatch.setenv(QUIET_VARIABLE, "1")
    assert call_hub(NAME, "model", are_progress_bars_disabled) is True
