"""Limits of requests, and the count of the texts that are being answered."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException

_CANDIDATES_PER_TEXT = 100  # on average, of as many texts as a request may have
RETRY_SECONDS = "1"


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and of all requests together."""

    max_texts: int  # of one request
    max_bytes: int  # of one request
    max_queue: int  # texts of all requests that are being answered
    timeout: float  # seconds, from the headers of a request to the end of its answer
    max_item_tokens: int = 32768  # of a text, with all its options
    max_option_tokens: int = 8 * 32768  # of the options of all texts of one request


def busy(message: str) -> HTTPException:
    return HTTPException(503, message, {"Retry-After": RETRY_SECONDS})


class Admission:
    """Counts the texts that are being answered."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.texts = 0

    @property
    def is_full(self) -> bool:
        return self.texts >= self._limits.max_queue

    def check_candidates(self, count: int) -> None:
        """Raise HTTPException for too many candidates for the masks of one request: memory grows with them."""
        most = self._limits.max_texts * _CANDIDATES_PER_TEXT
        if count > most:
            raise HTTPException(413, f"{count:,} candidates for all masks; at most {most:,} are accepted")

    def check(self, texts: int, options: int = 0) -> None:
        """Check the sizes of a request. Raises HTTPException for too many texts or options."""
        for name, count in (("texts", texts), ("options", options)):
            if count > self._limits.max_texts:
                most = f"at most {self._limits.max_texts:,} are accepted"
                raise HTTPException(413, f"{count:,} {name} in one request; {most}")

    @contextmanager
    def admit(self, texts: int, options: int) -> Iterator[None]:
        """Admit a request. options: of all texts, for masks or as choices; they count as texts.

        Raises HTTPException like `check`, and 503 if too many wait already.
        """
        self.check(texts, options)
        texts = max(texts, options)
        if self.texts and self.texts + texts > self._limits.max_queue:
            raise busy(f"{self.texts:,} texts are waiting already; try again")
        self.texts += texts
        try:
            yield
        finally:
            self.texts -= texts
