"""The validation of a config in the process of the caller."""

from pathlib import Path

import pytest
import transformers.utils

from experiment.errors import UserError
from launcher.run_sets.validation import validate_finetuning


def test_transformers_is_left_as_it_is(tmp_path: Path) -> None:
    """Catches `deepcloze.compare` after which transformers finds no scipy in the process of the caller."""
    before = transformers.utils.is_scipy_available
    config = tmp_path / "a.yaml"
    config.write_text("{}")
    with pytest.raises(UserError, match="are missing"):
        validate_finetuning(str(config), {}, None)
    assert transformers.utils.is_scipy_available is before
