"""Each step on texts that it keeps, changes and drops."""

import json
import pickle
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiment.errors import UserError
from language_models import write_language_model
from pretrain.cleaning.parts import read_documents
from pretrain.cleaning.step import Document, DocumentStep, Verdict, find_step
from pretrain.cleaning.steps import step_names

SENTENCE = "The river was long and it ran to the sea with all of the water that people have there. "
PROSE = (
    "The old harbour of the town lies below two hills. Ships have come here with timber and salt since the days of the "
    "first kings, and some families still live in houses that their ancestors built. In winter, when storms close the "
    "road, people walk to church over frozen fields. Nobody knows why that chapel was painted blue."
)

CHINESE = "昨天下午我们在图书馆里一起读了那本关于海洋动物的新刊"  # each character once


def prepared(name: str, **keys: Any) -> DocumentStep[Any]:
    step_type = find_step(name)
    step = step_type(step_type.config_type(**keys))
    step.prepare(lambda name: [])
    assert isinstance(step, DocumentStep)
    return step


def apply(name: str, text: str, metadata: dict[str, Any] | None = None, **keys: Any) -> tuple[str, str]:
    """What one step does with a text: (rule, text after it). The rule is empty if it does nothing."""
    document = Document("in.txt:1", "in.txt", text, {} if metadata is None else metadata)
    verdict = prepared(name, **keys).apply(document)
    return (verdict.rule if verdict else "", "" if verdict and verdict.dropped else document.text)


