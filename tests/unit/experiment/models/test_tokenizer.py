import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertConfig

from experiment.errors import UserError, warn_once
from experiment.models.tokenizer import (
    BERT_TOKENS,
    ROBERTA_TOKENS,
    load_any_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)


@pytest.fixture(scope="module")
def vocabulary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but an uncased vocab.txt."""
    folder = tmp_path_factory.mktemp("vocabulary")
    entries = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "##s"]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("entries", "config", "lowercase"),
    [
        (["the", "<S>", "[unused1]"], None, True),
        (["the", "The"], None, False),
        (["the"], {"do_lower_case": False}, False),
        (["the", "The"], {"do_lower_case": True}, True),
    ],
)
def test_a_bare_vocabulary_is_cased_or_not(
    tmp_path: Path, entries: list[str], config: dict[str, bool] | None, lowercase: bool
) -> None:
    """Catches a cased vocabulary read as uncased, which turns names into other words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*specials, *entries]) + "\n")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads(load_tokenizer(tmp_path).backend_tokenizer.to_str())["normalizer"]["lowercase"] is lowercase


def test_a_vocabulary_is_read_as_its_model_does(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches amino acids of ESM that are cut into pieces as BERT's words."""
    shutil.copytree(vocabulary_folder, tmp_path, dirs_exist_ok=True)
    for model_type, tokenizer in (("esm", "EsmTokenizer"), ("electra", "BertTokenizer")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert type(load_any_tokenizer(tmp_path, needed=())).__name__ == tokenizer


@pytest.mark.parametrize(
    "name", ["ElectraTokenizer", "LayoutLMTokenizerFast", "DistilBertTokenizer", "RetriBertTokenizer", "RealmTokenizer"]
)
def test_a_vocabulary_of_a_copy_of_berts_tokenizer(tmp_path: Path, name: str) -> None:
    """Catches classes of older releases of transformers whose vocab.txt is refused, or read as uncased though it is
    cased."""
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_TOKENS.values(), "the", "River", "river"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert load_tokenizer(tmp_path).tokenize("the River") == ["the", "River"]


def test_a_sentencepiece_model_is_a_vocabulary(tmp_path: Path) -> None:
    """Catches releases of DeBERTa-v3, which have no tokenizer.json, that are refused in a clean installation."""
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text("the river flows to the sea\n" * 9)
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{role}_id": number for number, role in enumerate(pieces)},
        **{f"{role}_piece": piece for role, piece in pieces.items()},
    )
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("the river").input_ids) == "[CLS] the river[SEP]"
    (tmp_path / "spm.model").write_text("damaged")
    with pytest.raises(UserError, match=r"cannot load .*: its SentencePiece model is damaged, or .*; expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [False, True])
def test_tokens_that_were_added_to_a_vocabulary_are_kept(tmp_path: Path, decoder: bool) -> None:
    """Catches a folder of transformers 4, without tokenizer.json, whose added and special tokens are ignored."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n<s>\n[SEP]\n[MASK]\n<unk>\nthe\nco\n##vid\n中\n")
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": {"content": "<unk>"}}')
    config = {"tokenizer_class": "BertTokenizer", "cls_token": "<s>", "unk_token": "<unk>"}
    if decoder:
        config["added_tokens_decoder"] = {"9": {"content": "covid", "normalized": True}}
    else:
        (tmp_path / "added_tokens.json").write_text('{"covid": 9}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path)("The covid中中!").input_ids
    assert expected == [1, 5, 9, 8, 8, 4, 2]
    assert load_tokenizer(tmp_path)("The covid中中!").input_ids == expected


def test_fingerprint_is_of_what_makes_ids(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches a fingerprint that changes with padding, or stays the same with another normalizer or vocabulary, and a
    saved tokenizer that pads."""
    tokenizer = load_tokenizer(vocabulary_folder)
    plain = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    assert tokenizer_fingerprint(tokenizer) == plain
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == plain
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert (saved["padding"], saved["truncation"]) == (None, None)
    cased = tmp_path / "cased"
    cased.mkdir()
    (cased / "vocab.txt").write_bytes((vocabulary_folder / "vocab.txt").read_bytes())
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_fingerprint(load_tokenizer(cased)) != plain
    tokenizer.add_tokens(["newword"])
    assert tokenizer_fingerprint(tokenizer) != plain


WORDS = models.WordPiece({**{token: number for number, token in enumerate([*BERT_TOKENS.values(), *"abAB"])}, "##b": 9})
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = models.BPE({token: number for number, token in enumerate([*ROBERTA_TOKENS.values(), *BYTES])}, [])
NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPACES = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize(
    ("model", "normalizer", "pre_tokenizer", "name", "settings", "tokens"),
    [
        (WORDS, NFKC, pre_tokenizers.BertPreTokenizer(), "BertTokenizer", {}, "a ##b a"),
        (WORDS, NFKC, pre_tokenizers.BertPreTokenizer(), "RobertaTokenizer", {}, "a ##b a"),
        (WORDS, normalizers.BertNormalizer(), SPACES, "BertTokenizer", {}, "[UNK] a"),
        (WORDS, normalizers.BertNormalizer(), SPACES, "BertTokenizer", {"do_lower_case": False}, "[UNK] A"),
        (PAIRS, normalizers.NFKC(), BYTE_LEVEL, "RobertaTokenizer", {}, "A B Ġ A"),
        (PAIRS, normalizers.NFKC(), BYTE_LEVEL, "RobertaTokenizer", {"add_prefix_space": True}, "Ġ A B Ġ A"),
    ],
)
def test_ids_are_those_of_tokenizer_json(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model: models.Model,
    normalizer: normalizers.Normalizer,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    name: str,
    settings: dict[str, bool],
    tokens: str,
) -> None:
    """Catches a normalizer, pre-tokenizer or model that transformers 5 replaces by those of the class, so that a model
    sees ids that it was not trained with; settings that are lost; and copies with other ids."""
    roles = BERT_TOKENS if model is WORDS else ROBERTA_TOKENS
    file = Tokenizer(model)
    file.normalizer, file.pre_tokenizer = normalizer, pre_tokenizer
    file.add_special_tokens([*roles.values()])
    file.save(str(tmp_path / "tokenizer.json"))
    config = {**roles, "tokenizer_class": f"{name}Fast", **settings}  # as transformers 4 writes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    warn_once.cache_clear()
    tokenizer = load_tokenizer(tmp_path)
    assert caplog.messages == [
        f"tokenizer: using all of {tmp_path}/tokenizer.json: the normalizer, pre-tokenizer and model of {name} in "
        "transformers 5 give text other ids than the model was trained with"
    ]
    for number in range(2):
        assert tokenizer.tokenize("ＡＢ A") == tokens.split()
        assert ("token_type_ids" in tokenizer.model_input_names) == (name == "BertTokenizer")
        save_tokenizer(tokenizer, saved := tmp_path / str(number))
        (saved / "config.json").write_text('{"model_type": "bert"}')
        assert AutoTokenizer.from_pretrained(saved).tokenize("ＡＢ A") == tokens.split()
        fingerprint, tokenizer = tokenizer_fingerprint(tokenizer), load_tokenizer(saved)
        assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert len(caplog.messages) == 1


def test_a_tokenizer_without_an_unknown_token_can_be_used(tmp_path: Path) -> None:
    """Catches a closed vocabulary, such as that of DNA, that is refused because no other text can be encoded."""
    roles = {role: token for role, token in BERT_TOKENS.items() if role != "unk_token"}
    vocabulary = {token: number for number, token in enumerate([*roles.values(), *"acgt"])}
    file = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    file.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    file.add_special_tokens([*roles.values()])
    file.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**roles, "tokenizer_class": "BertTokenizer"}))
    assert load_any_tokenizer(tmp_path, needed=()).tokenize("a c") == ["a", "c"]


