"""Tell others about a result: a command of the user, mail. What fails is a warning."""

import json
import subprocess
from dataclasses import asdict, dataclass

from experiment.errors import notify
from experiment.mail import MailSettings, read_mail_settings, send_mail
from experiment.run_folder import RunFolder
from experiment.tracking.downstream import DownstreamResult


@dataclass(frozen=True)
class Announcement:
    """Where to send the result of a checkpoint."""

    command: str | None = None  # of the shell, gets the result as JSON on stdin
    mail: tuple[MailSettings, str] | None = None  # server and address

    def send(self, run: RunFolder, result: DownstreamResult) -> None:
        text = json.dumps({"run": str(run.path), **asdict(result)}, ensure_ascii=False, indent=2) + "\n"
        if self.command is not None:
            _run_command(self.command, text)
        if self.mail is not None:
            settings, to = self.mail
            subject = f"{run.path.name}: {result.task} {result.metric} {result.value:.4f} at step {result.step}"
            try:
                send_mail(settings, to, subject, text)
            except OSError as error:
                notify(f"watch: warning: cannot send mail to {to}: {error}")


def make_announcement(command: str | None, mail: str | None) -> Announcement:
    """Raises UserError if mail is wanted and the environment does not say how to send it."""
    return Announcement(command, None if mail is None else (read_mail_settings(), mail))


def _run_command(command: str, text: str) -> None:
    """Waits for the command."""
    code = subprocess.run(command, shell=True, input=text.encode(), check=False).returncode
    if code != 0:
        notify(f"watch: warning: --on_result failed with exit code {code}: {command}")
