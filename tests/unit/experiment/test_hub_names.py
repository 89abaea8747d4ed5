from pathlib import Path

import pytest

from experiment.hub_names import download_hint


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased", "org/model.v2"])
def test_the_name_of_a_model_on_the_hub_comes_with_how_to_download_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a message about a missing folder that does not say where to get it."""
    monkeypatch.chdir(tmp_path)
    assert f"`hf download {name} --local-dir FOLDER`" in download_hint(Path(name))


@pytest.mark.parametrize("name", ["/models/bert", "../bert", "./a/b/c", "runs/first", "~/bert"])
def test_a_path_is_not_taken_for_a_model_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice to download a folder that is only misspelt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert download_hint(Path(name)) == ""
