import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import CONFIGS
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from experiment.models.transformers_models import max_positions
from pretrain.config import ModelConfig
from pretrain.corpus.added_tokens import extend_tokenizer, old_pieces
from pretrain.modeling.build import build_model
from pretrain.modeling.model_config import check_tokenizer, resolve_model_config
from pretrain.modeling.random_model import meta_model, random_model
from pretrain.modeling.resize import config_with_positions, resize_model
from pretrain.training.checkpoint_tensors import write_hugging_face_folder
from runs import sampled

MODEL_TYPES = ("bert", "roberta", "electra", "distilbert", "modernbert", "mpnet")
WORDS = ("zedwilmar", "##zzed", "q")


@pytest.fixture(scope="session")
def extended(wordpiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    (folder / "words").write_text("\n".join(WORDS))
    extend_tokenizer(wordpiece, folder / "words", folder / "tokenizer")
    return folder / "tokenizer"


def make_folder(path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, **fields: Any) -> Any:
    """A Hugging Face folder with random weights, biases and norms too; returns its model."""
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**{"model_type": model_type} | CONFIGS[model_type] | sizes | fields)
    model = AutoModelForMaskedLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    save_tokenizer(tokenizer, path)
    return model


def resized(settings: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    return build_model(settings, resolve_model_config(settings, tokenizer), seed=2).model.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.set_attn_implementation("eager") or model(input_ids=ids[None]).logits[0]
    return found


@pytest.mark.parametrize(
    ("model_type", "padded"),
    sampled(itertools.product(MODEL_TYPES, (0, 8)), [*zip(MODEL_TYPES, itertools.cycle((0, 8)), strict=False)]),
)
def test_added_tokens(wordpiece: Path, extended: Path, tmp_path: Path, model_type: str, padded: int) -> None:
    """Catches changed logits of old tokens, random rows for new ones (also in a vocabulary padded for speed), a decoder
    or its bias that is not resized, and tied tensors that are no longer tied."""
    old, new = load_tokenizer(wordpiece), load_tokenizer(extended)
    before = make_folder(tmp_path / "start", old, model_type, vocab_size=len(old) + padded)
    settings = ModelConfig(init_from=str(tmp_path / "start"), added_tokens=str(extended))
    after = resized(settings, new)
    assert after.config.vocab_size == max(len(new), len(old) + padded)
    ids = torch.randint(5, len(old), (31,))
    assert torch.allclose(logits(after, ids)[:, : len(old)], logits(before, ids)[:, : len(old)], atol=1e-5)
    tables = [model.get_input_embeddings().weight for model in (before, after)]
    decoders = [model.get_output_embeddings() for model in (before, after)]
    assert decoders[1].weight.data_ptr() == tables[1].data_ptr()
    everything = [row for row in range(len(old) + padded) if not len(old) <= row < len(new)]
    for token, pieces in old_pieces(new, old).items():
        assert pieces or new.convert_ids_to_tokens(token) == "q"
        assert torch.allclose(tables[1][token], tables[0][pieces or everything].mean(0), atol=1e-6)
        assert torch.allclose(decoders[1].bias[token], decoders[0].bias[pieces or everything].mean(0), atol=1e-6)
    weights = {name: parameter.detach() for name, parameter in after.named_parameters()}
    write_hugging_face_folder(weights, after, new, tmp_path / "hf")
    reopened = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(logits(reopened, ids), logits(after, ids))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "hf")) == tokenizer_fingerprint(new)


