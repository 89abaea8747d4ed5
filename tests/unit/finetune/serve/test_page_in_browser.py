"""The pages of `deepcloze serve` in headless Chromium: what a user sees, types and clicks."""

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from browsers import Page, PageServer, opened
from transformers import AutoConfig

from finetune.prediction.saved_task import SavedTask, write_saved_task
from finetune.task_kind import find_kind
from runs import sampled
from waiting import wait_until

MARKUP = "<img src=x onerror=document.title='broken'>"
LABELS: dict[str, tuple[str, ...]] = {
    "classification": (MARKUP, "ein_sehr_langes_Etikett_ohne_Leerzeichen_" * 2, "ja"),
    "multi_label": ("joy", "fear"),
    "token_classification": ("O", "B-X"),
}
RECORDS = {
    "classification": {"text": "word1 word2", "text_pair": "word3"},
    "multi_label": {"text": "word1"},
    "regression": {"text": "word1"},
    "embedding": {"text": "word1"},
    "token_classification": {"words": "word1  word2\n2020"},
    "multiple_choice": {"question": "word1", "choices": "word2 word3\nword4\n"},
    "question_answering": {"question": "word1", "context": "word2 word3 word4"},
    "cloze": {"article": "word1 _ word2 _", "options": '[["word3", "word4"], ["word5", "word6", "word7"]]'},
}


Start = Callable[..., PageServer]
Open = Callable[[PageServer], Page]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers: start(folder, token=None, port=0, **limits)."""
    started: list[PageServer] = []

    def start_server(*arguments: Any, **options: Any) -> PageServer:
        started.append(PageServer(*arguments, **options))
        return started[-1]

    yield start_server
    for server in started:
        server.stop()


@pytest.fixture
def open_page(driver: Any, start: Start) -> Iterator[Open]:
    """Opens the page of a server; checks at the end that nothing failed in the background."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(opened(driver, server))


