"""Scripts that are written without spaces between words, as sets of characters for regular expressions."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""All of them; only for `regex`."""

HAN = r"々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Chinese characters. For `re`, which is imported faster."""

WIDE = r"\u3000-\u303f\uff00-\uffef"
"""Punctuation of Chinese and Japanese, and full-width forms of other characters."""
