"""Tokenizers: load, save and fingerprint them.

Token ids mean nothing without the tokenizer that made them. Two tokenizers with the same fingerprint give every text
the same ids.
"""

import inspect
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import HostError, UserError, describe_disk_error, may_pass, reason, warn_once
from experiment.files import fsync_tree, json_digest, read_json
from experiment.models.transformers_models import (
    check_label_count,
    configured_positions,
    has_token_types,
    max_positions,
    quiet_transformers,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The special tokens of a masked language model, under the names that BERT and RoBERTa gave them.
_ROLES = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")
BERT_TOKENS = dict(zip(_ROLES, ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"), strict=True))
ROBERTA_TOKENS = dict(zip(_ROLES, ("<s>", "</s>", "<pad>", "<unk>", "<mask>"), strict=True))
# Classes of older releases of transformers that are copies of BERT's, by the beginning of their names.
_COPIES_OF_BERT = (
    *("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "Realm", "RetriBert"),
    "SqueezeBert",
)
# Model types whose own tokenizer reads a vocab.txt in another way than BERT's.
_OTHER_VOCABULARIES = ("bertweet", "esm", "funnel", "mpnet", "phobert", "roc_bert", "roformer", "splinter", "tapas")
_PRETRAINING_NEEDS = ("pad_token", "mask_token")
# Case, accents, full-width forms, ligatures, spaces, an invisible character, a long word.
_PROBE = (
    "Don't Cafe\u0301 café Straße ЁЙ ΑΣ İ ＡＢ１ ① ﬁ ｶﾞ 한국 कि 今天ab🤣 a\u200bb\ta_b  3.14\n``e-mail'' " + "z" * 120
)
_MANY_UNKNOWN = 0.05  # share of the tokens of a text
# Keys with which transformers records the origin of a tokenizer, or that name code, which is not saved.
_SOURCE_KEYS = ("auto_map", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def many_unknown(text: str, share: float) -> Iterator[str]:
    """Yield a warning if the share of unknown tokens is high. text: its name."""
    if share > _MANY_UNKNOWN:
        yield f"{text}: {share:.0%} of the tokens are unknown: the tokenizer lacks characters of the text"


def load_tokenizer(path: Path | str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer for masked-LM pretraining, see `load_any_tokenizer`.

    Raises UserError also for one that is not backed by the tokenizers library alone, lacks a special token that
    masked-LM pretraining needs, or has no token of its own for masks.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_any_tokenizer(path, _PRETRAINING_NEEDS)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer: {path} holds a {type(tokenizer).__name__}, which cannot be converted to a tokenizer.json"
        )
    if _runs_python(tokenizer):
        raise UserError(
            f"tokenizer: {path} holds a {type(tokenizer).__name__}, whose pre-tokenizer is Python code and cannot be "
            "written to a tokenizer.json; use another tokenizer"
        )
    for role in ("cls_token", "sep_token", "pad_token", "unk_token"):
        if getattr(tokenizer, role) == tokenizer.mask_token:
            raise UserError(f"tokenizer: {path} has one token, {tokenizer.mask_token}, as mask_token and {role}")
    return tokenizer


def load_any_tokenizer(path: Path | str, needed: Sequence[str]) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a Hugging Face folder, or in a folder with just a BERT `vocab.txt`; never from the
    network.

    If the folder does not say which tokens are special, tokens with BERT's or RoBERTa's names are used. A vocab.txt of
    BERT is uncased if no entry has an upper-case letter, unless tokenizer_config.json sets `do_lower_case`.

    needed: special tokens it must have, such as "pad_token". Raises UserError if one is missing, or if there is no
    tokenizer, HostError if a disk fails.
    """
    if not (folder := Path(path)).is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"tokenizer: {folder} {problem}; expected a Hugging Face folder, or one with a vocab.txt; "
            "`deepcloze tokenizer` makes one"
        )
    tokenizer = _load_folder(folder)
    vocabulary = tokenizer.get_vocab()
    for family in (BERT_TOKENS, ROBERTA_TOKENS):
        if all(token in vocabulary for token in family.values()):
            for role, token in family.items():
                if getattr(tokenizer, role) is None:
                    known = tokenizer.added_tokens_decoder.get(vocabulary[token])  # may strip spaces
                    tokenizer.add_special_tokens({role: known or token})  # saved as special, or the fingerprint changes
    if missing := [role for role in needed if getattr(tokenizer, role) is None]:
        raise UserError(
            f"tokenizer: {folder} has no {', '.join(missing)}; needed: {', '.join(needed)} "
            "(`deepcloze tokenizer` trains a tokenizer that has them)"
        )
    return tokenizer


def _load_folder(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, BertTokenizer

    check_label_count(folder)
    loader, settings = AutoTokenizer, dict[str, bool]()
    if _is_bert_vocabulary(folder):  # AutoTokenizer needs a config, and takes cased vocabularies for uncased ones
        loader, settings = BertTokenizer, {"do_lower_case": _is_uncased(folder)}
    with quiet_transformers():
        try:
            tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **settings)
            tokenizer = _as_in_file(tokenizer, folder)
            tokenizer("")  # fails if the special tokens that it adds are not defined
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # many types, also the PanicException of tokenizers, which is no Exception
            if may_pass(error):
                raise HostError(f"tokenizer: cannot load {folder}: {describe_disk_error(error)}") from None
            has_vocabulary = any(any(folder.glob(name)) for name in ("tokenizer.json", "vocab.txt", "*.model"))
            why = " ".join(str(error).split())
            if "tiktoken" in why and any(folder.glob("*.model")):  # which transformers tries next, and asks to install
                why = "its SentencePiece model is damaged, or the package sentencepiece is not installed"
            reason = f": {why}" if has_vocabulary else ""
            raise UserError(f"tokenizer: cannot load {folder}{reason}; {_expected(folder)}") from None
    # Without a vocabulary file, some tokenizers of transformers load with their special tokens and nothing else.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"tokenizer: {folder} has no vocabulary; {_expected(folder)}")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _as_in_file(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in tokenizer.json, whose ids the model was trained with, if `tokenizer` gives other ids.

    Many classes of transformers 5, such as BERT's, take only the vocabulary of this file. Those of transformers 4 took
    all of it, but for some settings of tokenizer_config.json, which are applied here too.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    path, general = folder / "tokenizer.json", PreTrainedTokenizerFast  # which takes all of the file
    if not path.is_file() or not isinstance(tokenizer, general) or type(tokenizer) is general:
        return tokenizer
    if _runs_python(tokenizer):  # a tokenizer.json cannot have it
        return tokenizer
    settings = {"padding_side": tokenizer.padding_side, "model_input_names": tokenizer.model_input_names}
    settings |= tokenizer.special_tokens_map
    exact = general.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **settings)
    file, loaded = exact.backend_tokenizer, tokenizer.backend_tokenizer
    if isinstance(file.normalizer, BertNormalizer) and isinstance(loaded.normalizer, BertNormalizer):
        for flag in ("lowercase", "strip_accents", "handle_chinese_chars"):
            setattr(file.normalizer, flag, getattr(loaded.normalizer, flag))
    if isinstance(file.pre_tokenizer, ByteLevel) and isinstance(loaded.pre_tokenizer, ByteLevel):
        file.pre_tokenizer.add_prefix_space = loaded.pre_tokenizer.add_prefix_space
    if getattr(file.model, "dropout", None):  # for training with it: ids would be drawn
        file.model.dropout = None
    try:
        if _probe(file) == _probe(loaded):
            return tokenizer
    except Exception:  # the type that tokenizers raises where a model has no unknown token
        return tokenizer
    warn_once(
        f"tokenizer: using all of {path}: the normalizer, pre-tokenizer and model of {type(tokenizer).__name__} in "
        "transformers 5 give text other ids than the model was trained with"
    )
    return exact


def _probe(tokenizer: "Tokenizer") -> tuple[Any, ...]:
    """Return the words and ids of a text that tokenizers of different kinds divide differently. The words do not depend
    on the vocabulary."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    text = _PROBE if normalizer is None else normalizer.normalize_str(_PROBE)
    words = [text] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    return type(tokenizer.model), words, tokenizer.encode(_PROBE, add_special_tokens=False).ids


def _runs_python(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether the pre-tokenizer is Python code, such as RoFormer's, which calls rjieba."""
    try:
        pickle.dumps(tokenizer.backend_tokenizer.pre_tokenizer)
    except Exception:  # the type that tokenizers raises
        return True
    return False


def _expected(folder: Path) -> str:
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    return f"expected a Hugging Face folder with a tokenizer.json, or one with a vocab.txt, found {found}"


def _is_bert_vocabulary(folder: Path) -> bool:
    """Return whether there is a vocab.txt and nothing says that it belongs to another tokenizer than BERT's."""
    if not (folder / "vocab.txt").is_file() or (folder / "tokenizer.json").is_file():
        return False
    config = _read_json(folder / "config.json")
    named = _read_json(folder / "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    if named is None:
        return config.get("model_type") not in _OTHER_VOCABULARIES
    return str(named).removesuffix("Fast").removesuffix("Tokenizer") in _COPIES_OF_BERT


def _is_uncased(folder: Path) -> bool:
    """Return whether a BERT vocabulary is uncased. Raises UserError if it lacks a special token."""
    path = folder / "vocab.txt"
    try:
        entries = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: cannot read {path}: {reason(error)}") from None
    config = _read_json(folder / "tokenizer_config.json")
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    tokens = [named.get(role) or token for role, token in BERT_TOKENS.items()]
    texts = [str(token.get("content") if isinstance(token, dict) else token) for token in tokens]
    added = (str(token.get("content")) for token in config.get("added_tokens_decoder", {}).values())
    known = {*entries, *_read_json(folder / "added_tokens.json"), *added}
    if absent := [text for text in texts if text not in known]:
        raise UserError(f"tokenizer: {path} is not a BERT vocabulary: it has no {', '.join(absent)}")
    special = re.compile(r"\[.*\]|<.*>")  # [CLS], [unused1], <S>
    lowercase = not any(entry != entry.lower() for entry in entries if not special.fullmatch(entry))
    return bool(config.get("do_lower_case", lowercase))


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {path}: {reason(error)}") from None
    return found if isinstance(found, dict) else {}


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a Hugging Face folder: the same bytes for the same tokenizer, wherever it was loaded from.

    transformers 4 opens it too: it does not know the names that transformers 5 gives to its general class and to the
    list of further special tokens.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:  # not written in Python
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _SOURCE_KEYS}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in kept:
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync_tree(folder)


def default_length(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int | None:
    """Return the length in tokens at which texts are cut by default: the limit of the tokenizer if it has one, but at
    most the model's positions; otherwise those in the model's config; None without either."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    limit = int(tokenizer.model_max_length)
    return min(limit, max_positions(model) or limit) if limit < VERY_LARGE_INTEGER else configured_positions(model)


def save_model_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", folder: Path, **settings: Any
) -> None:
    """Write the tokenizer of a model so that it gives the inputs that the model has, and `truncation=True` cuts texts
    at `default_length`. settings: further ones of the tokenizer."""
    if (length := default_length(tokenizer, model)) is not None:
        tokenizer.model_max_length = length
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if not has_token_types(model, tokenizer):
        names.remove("token_type_ids")
    if "attention_mask" not in inspect.signature(type(model).forward).parameters:  # as of FNet
        names.remove("attention_mask")
    for name, value in {**settings, "model_input_names": names}.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # attributes are saved only if they are also here
    save_tokenizer(tokenizer, folder)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Equal for two tokenizers that give every text the same ids.

    Covers normalizer, pre-tokenizer, model, vocabulary and added tokens; not padding, truncation, post-processing, nor
    how special tokens are recognised in text: in a corpus, text never gives a special token.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in state["model"].items() if value not in (None, "", False)}
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    added = [
        {"content": token["content"], "id": token["id"]} if token["special"] else token
        for token in state["added_tokens"]
    ]
    return json_digest(
        {
            "normalizer": state["normalizer"],
            "pre_tokenizer": _without(state["pre_tokenizer"], "trim_offsets"),  # changes offsets, not ids
            "model": model,
            "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        }
    )


def _without(value: Any, key: str) -> Any:
    """Return a JSON value without an object key, at any depth."""
    if isinstance(value, dict):
        return {name: _without(below, key) for name, below in value.items() if name != key}
    return [_without(below, key) for below in value] if isinstance(value, list) else value


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the largest token id plus one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def decode_token(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Return the text of one token, as written in the word list if it is an added one: `tokenizers` puts spaces around
    Chinese characters for BERT, and takes letters such as ï for bytes with a byte-level BPE."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    is_changed = " " in text.strip() or "\ufffd" in text  # the mapping is copied each time
    added = tokenizer.added_tokens_decoder.get(token) if is_changed else None
    return str(added.content) if added else text


def special_token_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of all special tokens: tokens with a role, such as the padding token, and tokens that are only
    marked as special in tokenizer.json."""
    marked = {identifier for identifier, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
