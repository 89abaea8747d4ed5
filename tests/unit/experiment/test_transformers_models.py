from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from experiment.errors import UserError
from experiment.transformers_models import check_freeze, download_hint, is_in_module


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased", "org/model.v2"])
def test_the_name_of_a_model_on_the_hub_comes_with_how_to_download_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a message about a missing folder that does not say where to get it."""
    monkeypatch.chdir(tmp_path)
    assert f"`hf download {name} --local-dir FOLDER`" in download_hint(Path(name))


@pytest.mark.parametrize("name", ["/models/bert", "../bert", "./a/b/c", "runs/first", "~/bert"])
def test_a_path_is_not_taken_for_a_model_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice to download a folder that is only misspelt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert download_hint(Path(name)) == ""


def bert() -> BertForMaskedLM:
    """Of 2 layers, on the meta device: names and shapes only."""
    with torch.device("meta"):
        return BertForMaskedLM(BertConfig(num_hidden_layers=2))


def test_modules_are_whole_consecutive_parts_of_a_name() -> None:
    """Catches `layer.1` that also freezes layer.10 to layer.19."""
    assert is_in_module("bert.encoder.layer.1.output.dense.weight", "layer.1")
    assert not is_in_module("bert.encoder.layer.11.output.dense.weight", "layer.1")
    assert is_in_module("bert.encoder.layer.1.output.dense.weight", "encoder")
    assert not is_in_module("bert.embeddings.word_embeddings.weight", "embedding")


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("embeddings", "layers.0"), "'layers.0'; did you mean 'layer.0'?"),
        (("layer.7",), "'layer.7'"),
        (("bert", "cls"), "whole model"),
    ],
)
def test_unknown_modules_and_the_whole_model_are_rejected(freeze: tuple[str, ...], message: str) -> None:
    """Catches a typo that silently freezes nothing, and a run that trains nothing."""
    model = bert()
    with pytest.raises(UserError, match=r"^model\.freeze: ") as error:
        check_freeze(freeze, model)
    assert message in str(error.value)
    check_freeze(("embeddings", "layer.0", "bert.encoder.layer.1.output"), model)