@pytest.mark.parametrize(
    ("name", "keys", "text", "expected"),
    [
        ("ftfy", {}, "plain", ("", "plain")),
        ("ftfy", {}, "donâ€™t cafe\u0301", ("repaired", "don’t café")),
        ("ftfy", {}, "全角，“引号”", ("", "全角，“引号”")),
        ("html_tags", {}, "1 < 2, a<b && x?a=1&copy=2", ("", "1 < 2, a<b && x?a=1&copy=2")),
        ("html_tags", {}, "Good.<br /><br />Not <I a='x'>it</i>, AT&amp;T", ("removed", "Good.\n\nNot it, AT&T")),
        ("html_tags", {}, "<p>a</p><!-- b\n --><script>c < d</script><p>e</p>", ("removed", "a\n\ne")),
        ("html_tags", {}, "a <br/> b<hr>\n c <!-- <script>d", ("removed", "a\nb\n\n c <!-- <script>d")),
        (
            "html_tags",
            {},
            "for (i<a && j>b; i++) 1 <p 2> 3 &regs; &#x;",
            ("", "for (i<a && j>b; i++) 1 <p 2> 3 &regs; &#x;"),
        ),
        ("html_tags", {}, "<A href='x>y' class=k>link</A> <a href=/w?v=1>b</a>", ("removed", "link b")),
        ("html_tags", {}, "<script async src='x'>c</script><option selected value=1>d", ("removed", "d")),
        ("html_tags", {}, "<p>a<o:p></o:p> <st1:place w:st='on'>b</st1:place></p>", ("removed", "a b")),
        ("html_tags", {}, "<ruby class=a>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>字<rt>", ("removed", "漢字")),
        ("html_tags", {}, "<noscript>a <button>b</button></noscript><video src='v'><col>c", ("removed", "a b\nc")),
        ("html_tags", {}, "<fieldset><details>a</details><textarea>b</textarea>", ("removed", "a\n\nb")),
        ("html_tags", {}, "a<svg width=1><path d='M0'/><text>T</text></svg> b", ("removed", "a b")),
        ("html_tags", {}, "a<svg width='1'/> b <svg><text>T</text></svg>c", ("removed", "a b c")),
        ("html_tags", {}, "<article data-id><map name='m'><area href='#'></map>x</article>", ("removed", "x")),
        ("html_tags", {}, "#include <map> vector<data> cp <source> <dir>", None),
        ("html_tags", {}, "template <class T = int> template<typename T=int> <table name>", None),
        ("html_tags", {}, "a&#13;\nb&#xD;&#10;c", ("removed", "a\nb\nc")),
        ("html_tags", {}, "write &lt;b&gt; for bold", ("removed", "write <b> for bold")),
        ("length", {"min_words": 3}, "two words", ("too_few_words", "")),
        ("length", {"max_characters": 5}, "six and more", ("too_many_characters", "")),
        ("length", {"max_words": 2}, "two words.", ("", "two words.")),
        ("length", {"max_words": 2}, "now three words", ("too_many_words", "")),
        ("length", {"min_words": 4}, "四个汉字", ("", "四个汉字")),
        ("shares", {"max_digits": 0.5}, "1 2 a b", ("", "1 2 a b")),
        ("shares", {"max_digits": 0.5}, "1 2 3 a b", ("too_many_digits", "")),
        ("shares", {"max_symbols": 0.5}, "% % a 1", ("", "% % a 1")),
        ("shares", {"max_symbols": 0.5}, "% % % a 1", ("too_many_symbols", "")),
        ("shares", {"max_symbols": 0.1}, "हिन्दी में किताबें", ("", "हिन्दी में किताबें")),
        ("shares", {"max_capitals": 0.5}, "AB cd 12 %%", ("", "AB cd 12 %%")),
        ("shares", {"max_capitals": 0.5}, "ABC cd 12 %%", ("too_many_capitals", "")),
        ("shares", {"min_stop_words": 0.2}, "buy cheap pills now", ("too_few_stop_words", "")),
        ("shares", {"min_stop_words": 0.2}, SENTENCE, ("", SENTENCE)),
        ("shares", {"min_stop_words": 0.5, "stop_words": ("für", "Is’")}, "Nur für is'", ("", "Nur für is'")),
        ("gopher_quality", {}, PROSE, ("", PROSE)),
        ("gopher_quality", {}, SENTENCE, ("gopher_short_doc", "")),
        ("gopher_quality", {"min_doc_words": 3}, "# a # b # c #", ("gopher_below_avg_threshold", "")),
        ("gopher_repetition", {}, PROSE, ("", PROSE)),
        ("gopher_repetition", {}, SENTENCE * 9, ("top_4_gram", "")),
        ("gopher_repetition", {}, CHINESE, ("", CHINESE)),
        ("gopher_repetition", {}, CHINESE[:20], ("top_4_gram", "")),
        ("gopher_repetition", {}, f"海里的龙{CHINESE}海里的龙{CHINESE[::-1]}海里的龙", ("top_4_gram", "")),
        ("c4_quality", {}, "Only one sentence is here.", ("too_few_sentences", "")),
        (
            "c4_quality",
            {"min_num_sentences": 1},
            "A line without an end\nA line with an end.",
            ("changed", "A line with an end."),
        ),
        ("fineweb_quality", {}, PROSE, ("", PROSE)),
        ("fineweb_quality", {}, "\n".join(f"item number {number}" for number in range(9)), ("line_punct_ratio", "")),
        ("pii", {}, "Write to a.b@c.org now", ("masked", "Write to email@example.com now")),
        ("pii", {}, f"{'b.' * 60}c@x.org", ("masked", "email@example.com")),
        ("pii", {}, "请发邮件到zhang.san@qq.com吧", ("masked", "请发邮件到email@example.com吧")),
        ("pii", {}, "at 8.8.8.8 and 10.0.0.1", ("masked", "at 192.0.2.1 and 10.0.0.1")),
        ("pii", {}, "8.8.8.8. (8.8.4.4) ..8.8.8.8上", ("masked", "192.0.2.1. (192.0.2.1) ..192.0.2.1上")),
        ("pii", {}, "4.18.0.305, 1.3.6.1.4.1.311, 118.8.8.8888 and v1.8.8.8.8", None),
        ("pii", {"remove_emails": False, "ip_replacement": "IP"}, "b@c.org, 8.8.8.8", ("masked", "b@c.org, IP")),
        ("pii", {"remove_ips": False, "email_replacement": "X"}, "b@c.org, 8.8.8.8", ("masked", "X, 8.8.8.8")),
        ("sample", {"rate": 1.0}, "a", ("", "a")),
        ("sample", {"by": "source", "rates": {"in": 0.0}}, "a", ("not_sampled", "")),
    ],
)
def test_a_step(name: str, keys: dict[str, Any], text: str, expected: tuple[str, str] | None) -> None:
    assert apply(name, text, **keys) == (expected or ("", text))


