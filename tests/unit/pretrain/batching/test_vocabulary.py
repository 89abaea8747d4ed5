from pathlib import Path

from tokenizers import AddedToken

from experiment.tokenizer import load_tokenizer, save_tokenizer
from pretrain.batching.vocabulary import build_vocabulary


def test_special_tokens_without_a_role_are_special(wordpiece: Path, tmp_path: Path) -> None:
    """Catches tokens that only tokenizer.json marks as special, and that are masked or drawn as random replacements."""
    tokenizer = load_tokenizer(wordpiece)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<extra_0>", special=True)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("zedzedzed", special=False)])
    save_tokenizer(tokenizer, tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    special, word = loaded.convert_tokens_to_ids(["<extra_0>", "zedzedzed"])
    assert special not in loaded.all_special_ids, "otherwise the test says nothing"
    vocabulary = build_vocabulary(loaded)
    assert vocabulary.unmaskable[special]
    assert special not in vocabulary.replacements
    assert not vocabulary.unmaskable[word]
    assert word in vocabulary.replacements
    assert len(vocabulary.replacements) == len(loaded.get_vocab()) - 6
