"""The section of a report about words that checkpoints fill into held-out sentences."""

from experiment.results.page import Block, Filling, Fillings, Heading, Text
from experiment.run_files.fillings import MaskedSentence, read_fillings, spread
from experiment.run_files.run_folder import RunFolder

_SHOWN = 6  # checkpoints


def filling_blocks(folder: RunFolder) -> list[Block]:
    """Return a section of a report; empty without fillings."""
    if not (checkpoints := spread(read_fillings(folder), _SHOWN)):
        return []
    by_sentence: dict[MaskedSentence, list[tuple[str, list[tuple[str, str]]]]] = {}
    for checkpoint in checkpoints:
        for filled in checkpoint.sentences:
            guesses = [(token, f"{probability:.1%}") for token, probability in filled.top]
            by_sentence.setdefault(filled.sentence, []).append((f"step {checkpoint.step:,}", guesses))
    fillings = [
        Filling(sentence.before, sentence.answer, sentence.after, guesses) for sentence, guesses in by_sentence.items()
    ]
    about = "The marked word is masked. Below: the most probable words of each checkpoint, with their probabilities."
    return [Heading("Held-out sentences"), Text(about), Fillings(fillings)]
