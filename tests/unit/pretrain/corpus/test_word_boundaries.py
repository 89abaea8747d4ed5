import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSequences
from pretrain.batching.vocabulary import build_vocabulary, check_word_boundaries
from pretrain.config import MaskingConfig
from pretrain.corpus import build_plan, shards, splits, tasks
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import open_corpus
from pretrain.corpus.segmenter import SegmenterSpec, _import_jieba, load_segmenter, read_segmenter
from pretrain.corpus.word_boundaries import WordBoundaries, segmented_word_starts, word_boundaries

needs_jieba = pytest.mark.skipif(find_spec("jieba") is None, reason="the package jieba is not installed")

SENTENCES = ["我在图书馆看电影", "天气很好，我们去北京大学。", "他用google搜索了3.5万条结果", "the knowns of film"]


@pytest.fixture(scope="module", autouse=True)
def _dictionary_read_once() -> Iterator[None]:
    """Reading jieba's dictionary takes a second."""
    if find_spec("jieba") is None:
        yield
        return
    tokenizer = _import_jieba().Tokenizer
    read = cache(lambda path, real=tokenizer.gen_pfdict: real(io.BytesIO(Path(path).read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "gen_pfdict", lambda file: (read(file.name)[0].copy(), read(file.name)[1]))
        yield


MERGES = [("k", "n"), ("o", "w"), ("kn", "ow"), ("Ġ", "w"), ("'", "t"), ("å", "¤"), ("å¤", "©"), (".", ".")]


def byte_level(merges: list[tuple[str, str]] = MERGES) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: token for token, piece in enumerate([*alphabet, *map("".join, merges), "<mask>"])}
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁known", "s", ",", "(", ")", "▁(", "un", "▁un", "well", "天"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return tokenizer


def word_piece(chinese_alone: bool = True) -> Tokenizer:
    pieces = [
        "[UNK]",
        "known",
        "##s",
        "well",
        "the",
        ",",
        ".",
        "(",
        ")",
        "-",
        "你",
        "好",
        "##你",
        "##好",
        "ok",
        "3",
        "5",
    ]
    tokenizer = Tokenizer(models.WordPiece({piece: token for token, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=chinese_alone)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def boundaries_of(tokenizer: Tokenizer) -> WordBoundaries:
    marks = word_boundaries(tokenizer.to_str())
    assert marks is not None
    return marks


def in_words(text: str, encoding: Any, starts: Any) -> list[str]:
    """Split the text where words begin, and remove spaces."""
    first = [begin for (begin, _), start in zip(encoding.offsets, starts, strict=True) if start]
    assert first[0] <= len(text)
    return ["".join(text[begin:end].split()) for begin, end in zip(first, [*first[1:], len(text)], strict=True)]


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return in_words(text, encoding, boundaries_of(tokenizer).word_starts(np.array(encoding.ids)))


def test_wordpiece_boundaries() -> None:
    """Catches punctuation or Chinese characters joined to a word, and continuations that are not."""
    text = "the well-knowns (known), 你好 xyz"
    expected = ["the", "well", "-", "knowns", "(", "known", ")", ",", "你", "好", "xyz"]
    assert split(word_piece(), text) == expected


def test_byte_level_boundaries() -> None:
    """Catches words that include punctuation, whitespace or an added token, and characters that are split."""
    text = "known, well-known (天天) 2nd...\n\nnow won't 天"
    expected = "known|,|well|-|known|(|天天|)|2nd|..|.|||now|won|'t|天"
    assert split(byte_level(), text) == expected.split("|")
    assert split(byte_level(), "known \n now") == ["known", "", "now"]
    extended = byte_level()
    extended.add_tokens([AddedToken("covid", normalized=False)])
    assert split(extended, "xcovids covid") == ["x", "covid", "s", "covid"]


def test_sentencepiece_boundaries() -> None:
    """Catches punctuation that is split off; SentencePiece's words are separated by whitespace only."""
    assert split(unigram(), "known, knowns (well) 天") == ["known,", "knowns", "(well)", "天"]


@pytest.mark.parametrize("prepends", [True, False])
def test_boundaries_marked_by_the_normalizer(prepends: bool) -> None:
    """Catches tokenizers in the form of Gemma's and Llama's that are taken for ones without boundaries, and lines that
    are joined."""
    tokenizer = unigram()
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ("▁", "\n", "▁known", "known", "s", ",", "▁(", "天"))]
    tokenizer.model = models.Unigram(pieces, unk_id=0)
    steps = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    assert split(tokenizer, "known, knowns (天\nknown, 天") == ["known,", "knowns", "(天", "", "known,", "天"]


def test_word_level_boundaries() -> None:
    """Catches a word-level tokenizer that is rejected because it has no marks."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert boundaries_of(tokenizer).word_starts(np.array([0, 1, 1])).tolist() == [True, True, True]


def test_end_of_word_marks_are_not_supported() -> None:
    """Catches a tokenizer that marks word ends (`low</w>`) with wrong boundaries instead of none."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert word_boundaries(tokenizer.to_str()) is None


def cut_at_bars(text: str) -> Iterator[str]:
    return iter(CUTS[text])


CUTS = {
    text.replace("|", ""): text.split("|")
    for text in (
        "你好|你|好好",
        "你好|ok|,|好",
        "你ok|3|5|ok你|.| |the| |know|ns",
        "天|天天|known| |天天",
        "天known|,|天",
        "in| |中国",
        "中|国人",
    )
}


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (word_piece, "你好你好好", "你好|你|好好"),
        (lambda: word_piece(chinese_alone=False), "你好你好好", "你好|你|好好"),
        (word_piece, "你好ok,好", "你好|ok|,|好"),
        # The segmenter decides next to Chinese characters only: `35` and `knowns` are not split.
        (word_piece, "你ok35ok你. the knowns", "你ok35ok你|.|the|knowns"),
        (byte_level, "天天天known 天天", "天|天天|known|天天"),
        (byte_level, "天known,天", "天known|,|天"),
        # Tokens with a space or a character, and a part of the next character.
        (lambda: byte_level([("ä", "¸"), ("Ġ", "ä¸")]), "in 中国", "in|中国"),
        (lambda: byte_level([("å", "Ľ"), ("Ń", "åĽ")]), "中国人", "中国人"),
    ],
)
def test_segmenter_decides_for_chinese_only(make: Any, text: str, expected: str) -> None:
    """Catches Chinese characters that are not joined to words, several tokens of one character that each begin a
    word, words that begin within a character, and Latin words that the segmenter splits."""
    tokenizer = make()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = segmented_word_starts(
        text,
        np.array(encoding.ids),
        np.array(encoding.offsets),
        boundaries_of(tokenizer),
        cut_at_bars,
    )
    assert in_words(text, encoding, starts) == expected.split("|")