@pytest.mark.parametrize(
    "repeated", ["<!--", "<script>", "<rt ", "<br ", "<map ", "<i a=b ", " a=b", " ", "&amp", "&#", "\n"]
)
def test_tags_of_a_large_text_take_linear_time(repeated: str) -> None:
    """Catches a page that a worker cleans for hours: twice the text would take four times as long."""
    text = "a<i" + repeated * 200_000 + "b"
    assert apply("html_tags", text)[0] == ""


@pytest.mark.parametrize("repeated", ["a.", "a@", "a@a.", "@", "1."])
def test_addresses_of_a_large_text_take_linear_time(repeated: str) -> None:
    """Catches a page that a worker searches for hours."""
    assert apply("pii", repeated * 200_000 + " !")[0] in ("", "masked")


def test_c4_quality_of_chinese_with_the_documented_keys() -> None:
    """Catches advice with which long lines are removed, or texts of sentences that end in 。."""
    page = (Path(__file__).parents[4] / "docs" / "cleaning.md").read_text(encoding="utf-8")
    advice = re.search(r"`c4_quality` takes .*? for such text set (.*?)\.\s", page, re.DOTALL)
    keys = {key: value for pair in re.findall("`(.+?)`", advice[1]) for key, value in yaml.safe_load(pair).items()}
    text = "".join(f"第{number}句话说的是海里的龙虾。" for number in range(100, 200))
    assert len(text) > 1_200
    assert apply("c4_quality", text, **keys) == ("", text)
    assert apply("c4_quality", text[:45], **keys)[0] == "too_few_sentences"


def test_chinese_words_of_a_list_are_found(tmp_path: Path) -> None:
    """Catches a list that finds nothing, because no spaces are around its words."""
    (tmp_path / "words").write_text("赌博\n", encoding="utf-8")
    assert apply("word_list", "这里有App赌博网站", file=str(tmp_path / "words"))[0] == "listed_word"


def test_words_of_a_list_are_found(tmp_path: Path) -> None:
    """Catches words inside others, case, also of ß, `aß` for `ass` and `ass` for `aß`, phrases across lines,
    apostrophes of another kind, and the end of a word that only begins a longer one."""
    (tmp_path / "words").write_text(
        "# comment\nass\nmass\nbad phrase\nbad phrase book\nStraße\ndon't\nİst\n", encoding="utf-8"
    )
    keys = {"file": str(tmp_path / "words")}
    assert apply("word_list", "a classic passage", **keys)[0] == ""
    assert apply("word_list", "a classic passage", whole_words=False, **keys)[0] == "listed_word"
    assert apply("word_list", "Er aß, und trank eine Maß", **keys)[0] == ""
    assert apply("word_list", "such an ASS!", **keys)[0] == "listed_word"
    assert apply("word_list", "他说ass了", **keys)[0] == "listed_word"
    assert apply("word_list", "a bad phrase", **keys)[0] == "listed_word"
    for text in ("a bad\r\n phrase", "bad phrase books", "EINE STRASSE", "die STRAẞE", "I don’t", "ist"):
        assert apply("word_list", text, **keys)[0] == "listed_word"
    assert apply("word_list", "a bad phrase", max_count=1, **keys)[0] == ""
    assert apply("word_list", "a # comment", **keys)[0] == ""
    (tmp_path / "words").write_text("aß\nMaße\n", encoding="utf-8")
    for text in ("the ass, or Ass", "die Masse", "Maẞen", "İ i\u0307\u0307 ass MASSEN"):
        assert apply("word_list", text, **keys)[0] == ""
    for text in ("MASSE", "İ I\u0307 ı AẞT MASSE", "ER ASS"):
        assert apply("word_list", text, **keys)[0] == "listed_word"
    with pytest.raises(UserError, match=r"word_list.file: cannot read .*none"):
        apply("word_list", "a", file=str(tmp_path / "none"))


