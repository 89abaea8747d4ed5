import re
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from experiment.errors import UserError
from experiment.models.config_fields import check_fields


def check(model_type: str, fields: Mapping[str, Any]) -> None:
    def make_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
        return AutoConfig.for_model(model_type, **{"vocab_size": 50, "pad_token_id": 0, **fields})

    check_fields(fields, make_config)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("bert", {"num_attention_heads": 2, "num_labels": 3, "return_dict": True}),
        ("roberta", {"layer_norm_eps": 1e-6}),
        ("xlm-roberta", {"classifier_dropout": 0.1}),
        ("distilbert", {"dim": 24, "hidden_size": 24}),
        ("albert", {"embedding_size": 16, "inner_group_num": 2}),
        ("mpnet", {"relative_attention_num_buckets": 16}),
        ("esm", {"mask_token_id": 4, "token_dropout": True, "position_embedding_type": "rotary"}),
        ("modernbert", {"local_attention": 12, "sliding_window": 6}),
    ],
)
def test_declared_fields_are_known(model_type: str, fields: dict[str, Any]) -> None:
    """Catches rejection of a field with a default, of another name for it, and of a property."""
    check(model_type, fields)


@pytest.mark.parametrize("field", ["global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"])
@pytest.mark.parametrize("value", [2, 3])
def test_fields_that_the_config_class_computes_with_are_known(field: str, value: int) -> None:
    """Catches rejection of older names, which no default lists, also with the value that is used without them."""
    check("modernbert", {field: value})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("deberta-v2", {"position_buckets": 16}),
        ("deberta-v2", {"conv_act": "gelu", "conv_kernel_size": 3}),
        ("deberta-v2", {"share_att_key": True, "norm_rel_ebd": "layer_norm", "cls_dropout": 0.1}),
        ("electra", {"summary_first_dropout": 0.1}),
        ("convbert", {"summary_type": "mean"}),
        ("bert", {"gradient_checkpointing": True}),
    ],
)
def test_fields_that_models_read_are_known(model_type: str, fields: dict[str, Any]) -> None:
    """Catches rejection of fields without a default: of the encoder, of a fine-tuning head, of the base class of
    models, and those that are read only if another field has some value."""
    check(model_type, fields)


@pytest.mark.parametrize(
    ("model_type", "field", "nearest"),
    [
        ("bert", "dropout", "classifier_dropout"),  # a name in the models' source
        ("bert", "embedding_size", "hidden_size"),  # looked up only where it would be an error
        ("roberta", "hidden_dropout", "hidden_dropout_prob"),
        ("xlm-roberta", "num_hidden_layer", "num_hidden_layers"),
        ("modernbert", "attention_droput", "attention_dropout"),
        ("electra", "embeding_size", "embedding_size"),
        ("distilbert", "n_layer", "n_layers"),
        ("albert", "hidden_dropout", "hidden_dropout_prob"),
        ("deberta-v2", "conv_kernel", "conv_kernel_size"),
        ("mpnet", "relative_buckets", "relative_attention_num_buckets"),
        ("esm", "token_dropot", "token_dropout"),
        ("bert", "num_layers", "num_hidden_layers"),  # not num_labels, which all models have
        ("roberta", "n_layer", "num_hidden_layers"),
        ("bert", "attention", "num_attention_heads"),
        ("roberta", "position_type", "max_position_embeddings"),
        ("gpt2", "attn_drop", "attn_pdrop"),  # without a masked-LM head
        ("bert", "temperature", None),  # transformers drops settings of text generation
        ("bert", "attn_implementation", None),  # chosen when the model is built
        ("bert", "to_dict", None),  # a method
        ("data2vec-text", "hidden_dropout", "hidden_dropout_prob"),  # of the models for images in the same folder
        ("modernvbert", "hidden_size", None),  # of text_config
    ],
)
def test_other_fields_are_rejected(model_type: str, field: str, nearest: str | None) -> None:
    """Catches misspelt fields and fields of other models, which transformers would keep without using them."""
    message = f"^unknown config key 'model.config.{field}': '{model_type}' does not use it"
    with pytest.raises(UserError, match=message) as error:
        check(model_type, {field: 1})
    if nearest is not None:
        assert f"did you mean '{nearest}'?" in str(error.value)


@pytest.mark.parametrize("field", ["output_attentions", "output_hidden_states"])
def test_outputs_that_nothing_reads_are_rejected(field: str) -> None:
    """Catches a run that cannot save its model: transformers refuses the outputs with any attention but eager."""
    with pytest.raises(UserError, match=rf"^model\.config\.{field}: nothing reads these outputs; leave it out$"):
        check("bert", {field: True})
    check("bert", {field: False})


@pytest.mark.parametrize(("field", "common"), [("d_model", "model_type"), ("rope_theta", "rope_scaling")])
def test_fields_that_all_models_have_are_seldom_suggested(field: str, common: str) -> None:
    """Catches advice to set `model_type` or `rope_scaling` for a field that BERT does not have."""
    with pytest.raises(UserError) as error:
        check("bert", {field: 1})
    assert common not in str(error.value)


def test_the_list_of_known_fields_is_short() -> None:
    """Catches lists with private names and those that every config has, which hide the fields of the type."""
    with pytest.raises(UserError, match="; known: attention_bias, ") as error:
        check("modernbert", {"zzqj": 1})
    assert not {"_name_or_path", "architectures", "id2label", "return_dict"} & set(re.split(r"[, ]+", str(error.value)))
    assert len(str(error.value)) < 500