@pytest.fixture(scope="module")
def tasks(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models by kind of task."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        kind_type, labels = find_kind(name), LABELS.get(name, ())
        task = {"train": "unknown", "validation": "unknown", "kind": name}
        if "text_pair" in RECORDS[name]:
            task["columns"] = {"text": "a", "text_pair": "b"}
        kind = kind_type(kind_type.config_type(**task), labels)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(encoder, initializer_range=0.3, **kind.head)
        getattr(transformers, kind.auto_model).from_config(config).save_pretrained(folder)
        shutil.copy(encoder / "vocab.txt", folder)
        write_saved_task(folder, SavedTask(kind, None))
        return folder

    return make


def ask(server: PageServer, path: str, body: Any) -> Any:
    """The answer to a request without the page."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        (found,) = json.load(answer)["predictions"]
    return found


def by_probability(found: dict[str, float]) -> list[tuple[str, Any]]:
    """Bars for the probabilities of labels."""
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    return [(label, pytest.approx(probability, abs=0.0006)) for label, probability in ranked]


def candidates(masks: list[list[dict[str, Any]]]) -> list[tuple[str, Any]]:
    """Bars for the candidates of all masks."""
    return [(each["token"], pytest.approx(each["probability"], abs=0.0006)) for mask in masks for each in mask]


def test_a_text_and_a_pair_have_a_bar_for_each_label(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches bars of another text, in another order or length, the second text of a pair left out or kept, a field for
    a token that most users do not have, and on a phone, names that leave no room for the bars."""
    server = start(folders["sequence"])
    page = open_page(server)
    assert not page.driver.find_element("id", "token").is_displayed()
    assert page.text("about") == f"{folders['sequence'].name} (classification, fp32)"
    for text, pair in (("word1 word2", ""), ("word3", ""), ("word3", "word4 word5"), ("word3", "")):
        body = {"pairs": [[text, pair]]} if pair else {"texts": [text]}
        expected = by_probability(ask(server, "v1/predict", body)["probabilities"])
        page.predict(text=text, text_pair=pair)
        wait_until(lambda expected=expected: page.bars() == expected)
        assert page.text("error") == ""
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    assert page.run("return document.querySelector('.track').offsetWidth") > 100


def test_masks_are_filled_while_typing(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches a page that waits for a click, asks for a text without a mask, or shows candidates of another text."""
    server = start(folders["masked"])
    page = open_page(server)
    (name,) = page.run("return [...document.querySelectorAll('textarea')].map(area => area.name)")
    (area,) = page.driver.find_elements("tag name", "textarea")
    assert name == "Text with [MASK]"
    area.send_keys("word1 ")
    page.wait_for_error("Write [MASK] where a word is missing.")
    assert server.asked == 0
    area.send_keys("[MASK] word2 [MASK]")
    expected = ask(server, "v1/fill-mask", {"texts": ["word1 [MASK] word2 [MASK]"], "top_k": 8})
    wait_until(lambda: page.bars() == candidates(expected))
    titles = page.driver.find_elements("tag name", "h2")
    assert [title.text for title in titles] == ["mask 1", "mask 2"]


def test_the_answer_to_the_last_text_stays(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches an answer that arrives late and replaces that of a later text."""
    server = start(folders["masked"])
    page, last = open_page(server), "word1 [MASK] word2"
    expected = candidates(ask(server, "v1/fill-mask", {"texts": [last], "top_k": 8}))
    slow, before = server.hold_next(), server.asked
    (area,) = page.driver.find_elements("tag name", "textarea")
    area.send_keys("word1 [MASK]")
    wait_until(lambda: server.asked == before + 1)
    area.send_keys(" word2")
    wait_until(lambda: page.bars() == expected)
    slow.set()
    # A request is listed once its answer has arrived; then the page has had its turn.
    listed = "return performance.getEntriesByType('resource').filter(each => each.name.includes('fill-mask')).length"
    wait_until(lambda: page.run(listed) == server.asked - before)
    page.driver.execute_async_script("setTimeout(arguments[0], 0)")
    assert page.bars() == expected


def test_a_mistake_is_one_message(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches a message of the browser or of JavaScript, an old answer beside it, and a page that must be reloaded."""
    server = start(folders["sequence"])
    page = open_page(server)
    page.failed = {413, 422, 502, 503}

    def recovers() -> None:
        page.predict(text="word1")
        page.wait_for_answer()

    recovers()
    page.predict(text=" ")
    page.wait_for_error("Enter text.")
    recovers()
    page.paste("text", "word1 " * 11_000)
    page.predict()
    page.wait_for_error("the request is larger than 64 KiB")
    recovers()
    server.state.admission.texts += 256
    page.predict()
    page.wait_for_error("256 texts are waiting already; try again")
    server.state.admission.texts -= 256
    recovers()
    page.run("document.querySelector('textarea').value = '\\ud800'")
    page.predict()
    page.wait_for_error("records[0]: expected Unicode text in 'text'")
    recovers()
    server.broken = True
    page.predict()
    page.wait_for_error("Status 502, and no answer of deepcloze serve.")
    server.broken = False
    recovers()


def test_a_server_that_stops_and_starts(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches `Failed to fetch`, and a page that has to be opened again."""
    server = start(folders["sequence"])
    page = open_page(server)
    page.failed = {0}
    server.stop()
    page.predict(text="word1")
    page.wait_for_error("The server does not answer.")
    start(folders["sequence"], port=server.port)
    page.predict()
    page.wait_for_answer()


def test_the_page_asks_for_the_token(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches a page that does not work with a token, shows it, or keeps it in its address."""
    server = start(folders["sequence"], token="secret")
    page = open_page(server)
    page.failed = {401}
    page.wait_for_error("Enter the token of this server.")
    assert page.driver.find_element("id", "token").get_attribute("type") == "password"
    for wrong in ("other", "€ and spaces"):
        page.predict(token=wrong)
        page.wait_for_error("The token is wrong.")
    page.predict(token="secret")
    wait_until(lambda: page.driver.find_elements("tag name", "textarea"))
    page.predict(text="word1")
    page.wait_for_answer()
    assert page.driver.current_url == server.url
    page.predict(token="other")
    page.wait_for_error("The token is wrong.")


# Answers are shown as bars, tags or JSON.
@pytest.mark.parametrize(
    "kind",
    sampled(RECORDS, ["classification", "multiple_choice", "token_classification", "question_answering", "embedding"]),
)
def test_every_kind_of_task(kind: str, tasks: Callable[[str], Path], start: Start, open_page: Open) -> None:
    """Catches a kind whose fields cannot be filled by hand, answers that are not shown, labels and texts that are read
    as HTML, and on a phone: what is cut off, or must be scrolled sideways."""
    server = start(tasks(kind))
    page = open_page(server)
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    page.predict(**RECORDS[kind])
    page.wait_for_answer()
    assert shown_answer(kind, page) == expected_answer(kind, server)
    if kind == "token_classification":  # a word that is a number is no JSON
        page.predict(words="2020")
        wait_until(lambda: page.text("answer").startswith("2020"))
    (first, *_) = RECORDS[kind]
    page.paste(first, f"{'word1' * 30} {MARKUP} _ _")
    page.predict()
    wait_until(lambda: not page.text("error"))
    page.driver.execute_async_script("setTimeout(arguments[0], 0)")
    assert page.driver.title == "deepcloze serve"
    assert not page.driver.find_elements("tag name", "img")
    assert_fits(page)


def shown_answer(kind: str, page: Page) -> Any:
    if kind in ("regression", "question_answering", "embedding"):
        return json.loads(page.text("answer"))
    if kind == "token_classification":
        rows = page.driver.find_elements("css selector", "#answer .row")
        return [row.text.split("\n") for row in rows]
    return page.bars()


def expected_answer(kind: str, server: PageServer) -> Any:
    """What the server answers, as the page shows it."""
    record: dict[str, Any] = dict(RECORDS[kind])
    if kind == "token_classification":
        words = record["words"].split()
        return [[*pair] for pair in zip(words, ask(server, "v1/predict", {"records": [record]})["tags"], strict=True)]
    if kind == "multiple_choice":
        record["choices"] = record["choices"].split("\n")[:-1]
    if kind == "cloze":
        record["options"] = json.loads(record["options"])
    found = ask(server, "v1/predict", {"records": [record]})
    if kind in ("classification", "multi_label"):
        return by_probability(found["probabilities"])
    if kind in ("regression", "question_answering", "embedding"):
        return found
    if kind == "multiple_choice":
        names, values = record["choices"], found["probabilities"]
    else:
        names, values = chain(*record["options"]), chain(*found["probabilities"])
    return [(name, pytest.approx(value, abs=0.0006)) for name, value in zip(names, values, strict=True)]


def assert_fits(page: Page) -> None:
    """Nothing is wider than the screen, and each field, button and link can be reached."""
    assert page.run("return document.documentElement.scrollWidth") <= 360
    covered = """return [...document.querySelectorAll("textarea, button, a")].filter(each => {
        each.scrollIntoView();
        const box = each.getBoundingClientRect(), found = document.elementFromPoint(box.x + box.width / 2, box.y + 5);
        return found !== each;
    }).map(each => each.outerHTML)"""
    assert page.run(covered) == []


def test_texts_can_be_read_in_both_colour_schemes(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches messages that are as dark as the page: a contrast below 4.5, see WCAG 2.1, 1.4.3."""
    page = open_page(start(folders["sequence"]))
    page.predict(text=" ")
    page.wait_for_error("Enter text.")
    for scheme, behind in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)")):  # of Chromium
        page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector in ("#error", "#about", "label"):
            colour = page.run(f"return getComputedStyle(document.querySelector('{selector}')).color")
            lighter, darker = sorted((luminance(colour), luminance(behind)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) > 4.5, (scheme, selector, colour)


def luminance(colour: str) -> float:
    """Relative, of `rgb(R, G, B)`: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_list_of_routes(folders: dict[str, Path], start: Start, open_page: Open) -> None:
    """Catches a page without routes, curl lines for another address, and one that is too wide for a phone."""
    server = start(folders["sequence"])
    page = open_page(server)
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    page.driver.find_element("link text", "API").click()
    wait_until(lambda: page.driver.find_elements("tag name", "h2"))
    titles = [title.text for title in page.driver.find_elements("tag name", "h2")]
    assert {"POST /v1/predict", "POST /v1/fill-mask", "GET /metrics"} <= set(titles)
    assert f"curl {server.url}v1/predict " in page.run("return document.body.textContent")
    assert page.run("return document.documentElement.scrollWidth") <= 360
    page.driver.find_element("link text", "Try the model.").click()
    wait_until(lambda: page.driver.find_elements("name", "text"))
