"""Corpora of given token ids, written without tokenizing text."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from pretrain.corpus.manifest import TOKENIZER, Manifest, Recipe, Shard, percentiles, write_manifest
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.corpus.shards import write_shard

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*"abcdefgh", *"你好", "ж", "##s", *(f"w{number}" for number in range(985))]

Documents = Sequence[Sequence[int]]
MakeCorpus = Callable[..., Corpus]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer with 1,002 tokens."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_folder: Path) -> MakeCorpus:
    """Writes the documents of each shard as the corpus `tmp_path`/corpora/NAME."""

    def make(shards: Sequence[Documents], name: str = "books", word_length: int | None = None) -> Corpus:
        """word_length: tokens of a word; None: as from a build without a segmenter."""
        folder = tmp_path / "corpora" / name
        folder.mkdir(parents=True)
        (folder / TOKENIZER).symlink_to(tokenizer_folder)
        written = []
        for number, documents in enumerate(shards):
            path = folder / f"data-{number:05d}-of-{len(shards):05d}.arrow"
            lengths = np.array([len(ids) for ids in documents])
            starts = [np.arange(len(ids)) % (word_length or 1) == 0 for ids in documents]
            words = np.concatenate(starts) if word_length else None
            write_shard(path, np.concatenate(documents).astype(np.uint16), lengths, words)
            tokens = int(lengths.sum())
            written.append(
                Shard(path.name, len(lengths), tokens, 0, tokens, 4 * tokens, path.stat().st_size, "", f"{number}")
            )
        recipe = Recipe("0" * 32, "1" * 32, "main", None, None, None, "jieba" if word_length else None)
        lengths = [len(ids) for documents in shards for ids in documents]
        found = percentiles([(length, 1) for length in lengths])
        write_manifest(folder, Manifest(recipe, len(SPECIAL) + len(WORDS), "uint16", 3, found, tuple(written)))
        return open_corpus(folder)

    return make
