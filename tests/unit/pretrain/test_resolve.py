import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import Sequence
from transformers import BertConfig, BertForMaskedLM

from experiment.config import build_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from experiment.run_files.checkpoints import checkpoint_path, mark_complete
from pretrain.config import PretrainConfig
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.modeling.build import build_model
from pretrain.resolve import resolve
from pretrain.training.checkpoint_tensors import write_hugging_face_folder
from pretrain.training_progress import TrainingProgress, progress_to_json
from runs import small_tree
from tiny_models import tiny_fields

TINY = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def config_of(run: Path, corpus: Path, /, **sections: dict[str, Any]) -> PretrainConfig:
    """A run of two steps. `sections`: to add, or to replace."""
    return build_config(PretrainConfig, small_tree(run, corpus, **sections))


@pytest.mark.parametrize(("unit", "space", "warned"), [("word", "", True), ("word", " ", False), ("token", "", False)])
def test_word_masking_warns_of_text_without_spaces(
    tmp_path: Path, wordpiece: Path, caplog: pytest.LogCaptureFixture, unit: str, space: str, warned: bool
) -> None:
    """Catches a missing warning for text such as Chinese, where whole-word masking masks characters or sentences."""
    (tmp_path / "s.txt").write_text(space.join("我们今天去北京大学") + "\n", encoding="utf-8")
    build_corpus(CorpusOptions(source=tmp_path / "s.txt", tokenizer=wordpiece, output=tmp_path / "corpus", workers=1))
    with caplog.at_level(logging.WARNING):
        resolve(config_of(tmp_path / "run", tmp_path / "corpus", masking={"unit": unit}), 1)
    assert ("--segmenter jieba" in caplog.text) == warned


