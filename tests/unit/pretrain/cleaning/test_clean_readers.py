"""Formats that only `deepcloze clean` reads, and what is wrong with their files."""

import bz2
import gzip
import io
import json
import pkgutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import zstandard

from experiment.config import build_config
from experiment.errors import UserError
from pretrain.cleaning import markup, passes, readers
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.markup import to_text
from pretrain.cleaning.reading import find_inputs, read_inputs
from pretrain.cleaning.step import Verdict

PARAGRAPH = "The lobster is a large animal that lives in the sea, and people like to eat it. "
HTML = (
    f"<html><body><nav>Home | Shop</nav><article><h1>Lobsters</h1><p>{PARAGRAPH * 4}</p><p>{PARAGRAPH * 3}</p>"
    "<table><tr><td>Weight</td><td>5 kg</td></tr></table>"
    "</article></body></html>"
)
WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<page><title>Lobster</title><ns>0</ns><revision><text>{{Box|a=b}}The '''lobster''' is a [[sea|marine]] animal.
&lt;ref&gt;A book&lt;/ref&gt;
[[File:x.png|thumb|A picture]]It lives.
{| class="wikitable"
| cell
|}
[[Category:Animals]]</text></revision></page>
<page><title>Talk:Lobster</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>Lobsters</title><ns>0</ns><redirect title="Lobster"/><revision><text>#R</text></revision></page>
</mediawiki>"""
FILM = (
    '<document><s id="1"><time id="T1S"/><w id="1.1">Hello</w> <w id="1.2">there</w></s><s id="2">Bye .</s></document>'
)


def read(source: Path | str, **keys: Any) -> dict[str, str]:
    """{end of the id: text}"""
    tree = {"source": str(source), "output": "out", **keys}
    config = build_config(CleanConfig, tree)
    found = read_inputs(find_inputs(config), config)
    return {document.id.rpartition("/")[2]: to_text(document.text, document.markup) for document in found}


def make_zip(path: Path, members: Mapping[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def warc(
    path: Path,
    kind: str = "response",
    pages: Sequence[bytes] = (HTML.encode(),) * 2,
    status: str = "HTTP/1.1 200 OK",
    **more: str,
) -> Path:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for number, page in enumerate(pages):
            content = io.BytesIO(page if kind == "response" else f"Text {number}".encode())
            fields = {"Content-Type": "text/html", **more}
            headers = StatusAndHeaders(status, [*fields.items()])
            http = headers if kind == "response" else None
            writer.write_record(
                writer.create_warc_record(f"http://a.org/{number}", kind, payload=content, http_headers=http)
            )
    return path


def test_web_archives(tmp_path: Path) -> None:
    pages = read(warc(tmp_path / "a.warc.gz"))
    assert list(pages) == ["a.warc.gz:1", "a.warc.gz:2"]
    for text in pages.values():
        assert text.startswith("Lobsters\nThe lobster")
        assert "Shop" not in text
        assert "kg" not in text
    assert read(warc(tmp_path / "b.warc.wet", "conversion")) == {"b.warc.wet:1": "Text 0", "b.warc.wet:2": "Text 1"}
    config = build_config(CleanConfig, {"source": str(tmp_path), "output": "out", "metadata": ["url"]})
    urls = [document.metadata["url"] for document in read_inputs(find_inputs(config), config)]
    assert urls == ["http://a.org/0", "http://a.org/1"] * 2


def test_error_pages_of_web_archives(clean: Any, tmp_path: Path) -> None:
    """Catches error pages of a server that become documents, or that are lost without being counted."""
    folder = tmp_path / "archives"
    folder.mkdir()
    warc(folder / "a.warc", pages=[HTML.encode()])
    warc(folder / "b.warc", status="HTTP/1.1 404 Not Found", **{"Content-Encoding": "br"})
    found = clean([], {"length": {}}, source=str(folder))
    assert (found["read"], found["kept"]) == (3, 1)
    rule = found["steps"][0]["rules"]["http_error"]
    assert rule["dropped"] == 2
    assert {example["id"]: example["text"] for example in rule["examples"]} == {
        f"{folder}/b.warc:1": "404 Not Found",
        f"{folder}/b.warc:2": "404 Not Found",
    }


def test_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a small compressed page that fills the memory, again at each retry, and pages after it that are lost."""
    monkeypatch.setattr(markup, "MAX_PAGE_BYTES", 1 << 20)
    folder, bomb = tmp_path / "pages", gzip.compress(b"<p>" * (30 << 20))
    folder.mkdir()
    warc(folder / "a.warc.gz", pages=[bomb, gzip.compress(HTML.encode())], **{"Content-Encoding": "gzip"})
    (folder / "b.html.gz").write_bytes(bomb)
    config = build_config(CleanConfig, {"source": str(folder), "output": "out"})
    tracemalloc.start()
    try:
        first, page, last = read_inputs(find_inputs(config), config)
        assert tracemalloc.get_traced_memory()[1] < 70e6
    finally:
        tracemalloc.stop()
    assert to_text(page.text, page.markup).startswith("Lobsters")
    assert passes._remove_markup(first) == passes._remove_markup(last) == Verdict("too_large")
    assert first.text == "more than 1,048,576 bytes"


