from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.recipes import all_recipes, find_config, find_recipe
from launcher.cli import main
from pretrain.engine.deepspeed_settings import find_ds_config


def test_every_recipe_is_listed_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a recipe without a comment at its top, and a summary cut off in a sentence."""
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert len(all_recipes()) > 15
    for recipe in all_recipes():
        assert f"  {recipe.name} " in listed
        assert recipe.summary.endswith((".", "?")), recipe
        assert len(recipe.summary) < 400


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches names that work in a source checkout only, and a recipe that hides a user's file."""
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("roberta-base", "pretrain")).is_file()
    assert find_config("runs/mine", "pretrain") == "runs/mine", "a path is left as it is"
    assert find_config("mine.yaml", "pretrain") == "mine.yaml"
    (tmp_path / "roberta-base").mkdir()
    assert Path(find_config("roberta-base", "pretrain")).is_file(), "a folder is no config"
    (tmp_path / "roberta-base").rmdir()
    (tmp_path / "roberta-base").touch()
    assert find_config("roberta-base", "pretrain") == "roberta-base"
    with pytest.raises(UserError, match="no file and no recipe 'cola'"):
        find_config("cola", "pretrain")
    assert Path(find_config("cola", "pretrain", "finetune")).is_file()
    with pytest.raises(UserError, match="did you mean 'modernbert-base'"):
        find_recipe("modern-bert-base")
    with pytest.raises(UserError, match="expected pretrain/demo or finetune/demo"):
        find_recipe("demo")
    assert find_recipe("finetune/demo").kind == "finetune"


def test_a_recipe_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an edited config that is overwritten."""
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "cola", "my-task.yaml"]) == 0
    assert "deepcloze finetune --config my-task.yaml" in capsys.readouterr().out
    copied = (tmp_path / "my-task.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "show", "cola"]) == 0
    assert capsys.readouterr().out == copied
    assert main(["recipes", "cp", "cola", "my-task.yaml"]) == 2
    assert "my-task.yaml exists already" in capsys.readouterr().err
    assert main(["recipes", "cp", "cola"]) == 0
    assert (tmp_path / "cola.yaml").read_text(encoding="utf-8") == copied
    assert main(["recipes", "cp"]) == 2


@pytest.mark.parametrize("name", ["bf16_zero1", "ds_configs/bf16_zero1.json"])
def test_a_preset_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches presets that are found by a path in the repository only."""
    monkeypatch.chdir(tmp_path)
    assert find_ds_config(name).name == "bf16_zero1.json"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetune", "--config", "COLA.yaml", "--training-lr", "1"], "did you mean '--training.lr'?"),
        (["validate", "ROBERTA.yaml"], "corpus.train: "),
        (["validate", "ROBERTA.yaml", "--optimizer.lr=fast"], "optimizer.lr"),
        (["validate", "COLA.yaml"], "model.init_from: "),
    ],
)
def test_a_mistaken_config_is_recognized(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    """Catches a list of unknown keys in place of the mistake."""
    monkeypatch.chdir(tmp_path)
    main(["recipes", "cp", "cola", "COLA.yaml"])
    main(["recipes", "cp", "roberta-base", "ROBERTA.yaml"])
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
