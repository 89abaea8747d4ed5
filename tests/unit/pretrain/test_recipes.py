"""The recipes are whole runs that somebody starts from: each has to stay one."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from experiment.config import load_config
from pretrain.config import PretrainConfig
from pretrain.engine.settings import load_settings

RECIPES = sorted((Path(__file__).resolve().parents[3] / "pretrain" / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    """A renamed folder would leave the other tests with nothing to do."""
    assert {"demo.yaml", "continue.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_run(path: Path) -> None:
    """A key was renamed, a value fell out of its range, or the DeepSpeed JSON that is named has gone."""
    config = load_config(PretrainConfig, path)
    load_settings(config.engine.ds_config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_a_model_that_holds_its_sequences(path: Path) -> None:
    """A field of the model was misspelled, or max_seq_length outgrew the positions."""
    config = load_config(PretrainConfig, path)
    if config.model.config is None:
        assert config.model.init_from is not None
        return
    fields = dict(config.model.config)
    built = AutoConfig.for_model(fields.pop("model_type"))
    assert fields.keys() <= built.to_dict().keys()
    positions = fields.get("max_position_embeddings", built.max_position_embeddings)
    assert max(stage.max_seq_length for stage in config.stages) <= positions