@pytest.mark.parametrize("name", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_that_gives_the_ids_of_its_file_is_kept(tmp_path: Path, name: str) -> None:
    """Catches ordinary tokenizers whose fingerprint changes, so that their corpora are refused: as in transformers 4,
    BERT's lowercase text unless tokenizer_config.json says that they do not."""
    file = Tokenizer(WORDS)
    file.normalizer = normalizers.BertNormalizer(lowercase=False)
    file.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    file.add_special_tokens([*BERT_TOKENS.values()])
    file.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**BERT_TOKENS, "tokenizer_class": name}))
    tokenizer, plain = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(plain)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(plain)


@pytest.mark.parametrize("added", [None, "[MASK]", AddedToken("[MASK]", lstrip=True, special=True)])
def test_special_tokens_that_the_folder_does_not_name(tmp_path: Path, added: str | AddedToken | None) -> None:
    """Catches a corpus that counts as damaged, and whose models cannot be evaluated on it: saving marks the tokens as
    special, which changed the fingerprint. And a mask that no longer takes the space before it."""
    file = Tokenizer(WORDS)
    file.add_tokens([] if added is None else [added])
    file.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer.added_tokens_decoder == load_tokenizer(tmp_path / "saved").added_tokens_decoder
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(tmp_path / "saved"))
    assert tokenizer.added_tokens_decoder[4].lstrip == isinstance(added, AddedToken)