def test_the_time_for_a_text_does_not_grow_with_the_list(tmp_path: Path) -> None:
    """Catches a search for one word of the list after another, which takes hours for 10,000 words."""

    def seconds(words: int) -> float:
        (tmp_path / "words").write_text("".join(f"{word:x}字\n" for word in range(words)), encoding="utf-8")
        step = prepared("word_list", file=str(tmp_path / "words"))
        step.apply(Document("in.txt:1", "in.txt", ""))
        started = time.process_time()
        assert step.apply(Document("in.txt:2", "in.txt", "a b c d e f, " * 5000)) is None
        return time.process_time() - started

    assert seconds(2000) < 20 * seconds(100)


@pytest.mark.parametrize(("name", "key"), [("word_list", "file"), ("url_filter", "domains"), ("language", "model")])
def test_another_list_is_another_cleaning(name: str, key: str, clean: Any, tmp_path: Path) -> None:
    """Catches a result that is kept although the words of the file, or the model, have changed."""
    step = {name: {key: str(tmp_path / "file")}}
    if name == "language":
        write_language_model(tmp_path / "file")
    else:
        (tmp_path / "file").write_text("bad\n")
    clean(["a line"], step, metadata=["url"])
    clean(["a line"], step, metadata=["url"])
    with (tmp_path / "file").open("a") as file:
        file.write("worse\n")
    with pytest.raises(UserError, match="another config or version, or of other sources or lists"):
        clean(["a line"], step, metadata=["url"])


def test_urls_are_dropped_by_lists_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a download of the list of public suffixes, and a list or a threshold that has no effect."""

    def refuse(*arguments: Any, **keys: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.create_connection", refuse)
    lists = {
        "domains": "spam.co.uk\n",
        "urls": "http://good.org/bad\n",
        "words": "casino\n",
        "soft_words": "win\nbonus\nprize\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
    keys = {**{name: str(tmp_path / name) for name in lists}, "soft_word_threshold": 3, "built_in": False}
    expected = {
        "http://www.spam.co.uk/x": "domain",
        "http://good.org/bad": "url",
        "http://good.org/bad/1": "",
        "http://good.org/casino/1": "hard_blacklisted",
        "http://good.org/Casino/1": "hard_blacklisted",
        "http://good.org/BAD": "",
        "http://good.org/porn": "",
        "http://good.org/win/bonus": "",
        "http://good.org/win/bonus-prize": "soft_blacklisted",
        "http://good.org/WIN/Bonus-prize": "soft_blacklisted",
        "": "no_url",
    }
    step = prepared("url_filter", **keys)
    for url, rule in expected.items():
        verdict = step.apply(Document("in.txt:1", "in.txt", "a", {"url": url} if url else {}))
        assert (verdict.rule if verdict else "") == rule, url
    (tmp_path / "words").write_text("赌博\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"words: .*'赌博' has no letters or digits of ASCII"):
        apply("url_filter", "a", {"url": "http://good.org/"}, **keys)
    (tmp_path / "words").write_text("casino\n")
    with pytest.raises(UserError, match=r"in.txt:1: expected text in 'url', found 5"):
        apply("url_filter", "a", {"url": 5}, **keys)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://www.blog.example.com/x", "domain"),
        ("https://blog.example.com:80/", "domain"),
        ("http://www.example.com/blog.example.com", ""),
        ("http://myblog.example.com/", ""),
        ("http://EXAMPLE.ORG/", "domain"),
        ("a.b.example.net./x", "domain"),
        ("http://10.0.0.1/", "domain"),
        ("http://x.intranet/", "domain"),
    ],
)
def test_subdomains_of_listed_domains_are_dropped(url: str, rule: str, tmp_path: Path) -> None:
    """Catches datatrove's test of the host and its registered domain alone, and of their case."""
    (tmp_path / "domains").write_text("blog.example.com\nexample.org\nExample.net\n10.0.0.1\nintranet\n")
    keys = {"domains": str(tmp_path / "domains"), "built_in": False}
    assert apply("url_filter", "a", {"url": url}, **keys)[0] == rule