def test_every_table_of_the_vocabulary_gets_rows() -> None:
    """Catches zeros in NeoMME's second table, of values in attention, for added tokens."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = AutoConfig.for_model("neomme", vocab_size=20, pad_token_id=0, num_key_value_heads=2, **sizes)
    model = AutoModelForMaskedLM.from_config(config)
    torch.nn.init.normal_(model.base_model.value_embeddings.weight)  # zeros at first
    config = copy.deepcopy(config)
    config.vocab_size = 21
    larger = resize_model(model, config, {20: [3, 4]})
    before, after = model.base_model.value_embeddings.weight, larger.base_model.value_embeddings.weight
    assert torch.equal(after[:20], before)
    assert torch.equal(after[20], before[[3, 4]].mean(0))


@pytest.mark.parametrize("padded", [0, 8])
def test_tokens_added_to_a_head_that_multiplies_by_the_embeddings(
    wordpiece: Path, extended: Path, tmp_path: Path, padded: int
) -> None:
    """Catches an IndexError in DeBERTa's hidden layer, and a bias that is 0 for added tokens."""
    old, new = load_tokenizer(wordpiece), load_tokenizer(extended)
    before = make_folder(tmp_path, old, "released deberta", vocab_size=len(old) + padded)
    after = resized(ModelConfig(init_from=str(tmp_path), added_tokens=str(extended)), new)
    ids = torch.randint(5, len(old), (31,))
    assert torch.allclose(logits(after, ids)[:, : len(old)], logits(before, ids)[:, : len(old)], atol=1e-5)
    everything = [row for row in range(len(old) + padded) if not len(old) <= row < len(new)]
    for token, pieces in old_pieces(new, old).items():
        for name in ("deberta.embeddings.word_embeddings.weight", "lm_predictions.lm_head.bias"):
            rows = before.get_parameter(name)[pieces or everything]
            assert torch.allclose(after.get_parameter(name)[token], rows.mean(0), atol=1e-6)


def test_positions_are_no_vocabulary() -> None:
    """Catches rows for added tokens in a table of positions that is as long as the vocabulary."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", vocab_size=30, max_position_embeddings=32, **sizes)
    model = AutoModelForMaskedLM.from_config(config)
    config = copy.deepcopy(config)
    config.vocab_size = 32
    larger = resize_model(model, config, {30: [3, 4], 31: [5]})
    before, after = (each.base_model.embeddings.position_embeddings.weight for each in (model, larger))
    assert torch.equal(after, before)


def test_a_decoder_of_its_own_is_kept(wordpiece: Path, extended: Path, tmp_path: Path) -> None:
    """Catches trained weights that are replaced by the embeddings because the config says that they are tied."""
    old, new = load_tokenizer(wordpiece), load_tokenizer(extended)
    before = make_folder(tmp_path, old, "bert", tie_word_embeddings=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    after = resized(ModelConfig(init_from=str(tmp_path), added_tokens=str(extended)), new)
    assert not after.config.tie_word_embeddings
    ids = torch.randint(5, len(old), (31,))
    assert torch.allclose(logits(after, ids)[:, : len(old)], logits(before, ids), atol=1e-5)


def test_rows_of_a_16_bit_folder_are_means_in_fp32(wordpiece: Path, extended: Path, tmp_path: Path) -> None:
    """Catches new rows rounded to the dtype in the folder's config."""
    old, new = load_tokenizer(wordpiece), load_tokenizer(extended)
    make_folder(tmp_path, old, "bert").bfloat16().save_pretrained(tmp_path)
    before = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).get_input_embeddings().weight
    after = resized(ModelConfig(init_from=str(tmp_path), added_tokens=str(extended)), new)
    table = after.get_input_embeddings().weight
    for token, pieces in old_pieces(new, old).items():
        expected = before[pieces].mean(0) if pieces else before.mean(0)
        assert torch.allclose(table[token], expected, atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "mpnet"])
