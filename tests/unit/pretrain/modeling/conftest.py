"""Models to try things on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from model_examples import Example, make_example


@pytest.fixture(scope="session")
def example(wordpiece_corpus: Path, byte_level_corpus: Path) -> Callable[[str], Example]:
    """Model type -> Example; the corpus of RoBERTa is byte-level."""
    return lambda model_type: make_example(
        model_type, byte_level_corpus if model_type == "roberta" else wordpiece_corpus
    )
