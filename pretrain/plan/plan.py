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
from pretrain.engine.deepspeed_settings import unsupported_precision
from pretrain.modeling.build import row_kind_on
from pretrain.modeling.packability import is_packed
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.structure import FlopsModel, flops_model, hidden_matrices
from pretrain.plan.activations import Computation, MicrobatchMemory, microbatch_memory
from pretrain.plan.communication import sent_per_step
from pretrain.plan.cost import Cost, Device, Rates, run_cost
from pretrain.plan.memory import ParameterCounts, RankMemory, ShardedModel, count_parameters, shard_model
from pretrain.plan.workload import StageWork, stage_work
from pretrain.resolve import ResolvedRun
from pretrain.training_stream import TrainingStream, open_stream, run_layout
from pretrain.world import World

_LAYER = re.compile(r"\.\d+\.")


class ZeroPlan(NamedTuple):
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
    stream: TrainingStream
    parameters: ParameterCounts
    hidden_matrix_names: tuple[str, ...]  # names, once for all layers: layers.*.attn.Wqkv.weight
    stages: tuple[StageWork, ...]
    flops_per_token: float | None  # of the whole run
    zero: dict[int, ZeroPlan]  # by ZeRO stage: the run's own and the others
    budget_steps: int | None  # at which a time budget ends it, about
    tokens: int | None  # exact; None: a time budget
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
    counts, flops = count_parameters(skeleton), flops_model(skeleton)
    kind = row_kind_on(device.capability, is_packed(run.model_config), run.model_config, run.deepspeed.dtype)
    ratio = None if device.is_gpu or flops is None else flops.attention_ratio
    # The first position does not matter: batches get no tensors.
    stream = open_stream(run, World(0, ranks), run_layout(run, kind), ratio)
    stages = stage_work(stream, run.config.masking)
    sharded = shard_model(counts, run, ranks_by_host, device.is_gpu)
    if rates.peak_flops is None:
        rates = replace(rates, peak_flops=peak_flops(device.name, run.deepspeed.precision))
    alternatives = _alternatives(sharded)
    largest = {
        stay: _largest_microbatch(run, stages, kind, device.is_gpu, stay)
        for stay in {model.gradients_stay for model in alternatives}
    }
    longest = max(stages, key=lambda stage: stage.steps or math.inf)
    zero = {
        model.zero_stage: ZeroPlan(
            model.memory(largest[model.gradients_stay]), sent_per_step(model, longest.batch.microbatches)
        )
        for model in alternatives
    }
    by_stage = _flops_per_token(flops, stages, mean(run.config.masking.rates))
    cost, budget_steps = None, None
    if by_stage is not None and rates.peak_flops is not None:
        # Recomputing activations is a third more computation, which does not count in the FLOPs.
        work = 4 / 3 if run.config.model.activation_checkpointing else 1
        by_step = [
            (
                flops_per_token * stage.tokens_per_step() * work / (ranks * rates.peak_flops * rates.mfu),
                sent_per_step(sharded, stage.batch.microbatches) / rates.bandwidth,
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
        stream=stream,
        parameters=counts,
        hidden_matrix_names=tuple(dict.fromkeys(_LAYER.sub(".*.", name) for name in hidden_matrices(skeleton))),
        stages=stages,
        flops_per_token=None if by_stage is None else _mean_over_tokens(by_stage, stages, budget_steps),
        zero=zero,
        budget_steps=budget_steps,
        tokens=None if stream.steps is None else sum(stage.tokens or 0 for stage in stages),
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


def _alternatives(model: ShardedModel) -> list[ShardedModel]:
    """Return the model at each ZeRO stage that the precision and the offload device allow."""
    lowest = {"nvme": 3, "cpu": 1}.get(model.offload, 0 if model.precision == "fp32" else 1)
    stages = sorted({*range(lowest, 4), model.zero_stage})
    return [
        replace(model, zero_stage=stage, offloads_weights=model.offloads_weights and stage == 3) for stage in stages
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
    return sum(flops * count for flops, count in zip(by_stage, tokens, strict=True)) / max(1, sum(tokens))
