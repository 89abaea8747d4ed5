"""How commands, config keys and recipes are described to a reader and a shell."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from experiment.config.recipes import all_recipes, find_config, find_recipe
from experiment.config.reference import config_reference
from experiment.errors import UserError
from launcher.cli import main
from launcher.commands import COMMANDS
from launcher.completion import completion_script
from launcher.configs import CONFIGS
from pretrain.ds_configs import find_ds_config


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_is_documented(kind: str) -> None:
    """Catches a key or section without a docstring, which the reference would show with no meaning, and one that refers
    to a key as a flag."""
    for section in config_reference(CONFIGS[kind]):
        assert section.meaning or section.name == section.keys[0].name
        for key in section.keys:
            assert key.meaning.endswith("."), key.name
            assert "--" not in re.sub(r"`deepcloze .*?`", "", key.meaning), key.name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config pretrain", ["schedule: The learning-rate schedule", "optimizer.lr", "schedule.stages[].steps"]),
        ("config pretrain optimizer", ["optimizer: The update rule.", "optimizer.betas", "[0.9, 0.98]"]),
        ("config pretrain optimizer.lr", ["Peak learning rate", "(a number > 0; default: 0.0005)"]),
        ("config pretrain run.dir", ["Run folder", "(text; required)"]),
        ("config pretrain schedule.stages", ["a list of mappings", "schedule.stages[].steps"]),
        ("config pretrain schedule.stages.steps", ["schedule.stages[].steps"]),
        ("config clean steps.minhash", ["steps[].minhash.threshold", "default: 0.8"]),
        ("config compare rows", ["rows.NAME.init_from", "(text; required)"]),
        ("config finetune task.columns", ["task.columns.label", "task.columns.text_pair"]),
        ("config finetune task.metric", ["'accuracy', 'macro_f1', 'weighted_f1', 'uar' or 'matthews'"]),
    ],
)
def test_config_explains_keys(line: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key that `deepcloze config` does not find, or shows without its type, default or meaning."""
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert all(part in " ".join(printed.split()) for part in expected)
    assert max(map(len, printed.splitlines())) <= 100
    if line.endswith("optimizer.lr"):
        assert "optimizer.betas" not in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config pretrain lr", "unknown config key 'lr'; did you mean 'optimizer.lr'?"),
        ("config pretrain optimiser", "unknown config key 'optimiser'; did you mean 'optimizer'?"),
        ("config finetune schedule.steps", "unknown config key 'schedule.steps'"),
        ("config finetune training.eval_steps", "unknown config key 'training.eval_steps'; known: adam_eps, "),
        ("config finetune training.per_device_train_batch_size", "; known: adam_eps, batch_size, "),
        ("config finetune training.seed", "did you mean 'training.seeds'?"),
        ("config finetune training.layer_decay", "unknown config key 'training.layer_decay'; known: adam_eps, "),
        ("config finetune training.lr_scheduler_type", "; known: adam_eps, batch_size, "),
        ("config clean decontaminate", "did you mean 'steps.decontaminate'?"),
        (
            "config pretain",
            "expected 'pretrain', 'finetune', 'compare' or 'clean', found 'pretain'; did you mean 'pretrain'?",
        ),
        ("config", "missing: pretrain|finetune|compare|clean"),
    ],
)
def test_config_suggests_a_key(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or no help, for a misspelled key."""
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


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
    line, _, recipe = copied.partition("\n")
    assert line == "# yaml-language-server: $schema=.deepcloze/finetune.schema.json"
    assert (tmp_path / ".deepcloze/finetune.schema.json").is_file()
    assert capsys.readouterr().out == recipe
    assert main(["recipes", "cp", "cola", "my-task.yaml"]) == 2
    assert "my-task.yaml exists already" in capsys.readouterr().err
    assert main(["recipes", "cp", "cola"]) == 0
    assert (tmp_path / "cola.yaml").read_text(encoding="utf-8") == copied
    assert main(["recipes", "cp"]) == 2
    capsys.readouterr()
    assert main(["recipes", "cp", "cola", "missing/"]) == 2
    assert "there is no folder missing/" in capsys.readouterr().err


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
        (["validate", "COLA.yaml"], "'model.init_from' is missing"),
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], {"preflight", "pretrain"}),
        (["pretrain", "--num"], {"--num_gpus"}),
        (["pretrain", "--optimizer.l"], {"--optimizer.lr=", "--optimizer.layer_decay="}),
        (["finetune", "--training.class"], {"--training.class_weights="}),
        (["pretrain", "--config", "rob"], {"roberta-base"}),
        (["plan", "--config", "rob"], {"roberta-base"}),
        (["preflight", "--config", "rob"], {"roberta-base"}),
        (["sweep", "--config", ""], {"roberta-base", "sst2"}),
        (["status", "--js"], {"--json"}),
        (["-q", "pre"], {"preflight", "pretrain"}),
        (["-q", "pretrain", "--config", "rob"], {"roberta-base"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    """Catches a script that bash cannot run, and flags or keys that are missing in it."""
    replies = bash_replies(words, Path())
    assert expected <= set(replies)
    assert all(reply.startswith(words[-1]) for reply in replies)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain", "--hostfile", ""], []),
        (["predict", "--model", "m"], []),
        (["validate", ""], []),
        (["pretrain", "--config", "my"], ["my run.yaml"]),
        (["pretrain", "--config", "=", "rob"], ["roberta-base"]),  # bash divides words at the =
        (["finetune", "--config", "="], [*(r.name for r in all_recipes() if r.kind == "finetune"), "my run.yaml"]),
        (["pretrain", "--optimizer.lr", "="], []),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_files_and_values(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    """Catches flags where a file belongs, which bash completes if there is no reply, names that are divided at spaces,
    and `--config=` without recipes."""
    (tmp_path / "my run.yaml").touch()
    assert bash_replies(words, tmp_path) == expected


@cache
def bash_script() -> str:
    return completion_script("bash", COMMANDS)


def bash_replies(words: list[str], folder: Path) -> list[str]:
    typed = " ".join(f"'{word}'" for word in ["deepcloze", *words])
    code = f"compopt() {{ :; }}\n{bash_script()}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _deepcloze\n"
    code += 'for reply in "${COMPREPLY[@]}"; do echo "$reply"; done'
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_placeholders_are_not_completed() -> None:
    """Catches `--rows.NAME.weights=`, in which NAME stands for a row."""
    assert "NAME" not in completion_script("fish", COMMANDS)


def test_fish_knows_all_commands() -> None:
    """Catches a command, or the quote in a summary, that fish does not understand."""
    script = completion_script("fish", COMMANDS)
    for name in COMMANDS:
        assert f"__fish_use_subcommand -a {name} -d '" in script
    if shutil.which("fish"):
        subprocess.run(["fish", "--no-execute"], input=script, text=True, check=True)
