import io

from rich.console import Console

from finetune.results.epoch_table import print_epochs


def test_the_table_fits_a_terminal() -> None:
    """Catches figures that are cut or wrapped on 80 columns, which then read as other figures."""
    scores = dict.fromkeys(("accuracy", "macro_f1", "weighted_f1", "uar", "matthews"), 0.51234)
    rows = [
        {"epoch": epoch, "steps": 12_345, "train_loss": 0.1234, "validation_loss": 12.3456, **scores, "seconds": 1234.5}
        for epoch in (0.5, 1)
    ]
    text = io.StringIO()
    print_epochs(Console(file=text, width=80), "seed 7", rows, best_epoch=1)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "seed 7"
    assert [line.split() for line in lines[-2:]] == [
        [epoch, "12,345", "0.1234", "12.3456", *["0.5123"] * 5, "1234.5"] for epoch in ("0.5", "1")
    ]
