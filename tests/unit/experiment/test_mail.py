"""Mail, sent to a server that keeps it."""

import socketserver
import threading
from collections.abc import Iterator

import pytest

from experiment.errors import UserError
from experiment.mail import MailSettings, read_mail_settings, send_mail

SERVER = {"DEEPCLOZE_SMTP_HOST": "mail.example", "DEEPCLOZE_SMTP_FROM": "runs@mail.example"}


class Handler(socketserver.StreamRequestHandler):
    """As much of SMTP (RFC 5321) as smtplib needs; without TLS."""

    server: "MailServer"

    def handle(self) -> None:
        self._say("220 ready")
        for line in self.rfile:
            command = line.decode().strip()
            self.server.commands.append(command)
            if command.upper() == "QUIT":
                self._say("221 bye")
                return
            if command.upper() == "DATA":
                self._say("354 end with a dot")
                self.server.commands += [text.decode().rstrip("\r\n") for text in iter(self.rfile.readline, b".\r\n")]
            self._say("250 " + ("AUTH PLAIN" if command.startswith("ehlo") else "ok"))

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class MailServer(socketserver.ThreadingTCPServer):
    """Keeps the lines that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commands: list[str] = []

    def settings(self, user: str | None = None) -> MailSettings:
        return MailSettings("127.0.0.1", self.server_address[1], "runs@mail.example", user, user and "secret")


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    with MailServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_message_arrives(mail_server: MailServer) -> None:
    """Catches a message without sender, receiver, subject or text."""
    send_mail(mail_server.settings(), "me@home.example, you@home.example", "sst2 0.91", "step 100: 0.91\n")
    sent = mail_server.commands
    assert any(line.lower().startswith("mail from:<runs@mail.example>") for line in sent)
    assert sum(line.lower().startswith("rcpt to:") for line in sent) == 2
    assert {"Subject: sst2 0.91", "step 100: 0.91"} <= set(sent)


def test_a_password_is_not_sent_in_the_clear(mail_server: MailServer) -> None:
    """Catches a password that everybody in the network can read."""
    with pytest.raises(OSError, match=r"127\.0\.0\.1 offers no TLS, without which the password is not sent"):
        send_mail(mail_server.settings(user="me"), "me@home.example", "subject", "text")
    assert not any("AUTH" in line.upper() for line in mail_server.commands)


def test_a_server_that_does_not_answer_raises_an_os_error(mail_server: MailServer) -> None:
    """Catches an error of another type, which would end the command that only wanted to tell somebody."""
    with MailServer() as closed:
        settings = closed.settings()
    with pytest.raises(OSError, match="refused"):
        send_mail(settings, "me@home.example", "subject", "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DEEPCLOZE_SMTP_HOST": ""}, "set DEEPCLOZE_SMTP_HOST to the mail server"),
        ({"DEEPCLOZE_SMTP_FROM": ""}, "set DEEPCLOZE_SMTP_FROM to the address of the sender"),
        ({"DEEPCLOZE_SMTP_USER": "me"}, "set both DEEPCLOZE_SMTP_USER and DEEPCLOZE_SMTP_PASSWORD"),
        ({"DEEPCLOZE_SMTP_PORT": "smtp"}, "DEEPCLOZE_SMTP_PORT: expected a port number, found 'smtp'"),
    ],
)
def test_settings_that_are_missing(changes: dict[str, str], message: str) -> None:
    """Catches a mistake that shows when the first message is sent, after hours."""
    with pytest.raises(UserError, match=message):
        read_mail_settings(SERVER | changes)


def test_settings() -> None:
    """Catches a variable that is ignored."""
    assert read_mail_settings(SERVER) == MailSettings("mail.example", 587, "runs@mail.example")
    login = {"DEEPCLOZE_SMTP_PORT": "465", "DEEPCLOZE_SMTP_USER": "me", "DEEPCLOZE_SMTP_PASSWORD": "secret"}
    assert read_mail_settings(SERVER | login) == MailSettings("mail.example", 465, "runs@mail.example", "me", "secret")