@pytest.mark.parametrize("status", ["HTTP/1.1", "HTTP/1.1\t200\tOK", "HTTP/1.0 OK"])
def test_pages_without_a_status_code_are_read(tmp_path: Path, status: str) -> None:
    """Catches pages that are lost as errors because of a status line that browsers accept."""
    assert read(warc(tmp_path / "a.warc", pages=[HTML.encode()], status=status))["a.warc:1"].startswith("Lobsters")
    errors = read(warc(tmp_path / "b.warc", pages=[HTML.encode()], status="HTTP/1.1\t404"))
    assert errors == {"b.warc:1": "404"}


def test_compressed_pages_of_web_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pages that are lost as bytes without text, because warcio does not know how they are compressed, and what
    follows the end of a page that is taken for bytes that are missing."""
    page = HTML.encode()
    plain = read(warc(tmp_path / "a.warc"))["a.warc:1"]
    pages = {"zstd": zstandard.compress(page[:99]) + zstandard.compress(page[99:]), "identity": page}
    pages["gzip"] = gzip.compress(page) + bytes(40_000)
    if find_spec("brotli") is not None:
        import brotli

        pages["br"] = brotli.compress(page)
    for name, content in pages.items():
        found = read(warc(tmp_path / "b.warc", pages=[content], **{"Content-Encoding": name}))
        assert found == {"b.warc:1": plain}, name
    chunked = b"%x\r\n%s\r\n0\r\n\r\n\r\n" % (len(page), page)
    assert read(warc(tmp_path / "b.warc", pages=[chunked], **{"Transfer-Encoding": "chunked"})) == {"b.warc:1": plain}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "brotli" else find_spec(name))
    with pytest.raises(UserError, match=r"c\.warc: record 1: brotli is not installed; run: pip install"):
        read(warc(tmp_path / "c.warc", pages=[b"\x0b"], **{"Content-Encoding": "br"}))
    script = {"Content-Encoding": "br", "Content-Type": "text/javascript"}
    assert read(warc(tmp_path / "d.warc", pages=[b"\x0b"], **script)) == {}
    assert read(warc(tmp_path / "e.warc", **{"Content-Type": "text/javascript"})) == {}


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("a.warc.gz", 60, "a.warc.gz: record 2 is damaged or truncated: its last part has no end"),
        ("a.warc", 100, "a.warc: record 2 is damaged or truncated: it lacks 96 bytes"),
    ],
)
def test_a_truncated_web_archive(tmp_path: Path, name: str, cut: int, message: str) -> None:
    """Catches warcio's silence about a file that ends within a record."""
    path = warc(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=message):
        read(path)


def test_records_that_are_skipped_take_little_memory(tmp_path: Path) -> None:
    """Catches a film that is read into memory."""
    path = warc(tmp_path / "a.warc", pages=[bytes(1 << 24)], **{"Content-Type": "video/mp4"})
    tracemalloc.start()
    try:
        assert read(path) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_a_web_archive_that_ends_anywhere(tmp_path: Path) -> None:
    """Catches a record whose headers are truncated: warcio takes it for the end, or fails with an AttributeError."""
    path = warc(tmp_path / "a.warc")
    content = path.read_bytes()
    first = content.index(b"WARC/1.0", 1)
    for end in range(1, first + 600, 7):
        path.write_bytes(content[:end])
        if content[end:first].strip():
            with pytest.raises(UserError, match=r"a\.warc: (record 1 is damaged|expected a WARC file)"):
                read(path)
        elif end > first:
            with pytest.raises(UserError, match=r"a\.warc: record 2 is damaged"):
                read(path)


