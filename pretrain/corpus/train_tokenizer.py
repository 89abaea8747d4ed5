"""Train a tokenizer on the user's text."""

import shutil
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from experiment.errors import UserError
from experiment.tokenizer import BERT_TOKENS, ROBERTA_TOKENS, save_tokenizer
from pretrain.corpus.formats import ReadStats
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.progress_bar import ProgressBar
from pretrain.corpus.sources import find_sources, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        stats = ReadStats()
        with ProgressBar(label, sources) as progress:
            for found in read_documents(sources, options, stats):
                progress.advance(stats, len(found.text))
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

    roles = dict(BERT_TOKENS if kind == "wordpiece" else ROBERTA_TOKENS)
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
