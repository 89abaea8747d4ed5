"""Decontamination: what is planted is found, and ordinary text is kept."""

import json
import pickle
import tracemalloc
from random import Random
from typing import Any

import pytest

from experiment.decontamination import EvaluationText, common_decontamination, read_clean_summary, texts_digests
from experiment.errors import UserError
from pretrain.cleaning import report, tally
from pretrain.cleaning.parts import read_documents
from pretrain.cleaning.steps.decontaminate import Index

LONG = "a gorgeous, witty and seductive movie that takes its time to say what nobody in the room had dared to say"
SHORT = "it's a charming and often affecting journey"


def digest_of(*texts: str) -> str:
    return texts_digests([EvaluationText("test", "", text) for text in texts])["test"]


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{number}" for number in range(count))


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (f"Before it. {LONG.upper()}! After.", True),
        (f"Before {' '.join(LONG.split()[4:17])} after", True),  # 13 words
        (f"Before {' '.join(LONG.split()[4:16])} after", False),  # 12 words
        ("They wrote: “It’s a charming, and often affecting, journey”.", True),
        ("it `s a charming and often affecting journey", True),
        ("They said I don’t think I laughed out loud once.", True),
        ("They said i do n't think i laughed out loud once .", True),
        ("It's a charming and often dull journey", False),
        ("I DON\x92T KNOW WHY!", True),
        ("You see, I don't know why.", False),
        ("not bad", True),
        ("Yesterday.\nNot bad!\nToday.", True),
        ("It was not bad at all", False),
        ("这部电影非常好看我们都很喜欢它", True),
        ("这部电影不好看", False),
        ("我昨天用花呗分期付款了", False),
        ("花呗分期付款", True),
        ("他说花呗可以分期付款吗怎么用", True),
    ],
)
def test_matches(text: str, is_found: bool) -> None:
    """Catches n-grams of the wrong length, texts that are missed, as when contractions are written in another way, and
    ones so short that they match by chance."""
    contractions = ["i do n't think i laughed out loud once", "I don't know why"]
    chinese = ["这部电影非常好看我们都很喜欢", "花呗分期付款", "花呗可以分期付款吗怎"]
    index = Index([LONG, SHORT, "not bad", *contractions, *chinese], ngram=13, min_words=5)
    assert (next(index.matches(text), None) is not None) == is_found


def test_an_ngram_at_the_end_of_a_document_is_whole() -> None:
    """Catches a match that goes beyond the last word."""
    index = Index([words(13)], ngram=13, min_words=5)
    assert next(index.matches(words(12)), None) is None
    assert next(index.matches("x " + words(13)), None) == (1, 14, 0, None)


def test_the_longest_of_several_matches_is_listed() -> None:
    """Catches a clean.json that depends on the number of workers: pickling changes the order of a set."""
    for texts in ([words(5), words(13)], [words(13), words(5)]):
        index = pickle.loads(pickle.dumps(Index(texts, ngram=13, min_words=5)))
        assert [match.end - match.start for match in index.matches(words(20))] == [13, 5]


def test_ngrams_take_little_memory() -> None:
    """Catches a set of lengths for each n-gram, in each of the workers."""
    texts = [" ".join(Random(number).choices(words(50).split(), k=100)) for number in range(200)]
    tracemalloc.start()
    try:
        index = Index(texts, ngram=13, min_words=5)
        assert tracemalloc.get_traced_memory()[0] < 300 * len(texts) * 88
    finally:
        tracemalloc.stop()
    assert len([*index.matches(texts[0])]) == 88


def test_two_characters_of_an_ngram_are_one_word() -> None:
    """Catches the name of an authority that counts as a leak, and n-grams of two scripts that are missed."""
    committee = "全国人民代表大会常务委员会"
    text = f"昨天{committee}在北京开会讨论了新的法律草案 Xinhua 报道说"
    index = Index([text], ngram=13, min_words=5)
    assert next(index.matches(f"据报道{committee}今天没有开会"), None) is None
    for ngram in (text[:26], text[3:29], f"{text[6:29]} Xinhua 报"):
        assert next(index.matches(f"x {ngram} y"), None) is not None
        assert next(index.matches(f"x {ngram[:-1]} y"), None) is None


def test_documents_are_dropped_and_listed(clean: Any, tmp_path: Any) -> None:
    """Catches matches that are not in clean.json, which users have to check, and a missing record for the manifest."""
    found = clean([f"He said: {LONG}.", words(40)], {"decontaminate": {"against": ["task"]}}, evaluated=[SHORT, LONG])
    step = found["steps"][0]
    assert (found["kept"], step["dropped"]) == (1, 1)
    assert step["matches"] == [
        {
            "id": f"{tmp_path}/in.txt:1",
            "rule": "contaminated",
            "match": "task test, test.tsv:3: a gorgeous witty and seductive movie that takes its time to say what",
        }
    ]
    summary = read_clean_summary(f"{tmp_path}/out")
    assert common_decontamination([summary]) == {"task test": digest_of(LONG, SHORT)}
    assert read_clean_summary(str(tmp_path)) is None


