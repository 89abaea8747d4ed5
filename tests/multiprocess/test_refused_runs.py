"""A rank that cannot start tells the others."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiment.config import build_config
from experiment.errors import UserError
from experiment.run_files.outcome_file import Outcome, read_outcome, reserve_outcome
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.corpus.reader import open_corpus
from pretrain.training.cpu_group import CpuGroup
from pretrain.world import World
from rank_pool import RankPool, free_port
from runs import Tree, pretrain_case, run_config, sampled
from small_disk import SmallDisk
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


@pytest.mark.parametrize(
    ("mistake", "failing"),
    sampled(
        [(mistake, failing) for mistake in MISTAKES for failing in (0, 2)],
        [("run folder", 0), ("stream", 0), *((mistake, 2) for mistake in MISTAKES)],
    ),
)
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
        assert read_outcome(RunFolder(tmp_path / "run"))[:2] == (Outcome.REFUSED, errors[0])


def slow_part_case(world: World) -> str:
    """Call a function that fails on rank 1 before a slow part of all ranks, and return the error."""
    group = CpuGroup(world, timedelta(seconds=LIMIT))

    def call() -> list[int]:
        if world.rank == 1:
            raise UserError("no folder")
        return group.from_all_ranks_slowly(lambda on_progress: world.rank)

    try:
        return str(group.call(call))
    except UserError as error:
        return str(error)


def test_a_rank_that_fails_before_a_slow_part_is_reported(pools: dict[int, RankPool]) -> None:
    """Catches ranks that copy a corpus, or download a model, and then wait for one that has failed before."""
    assert pools[3].run(slow_part_case) == [f"{platform.node()}, rank 1: no folder"] * 3


def fp16_case(world: World, tree: Tree, lacking: int) -> str:
    """Run on devices with fp16, except that of the rank `lacking`."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: world.rank != lacking)
        return refused_case(world, [tree] * world.size)