def test_held_out_text_without_spaces_is_warned_of_too(
    tmp_path: Path, wordpiece: Path, wordpiece_corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a held-out loss of masked characters that is compared with one of masked words."""
    (tmp_path / "s.txt").write_text("我们今天去北京大学\n", encoding="utf-8")
    build_corpus(CorpusOptions(source=tmp_path / "s.txt", tokenizer=wordpiece, output=tmp_path / "held", workers=1))
    corpora = {"train": str(wordpiece_corpus), "eval": {"held": str(tmp_path / "held")}}
    with caplog.at_level(logging.WARNING):
        resolve(config_of(tmp_path / "run", wordpiece_corpus, corpus=corpora, masking={"unit": "word"}), 1)
    assert f"text in {tmp_path / 'held'} seems to be written without spaces" in caplog.text


@pytest.mark.parametrize(("text", "warned"), [("你好 世界", True), ("de fi go lu mar nes", False)])
def test_unknown_tokens_are_warned_of(
    tmp_path: Path,
    wordpiece: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    text: str,
    warned: bool,
) -> None:
    """Catches weeks of training on text of which the tokenizer knows little, and a warning without reason."""
    (tmp_path / "s.txt").write_text(f"{text}\n", encoding="utf-8")
    build_corpus(CorpusOptions(source=tmp_path / "s.txt", tokenizer=wordpiece, output=tmp_path / "corpus", workers=1))
    with caplog.at_level(logging.WARNING):
        resolve(config_of(tmp_path / "run", tmp_path / "corpus"), 1)
    assert (f"{tmp_path / 'corpus'}: 100% of the tokens are unknown" in caplog.text) == warned
    assert ("unknown" in caplog.text) == warned
    assert (f"warning: {tmp_path / 'corpus'}: 100% of the tokens are unknown" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("has_template", [True, False])
def test_a_tokenizer_without_a_template_is_warned_of(
    tmp_path: Path, wordpiece: Path, caplog: pytest.LogCaptureFixture, has_template: bool
) -> None:
    """Catches sequences without [CLS] and [SEP], as of a tokenizer that was made without a post-processor."""
    tokenizer = load_tokenizer(wordpiece)
    if not has_template:
        tokenizer.backend_tokenizer.post_processor = Sequence([])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "s.txt").write_text("de fi go\n", encoding="utf-8")
    build_corpus(
        CorpusOptions(
            source=tmp_path / "s.txt", tokenizer=tmp_path / "tokenizer", output=tmp_path / "corpus", workers=1
        )
    )
    with caplog.at_level(logging.WARNING):
        resolve(config_of(tmp_path / "run", tmp_path / "corpus"), 1)
    assert ("has the token [CLS], but adds no special tokens to a text" in caplog.text) != has_template


@pytest.mark.parametrize(
    ("seed", "length", "longest", "stages", "before", "warned"),
    [
        (8, 32, 200, [], [], True),
        (8, 32, 200, [], [[0, 32, 8], [1, 32, 4, "continued"]], True),
        (9, 32, 200, [], [], False),
        (8, 24, 200, [], [], False),
        (8, 24, 25, [], [], False),
        (8, 24, 24, [], [], True),
        (8, 24, 200, [{"steps": 1, "max_seq_length": 32}, {}], [], True),
        (8, 24, 200, [{"steps": 1}, {"max_seq_length": 32}], [], False),
    ],
)
def test_init_from_warns_of_the_same_corpus_and_seed(
    tmp_path: Path,
    wordpiece_corpus: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    length: int,
    longest: int,
    stages: list[dict[str, int]],
    before: list[list[int | str]],
    warned: bool,
) -> None:
    """Catches a missing warning about continued pretraining on the same batches with the same masks, a warning where
    another sequence length gives others, which it does only if documents are longer, relative paths in RUN/config.yaml,
    and a trace for a damaged checkpoint."""
    wordpiece_corpus = Path(shutil.copytree(wordpiece_corpus, tmp_path / "corpus"))
    manifest = json.loads((wordpiece_corpus / "manifest.json").read_text())
    manifest["length_percentiles"]["100"] = longest
    (wordpiece_corpus / "manifest.json").write_text(json.dumps(manifest))
    first = {"dir": str(tmp_path / "first"), "seed": 8}
    model = {"config": TINY | {"intermediate_size": 32}}
    config = config_of(tmp_path, wordpiece_corpus, run=first, model=model)
    run = resolve(config, 1)
    built = build_model(config.model, run.model_config, 8).model
    write_hugging_face_folder(dict(built.named_parameters()), built, run.tokenizer, tmp_path / "step" / "hf")
    (tmp_path / "step" / "state.json").write_text(json.dumps({"identity": {**run.identity, "schedule.stages": before}}))
    mark_complete(tmp_path / "step")

    second = {"dir": str(tmp_path / "second"), "seed": seed}
    extended = {"init_from": str(tmp_path / "step" / "hf"), "added_tokens": "tokenizer"}
    monkeypatch.chdir(wordpiece_corpus)
    sections = {"batch": {"sequences": 8, "max_seq_length": length}, "schedule": {"steps": 2, "stages": stages}}
    config = config_of(tmp_path, wordpiece_corpus, run=second, model=extended, **sections)
    with caplog.at_level(logging.WARNING):
        run = resolve(config, 1)
    assert ("another seed" in caplog.text) == warned
    assert run.config.model.added_tokens == str(wordpiece_corpus / "tokenizer")

    (tmp_path / "step" / "state.json").write_text('{"identity": {')
    with pytest.raises(UserError, match=r"state\.json is damaged: it is not JSON"):
        resolve(config, 1)


@pytest.mark.parametrize(("held", "warned"), [("wordpiece_corpus", True), ("heldout_corpus", False)])
def test_training_text_as_held_out_text_warns(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    wordpiece_corpus: Path,
    caplog: pytest.LogCaptureFixture,
    held: str,
    warned: bool,
) -> None:
    """Catches a held-out loss that is that of the training text, without a warning."""
    corpora = {"train": str(wordpiece_corpus), "eval": {"held": str(request.getfixturevalue(held))}}
    config = config_of(tmp_path / "run", wordpiece_corpus, corpus=corpora)
    with caplog.at_level(logging.WARNING):
        resolve(config, 1)
    assert ("so it is not held out, and may have the masks of the first epoch" in caplog.text) == warned


def test_positions_that_no_sequence_reaches(
    tmp_path: Path, wordpiece_corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a server and fine-tuning that use positions that were never trained, also if the tokenizer of the model
    that is continued has no limit, a shorter limit than that model's, a limit of rotary positions, and no limit or one
    below the longest sequence of DeBERTa."""
    caplog.set_level(logging.INFO, logger="pretrain.resolve")

    def limit(run: str, model: dict[str, Any], length: int = 32, **sections: dict[str, Any]) -> int:
        batch = {"sequences": 8, "max_seq_length": length, "microbatch_tokens": 64}
        resolved = resolve(config_of(tmp_path / run, wordpiece_corpus, model=model, batch=batch, **sections), 1)
        return int(resolved.tokenizer.model_max_length)

    bert = {"config": TINY | {"intermediate_size": 32, "max_position_embeddings": 64}}
    assert limit("run", bert) == 32
    assert caplog.messages == [
        "model.config.max_position_embeddings: only 32 of the model's 64 positions are trained, because no sequence is "
        "longer; the tokenizer in the checkpoints cuts texts there"
    ]
    rotary = {"model_type": "modernbert", "hidden_size": 24, "num_attention_heads": 2, "max_position_embeddings": 64}
    stages = {"steps": 2, "stages": [{"steps": 1}, {"max_seq_length": 64}]}
    caplog.clear()
    assert limit("rotary", {"config": rotary}) == limit("run", bert, schedule=stages) == limit("run", bert, 64) == 64
    deberta = {"model_type": "deberta-v2", "relative_attention": True, "position_biased_input": False}
    deberta |= {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48}
    assert (limit("run", {"config": deberta}), limit("run", {"config": deberta}, 64)) == (48, 64)
    assert not caplog.messages

    run = resolve(config_of(tmp_path / "run", wordpiece_corpus, model=bert), 1)
    built = build_model(run.config.model, run.model_config, 8).model
    write_hugging_face_folder(dict(built.named_parameters()), built, run.tokenizer, tmp_path / "hf")
    continued = {"init_from": str(tmp_path / "hf")}
    assert (limit("next", continued, 16), limit("next", continued, 48)) == (32, 48)
    caplog.clear()
    assert limit("next", continued | {"max_positions": 128}, 64) == 64
    assert caplog.messages[0].startswith("model.max_positions: only 64 of the model's 128 positions are trained")
    path = tmp_path / "hf" / "tokenizer_config.json"  # of many models of the Hub, it has no limit
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: settings[key] for key in settings.keys() - {"model_max_length"}}))
    assert limit("next", continued | {"max_positions": 128}) == limit("next", continued) == 64


