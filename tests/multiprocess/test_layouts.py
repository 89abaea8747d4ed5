"""The same run gives the same losses, gradients and held-out figures at every world size, microbatch and ZeRO stage."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM

from experiment.configuration import build_config
from experiment.folder import RunFolder
from pretrain.batching.loader import IGNORED, BatchMaker, Layout
from pretrain.batching.masking import Masker, MaskingPolicy
from pretrain.batching.order import ShuffledOrder
from pretrain.batching.sequences import open_index
from pretrain.batching.vocabulary import vocabulary_of
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import open_corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.modeling.build import build_model, resolve_config
from pretrain.training.checkpoint_store import checkpoint_path
from ranks import RankPool
from runs import NO_DROPOUT, TINY, Tree, curve, everything, pretrain_case, settings

LAYOUTS = list(itertools.product((1, 2, 3), (0, 1, 2, 3), (130, 700)))
SAMPLE = [(1, 3, 130), (2, 0, 130), (2, 1, 700), (2, 3, 130), (3, 1, 130), (3, 2, 700)]
SAMPLED = [pytest.param(*layout, marks=() if layout in SAMPLE else pytest.mark.soak) for layout in LAYOUTS]


def evaluations(folder: Path) -> list[Tree]:
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if "eval/held/loss" in event]


@pytest.fixture(scope="session")
def reference(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of one rank, ZeRO 0, one microbatch a step."""
    folder = tmp_path_factory.mktemp("reference")
    tree = settings(
        folder,
        wordpiece_corpus,
        "fp32_zero0",
        model__config=TINY | NO_DROPOUT,
        batch__microbatch_tokens=8192,
        corpus__eval={"held": str(heldout_corpus)},
    )
    assert pools[1].run(pretrain_case, tree) == ["done"]
    return folder


@pytest.mark.parametrize(("world_size", "stage", "microbatch_tokens"), SAMPLED)
def test_losses_and_held_out_figures_do_not_depend_on_the_layout(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    reference: Path,
    tmp_path: Path,
    world_size: int,
    stage: int,
    microbatch_tokens: int,
) -> None:
    """Catches losses averaged per rank or microbatch, gradients lost in an accumulation, ranks that see other data."""
    tree = settings(
        tmp_path,
        wordpiece_corpus,
        f"fp32_zero{stage}",
        model__config=TINY | NO_DROPOUT,
        batch__microbatch_tokens=microbatch_tokens,
        corpus__eval={"held": str(heldout_corpus)},
    )
    assert set(pools[world_size].run(pretrain_case, tree)) == {"done"}
    assert curve(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path) == pytest.approx(curve(reference), rel=1e-4)
    assert curve(tmp_path, "grad_norm") == pytest.approx(curve(reference, "grad_norm"), rel=1e-3)
    assert curve(tmp_path, "tokens") == curve(reference, "tokens")
    assert curve(tmp_path, "lr") == curve(reference, "lr")

    first, last = evaluations(tmp_path)
    expected_first, expected_last = evaluations(reference)
    assert (first["step"], last["step"]) == (0, 6)
    assert first == pytest.approx(expected_first, rel=1e-5)
    assert last == pytest.approx(expected_last, rel=1e-4)
    assert last["eval/held/loss"] < first["eval/held/loss"]