def test_a_folder_in_which_datatrove_cannot_unpack_its_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that blames a document."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "file" / "assets"))
    step_type = find_step("url_filter")
    step = step_type(step_type.config_type())
    step.prepare(lambda name: [])
    with pytest.raises(UserError, match=r"url_filter: cannot unpack .*file/assets.*; set HF_HOME to a folder"):
        step.apply(Document("in.txt:1", "in.txt", "a", {"url": "http://good.org/"}))


def test_samples_by_weight_and_source_have_their_size() -> None:
    """Catches draws that depend on each other, and weights that are ignored."""
    step_type = find_step("sample")
    step = step_type(step_type.config_type(rate=0.5, by="source", rates={"b": 1.0}, weight="score"))
    kept = {"a": 0, "b": 0}
    for number in range(2000):
        source = "ab"[number % 2]
        kept[source] += step.apply(Document(f"{source}:{number}", source, "", {"score": 0.5})) is None
    assert 190 < kept["a"] < 310
    assert 430 < kept["b"] < 570
    assert step.apply(Document("b:1", "b", "", {"score": 0})) == Verdict("not_sampled")
    with pytest.raises(UserError, match=r"a:1: expected a number >= 0 in 'score', found \"high\""):
        step.apply(Document("a:1", "a", "", {"score": "high"}))
    with pytest.raises(UserError, match=r"a:1: expected a number >= 0 in 'score', found NaN"):
        step.apply(Document("a:1", "a", "", {"score": float("nan")}))


@pytest.mark.parametrize(
    ("value", "key"), [(True, "true"), (False, "false"), (None, "null"), (2, "2"), (2.0, "2"), (2.0, "2.0"), ("x", "x")]
)
def test_rates_by_values_that_are_no_text(value: object, key: str) -> None:
    """Catches a rate that is never used, because Python writes the value in another way than YAML."""
    assert apply("sample", "a", {"column": value}, by="column", rates={key: 0.0})[0] == "not_sampled"


def test_languages_are_told_by_a_model(tmp_path: Path) -> None:
    """Catches labels with their prefix, models of another format, and languages that a model does not know."""
    write_language_model(tmp_path / "model.bin")
    keys = {"model": str(tmp_path / "model.bin"), "keep": ("en",), "min_score": 0.6}
    metadata: dict[str, Any] = {}
    assert apply("language", "the and\nof", metadata, **keys)[0] == ""
    assert metadata == {"language": "en"}
    assert apply("language", "der und von", **keys)[0] == "other_language"
    assert apply("language", "der und von", **keys | {"keep": None})[0] == ""
    assert apply("language", "the and of der", **keys)[0] == ""
    assert apply("language", "the and of der", **keys | {"min_score": 0.999})[0] == "uncertain_language"
    (tmp_path / "other.bin").write_bytes(b"not a model" * 100)
    with pytest.raises(UserError, match=r"other.bin is not a fastText model, or damaged"):
        apply("language", "a", model=str(tmp_path / "other.bin"))
    with pytest.raises(UserError, match="knows no language 'fr'; it knows de, en"):
        apply("language", "a", **keys | {"keep": ("fr",)})


@pytest.mark.parametrize("name", ["c4_quality", "language", "pii", "shares", "url_filter", "word_list"])
def test_a_step_that_was_used_is_sent_to_workers(name: str, tmp_path: Path) -> None:
    """Catches a cleaning that cannot be resumed because the process has run a part itself before it starts workers: a
    model and the filters of datatrove cannot be pickled."""
    write_language_model(tmp_path / "model")
    (tmp_path / "words").write_text("bad\n")
    keys = {
        "language": {"model": str(tmp_path / "model"), "keep": ("de",)},
        "shares": {"min_stop_words": 0.5},
        "url_filter": {"words": str(tmp_path / "words"), "built_in": False},
        "word_list": {"file": str(tmp_path / "words")},
    }
    step = prepared(name, **keys.get(name, {}))

    def verdict(step: DocumentStep[Any]) -> Verdict | None:
        return step.apply(Document("in.txt:1", "in.txt", "a bad text of a@b.org", {"url": "http://bad.org/"}))

    assert verdict(step) is not None
    content = pickle.dumps(step)
    assert len(content) < 5_000
    assert verdict(pickle.loads(content)) == verdict(step)


