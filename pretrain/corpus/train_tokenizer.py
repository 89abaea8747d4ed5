"""`deepcloze tokenizer`: train a WordPiece or byte-level BPE tokenizer."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from experiment.errors import UserError, notify, readable_disk_errors
from experiment.formatting import counted
from experiment.models.tokenizer import BERT_TOKENS, ROBERTA_TOKENS, save_tokenizer
from experiment.output_folder import new_folder
from pretrain.corpus.documents import check_read, read_documents, reading_progress
from pretrain.corpus.formats import ReadStats
from pretrain.corpus.options import TextOptions, TokenizerOptions
from pretrain.corpus.sources import Source, Span, find_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_DOCUMENTS = 64  # between updates of the progress bar
_SMALL_VOCABULARY = 1000  # tokens: most words become characters


@dataclass
class _TrainingText:
    """The text of all documents, read once for each pass of the training."""

    sources: tuple[Source, ...]
    options: TextOptions
    documents: int = 0  # in the last pass
    is_checked: bool = False  # after the first pass

    def read(self, label: str) -> Iterator[str]:
        """Yield the text of each document. `label`: of the progress bar."""
        stats, self.documents = ReadStats(), 0
        sizes = [source.bytes for source in self.sources if source.bytes is not None]
        shown, text_bytes = 0, 0
        with reading_progress(label, sum(sizes) if len(sizes) == len(self.sources) else None) as advance:
            for document in read_documents(map(Span, self.sources), self.options, stats):
                self.documents += 1
                text_bytes += len(document.utf8())
                if self.documents % _SHOWN_DOCUMENTS == 0:
                    advance(stats.bytes_read - shown, _SHOWN_DOCUMENTS, text_bytes)
                    shown, text_bytes = stats.bytes_read, 0
                yield document.text
        if not self.is_checked:
            check_read(self.sources, self.options, stats.start_matches, stats.archives)
            self.is_checked = True


def train_tokenizer(options: TokenizerOptions) -> None:
    """Train a tokenizer on `options.source` and write it to `options.output`, which `AutoTokenizer` can load.

    `kind` is `wordpiece`, as in BERT, with [PAD] [UNK] [CLS] [SEP] [MASK], or `bpe`, byte-level as in RoBERTa, with <s>
    <pad> </s> <unk> <mask>. Raises UserError for a vocabulary that is too small, an empty source, a pattern that
    matches nothing, and an output folder that is not empty, is being written by another process or cannot be written.
    """
    assert options.source is not None
    assert options.vocab_size is not None
    with readable_disk_errors(f"--output {options.output}: "), new_folder(options.output) as partial:
        text = _TrainingText(find_sources(options.source), options)
        train = _train_wordpiece if options.kind == "wordpiece" else _train_bpe
        model = train(text, options.vocab_size, options.lowercase)
        if text.documents == 0:
            raise UserError(f"--source {options.source}: none of its documents has text")
        tokenizer = _wrap(model, options.kind)
        save_tokenizer(tokenizer, partial)
    print(
        f"{options.output}: {options.kind} tokenizer of {len(tokenizer):,} tokens, "
        f"trained on {counted(text.documents, 'document')}"
    )
    if len(tokenizer) < options.vocab_size:
        notify(f"found only {len(tokenizer):,} tokens in the text, fewer than --vocab_size {options.vocab_size:,}")
    if options.vocab_size < _SMALL_VOCABULARY:
        notify(f"--vocab_size {options.vocab_size} is small: usual vocabularies have 8,000 to 50,000 tokens")


def _train_wordpiece(text: _TrainingText, size: int, lowercase: bool) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if size < 2 * len(specials):
        raise UserError(f"--vocab_size {size} is too small: expected at least {2 * len(specials)}")
    untrained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    untrained.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    untrained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters = _Characters()
    for document in text.read("counting characters"):
        characters.count(untrained.normalizer.normalize_str(document))
    # Rare characters would crowd out words: text with some Chinese in it has thousands of them.
    kept, room = max(size // 4, min(1000, size // 2)), size - len(specials)
    _train_with_alphabet(untrained, text, size, specials, *characters.most_frequent(kept, room))
    left = size - untrained.get_vocab_size()
    if left and kept < len(characters.counts):  # as in Chinese, where a character is a word
        _train_with_alphabet(untrained, text, size, specials, *characters.most_frequent(kept + left, room))

    tokenizer = Tokenizer(models.WordPiece(untrained.get_vocab(with_added_tokens=False), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _train_with_alphabet(
    untrained: Tokenizer, text: _TrainingText, size: int, specials: list[str], first: list[str], continuing: list[str]
) -> None:
    """Train WordPiece. first, continuing: the characters that words may begin with, and may have inside."""
    # The trainer numbers its initial pieces in the order of a hash map and breaks ties by number, so the same text
    # would give a different vocabulary each time. Special tokens are numbered in the order given here.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*specials, *(f"##{character}" for character in continuing)],
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    untrained.train_from_iterator(text.read("training"), trainer=trainer)


class _Characters:
    """Counts of the characters of texts, and which of them occur inside words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._inside: set[str] = set()

    def count(self, text: str) -> None:
        words = text.split()
        self.counts.update("".join(words))
        self._inside.update(*(word[1:] for word in words))

    def most_frequent(self, count: int, tokens: int) -> tuple[list[str], list[str]]:
        """Return the most frequent characters, and those that also occur inside words: as many as fit in `tokens`."""
        by_count = sorted(self.counts, key=lambda character: (-self.counts[character], character))[:count]
        # What is punctuation, a word of its own, depends on the Unicode version of the pre-tokenizer, not on Python's.
        split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
        inside = {character for character in self._inside.intersection(by_count) if len(split(f"a{character}a")) == 1}
        ends = list(accumulate(1 + (character in inside) for character in by_count))
        kept = sorted(by_count[: bisect_right(ends, tokens)])
        return kept, [character for character in kept if character in inside]


def _train_bpe(text: _TrainingText, size: int, lowercase: bool) -> Tokenizer:
    specials = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(specials):
        raise UserError(
            f"--vocab_size {size} is too small for bpe: expected at least {len(alphabet) + len(specials)}, "
            "one for each byte and special token"
        )
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.read("training"), trainer=trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, kind: str) -> "PreTrainedTokenizerFast":
    """Add post-processing and the roles of the special tokens, which turn text into model inputs."""
    from transformers import PreTrainedTokenizerFast

    roles = dict(BERT_TOKENS if kind == "wordpiece" else ROBERTA_TOKENS)
    cls, sep = roles["cls_token"], roles["sep_token"]
    if kind == "wordpiece":
        pair, inputs = f"{cls} $A {sep} $B:1 {sep}:1", ["input_ids", "token_type_ids", "attention_mask"]
    else:  # RoBERTa has one token type and two separators between the sentences of a pair
        pair, inputs = f"{cls} $A {sep} {sep} $B {sep}", ["input_ids", "attention_mask"]
        roles |= {"bos_token": cls, "eos_token": sep}
    ids = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **roles)
