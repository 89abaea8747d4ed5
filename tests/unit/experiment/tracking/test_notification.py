"""Messages, sent to servers that keep them."""

import io
import re
import socketserver
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from experiment.errors import UserError
from experiment.tracking.notification import Message, Service, apprise_services, mail_service, webhook_service
from webhook_server import webhook

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
            if "unknown@" in command:
                self._say("550 no such user")
                continue
            self._say("250 " + ("AUTH PLAIN" if command.startswith("ehlo") else "ok"))

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class MailServer(socketserver.ThreadingTCPServer):
    """Keeps the lines that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commands: list[str] = []

    def service(self, to: str, **login: str) -> Service:
        host, port = self.server_address
        server = {"HOST": str(host), "PORT": str(port), "FROM": "runs@mail.example", **login}
        return mail_service(to, {f"DEEPCLOZE_SMTP_{name}": value for name, value in server.items()})


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
    mail_server.service("me@home.example, you@home.example").send(Message("sst2 0.91", "step 100: 0.91\n"))
    sent = mail_server.commands
    assert any(line.lower().startswith("mail from:<runs@mail.example>") for line in sent)
    assert sum(line.lower().startswith("rcpt to:") for line in sent) == 2
    assert {"Subject: sst2 0.91", "step 100: 0.91"} <= set(sent)
    assert any(line.startswith("Date: ") for line in sent)
    assert any(re.fullmatch("Message-ID: <.+@mail.example>", line) for line in sent)


def test_a_webhook_gets_the_name_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the default of urllib, which Discord refuses with 403."""
    sent: list[urllib.request.Request] = []

    def open_request(_: object, request: urllib.request.Request, timeout: float) -> io.BytesIO:
        sent.append(request)
        return io.BytesIO()

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", open_request)
    webhook_service({"DEEPCLOZE_WEBHOOK_URL": "https://x.example"}).send(Message("a", "b"))
    assert [request.get_header("User-agent") for request in sent] == ["deepcloze"]


@pytest.mark.parametrize("status", [302, 308, 500])
def test_a_webhook_that_does_not_take_the_message(status: int) -> None:
    """Catches an alert that is lost without a warning, because the server redirects to a page that can be read."""
    with webhook(status) as (url, received), pytest.raises(OSError, match=f"HTTP Error {status}"):
        webhook_service({"DEEPCLOZE_WEBHOOK_URL": url}).send(Message("a", "b"))
    assert len(received) == 1


def test_a_receiver_that_is_refused_is_named(mail_server: MailServer, caplog: pytest.LogCaptureFixture) -> None:
    """Catches somebody who never gets an alert, because the server takes it for the others."""
    mail_server.service("me@home.example, unknown@home.example").send(Message("subject", "the text"))
    assert "the text" in mail_server.commands
    assert "mail was refused for unknown@home.example" in caplog.text


def test_a_password_is_not_sent_in_the_clear(mail_server: MailServer) -> None:
    """Catches a password that everybody in the network can read."""
    service = mail_server.service("me@home.example", USER="me", PASSWORD="hidden")
    with pytest.raises(OSError, match=r"127\.0\.0\.1 offers no TLS, without which the password is not sent"):
        service.send(Message("subject", "text"))
    assert "hidden" not in repr(service)
    assert not any("AUTH" in line.upper() for line in mail_server.commands)


def test_a_server_that_does_not_answer_raises_an_os_error(mail_server: MailServer) -> None:
    """Catches an error of another type, which would end the command that only wanted to tell somebody."""
    with MailServer() as closed:
        service = closed.service("me@home.example")
    with pytest.raises(OSError, match="refused"):
        service.send(Message("subject", "text"))


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
        mail_service("me@home.example", SERVER | changes)


def test_a_message_reaches_the_services_of_apprise() -> None:
    """Catches a URL that is not used, a service that fails unnoticed, and an error of another type than OSError."""
    with webhook() as (url, received), webhook(500) as (failing, _):
        urls = {"DEEPCLOZE_APPRISE_URLS": " ".join(f"json{each.removeprefix('http')}" for each in (url, failing))}
        works, fails = apprise_services(urls)
        works.send(Message("base: crash", "step *7*", "\nhost: x"))
        with pytest.raises(OSError, match="refused the message"):
            fails.send(Message("base: crash", "step 7"))
    assert [(sent["title"], sent["message"]) for sent in received] == [("base: crash", "step *7*\nhost: x")]
    assert works.name == "json"


def test_long_messages_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the end of a log that a service refuses because it is too long, and a choice in the URL without
    effect."""
    import apprise

    text = "rank 1 was killed\n" + 5_000 * "a"
    with webhook() as (url, received):
        service = webhook_service({"DEEPCLOZE_WEBHOOK_URL": url})
        service.send(Message("base: crash", text, fields={"message": text}))
    ((shown, message),) = [(sent["text"], sent["message"]) for sent in received]
    assert (len(shown), message) == (1_900, text)
    assert shown.startswith("base: crash\nrank 1 was killed\naaa")

    sent: list[str] = []
    monkeypatch.setattr(apprise.plugins.N_MGR["discord"], "send", lambda self, body, **_: sent.append(body) or True)
    urls = {"DEEPCLOZE_APPRISE_URLS": "discord://1/token discord://1/token?overflow=split"}
    for service in apprise_services(urls):
        service.send(Message("base: crash", text))
    first, *parts = sent
    assert first.startswith("rank 1 was killed\naaa")
    assert len(parts) > 1
    assert max(map(len, sent)) <= 2_000


@pytest.mark.parametrize("urls", ["", "json://127.0.0.1/SECRET unknown://SECRET"])
def test_urls_that_apprise_does_not_know(urls: str) -> None:
    """Catches a mistake that shows when the first message is sent, and a secret in a message."""
    with pytest.raises(UserError, match="DEEPCLOZE_APPRISE_URLS") as caught:
        apprise_services({"DEEPCLOZE_APPRISE_URLS": urls})
    assert "SECRET" not in str(caught.value)
