"""Plan one run: its computation, and the memory, communication and time that it takes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

from experiment.errors import UserError, first_line
from experiment.process.hardware import peak_flops
from pretrain.batching.packing import RowKind
from pretrain.engine.deepspeed_settings import unsupported_precision, uses_zero1_optimizer
from pretrain.modeling.build import row_kind_on
from pretrain.modeling.packability import is_packed
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.structure import FlopsModel, ParameterCounts, count_parameters, flops_model, hidden_matrices
from pretrain.plan.activations import Computation, MicrobatchMemory, microbatch_memory
from pretrain.plan.cost import Cost, Device, Rates, run_cost
from pretrain.plan.memory import MemorySettings, RankMemory, memory_settings, rank_memory
from pretrain.plan.workload import StageWork, stage_work
from pretrain.resolve import ResolvedRun
from pretrain.training_stream import open_stream, run_layout
from pretrain.world import World

_LAYER = re.compile(r"\.\d+\.")
_FP32 = 4  # bytes; gradients are reduced in fp32 at every precision


class ZeroPlan(NamedTuple):
    """One ZeRO stage."""

    memory: RankMemory
    sent_per_step: float  # bytes per rank, in the longest stage of the schedule


@dataclass(frozen=True)
class RunPlan:
    """Everything that a plan says. None: unknown. Figures of a fork are its own, without the steps of its parent."""

    run: ResolvedRun
    hosts: int
    ranks: int
    host_ranks: int  # the most on a machine
    device: Device
    rates: Rates
    packed: bool
    parameters: ParameterCounts
    hidden_matrix_names: tuple[str, ...]  # names, once for all layers: layers.*.attn.Wqkv.weight
    stages: tuple[StageWork, ...]
    flops_per_token: float | None  # of the whole run
    zero: dict[int, ZeroPlan]  # by ZeRO stage: the run's own and the others
    steps: int | None  # at which it ends, exact; None: a time budget
    budget_steps: int | None  # at which a time budget ends it, about
    tokens: int | None  # exact; None: a time budget
    epochs: float | None  # None: a time budget or a mixture
    begin: int  # the step that it begins with: of its parent if it is a fork, else 0
    cost: Cost | None

    @property
    def budget_tokens(self) -> int | None:
        """About how many tokens a time budget lasts for."""
        return None if self.budget_steps is None else sum(_tokens_by_stage(self.stages, self.budget_steps))

    @property
    def zero_stage(self) -> int:
        return self.run.deepspeed.zero_stage

    @property
    def chosen(self) -> ZeroPlan:
        return self.zero[self.zero_stage]

    @property
    def fits(self) -> bool | None:
        return self.fits_at(self.zero_stage)

    def fits_at(self, zero_stage: int) -> bool | None:
        """Return whether the run fits. None: unknown, or it depends on the reserve."""
        low, high = self.needed_at(zero_stage)
        if self.device.memory is None or low <= self.device.memory < high:
            return None
        return high <= self.device.memory

    def needed_at(self, zero_stage: int) -> tuple[int, int]:
        """Return the bytes of the device with the reserve, at least and at most."""
        total = self.zero[zero_stage].memory.parts.total
        low, high = self.device.reserve
        return total + low, total + high


def plan_run(run: ResolvedRun, ranks_by_host: Sequence[int], device: Device, rates: Rates) -> RunPlan:
    """Plan a run. `rates.peak_flops` None: look it up by the device's name. Raises UserError as `open_stream`, and for
    a GPU without bf16."""
    if run.deepspeed.precision == "bf16" and device.capability is not None and device.capability < (8, 0):
        raise unsupported_precision(run.deepspeed, device.name, instead="fp16")
    ranks, host_ranks = sum(ranks_by_host), max(ranks_by_host)
    skeleton = meta_model(run.model_config)
    packed = is_packed(run.model_config)
    counts, flops = count_parameters(skeleton), flops_model(skeleton)
    kind = row_kind_on(device.capability, packed, run.model_config, run.deepspeed.dtype)
    ratio = None if device.is_gpu or flops is None else flops.attention_ratio
    # The first position does not matter: batches get no tensors.
    stream = open_stream(run, World(0, ranks), run_layout(run, kind), ratio)
    stages = stage_work(stream, run.config.masking)
    settings = memory_settings(run.config, run.deepspeed, ranks, host_ranks, device.is_gpu)
    if rates.peak_flops is None:
        rates = replace(rates, peak_flops=peak_flops(device.name, run.deepspeed.precision))
    alternatives = _alternatives(settings)
    largest = {
        stay: _largest_microbatch(run, stages, kind, device.is_gpu, stay)
        for stay in {each.gradients_stay for each in alternatives}
    }
    longest = max(stages, key=lambda stage: stage.steps or math.inf)
    zero = {
        each.zero_stage: ZeroPlan(
            rank_memory(counts, largest[each.gradients_stay], each),
            sent_per_step(counts, each, longest.batch.microbatches),
        )
        for each in alternatives
    }
    by_stage = _flops_per_token(flops, stages, mean(run.config.masking.rates))
    cost, budget_steps = None, None
    if by_stage is not None and rates.peak_flops is not None:
        # Recomputing activations is a third more computation, which does not count in the FLOPs.
        work = 4 / 3 if run.config.model.activation_checkpointing else 1
        by_step = [
            (
                flops_per_token * stage.tokens_per_step() * work / (ranks * rates.peak_flops * rates.mfu),
                sent_per_step(counts, settings, stage.batch.microbatches) / rates.bandwidth,
            )
            for flops_per_token, stage in zip(by_stage, stages, strict=True)
        ]
        budget = run.config.schedule.budget_seconds
        computing, communicating, budget_steps = _seconds_of_run(stages, by_step, budget, stream.begin)
        cost = run_cost(computing, communicating, ranks, rates)
    return RunPlan(
        run=run,
        hosts=len(ranks_by_host),
        ranks=ranks,
        host_ranks=host_ranks,
        device=device,
        rates=rates,
        packed=packed,
        parameters=counts,
        hidden_matrix_names=tuple(dict.fromkeys(_LAYER.sub(".*.", name) for name in hidden_matrices(skeleton))),
        stages=stages,
        flops_per_token=None if by_stage is None else _mean_over_tokens(by_stage, stages, budget_steps),
        zero=zero,
        steps=stream.steps,
        budget_steps=budget_steps,
        tokens=None if stream.steps is None else sum(stage.tokens or 0 for stage in stages),
        epochs=stream.epochs,
        begin=stream.begin,
        cost=cost,
    )


def _seconds_of_run(
    stages: tuple[StageWork, ...], by_step: list[tuple[float, float]], budget: float | None, begin: int
) -> tuple[float, float, int | None]:
    """Return the seconds of computation and communication, given the seconds of a step of each stage and the step that
    the run begins with, and the step at which a time budget ends it, about."""
    computing = communicating = 0.0
    done: float = begin
    for stage, (compute, communicate) in zip(stages, by_step, strict=True):
        steps = math.inf if stage.steps is None else max(0, stage.first_step + stage.steps - done)
        if budget is not None:
            steps = min(steps, (budget - computing - communicating) / (compute + communicate))
        done += steps
        computing += steps * compute
        communicating += steps * communicate
    return computing, communicating, None if budget is None else max(begin + 1, round(done))


def _alternatives(settings: MemorySettings) -> list[MemorySettings]:
    """Return the settings at each ZeRO stage that the precision and the offload device allow."""
    lowest = {"nvme": 3, "cpu": 1}.get(settings.offload, 0 if settings.precision == "fp32" else 1)
    stages = sorted({*range(lowest, 4), settings.zero_stage})
    return [
        replace(settings, zero_stage=stage, offloads_weights=settings.offloads_weights and stage == 3)
        for stage in stages
    ]


def _largest_microbatch(
    run: ResolvedRun, stages: tuple[StageWork, ...], kind: RowKind, on_gpu: bool, gradients_stay: bool
) -> MicrobatchMemory:
    """Return the memory of the microbatch that takes the most. Raises UserError for a model that cannot run without
    values."""
    shapes = {(stage.batch.largest, stage.batch.microbatches > 1) for stage in stages}
    computation = Computation(
        dtype=run.deepspeed.dtype,
        kind=kind,
        on_gpu=on_gpu,
        checkpointed=run.config.model.activation_checkpointing,
        gradients_stay=gradients_stay,
    )
    try:
        return max(
            (
                microbatch_memory(meta_model(run.model_config), shape, replace(computation, accumulates=accumulates))
                for shape, accumulates in shapes
            ),
            key=lambda memory: memory.total,
        )
    except (ArithmeticError, AssertionError, RuntimeError) as error:
        model = run.model_config.model_type
        raise UserError(f"cannot plan a '{model}' model: it does not run without values: {first_line(error)}") from None


def _flops_per_token(flops: FlopsModel | None, stages: tuple[StageWork, ...], rate: float) -> list[float] | None:
    """Count FLOPs per token in each stage, counted as in `pretrain.modeling.structure`."""
    if flops is None:
        return None
    return [
        flops.per_step(batch.tokens, batch.squared_lengths, round(rate * batch.text_tokens)) / batch.tokens
        for batch in (stage.mean for stage in stages)
    ]


def _tokens_by_stage(stages: tuple[StageWork, ...], budget_steps: int | None) -> list[int]:
    """Count the tokens. `budget_steps`: the length of a run with a time budget; None if unknown."""
    return [
        stage.tokens
        if stage.tokens is not None and (budget_steps is None or stage.first_step + (stage.steps or 0) <= budget_steps)
        else round(max(0, (budget_steps or stage.first_step + 1) - stage.first_step) * stage.tokens_per_step())
        for stage in stages
    ]


def _mean_over_tokens(by_stage: list[float], stages: tuple[StageWork, ...], budget_steps: int | None) -> float:
    """Average over tokens. `budget_steps`: as for `_tokens_by_stage`."""
    tokens = _tokens_by_stage(stages, budget_steps)
    return sum(each * count for each, count in zip(by_stage, tokens, strict=True)) / max(1, sum(tokens))


def sent_per_step(counts: ParameterCounts, settings: MemorySettings, microbatches: int) -> float:
    """Return bytes that each rank sends per step.

    A ring moves (w - 1) / w of a tensor past each of w ranks to gather or to scatter it, and twice that to reduce it
    for all (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). A ring over several machines crosses the network of
    each machine once, so the same bytes pass between machines, whatever the number of ranks on each.
    """
    return (_ring_bytes(counts, settings, microbatches) + _muon_bytes(counts, settings)) * (1 - 1 / settings.ranks)


def _ring_bytes(counts: ParameterCounts, settings: MemorySettings, microbatches: int) -> float:
    """Count the bytes of gradients and weights that go around rings."""
    gradients, weights = _FP32 * counts.total, settings.weight_bytes * counts.total
    match settings.zero_stage:
        case 0:
            return 2 * gradients
        case 1 if uses_zero1_optimizer(settings.zero_stage, settings.offload):
            return gradients + weights
        case 1:
            return 2 * gradients + weights
        case 2:  # reduces after each microbatch
            return 2 * gradients * microbatches + weights
        case _:
            all_stay = 2 * counts.total <= settings.max_reuse_distance  # until the backward pass
            return (gradients + (1 if all_stay else 2) * weights) * microbatches


def _muon_bytes(counts: ParameterCounts, settings: MemorySettings) -> float:
    """Count the bytes of a rank's part of Muon's exchanges, as if each matrix were spread over all ranks. The busiest
    rank of BERT-base and BERT-large on 2 to 64 ranks sends 0.94 to 1.08 times as many."""
    if settings.optimizer != "muon":
        return 0.0
    size = settings.orthogonalization_bytes * counts.hidden_matrices
    return size if settings.zero_stage == 0 else 2 * size / settings.ranks  # at stage 0 owners have the updates
