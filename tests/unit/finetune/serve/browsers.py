"""A server of this process, and its page in headless Chromium."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving_clients import LIMITS
from starlette.responses import HTMLResponse
from starlette.types import Receive, Scope, Send

from finetune.serve.app import make_app
from finetune.serve.served_model import load_served_model
from finetune.serve.serving_state import ServingState
from waiting import wait_until


class PageServer:
    """A server on a port of its own, whose answers can be held back or replaced."""

    def __init__(self, folder: Path, token: str | None = None, port: int = 0, **limits: float) -> None:
        load = partial(load_served_model, folder, "fp32")
        self.state = ServingState(load(), load, replace(LIMITS, **limits), 0.001)
        self._app = make_app(self.state, token)
        self._held: list[threading.Event] = []
        self.asked = 0  # requests with a body
        self.broken = False  # whether something else answers instead, such as a proxy
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._server = uvicorn.Server(uvicorn.Config(self._answer, interface="asgi3", http="h11", log_config=None))
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started

    def hold_next(self) -> threading.Event:
        """Hold back the answer to the next request with a body until the event is set."""
        self._held.append(threading.Event())
        return self._held[-1]

    def stop(self) -> None:
        for event in self._held:
            event.set()
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            self.asked += 1
            if self._held:
                await asyncio.to_thread(self._held.pop(0).wait)
            if self.broken:
                await HTMLResponse("<h1>Bad gateway</h1>", 502)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Page:
    """What a user sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.failed: set[int] = set()  # statuses that a test causes; 0: no answer

    def open(self, url: str) -> None:
        self.driver.get(url)
        wait_until(lambda: self.text("about") != "Loading …")

    def text(self, name: str) -> str:
        """The text of an element by id, without what is hidden."""
        return self.driver.find_element("id", name).text

    def fill(self, **values: str) -> None:
        """Type texts into fields by name, or by id."""
        for name, value in values.items():
            (field,) = self.driver.find_elements("css selector", f"[name='{name}'], #{name}")
            field.clear()
            field.send_keys(value)

    def paste(self, name: str, value: str) -> None:
        """Put a long text into a field."""
        self.run(f"document.querySelector(\"[name='{name}']\").value = arguments[0]", value)

    def predict(self, **values: str) -> None:
        """Fill the fields, and click."""
        self.fill(**values)
        self.driver.find_element("tag name", "button").click()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: Any) -> Any:
        """See https://chromedevtools.github.io/devtools-protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def bars(self) -> list[tuple[str, float]]:
        """The rows with bars: names, and probabilities. Each bar is as long as its text says."""
        rows = self.run(
            """return [...document.querySelectorAll("#answer .row")].map(row => {
                const [name, track, shown] = row.children;
                return [name.textContent, track.firstChild.offsetWidth / track.offsetWidth, shown.textContent];
            })"""
        )
        found = [(name, width, float(shown.removesuffix(" %")) / 100) for name, width, shown in rows]
        assert all(width == pytest.approx(value, abs=0.03) for _, width, value in found), rows
        return [(name, value) for name, _, value in found]

    def wait_for_error(self, part: str) -> None:
        wait_until(lambda: part in self.text("error"))
        assert self.text("answer") == ""

    def wait_for_answer(self) -> None:
        wait_until(lambda: self.text("answer"))
        assert self.text("error") == ""

    def check(self, origin: str) -> None:
        """No message in the console, and no request to another host."""
        log = self.driver.get_log("browser")
        failed = {int(code) for entry in log for code in re.findall(r"status of (\d+)", entry["message"])}
        refused = {0 for entry in log if "net::ERR" in entry["message"]}
        others = [entry for entry in log if entry["source"] != "network"]
        assert not others
        assert failed | refused <= self.failed, log
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                assert event["params"]["request"]["url"].startswith((origin, "data:"))


@contextmanager
def opened(driver: Any, server: PageServer) -> Iterator[Page]:
    """The page of a server, as in a new tab of a desktop."""
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # of the previous page
    page = Page(driver)
    page.open(server.url)
    yield page
    page.check(server.url)
    page.command("Emulation.clearDeviceMetricsOverride")
    page.command("Emulation.setEmulatedMedia", features=[])