@pytest.mark.parametrize("suffix", [".html", ".warc"])
@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("gb18030", '<meta charset="gb2312">'),
        ("big5hkscs", "<meta charset=big5>"),
        ("cp932", "<meta charset=shift_jis>"),
        ("cp949", "<meta charset=ks_c_5601-1987>"),
        ("utf-8-sig", "<meta charset=gb2312>"),
        ("utf-8", "<meta charset=utf-16>"),
        ("cp1252", "<meta charset=us-ascii>"),
        ("cp1252", '<META http-equiv="Content-Type" content="text/html; charset=iso-8859-1">'),
        ("utf-8", "<meta charset=x-unknown>"),
        ("utf-8", '<meta charset="utf-8">'),
        ("utf-16", ""),
    ],
)
def test_encodings_of_pages(tmp_path: Path, suffix: str, encoding: str, head: str) -> None:
    """Catches pages that are read as UTF-8 although neither they nor their server say so, characters that browsers know
    in an encoding and Python does not, and one bad byte that makes a guess of the encoding."""
    sentences = {
        "cp1252": "Les pêcheurs préfèrent l’été à l’hiver. ",
        "big5hkscs": "龍蝦生活在海裏，人們喜歡吃它。恒生指數。",
        "cp932": "海に住む①髙いロブスターを人々は好んで食べます。",
        "cp949": "바닷가재는 바다에 살고 사람들은 똠얌을 좋아한다. ",
    }
    sentence = sentences.get(encoding, "龙虾生活在海里，人们喜欢吃它。朱镕基。")
    page = HTML.replace("<body>", f"<head>{head}</head><body>").replace(PARAGRAPH, sentence)
    content = page.encode(encoding) + (b"\xff" if "utf-8" in head else b"")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content) if suffix == ".html" else warc(path, pages=[content])
    (text,) = read(path).values()
    assert sentence.strip() in text


def test_a_page_with_half_a_character(tmp_path: Path) -> None:
    """Catches a cleaning that one page ends, because Python decodes UTF-7 to half of a surrogate pair."""
    page = HTML.replace("The lobster", "A +2AA- and +2D3eAA-").encode()
    headers = {"Content-Type": "text/html; charset=utf-7"}
    (text,) = read(warc(tmp_path / "a.warc", pages=[page], **headers)).values()
    assert "A \ufffd and \U0001f600" in text


def test_another_format_read_as_a_web_archive(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches warcio's warnings about each line, and a message that quotes the whole file."""
    (tmp_path / "a.jsonl").write_text('{"text": "A long document %s"}\n' % ("word " * 999) * 9)
    with pytest.raises(UserError, match=r"a\.jsonl: record 1 is damaged or truncated: .{,110}$"):
        read(tmp_path / "a.jsonl", format="warc")
    assert not capfd.readouterr().err


def test_a_dump_of_wikipedia(tmp_path: Path) -> None:
    (tmp_path / "pages.xml.bz2").write_bytes(bz2.compress(WIKI.encode()))
    (text,) = read(tmp_path / "pages.xml.bz2").values()
    assert text.split() == ["The", "lobster", "is", "a", "marine", "animal.", "It", "lives."]
    (tmp_path / "wiki.xml").write_text(WIKI[:-60])
    with pytest.raises(UserError, match=r"wiki.xml: invalid XML after 2 pages: "):
        read(tmp_path / "wiki.xml")
    (tmp_path / "cut.xml.bz2").write_bytes(bz2.compress(WIKI.encode())[:-9])
    with pytest.raises(UserError, match=r"cut.xml.bz2 is damaged or truncated"):
        read(tmp_path / "cut.xml.bz2")


@pytest.mark.parametrize("name", ["enwiktionary-20260101-pages-articles.xml", "WikiNews.XML.gz", "frwikibooks.xml.zst"])
def test_dumps_of_other_wikis(tmp_path: Path, name: str) -> None:
    """Catches a dump that is read as a film."""
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(WIKI.encode()))
    assert len(read(tmp_path / name)) == 1


