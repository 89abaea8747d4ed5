"""A fastText model that tells languages."""

from pathlib import Path

import numpy as np


def write_language_model(model: Path) -> None:
    """Write a model of English and German words. It is not trained: in this wheel training starts from memory that is
    not initialized."""
    import fasttext

    words = {"__label__en": ("the", "and", "of", "with"), "__label__de": ("der", "und", "von", "mit")}
    text = model.with_suffix(".txt")
    text.write_text("".join(f"{label} {' '.join(words[label])}\n" for label in words))
    made = fasttext.train_supervised(str(text), dim=2, epoch=0, minCount=1, verbose=0, thread=1, bucket=1)
    labels = made.get_labels()
    vectors = [[10.0 * (word in words[label]) for label in labels] for word in made.get_words()]
    made.set_matrices(np.array(vectors, dtype=np.float32), np.eye(2, dtype=np.float32))
    made.save_model(str(model))
