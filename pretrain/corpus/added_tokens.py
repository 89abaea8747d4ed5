"""Words added to a tokenizer: the old ids stay, each new word becomes one token with an id of its own at the end."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from experiment.errors import UserError
from experiment.tokenizer import load_tokenizer, save_tokenizer, vocabulary_size
from pretrain.corpus.train_tokenizer import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def extend_tokenizer(extend: Path, added: Path, output: Path) -> None:
    """`deepcloze tokenizer --extend DIR --added FILE --output DIR`: one word a line; the same input, the same bytes.

    A WordPiece tokenizer gets words and continuations (`##itis`) as entries of its vocabulary. Words that it would cut
    before it looks there (`covid-19`), and the words of any other tokenizer, become added tokens, which are found in
    the text as whole words. None of them is a special token. Words that are one token already are passed over. Raises
    UserError for a file that cannot be read, a line that is no word, and a word that would not become one token.
    """
    old, folder = load_tokenizer(extend), new_folder(output)
    lines = _read_words(added)
    if vocabulary_size(old) != len(old.get_vocab()):
        raise UserError(f"--extend: {extend} has ids that no token uses, which new ones would be given")
    state = json.loads(old.backend_tokenizer.to_str())
    entries: dict[str, int] = {}  # of the vocabulary, token -> line
    whole_words: dict[str, int] = {}  # added tokens
    for number, word in lines:
        token, is_entry = _token_of(word, state, old, f"{added}, line {number}")
        if token not in entries and token not in whole_words and not _is_known(token, old):
            (entries if is_entry else whole_words)[token] = number
    if not (entries or whole_words):
        raise UserError(f"--added: all {len(lines)} words of {added} are one token in {extend} already")
    # `tokenizers` numbers added tokens behind the vocabulary, so entries come first.
    new = {token: vocabulary_size(old) + place for place, token in enumerate([*entries, *whole_words])}
    if entries:
        state["model"]["vocab"] |= {token: new[token] for token in entries}
    state["added_tokens"] += [_added_token(token, new[token], state) for token in whole_words]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        partial = Path(aside) / "tokenizer"
        save_tokenizer(old, partial)
        Tokenizer.from_str(json.dumps(state)).save(str(partial / "tokenizer.json"))
        extended = load_tokenizer(partial)
        save_tokenizer(extended, partial)
        _check(extended, old, new, entries | whole_words, added)
        partial.replace(folder)
    print(
        f"{folder}: {len(new):,} of {len(lines):,} words added to {vocabulary_size(old):,} tokens, "
        f"{len(lines) - len(new):,} in the vocabulary already"
    )


def check_extends(new: "PreTrainedTokenizerFast", old: "PreTrainedTokenizerFast") -> None:
    """Raises UserError unless every token of `old` has the same id and role in `new`."""
    ids = new.get_vocab()
    for token, identifier in sorted(old.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != identifier:
            found = f"has id {ids[token]}" if token in ids else "is not there"
            raise UserError(
                f"it does not extend the model's tokenizer: '{token}' has id {identifier} there, here it {found}"
            )
    if new.special_tokens_map != old.special_tokens_map:
        raise UserError(
            f"it does not extend the model's tokenizer: its special tokens are {new.special_tokens_map}, "
            f"the model's {old.special_tokens_map}"
        )


def old_pieces(new: "PreTrainedTokenizerFast", old: "PreTrainedTokenizerFast") -> dict[int, list[int]]:
    """Id of each token that `new` has and `old` has not -> the ids that its text has in `old`, none unknown."""
    known, prefix = old.get_vocab(), _continuation(json.loads(old.backend_tokenizer.to_str()))
    pieces: dict[int, list[int]] = {}
    for token, identifier in new.get_vocab().items():
        if token in known:
            continue
        if prefix and token.startswith(prefix):
            pieces[identifier] = _longest_first(token, prefix, known)
        else:
            text = new.backend_tokenizer.decode([identifier], skip_special_tokens=False)
            found = old(f" {text.strip()}", add_special_tokens=False)["input_ids"]
            pieces[identifier] = [piece for piece in found if piece != old.unk_token_id]
    return pieces


def _read_words(path: Path) -> list[tuple[int, str]]:
    """(line number, word) of the lines that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--added: cannot read {path}: {error}") from None
    words = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, word in words:
        if len(word.split()) > 1:
            raise UserError(f"{path}, line {number}: expected one word a line, found '{word}'")
    if not words:
        raise UserError(f"--added: {path} has no words")
    return words


def _token_of(word: str, state: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", where: str) -> tuple[str, bool]:
    """How the tokenizer writes a word, and whether as an entry of its vocabulary. Raises UserError."""
    prefix, backend = _continuation(state), tokenizer.backend_tokenizer
    if word.startswith("##") and prefix is None:
        raise UserError(f"{where}: '{word}': only WordPiece tokenizers know continuations of words")
    rest = word.removeprefix(prefix or "")
    normal = backend.normalizer.normalize_str(rest) if backend.normalizer else rest
    if prefix is None:
        return normal, False
    # Ids behind the vocabulary may be taken by added tokens, which `tokenizers` would then number anew.
    room = all(token["id"] < len(state["model"]["vocab"]) for token in state["added_tokens"])
    whole = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] == [normal]
    if rest != word and not whole:
        raise UserError(f"{where}: '{word}' can never be found: text is cut inside it")
    if rest != word and not room:
        raise UserError(
            f"{where}: '{word}': the tokenizer has added tokens behind its vocabulary, which cannot grow now"
        )
    return (normal if rest == word else prefix + normal), whole and room


def _is_known(token: str, tokenizer: "PreTrainedTokenizerFast") -> bool:
    if token in tokenizer.get_vocab():
        return True
    ids = tokenizer(f" {token}", add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _added_token(token: str, identifier: int, state: dict[str, Any]) -> dict[str, Any]:
    """`lstrip`: the space before the word belongs to it, as to any other, where the tokenizer keeps spaces at all."""
    return {
        "id": identifier,
        "content": token,
        "single_word": True,
        "lstrip": _continuation(state) is None,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def _check(
    extended: "PreTrainedTokenizerFast",
    old: "PreTrainedTokenizerFast",
    new: dict[str, int],
    lines: dict[str, int],
    path: Path,
) -> None:
    """Raises UserError for a word that did not become one token, naming its line."""
    check_extends(extended, old)
    prefix = _continuation(json.loads(old.backend_tokenizer.to_str()))
    for token, identifier in new.items():
        found = extended(token, add_special_tokens=False)["input_ids"]
        if found != [identifier] and not (prefix and token.startswith(prefix)):
            raise UserError(
                f"{path}, line {lines[token]}: '{token}' would not become one token, the tokenizer makes "
                f"{extended.convert_ids_to_tokens(found)} of it"
            )


def _continuation(state: dict[str, Any]) -> str | None:
    """What WordPiece writes before a piece that continues a word, None for other tokenizers."""
    model = state["model"]
    return str(model["continuing_subword_prefix"]) if model["type"] == "WordPiece" else None


def _longest_first(token: str, prefix: str, known: dict[str, int]) -> list[int]:
    """A continuation as WordPiece itself would cut it; none where it cannot."""
    rest, pieces = token.removeprefix(prefix), []
    while rest:
        end = next((end for end in range(len(rest), 0, -1) if prefix + rest[:end] in known), None)
        if end is None:
            return []
        pieces.append(known[prefix + rest[:end]])
        rest = rest[end:]
    return pieces
