"""Names of models on the Hugging Face Hub, in paths of its cache and of users."""

import re
from pathlib import Path

HUB_CACHE = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?/snapshots(?:/|$)")
"""In the path of a model in transformers' cache: its organization and name, or its name alone."""
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)(/[\w.-]+)?")


def hub_name(folder: str) -> str | None:
    """The name of a model on the Hub, if its folder is in transformers' cache."""
    found = HUB_CACHE.search(folder)
    return "/".join(part for part in found.groups() if part) if found else None


def public_name(folder: str) -> str:
    """The name of a folder; in transformers' cache with the folders above it that name the model."""
    found = HUB_CACHE.search(folder)
    return folder[found.start() :] if found else Path(folder).name


def download_hint(path: Path) -> str:
    """The end of a message about a path that does not exist, if it may be the name of a model on the Hub."""
    if not _NAME.fullmatch(str(path)) or (path.parent != Path() and path.parent.exists()):
        return ""
    return f"; to use a model of the Hugging Face Hub, download it: `hf download {path} --local-dir FOLDER`"
