"""Add words to a tokenizer. Existing ids do not change; each new word becomes one token with an id at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import regex
from tokenizers import AddedToken, Tokenizer, models

from experiment.errors import UserError, notify, readable_disk_errors
from experiment.files import read_items
from experiment.models.model_names import local_tokenizer
from experiment.models.tokenizer import decode_token, load_tokenizer, save_tokenizer, vocabulary_size
from experiment.output_folder import new_folder
from experiment.unspaced_scripts import UNSPACED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNSPACED = regex.compile(f"[{UNSPACED}]")
_KEYCAP = "\u20e3"  # the end of emoji such as 1️⃣, which begin with a digit


def extend_tokenizer(extend: Path, added: Path, output: Path) -> None:
    """`deepcloze tokenizer --extend`: add the words in the file `added`, one per line, to the tokenizer `extend`.

    In a WordPiece tokenizer, words and continuations (`##itis`) become entries of the vocabulary. Words that the
    pre-tokenizer splits (`covid-19`), emoji, and all words of other tokenizers, become added tokens, which match whole
    words of the text, or anywhere if they are emoji, or their script is written without spaces. None of them is a
    special token. Words that are one token already are skipped. The same input gives the same bytes.

    Raises UserError for a file that cannot be read, a line with more than one word, and a word that would not become
    one token.
    """
    with readable_disk_errors(f"--output {output}: "), new_folder(output) as partial:
        old, words = load_tokenizer(local_tokenizer(str(extend))), _read_words(added)
        if vocabulary_size(old) != len(old.get_vocab()):
            raise UserError(f"--extend: {extend} has unused ids, which the new tokens would get")
        entries, added_tokens = _new_tokens(words, old, added)
        if not (entries or added_tokens):
            raise UserError(f"--added: all {len(words)} words of {added} are one token in {extend} already")
        # `tokenizers` gives added tokens ids after the vocabulary, so entries come first.
        new_ids = {token: vocabulary_size(old) + index for index, token in enumerate([*entries, *added_tokens])}
        state = json.loads(old.backend_tokenizer.to_str())
        if _can_grow(old):  # it has the added tokens too, so that it can grow again
            state["model"]["vocab"] |= new_ids
        extended = Tokenizer.from_str(json.dumps(state))
        extended.add_tokens([_added_token(token, old) for token in added_tokens])
        save_tokenizer(old, partial)
        extended.save(str(partial / "tokenizer.json"))
        new = load_tokenizer(partial)
        save_tokenizer(new, partial)
        check_extends(new, old)
        _check_new_tokens(new, new_ids, entries | added_tokens, added)
    print(
        f"{output}: {len(new_ids):,} of {len(words):,} words added to {vocabulary_size(old):,} tokens, "
        f"{len(words) - len(new_ids):,} in the vocabulary already, or repeated"
    )


def check_extends(new: "PreTrainedTokenizerFast", old: "PreTrainedTokenizerFast") -> None:
    """Raise UserError unless every token of `old` has the same id and role in `new`."""
    ids = new.get_vocab()
    for token, identifier in sorted(old.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != identifier:
            found = f"id {ids[token]}" if token in ids else "no such token"
            raise UserError(
                f"it does not extend the model's tokenizer: expected '{token}' to have id {identifier}, found {found}"
            )
    if new.special_tokens_map != old.special_tokens_map:
        raise UserError(
            f"it does not extend the model's tokenizer: expected the special tokens {old.special_tokens_map}, "
            f"found {new.special_tokens_map}"
        )


def old_pieces(new: "PreTrainedTokenizerFast", old: "PreTrainedTokenizerFast") -> dict[int, list[int]]:
    """Map the id of each token that only `new` has to the ids of its text in `old`, without unknown tokens. A mark of a
    space alone, which SentencePiece puts before an unknown emoji, counts as none."""
    vocabulary, prefix = old.get_vocab(), _continuation_prefix(old)
    added = new.added_tokens_decoder  # whose texts a byte-level decoder would take for bytes
    pieces: dict[int, list[int]] = {}
    for token, identifier in new.get_vocab().items():
        if token in vocabulary:
            continue
        if prefix and token.startswith(prefix):
            # The first piece is looked up as written. What cannot be split is one unknown token, without the prefix.
            split = old.backend_tokenizer.model.tokenize(token)
            pieces[identifier] = [piece.id for piece in split] if split[0].value.startswith(prefix) else []
        else:
            word = added[identifier].content if identifier in added else new.backend_tokenizer.decode([identifier])
            found = old(_in_text(word.strip()), add_special_tokens=False)["input_ids"]
            found = [piece for piece in found if piece != old.unk_token_id]
            pieces[identifier] = found if "".join(old.convert_ids_to_tokens(found)).strip("▁") else []
    return pieces


def _read_words(path: Path) -> list[tuple[int, str]]:
    """Return (line number, word) of each line that is not empty."""
    words = read_items(path, "--added")
    for number, word in words:
        if len(word.split()) > 1:
            raise UserError(f"{path}, line {number}: expected one word per line, found '{word}'")
    if not words:
        raise UserError(f"--added: {path} has no words")
    return words


def _new_tokens(
    words: list[tuple[int, str]], tokenizer: "PreTrainedTokenizerFast", path: Path
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the new entries of the vocabulary and the new added tokens, each as {token: line}."""
    entries: dict[str, int] = {}
    added_tokens: dict[str, int] = {}
    normalize, seen = _normalizer(tokenizer), set[str]()
    for line, word in words:
        token, is_entry = _parse_word(word, tokenizer, f"{path}, line {line}")
        if (normal := normalize(token)) not in seen and not _is_one_token(token, tokenizer):
            seen.add(normal)
            (entries if is_entry else added_tokens)[token] = line
    return entries, added_tokens