def test_a_resized_model_with_a_decoder_of_its_own_resumes(
    tmp_path: Path, wordpiece: Path, wordpiece_corpus: Path
) -> None:
    """Catches a run that cannot resume because its model is untied, although the config of the base says tied."""
    tokenizer = load_tokenizer(wordpiece)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "intermediate_size": 32}
    base = BertForMaskedLM(BertConfig(**TINY | sizes, max_position_embeddings=64, tie_word_embeddings=False))
    torch.nn.init.normal_(base.get_output_embeddings().weight)
    write_hugging_face_folder(dict(base.named_parameters()), base, tokenizer, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))

    model = {"init_from": str(tmp_path / "base"), "max_positions": 128}
    config = config_of(tmp_path / "run", wordpiece_corpus, model=model)
    run = resolve(config, 1)
    built = build_model(run.model_source, run.model_config, 8).model
    assert not built.config.tie_word_embeddings
    checkpoint = checkpoint_path(tmp_path / "run" / "checkpoints", 1)
    write_hugging_face_folder(dict(built.named_parameters()), built, run.tokenizer, checkpoint / "hf")
    state = {"identity": run.identity, "config": run.config.model_dump(mode="json"), "provenance": {}}
    (checkpoint / "state.json").write_text(json.dumps(state | {"progress": progress_to_json(TrainingProgress(step=1))}))
    mark_complete(checkpoint)
    resumed = resolve(config, 1)
    assert (resumed.resume_plan.step, resumed.resume_plan.changes) == (1, ())
    assert resumed.identity == run.identity


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_that_computes_in_fp32_only(tmp_path: Path, wordpiece_corpus: Path, precision: str) -> None:
    """Catches a run that ends in its first step, with a traceback."""
    fnet = {"config": {"model_type": "fnet", "hidden_size": 24, "num_hidden_layers": 1}}
    resolve(config_of(tmp_path / "run", wordpiece_corpus, model=fnet), 1)
    ds_config = {"ds_config": f"ds_configs/{precision}_zero2_cpu_offload.json"}
    with pytest.raises(UserError, match=r"'fnet' computes in fp32 only.*fp32_zero2_cpu_offload\.json"):
        resolve(config_of(tmp_path / "run", wordpiece_corpus, model=fnet, engine=ds_config), 1)