def test_saved_tokenizers_do_not_depend_on_their_source(tmp_path: Path, vocabulary_folder: Path) -> None:
    """Catches paths or loading options in the files, which would make equal corpora differ, and what transformers 4
    cannot read or transformers cannot find: a list of special tokens under its new name, and code."""
    folder = Path(shutil.copytree(vocabulary_folder, tmp_path / "zero"))
    settings = {"extra_special_tokens": ["[unused0]"], "auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_tokenizer(load_tokenizer(folder), tmp_path / "one")
    saved = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert saved["additional_special_tokens"] == ["[unused0]"]
    assert saved.keys().isdisjoint(settings)
    assert load_tokenizer(tmp_path / "one").extra_special_tokens == ["[unused0]"]
    save_tokenizer(load_tokenizer(tmp_path / "one"), tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert str(tmp_path) not in file.read_text()


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    """Catches a traceback, or a tokenizer without a mask token that fails at the first batch."""
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(tmp_path / "encoder.json")
    with pytest.raises(UserError, match=r"found encoder\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("the\na\n")
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "UnknownTokenizer"}')
    with pytest.raises(UserError, match=r"cannot load .*: (?!its SentencePiece model)"):
        load_tokenizer(tmp_path)
    gpt = Tokenizer(models.BPE({"a": 0}, []))
    gpt.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="mask_token"):
        load_tokenizer(tmp_path)


def test_a_model_folder_without_vocabulary_is_rejected(tmp_path: Path) -> None:
    """Catches a folder with nothing but a config.json, for which transformers makes a tokenizer of five tokens."""
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no vocabulary; expected .* found config\.json"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_needed_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """Catches a classifier's tokenizer without [MASK] that fine-tuning rejects, or that pretraining accepts."""
    Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    assert load_any_tokenizer(tmp_path, needed=("pad_token",)).pad_token_id == 0
    with pytest.raises(UserError, match="has no mask_token; needed: pad_token, mask_token"):
        load_tokenizer(tmp_path)


def test_a_pre_tokenizer_in_python_is_refused(
    tmp_path: Path, vocabulary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback for RoFormer's Chinese tokenizer, which calls rjieba, or a corpus of other tokens."""

    def tokenize(text: str, hmm: bool) -> list[tuple[str, int, int]]:
        return [(match[0], *match.span()) for match in re.finditer(r"\w+", text)]

    monkeypatch.setitem(sys.modules, "rjieba", SimpleNamespace(tokenize=tokenize))
    shutil.copytree(vocabulary_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "roformer"}')
    for _ in range(2):
        assert load_any_tokenizer(tmp_path, needed=())("the river").input_ids == [3, 6, 7, 4], "fine-tuning can use it"
        # transformers 4 saves another pre-tokenizer in the place of its own.
        words = (vocabulary_folder / "vocab.txt").read_text().split()
        file = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}))
        file.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="holds a RoFormerTokenizer, whose pre-tokenizer is Python code"):
        load_tokenizer(tmp_path)


def test_a_mask_is_no_other_special_token(tmp_path: Path) -> None:
    """Catches masked tokens that the model takes for padding."""
    tokens = [*(token for token in BERT_TOKENS.values() if token != "[MASK]"), "a"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**BERT_TOKENS, "mask_token": "[PAD]"}))
    with pytest.raises(UserError, match=r"has one token, \[PAD\], as mask_token and pad_token"):
        load_tokenizer(tmp_path)