def test_each_rank_checks_its_own_device(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a host without fp16 that leaves the others waiting: the launching machine cannot check its devices."""
    tree = run_config(tmp_path / "run", wordpiece_corpus, "fp16_zero1")
    errors = pools[2].run(fp16_case, tree, 1)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"{platform.node()}, rank 1: engine.ds_config: this device (cpu) cannot train in fp16")


def test_a_mistake_on_all_ranks_names_no_host(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path
) -> None:
    """Catches a message that blames one host for a mistake in the config, and a run that resumes with another seed."""
    tree = run_config(tmp_path, wordpiece_corpus, corpus__train="missing")
    errors = pools[3].run(refused_case, [tree] * 3)
    assert len(set(errors)) == 1
    assert errors[0].startswith("corpus.train: ")
    assert set(pools[3].run(pretrain_case, run_config(tmp_path, wordpiece_corpus), 1)) == {"stopped"}, "out of step"
    errors = pools[3].run(refused_case, [run_config(tmp_path, wordpiece_corpus, run__seed=9)] * 3)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"{tmp_path / 'checkpoints' / 'step-00000001'} cannot be resumed with another run.seed")


@pytest.mark.parametrize("file", ["config.yaml", "provenance.json"])
def test_a_file_that_rank_0_cannot_write_is_refused_on_all(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, file: str
) -> None:
    """Catches a traceback of rank 0 where it records the start of a run, and the others waiting for it."""
    (tmp_path / file / "a folder").mkdir(parents=True)
    if file == "config.yaml":  # else it is taken for a file of the user
        write_provenance(RunFolder(tmp_path), {"step": 0})
    errors = pools[2].run(refused_case, [run_config(tmp_path, wordpiece_corpus)] * 2)
    assert errors == [f"{tmp_path / file}: Is a directory"] * 2
    assert read_outcome(RunFolder(tmp_path))[:2] == (Outcome.REFUSED, errors[0])


def test_a_run_on_a_full_disk_is_refused(
    pools: dict[int, RankPool], wordpiece_corpus: Path, small_disk: SmallDisk
) -> None:
    """Catches a traceback, and an error that only one rank knows."""
    run = RunFolder(small_disk.path / "run")
    run.logs.mkdir(parents=True)
    reserve_outcome(run)
    small_disk.fill()
    errors = pools[2].run(refused_case, [run_config(run.path, wordpiece_corpus)] * 2)
    assert errors == [f"{run.provenance}: disk full"] * 2
    assert read_outcome(run)[:2] == (Outcome.REFUSED, errors[0])


@pytest.mark.parametrize("role", ["train", "eval"])
def test_a_damaged_corpus_is_refused(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path, role: str
) -> None:
    """Catches a run that trains on, or is measured on, text that is not what was built."""
    damaged = Path(shutil.copytree(wordpiece_corpus if role == "train" else heldout_corpus, tmp_path / "damaged"))
    (shard,) = damaged.glob("data-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    changes: Tree = {"corpus__train": str(damaged)} if role == "train" else {"corpus__eval": {"held": str(damaged)}}
    errors = pools[2].run(refused_case, [run_config(tmp_path / "run", wordpiece_corpus, **changes)] * 2)
    assert len(set(errors)) == 1
    assert f"{shard} is damaged: its SHA-256 is " in errors[0]
    assert read_outcome(RunFolder(tmp_path / "run"))[:2] == (Outcome.REFUSED, errors[0])


def replaced_case(world: World, tree: Tree, corpora: list[Path]) -> list[list[int]]:
    """Delete the corpora of a run when it has verified them. Returns the first tokens of each."""
    from pretrain.preparation import prepare

    run, *_ = prepare(build_config(PretrainConfig, tree), CpuGroup(world, timedelta(seconds=60)))
    for corpus in corpora:
        shutil.rmtree(corpus)
    return [corpus.read(np.array([0]), np.array([1])).tolist() for corpus in run.all_corpora]


def test_a_corpus_that_is_replaced_while_a_run_trains(
    pools: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches other text at the positions of the old index: in an evaluation, or after a rewind, hours after the run
    has verified its corpora."""
    corpora = [Path(shutil.copytree(path, tmp_path / path.name)) for path in (wordpiece_corpus, heldout_corpus)]
    expected = [open_corpus(corpus).read(np.array([0]), np.array([1])).tolist() for corpus in corpora]
    tree = run_config(tmp_path / "run", corpora[0], corpus__eval={"held": str(corpora[1])})
    assert pools[1].run(replaced_case, tree, corpora) == [expected]


def verification_case(world: World, corpus: Path, fails_on: int | None) -> tuple[str, int]:
    """Verify a corpus on ranks of different hosts, of which one reads it wrongly. Returns the error, and how often the
    ranks met."""
    from pretrain.corpus.reader import Corpus, open_corpus
    from pretrain.preparation import verify_on_each_host

    class Counting(CpuGroup):
        calls = 0

        def call(self, function: Any) -> Any:
            self.calls += 1
            return super().call(function)

    hosts = Counting(dataclasses.replace(world, local_rank=0), timedelta(seconds=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: f"host-{world.rank}")
        if world.rank == fails_on:
            patch.setattr(Corpus, "find_damage", lambda corpus, shard: f"{shard.file} is damaged")
        try:
            verify_on_each_host(hosts, [open_corpus(corpus)])
        except UserError as error:
            return str(error), hosts.calls
    return "", hosts.calls


def test_every_host_verifies_for_itself(
    pools: dict[int, RankPool], text_file: Path, wordpiece: Path, tmp_path: Path
) -> None:
    """Catches a host that relies on what another has read, and ranks that wait for a whole corpus in one collective,
    which times out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.corpus.shards.SHARD_TOKENS", 8000)
        options = CorpusOptions(source=text_file, tokenizer=wordpiece, output=tmp_path / "corpus", workers=1)
        shards = len(build_corpus(options).shards)
    assert shards > 2
    message = "host-1, rank 1: data-00000-of-"
    (first, calls), (second, _) = pools[2].run(verification_case, tmp_path / "corpus", 1)
    assert first == second
    assert (first.startswith(message), calls) == (True, 1)
    assert pools[2].run(verification_case, tmp_path / "corpus", None) == [("", shards + 1)] * 2
    assert pools[2].run(verification_case, tmp_path / "corpus", None) == [("", 1)] * 2, "both have recorded it"


def test_a_corpus_missing_on_one_host_is_printed_and_exits_with_2(
    wordpiece_corpus: Path, tmp_path: Path, handed_over: Mapping[str, str]
) -> None:
    """Catches an error of another rank than 0 that nobody prints, and exit code 1."""
    port, ranks = free_port(), []
    for rank, corpus in enumerate((wordpiece_corpus, tmp_path / "missing")):
        config = tmp_path / f"{rank}.yaml"
        config.write_text(yaml.safe_dump(run_config(tmp_path / "run", corpus)))
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **handed_over}
        command = [sys.executable, "-m", "pretrain.run", "--config", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    outputs = [process.communicate(timeout=LIMIT)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert f"deepcloze: {platform.node()}, rank 1: corpus.train: " in outputs[0]
    assert "Traceback" not in "".join(outputs)
