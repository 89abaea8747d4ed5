"""Five small runs whose losses, learning rates and masks are recorded in `tests/golden/recorded/`.

`python -m pytest tests/golden --record` records them again: only for a change that is meant to change results, with the
reason in the commit.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiment.config import build_config
from experiment.run_files.checkpoints import checkpoint_path
from experiment.run_files.run_folder import RunFolder
from pretrain.batching.batch import RankBatch
from pretrain.config import PretrainConfig
from pretrain.corpus.build import build_corpus
from pretrain.corpus.options import CorpusOptions
from pretrain.resolve import resolve
from pretrain.training_stream import open_stream, run_layout
from pretrain.world import World
from rank_pool import RankPool
from runs import TINY, Tree, pretrain_case, run_config, saved_tensors

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
TOKENIZER = HERE / "tokenizer"
RANKS = 2
KEYS = ("step", "tokens", "loss", "lr", "grad_norm")


def build_corpora(text: Path, folder: Path) -> Path:
    """Build the corpora `all`, `all-heldout` and `part` in `folder` with the recorded tokenizer."""
    build_corpus(CorpusOptions(source=text, tokenizer=TOKENIZER, output=folder / "all", holdout=40, workers=1))
    build_corpus(CorpusOptions(source=text, tokenizer=TOKENIZER, output=folder / "part", limit=150, seed=3, workers=1))
    return folder


def recorded_config(folder: Path, corpus: Path, ds_config: str = "fp32_zero1", **changes: Any) -> Tree:
    """As when the runs were recorded: two layers, and three rows a microbatch, on which the dropout masks depend."""
    return run_config(folder, corpus, ds_config, **{"model__config": TINY, "batch__microbatch_tokens": 130} | changes)


def fp32(folder: Path, corpora: Path) -> Tree:
    """ZeRO 2, three microbatches per step, dropout."""
    return recorded_config(
        folder,
        corpora / "all",
        "fp32_zero2",
        corpus__eval={"held": str(corpora / "all-heldout")},
        evaluation__every_steps=3,
    )


def bf16(folder: Path, corpora: Path) -> Tree:
    return recorded_config(folder, corpora / "all", "bf16_zero1", masking__unit="word")


def lamb_with_stages(folder: Path, corpora: Path) -> Tree:
    return recorded_config(
        folder,
        corpora / "all",
        "fp32_zero1",
        optimizer__name="lamb",
        schedule__name="cosine",
        schedule__batch_warmup_steps=3,
        schedule__stages=[{"steps": 3, "max_seq_length": 24}, {"sequences": 17}],
    )


def mixture_with_spans(folder: Path, corpora: Path) -> Tree:
    train = [{"path": str(corpora / "all"), "weight": 0.6}, {"path": str(corpora / "part"), "weight": 0.4}]
    return recorded_config(
        folder,
        corpora / "all",
        "fp32_zero3",
        corpus__train=train,
        masking__unit="span",
        masking__rate=[0.3, 0.15],
        masking__schedule="linear",
    )


def parent(folder: Path, corpora: Path) -> Tree:
    """The run that `fork_with_ema` forks at its last step."""
    return recorded_config(folder, corpora / "all", schedule__name="constant", schedule__steps=3)


def fork_with_ema(folder: Path, corpora: Path) -> Tree:
    tree = recorded_config(
        folder,
        corpora / "all",
        model__ema_decay=0.8,
        schedule__name="wsd",
        schedule__steps=7,
        schedule__decay_steps=3,
    )
    tree["run"]["resume"] = str(folder.with_name("parent"))
    return tree


def resumed(folder: Path, corpora: Path) -> Tree:
    """The run that wrote `tests/golden/checkpoint_0_1` after two steps."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 12, "max_position_embeddings": 40}
    return recorded_config(folder, corpora / "all", model__config=TINY | small, schedule__steps=4)


RUNS = {run.__name__: run for run in (fp32, bf16, lamb_with_stages, mixture_with_spans, fork_with_ema)}


def results_of(name: str, pool: RankPool, corpora: Path, folder: Path) -> Tree:
    """Run and return what is recorded of it."""
    run_folder = folder / name
    if name == "fork_with_ema":
        pool.run(pretrain_case, parent(folder / "parent", corpora))
    tree = RUNS[name](run_folder, corpora)
    assert set(pool.run(pretrain_case, tree)) == {"done"}
    lines = RunFolder(run_folder).metrics.read_text(encoding="utf-8").splitlines()
    events = list(map(json.loads, lines))
    steps = [{key: event[key] for key in KEYS} for event in events if "loss" in event]
    return {
        "steps": steps,
        "evaluations": [event for event in events if any(name.startswith("eval/") for name in event)],
        "masks": batch_hashes(tree, steps[0]["step"] - 1, steps[-1]["step"]),
        "norms": tensor_norms(checkpoint_path(RunFolder(run_folder).checkpoints, steps[-1]["step"])),
    }


def batch_hashes(tree: Tree, first: int, last: int) -> list[str]:
    """Hashes of the batches (inputs, positions, labels) of the steps from `first` up to, not including, `last`."""
    config = build_config(PretrainConfig, tree)
    run = resolve(config, 1)
    stream = open_stream(run, World(), run_layout(run, "packed"))
    return [hash_batch(stream[step]) for step in range(first, last)]


def hash_batch(batch: RankBatch) -> str:
    digest = hashlib.sha256()
    for microbatch in batch.microbatches:
        for tensor in microbatch[:6]:  # the rest follows from these
            digest.update(np.ascontiguousarray(tensor.numpy().astype(np.int64)).data)
    return digest.hexdigest()[:16]


def tensor_norms(checkpoint: Path) -> dict[str, float]:
    """The norm over all parameters of each kind of tensor: master weights, each moment, averages."""
    sums: dict[str, float] = {}
    for name, tensor in saved_tensors(checkpoint).items():
        if tensor.dim() and not name.endswith("step"):
            kind = name.rpartition("/")[2]
            sums[kind] = sums.get(kind, 0.0) + float(tensor.double().square().sum())
    return {kind: total**0.5 for kind, total in sorted(sums.items())}