CHINESE_WIKI = """<mediawiki xml:lang="zh"><siteinfo><namespaces><namespace key="4">Wikipedia</namespace>
<namespace key="6">Tập tin</namespace><namespace key="14" /></namespaces></siteinfo>
<page><title>A</title><ns>0</ns><revision><text>%s</text></revision></page>
<page><title>B</title><ns>0</ns><revision><text>%s</text></revision></page></mediawiki>"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("[[檔案:Foo.jpg|thumb|250px|右圖說明]]甲[[图像:Bar.png|缩略图|说明]]", "甲"),
        ("甲[[分類:計算機]][[Tập_tin:x.png|nhỏ]][[ category : x]][[Wikipedia:乙|丙]]", "甲丙"),
        ("-{zh-hans:计算机;zh-hant:電腦}-和-{A|zh-cn:[[博客|博客]]; zh-tw:部落格;}-", "计算机和博客"),
        ("-{H|zh-cn:软件;zh-tw:軟體}-甲-{T|zh-hans:乙}-", "甲"),
        ("-{乙}-、-{zh-hant;zh-hans|丙}-、-{zh-cn:一-{二}-；三;zh-tw:四}-", "乙、丙、一二；三"),
        ("-{zh-cn:{{lang|en}}甲;zh-tw:乙}-x-{{a}}-{b", "甲x--{b"),
        ("甲（{{lang-en|foo}}）是 (  {{a}}{{b}}) print()、（{{a}}，乙）", "甲是 print()、（，乙）"),
    ],
)
def test_markup_of_the_chinese_wikipedia(tmp_path: Path, source: str, expected: str) -> None:
    """Catches captions, categories and texts in several variants of Chinese that stay as they are, and brackets around
    nothing, but not those of the article."""
    (tmp_path / "wiki.xml").write_text(CHINESE_WIKI % (source, source), encoding="utf-8")
    assert [*read(tmp_path / "wiki.xml").values()] == [expected, expected]


def test_braces_in_a_wiki_without_variants() -> None:
    """Catches names of molecules that lose their braces."""
    assert to_text("3-{[2-(a)]methyl}-N", "wikitext") == "3-{[2-(a)]methyl}-N"
    assert to_text("3-{[2-(a)]methyl}-N", "wikitext:en:File") == "3-{[2-(a)]methyl}-N"


@pytest.mark.parametrize("repeated", ["-{", "-{-{", "}-", "-{a}-", "({{a}}", "( ", "-{;zh:"])
def test_braces_of_a_large_article_take_linear_time(repeated: str) -> None:
    """Catches an article that a worker cleans for hours."""
    assert to_text(f"a {repeated * 20_000}", "wikitext:zh").startswith("a")


@pytest.mark.parametrize(("name", "content"), [("a.txt", "a\nb\n"), ("wiki.xml", WIKI)])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, name: str, content: str) -> None:
    """Catches a result with documents of two versions."""
    (tmp_path / name).write_text(content)
    config = build_config(CleanConfig, {"source": str(tmp_path), "output": "out"})
    found = read_inputs(find_inputs(config), config)
    next(found)
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(UserError, match=rf"{name} changed while it was read; run the command again"):
        list(found)


def test_an_article_with_many_notes_takes_linear_time() -> None:
    """Catches a list of thousands of notes that a worker searches for each of them."""
    source = "A fact.<ref>[[File:x.png|A [[book]]]]</ref>[[File:x.png|<ref>b</ref>]]\n\n\n" * 1_000
    assert to_text(source, "wikitext") == "\n\n".join(["A fact."] * 1_000)


def test_entities_of_half_a_character(tmp_path: Path) -> None:
    """Catches a traceback when the document is written."""
    (tmp_path / "wiki.xml").write_text(WIKI.replace("It lives", "A &amp;#xD800; and &amp;#xD83D;&amp;#xDE00;"))
    (text,) = read(tmp_path / "wiki.xml").values()
    assert text.endswith("A \ufffd and \U0001f600.")


@pytest.mark.parametrize("name", ["a.html.gz", "a.html.zst", "wiki.xml.zst", "film.xml.zst"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    """Catches the advice to read a file with `deepcloze clean`, by `deepcloze clean`."""
    content = (HTML if "html" in name else WIKI if "wiki" in name else FILM).encode()
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(pack(content))
    (text,) = read(tmp_path / name).values()
    assert text


def test_subtitles_of_films(tmp_path: Path) -> None:
    (tmp_path / "1.xml.gz").write_bytes(gzip.compress(FILM.encode()))
    assert read(tmp_path / "1.xml.gz") == {"1.xml.gz:1": "Hello there\nBye ."}
    archive = make_zip(tmp_path / "en.zip", {"OpenSubtitles/xml/en/1.xml": FILM, "README": "x"})
    assert read(archive) == {"1.xml:1": "Hello there\nBye ."}
    archive = make_zip(tmp_path / "mac.zip", {"xml/1.xml": FILM, "__MACOSX/xml/._1.xml": "\0"})
    assert read(archive) == {"1.xml:1": "Hello there\nBye ."}
    mixed = make_zip(tmp_path / "mixed.zip", {"1.txt": "Text", "meta.xml": "<meta/>"})
    assert read(mixed) == {"mixed.zip::1.txt:1": "Text"}  # not only what looks like a film
    (tmp_path / "news.xml").write_text("<rss><item>News</item></rss>")
    with pytest.raises(UserError, match=r"news.xml: expected the XML of OpenSubtitles, .*, found <rss>"):
        read(tmp_path / "news.xml")
    (tmp_path / "bad.xml").write_text(FILM[:-4])
    with pytest.raises(UserError, match=r"bad.xml: invalid XML: "):
        read(tmp_path / "bad.xml")


def test_xml_of_another_format_is_not_read_into_memory(tmp_path: Path) -> None:
    """Catches a file of 100 GB that ends a cleaning when the memory is full."""
    (tmp_path / "news.xml").write_text(f"<rss>{'<item>News</item>' * 200_000}</rss>")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"news.xml: expected the XML of OpenSubtitles, .*, found <rss>"):
            read(tmp_path / "news.xml")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ("你 好 ？", "你好？"),
        ("“ 你 好 ” ， OK ？ 3 个", "“你好”，OK？3 个"),
        ("再 见 . . .", "再见. . ."),
        ("Hello , world .", "Hello , world ."),
        ("안녕 하세요 .", "안녕 하세요 ."),
    ],
)
def test_tokens_of_films_in_scripts_without_spaces(tmp_path: Path, tokens: str, line: str) -> None:
    """Catches spaces between the words of Chinese."""
    words = " ".join(f"<w>{token}</w>" for token in tokens.split())
    (tmp_path / "1.xml").write_text(
        f'<document><s>{words}</s><s>\n<time id="T1S"/>\n你好 吗\n</s></document>', encoding="utf-8"
    )
    assert read(tmp_path / "1.xml") == {"1.xml:1": f"{line}\n你好 吗"}


def test_moses_pairs(tmp_path: Path) -> None:
    sides = {"O.en-zh.en": "a\nb\nc\n", "O.en-zh.zh": "甲\n乙\n丙\n"}
    ids = {"O.en-zh.ids": "en/1\tzh/1\t1\t1\nen/1\tzh/1\t2\t2\nen/2\tzh/2\t1\t1\n"}
    found = read(make_zip(tmp_path / "a.zip", {**sides, **ids}))
    assert list(found.values()) == ["a\nb", "c", "甲\n乙", "丙"]
    assert len(read(make_zip(tmp_path / "b.zip", sides))) == 6
    with pytest.raises(UserError, match=r"c\.zip::O\.en-zh\.en: expected as many lines .* only one .* has line 4"):
        read(make_zip(tmp_path / "c.zip", {**sides, "O.en-zh.ids": ids["O.en-zh.ids"] + "en/2\tzh/2\t2\t2\n"}))


def test_names_of_members_that_are_not_unicode(tmp_path: Path) -> None:
    """Catches a traceback when the name becomes a part of an id, or a name that zipfile cannot decode."""
    with tarfile.open(tmp_path / "a.tar", "w", errors="surrogateescape") as archive:
        for name in ("\udcff.txt", "\udcff.pdf"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    assert read(tmp_path / "a.tar") == {"a.tar::\ufffd.txt:1": "text"}
    path = make_zip(tmp_path / "a.zip", {"\u00e9.txt": "text"})
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    with pytest.raises(UserError, match=r"a\.zip is damaged or truncated: 'utf-8' codec can't decode byte 0xff"):
        read(path)


def test_a_zip_with_a_password(tmp_path: Path) -> None:
    """Catches a traceback of zipfile."""
    archive = make_zip(tmp_path / "en.zip", {"xml/en/1.xml": FILM})
    content = bytearray(archive.read_bytes())
    for place in (6, content.index(b"PK\x01\x02") + 8):
        content[place] |= 1  # the member is encrypted
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*en\.zip: File 'xml/en/1\.xml' is encrypted, password required"):
        read(archive)


def test_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separator = " +++$+++ "
    lines = [["L1", "u0", "m0", "A", "Hi café"], ["L2", "u1", "m0", "B", "Hello."], ["L3", "u0", "m0", "A"]]
    (tmp_path / "movie_lines.txt").write_text("\n".join(map(separator.join, lines)), encoding="iso-8859-1")
    conversations = tmp_path / "movie_conversations.txt"
    conversations.write_text(separator.join(["u0", "u1", "m0", "['L1', 'L2']"]))
    monkeypatch.chdir(tmp_path)
    for source in (conversations, conversations.name):
        assert read(source) == {"movie_conversations.txt:1": "Hi café\nHello."}
    zipped = tmp_path / "cornell.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in (conversations, tmp_path / "movie_lines.txt"):
            archive.write(path, f"corpus/{path.name}")
    assert read(zipped) == {"cornell.zip:1": "Hi café\nHello."}
    conversations.write_text(separator.join(["u0", "u1", "m0", "['L1', 'L9']"]))
    with pytest.raises(UserError, match=r"movie_conversations.txt:1: expected a list of lines of movie_lines.txt"):
        read(conversations)
    assert read(tmp_path / "movie_lines.txt") == {}  # they are read with the conversations
    alone = tmp_path / "alone" / conversations.name
    alone.parent.mkdir()
    conversations.rename(alone)
    with pytest.raises(
        UserError, match=r"conversations\.txt: .* movie_lines\.txt, which is not in the same folder or zip"
    ):
        read(alone)
    with pytest.raises(UserError, match=r"movie_lines\.txt: .* movie_conversations\.txt, which is not in the same"):
        read(tmp_path / "movie_lines.txt")
    (tmp_path / "dialogues_text.txt").write_text("Hi . __eou__ Hello . __eou__\n")
    assert read(tmp_path / "dialogues_text.txt") == {"dialogues_text.txt:1": "Hi .\nHello ."}


def test_readers_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the folder of readers that is listed again for each of a million files."""
    assert readers.reader_of("a.html") is not None
    monkeypatch.setattr(pkgutil, "iter_modules", lambda _: pytest.fail("lists the folder"))
    assert readers.reader_of("b.html") is not None


