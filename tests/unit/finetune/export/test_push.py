"""`deepcloze export --push`, against a server on this machine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_server import HubServer, status
from launcher.cli import main

NAME = "me/encoder"
TOKEN = "hf_secret"
Push = Callable[..., str]


@pytest.fixture
def model(tmp_path: Path, encoder: Path) -> Callable[[str], Path]:
    """Makes a model folder of a run."""

    def make(run: str) -> Path:
        folder = shutil.copytree(encoder, tmp_path / f"model-{run}", dirs_exist_ok=True)
        origin = {"run_id": run, "folder": run, "step": 10, "ancestors": []}
        (folder / "deepcloze.json").write_text(json.dumps(origin))
        return folder

    return make


@pytest.fixture
def push(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Push:
    """Calls `deepcloze export --push`; returns stdout, or the one line of an error."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def command(model: Path, *flags: str) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        capfd.readouterr()
        code = main(["export", "--checkpoint", str(model), "--output", str(tmp_path / "out"), "--push", NAME, *flags])
        out, err = capfd.readouterr()
        assert TOKEN not in out + err
        assert code == 0 or (code == 2 and err.startswith("deepcloze: ") and err.count("\n") == 1), err
        return out if code == 0 else err.removeprefix("deepcloze: ").strip()

    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_repository_has_the_folder(
    hub: HubServer, push: Push, model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches files that are missing or left from before, a private model that is published, a later model of a run
    that is refused, and a card for a folder of this machine."""
    out = tmp_path / "out"
    assert push(model("a"), "--private").splitlines()[-1] == f"{out} -> {hub.url}/{NAME}"
    repository = hub.repository(NAME)
    assert repository.private
    assert repository.files == contents(out)
    assert {"README.md", "config.json", "model.safetensors", "vocab.txt"} <= repository.files.keys()
    card = repository.files["README.md"].decode()
    assert f"# {NAME}\n" in card
    assert f'model = "{NAME}"\n' in card

    repository.push({**repository.files, "old.onnx": b"left from before"})
    (model("a") / "added_tokens.json").write_text("{}")
    push(model("a"))
    assert repository.files == contents(out)
    assert "added_tokens.json" in repository.files


@pytest.mark.soak
def test_an_onnx_model_is_pushed(hub: HubServer, push: Push, model: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches an ONNX model that is left out, or weights of PyTorch beside it."""
    push(model("a"), "--format", "onnx")
    files = hub.repository(NAME).files
    assert files == contents(tmp_path / "out")
    assert {"README.md", "config.json", "model.onnx"} <= files.keys()
    assert "model.safetensors" not in files


def test_another_model_is_kept(hub: HubServer, push: Push, model: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a model that is overwritten by a typing mistake, and work before it is refused."""
    repository = hub.repository(NAME)
    repository.push({".gitattributes": b""})
    push(model("a"))
    for files in (repository.files, {"config.json": b"of another program"}):
        repository.push(files)
        message = f"--push {NAME}: this repository holds another model; choose another name, or add --overwrite"
        assert push(model("b")) == message
        assert not (tmp_path / "out").exists()
        assert repository.files == files
    push(model("b"), "--overwrite")
    assert repository.files == contents(tmp_path / "out")


def test_private_cannot_be_ignored(hub: HubServer, push: Push, model: Callable[[str], Path]) -> None:
    """Catches a model that is published although it should be private."""
    push(model("a"))
    assert push(model("a"), "--private").startswith(f"--push {NAME}: this repository is public")


def test_faults_of_the_hub(hub: HubServer, push: Push, model: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches an upload that is given up too early, and a message without what is left to do, or with a command that
    publishes a private model, leaves files of another one, or cannot be copied to a shell."""
    hub.fault("/commit/", status(502))
    push(model("a"))
    assert hub.repository(NAME).files == contents(tmp_path / "out")
    hub.fault("/commit/", status(403))
    assert push(model("a")) == (
        f"--push {NAME}: the token does not allow this: log in with `hf auth login`, or set HF_TOKEN to one that does. "
        f"The folder is complete: `hf upload {NAME} {tmp_path / 'out'} . --delete '*'` uploads it"
    )
    hub.fault("/commit/", status(403))
    folder = tmp_path / "the model"
    assert push(model("a"), "--push", "me/private", "--private", "--output", str(folder)).endswith(
        f"The folder is complete: `hf upload me/private '{folder}' . --private --delete '*'` uploads it"
    )


def test_mistakes(push: Push, model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a mistake that is found only after the export."""
    folder = model("a")
    monkeypatch.delenv("HF_TOKEN")
    assert push(folder) == f"--push {NAME}: there is no token: log in with `hf auth login`, or set HF_TOKEN"
    assert push(folder, "--push", "encoder").startswith("--push encoder: expected OWNER/NAME")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(folder) == f"--push {NAME}: HF_HUB_OFFLINE is set"
    assert not (tmp_path / "out").exists()
    assert main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--private"]) == 2