def _normalizer(tokenizer: "PreTrainedTokenizerFast") -> Callable[[str], str]:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str if normalizer else str


def _parse_word(word: str, tokenizer: "PreTrainedTokenizerFast", where: str) -> tuple[str, bool]:
    """Return the token for a word, and whether it can be an entry of the vocabulary. Raises UserError."""
    prefix = _continuation_prefix(tokenizer)
    if word.startswith("##") and prefix is None:
        raise UserError(f"{where}: '{word}': only WordPiece tokenizers have continuations")
    rest = word.removeprefix(prefix or "")
    normalize = _normalizer(tokenizer)
    normal = normalize(rest)
    if not normal.strip():
        raise UserError(f"{where}: {word!r} is empty after the tokenizer's normalization")
    if prefix is None:
        return normal, False
    normal = normal.strip()  # BERT puts spaces around Chinese characters
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    whole = [piece for piece, _ in split(normal)] == [normal]
    if rest != word and not whole:
        raise UserError(f"{where}: '{word}' can never match: the tokenizer splits text inside it")
    if rest != word and not _can_grow(tokenizer):
        raise UserError(
            f"{where}: '{word}': the tokenizer has added tokens after its vocabulary, so the vocabulary cannot grow"
        )
    if rest != word:
        return prefix + normal, True
    # BERT does not split text at emoji: 🤣🤣 and ok🤣 are looked up as whole words.
    is_word = not _is_symbol(normal) or [piece for piece, _ in split(f"{normal}a")] == [normal, "a"]
    # The content of an added token is normalized again.
    return (normal if whole or normalize(normal) == normal else rest), whole and is_word and _can_grow(tokenizer)


def _can_grow(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether the tokenizer is a WordPiece whose vocabulary has all added tokens: others would be renumbered."""
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    return _continuation_prefix(tokenizer) is not None and max(tokenizer.added_tokens_decoder, default=0) < size


def _is_one_token(token: str, tokenizer: "PreTrainedTokenizerFast") -> bool:
    if token in tokenizer.get_vocab():
        return True
    ids = tokenizer(_in_text(token), add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _in_text(word: str) -> str:
    """Return the word with the space that is before it in a text, if its script has spaces."""
    return word if _UNSPACED.match(word) else f" {word}"


def _is_symbol(token: str) -> bool:
    """Return whether the token is an emoji, or of other symbols than those of ASCII."""
    return token.endswith(_KEYCAP) or not any(character.isascii() or character.isalnum() for character in token)


def _matches_anywhere(token: str) -> bool:
    """Return whether letters may stand beside an added token, as beside emoji and in scripts without spaces."""
    return _is_symbol(token) or _UNSPACED.search(token[0] + token[-1]) is not None


def _added_token(token: str, tokenizer: "PreTrainedTokenizerFast") -> AddedToken:
    """With `lstrip` it includes the space before it, as other tokens do."""
    single_word = not _matches_anywhere(token)
    return AddedToken(token, single_word=single_word, lstrip=_continuation_prefix(tokenizer) is None, normalized=True)


def _check_new_tokens(
    tokenizer: "PreTrainedTokenizerFast", new_ids: dict[str, int], lines: dict[str, int], path: Path
) -> None:
    """Raise UserError, naming the line, for a word that did not become one token. Warns if text without spaces changes
    around the words."""
    prefix = _continuation_prefix(tokenizer)
    for token, identifier in new_ids.items():
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if found != [identifier] and not (prefix and token.startswith(prefix)):
            raise UserError(
                f"{path}, line {lines[token]}: '{token}' would not become one token, found "
                f"{[decode_token(tokenizer, piece) for piece in found]}"
            )
    inside = next(filter(_matches_anywhere, new_ids), None)
    if inside and any(piece.startswith(("▁", "Ġ")) for piece in tokenizer.tokenize(f"{inside}a")[1:]):
        notify(
            "warning: --extend: this tokenizer encodes the text right after an added word as if a space were between "
            f"them: '{inside}a' as '{inside} a'. In text without spaces, such as Chinese, add few words, or none"
        )


def _continuation_prefix(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the prefix of WordPiece's continuations, None for other tokenizers."""
    model = tokenizer.backend_tokenizer.model
    return model.continuing_subword_prefix if isinstance(model, models.WordPiece) else None