def test_a_folder_of_several_formats_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.html").write_text(HTML)
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert list(read(tmp_path)) == ["a.html:1", "b.txt:1"]
    assert list(read(tmp_path / "c.bin", format="html")) == ["c.bin:1"]


def test_metadata_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "http://a.org", "more": 1}\n')
    config = build_config(CleanConfig, {"source": str(tmp_path), "output": "out", "metadata": ["url"]})
    (document,) = read_inputs(find_inputs(config), config)
    assert (document.text, document.metadata) == ("one", {"url": "http://a.org"})
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'title'; found: text, url, more"):
        read(tmp_path, metadata=["title"])
    cleaned = {"id": "x:1", "source": "x", "text": "one"}
    for row, metadata in (({"metadata": "none"}, ["metadata"]), ({"metadata": None}, ["url"])):
        (tmp_path / "a.jsonl").write_text(json.dumps({**cleaned, **row}))
        assert read(tmp_path, metadata=metadata) == {"a.jsonl:1": "one"}
    with pytest.raises(UserError, match="'metadata': 'text' is the column of the text"):
        read(tmp_path, metadata=["text"])
    for url in ('["\\ud800"]', '{"\\ud800": 1}'):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "one", "url": {url}}}\n')
        with pytest.raises(
            UserError, match=r"a.jsonl:1: expected Unicode text in 'metadata', found half of a surrogate pair"
        ):
            read(tmp_path, metadata=["url"])


