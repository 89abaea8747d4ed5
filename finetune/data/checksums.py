"""Checksums of the files of a task, which tell whether its data have changed."""

from pathlib import Path

from experiment.errors import UserError
from experiment.files import checksum, json_digest
from finetune.data.task_config import TaskConfig


def data_checksums(task: TaskConfig) -> dict[str, str]:
    """Split -> checksum of its file, or of the files in its folder. Raises UserError if one does not exist."""
    return {split: _checksum(f"task.{split}", Path(path)) for split, path in task.files().items()}


def _checksum(key: str, path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return json_digest({str(file.relative_to(path)): checksum(file) for file in files})
    try:
        return checksum(path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
