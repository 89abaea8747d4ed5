"""Training on a simulated GPU: what runs on a real one in `tests/gpu`, without one.

16-bit losses differ from those in fp32 by their rounding; gradients of a random model of 32 dimensions by more.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.deepspeed_settings import find_ds_config
from rank_pool import ForkServer, RankError, RankPool
from runs import NO_DROPOUT, Tree, evaluation_events, logged, pretrain_case, run_config, soak
from simulated_gpu import faults
from simulated_gpu.cases import (
    Fault,
    Findings,
    evaluation_case,
    gpu_case,
    lengths_case,
    other_dropout_case,
    varlen_kernel_case,
)

pytest.importorskip("triton")

STEPS = 3
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that the loss depends on attention
}
MODERNBERT = BERT | {
    "model_type": "modernbert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,  # of the size that our own attention kernel takes
    "initializer_range": 0.2,
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
}
# Relative errors of losses and of gradient norms.
TOLERANCE = {"fp32": (1e-5, 1e-4), "fp16": (2e-3, 1e-2), "bf16": (1e-2, 5e-2)}
EARLY_READ = r"stream \d+ reads in cat .* writes in copy_"  # of weights that are gathered at ZeRO 3


@pytest.fixture(scope="module")
def ranks(fork_server: ForkServer) -> Iterator[dict[int, RankPool]]:
    pools = {size: RankPool(fork_server, size) for size in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()


def tiny_run(folder: Path, corpus: Path, ds_config: str, **changes: Any) -> Tree:
    """Two microbatches a step on one rank. At ZeRO 3, large weights are partitioned and small ones persist. The host
    waits for the GPU when it logs: not in each step."""
    changes = {"model__config": BERT | NO_DROPOUT, "schedule__steps": STEPS, "run__log_every": 2} | changes
    tree = run_config(folder, corpus, ds_config, **changes)
    tree["batch"] |= {"sequences": 11, "microbatch_tokens": 130}
    settings = json.loads(find_ds_config(ds_config).read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if "fp16" in settings:
        settings["fp16"]["initial_scale_power"] = 12  # no update is skipped
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "ds_config.json"
    written.write_text(json.dumps(settings), encoding="utf-8")
    tree["engine"] = {"ds_config": str(written), "compile": False}
    return tree


Reference = Callable[..., Path]


@pytest.fixture(scope="module")
def reference(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """The run folder of a run on a CPU in fp32, with the changes of `tiny_run`; each is made once."""
    made: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = json.dumps(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cpu")
            ranks[1].run(pretrain_case, tiny_run(made[key], wordpiece_corpus, "fp32_zero1", **changes))
        return made[key]

    return run


def assert_sound(findings: list[Findings], precision: str, offload: bool = False) -> None:
    """`findings`: by rank."""
    for found in findings:
        assert found.mixed == []
        assert found.races == []
        assert found.calls["cross_entropy_kernel"] > 0
        for kernel in ("_flash_attention_forward", "_flash_attention_backward"):
            assert (found.calls[kernel] > 0) == (precision != "fp32")
        assert (found.calls["addmm.dtype_out"] > 2) == (precision != "fp32")  # 2: when the run tries whether it works
        assert len(found.waits_in_steps) > 0
        if not offload:  # DeepSpeed's own step waits more often
            assert found.waits_in_microbatches == []
            for waits in found.waits_in_steps:
                assert len(waits) <= 1
                assert all("(host_copy.py:" in wait for wait in waits)


def check_run(pool: RankPool, tree: Tree, ds_config: str, expected: Path, fault: Fault | None = None) -> list[Findings]:
    precision = ds_config.partition("_")[0]
    findings = pool.run(gpu_case, tree, None, fault)
    assert_sound(findings, precision, offload=ds_config.endswith("offload"))
    assert_same_losses(Path(tree["run"]["dir"]), expected, precision)
    return findings  # type: ignore[no-any-return]


def assert_same_losses(found: Path, expected: Path, precision: str) -> None:
    losses, norms = TOLERANCE[precision]
    assert logged(found) == pytest.approx(logged(expected), rel=losses)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=norms)


@pytest.mark.parametrize(
    ("size", "ds_config"),
    [
        (2, "bf16_zero1"),
        (1, "fp32_zero2"),
        (2, "fp16_zero2"),
        (2, "fp32_zero0"),
        (1, "bf16_zero3"),
        (1, "bf16_zero3_cpu_offload"),
        *soak((1, "fp16_zero2"), (1, "bf16_zero1"), (2, "bf16_zero3"), (2, "fp16_zero3")),
        *soak((2, "bf16_zero2_cpu_offload"), (2, "fp16_zero1"), (2, "bf16_zero2"), (2, "fp32_zero1")),
        *soak((2, "fp32_zero3"), (2, "bf16_zero3_cpu_offload")),
    ],  # (2, "fp16_zero1") and (2, "fp16_zero3") are in the next test, (2, "bf16_zero3") in `test_a_whole_run`
)
def test_losses_are_those_of_a_cpu(
    ranks: dict[int, RankPool], reference: Reference, wordpiece_corpus: Path, tmp_path: Path, size: int, ds_config: str
) -> None:
    """Catches wrong arguments of kernels, tensors on the wrong device, and waits of the host and of streams."""
    check_run(ranks[size], tiny_run(tmp_path, wordpiece_corpus, ds_config), ds_config, reference())


@pytest.mark.parametrize(
    ("size", "ds_config", "changes"),
    [
        (1, "fp16_zero1", {"model__config": MODERNBERT}),
        (2, "fp16_zero3", {"optimizer__name": "muon"}),
        (2, "fp16_zero1", {"optimizer__name": "lamb"}),
        *soak(
            (2, "bf16_zero3", {"model__config": MODERNBERT}),
            (2, "bf16_zero3", {"optimizer__name": "stableadamw"}),
            (2, "bf16_zero1", {"optimizer__name": "muon"}),
            (2, "bf16_zero3", {"optimizer__name": "muon"}),
        ),
    ],
)
def test_other_models_and_optimizers(
    ranks: dict[int, RankPool],
    reference: Reference,
    wordpiece_corpus: Path,
    tmp_path: Path,
    size: int,
    ds_config: str,
    changes: dict[str, Any],
) -> None:
    """Catches a wrong local window, and norms of parameters that are summed on the wrong device or read by the host."""
    tree = tiny_run(tmp_path, wordpiece_corpus, ds_config, **changes)
    findings = check_run(ranks[size], tree, ds_config, reference(**changes))
    has_kernel = changes.get("model__config") == MODERNBERT
    assert all((found.calls["varlen_attention"] > 3) == has_kernel for found in findings)  # 3: when it is tried


@pytest.mark.parametrize(("size", "ds_config"), [(1, "bf16_zero1"), *soak((2, "fp16_zero3"))])
def test_activation_checkpointing_draws_the_same_dropout(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, tmp_path: Path, size: int, ds_config: str
) -> None:
    """Catches recomputation with other masks, in dropout layers or in flash attention."""
    precision = ds_config.partition("_")[0]
    calls = []
    for recompute in (False, True):
        tree = tiny_run(tmp_path / str(recompute), wordpiece_corpus, ds_config, model__config=BERT)
        tree["model"]["activation_checkpointing"] = recompute
        findings = ranks[size].run(gpu_case, tree)
        assert_sound(findings, precision)
        calls.append(findings[0].calls)
    assert_same_losses(tmp_path / "True", tmp_path / "False", "fp32")
    assert calls[1]["_flash_attention_forward"] > 1.5 * calls[0]["_flash_attention_forward"]
    assert calls[1]["_flash_attention_backward"] == calls[0]["_flash_attention_backward"]


@pytest.mark.parametrize("ds_config", ["bf16_zero3", *soak("bf16_zero1")])
def test_a_whole_run(
    ranks: dict[int, RankPool],
    reference: Reference,
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    ds_config: str,
) -> None:
    """Catches checkpoints that are read before they are copied, weights that are used before they are loaded,
    evaluation and comparison of ranks that fail on a GPU, and a rank that waits for another one there without showing
    it."""
    evaluation = {
        "corpus__eval": {"held": str(heldout_corpus)},
        "evaluation__every_steps": 1,
        "schedule__steps": 2,
        "run__log_every": 1,
    }
    expected = reference(**evaluation)
    tree = tiny_run(tmp_path, wordpiece_corpus, ds_config, health__compare_every=1, model__ema_decay=0.9, **evaluation)
    for stop_after in (1, None):
        findings = ranks[2].run(gpu_case, tree, stop_after)
        assert [found.outcome for found in findings] == ["stopped" if stop_after else "done"] * 2
        assert [(found.mixed, found.races) for found in findings] == [([], [])] * 2
        waits = " ".join(wait for found in findings for wait in found.waits_elsewhere)
        assert "host_copy.py" in waits
        assert not re.search(r"\((log_interval|reporter|evaluate|replicas|trainer)\.py", waits), "it seems to work"
    assert_same_losses(tmp_path, expected, "bf16")
    scores = [[event["eval/held/loss"] for event in evaluation_events(folder)] for folder in (expected, tmp_path)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)


def test_attention_looks_no_further_than_the_sequences_of_a_stage(
    ranks: dict[int, RankPool], wordpiece_corpus: Path, heldout_corpus: Path, tmp_path: Path
) -> None:
    """Catches short sequences that are computed as the longest of the run, and another length after an evaluation or in
    the microbatch that is queued before the stage ends."""
    evaluation = {"corpus__eval": {"held": str(heldout_corpus)}, "evaluation__every_steps": 1}
    tree = tiny_run(tmp_path, wordpiece_corpus, "bf16_zero1", **evaluation)
    tree["schedule"]["stages"] = [{"steps": 2, "max_seq_length": 20}, {}]
    (found,) = ranks[1].run(lengths_case, tree)
    longest = tree["batch"]["max_seq_length"]
    assert set(found) == {(0, 20), (1, 20), (2, longest), (None, longest)}
    queued = found.index((2, longest))
    assert (None, longest) in found[queued:-1], "evaluated between two microbatches of a step"
    assert found.count((2, longest)) > 1


def test_evaluation_is_that_of_a_cpu(ranks: dict[int, RankPool], reference: Reference, heldout_corpus: Path) -> None:
    """Catches `deepcloze evaluate` with tensors on the wrong device."""
    case = (evaluation_case, reference(), heldout_corpus)
    ((expected, _),), ((scores, problems),) = (ranks[1].run(*case, on_gpu) for on_gpu in (False, True))
    assert problems == []
    (expected,), (scores,) = expected.values(), scores.values()
    assert scores.pop("masks") == expected.pop("masks")
    assert scores == pytest.approx(expected, rel=1e-5)


def test_a_kernel_with_two_masks_of_dropout_is_not_used(ranks: dict[int, RankPool]) -> None:
    """Catches a trial without dropout, which most models have."""
    assert ranks[1].run(other_dropout_case) == [False]


def test_an_evaluation_may_be_the_first_to_use_our_own_attention(ranks: dict[int, RankPool]) -> None:
    """Catches a comparison of gradients where there are none, after which the kernel would not be used at all."""
    assert ranks[1].run(varlen_kernel_case) == [[True, True]]


@pytest.mark.parametrize(
    ("fault", "size", "ds_config", "found_in", "what"),
    [
        (faults.labels_on_the_cpu, 1, "bf16_zero1", "mixed", "gather of tensors on the GPU and on the CPU"),
        (faults.loss_read_in_a_microbatch, 1, "bf16_zero1", "waits_in_microbatches", "_local_scalar_dense"),
        (faults.copies_that_are_not_awaited, 1, "bf16_zero1", "races", r"stream \d+ reads in .* writes in _to_copy"),
        (faults.pinned_memory_used_again, 1, "bf16_zero1", "races", "the host writes in copy_ .* reads in _to_copy"),
        (faults.gathers_that_do_not_wait, 2, "bf16_zero3", "races", EARLY_READ),
        (faults.checkpoint_that_is_not_awaited, 1, "bf16_zero1", "races", "the host reads in .* writes in copy_"),
        *soak(
            (faults.gathered_on_another_stream, 2, "bf16_zero3", "races", EARLY_READ),
            (faults.reduced_gradients_not_awaited, 2, "bf16_zero3", "races", r"stream \d+ (reads|writes)"),
        ),
    ],
)
def test_faults_are_found(
    ranks: dict[int, RankPool],
    wordpiece_corpus: Path,
    tmp_path: Path,
    fault: Fault,
    size: int,
    ds_config: str,
    found_in: str,
    what: str,
) -> None:
    """Catches tests that would pass in spite of such a mistake."""
    steps = STEPS if "waits" in found_in else 2
    tree = tiny_run(tmp_path, wordpiece_corpus, ds_config, schedule__steps=steps)
    for found in ranks[size].run(gpu_case, tree, None, fault):
        assert re.search(what, "\n".join(getattr(found, found_in)))


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (faults.swapped_query_and_key, "comparison failed"),
        (faults.activations_in_fp32, r"\(0 > 0\)"),
        *soak(
            (faults.swapped_key_and_value, "comparison failed"),
            (faults.short_maximum_length, "requires no sequence that is longer"),
            (faults.query_in_fp32, "requires inputs in 16 bit"),
        ),
    ],
)
def test_wrong_arguments_of_flash_attention_are_found(
    ranks: dict[int, RankPool],
    reference: Reference,
    wordpiece_corpus: Path,
    tmp_path: Path,
    fault: Fault,
    what: str,
) -> None:
    """Catches tests that would pass in spite of such a mistake."""
    tree = tiny_run(tmp_path, wordpiece_corpus, "bf16_zero1")
    with pytest.raises((AssertionError, RankError), match=what):
        check_run(ranks[1], tree, "bf16_zero1", reference(), fault)
