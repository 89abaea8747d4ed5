"""Runs that begin with a model of the Hub."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from experiment.run_files.run_folder import RunFolder
from hub_server import HubServer, use_hub
from pretrain.world import World
from rank_pool import RankError, RankPool
from runs import SHALLOW, logged, pretrain_case, run_config

NAME = "org/tiny"


def save_model(folder: Path, tokenizer: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    shutil.copytree(tokenizer, folder)
    BertForMaskedLM(BertConfig(vocab_size=200, **SHALLOW)).save_pretrained(folder)
    return folder


def host_case(world: World, tree: Mapping[str, Any], url: str, caches: str, stop_after: int | None = None) -> str:
    """`pretrain_case` on a rank that has a host, and a cache, for itself."""
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, url, Path(f"{caches}-{world.rank}"))
        return pretrain_case(dataclasses.replace(world, local_rank=0), tree, stop_after)


def test_a_run_from_the_hub_resumes_without_it(
    pools: dict[int, RankPool], hub: HubServer, wordpiece: Path, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches hosts without the model, other weights than those of the folder, a commit that is not recorded, and a
    resume that asks the Hub or takes the weights of a newer commit."""
    model = save_model(tmp_path / "model", wordpiece, seed=0)
    commit = hub.repository(NAME).push_folder(model)
    trees = {
        name: run_config(tmp_path / name, wordpiece_corpus, schedule__steps=3) | {"model": {"init_from": init_from}}
        for name, init_from in {"folder": str(model), "hub": NAME}.items()
    }
    assert set(pools[2].run(pretrain_case, trees["folder"])) == {"done"}
    caches = str(tmp_path / "cache")
    assert set(pools[2].run(host_case, trees["hub"], hub.url, caches, 2)) == {"stopped"}
    assert hub.requests.count(f"GET /{NAME}/resolve/{commit}/model.safetensors") == 2, "one for each host"

    folder = RunFolder(tmp_path / "hub")
    assert yaml.safe_load(folder.config.read_text())["model"]["init_from"] == f"{NAME}@{commit}"
    (ancestor,) = json.loads(folder.provenance.read_text())["ancestors"]
    assert (ancestor["name"], ancestor["commit"]) == (NAME, commit)

    hub.repository(NAME).push_folder(save_model(tmp_path / "new", wordpiece, seed=1))
    for rank in range(2):
        shutil.rmtree(f"{caches}-{rank}")
    hub.requests.clear()
    assert set(pools[2].run(host_case, trees["hub"], hub.url, caches)) == {"done"}
    assert hub.requests == []
    assert logged(folder.path, "loss") == logged(tmp_path / "folder", "loss")
    assert yaml.safe_load(folder.config.read_text())["model"]["init_from"] == f"{NAME}@{commit}"


def test_a_run_from_a_model_that_does_not_exist(
    pools: dict[int, RankPool], hub: HubServer, wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches ranks that wait for one that has failed."""
    tree = run_config(tmp_path / "run", wordpiece_corpus) | {"model": {"init_from": f"{NAME}-1"}}
    hub.repository(NAME).push({"config.json": b"{}"})
    with pytest.raises(
        RankError, match=rf"model\.init_from: {NAME}-1: no such folder, and no such model on the Hugging"
    ):
        pools[2].run(host_case, tree, hub.url, str(tmp_path / "cache"))
    tree["model"] = {"init_from": NAME}
    with pytest.raises(RankError, match=rf"{NAME}@\w+: there are no weights in safetensors"):
        pools[2].run(host_case, tree, hub.url, str(tmp_path / "cache"))
