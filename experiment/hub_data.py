"""Data sets of the Hugging Face Hub, and local folders, as the library `datasets` loads them. Only this module imports
it.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from experiment.errors import UserError, first_line, user_errors_in
from experiment.models.hub import download_elsewhere, resolve_commit
from experiment.models.hub_names import HubName
from experiment.progress import without_bars

if TYPE_CHECKING:
    import datasets

PREFIX = "hub:"


class HubData(NamedTuple):
    """A split of a data set, written hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT], or hub:FOLDER[:SPLIT]."""

    name: str  # with the configuration; or a folder
    revision: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> Self:
        """text: begins with hub:. Raises UserError for an empty name."""
        # NAME may be a local folder, but not one with a colon.
        name, _, split = text.removeprefix(PREFIX).partition(":")
        if not name:
            raise UserError(f"{text}: expected {PREFIX}NAME or {PREFIX}NAME:SPLIT")
        name, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
        return cls(name, revision or None, split or "train")

    @property
    def repository(self) -> tuple[str, str | None]:
        """The name of the repository or the folder, and the configuration, if one is named."""
        if self.is_folder:
            return self.name, None
        owner, _, rest = self.name.partition("/")
        name, _, configuration = rest.partition("/")
        return (f"{owner}/{name}", configuration) if configuration else (self.name, None)

    @property
    def is_folder(self) -> bool:
        return Path(self.name).exists()

    def absolute(self) -> Self:
        """Return the same with the absolute path of a folder."""
        return self._replace(name=str(Path(self.name).absolute()))

    def pinned(self, earlier: Iterable[Self] = ()) -> Self:
        """Return the same with the commit that its revision is now; without a revision, with the one that a data set of
        the same name has in `earlier`. Raises UserError."""
        if self.is_folder:
            return self
        if self.revision is None and (same := [data for data in earlier if data.name == self.name]):
            return self._replace(revision=same[0].revision)
        name = HubName(self.repository[0], self.revision)
        with user_errors_in(str(self)):
            return self._replace(revision=resolve_commit(name, "dataset").revision)

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{'' if self.revision is None else f'@{self.revision}'}:{self.split}"


def public_data_name(path: str) -> str:
    """Return the name of a file or folder, without the local folders above it, or of a data set of the Hub."""
    return path if path.startswith(PREFIX) and not HubData.parse(path).is_folder else Path(path).name


@cache
def load_rows(data: HubData) -> "datasets.Dataset":
    """Return the rows of a split. Raises UserError if it cannot be loaded."""
    import datasets
    import huggingface_hub.utils

    repository, configuration = data.repository
    try:
        with without_bars(datasets.utils), without_bars(huggingface_hub.utils):
            builder = datasets.load_dataset_builder(repository, configuration, revision=data.revision)
            if data.revision not in (None, builder.hash):  # datasets falls back to any commit that is cached
                raise UserError(f"{data}: cannot be downloaded now; the cache has commit {builder.hash} only")
            builder.download_and_prepare()
            return builder.as_dataset(data.split)
    except UserError:
        raise
    except Exception as error:  # each cause (network, split, bad file) has its own exception
        is_offline = type(error).__name__ in ("ConnectionError", "ConnectError", "ConnectTimeout")
        advice = f"; {download_elsewhere(HubName(repository, data.revision), 'dataset')}" if is_offline else ""
        raise UserError(f"{data}: datasets cannot load it: {first_line(error)}{advice}") from None


def read_cells(rows: "datasets.Dataset", columns: Sequence[str], part: slice = slice(None)) -> Iterator[list[Any]]:
    """Yield the cells of each row. Labels have their names, and None in place of -1, which stands for a missing one."""
    features = [rows.features[column] for column in columns]
    chosen = rows.select_columns(list(columns)).select(range(len(rows))[part])
    for batch in chosen.iter(batch_size=1000):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            yield [_named(feature, cell) for feature, cell in zip(features, cells, strict=True)]


def _named(feature: Any, cell: Any) -> Any:
    if (names := getattr(feature, "names", None)) is not None:
        return None if cell in (None, -1) else names[cell]
    inner = getattr(feature, "feature", None)
    return [_named(inner, part) for part in cell] if inner is not None and isinstance(cell, list) else cell
