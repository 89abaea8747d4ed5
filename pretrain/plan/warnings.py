"""Settings with which a run works, but poorly."""

from collections.abc import Iterator

from pretrain.plan.plan import RunPlan

_SMALL_MICROBATCH = 4096  # slots; a GPU's matrix units idle below, whatever the model
_SMALL_FOR_ZERO3 = 1_000_000_000  # parameters
_WELL_FILLED = 0.7
_LARGE_BUFFERS = 1 << 30  # bytes


def warnings(plan: RunPlan) -> list[str]:
    return [*_memory(plan), *_batches(plan), *_schedule(plan), *_communication(plan)]


def _memory(plan: RunPlan) -> Iterator[str]:
    parts, memory = plan.chosen.memory.parts, plan.device.memory
    if plan.fits is False:
        fitting = [str(stage) for stage in plan.zero if plan.fits_at(stage)]
        yield (
            "it does not fit: lower batch.microbatch_tokens"
            + ("" if plan.run.config.model.activation_checkpointing else ", set model.activation_checkpointing")
            + (f", or use ZeRO {' or '.join(fitting)} (engine.ds_config)" if fitting else ", or use more devices")
        )
    elif memory is not None and parts.total > 0.9 * memory:
        yield "less than a tenth of the memory is left; fragmentation may take more (see docs/planning.md)"
    if plan.device.is_gpu and parts.buffers > max(_LARGE_BUFFERS, 8 * plan.parameters.total):
        yield (
            f"DeepSpeed's buffers take {parts.buffers / 2**30:.1f} GiB; set zero_optimization.reduce_bucket_size in "
            f"{plan.run.deepspeed.path.name} to about the number of parameters, {plan.parameters.total:.0e}"
        )
    if plan.zero_stage == 3 and plan.parameters.total < _SMALL_FOR_ZERO3 and plan.fits_at(min(plan.zero)) is not False:
        yield (
            f"ZeRO 3 gathers the weights for every microbatch, but the model has only "
            f"{plan.parameters.total / 1e6:,.0f} M parameters: ZeRO 1 communicates less"
            + (" and fits too" if plan.fits_at(min(plan.zero)) else "")
        )


def _batches(plan: RunPlan) -> Iterator[str]:
    for number, stage in enumerate(plan.stages):
        shape, where = stage.batch.largest, f" in stage {number + 1}" if len(plan.stages) > 1 else ""
        slots = shape.rows * shape.width
        if plan.device.is_gpu and slots < _SMALL_MICROBATCH:
            more = stage.batch.microbatches > 1
            yield (
                f"microbatches of {slots:,} tokens{where} are too small for a GPU: "
                + ("raise batch.microbatch_tokens" if more else "raise batch.sequences, or use fewer ranks")
            )
        if stage.sequences < plan.ranks:
            yield f"a batch{where} has {stage.sequences:,} sequences, fewer than the {plan.ranks:,} ranks"
        elif stage.batch.filled < _WELL_FILLED:
            advice = (
                "; lower batch.microbatch_tokens, or raise batch.sequences" if stage.batch.microbatches == 1 else ""
            )
            yield f"only {stage.batch.filled:.0%} of the computed slots{where} hold tokens; the rest is padding{advice}"


def _schedule(plan: RunPlan) -> Iterator[str]:
    steps = plan.steps if plan.steps is not None else plan.budget_steps
    if steps is not None:
        yield from plan.run.config.schedule.warnings(steps)


def _communication(plan: RunPlan) -> Iterator[str]:
    if plan.cost is not None and plan.cost.communicating > plan.cost.computing:
        # ZeRO 2 and 3 communicate in each microbatch.
        repeats = plan.zero_stage >= 2 and any(stage.batch.microbatches > 1 for stage in plan.stages)
        yield (
            "communication takes longer than computation: raise batch.sequences"
            + (" or batch.microbatch_tokens, or use a lower ZeRO stage" if repeats else "")
            + ", or use fewer machines or a faster network"
        )
