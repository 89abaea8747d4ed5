"""Send a message by e-mail. The server is set by environment variables, so that no password is in a config."""

import os
import smtplib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import EmailMessage

from experiment.errors import UserError

_PREFIX = "DEEPCLOZE_SMTP_"
_TIMEOUT = 30.0  # seconds, of each reply of the server
_PORT = 587  # submission, RFC 6409
_TLS_PORT = 465  # submission over TLS from the start, RFC 8314


@dataclass(frozen=True)
class MailSettings:
    """The server that sends mail, and the sender."""

    host: str
    port: int
    sender: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def read_mail_settings(environ: Mapping[str, str] = os.environ) -> MailSettings:
    """The settings in DEEPCLOZE_SMTP_HOST, _PORT, _FROM, _USER and _PASSWORD. Raises UserError."""
    values = {name: environ.get(_PREFIX + name) for name in ("HOST", "FROM", "USER", "PASSWORD")}
    for name, meaning in (("HOST", "the mail server"), ("FROM", "the address of the sender")):
        if not values[name]:
            raise UserError(f"to send mail, set {_PREFIX}{name} to {meaning}")
    if bool(values["USER"]) != bool(values["PASSWORD"]):
        raise UserError(f"to log in to the mail server, set both {_PREFIX}USER and {_PREFIX}PASSWORD")
    port = environ.get(_PREFIX + "PORT") or str(_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{_PREFIX}PORT: expected a port number, found '{port}'")
    host, sender, user, password = values.values()
    return MailSettings(str(host), int(port), str(sender), user or None, password or None)


def send_mail(settings: MailSettings, to: str, subject: str, text: str) -> None:
    """Send a message to one address, or to several separated by commas.

    Uses TLS if the server offers it. Raises OSError, of which smtplib's errors are a kind, if the message cannot be
    sent, or a password would be sent without TLS.
    """
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = settings.sender, to, subject
    message.set_content(text)
    with _connect(settings) as server:
        if settings.user is not None and settings.password is not None:
            if not isinstance(server.sock, ssl.SSLSocket):
                raise OSError(f"{settings.host} offers no TLS, without which the password is not sent")
            server.login(settings.user, settings.password)
        server.send_message(message)


def _connect(settings: MailSettings) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if settings.port == _TLS_PORT:
        return smtplib.SMTP_SSL(settings.host, settings.port, timeout=_TIMEOUT, context=context)
    server = smtplib.SMTP(settings.host, settings.port, timeout=_TIMEOUT)
    try:
        server.ehlo()
        if server.has_extn("starttls"):
            server.starttls(context=context)
    except BaseException:
        server.close()
        raise
    return server
