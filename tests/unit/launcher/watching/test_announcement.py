"""Commands and mail that tell of a result."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.mail import MailSettings
from experiment.run_folder import RunFolder
from experiment.tracking.downstream import DownstreamResult
from launcher.watching import announcement
from launcher.watching.announcement import Announcement, make_announcement

RESULT = DownstreamResult(100, "toy", "accuracy", False, {"accuracy": 0.9}, "weights", "config", 2.0)


def test_the_command_gets_the_result(run: RunFolder, tmp_path: Path) -> None:
    """Catches a command that is started without its input, or not by a shell."""
    Announcement(f"cat > {shlex.quote(str(tmp_path / 'result.json'))}").send(run, RESULT)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["run"], found["task"], found["step"]) == (str(run.path), "toy", 100)
    assert found["metrics"] == {"accuracy": 0.9}


@pytest.mark.parametrize("command", ["exit 3", f"{sys.executable} -c 'raise SystemExit(3)'"])
def test_a_command_that_fails_is_a_warning(run: RunFolder, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a watch that ends because a command does not read its input, or fails."""
    Announcement(command).send(run, RESULT)
    assert f"warning: --on_result failed with exit code 3: {command}" in capsys.readouterr().err


def test_mail_says_what_was_scored(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches mail without the score in its subject, and a watch that ends because mail cannot be sent."""
    sent: list[tuple[object, ...]] = []
    monkeypatch.setattr(announcement, "send_mail", lambda *message: sent.append(message))
    settings = MailSettings("mail.example", 587, "runs@mail.example")
    told = Announcement(mail=(settings, "me@home.example"))
    told.send(run, RESULT)
    assert sent[0][:3] == (settings, "me@home.example", "run: toy accuracy 0.9000 at step 100")

    def fail(*_: object) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(announcement, "send_mail", fail)
    told.send(run, RESULT)
    assert "warning: cannot send mail to me@home.example: refused" in capsys.readouterr().err


def test_mail_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistake that shows at the first result."""
    monkeypatch.delenv("DEEPCLOZE_SMTP_HOST", raising=False)
    with pytest.raises(UserError, match="DEEPCLOZE_SMTP_HOST"):
        make_announcement(None, "me@home.example")
    assert make_announcement("true", None) == Announcement("true")
