"""A rank that cannot start tells the others."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.errors import UserError
from experiment.run_folder import Outcome, RunFolder
from pretrain.engine.deepspeed_settings import REPOSITORY
from pretrain.world import World
from rank_pool import RankPool, free_port
from runs import Tree, pretrain_case, run_config
from waiting import LIMIT


def refused_case(world: World, trees: list[Tree]) -> str:
    """Run with the config of this rank, and return the error."""
    try:
        pretrain_case(world, trees[world.rank])
    except UserError as error:
        return str(error)
    return "nothing was refused"


# What is wrong on one rank, in the order in which it is found, and the message.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "run folder": ({"run__dir": "/proc/none"}, "run.dir: cannot create"),
    "settings": ({"engine__ds_config": "missing.json"}, "missing.json"),
    "corpus": ({"corpus__train": "missing"}, "corpus.train: "),
    "length": ({"batch__max_seq_length": 100}, "the model has 64 positions"),
    "stream": ({"schedule__stages": [{"steps": 5000}, {}], "schedule__tokens": 900}, "schedule.tokens: "),
}


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_one_rank_is_raised_on_all(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, mistake: str, failing: int
) -> None:
    """Catches a rank that leaves the others in a collective, and an error that only its own rank knows."""
    changes, message = MISTAKES[mistake]
    trees = [run_config(tmp_path / "run", wordpiece_corpus) for _ in range(3)]
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        trees[failing][section][key] = value
    if mistake == "stream":
        del trees[failing]["schedule"]["steps"]
    errors = pools[3].run(refused_case, trees)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"{platform.node()}, rank {failing}: ")
    assert message in errors[0]
    if mistake != "run folder":
        assert RunFolder(tmp_path / "run").read_outcome() == (Outcome.REFUSED, errors[0])


def test_a_mistake_on_all_ranks_names_no_host(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a message that blames one host for a mistake in the config."""
    tree = run_config(tmp_path, wordpiece_corpus, corpus__train="missing")
    errors = pools[3].run(refused_case, [tree] * 3)
    assert len(set(errors)) == 1
    assert errors[0].startswith("corpus.train: ")
    assert set(pools[3].run(pretrain_case, run_config(tmp_path, wordpiece_corpus), 1)) == {"stopped"}, "out of step"


def test_a_corpus_missing_on_one_host_is_printed_and_exits_with_2(wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches an error of another rank than 0 that nobody prints, and exit code 1."""
    port, ranks = free_port(), []
    for rank, corpus in enumerate((wordpiece_corpus, tmp_path / "missing")):
        config = tmp_path / f"{rank}.yaml"
        config.write_text(yaml.safe_dump(run_config(tmp_path / "run", corpus)))
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "pretrain.run", "--config", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    outputs = [process.communicate(timeout=LIMIT)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert f"deepcloze: {platform.node()}, rank 1: corpus.train: " in outputs[0]
    assert "Traceback" not in "".join(outputs)
