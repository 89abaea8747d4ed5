"""Models and DeepSpeed files of recipes; `test_new_config.py` tests whether they are valid configs."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from experiment.config import load_config
from pretrain.config import PretrainConfig
from pretrain.engine.deepspeed_settings import load_settings

RECIPES = sorted((Path(__file__).resolve().parents[3] / "pretrain" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_models_of_recipes_fit_their_sequences(path: Path) -> None:
    """Catches a misspelled field of the model, a max_seq_length above its position limit, and a DeepSpeed file that
    does not exist."""
    config = load_config(PretrainConfig, path)
    load_settings(config.engine.ds_config)
    if config.model.config is None:
        assert config.model.init_from is not None
        return
    fields = dict(config.model.config)
    built = AutoConfig.for_model(fields.pop("model_type"))
    assert fields.keys() <= built.to_dict().keys()
    positions = fields.get("max_position_embeddings", built.max_position_embeddings)
    assert max(stage.max_seq_length for stage in config.stages) <= positions


def test_the_fast_recipe_only_lacks_attention_dropout() -> None:
    """Catches a change of one of the two recipes that the other does not get."""
    fast, plain = (
        load_config(PretrainConfig, path).model_dump()
        for path in RECIPES
        if path.stem in ("bert-base-fast", "bert-base-wikipedia-like")
    )
    assert fast["model"]["config"].pop("attention_probs_dropout_prob") == 0.0
    assert fast["run"].pop("dir") != plain["run"].pop("dir")
    assert fast == plain
