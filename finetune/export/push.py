"""Push an exported folder to a repository of the Hugging Face Hub."""

import shlex
from contextlib import suppress
from pathlib import Path

from experiment.errors import UserError
from experiment.models.hub import LOG_IN, call_hub
from experiment.models.hub_names import HubName
from experiment.run_files.provenance import ORIGIN_FILE, read_origin

_EMPTY = {".gitattributes"}  # files of a repository that has just been created


def parse_target(text: str) -> HubName:
    """Parse OWNER/NAME. Raises UserError for any other text."""
    name = HubName.parse(text)
    if name is None or name.revision is not None or "/" not in name.repository:
        raise UserError(f"--push {text}: expected OWNER/NAME, the owner being a user or an organization")
    return name


def check_target(name: HubName, source: Path, private: bool, overwrite: bool) -> None:
    """Raise UserError without a token, for a repository that holds another model unless `overwrite`, and for a public
    one if `private`. source: the model folder; models of the same run may replace each other."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError(f"--push {name}: there is no token: {LOG_IN}")

    def find() -> tuple[set[str], bool] | None:
        with suppress(RepositoryNotFoundError):
            found = HfApi().model_info(name.repository)
            return {file.rfilename for file in found.siblings or ()}, bool(found.private)
        return None

    if (found := call_hub(name, "model", find)) is None:
        return
    files, is_private = found
    if private and not is_private:
        raise UserError(f"--push {name}: this repository is public, so --private cannot apply; choose another name")
    if files <= _EMPTY or overwrite or (ORIGIN_FILE in files and _run_of_repository(name) == _run_of(source)):
        return
    raise UserError(f"--push {name}: this repository holds another model; choose another name, or add --overwrite")


def _run_of(model: Path) -> str | None:
    origin = read_origin(model)
    return None if origin is None else str(origin["run_id"])


def _run_of_repository(name: HubName) -> str:
    from huggingface_hub import hf_hub_download

    return _run_of(Path(call_hub(name, "model", lambda: hf_hub_download(name.repository, ORIGIN_FILE))).parent) or ""


def push_folder(folder: Path, name: HubName, private: bool) -> str:
    """Create the repository if it does not exist, and let it have exactly the files of the folder. Returns its URL.
    Raises UserError."""
    from huggingface_hub import HfApi, constants

    def push() -> None:
        api = HfApi()
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        message = "Upload a model with deepcloze export"
        api.upload_folder(repo_id=name.repository, folder_path=folder, commit_message=message, delete_patterns="*")

    try:
        call_hub(name, "model", push)
    except UserError as error:
        flags = [*(["--private"] if private else []), "--delete", "*"]
        command = shlex.join(["hf", "upload", str(name), str(folder), ".", *flags])
        raise UserError(f"--push {error}. The folder is complete: `{command}` uploads it") from None
    return f"{constants.ENDPOINT}/{name}"
