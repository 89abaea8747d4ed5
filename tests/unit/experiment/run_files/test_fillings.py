from pathlib import Path

from experiment.run_files.fillings import (
    CheckpointFillings,
    FilledSentence,
    MaskedSentence,
    add_fillings,
    drop_fillings,
    read_fillings,
    spread,
)
from experiment.run_files.run_folder import RunFolder, open_run_folder


def filled(step: int, token: str = "x") -> CheckpointFillings:
    return CheckpointFillings(step, "w", (FilledSentence(MaskedSentence("a ", "b", " c"), ((token, 0.5),)),))


def test_fillings_are_read_as_written(tmp_path: Path) -> None:
    """Catches lines that are lost after one that was cut off, and a step twice after it was trained again."""
    folder = open_run_folder(tmp_path)
    assert read_fillings(folder) == []
    add_fillings(folder, filled(20))
    with folder.fillings.open("a") as file:
        file.write('\n{"step": 3, "wei')
    add_fillings(folder, filled(10))
    add_fillings(folder, filled(20, "y"))
    assert read_fillings(folder) == [filled(10), filled(20, "y")]
    drop_fillings(folder, 10)
    add_fillings(folder, filled(30))
    assert read_fillings(folder) == [filled(10), filled(30)]


def test_other_json_is_skipped(tmp_path: Path) -> None:
    """Catches a traceback for a file that was edited."""
    folder = open_run_folder(tmp_path)
    sentence = '{"sentence": {"before": "a", "answer": "b", "after": "c"}, "top": [["x"]]}'
    lines = ("3", "[]", '{"step": 1}', f'{{"step": 1, "weights": "", "sentences": [{sentence}]}}')
    folder.fillings.write_text("\n".join(lines))
    assert read_fillings(folder) == []


def test_checkpoints_are_spread_evenly() -> None:
    """Catches a page without the first or the last checkpoint."""
    assert spread(range(5), 6) == [0, 1, 2, 3, 4]
    assert spread(range(101), 6) == [0, 20, 40, 60, 80, 100]


def test_a_folder_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    """Catches a report of a folder without logs that fails."""
    assert read_fillings(RunFolder(tmp_path / "missing")) == []
