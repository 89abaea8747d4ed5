"""`deepcloze corpus --inspect`, but for the search for near-duplicates."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from launcher.cli import main
from pretrain.batching.sequences import split_documents
from pretrain.cleaning.config import CleanConfig
from pretrain.cleaning.report import summarize
from pretrain.cleaning.step import Document, Verdict
from pretrain.cleaning.tally import StepTally
from pretrain.corpus.manifest import SourceShare, write_manifest
from pretrain.corpus.origins import write_cleanings
from pretrain.corpus.reader import Corpus
from pretrain.inspection import sample
from pretrain.inspection.contents import count_lengths, script_shares
from pretrain.inspection.masked_documents import masked_documents
from pretrain.inspection.packing_efficiency import packing_efficiency
from pretrain.inspection.sample import draw_sample, read_documents

MakeCorpus = Callable[..., Corpus]

UNK, A, B, NI, HAO, ZHE, S = 1, 5, 6, 13, 14, 15, 16


@pytest.fixture
def corpus(make_corpus: MakeCorpus) -> Corpus:
    random = np.random.default_rng(0)
    shards = [[random.integers(5, 1000, random.integers(1, 300)) for _ in range(30)] for _ in range(4)]
    return make_corpus(shards)


def test_documents_and_tokens_of_all_shards_are_read(corpus: Corpus) -> None:
    """Catches documents that are cut at the wrong places, and lengths and tokens that are missed or counted twice."""
    documents = read_documents(corpus, list(range(corpus.documents)))
    stream = corpus.read(np.zeros(1, np.int64), np.array([corpus.manifest.shards[0].tokens]))
    first = [document.ids for document in documents if document.shard == 0]
    assert np.concatenate(first).tolist() == stream.tolist()
    lengths, counts = count_lengths(corpus)
    assert np.repeat(lengths, counts).tolist() == sorted(len(document.ids) for document in documents)
    every = np.concatenate([document.ids for document in documents])
    counted: list[float] = []
    assert (
        corpus.count_tokens(draw_sample(corpus, 1).shards, counted.append) == np.bincount(every, minlength=1002)
    ).all()
    assert sum(counted) == len(every)


def test_a_token_outside_the_vocabulary_is_refused(make_corpus: MakeCorpus) -> None:
    """Catches a traceback for a damaged shard."""
    corpus = make_corpus([[[5, 6], [60_000]]])
    with pytest.raises(UserError, match=r"data-00000-of-00001.arrow is damaged: it has a token with id 60000"):
        corpus.count_tokens(draw_sample(corpus, 1).shards)


def test_large_corpora_are_sampled(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an inspection that reads terabytes, and one that does not draw by the seed."""
    monkeypatch.setattr(sample, "MAX_TOKENS", corpus.tokens // 3)
    monkeypatch.setattr(sample, "MAX_DOCUMENTS", 50)
    drawn = [draw_sample(corpus, seed) for seed in (1, 1, 2)]
    assert len(drawn[0].shards) == 2
    assert 0.3 < drawn[0].share < 0.7
    assert len({document.number for document in drawn[0].documents}) == 50
    numbers = [[document.number for document in each.documents] for each in drawn]
    assert numbers[0] == numbers[1] != numbers[2]


def test_letters_are_counted_by_script(make_corpus: MakeCorpus) -> None:
    """Catches scripts that are mixed up, and characters that are no letters, such as unknown tokens."""
    corpus = make_corpus([[[A, UNK, B, 1000, NI, HAO, S], [ZHE, ZHE, ZHE, ZHE]]])  # 1000: w984, one letter
    shares = script_shares(read_documents(corpus, [0, 1]), load_tokenizer(corpus.tokenizer_path))
    assert shares == [("Latin", 0.4), ("Cyrillic", 0.4), ("Han", 0.2)]


def test_packing_is_that_of_training() -> None:
    """Catches sequences that are split or packed in another way than for training."""
    lengths = np.array([1, 70, 126, 127, 1000])
    documents = np.array([4, 3, 2, 2, 1])
    found = packing_efficiency(lengths, documents, 128, 2, seed=1)
    assert found.sequences == len(split_documents(np.repeat(lengths, documents), 126))
    assert found.split_documents == pytest.approx(3 / 12)
    # 72 slots of 128; a second sequence never fits.
    found = packing_efficiency(np.array([70]), np.array([1000]), 128, 2, seed=1)
    assert found.special_tokens == pytest.approx(2 / 72)
    assert found.filled["packed"] == pytest.approx(72 / 128, rel=0.01)
    assert found.filled["padded"] == pytest.approx(72 / 80, rel=0.01)
    assert found.filled["flat"] > 0.97
    # Short sequences share microbatches that are narrower than the longest sequence.
    found = packing_efficiency(np.array([14, 126]), np.array([1000, 1000]), 128, 2, seed=1)
    assert found.filled["padded"] > 0.9
    # A microbatch of 8,192 slots would hold one of these.
    found = packing_efficiency(np.array([4500, 5000, 8000]), np.array([1000, 1000, 1000]), 8192, 2, seed=1)
    assert found.filled["flat"] > 0.95


def test_documents_are_masked(corpus: Corpus) -> None:
    """Catches tokens that are lost or in the wrong order, and masks that depend on more than the seed."""
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    drawn = draw_sample(corpus, 1)
    texts = masked_documents(drawn, tokenizer)
    assert texts == masked_documents(drawn, tokenizer)
    by_number = {f"{document.number + 1:,}": document for document in drawn.documents}
    predicted = []
    for text in texts:
        ids = by_number[text.title.split()[1]].ids[: len(text.tokens) - 2]
        assert (text.tokens[0].text, text.tokens[-1].text) == ("[CLS]", "[SEP]")
        shown = [token.text if token.answer is None else token.answer for token in text.tokens[1:-1]]
        assert shown == tokenizer.convert_ids_to_tokens(ids.tolist())
        predicted += [token for token in text.tokens if token.answer is not None]
    assert 0.05 < len(predicted) / sum(len(text.tokens) for text in texts) < 0.3
    assert sum(token.text == "[MASK]" for token in predicted) > len(predicted) / 2


def test_words_of_a_segmenter_are_masked_as_a_whole(make_corpus: MakeCorpus) -> None:
    """Catches a page that does not show how a segmenter has cut the text, or shows the words of another document."""
    random = np.random.default_rng(0)
    corpus = make_corpus([[random.integers(5, 1000, 43) for _ in range(20)] for _ in range(2)], word_length=4)
    texts = masked_documents(draw_sample(corpus, 1), load_tokenizer(corpus.tokenizer_path))
    for text in texts:
        assert [at - 1 for at, token in enumerate(text.tokens) if token.is_apart] == [*range(0, 43, 4), 43]
        is_masked = [token.answer is not None for token in text.tokens[1:-1]]
        assert all(len(set(is_masked[start : start + 4])) == 1 for start in range(0, 43, 4))
    assert any(token.answer for text in texts for token in text.tokens)


def test_the_command_writes_a_page_and_leaves_the_corpus_alone(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files in the corpus folder, a page that differs from one time to the next, and one that is lost because
    the corpus is on a read-only disk."""
    before = {path: path.stat().st_mtime_ns for path in [corpus.path, *corpus.path.iterdir()]}
    main(["corpus", "--inspect", str(corpus.path)])
    page = corpus.path.with_name("books-inspect.html")
    out = capsys.readouterr().out
    assert f"{corpus.documents:,} documents (3 empty ones dropped), {corpus.tokens:,} tokens in 4 shards" in out
    used = np.unique([token for document in read_documents(corpus, [*range(120)]) for token in document.ids]).size
    assert f"4.00 bytes per token, {used:,} of 1,002 tokens of the vocabulary occur\n" in out
    assert f"page: {page}" in out
    text = page.read_text(encoding="utf-8")
    assert "[MASK]" in text
    assert "near-duplicate (all documents)" in text
    assert before == {path: path.stat().st_mtime_ns for path in [corpus.path, *corpus.path.iterdir()]}

    folder = corpus.path.parents[1]
    main(["corpus", "--inspect", str(corpus.path), "--output", str(folder / "pages" / "p.html"), "--seed", "42"])
    assert (folder / "pages" / "p.html").read_text(encoding="utf-8") == text
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != page.parent)
    main(["corpus", "--inspect", str(corpus.path)])
    assert (folder / page.name).read_text(encoding="utf-8") == text


def test_sources_and_cleanings_are_shown(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page without what was dropped, its examples, languages and sources, and text taken for markup."""
    sources = (SourceShare("wiki", 40, 3 * corpus.tokens // 4), SourceShare("books", 80, corpus.tokens // 4))
    write_manifest(corpus.path, replace(corpus.manifest, sources=sources))
    tally = StepTally()
    for number in range(3):
        verdict = Verdict("too_few_words") if number < 2 else None
        tally.count(Document(f"a.txt:{number}", "a.txt", "<b>short"), "<b>short", verdict, False)
    config = build_config(CleanConfig, {"source": "a", "output": "b", "steps": [{"length": {"min_words": 3}}]})
    steps = [item.make() for item in config.steps]
    tallies = [StepTally(read=3), tally]
    summary = summarize(config, {"recipe": "", "source": ""}, 0, 1, Counter({"en": 1}), tallies, steps)
    write_cleanings(corpus.path, [{"folder": "", **summary}])
    main(["corpus", "--inspect", str(corpus.path)])
    out = capsys.readouterr().out
    assert "sources, share of the tokens: wiki 75.0%, books 25.0%\n" in out
    assert "  cleaning: 1 of 3 documents kept; dropped: length 2" in out
    page = corpus.path.with_name("books-inspect.html").read_text(encoding="utf-8")
    for text in ("Sources", "too_few_words: 2 of 2 dropped", "&lt;b&gt;short", "Languages", "66.67%"):
        assert text in page
    (corpus.path / "clean.json").write_text("{}")
    assert main(["corpus", "--inspect", str(corpus.path)]) == 2
    assert f"{corpus.path}/clean.json is damaged: expected a list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inspect", "missing"], "missing is not a corpus: it does not exist"),
        (["--inspect", "empty"], "empty is not a corpus: it has no manifest.json"),
        (["--inspect", "books", "--output", "empty"], "--output: empty is a folder; expected a file"),
        (["--inspect", "books", "--output", "a.txt/page.html"], "--output: a.txt: File exists"),
        (["--inspect", "books", "--output", "/proc/page.html"], "--output: /proc/page.html: No such file"),
        (["--inspect", "books", "--output", "a.txt"], "--output: expected a file in .html outside the corpus"),
        (["--inspect", "books", "--output", "books/page.html"], "outside the corpus, found books/page.html"),
        (["--inspect", "books", "--limit", "5"], "--inspect builds nothing; expected no --limit"),
        (["--inspect", "books", "--verify", "books"], "--verify builds nothing; expected no other flag"),
    ],
)
def test_mistakes(
    corpus: Corpus,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """Catches a traceback, a message of several lines, and a page that replaces data."""
    monkeypatch.chdir(corpus.path.parent)
    Path("empty").mkdir()
    Path("a.txt").touch()
    assert main(["corpus", *arguments]) == 2
    assert message in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_damaged_files(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback of pyarrow, or of a page about a cleaning."""
    shard = corpus.path / corpus.manifest.shards[0].file
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    assert main(["corpus", "--inspect", str(corpus.path)]) == 2
    assert f"{shard} is damaged: its SHA-256 is " in capsys.readouterr().err
    shard.write_bytes(content)
    (corpus.path / "clean.json").write_text('[{"folder": ""}]')
    assert main(["corpus", "--inspect", str(corpus.path)]) == 2
    assert "clean.json is damaged: expected a list of cleanings" in capsys.readouterr().err
