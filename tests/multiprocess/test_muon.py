"""Muon at every layout equals torch's Muon and AdamW in one plain process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiment.config import build_config
from fp16 import any_precision_case
from plain_torch import plain_loss, plain_model
from pretrain.config import PretrainConfig
from pretrain.modeling.structure import hidden_matrices
from pretrain.resolve import resolve
from pretrain.training_stream import open_stream, run_layout
from pretrain.world import World
from rank_pool import RankPool
from runs import NO_DROPOUT, TINY, Tree, logged, pretrain_case, run_config, sampled, soak

STEPS, LR, DECAY, CLIP = 3, 0.02, 0.1, 0.5
LAYOUTS = [(size, f"fp32_zero{stage}") for size in (1, 2, 3) for stage in range(4)]
LAYOUTS += [(2, "fp32_zero2_cpu_offload"), (3, "fp32_zero3_cpu_offload")]
SAMPLE = [(1, "fp32_zero0"), (3, "fp32_zero2"), (3, "fp32_zero3_cpu_offload")]


def muon_config(folder: Path, corpus: Path, ds_config: str, **changes: object) -> Tree:
    """The model's sizes are divided by no world size. The large eps keeps Adam from amplifying rounding errors."""
    tree = run_config(
        folder,
        corpus,
        ds_config,
        model__config=TINY | NO_DROPOUT | {"hidden_size": 22, "intermediate_size": 37},
        schedule__steps=STEPS,
        schedule__name="constant",
        schedule__warmup_steps=0,
    )
    tree["optimizer"] = {
        "name": "muon",
        "lr": LR,
        "weight_decay": DECAY,
        "eps": 1e-4,
        "grad_clip": CLIP,
        **changes,
    }
    return tree


def newton_schulz(gradient: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """What torch computes in bfloat16 only."""
    a, b, c = coefficients
    x = gradient.double() / max(gradient.norm().item(), eps)
    for _ in range(iterations):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x.float()


@pytest.fixture(scope="session")
def plain_losses(wordpiece_corpus: Path) -> Iterator[list[float]]:
    """Of each step, by transformers and torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
        yield plain_run(wordpiece_corpus)


def plain_run(wordpiece_corpus: Path) -> list[float]:
    tree = muon_config(Path("unused"), wordpiece_corpus, "fp32_zero0")
    tree["batch"]["microbatch_tokens"] = 10_000  # the global batch is one microbatch
    config = build_config(PretrainConfig, tree)
    run = resolve(config, 1)
    model = plain_model(run)
    hidden = hidden_matrices(model)
    assert len(hidden) == 13  # two layers of six, and the head's
    parameters = dict(model.named_parameters())
    matrices = [parameters[name] for name in hidden]
    decay = [p for name, p in parameters.items() if name not in hidden and p.dim() == 2]
    rest = [p for name, p in parameters.items() if p.dim() == 1]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=config.optimizer.betas, eps=1e-4)
    losses = []
    stream = open_stream(run, World(), run_layout(run, "padded"))
    for step in range(STEPS):
        (padded,) = stream[step].microbatches
        loss = plain_loss(model, padded)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("world_size", "ds_config"), sampled(LAYOUTS, SAMPLE))
def test_losses_equal_those_of_torch(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    plain_losses: list[float],
    tmp_path: Path,
    world_size: int,
    ds_config: str,
) -> None:
    """Catches slices that are orthogonalized instead of matrices, and a matrix whose result goes to the wrong place."""
    pools[world_size].run(pretrain_case, muon_config(tmp_path, wordpiece_corpus, ds_config))
    assert logged(tmp_path) == pytest.approx(plain_losses, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "tolerance", "stage"),
    [
        *(("bf16", 1.5e-4, 1), ("fp16", 3e-5, 2), ("bf16", 1.5e-4, 3)),
        *soak(("fp16", 3e-5, 1), ("bf16", 1.5e-4, 2), ("fp16", 3e-5, 3)),
    ],
)
def test_losses_in_16_bit_are_close_to_those_of_torch(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    plain_losses: list[float],
    tmp_path: Path,
    precision: str,
    tolerance: float,
    stage: int,
) -> None:
    """Catches the same mistakes, and gradients that are scaled, in DeepSpeed's optimizers for 16 bit."""
    pools[2].run(any_precision_case, muon_config(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}"))
    assert logged(tmp_path) == pytest.approx(plain_losses, rel=tolerance)
