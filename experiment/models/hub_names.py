"""Names on the Hugging Face Hub, as users write them and as paths of its cache contain them."""

import re
from pathlib import Path
from typing import NamedTuple, Self

HUB_CACHE = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?/snapshots(?:/|$)")
"""Matches the organization and name, or the name alone, in the path of a model in transformers' cache."""
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_FORM = re.compile(
    r"(?:hub:|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)([\w.-]+(?:/[\w.-]+)?)(?:/tree/([\w.-]+))?/?"
)


class HubName(NamedTuple):
    """A repository of the Hub, written NAME or NAME@REVISION."""

    repository: str
    revision: str | None = None  # branch, tag or commit; None: the default branch

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a name; None for a text that cannot be one."""
        found = _NAME.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    @classmethod
    def of_model(cls, text: str) -> Self | None:
        """Like `parse`, but None for a path too: one that exists, or whose folder exists."""
        name, path = cls.parse(text), Path(text)
        is_path = path.exists() or (path.parent != Path() and path.parent.exists())
        return None if is_path else name

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, so that the name always means the same files."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def may_mean(self, pinned: str | None) -> bool:
        """Return whether a run that was started with this name may have recorded `pinned`, the name with a commit."""
        other = None if pinned is None else HubName.parse(pinned)
        same_revision = not self.is_commit or other is None or self.revision == other.revision
        return other is not None and other.is_commit and other.repository == self.repository and same_revision

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def meant_name(text: str) -> str | None:
    """Return the name of the model whose page on the Hub has this address, or that is written like data, as
    hub:NAME."""
    found = _OTHER_FORM.fullmatch(text)
    return str(HubName(*found.groups())) if found else None


def hub_name(folder: str) -> str | None:
    """Return the name of a model on the Hub, if its folder is in transformers' cache."""
    found = HUB_CACHE.search(folder)
    return "/".join(part for part in found.groups() if part) if found else None


def public_name(folder: str) -> str:
    """Return the name of a folder; in transformers' cache with the folders above it that name the model."""
    found = HUB_CACHE.search(folder)
    return folder[found.start() :] if found else Path(folder).name
