"""`deepcloze corpus --inspect`: look at a corpus before it is used."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError, readable_disk_errors
from experiment.models.tokenizer import load_tokenizer
from experiment.progress import progress
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.corpus.origins import cleanings_of
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.inspection.contents import count_lengths, script_shares
from pretrain.inspection.masked_documents import masked_documents
from pretrain.inspection.near_duplicates import find_near_duplicates
from pretrain.inspection.packing_efficiency import MAX_SEQ_LENGTHS, packing_efficiency
from pretrain.inspection.page import Inspection, describe, write_inspection
from pretrain.inspection.sample import draw_sample


def inspect_corpus(folder: Path, output: Path | None, seed: int) -> Path:
    """Print a summary of a corpus, write a page about it, and return its path: `output`, by default FOLDER-inspect.html
    beside the corpus, or in the working directory if that cannot be written.

    The corpus is only read. Raises UserError for a folder that is not a corpus, a damaged one, or an output that cannot
    be written.
    """
    corpus = open_corpus(folder)
    beside = corpus.path.parent if os.access(corpus.path.parent, os.W_OK) else Path()
    path = output or beside / f"{corpus.path.name}-inspect.html"
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; expected a file")
    if path.suffix != ".html" or Path(os.path.realpath(path)).is_relative_to(corpus.path.resolve()):
        raise UserError(f"--output: expected a file in .html outside the corpus, found {path}")
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    try:
        found = _inspect(corpus, tokenizer, seed)
    except UserError:
        raise
    except Exception:  # of numpy or pyarrow
        if damage := next(filter(None, map(corpus.find_damage, corpus.manifest.shards)), None):
            raise UserError(damage) from None
        raise
    print(describe(found, tokenizer))
    with readable_disk_errors("--output: ", writes=True):
        write_inspection(path, found, tokenizer)
    print(f"  page: {path}")
    return path


def _inspect(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> Inspection:
    special_tokens = build_vocabulary(tokenizer).num_special_tokens
    sample = draw_sample(corpus, seed)
    lengths, documents = count_lengths(corpus)
    millions = sample.share * corpus.tokens / 1e6
    with progress(f"counting the tokens of {corpus.name}", millions, "M") as advance:
        tokens = corpus.count_tokens(sample.shards, lambda done: advance(done / 1e6))
    with progress(f"looking for near-duplicates in {corpus.name}", millions, "M tokens") as advance:
        near_duplicates = find_near_duplicates(sample, lambda done: advance(done / 1e6))
    return Inspection(
        sample=sample,
        lengths=lengths,
        documents=documents,
        tokens=tokens,
        scripts=script_shares(sample.documents, tokenizer),
        packing=[packing_efficiency(lengths, documents, longest, special_tokens, seed) for longest in MAX_SEQ_LENGTHS],
        near_duplicates=near_duplicates,
        masked=masked_documents(sample, tokenizer),
        cleanings=cleanings_of(corpus.path),
    )
