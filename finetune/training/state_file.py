"""The file from which a seed resumes that was interrupted in the middle of its training."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.errors import UserError
from experiment.files import atomic_write

State = dict[str, Any]  # tensors and plain values


@dataclass(frozen=True)
class StateFile:
    """Holds the state of the last evaluation, for a training with these settings."""

    path: Path
    settings: Mapping[str, Any]  # plain values

    def save(self, state: State) -> None:
        """Replace the file atomically."""
        with atomic_write(self.path) as temporary, temporary.open("wb") as file:
            try:
                torch.save({"settings": self.settings, "state": state}, file)
            except RuntimeError as error:  # of torch's writer, which hides what the disk says
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load(self) -> State | None:
        """The last state; None if there is none for these settings. Raises UserError if the file is damaged."""
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            return saved["state"] if saved["settings"] == self.settings else None
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove it to train this seed from the start") from None

    @property
    def steps(self) -> int:
        """Updates until the last state, 0 if there is none."""
        state = self.load()
        return 0 if state is None else int(state["updater"]["steps"])
