"""Tokenizers: opened from a Hugging Face folder or a bare vocab.txt, trained on the user's text, and identified.

A corpus is made of token ids, which mean something only beside the tokenizer that made them. Its fingerprint says
whether another tokenizer gives text the same ids.
"""

import json
import re
import shutil
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from experiment.errors import UserError
from pretrain.corpus.encoding import Vocabulary
from pretrain.corpus.formats import Reading
from pretrain.corpus.manifest import digest_of, sync
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.progress_bar import Progress
from pretrain.corpus.sources import find_sources, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The roles a masked language model needs, under the names that BERT and RoBERTa gave them.
_FAMILIES = (
    {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"},
    {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
)
_NEEDED = ("cls_token", "sep_token", "pad_token", "mask_token")


def load_tokenizer(path: Path | str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face folder, or of a folder with just a BERT `vocab.txt`; never from the network.

    Where a folder names no special tokens, those of its vocabulary are taken that have BERT's or RoBERTa's names. A
    bare vocab.txt is uncased if no entry has an upper-case letter. Raises UserError for a folder that has no tokenizer,
    or one without the special tokens that a masked language model needs.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"tokenizer: {folder} is no folder; expected a Hugging Face folder, or one with a vocab.txt")
    tokenizer = _open_bare_vocabulary(folder) if _is_bare_vocabulary(folder) else _open_folder(folder)
    vocabulary = tokenizer.get_vocab()
    for family in _FAMILIES:
        if all(token in vocabulary for token in family.values()):
            for role, token in family.items():
                if getattr(tokenizer, role) is None:
                    setattr(tokenizer, role, token)
    missing = [role for role in _NEEDED if getattr(tokenizer, role) is None]
    if missing:
        raise UserError(
            f"tokenizer: {folder} has no {', '.join(missing)}; masked-language-model pretraining needs all of "
            f"{', '.join(_NEEDED)} (`deepcloze tokenizer` trains one that has them)"
        )
    return tokenizer


def _open_folder(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is in the one message below
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever is at hand, bare Exception included
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
        reason = f": {error}" if (folder / "tokenizer.json").is_file() else ""
        raise UserError(
            f"tokenizer: cannot open {folder}{reason}; expected a Hugging Face folder with a tokenizer.json, or one "
            f"with a vocab.txt, found {held}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer: {folder} holds a {type(tokenizer).__name__}, which has no tokenizer.json to convert to"
        )
    return tokenizer


def _is_bare_vocabulary(folder: Path) -> bool:
    """A vocab.txt and nothing that says it is another tokenizer's than BERT's."""
    if not (folder / "vocab.txt").is_file() or (folder / "tokenizer.json").is_file():
        return False
    return _tokenizer_config(folder).get("tokenizer_class") in (None, "BertTokenizer", "BertTokenizerFast")


def _open_bare_vocabulary(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import BertTokenizer

    path = folder / "vocab.txt"
    try:
        entries = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: cannot read {path}: {error}") from None
    absent = [token for token in _FAMILIES[0].values() if token not in entries]
    if absent:
        raise UserError(f"tokenizer: {path} is no BERT vocabulary: it has no {', '.join(absent)}")
    config = _tokenizer_config(folder)
    names = re.compile(r"\[.*\]|<.*>")  # [CLS], [unused1], <S>
    lowercase = not any(entry != entry.lower() for entry in entries if not names.fullmatch(entry))
    settings = {
        key: config[key] for key in ("tokenize_chinese_chars", "strip_accents", "model_max_length") if key in config
    }
    return BertTokenizer(vocab=str(path), do_lower_case=bool(config.get("do_lower_case", lowercase)), **settings)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Equal for two tokenizers that give every text the same ids.

    Covers normalizer, pre-tokenizer, model, vocabulary and added tokens; not padding, truncation, post-processing, nor
    what only matters where special tokens are recognised in text, which they never are in a corpus.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in state["model"].items() if value not in (None, "", False)}
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    added = [
        {"content": token["content"], "id": token["id"]} if token["special"] else token
        for token in state["added_tokens"]
    ]
    return digest_of(
        {
            "normalizer": state["normalizer"],
            "pre_tokenizer": _without(state["pre_tokenizer"], "trim_offsets"),  # moves offsets, not ids
            "model": model,
            "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        }
    )


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(below, name) for key, below in value.items() if key != name}
    return [_without(below, name) for below in value] if isinstance(value, list) else value


def vocabulary_of(tokenizer: "PreTrainedTokenizerFast") -> Vocabulary:
    """What the worker processes need of a tokenizer."""
    unknown = tokenizer.unk_token_id
    return Vocabulary(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        unknown_id=unknown,
        special_ids=tuple(sorted(set(tokenizer.all_special_ids) - {unknown})),
        token_type="uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32",
    )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a Hugging Face folder: the same bytes for the same tokenizer, wherever it came from."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    kept = json.loads(config.read_text(encoding="utf-8"))
    for about_the_source in (
        "is_local",
        "local_files_only",
        "name_or_path",
        "special_tokens_map_file",
        "tokenizer_file",
    ):
        kept.pop(about_the_source, None)
    config.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(*folder.iterdir(), folder)


def train_tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer on `options.source` and write it to `options.output`, which `AutoTokenizer` opens.

    kind: `wordpiece` (BERT's, with [PAD] [UNK] [CLS] [SEP] [MASK]) or `bpe` (RoBERTa's byte-level one, with <s> <pad>
    </s> <unk> <mask>). Raises UserError for a vocabulary that is too small, an empty source, and an output folder that
    is not empty.
    """
    assert options.source is not None
    assert options.vocab_size is not None
    size, kind, cased = options.vocab_size, options.kind, not options.lowercase
    sources = find_sources(options.source)
    folder = new_folder(options.output)
    documents = 0

    def texts(label: str) -> Iterator[str]:
        nonlocal documents
        reading = Reading()
        with Progress(label, sources) as progress:
            for found in read_documents(sources, options, reading):
                progress.advance(reading, len(found.text))
                yield found.text
        documents = progress.documents

    tokenizer = _train_wordpiece(texts, size, cased) if kind == "wordpiece" else _train_bpe(texts, size, cased)
    if documents == 0:
        raise UserError("--source holds no text: every document is empty")
    trained = _finish(tokenizer, kind)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(trained, partial)
    partial.replace(folder)
    print(f"{folder}: {kind} tokenizer of {len(trained):,} tokens, trained on {documents:,} documents")
    if len(trained) < size:
        print(
            f"the text gave {len(trained):,} tokens, fewer than --vocab_size {size:,}: it has no more pieces",
            file=sys.stderr,
        )


def new_folder(folder: Path) -> Path:
    """`folder`, the value of --output. Raises UserError unless it is empty or missing."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output {folder} already holds something; name a new folder")
    return folder


def _train_wordpiece(texts: Callable[[str], Iterator[str]], size: int, cased: bool) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if size < 2 * len(specials):
        raise UserError(f"--vocab_size {size} is too small: {len(specials)} of it are special tokens")
    untrained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    untrained.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    untrained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Rare characters would crowd out words: a text with some Chinese in it has thousands of them.
    most = max(size // 4, min(1000, size // 2))
    first, continuing = _alphabet(map(untrained.normalizer.normalize_str, texts("counting characters")), most)
    # The trainer numbers the pieces it begins with in the order of a hash map, and breaks ties by number: the same text
    # would give another vocabulary each time. Named as special tokens, the pieces are numbered in the order given here.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*specials, *(f"##{character}" for character in continuing)],
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    untrained.train_from_iterator(texts("training"), trainer=trainer)

    tokenizer = Tokenizer(models.WordPiece(untrained.get_vocab(with_added_tokens=False), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _alphabet(texts: Iterator[str], most: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them that are also found inside words."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for text in texts:
        words = text.split()
        counts.update("".join(words))
        inside.update(*(word[1:] for word in words))
    kept = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:most])
    # BERT's pre-tokenizer makes each punctuation character a word of its own.
    return kept, [character for character in kept if character in inside and not _is_punctuation(character)]


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _train_bpe(texts: Callable[[str], Iterator[str]], size: int, cased: bool) -> Tokenizer:
    specials = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(specials):
        raise UserError(
            f"--vocab_size {size} is too small for bpe: expected at least {len(alphabet) + len(specials)}, "
            "the bytes and the special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    if not cased:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts("training"), trainer=trainer)
    return tokenizer


def _finish(tokenizer: Tokenizer, kind: str) -> "PreTrainedTokenizerFast":
    """Add what turns ids into a model's input: post-processing, the roles of the special tokens."""
    from transformers import PreTrainedTokenizerFast

    roles = dict(_FAMILIES[0] if kind == "wordpiece" else _FAMILIES[1])
    cls, sep = roles["cls_token"], roles["sep_token"]
    # RoBERTa has one token type, and two separators between the sentences of a pair.
    pair = f"{cls} $A {sep} $B:1 {sep}:1" if kind == "wordpiece" else f"{cls} $A {sep} {sep} $B {sep}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    if kind == "wordpiece":
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        inputs = ["input_ids", "attention_mask"]
        roles |= {"bos_token": cls, "eos_token": sep}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **roles)
