"""A run with options that are drawn at random, stopped and resumed, equals the uninterrupted run.

Such draws found models of `model.init_from` without dropout after a resume, weights of ZeRO 3 on one rank that had been
released, and types of models that could not be resumed.
"""

import json
from pathlib import Path
from random import Random

import pytest

from experiment.run_files.checkpoints import checkpoint_path
from rank_pool import RankPool
from runs import Tree, assert_same_tensors, events_without_timing, pretrain_case, run_config, saved_tensors
from tiny_models import tiny_fields

TYPES = ("bert", "roberta", "modernbert", "electra", "albert", "deberta-v2", "convbert", "roformer", "xlm-roberta")
STEPS = 5


def draw_config(draw: Random, folder: Path, corpus: Path, heldout: Path) -> Tree:
    precision, stage = draw.choice(("fp32", "bf16")), draw.randrange(4)
    ds_config = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        ds_config[precision] = {"enabled": True}
    if stage == 3 and draw.random() < 0.7:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small weights are released
    path = folder / "ds_config.json"
    path.write_text(json.dumps(ds_config))
    tree = run_config(
        folder / "run",
        corpus,
        engine__ds_config=str(path),
        optimizer__name=draw.choice(("adamw", "lamb", "stableadamw", "muon")),
        optimizer__layer_decay=draw.choice((1.0, 0.8)),
        optimizer__grad_clip=draw.choice((0.0, 0.5)),
        schedule__steps=STEPS,
        schedule__name=draw.choice(("linear", "cosine", "wsd")),
        schedule__batch_warmup_steps=draw.choice((0, 3)),
        masking__unit=draw.choice(("token", "word", "span")),
        batch__microbatch_tokens=draw.choice((80, 260, 1000)),
        evaluation__every_steps=draw.choice((1, 2, 100)),
        run__log_every=draw.choice((1, 2)),
    )
    if draw.random() < 0.5:
        tree["corpus"]["eval"] = {"held": str(heldout)}
    if draw.random() < 0.3:
        tree["schedule"]["stages"] = [{"steps": 2, "max_seq_length": 24}, {"sequences": 17}]
    tree["model"] = {"config": {"model_type": (model_type := draw.choice(TYPES)), **tiny_fields(model_type)}}
    if draw.random() < 0.3:
        tree["model"] |= {"freeze": ["embeddings"], "freeze_steps": draw.choice((1, 3, 50))}
    if draw.random() < 0.3:
        tree["model"]["ema_decay"] = 0.9
    if draw.random() < 0.3 and model_type != "albert":
        tree["model"]["activation_checkpointing"] = True
    return tree


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_a_run_with_random_options_resumes_exactly(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, seed: int
) -> None:
    """Catches state that a checkpoint lacks with one of many combinations of options."""
    draw = Random(seed)
    pool, tree = pools[draw.choice((1, 2))], draw_config(draw, tmp_path, wordpiece_corpus, heldout_corpus)
    if draw.random() < 0.5:
        start = tree | {"run": tree["run"] | {"dir": str(tmp_path / "start")}, "schedule": {"steps": 1}}
        assert set(pool.run(pretrain_case, start)) == {"done"}
        del tree["model"]["config"]
        tree["model"]["init_from"] = str(checkpoint_path(tmp_path / "start" / "checkpoints", 1) / "hf")
    folders = [tmp_path / "uninterrupted", tmp_path / "resumed"]
    for folder in folders:
        tree["run"]["dir"] = str(folder)
        if folder.name == "resumed":
            assert set(pool.run(pretrain_case, tree, draw.randrange(STEPS))) == {"stopped"}
        assert set(pool.run(pretrain_case, tree)) == {"done"}
    one, other = (events_without_timing(folder) for folder in folders)
    assert one == other
    assert_same_tensors(*(saved_tensors(checkpoint_path(folder / "checkpoints", STEPS)) for folder in folders))