def test_jieba_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches a traceback, or a build that fails in its workers, if the package is not installed."""
    monkeypatch.setitem(sys.modules, "jieba", None)
    (tmp_path / "s.txt").write_text("你好\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pip install 'deepcloze\[chinese\]'"):
        build_corpus(
            CorpusOptions(
                source=tmp_path / "s.txt", tokenizer=vocabulary_folder, output=tmp_path / "c", segmenter="jieba"
            )
        )
    assert not (tmp_path / "c").exists()


def test_tokenizer_without_boundaries_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vocabulary_folder: Path
) -> None:
    """Catches a build that fails in its workers because the tokenizer has no word boundaries."""
    (tmp_path / "s.txt").write_text("你好\n", encoding="utf-8")
    monkeypatch.setattr(build_plan, "word_boundaries", lambda _json: None)
    with pytest.raises(UserError, match="cannot tell where words begin"):
        build_corpus(
            CorpusOptions(
                source=tmp_path / "s.txt", tokenizer=vocabulary_folder, output=tmp_path / "c", segmenter="jieba"
            )
        )


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    """A tokenizer folder in which every character of the sentences is a token."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    characters = sorted({character for sentence in SENTENCES for character in sentence if not character.isspace()})
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{character}" for character in characters),
    ]
    (folder / "vocab.txt").write_text("\n".join([*pieces, "the", "of", "known"]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(splits, "MIN_SPLIT_BYTES", 1500)
    monkeypatch.setattr(tasks, "BATCH_BYTES", 500)
    path = tmp_path / "source.txt"
    path.write_text("".join(f"{SENTENCES[number % 4]}\n" for number in range(300)), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_jieba
def test_chinese_text_without_words(
    tmp_path: Path, chinese: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches whole-word masking with words that are unknown, which neither the build nor the run says, also if only a
    part of the text has no spaces; and such a warning for text with spaces between its words."""
    (tmp_path / "a.txt").write_text("天气很好，我们去北京大学。\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("the knowns of film " * 2 + "我们去北京大学\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("the knowns of film " * 50 + "我们去北京大学\n", encoding="utf-8")
    (tmp_path / "d.txt").write_text("天气 很 好 ， 我们 去 北京大学 。\n", encoding="utf-8")
    (tmp_path / "e.txt").write_text("the knowns of film " * 2 + "วันนี้อากาศดี\n", encoding="utf-8")
    vocabulary = build_vocabulary(load_tokenizer(chinese))
    for source, segmenter, is_known in (
        ("a", None, False),
        ("b", None, False),
        ("c", None, True),
        ("d", None, True),
        ("e", None, False),
        ("a", "jieba", True),
    ):
        file, output = tmp_path / f"{source}.txt", tmp_path / f"{source}-{segmenter}"
        build_corpus(CorpusOptions(source=file, tokenizer=chinese, output=output, workers=1, segmenter=segmenter))
        shown = "tokens per word" if is_known else "tokens between spaces: either the tokenizer"
        assert shown in capsys.readouterr().out
        caplog.clear()
        check_word_boundaries("word", [open_corpus(output)], vocabulary)
        assert ("its word boundaries are unknown" in caplog.text) != is_known


@needs_jieba
def test_segmented_corpus(tmp_path: Path, chinese: Path, source: Path) -> None:
    """Catches words that are not jieba's, word starts read at wrong offsets, and a fingerprint that ignores word
    starts, although masks depend on them."""
    import datasets

    build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "one", workers=1, segmenter="jieba"))
    corpus = open_corpus(tmp_path / "one")
    assert len(corpus.manifest.shards) > 3
    recorded = json.loads((tmp_path / "one" / "manifest.json").read_text())["recipe"]["segmenter"]
    assert recorded.startswith("jieba 0.")
    assert "dictionary" in recorded

    rows = datasets.load_from_disk(str(tmp_path / "one"))
    assert rows.features["word_starts"] == datasets.List(datasets.Value("bool"))
    lengths = np.array([len(row) for row in rows["input_ids"]])
    starts = np.cumsum(lengths) - lengths
    read = corpus.read_word_starts(starts, lengths)
    assert read.tolist() == [flag for row in rows["word_starts"] for flag in row]
    assert corpus.manifest.tokens_per_word == lengths.sum() / read.sum(), "words separated by white space"
    inner = corpus.read_word_starts(starts + 3, lengths - 4)
    assert inner.tolist() == [flag for row in rows["word_starts"] for flag in row[3:-1]]

    tokenizer = load_tokenizer(chinese)
    found = []
    for ids, flags in zip(rows["input_ids"][:4], rows["word_starts"][:4], strict=True):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        marked = "".join(
            ("|" if flag else "") + piece.removeprefix("##") for piece, flag in zip(pieces, flags, strict=True)
        )
        found.append(marked[1:])
    assert found == [
        "我|在|图书馆|看|电影",
        "天气|很|好|，|我们|去|北京大学|。",
        "他用|google|搜索|了|3|.|5|万条|结果",
        "the|knowns|of|film",
    ]

    plain = build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "plain", workers=1))
    assert open_corpus(tmp_path / "plain").read_word_starts(starts, lengths) is None
    assert plain.fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match="another segmenter"):
        build_corpus(
            CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "plain", workers=1, segmenter="jieba")
        )


@needs_jieba
@pytest.mark.soak
def test_words_do_not_depend_on_workers(tmp_path: Path, chinese: Path, source: Path) -> None:
    """Catches a segmenter that cannot be sent to workers."""
    for workers in (1, 2):
        output = tmp_path / str(workers)
        build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=output, workers=workers, segmenter="jieba"))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@needs_jieba
def test_killed_segmented_build_resumes_to_same_bytes(
    tmp_path: Path, chinese: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches word starts misaligned with their tokens after a resume, and some shards without them."""
    build_corpus(
        CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "whole", workers=1, segmenter="jieba")
    )
    real, calls = shards.write_shard, iter(range(10))

    def dying(*args: Any, **options: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(
                CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "c", workers=1, segmenter="jieba")
            )
    assert len(list((tmp_path / "c.partial").glob("*.arrow"))) == 3
    with pytest.raises(UserError, match="another segmenter"):
        build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "c", workers=1))
    build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "c", workers=1, segmenter="jieba"))
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@needs_jieba
def test_words_of_a_user_dictionary(tmp_path: Path, chinese: Path, source: Path) -> None:
    """Catches words that jieba does not get, such as those after a byte order mark or before a tab, and a corpus that
    is taken for one with other words."""
    words = tmp_path / "words.txt"
    words.write_text("\ufeff他用\n\n图书馆看\t9\tn\n很好\n", encoding="utf-8")
    options = CorpusOptions(
        source=source, tokenizer=chinese, output=tmp_path / "c", workers=1, segmenter="jieba", user_dictionary=words
    )
    segment = load_segmenter(read_segmenter(words))
    assert list(segment("我在图书馆看电影")) == ["我", "在", "图书馆看", "电影"]
    assert list(segment("天气很好")) == ["天气", "很好"]
    corpus = build_corpus(options)
    plain = build_corpus(options.model_copy(update={"user_dictionary": None, "output": tmp_path / "plain"}))
    assert corpus.tokens == plain.tokens
    assert corpus.tokens_per_word > plain.tokens_per_word
    words.write_text("他用\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"another segmenter: jieba .*, user dictionary [0-9a-f]{16}\)"):
        build_corpus(options)


