"""Offloading master weights and optimizer state to CPU memory or NVMe changes no result."""

import json
import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.errors import UserError
from experiment.run_files.checkpoints import checkpoint_path
from fp16 import fp16_supported
from pretrain.engine.deepspeed_settings import DeepSpeedSettings, check_nvme, parse_settings
from pretrain.engine.engine import Engine
from pretrain.engine.kernel_lock import install_kernel_lock
from pretrain.world import World
from rank_pool import RankPool
from runs import (
    NO_DROPOUT,
    SHALLOW,
    TINY,
    Tree,
    assert_same_tensors,
    build_engine,
    copy_case,
    logged,
    microbatch,
    pretrain_case,
    run_config,
    sampled,
    saved_tensors,
)

WIDE = TINY | NO_DROPOUT | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SAMPLE = ["fp32_zero3_cpu_offload"]
RELATIVE = {
    "fp32": 1e-5,
    "bf16": 1e-3,
    "fp16": 1e-3,
}  # tolerance of losses: kernels round differently if memory is aligned differently


def with_fp16(world: World, function: Any, *args: Any) -> Any:
    with fp16_supported():
        return function(world, *args)


def presets(device: str) -> list[str]:
    return [f"{precision}_zero{stage}_{device}_offload" for precision in RELATIVE for stage in (2, 3)]


def nvme_settings(nvme_path: str | None = None, **sections: Any) -> DeepSpeedSettings:
    offload = {"device": "nvme"} | ({} if nvme_path is None else {"nvme_path": nvme_path})
    return parse_settings(sections | {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}, Path("ds.json"))


def compare_with_plain_run(pools: dict[int, RankPool], corpus: Path, folder: Path, ds_config: str, model: Tree) -> None:
    """Compare an offloaded run with a plain one, resume each from the other, and copy a checkpoint bit by bit."""
    plain, tolerance = ds_config.rpartition("_")[0].rpartition("_")[0], RELATIVE[ds_config.partition("_")[0]]
    runs = {
        "plain": [(plain, None)],
        "onto": [(ds_config, None)],  # after step 1 of the plain run
        "off": [(ds_config, 1), (plain, None)],
    }
    for name, parts in runs.items():
        first = 1 if name == "onto" else 0
        if first:
            saved, copied = (checkpoint_path(folder / run / "checkpoints", first) for run in ("plain", name))
            shutil.copytree(saved, copied)
        for file, stop_after in parts:
            changes = {"schedule__steps": 3, "checkpoint__every_steps": 1 if name == "plain" else None}
            tree = run_config(folder / name, corpus, file, **changes) | {"model": model}
            assert pools[2].run(with_fp16, pretrain_case, tree, stop_after) == ["stopped" if stop_after else "done"] * 2
        losses, norms = (logged(folder / "plain", key)[first:] for key in ("loss", "grad_norm"))
        assert logged(folder / name) == pytest.approx(losses, rel=tolerance)
        assert logged(folder / name, "grad_norm") == pytest.approx(norms, rel=10 * tolerance)
    source = checkpoint_path(folder / "onto" / "checkpoints", 3)
    copying = run_config(folder / "copy", corpus, ds_config) | {"model": model}
    pools[2].run(with_fp16, copy_case, copying, {source: folder / "copies"})
    before, after = saved_tensors(source), saved_tensors(checkpoint_path(folder / "copies", 2))
    assert {key.rpartition("/")[2] for key in before} == {"fp32", "exp_avg", "exp_avg_sq", "step", "ema"}
    assert_same_tensors(before, after)