def test_recurring_lines_go_except_the_first(clean: Any, tmp_path: Path) -> None:
    """Catches lines that are cut from the wrong document, and short ones that are compared."""
    (tmp_path / "in").mkdir()
    menu = "Home, products, services, contact"
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(f"{menu}\nThe text of page {name} is here.\nYes.\n")
    (tmp_path / "in" / "d.txt").write_text(f"{menu}\n")
    found = clean([], {"line_dedup": {}}, source=str(tmp_path / "in"), document="file")
    assert found["steps"][0]["dropped"] == 1
    assert [document.text for document in read_documents(tmp_path / "out" / "data-00000.jsonl.zst")] == [
        f"{menu}\nThe text of page a is here.\nYes.",
        "The text of page b is here.\nYes.",
        "The text of page c is here.\nYes.",
    ]


def test_blank_lines_do_not_recur(clean: Any, tmp_path: Path) -> None:
    """Catches blank lines between paragraphs that are removed, because lines of any length are compared."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(f"First {name}.\n\nYes.\n \nSecond {name}.\n")
    clean([], {"line_dedup": {"min_characters": 0}}, source=str(tmp_path / "in"), document="file")
    assert [document.text for document in read_documents(tmp_path / "out" / "data-00000.jsonl.zst")] == [
        "First a.\n\nYes.\n \nSecond a.",
        "First b.\n\n \nSecond b.",
    ]


def test_recurring_lines_are_found_in_little_memory() -> None:
    """Catches memory for short lines, which are not compared, and lines that are kept too often."""
    step_type = find_step("line_dedup")
    step = step_type(step_type.config_type(max_count=2))
    hashes = np.zeros((2, 100_000), np.uint64)
    hashes[:, :5] = [[3, 0, 5, 3, 7], [5, 3, 0, 3, 5]]
    tracemalloc.start()
    try:
        removed = step.decide(lambda name: hashes)
        assert tracemalloc.get_traced_memory()[1] < 4 * hashes.size
    finally:
        tracemalloc.stop()
    assert [part.nonzero()[0].tolist() for part in removed] == [[], [1, 3, 4]]


def test_recurring_paragraphs_are_found_between_any_blank_lines(clean: Any, tmp_path: Path) -> None:
    """Catches paragraphs that stay because their blank lines have spaces or Windows line ends, and lost blank lines."""
    footer = "All rights reserved, see the imprint"
    texts = [
        f"The first page.\n\n{footer}",
        f"The second page.\r\n\r\n{footer}\r\n\r\nIts end.",
        f"The third.\n \n\n{footer}",
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    clean([], {"line_dedup": {"unit": "paragraph"}}, source=str(tmp_path / "in.jsonl"))
    assert [document.text for document in read_documents(tmp_path / "out" / "data-00000.jsonl.zst")] == [
        texts[0],
        "The second page.\n\nIts end.",
        "The third.",
    ]


@pytest.mark.parametrize("step", ["gopher_repetition", "fineweb_quality"])
def test_windows_line_ends(clean: Any, tmp_path: Path, step: str) -> None:
    """Catches filters that drop texts because their lines end in "\r", or because of the lines between paragraphs."""
    words = iter(range(1000))
    lines = [" ".join(f"{word}{next(words)}" for word in ("Sea", "animals", "live", "deep", "below")) for _ in range(8)]
    text = "\r\n\r\n".join(f"{line}." for line in lines)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    found = clean([], {step: {}}, source=str(tmp_path / "in.jsonl"))
    assert found["kept"] == 1
    (document,) = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert document.text == text.replace("\r\n", "\n")


def test_every_step_is_documented() -> None:
    """Catches a step without a description for the reference, which `deepcloze config clean` prints."""
    assert len(step_names()) >= 16
    assert all((find_step(name).config_type.__doc__ or "").endswith(".") for name in step_names())