@pytest.fixture(scope="session")
def gradient(wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of the first global batch: one process, each sequence alone, full head, nothing but transformers and torch."""
    config = build_config(PretrainConfig, settings(Path("unused"), wordpiece_corpus, model__config=TINY | NO_DROPOUT))
    corpus = open_corpus(wordpiece_corpus)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    vocabulary = vocabulary_of(tokenizer)
    model_config = resolve_config(config.model, tokenizer)
    start = build_model(config.model, model_config, config.run.seed).model.state_dict()
    model_config._attn_implementation = "eager"
    model = AutoModelForMaskedLM.from_config(model_config)
    model.load_state_dict(start)

    width = config.batch.max_seq_length
    index = open_index(corpus, width - vocabulary.frame, tmp_path_factory.mktemp("index"))
    maker = BatchMaker(
        corpus,
        index,
        ShuffledOrder(len(index), config.run.seed, config.batch.sequences),
        Masker(vocabulary, MaskingPolicy(0.15, 0.8, 0.1), config.run.seed, corpus.fingerprint),
        vocabulary,
        Layout(width, width * config.batch.sequences, packed=False),
    )
    batch = maker[0]
    assert len(batch.microbatches) == 1
    micro = batch.microbatches[0]
    labels = torch.full((micro.input_ids.numel(),), IGNORED)
    real = micro.labels != IGNORED
    labels[micro.masked_positions[real]] = micro.labels[real]
    counts = []
    for ids, row_labels, segments in zip(micro.input_ids, labels.view_as(micro.input_ids), micro.segments, strict=True):
        used = int((segments > 0).sum())
        if used:
            logits = model(input_ids=ids[None, :used]).logits[0]
            loss = F.cross_entropy(logits, row_labels[:used], ignore_index=IGNORED, reduction="sum")
            (loss / batch.masked_tokens).backward()
            counts.append((used, int((row_labels != IGNORED).sum())))
    assert len(counts) == config.batch.sequences
    assert any(masked == 0 for _, masked in counts), "a sequence without masks belongs to the test"
    assert max(used for used, _ in counts) > 8 * min(used for used, _ in counts)
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(folder: Path, expected: dict[str, torch.Tensor], beta: float) -> float:
    """Of a run of one step without clipping: Adam's first moment is then the gradient times 1 - beta."""
    kept = everything(checkpoint_path(folder / "checkpoints", 1))
    found = {name: kept[f"model.{name}/exp_avg"] / (1 - beta) for name in expected}
    difference = torch.cat([found[name] - expected[name] for name in expected])
    return float(difference.norm() / torch.cat(list(expected.values())).norm())


@pytest.mark.parametrize(
    ("precision", "world_size", "stage", "microbatch_tokens"),
    [
        pytest.param(precision, *layout, marks=() if layout in sample else pytest.mark.soak)
        for precision, sample in (("fp32", SAMPLE), ("bf16", [(1, 2, 700), (2, 1, 130), (3, 3, 130)]))
        for layout in LAYOUTS
    ],
)
def test_the_accumulated_gradient_is_that_of_plain_torch(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    gradient: dict[str, torch.Tensor],
    tmp_path: Path,
    precision: str,
    world_size: int,
    stage: int,
    microbatch_tokens: int,
) -> None:
    """Catches averages per rank, microbatch or sequence in place of one mean over the global batch's masked tokens."""
    tree = settings(
        tmp_path,
        wordpiece_corpus,
        f"{precision}_zero{stage}",
        model__config=TINY | NO_DROPOUT,
        batch__microbatch_tokens=microbatch_tokens,
        optimizer__grad_clip=0.0,
        schedule__steps=1,
    )
    pools[world_size].run(pretrain_case, tree)
    assert gradient_error(tmp_path, gradient, beta=0.9) < {"fp32": 1e-5, "bf16": 0.03}[precision]


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_batches_without_any_masked_token_update_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, world_size: int, stage: int
) -> None:
    """Catches NaN weights from a loss of 0/0, and weight decay in a step that learns nothing."""
    tree = settings(tmp_path, wordpiece_corpus, f"fp32_zero{stage}", masking__rate=1e-9, schedule__steps=2)
    tree["checkpoint"]["every_steps"] = 1
    pools[world_size].run(pretrain_case, tree)
    assert curve(tmp_path) == [None, None]
    first, second = (everything(checkpoint_path(tmp_path / "checkpoints", step)) for step in (1, 2))
    assert all(key.endswith("/fp32") for key in first), "the optimizer has a state without an update"
    assert all(torch.equal(first[key], second[key]) for key in first)