@pytest.mark.parametrize("ds_config", sampled(presets("cpu"), SAMPLE))
def test_cpu_offload_changes_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches a gradient that is lost on the way to the CPU, a norm or clipping of another gradient, and a checkpoint
    without the offloaded tensors or one that only offloaded runs can resume from."""
    compare_with_plain_run(
        pools, wordpiece_corpus, tmp_path, ds_config, model={"config": SHALLOW | NO_DROPOUT, "ema_decay": 0.9}
    )


def overflow_case(world: World, tree: Tree) -> tuple[list[bool], list[float]]:
    """Four steps of two microbatches, in the second of which the last rank has an infinite gradient. Returns which
    updates were applied, and the gradient norms."""
    engine, _ = build_engine(world, tree)
    next(engine._deepspeed.module.parameters()).register_hook(
        lambda gradient: gradient.fill_(torch.inf) if engine._step == 1 and world.rank == world.size - 1 else gradient
    )
    results = []
    for step in range(4):
        engine.begin_step(step, 1e-3)
        for number in range(2):
            engine.accumulate(microbatch(), 12 * world.size, step, number)
        results.append(engine.step().wait())
    engine.close()
    return [result.applied for result in results], [result.grad_norm for result in results]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_overflow_ends_with_its_step(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    """Catches a gradient that is not finite, and is added to those of later steps: no update would be applied again."""
    found = []
    for device in ("none", "cpu"):
        zero = {"stage": stage, "offload_optimizer": {"device": device}}
        (tmp_path / "ds.json").write_text(json.dumps({precision: {"enabled": True}, "zero_optimization": zero}))
        tree = run_config(tmp_path / "run", wordpiece_corpus, model__config=SHALLOW | NO_DROPOUT)
        tree["engine"] = {"ds_config": str(tmp_path / "ds.json")}
        for applied, norms in pools[2].run(with_fp16, overflow_case, tree):
            assert applied == [True, False, True, True]
            assert not math.isfinite(norms.pop(1))
            found.append(norms)
    plain, offloaded = found[0], found[-1]
    assert offloaded == pytest.approx(plain, rel=1e-3)


@pytest.fixture(scope="session")
def nvme() -> None:
    """Build DeepSpeed's kernel for NVMe offload, which takes minutes the first time."""
    try:
        check_nvme(nvme_settings())
    except UserError as reason:
        pytest.skip(str(reason))
    from deepspeed.accelerator import get_accelerator

    install_kernel_lock()
    get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)


@pytest.mark.soak
@pytest.mark.usefixtures("nvme")
@pytest.mark.parametrize("ds_config", presets("nvme"))
def test_nvme_offload_changes_nothing(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, ds_config: str
) -> None:
    """Catches the same, and master weights that are read while they are swapped out."""
    compare_with_plain_run(pools, wordpiece_corpus, tmp_path, ds_config, model={"config": WIDE, "ema_decay": 0.9})


def swapping_case(world: World, tree: Tree, swap: Path) -> int:
    """A run with NVMe offload. Returns the bytes in its swap files before it ends."""
    found = 0
    close = Engine.close

    def look(self: Any) -> None:
        nonlocal found
        found = sum(path.stat().st_size for path in (swap / f"rank-{world.rank}").rglob("*.swp"))
        close(self)

    Engine.close = look  # type: ignore[method-assign]
    try:
        pretrain_case(world, tree)
    finally:
        Engine.close = close  # type: ignore[method-assign]
    return found


@pytest.mark.soak
@pytest.mark.usefixtures("nvme")
@pytest.mark.parametrize("rule", ["adamw", "lamb", "stableadamw", "muon"])
def test_swap_files_exist_until_the_run_ends(
    pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, rule: str
) -> None:
    """Catches NVMe offload that has no effect, swap files that are not deleted, and state that an optimizer skips."""
    rows = [(tmp_path / name, f"fp32_{name}", name == "zero3_nvme_offload") for name in ("zero3_nvme_offload", "zero1")]
    for folder, ds_config, offloaded in rows:
        tree = run_config(folder, wordpiece_corpus, ds_config, model__config=WIDE)
        tree["optimizer"] = {"name": rule, "lr": 3e-3, "eps": 1e-4}
        found = pools[2].run(swapping_case, tree, folder / "swap")
        elements = sum(
            tensor.numel() for key, tensor in saved_tensors(checkpoint_path(folder / "checkpoints", 6)).items()
        )
        assert (sum(found) > 0.9 * 4 * elements) is offloaded
        assert not (folder / "swap").exists()
    assert logged(rows[0][0]) == pytest.approx(logged(rows[1][0]), rel=1e-4)


def test_nvme_offload_without_its_kernel_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiler's trace after the launch."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr("pretrain.engine.deepspeed_settings.is_ninja_available", lambda: False)
    with pytest.raises(UserError, match=r"libaio.*--engine\.ds_config=ds_configs/bf16_zero3_cpu_offload\.json"):
        check_nvme(nvme_settings(bf16={"enabled": True}))


def test_ninja_is_found_in_an_environment_that_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches NVMe offload that is rejected because only the environment of this Python has ninja."""
    from deepspeed.accelerator import get_accelerator

    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "ninja").write_text("#!/bin/sh\n")
    (scripts / "ninja").chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(scripts))
    monkeypatch.setenv("PATH", str(tmp_path))
    builder = type(get_accelerator().create_op_builder("AsyncIOBuilder"))
    monkeypatch.setattr(builder, "is_compatible", lambda _: True)
    check_nvme(nvme_settings())


def test_a_missing_nvme_path_is_rejected(tmp_path: Path) -> None:
    """Catches swap files on the wrong disk because nothing is mounted at the path."""
    with pytest.raises(UserError, match=r"'nvme_path' is .*nothing"):
        check_nvme(nvme_settings(nvme_path=str(tmp_path / "nothing")))
