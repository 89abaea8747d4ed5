"""Continued pretraining with added tokens and a longer context, and resuming with every option of the model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.run_folder import RunFolder
from pretrain.corpus.added_tokens import extend_tokenizer
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import open_corpus
from rank_pool import RankPool
from runs import TINY, Tree, logged, pretrain_case, run_config, sampled, soak


@pytest.fixture(scope="module")
def grown(text_file: Path, wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer with two added words, one of them in the text, and a corpus built with it."""
    folder = tmp_path_factory.mktemp("grown")
    words = text_file.read_text(encoding="utf-8").split()
    longest = max(filter(str.isalpha, words), key=lambda word: (len(word), word))
    (folder / "words").write_text(f"{longest}\nzedzedzed\n")
    extend_tokenizer(wordpiece, folder / "words", folder / "tokenizer")
    build_corpus(CorpusOptions(source=text_file, tokenizer=folder / "tokenizer", output=folder / "corpus", workers=1))
    made = open_corpus(folder / "corpus")
    tokens = made.read(np.array([0]), np.array([made.tokens]))
    assert 200 in tokens.tolist(), "the new word is in the text"
    return folder / "tokenizer", folder / "corpus"


@pytest.fixture(scope="module")
def start_model(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of a run of one step."""
    folder = tmp_path_factory.mktemp("start")
    tree = run_config(folder, wordpiece_corpus, schedule__steps=1, model__config=TINY)
    pools[1].run(pretrain_case, tree)
    return checkpoint_path(folder / "checkpoints", 1) / "hf"


@pytest.mark.parametrize("ds_config", ["bf16_zero3", *soak("fp32_zero1")])
def test_added_tokens_and_a_longer_context(
    pools: dict[int, RankPool], wordpiece_corpus: Path, grown: tuple[Path, Path], tmp_path: Path, ds_config: str
) -> None:
    """Catches a resized run that fails or cannot resume, and checkpoints with the old tokenizer or sizes."""
    first = run_config(tmp_path / "first", wordpiece_corpus, schedule__steps=1)
    pools[1].run(pretrain_case, first)
    start = checkpoint_path(tmp_path / "first" / "checkpoints", 1) / "hf"
    tokenizer, corpus = grown
    model: Tree = {"init_from": str(start), "added_tokens": str(tokenizer), "max_positions": 120}
    tree = run_config(tmp_path / "grown", corpus, ds_config, schedule__steps=2) | {"model": model}
    tree["batch"] = {"sequences": 29, "max_seq_length": 120, "microbatch_tokens": 250}
    assert set(pools[2].run(pretrain_case, tree, 1)) == {"stopped"}
    assert set(pools[2].run(pretrain_case, tree)) == {"done"}
    assert logged(tmp_path / "grown", "step") == [1, 2]
    hf = checkpoint_path(tmp_path / "grown" / "checkpoints", 2) / "hf"
    config = AutoModelForMaskedLM.from_pretrained(hf).config
    assert (config.vocab_size, config.max_position_embeddings) == (202, 120)
    assert AutoTokenizer.from_pretrained(hf).convert_ids_to_tokens(201) == "zedzedzed"
    # A third run starts from the resized model without added_tokens and max_positions.
    tree = run_config(tmp_path / "third", corpus, schedule__steps=1) | {"model": {"init_from": str(tmp_path / "grown")}}
    pools[1].run(pretrain_case, tree)
    assert yaml.safe_load((tmp_path / "third" / "config.yaml").read_text())["model"]["init_from"] == str(hf)
    ancestors = json.loads((tmp_path / "third" / "provenance.json").read_text())["ancestors"]
    assert [Path(ancestor["folder"]).name for ancestor in ancestors] == ["first", "grown"]


def test_a_deberta_release_is_continued_in_zero_3(
    pools: dict[int, RankPool], wordpiece_corpus: Path, wordpiece: Path, tmp_path: Path
) -> None:
    """Catches a head whose product with the embeddings does not find them, as ZeRO 3 gathers those for their own module
    only, and checkpoints that a resumed run or transformers loads with another head."""
    fields = {"model_type": "deberta-v2", "vocab_size": 200, "legacy": False}
    fields |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    config = AutoConfig.for_model(**TINY | fields)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "release")
    shutil.copytree(wordpiece, tmp_path / "release", dirs_exist_ok=True)
    path = tmp_path / "release" / "config.json"
    path.write_text(path.read_text().replace('"legacy": false,', ""))
    losses = {}
    for ds_config in ("fp32_zero3", "fp32_zero1"):
        tree = run_config(tmp_path / ds_config, wordpiece_corpus, ds_config, schedule__steps=2)
        tree |= {"model": {"init_from": str(tmp_path / "release")}}
        if ds_config == "fp32_zero3":
            assert set(pools[2].run(pretrain_case, tree, 1)) == {"stopped"}
        assert set(pools[2].run(pretrain_case, tree)) == {"done"}
        losses[ds_config] = logged(tmp_path / ds_config)
        hf = checkpoint_path(tmp_path / ds_config / "checkpoints", 2) / "hf"
        model, report = AutoModelForMaskedLM.from_pretrained(hf, output_loading_info=True)
        assert not model.config.legacy
        assert not report["missing_keys"] | report["unexpected_keys"]
    assert losses["fp32_zero3"] == pytest.approx(losses["fp32_zero1"], rel=1e-4)


# Every option of `model` that changes the config of the model, or how it is built. "GROWN": the extended tokenizer.
NEW_MODEL_OPTIONS: dict[str, Tree] = {
    "recomputed": {"config": TINY, "activation_checkpointing": True},
    "recomputed and padded": {"config": TINY | {"model_type": "deberta"}, "activation_checkpointing": True},
}
INIT_FROM_OPTIONS: dict[str, Tree] = {
    "recomputed": {"activation_checkpointing": True},
    "added tokens": {"added_tokens": "GROWN"},
    "longer context": {"max_positions": 120},
    "overrides": {"config": {"model_type": "bert", "hidden_dropout_prob": 0.3, "num_hidden_layers": 1}},
    "all": {
        "config": {"model_type": "bert", "attention_probs_dropout_prob": 0.3, "num_hidden_layers": 1},
        "added_tokens": "GROWN",
        "max_positions": 120,
        "activation_checkpointing": True,
    },
}


def assert_resumes(pool: RankPool, folder: Path, corpus: Path, model: Tree, deleted: Sequence[Path] = ()) -> None:
    """A run with this section `model` resumes after a stop, and finds nothing changed, although folders were deleted:
    by the same command, and from RUN/config.yaml."""
    tree = run_config(folder, corpus, schedule__steps=3) | {"model": model}
    assert set(pool.run(pretrain_case, tree, 1)) == {"stopped"}
    for gone in deleted:
        shutil.rmtree(gone)
    assert set(pool.run(pretrain_case, tree, 1)) == {"stopped"}
    assert set(pool.run(pretrain_case, yaml.safe_load(RunFolder(folder).config.read_text()))) == {"done"}
    assert logged(folder, "step") == [1, 2, 3]
    text = RunFolder(folder).rank_log(0).read_text(encoding="utf-8")
    assert "resuming from" in text
    assert " -> " not in text, "a key changed"


@pytest.mark.parametrize("option", sampled(NEW_MODEL_OPTIONS, ["recomputed and padded"]))
def test_a_new_model_resumes_with_every_option(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, option: str
) -> None:
    """Catches an option that changes the model's config after the identity of the run was computed from it, so that a
    checkpoint differs from the config that wrote it."""
    assert_resumes(pools[1], tmp_path, wordpiece_corpus, NEW_MODEL_OPTIONS[option])


@pytest.mark.parametrize("option", sampled(INIT_FROM_OPTIONS, ["all"]))
def test_a_continued_model_resumes_with_every_option(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    grown: tuple[Path, Path],
    start_model: Path,
    tmp_path: Path,
    option: str,
) -> None:
    """Catches the same in a model that is loaded, resized or overridden, and a resume that needs the folders which its
    first weights and tokens came from."""
    base, added = tmp_path / "base", tmp_path / "added"
    shutil.copytree(start_model, base)
    shutil.copytree(grown[0], added)
    model, corpus = INIT_FROM_OPTIONS[option] | {"init_from": str(base)}, wordpiece_corpus
    if "added_tokens" in model:
        model["added_tokens"], corpus = str(added), grown[1]
    assert_resumes(pools[1], tmp_path / "run", corpus, model, deleted=[base, added])
