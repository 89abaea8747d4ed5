"""Find a DeepSpeed JSON: a file, or one of the presets in ds_configs/."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from experiment.config import did_you_mean
from experiment.config.field_types import PathText
from experiment.files import REPOSITORY


def find_ds_config(name: str) -> Path:
    """Find `name` as a path from the working directory, else from the repository, else a preset. Raises ValueError."""
    presets = _presets()
    for path in (Path(name).absolute(), REPOSITORY / name, presets.get(name)):
        if path is not None and path.is_file():
            return path
    known = did_you_mean(Path(name).stem, [preset for preset in presets if "offload" not in preset])
    raise ValueError(f"there is no file and no preset '{name}'{known}")


def preset_or_path(path: Path) -> str:
    """Return the name of a preset, whose path depends on the installation, or the path of another file."""
    return path.stem if path.parent == REPOSITORY / "ds_configs" else str(path)


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))}


def _check_preset(name: str) -> str:
    """Refuse unknown presets. A file is looked for later: a config may be read on a machine that lacks it."""
    if not Path(name).suffix and len(Path(name).parts) == 1:
        find_ds_config(name)
    return name


DsConfig = Annotated[PathText, AfterValidator(_check_preset), Field(examples=list(_presets()))]
"""A DeepSpeed JSON, in a config. Editors complete the names of presets."""
