"""A page of results in headless Chromium."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# The lowest contrast of a text with the background of the nearest element that has one, by WCAG 2.1.
_CONTRAST = """
    const scale = color => (color.startsWith("color(srgb") ? [255, 255, 255, 1] : [1, 1, 1, 1]);
    const parse = color => color.match(/[\\d.]+/g).map((value, index) => value * scale(color)[index]);
    const light = ([red, green, blue]) => [red, green, blue].map(value => value / 255)
        .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    let lowest = [99, ""];
    for (const element of document.querySelectorAll("main *")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.getClientRects().length || element.closest("noscript, script")) continue;
        let behind = element;
        while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
        const style = getComputedStyle(element), text = element instanceof SVGElement ? style.fill : style.color;
        const pair = [text, getComputedStyle(behind || document.body).backgroundColor].map(parse).map(light);
        const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (contrast < lowest[0]) lowest = [contrast, element.outerHTML.slice(0, 200)];
    }
    return lowest;
"""


class View:
    """An open page."""

    def __init__(
        self, driver: Any, page: Path | str, width: int = 1280, scheme: str = "light", media: str = ""
    ) -> None:
        """page: a file, or the address of a server."""
        self.driver = driver
        self._page = page if isinstance(page, str) else page.as_uri()
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # of the previous page
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(self._page)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(found => found.textContent)", selector)

    def click(self, text: str, selector: str = "button") -> None:
        find = "return [...document.querySelectorAll(arguments[0])].find(found => found.textContent === arguments[1])"
        self.run(f"{find.replace('return', 'const found =')}; found.click()", selector, text)

    def hover(self, chart: int, share: float) -> str:
        """Move the pointer over a chart, to a share of its width; returns the text of the box with values."""
        place = """
            const svg = document.querySelectorAll(".plot svg")[arguments[0]], box = svg.getBoundingClientRect();
            const at = {clientX: box.left + box.width * arguments[1], clientY: box.top + 100, bubbles: true};
            svg.dispatchEvent(new PointerEvent("pointermove", at));
            return document.querySelectorAll(".tip")[arguments[0]].innerText"""
        return str(self.run(place, chart, share))

    def x_ticks(self) -> list[str]:
        script = """return [...document.querySelector(".plot svg").querySelectorAll("text[text-anchor=middle]")]
            .map(text => text.textContent)"""
        return list(self.run(script))

    def check(self) -> None:
        """No message in the console, no request but to the page or its server, and nothing wider than the window."""
        own = urlsplit(self._page)
        assert self.driver.get_log("browser") == []
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = urlsplit(event["params"]["request"]["url"])
                assert url.scheme in ("data", "file", "about") or url.netloc == own.netloc
                assert not url.path.endswith(".png")
        assert self.run("return document.documentElement.scrollWidth - innerWidth") <= 0

    def check_contrast(self) -> None:
        """WCAG 2.1 asks for 4.5."""
        contrast, where = self.run(_CONTRAST)
        assert contrast >= 4.5, where
