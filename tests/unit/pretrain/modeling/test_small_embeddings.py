import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.modeling.small_embeddings import OneHotEmbedding, SmallEmbedding, use_one_hot_products


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_products_are_the_gradient_of_the_table(rows: int) -> None:
    """Catches a row that gets the gradient of another one, one without slots that gets any, and lost shapes."""
    torch.manual_seed(0)
    ids = torch.randint(0, max(1, rows - 1), (3, 5))  # the last of several rows has no slots
    weight = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = torch.nn.functional.embedding(ids, weight)
    expected.backward(upstream)
    theirs, weight.grad = weight.grad, None
    rows_of_ids = OneHotEmbedding.apply(ids, weight)  # type: ignore[no-untyped-call]
    rows_of_ids.backward(upstream)
    assert torch.equal(rows_of_ids, expected)
    torch.testing.assert_close(weight.grad, theirs)


def test_sums_of_many_slots_in_bf16_are_accurate() -> None:
    """Catches sums that are rounded to bf16 after each addition, which would stop growing at 256."""
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(1, 65536, dtype=torch.int64)
    OneHotEmbedding.apply(ids, weight).backward(  # type: ignore[no-untyped-call]
        torch.ones(1, 65536, 8, dtype=torch.bfloat16)
    )
    assert weight.grad[:, 0].tolist() == [65536, 0]


def test_only_plain_small_tables_change() -> None:
    """Catches a one-hot product for 30,522 words, and one that gives the padding a gradient."""
    tables = nn.ModuleList(
        [nn.Embedding(2, 4), nn.Embedding(5, 4), nn.Embedding(2, 4, padding_idx=0), nn.Embedding(2, 4, sparse=True)]
    )
    use_one_hot_products(tables)
    assert [type(table) is nn.Embedding for table in tables] == [False, True, True, True]


def test_the_token_types_of_bert_have_products() -> None:
    """Catches a model that is trained without them."""
    config = AutoConfig.for_model(
        "bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    model = AutoModelForMaskedLM.from_config(config)
    names = list(model.state_dict())
    MaskedLanguageModel(model)
    changed = {name for name, table in model.named_modules() if isinstance(table, SmallEmbedding)}
    assert changed == {"bert.embeddings.token_type_embeddings"}
    assert list(model.state_dict()) == names