def test_learned_positions(wordpiece: Path, tmp_path: Path, model_type: str) -> None:
    """Catches changed logits up to the old limit, a table that is one or two rows off (RoBERTa's positions start after
    the padding row), and sequences of the new length that do not fit."""
    tokenizer = load_tokenizer(wordpiece)
    before = make_folder(tmp_path, tokenizer, model_type)
    first = {"roberta": tokenizer.pad_token_id + 1, "mpnet": 2}.get(model_type, 0)
    usable = max_positions(before)
    assert usable == 70 - first
    settings = ModelConfig(init_from=str(tmp_path), max_positions=150)
    config = resolve_model_config(settings, tokenizer)
    assert max_positions(meta_model(config)) == 150
    after = build_model(settings, config, seed=2).model.eval()
    ids = torch.randint(5, len(tokenizer), (150,))
    assert torch.allclose(logits(after, ids[:usable]), logits(before, ids[:usable]), atol=1e-5)
    assert logits(after, ids).isfinite().all()
    old, new = (
        next(p for name, p in model.named_parameters() if name.endswith("position_embeddings.weight"))
        for model in (before, after)
    )
    for position in (0, usable - 1, usable, 2 * usable, 149):
        assert torch.equal(new[first + position], old[first + position % usable])


@pytest.mark.parametrize(("model_type", "unusable"), [("fnet", 0), ("ibert", 2)])
def test_learned_positions_of_unusual_models(model_type: str, unusable: int) -> None:
    """Catches a config without attention heads that is refused, and a padding row in a table of I-BERT's own class."""
    sizes = {"hidden_size": 12, "intermediate_size": 8, "vocab_size": 9, "num_hidden_layers": 1, "pad_token_id": 1}
    model = random_model(AutoConfig.for_model(model_type, **sizes, max_position_embeddings=20))
    assert max_positions(model) == 20 - unusable
    larger = resize_model(model, config_with_positions(model, 40, scale_rope=True), {})
    assert larger(input_ids=torch.full((1, 40), 5)).logits.isfinite().all()


