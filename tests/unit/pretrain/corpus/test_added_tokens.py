import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.tokenizer import decode_token, load_tokenizer, save_tokenizer, tokenizer_fingerprint
from hub_server import HubServer
from launcher.cli import main
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.corpus.added_tokens import check_extends, extend_tokenizer, old_pieces
from pretrain.corpus.tokenization import DocumentEncoder, tokenizer_spec


def extend(tokenizer: Path, folder: Path, *words: str) -> PreTrainedTokenizerFast:
    """Add words to a tokenizer and load the result."""
    (folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    extend_tokenizer(tokenizer, folder / "words.txt", folder / "extended")
    return load_tokenizer(folder / "extended")


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Unigram tokenizer, as in XLM-RoBERTa."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [(token, 0.0) for token in specials]
    pieces += [(piece, -3.0) for piece in ("▁", "▁the", "▁in", *"abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(specials)
    folder = tmp_path_factory.mktemp("tokenizers") / "unigram"
    roles = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), specials, strict=True))
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles), folder)
    return folder


def test_add_words_to_wordpiece(wordpiece: Path, tmp_path: Path) -> None:
    """Catches words that stay split, that match inside other words, or that change an existing id."""
    old = load_tokenizer(wordpiece)
    new = extend(wordpiece, tmp_path, "COVID-19", "Zedwilmar", "##Zzed", "ba", "zedwilmar")
    check_extends(new, old)
    assert [new.convert_ids_to_tokens(200 + added) for added in range(3)] == ["zedwilmar", "##zzed", "covid-19"]
    assert len(new) == 203
    text = "The zedwilmar, ZEDWILMAR and Covid-19; bazzed covid-190."
    tokens = new.tokenize(text)
    assert (tokens.count("zedwilmar"), tokens.count("covid-19"), tokens.count("##zzed")) == (2, 1, 1)
    assert tokens[tokens.index("##zzed") - 1] == "ba"
    untouched = "bade figolu marnes. polrin"
    assert new(untouched)["input_ids"] == old(untouched)["input_ids"]


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_add_words_to_other_tokenizers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches added tokens that match inside words, or that leave the space before them as a token."""
    folder = request.getfixturevalue(kind)
    old, new = load_tokenizer(folder), extend(folder, tmp_path, "zedwilmar")
    identifier = len(old)
    check_extends(new, old)
    plain = new("in zedwilmar the", add_special_tokens=False)["input_ids"]
    assert plain.count(identifier) == 1
    before, after = (old(text, add_special_tokens=False)["input_ids"] for text in ("in", " the"))
    assert plain == [*before, identifier, *after]
    for inside in ("inzedwilmar", "zedwilmarin", "zedwilmar2"):
        assert identifier not in new(inside, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_add_chinese_words(lowercase: bool, tmp_path: Path) -> None:
    """Catches words that are never found, or shown with spaces inside, and two spellings of one that are refused:
    BERT's normalizer puts spaces around each character of text and word."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"研究新冠肺炎的"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    new = extend(tmp_path / "bert", tmp_path, "新冠", "㗎", "T新", "t新")
    assert len(new) == len(vocabulary) + (3 if lowercase else 4)
    ids = new("研究新冠肺炎㗎的", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7
    assert {number for number in ids if number >= len(vocabulary)} == {len(vocabulary), len(vocabulary) + 1}
    assert {decode_token(new, number) for number in ids} == {*"研究肺炎的", "新冠", "㗎"}


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "unigram"])
def test_emoji_are_found_anywhere(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches emoji that are unknown if they are repeated, or with the word before them, also in a corpus."""
    folder = request.getfixturevalue(kind)
    old, new = load_tokenizer(folder), extend(folder, tmp_path, "🤣", "…", "👍🏽", "1️⃣")
    laugh, dots, thumb, one = (len(old) + place for place in ((1, 0, 2, 3) if kind == "wordpiece" else range(4)))
    before, after = (old(text, add_special_tokens=False)["input_ids"] for text in ("in", " the"))
    text = "in🤣🤣…🤣👍🏽1️⃣ the"
    expected = [*before, laugh, laugh, dots, laugh, thumb, one, *after]
    assert new(text, add_special_tokens=False)["input_ids"] == expected
    assert DocumentEncoder(tokenizer_spec(new)).encode([text]).ids.tolist() == expected
    vocabulary = build_vocabulary(new)
    assert vocabulary.word_boundaries.word_starts(np.array(expected[len(before) :][:7])).all()


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "unigram"])
@pytest.mark.parametrize("word", ["==", "->"])
def test_symbols_of_ascii_are_words(kind: str, word: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches an added operator that is cut out of a longer one between letters. Between spaces, it is found inside."""
    folder = request.getfixturevalue(kind)
    old, new = load_tokenizer(folder), extend(folder, tmp_path, word)
    assert new(f"the {word} the")["input_ids"].count(len(old)) == 1
    assert len(old) in new(f"the {word[0]}{word} the")["input_ids"]
    assert new(f"a{word[0]}{word}a")["input_ids"] == old(f"a{word[0]}{word}a")["input_ids"]


@pytest.mark.parametrize("word", ["Straße", "naïve", "½cup", "α"])
def test_the_pieces_of_an_added_word_are_those_of_its_text(word: str, byte_level: Path, tmp_path: Path) -> None:
    """Catches Latin-1 letters of an added word that are read as bytes, and shown as a replacement character."""
    old, new = load_tokenizer(byte_level), extend(byte_level, tmp_path, word)
    identifier = len(old)
    assert decode_token(new, identifier) == word
    assert old_pieces(new, old) == {identifier: old(f" {word}", add_special_tokens=False)["input_ids"]}


def test_an_unknown_emoji_has_no_pieces(unigram: Path, tmp_path: Path) -> None:
    """Catches embeddings of emoji that all are copies of the one of a space."""
    old, new = load_tokenizer(unigram), extend(unigram, tmp_path, "🤣", "zedwilmar")
    assert old.tokenize(" 🤣")[0] == "▁"
    emoji, word = (new.convert_tokens_to_ids(token) for token in ("🤣", "zedwilmar"))
    pieces = old_pieces(new, old)
    assert pieces[emoji] == []
    assert pieces[word] == old(" zedwilmar", add_special_tokens=False)["input_ids"]


def test_the_pieces_of_a_chinese_word_have_no_space(byte_level: Path, tmp_path: Path) -> None:
    """Catches a new row that is the mean of pieces with a space, which Chinese text does not have."""
    old, new = load_tokenizer(byte_level), extend(byte_level, tmp_path, "新冠")
    assert old_pieces(new, old) == {len(old): old("研究新冠", add_special_tokens=False)["input_ids"][-6:]}


@pytest.mark.parametrize(("word", "text"), [("新冠", "研究新冠肺炎"), ("ခေါင်း", "လူခေါင်းကိုက်"), ("ປອດ", "ໂລກປອດບວມ")])
@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_words_of_unspaced_scripts_are_found_between_other_characters(
    kind: str, word: str, text: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Catches words that are found next to punctuation only, because text without spaces has letters around them."""
    folder = request.getfixturevalue(kind)
    new = extend(folder, tmp_path, word)
    assert new(text, add_special_tokens=False)["input_ids"].count(len(load_tokenizer(folder))) == 1


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "unigram"])
@pytest.mark.parametrize("word", ["新冠", "zedwilmar", "🤣"])
def test_spaces_after_words_without_spaces(
    kind: str, word: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Chinese text that gets spaces at added words without a warning: Metaspace puts ▁ before what follows."""
    extend(request.getfixturevalue(kind), tmp_path, word)
    is_changed = kind == "unigram" and word != "zedwilmar"
    assert (f"'{word}a' as '{word} a'" in capsys.readouterr().err) == is_changed


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "unigram"])
def test_added_words_are_not_special(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Catches added words that are special: never masked, never drawn as replacements, or rejected in a corpus."""
    new = extend(request.getfixturevalue(kind), tmp_path, "zedwilmar", "re-zed")
    added = [len(new) - 2, len(new) - 1]
    vocabulary = build_vocabulary(new)
    assert not vocabulary.unmaskable[added].any()
    assert set(added) <= set(vocabulary.replacements.tolist())
    encoded = DocumentEncoder(tokenizer_spec(new)).encode(["in zedwilmar re-zed the"])
    assert encoded.special is None
    assert set(added) <= set(encoded.ids.tolist())


def test_extend_twice(wordpiece: Path, tmp_path: Path) -> None:
    """Catches a second extension that changes the ids of the first one's words, and an emoji or a word with a hyphen
    that keeps the vocabulary from growing."""
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).mkdir()
    first = extend(wordpiece, tmp_path / "a", "zedwilmar", "re-zed", "🤣")
    second = extend(tmp_path / "a" / "extended", tmp_path / "b", "lumarfigo", "ba-de")
    check_extends(second, first)
    assert second.tokenize("re-zed lumarfigo, zedwilmar ba-de") == [
        "re-zed",
        "lumarfigo",
        "[UNK]",
        "zedwilmar",
        "ba-de",
    ]
    third = extend(tmp_path / "b" / "extended", tmp_path / "c", "##zzed")
    check_extends(third, second)
    assert third.tokenize("lumarfigozzed🤣 re-zed ba-de") == ["lumarfigo", "##zzed", "🤣", "re-zed", "ba-de"]
    old = load_tokenizer(wordpiece)
    old.add_tokens("🤣")
    save_tokenizer(old, tmp_path / "d")
    with pytest.raises(UserError, match="line 1: '##zzed': the tokenizer has added tokens"):
        extend(tmp_path / "d", tmp_path / "e", "##zzed")


def test_same_words_give_same_bytes(wordpiece: Path, tmp_path: Path) -> None:
    """Catches ids that depend on a hash or the time, which would make a corpus useless."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        extend(wordpiece, tmp_path / name, "zedwilmar", "##zzed", "re-zed", "lumar")
    files = [{path.name: path.read_bytes() for path in (tmp_path / n / "extended").iterdir()} for n in ("a", "b")]
    assert files[0] == files[1]
    again = load_tokenizer(tmp_path / "a" / "extended")
    save_tokenizer(again, tmp_path / "copy")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "copy")) == tokenizer_fingerprint(again)