def test_the_first_matches_are_listed(clean: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that takes the number of listed matches for that of all."""
    monkeypatch.setattr(report, "_LISTED", 2)
    steps, evaluated = [{"decontaminate": {"against": ["task"]}}], [LONG]
    for listed, text in ((10, "all"), (3, "the first 3")):
        monkeypatch.setattr(tally, "_MATCHES", listed)
        output = tmp_path / f"{listed}"
        found = clean([f"{number} {LONG}" for number in range(4)], *steps, evaluated=evaluated, output=str(output))
        assert len(found["steps"][0]["matches"]) == min(listed, 4)
        assert f"The first 2 of 4 matches; clean.json has {text}." in (output / "report.html").read_text()


def test_cleaning_in_two_stages_keeps_the_record(clean: Any, tmp_path: Any) -> None:
    """Catches a second stage that forgets the decontamination of its sources, and their metadata; and one that repairs
    texts in which evaluation texts are then found, and keeps the record."""
    (tmp_path / "in.jsonl").write_text('{"text": "one two three", "url": "http://a.org", "source": "web"}\n')
    (tmp_path / "plain.txt").write_text("four five\n")
    step = {"decontaminate": {"against": ["task"]}}
    sources, metadata = [str(tmp_path / name) for name in ("in.jsonl", "plain.txt")], ["url", "source"]
    clean([], step, evaluated=[LONG], source=sources, metadata=metadata)
    first, second = str(tmp_path / "out"), str(tmp_path / "second")
    clean([], {"exact_dedup": {}}, source=first, output=second, metadata=metadata)
    assert common_decontamination([read_clean_summary(second)]) == {"task test": digest_of(LONG)}
    files = sorted((tmp_path / "second").glob("*.jsonl.zst"))
    found = [document.metadata for file in files for document in read_documents(file)]
    assert found == [{"url": "http://a.org", "source": "web"}, {}]
    clean([], {"html_tags": {}}, source=first, output=str(tmp_path / "repaired"))
    assert common_decontamination([read_clean_summary(str(tmp_path / "repaired"))]) == {}
    (tmp_path / "other.txt").write_text("four\n")
    clean([], source=[first, str(tmp_path / "other.txt")], output=str(tmp_path / "third"))
    assert "decontaminated" not in (read_clean_summary(str(tmp_path / "third")) or {})


def test_sentences_are_cut(clean: Any, tmp_path: Any) -> None:
    """Catches a cut that takes the whole document, or leaves a part of the match."""
    lines = [f"I don't. Two don’t say {LONG}. Three.", LONG]
    found = clean(lines, {"decontaminate": {"against": ["task"], "action": "cut"}}, evaluated=[LONG])
    step = found["steps"][0]
    assert (step["changed"], step["dropped"], len(step["matches"])) == (1, 1, 2)
    example = step["rules"]["contaminated_sentences"]["examples"][0]
    assert example["text"] == lines[0]
    (document,) = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert document.text == "I don't. Three."


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_short_texts_are_cut_from_dialogues(clean: Any, tmp_path: Any, action: str) -> None:
    """Catches a dialogue or film that is dropped because of one line such as `Hey.`."""
    dialogues = ["Joey left.\n  …Hey! ♪\n He did?", "Hey.\nWhat?", "hey", f"Hey.\n{LONG}", "医生\n我没有病。"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in dialogues))
    step = {"decontaminate": {"against": ["task"], "action": action}}
    evaluated = ["Hey.", "What?", "医生", LONG]
    found = clean([], step, evaluated=evaluated, source=str(tmp_path / "in.jsonl"))["steps"][0]
    documents = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert [document.text for document in documents] == ["Joey left.\n  He did?", "我没有病。"]
    counts = {name: (rule["dropped"], rule["changed"]) for name, rule in found["rules"].items()}
    if action == "drop":
        assert counts == {"contaminated": (2, 0), "contaminated_lines": (0, 2), "nothing_left": (1, 0)}
    else:
        assert counts == {"contaminated_sentences": (0, 2), "nothing_left": (3, 0)}


def test_a_cut_sentence_ends_after_its_quotes(clean: Any, tmp_path: Any) -> None:
    """Catches a closing quote that is left of a sentence."""
    text = "他昨天晚上给我打了一个很长的电话"
    step = {"decontaminate": {"against": ["task"], "action": "cut"}}
    clean([f"「{text}。」然后离开了。", f"『《{text}！》』【{text}？】是（{text}。）的。"], step, evaluated=[text])
    documents = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert [document.text for document in documents] == ["然后离开了。", "的。"]


def test_cutting_a_large_text_takes_linear_time(clean: Any, tmp_path: Any) -> None:
    """Catches a copy of a test set, as one document, that a worker cuts for hours."""
    evaluated = [f"v{number} {words(13)}." for number in range(20_000)]
    text = " ".join([*evaluated, "Left."])
    clean([text], {"decontaminate": {"against": ["task"], "action": "cut"}}, evaluated=evaluated)
    (document,) = read_documents(tmp_path / "out" / "data-00000.jsonl.zst")
    assert document.text == "Left."


def test_another_test_split_is_another_cleaning(clean: Any) -> None:
    """Catches a result that is kept although the texts of a task have changed."""
    step = {"decontaminate": {"against": ["task"]}}
    clean([words(40)], step, evaluated=[LONG])
    with pytest.raises(UserError, match="another config"):
        clean([words(40)], step, evaluated=[SHORT])
