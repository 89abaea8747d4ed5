"""Training on GPUs: losses in every precision, ZeRO stage and offload follow fp32, and fp32 follows the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import MODEL, STEPS, gpu_run

from experiment.run_files.checkpoints import checkpoint_path
from poison import Poison, poisoned_case
from pretrain.world import World
from runs import Tree, logged, pretrain_case, saved_progress, saved_tensors

# Of a loss of about 5 that falls by a tenth: the effect of 16-bit weights and activations.
RELATIVE = {"fp16": 2e-3, "bf16": 1e-2}


def counting_case(world: World, tree: Tree, stop_after: int | None = None) -> tuple[str, int, int]:
    """A run. Returns its outcome, the number of calls of flash attention, and the peak of allocated bytes."""
    from pretrain.modeling import attention

    calls = 0

    def counted(kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return kernel(*args)

        return call

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "flash_attention", counted(attention.flash_attention))
        outcome = pretrain_case(world, tree, stop_after)
    return outcome, calls, torch.cuda.max_memory_allocated() if on_gpu else 0


@pytest.fixture(scope="session")
def fp32(gpus: Any, wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses in fp32, where attention uses a mask."""
    folder = tmp_path_factory.mktemp("fp32")
    ended = gpus.run(counting_case, gpu_run(folder, wordpiece_corpus, "fp32_zero1"))
    assert all((outcome, calls) == ("done", 0) for outcome, calls, _ in ended)
    return logged(folder)


def test_fp32_on_a_gpu_follows_the_cpu(cpu: Any, fp32: list[float], wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches batches, positions or masks that are corrupted on the way to the device, and unintended TF32."""
    cpu.run(pretrain_case, gpu_run(tmp_path, wordpiece_corpus, "fp32_zero1"))
    assert fp32 == pytest.approx(logged(tmp_path), rel=1e-3)
    assert fp32[-1] < fp32[0] - 0.2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_follows_fp32(
    gpus: Any, fp32: list[float], wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    """Catches sequences that attend to each other in flash attention, gradients that are not unscaled, and attention
    that silently falls back to a mask."""
    ended = gpus.run(counting_case, gpu_run(tmp_path, wordpiece_corpus, f"{precision}_zero{stage}"))
    assert all(outcome == "done" for outcome, _, _ in ended)
    assert all(calls >= STEPS * MODEL["num_hidden_layers"] for _, calls, _ in ended)
    skipped = logged(tmp_path, "skipped_steps")[-1]
    assert skipped == (0 if precision == "bf16" else logged(tmp_path, "overflows")[-1])
    if skipped == 0:
        assert logged(tmp_path) == pytest.approx(fp32, rel=RELATIVE[precision])
    else:  # the first loss scales were too high: so many fewer updates
        assert skipped < 5
        assert logged(tmp_path)[-1] == pytest.approx(fp32[-1], rel=0.02)


@pytest.mark.parametrize("rule", ["adamw", "lamb", "stableadamw", "muon"])
@pytest.mark.parametrize("ds_config", ["bf16_zero2_cpu_offload", "bf16_zero3_cpu_offload", "fp16_zero3_cpu_offload"])
def test_offload_changes_nothing(gpus: Any, wordpiece_corpus: Path, tmp_path: Path, ds_config: str, rule: str) -> None:
    """Catches master weights that are read before they are copied, wrong norms and reductions of tensors on the CPU,
    and checkpoints without the offloaded tensors."""
    rows = {"plain": ds_config.removesuffix("_cpu_offload"), "offloaded": ds_config}
    trees = {name: gpu_run(tmp_path / name, wordpiece_corpus, file, schedule__steps=8) for name, file in rows.items()}
    for tree in trees.values():
        tree["optimizer"] = {"name": rule, "lr": 3e-3, "eps": 1e-4}
    gpus.run(pretrain_case, trees["plain"])
    assert set(gpus.run(pretrain_case, trees["offloaded"], 4)) == {"stopped"}
    assert set(gpus.run(pretrain_case, trees["offloaded"])) == {"done"}
    assert logged(tmp_path / "offloaded") == pytest.approx(logged(tmp_path / "plain"), rel=5e-3)
    plain, offloaded = (saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 8)) for name in rows)
    assert plain.keys() == offloaded.keys()
    assert all(tensor.isfinite().all() for tensor in offloaded.values())


@pytest.mark.parametrize("ds_config", ["bf16_zero1", "bf16_zero3"])
def test_activation_checkpointing_saves_memory_and_changes_nothing(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches recomputation with other dropout masks, and activations that are kept nevertheless."""
    model = MODEL | {"num_hidden_layers": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
    peaks = {}
    for recompute in (False, True):
        tree = gpu_run(tmp_path / str(recompute), wordpiece_corpus, ds_config, model__config=model, schedule__steps=4)
        tree["batch"] |= {"sequences": 500, "microbatch_tokens": 16000}
        tree["model"]["activation_checkpointing"] = recompute
        peaks[recompute] = max(peak for _, _, peak in gpus.run(counting_case, tree))
    # Atomic additions in the gradient of embeddings make runs differ in the last bits.
    assert logged(tmp_path / "True") == pytest.approx(logged(tmp_path / "False"), rel=1e-3)
    # Over 10,000 slots in 8 layers, of which 4 times the hidden size is the least that is kept, in 2 bytes each.
    assert peaks[False] - peaks[True] > 10_000 * 8 * 4 * model["hidden_size"] * 2


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_bad_batch_after_which_a_microbatch_is_queued(
    gpus: Any, wordpiece_corpus: Path, tmp_path: Path, precision: str, policy: str
) -> None:
    """Catches an update of a bad batch, and a microbatch that was queued before the batch was found to be bad and
    counts twice or not at all. With `ema_decay`, the host reads the norm before it queues the next microbatch."""
    for name, decay in (("ahead", None), ("waiting", 0.9)):
        tree = gpu_run(
            tmp_path / name,
            wordpiece_corpus,
            f"{precision}_zero1",
            schedule__steps=10,
            checkpoint__every_steps=4,
            health__policy=policy,
        )
        tree["model"]["ema_decay"] = decay
        assert set(gpus.run(poisoned_case, tree, {7: Poison(float("nan"), in_loss=False)})) == {"done"}
        assert saved_progress(tmp_path / name, 10)["skipped"] == [7]
    ahead, waiting = ([loss for loss in logged(tmp_path / name) if loss is not None] for name in ("ahead", "waiting"))
    assert ahead == pytest.approx(waiting, rel=1e-3)