def test_command_reports_skipped_words(wordpiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches words that the command skips without saying so."""
    (tmp_path / "words").write_text("zedwilmar\n\nba\n  zedwilmar\n")
    arguments = ["--extend", str(wordpiece), "--added", str(tmp_path / "words"), "--output", str(tmp_path / "new")]
    assert main(["tokenizer", *arguments]) == 0
    assert "1 of 3 words added to 200 tokens, 2 in the vocabulary already, or repeated" in capsys.readouterr().out
    assert main(["tokenizer", *arguments]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert main(["tokenizer", *arguments, "--source", "x"]) == 2
    assert "expected --source and --vocab_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("wordpiece", ["new york"], "line 1: expected one word per line, found 'new york'"),
        ("wordpiece", ["zed", "##a-b"], "line 2: '##a-b' can never match"),
        ("wordpiece", ["z" * 101], "line 1: 'zzz.* would not become one token"),
        ("wordpiece", ["ba", "de"], "all 2 words of"),
        ("wordpiece", [""], "has no words"),
        (
            "wordpiece",
            ["ba", "\u200b"],
            r"line 2: '\\u200b' is empty after the tokenizer's normalization",
        ),
        ("byte_level", ["##zzed"], "line 1: '##zzed': only WordPiece"),
    ],
)
def test_unusable_words_are_rejected(
    kind: str, words: list[str], message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Catches entries that no text can match, and a folder left behind by a failed command."""
    with pytest.raises(UserError, match=message):
        extend(request.getfixturevalue(kind), tmp_path, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_old_pieces_of_new_words(wordpiece: Path, byte_level: Path, tmp_path: Path) -> None:
    """Catches initial embeddings taken from other pieces than those of the word in text."""
    for folder, words in ((wordpiece, ("zedwilmar", "##zzed", "ba-de")), (byte_level, ("zedwilmar", "ba-de"))):
        (tmp_path / folder.name).mkdir()
        old, new = load_tokenizer(folder), extend(folder, tmp_path / folder.name, *words)
        pieces = old_pieces(new, old)
        assert sorted(pieces) == list(range(len(old), len(new)))
        for identifier, word in enumerate(words, start=len(old)):
            text = f"ba{word[2:]}" if word.startswith("##") else f" {word}"
            in_text = [i for i in old(text, add_special_tokens=False)["input_ids"] if i != old.unk_token_id]
            assert pieces[identifier] == (in_text[1:] if word.startswith("##") else in_text)


def test_a_continuation_of_unknown_letters_has_no_pieces(wordpiece: Path, tmp_path: Path) -> None:
    """Catches an initial embedding that is the one of unknown tokens, or of the letters before the unknown one."""
    old, new = load_tokenizer(wordpiece), extend(wordpiece, tmp_path, "##αβ", "##zzα")
    assert old_pieces(new, old) == {len(old): [], len(old) + 1: []}


def test_other_tokenizer_does_not_extend(wordpiece: Path, byte_level: Path) -> None:
    """Catches a tokenizer in which existing ids stand for other tokens."""
    with pytest.raises(UserError, match="to have id"):
        check_extends(load_tokenizer(byte_level), load_tokenizer(wordpiece))


def test_a_tokenizer_of_the_hub(
    hub: HubServer, wordpiece: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches commands that take folders only, that download the weights of a model, or that print more than a line
    for a misspelt name."""
    hub.repository("org/tiny").push_folder(wordpiece, model__safetensors=b"weights", config__json=b"{}")
    (tmp_path / "words.txt").write_text("zedwilmar\n")
    added = ["--added", str(tmp_path / "words.txt"), "--output", str(tmp_path / "extended")]
    assert main(["tokenizer", "--extend", "org/tiny", *added]) == 0
    check_extends(load_tokenizer(tmp_path / "extended"), load_tokenizer(wordpiece))
    build = ["corpus", "--source", str(text_file), "--workers", "1", "--limit", "20"]
    for name, tokenizer in {"hub": "org/tiny@main", "folder": str(wordpiece)}.items():
        assert main([*build, "--tokenizer", tokenizer, "--output", str(tmp_path / name)]) == 0
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("hub", "folder")]
    assert manifests[0] == manifests[1]
    assert not any("safetensors" in request for request in hub.requests)

    capsys.readouterr()
    assert main([*build, "--tokenizer", "org/tny", "--output", str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("deepcloze: org/tny: no such folder, and no such model on the Hugging Face Hub")
    assert message.count("\n") == 1
