import shutil
import subprocess

import pytest

from launcher.cli import COMMANDS
from launcher.reference import completion_script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], {"preflight", "pretrain"}),
        (["pretrain", "--num"], {"--num_gpus"}),
        (["pretrain", "--optimizer.l"], {"--optimizer.lr=", "--optimizer.layer_decay="}),
        (["finetune", "--training.class"], {"--training.class_weights="}),
        (["pretrain", "--config", "rob"], {"roberta-base"}),
        (["status", "--js"], {"--json"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    """Catches a script that bash cannot run, and flags or keys that are missing in it."""
    script = completion_script("bash", COMMANDS)
    typed = " ".join(f"'{word}'" for word in ["deepcloze", *words])
    code = f"compopt() {{ :; }}\n{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _deepcloze\n"
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert expected <= set(done.stdout.split())
    assert all(word.startswith(words[-1]) for word in done.stdout.split())


def test_fish_knows_all_commands() -> None:
    """Catches a command, or the quote in a summary, that fish does not understand."""
    script = completion_script("fish", COMMANDS)
    for name in COMMANDS:
        assert f"__fish_use_subcommand -a {name} -d '" in script
    if shutil.which("fish"):
        subprocess.run(["fish", "--no-execute"], input=script, text=True, check=True)
