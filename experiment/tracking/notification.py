"""Messages to people: by mail, by webhook, and to the services that Apprise knows.

Servers, passwords and URLs are environment variables, so that no secret is in a config or a command line.
"""

import json
import logging
import os
import smtplib
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import localtime, make_msgid, parseaddr
from functools import partial
from typing import TYPE_CHECKING, Any

from experiment.errors import UserError

if TYPE_CHECKING:
    from apprise import Apprise

log = logging.getLogger(__name__)

_SMTP, _WEBHOOK, _APPRISE = "DEEPCLOZE_SMTP_", "DEEPCLOZE_WEBHOOK_URL", "DEEPCLOZE_APPRISE_URLS"
_MAIL_TIMEOUT, _WEBHOOK_TIMEOUT = 30.0, 15.0  # seconds, of each reply of the server
_PORT = 587  # submission, RFC 6409
_TLS_PORT = 465  # submission over TLS from the start, RFC 8314
_WEBHOOK_TEXT = 1900  # characters; Discord takes 2,000


@dataclass(frozen=True)
class Message:
    title: str
    text: str
    footer: str = ""  # of the text, except for a webhook
    fields: Mapping[str, str] = field(default_factory=dict)  # beside the text in the JSON for a webhook


@dataclass(frozen=True)
class Service:
    """Destinations of messages.

    send: raises OSError, of which the errors of smtplib and urllib are a kind, if the message cannot be sent.
    """

    name: str
    send: Callable[[Message], None] = field(repr=False)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an HTTPError: urllib would follow it with a GET, which loses the message."""

    def redirect_request(self, *_: Any) -> None:
        return None


def webhook_service(environ: Mapping[str, str] = os.environ) -> Service:
    """Return a service that POSTs JSON to DEEPCLOZE_WEBHOOK_URL. Raises UserError without the URL, which is secret."""
    url = environ.get(_WEBHOOK, "")
    if not url.startswith(("https://", "http://")):
        raise UserError(f"tracking.alerts.webhook: set {_WEBHOOK} to a URL that begins with https:// or http://")

    opener = urllib.request.build_opener(_NoRedirects)

    def send(message: Message) -> None:
        # `text`: shown by Slack and Mattermost
        payload = {"text": f"{message.title}\n{message.text}"[:_WEBHOOK_TEXT], **message.fields}
        headers = {"Content-Type": "application/json", "User-Agent": "deepcloze"}  # Discord refuses urllib's
        request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
        with opener.open(request, timeout=_WEBHOOK_TIMEOUT) as reply:
            reply.read(1)

    return Service("webhook", send)


def apprise_services(environ: Mapping[str, str] = os.environ) -> list[Service]:
    """Return a service for each URL in DEEPCLOZE_APPRISE_URLS, see https://github.com/caronc/apprise. Raises UserError
    without the URLs, which are secret."""
    if not (urls := environ.get(_APPRISE, "").split()):
        raise UserError(f"tracking.alerts.apprise: set {_APPRISE} to URLs of Apprise, separated by spaces")
    from apprise import Apprise, AppriseAsset, OverflowMode

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # the caller reports failures
    services = []
    for number, url in enumerate(urls, start=1):
        server = Apprise(asset=AppriseAsset(app_id="deepcloze", secure_logging=True, service_timeout=0))
        if not server.add(url):
            raise UserError(f"{_APPRISE}: URL {number} of {len(urls)} is not one that Apprise knows")
        for plugin in server:
            if plugin.overflow_mode == OverflowMode.UPSTREAM:  # the default, with which servers refuse long messages
                plugin.overflow_mode = OverflowMode.TRUNCATE
        services.append(Service(url.partition(":")[0], partial(_send_by_apprise, server)))
    return services


def _send_by_apprise(server: "Apprise", message: Message) -> None:
    if not server.notify(message.text + message.footer, message.title, body_format="text"):
        raise OSError("it is unreachable or has refused the message")


def mail_service(to: str, environ: Mapping[str, str] = os.environ) -> Service:
    """Mail to one address, or to several separated by commas, as DEEPCLOZE_SMTP_HOST, _PORT, _FROM, _USER and _PASSWORD
    say. Uses TLS if the server offers it, and sends no password without. Raises UserError."""
    values = {name: environ.get(_SMTP + name) for name in ("HOST", "FROM", "USER", "PASSWORD")}
    for name, meaning in (("HOST", "the mail server"), ("FROM", "the address of the sender")):
        if not values[name]:
            raise UserError(f"to send mail, set {_SMTP}{name} to {meaning}")
    if bool(values["USER"]) != bool(values["PASSWORD"]):
        raise UserError(f"to log in to the mail server, set both {_SMTP}USER and {_SMTP}PASSWORD")
    port = environ.get(_SMTP + "PORT") or str(_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{_SMTP}PORT: expected a port number, found '{port}'")
    host, sender, user, password = (value or "" for value in values.values())

    def send(message: Message) -> None:
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = sender, to, message.title
        # Without these, which not all servers add, others bounce it.
        mail["Date"] = localtime()
        mail["Message-ID"] = make_msgid(domain=parseaddr(sender)[1].rpartition("@")[2] or None)
        mail.set_content(message.text + message.footer)
        with _connect(host, int(port)) as server:
            if user:
                if not isinstance(server.sock, ssl.SSLSocket):
                    raise OSError(f"{host} offers no TLS, without which the password is not sent")
                server.login(user, password)
            refused = server.send_message(mail)
        if refused:  # others have got it
            log.warning("mail was refused for %s", ", ".join(refused))

    return Service("mail", send)


def _connect(host: str, port: int) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if port == _TLS_PORT:
        return smtplib.SMTP_SSL(host, port, timeout=_MAIL_TIMEOUT, context=context)
    server = smtplib.SMTP(host, port, timeout=_MAIL_TIMEOUT)
    try:
        server.ehlo()
        if server.has_extn("starttls"):
            server.starttls(context=context)
    except BaseException:
        server.close()
        raise
    return server