@pytest.mark.parametrize(("model_type", "field"), [("flaubert", "layerdrop"), ("bart", "decoder_layerdrop")])
def test_layer_drop_where_ranks_need_the_same_layers(
    tmp_path: Path, wordpiece_corpus: Path, model_type: str, field: str
) -> None:
    """Catches ranks that crash or hang because they drop different layers, and gradients of the step before."""
    model = {"config": {"model_type": model_type, field: 0.2, **tiny_fields(model_type)}}
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(offload))
    resolve(config_of(tmp_path / "run", wordpiece_corpus, model=model), 2)
    for ds_config in ("fp32_zero2", "fp32_zero3", str(tmp_path / "offload.json")):
        config = config_of(tmp_path / "run", wordpiece_corpus, model=model, engine={"ds_config": ds_config})
        with pytest.raises(UserError, match=rf"model\.config\.{field} is 0\.2: .*ds_configs/fp32_zero1\.json"):
            resolve(config, 2)
    model["config"][field] = 0.0
    resolve(config_of(tmp_path / "run", wordpiece_corpus, model=model, engine={"ds_config": "fp32_zero2"}), 2)


def test_quantization_by_ranges_of_activations_is_rejected(tmp_path: Path, wordpiece_corpus: Path) -> None:
    """Catches I-BERT's ranges, which are buffers: each rank has others."""
    model = {"config": {"model_type": "ibert", "quant_mode": True, **tiny_fields("ibert")}}
    with pytest.raises(UserError, match=r"model\.config\.quant_mode: 'ibert'"):
        resolve(config_of(tmp_path / "run", wordpiece_corpus, model=model), 1)


@pytest.mark.parametrize(
    ("model_type", "fields", "problem"),
    [
        ("esm", {}, r"model\.output_bias: the decoder of 'esm' has no bias that can be set"),
        ("mobilebert", {"embedding_size": 32}, r"trained .*: cls\.predictions\.dense\.weight has no elements"),
    ],
)
def test_models_that_would_fail_in_the_ranks(
    tmp_path: Path, wordpiece_corpus: Path, model_type: str, fields: dict[str, Any], problem: str
) -> None:
    """Catches a run that ends when its ranks have started, or that cannot resume."""
    config = {"model_type": model_type, **tiny_fields(model_type)} | fields
    model = {"config": config, "output_bias": "log_frequency"}
    with pytest.raises(UserError, match=problem):
        resolve(config_of(tmp_path / "run", wordpiece_corpus, model=model), 1)


def test_layers_of_a_decoder_have_no_rates_of_their_own(tmp_path: Path, wordpiece_corpus: Path) -> None:
    """Catches the lowest learning rate for the last layers of Funnel, which are numbered from 0 again."""
    for model_type in ("funnel", "bart"):
        model = {"config": {"model_type": model_type, **tiny_fields(model_type)}}
        resolve(config_of(tmp_path / "run", wordpiece_corpus, model=model), 1)
        config = config_of(tmp_path / "run", wordpiece_corpus, model=model, optimizer={"layer_decay": 0.9})
        with pytest.raises(
            UserError, match=rf"optimizer\.layer_decay is 0\.9; expected 1: '{model_type}' has a decoder"
        ):
            resolve(config, 1)