def test_single_bytes_that_are_not_utf8_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a cleaning of terabytes that ends at half of an emoji, or text that changes in silence."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud83d"}\n{"text": "caf\xe9"}\n{"text": "\xf0\x9f\x98\x80"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xffone\ntwo\n")
    assert list(read(tmp_path).values()) == ["half \ufffd", "caf\ufffd", "\U0001f600", "\ufffdone", "two"]
    assert "a.jsonl and 1 more: U+FFFD replaces bytes that are not UTF-8, or halves of surrogate pairs, in 3 lines" in (
        caplog.text
    )


def test_a_file_in_another_encoding_is_rejected(tmp_path: Path) -> None:
    """Catches Chinese that becomes U+FFFD, where the user should name the encoding."""
    (tmp_path / "a.txt").write_text("龙虾生活在海里\n" * 50, encoding="gb18030")
    with pytest.raises(UserError, match=r"a\.txt:11: not UTF-8 text .*iconv.*GB18030 or BIG5$"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes((b"text\n" * 30 + b"caf\xe9\n") * 50)
    assert len(read(tmp_path)) == 31 * 50


def test_short_files_in_another_encoding_are_rejected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a folder of short Chinese files that all become U+FFFD, and a source that is rejected because of a single
    one."""
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(
            "# news\n龍蝦生活在海裡\n大蝦生活在海裡\n牠們也生活在河裡\n", encoding="big5"
        )
    with pytest.raises(UserError, match=r"d\.txt:3: not UTF-8 text .*iconv.*GB18030 or BIG5$"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"source: most lines are not UTF-8 text, such as in .*/a\.txt; .* iconv"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("text\n" * 400)
    assert len(read(tmp_path)) == 400 + 5 * 4
    assert "in 15 lines" in caplog.text


def test_damage_in_a_small_file_is_replaced(tmp_path: Path) -> None:
    """Catches a cleaning of huge Parquet files that ends, after they were read, at a few damaged lines beside them."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    assert read(tmp_path) == {"a.txt:1": "caf\ufffd"}
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n" * 3)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"]}), tmp_path / "b.parquet")
    assert list(read(tmp_path).values()) == ["caf\ufffd"] * 3 + ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.zip"])
