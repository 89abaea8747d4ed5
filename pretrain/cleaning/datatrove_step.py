"""Steps that are filters of datatrove, which keeps the rules of Gopher, C4 and FineWeb."""

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from pretrain.cleaning.step import ConfigT, Document, DocumentStep, Verdict, changed
from pretrain.cleaning.words import sentences, tokens

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.utils.word_tokenizers import WordTokenizer


class FilterStep(DocumentStep[ConfigT]):
    """Applies a filter of datatrove; its reasons are the rules."""

    packages: ClassVar[tuple[str, ...]] = ("datatrove",)

    filter_name: ClassVar[str]
    """Its class in `datatrove.pipeline.filters`. The keys of the step are its arguments."""

    def make_filter(self) -> "BaseFilter":
        from datatrove.pipeline import filters  # takes seconds

        return getattr(filters, self.filter_name)(**self.config.model_dump(), language=_word_tokenizer())

    @cached_property
    def filter(self) -> "BaseFilter":
        from loguru import logger

        logger.disable("datatrove")  # progress lines about its lists
        return self.make_filter()

    def apply(self, document: Document) -> Verdict | None:
        from datatrove.data import Document as DatatroveDocument

        wrapped = DatatroveDocument(document.text, document.id, metadata=document.metadata)
        result = self.filter.filter(wrapped)
        kept, rule = result if isinstance(result, tuple) else (result, "")
        return changed(document, wrapped.text, "changed") if kept else Verdict(rule or "dropped")


def _word_tokenizer() -> "WordTokenizer":
    """Wrap `words` for datatrove, whose own tokenizers need spaCy or download models."""
    from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

    class Words(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return tokens(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return list(simple_span_tokenize(text, sentences(text)))

    return Words()