@needs_jieba
def test_words_that_jieba_never_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches entries without effect, and a dictionary that is useless because of one of them."""
    words = tmp_path / "words.txt"
    words.write_text("c++语言 5 n\nT细胞\n", encoding="utf-8")
    assert list(load_segmenter(read_segmenter(words))("学c++语言和T细胞")) == ["学", "c++语言", "和", "T细胞"]
    never = ("β受体阻滞剂", "阿莫西林·克拉维酸", "T 细胞白血病")
    segment = load_segmenter(SegmenterSpec("".join(f"{word} 9 n\n" for word in never)))
    for word in never:
        assert word not in segment(f"他用{word}治病")
        words.write_text(f"阿莫西林\n\n{word} 9 n\n", encoding="utf-8")
        assert read_segmenter(words) == SegmenterSpec("阿莫西林")
        shown = capsys.readouterr().err
        assert "left out 1 word of " in shown
        assert f"never finds, such as '{word}' in line 3: " in shown


@needs_jieba
def test_user_dictionaries_that_cannot_be_read(tmp_path: Path) -> None:
    """Catches a dictionary without effect."""
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "gb.txt").write_bytes("词".encode("gb18030"))
    for name, problem in {
        "empty.txt": "has no words",
        "gb.txt": "1: not UTF-8 text .*GB18030",
        "none.txt": "No such file",
    }.items():
        with pytest.raises(UserError, match=rf"--user_dictionary: .*{name}.*{problem}"):
            read_segmenter(tmp_path / name)
    with pytest.raises(ValueError, match="--user_dictionary needs --segmenter jieba"):
        CorpusOptions(source="s.txt", tokenizer="t", output=tmp_path, user_dictionary=tmp_path / "empty.txt")


@needs_jieba
def test_jieba_is_quiet_and_leaves_no_cache(tmp_path: Path) -> None:
    """Catches jieba's defaults: log lines, a cache in the temporary folder, and words from a cache that someone else
    left there."""
    (tmp_path / "jieba.cache").write_bytes(b"of another version")
    code = "from pretrain.corpus.segmenter import SegmenterSpec, load_segmenter"
    code += "; print('|'.join(load_segmenter(SegmenterSpec())('他来到了网易杭研大厦')))"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "他|来到|了|网易|杭研|大厦"  # 杭研 is not in the dictionary
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]


@needs_jieba
@pytest.mark.parametrize("unit", ["word", "span"])
def test_segmented_words_are_masked_whole(tmp_path: Path, chinese: Path, source: Path, unit: Any) -> None:
    """Catches Chinese words that are masked in part, and a masked share other than the rate."""
    build_corpus(CorpusOptions(source=source, tokenizer=chinese, output=tmp_path / "c", workers=1, segmenter="jieba"))
    corpus = open_corpus(tmp_path / "c")
    lengths = np.concatenate(list(corpus.document_lengths())).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens, word_starts = corpus.read(starts, lengths).astype(np.int64), corpus.read_word_starts(starts, lengths)
    assert word_starts is not None
    masker = Masker(build_vocabulary(load_tokenizer(chinese)), MaskingConfig(unit=unit), 1, corpus.fingerprint)
    hits = np.zeros(len(tokens))
    for epoch in range(40):
        sequences = BatchSequences(np.zeros_like(lengths), np.full_like(lengths, epoch), np.arange(len(lengths)))
        *_, chosen = masker.mask(tokens, lengths, sequences, word_starts)
        hit = np.zeros(len(tokens))
        hit[chosen] = 1
        whole = np.add.reduceat(hit, np.flatnonzero(word_starts)) / np.diff(np.flatnonzero(np.r_[word_starts, True]))
        assert set(whole) <= {0.0, 1.0}
        hits += hit
    assert hits.mean() / 40 == pytest.approx(0.15, abs=0.005)