def test_metadata_of_other_tables(tmp_path: Path, name: str) -> None:
    """Catches columns that are mixed up, and formats whose metadata is lost."""
    import pyarrow
    import pyarrow.parquet

    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"url": ["u"], "n": [1], "text": ["one"]}), tmp_path / name)
    elif name == "a.csv":
        (tmp_path / name).write_text("url,n,text\nu,1,one\n")
    else:
        make_zip(tmp_path / name, {"b.jsonl": '{"url": "u", "n": 1, "text": "one"}\n'})
    config = build_config(CleanConfig, {"source": str(tmp_path / name), "output": "out", "metadata": ["n", "url"]})
    (document,) = read_inputs(find_inputs(config), config)
    assert (document.text, document.metadata) == ("one", {"n": "1" if name == "a.csv" else 1, "url": "u"})


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("a,b\n1,2\n", {}, "a.csv: no column 'text'; found: a, b (column names the column)"),
        ('text\n"a"b\n', {}, "if quotes are ordinary characters, set quoting: 3"),
        ("text\na\n", {"metadata": ["url"]}, "no column 'url'; found: text (metadata names the column)"),
        ("text\na\n", {"document_start": "=="}, "document_start '==' matches no line"),
    ],
)
def test_messages_name_keys_not_flags(tmp_path: Path, text: str, keys: dict[str, Any], message: str) -> None:
    """Catches advice to set a flag that the command does not have."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.csv", **keys)
    assert message in str(error.value)
    assert "--" not in str(error.value)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """Catches documents with the same id."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "one\n")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.txt", "two\n")
    with pytest.raises(UserError, match=r"a.zip::a.txt is read twice; name it once, or rename one of two files"):
        read(tmp_path / "a.zip")
    make_zip(tmp_path / "b.zip", {"b.txt": "one\n"})
    with pytest.raises(UserError, match=r"b.zip::b.txt is read twice; name it once"):
        read(f"{tmp_path}/b.zip,{tmp_path}/b.zip::b.*")


def test_pages_in_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a message that does not say which files there are, and advice to do what the user does."""
    path = make_zip(tmp_path / "site.zip", {"index.html": HTML})
    with pytest.raises(UserError, match=r"site.zip: no member matches '\*'"):
        read(path)
    assert "skipping 1 file of other formats, such as index.html" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"\.html files are not read; read it with `deepcloze clean` \(unpack archives first"
    ):
        read(f"{path}::*.html")