def test_rotary_positions(wordpiece: Path, tmp_path: Path) -> None:
    """Catches a wrong base, changed local layers, and a base set by the user that is overridden."""
    tokenizer = load_tokenizer(wordpiece)
    before = make_folder(tmp_path, tokenizer, "modernbert")
    config = resolve_model_config(ModelConfig(init_from=str(tmp_path), max_positions=280), tokenizer)
    assert config.max_position_embeddings == max_positions(meta_model(config)) == 280
    old, new = before.config.rope_parameters, config.rope_parameters
    assert new["sliding_attention"] == old["sliding_attention"]
    base = old["full_attention"]["rope_theta"] * 4 ** (12 / 10)  # four times the positions, heads of 12
    assert new["full_attention"]["rope_theta"] == pytest.approx(base)
    settings = ModelConfig(init_from=str(tmp_path), max_positions=280)
    assert logits(resized(settings, tokenizer), torch.randint(5, len(tokenizer), (280,))).isfinite().all()

    kept = old | {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    own = ModelConfig(init_from=str(tmp_path), max_positions=280, config={"rope_parameters": kept})
    assert resolve_model_config(own, tokenizer).rope_parameters["full_attention"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("model_type", "fields"), [("deberta", {}), ("deberta-v2", {}), ("deberta-v2", {"position_buckets": 8})]
)
@pytest.mark.parametrize("learned", [False, True])
def test_relative_positions(
    wordpiece: Path, tmp_path: Path, model_type: str, fields: dict[str, Any], learned: bool
) -> None:
    """Catches DeBERTa rejected although nothing has to be extended, and a longer model with other distances."""
    tokenizer = load_tokenizer(wordpiece)
    before = make_folder(tmp_path, tokenizer, model_type, position_biased_input=learned, **fields)
    after = resized(ModelConfig(init_from=str(tmp_path), max_positions=150), tokenizer)
    ids = torch.randint(5, len(tokenizer), (150,))
    assert torch.allclose(logits(after, ids[:70]), logits(before, ids[:70]), atol=1e-5)
    assert logits(after, ids).isfinite().all()


@pytest.mark.parametrize("model_type", ["eurobert", "neomme"])
def test_the_slowest_rotation_covers_all_positions(model_type: str) -> None:
    """Catches parameters that all layers share and that are not found, and dimensions that count but do not rotate."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    sizes |= {"intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 70}
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "mask")}
    config = AutoConfig.for_model(model_type, **sizes, **ids)
    slowest = [
        buffer.min()
        for larger in (config, config_with_positions(meta_model(config), 280, scale_rope=True))
        for name, buffer in random_model(larger).named_buffers()
        if name.endswith(("emb.inv_freq", "full_attention_inv_freq"))
    ]
    assert slowest[0] / slowest[1] == pytest.approx(4)


def test_as_many_positions_as_there_are(wordpiece: Path, tmp_path: Path) -> None:
    """Catches rejection or another model when init_from already has as many positions as the config asks for."""
    tokenizer = load_tokenizer(wordpiece)
    make_folder(tmp_path, tokenizer, "modernbert")
    same = resolve_model_config(ModelConfig(init_from=str(tmp_path), max_positions=70), tokenizer)
    assert same.to_dict() == resolve_model_config(ModelConfig(init_from=str(tmp_path)), tokenizer).to_dict()


@pytest.mark.parametrize(
    ("model_type", "fields", "positions", "message"),
    [
        ("bert", {}, 60, "model.max_positions is 60, but the model has 70 usable positions"),
        ("deberta-v2", {"position_biased_input": False, "relative_attention": False}, 100, "cannot be extended"),
        ("roformer", {}, 2000, "'roformer' cannot be extended"),
        ("bart", {"decoder_attention_heads": 2}, 2000, "'bart' cannot be extended"),
    ],
)
def test_unsupported_positions_are_rejected(
    wordpiece: Path, tmp_path: Path, model_type: str, fields: dict[str, Any], positions: int, message: str
) -> None:
    """Catches a model shortened by a typo, and positions of a kind that cannot be extended."""
    tokenizer = load_tokenizer(wordpiece)
    settings = CONFIGS.get(model_type, CONFIGS["bert"]) | fields | {"vocab_size": len(tokenizer)}
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve_model_config(ModelConfig(init_from=str(tmp_path), max_positions=positions), tokenizer)


def test_a_vocabulary_that_is_a_last_dimension_is_not_extended(wordpiece: Path, extended: Path, tmp_path: Path) -> None:
    """Catches a message about positions where tokens are added: MobileBERT's decoder has a column for each token."""
    old, new = load_tokenizer(wordpiece), load_tokenizer(extended)
    config = AutoConfig.for_model("mobilebert", num_hidden_layers=1, vocab_size=len(old), pad_token_id=old.pad_token_id)
    random_model(config).save_pretrained(tmp_path)
    save_tokenizer(old, tmp_path)
    with pytest.raises(UserError, match=r"model\.added_tokens: .*'cls\.predictions\.dense\.weight'.*to \(384, 203\)"):
        resized(ModelConfig(init_from=str(tmp_path), added_tokens=str(extended)), new)


def test_tokenizers_that_do_not_match_are_rejected(
    wordpiece: Path, byte_level: Path, extended: Path, tmp_path: Path
) -> None:
    """Catches added tokens of another model, and a corpus built without the added tokens in the config."""
    old, new = (tokenizer_fingerprint(load_tokenizer(folder)) for folder in (wordpiece, extended))
    make_folder(tmp_path, load_tokenizer(wordpiece), "bert")
    settings = ModelConfig(init_from=str(tmp_path), added_tokens=str(extended))
    check_tokenizer(settings, new, tmp_path)
    with pytest.raises(UserError, match=f"another tokenizer than the one in {extended}"):
        check_tokenizer(settings, old, tmp_path)
    with pytest.raises(UserError, match=f"in {tmp_path}\\. .* set model.added_tokens if its own adds tokens"):
        check_tokenizer(ModelConfig(init_from=str(tmp_path)), new, tmp_path / "corpus")
    for folder, message in ((byte_level, "does not extend"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=rf"model\.added_tokens: .*{message}"):
            check_tokenizer(ModelConfig(init_from=str(tmp_path), added_tokens=str(folder)), new, tmp_path)
