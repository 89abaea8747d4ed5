"""Scripts that are written without spaces between words, as sets of characters for regular expressions."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""All of them; only for `regex`."""

WIDE = r"\u3000-\u303f\uff00-\uffef"
"""Punctuation of Chinese and Japanese, and full-width forms of other characters."""
