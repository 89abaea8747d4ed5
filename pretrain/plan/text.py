"""A plan as text, and as one JSON object, with warnings of settings that work poorly."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from experiment.formatting import counted, describe_duration, format_epochs, table_console
from experiment.process.hardware import known_devices, lacks_avx512
from pretrain.engine.deepspeed_settings import emulation_warnings
from pretrain.plan.plan import RunPlan

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total")

_UNKNOWN_FLOPS = "unknown for this model type"
_SMALL_MICROBATCH = 4096  # slots; a GPU's matrix units idle below, whatever the model
_SMALL_FOR_ZERO3 = 1_000_000_000  # parameters
_WELL_FILLED = 0.7
_LARGE_BUFFERS = 1 << 30  # bytes


def print_plan(plan: RunPlan) -> None:
    console = table_console()
    for heading, lines in _sections(plan):
        console.print(heading, style="bold")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)
        if heading.startswith("memory"):
            console.print(_memory_table(plan))
    for warning in warnings(plan):
        console.print(f"warning: {warning}", soft_wrap=True)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return bytes, seconds, FLOP/s and counts, without units in the names; null where unknown."""
    return {
        "hosts": plan.hosts,
        "ranks": plan.ranks,
        "device": asdict(plan.device),
        "assumed": asdict(plan.rates),
        "packed": plan.stream.layout.kind != "padded",
        "parameters": {k: v for k, v in asdict(plan.parameters).items() if k != "sizes"},
        "flops_per_token": plan.flops_per_token,
        "steps_done": plan.run.resume_plan.step,
        "steps": plan.stream.steps,
        "budget_steps": plan.budget_steps,
        "tokens": plan.tokens,
        "budget_tokens": plan.budget_tokens,
        "epochs": plan.stream.epochs,
        "stages": [asdict(stage) for stage in plan.stages],
        "zero_stage": plan.zero_stage,
        "zero": {
            str(stage): {
                "memory": asdict(zero.memory.parts) | {"total": zero.memory.parts.total},
                "moment": zero.memory.peak,
                "host_memory": zero.memory.host,
                "checkpoint_memory": zero.memory.checkpoint,
                "disk": zero.memory.disk,
                "sent_per_step": zero.sent_per_step,
                "with_reserve": plan.needed_at(stage),
                "fits": plan.fits_at(stage),
            }
            for stage, zero in plan.zero.items()
        },
        "fits": plan.fits,
        "cost": None if plan.cost is None else asdict(plan.cost) | {"seconds": plan.cost.seconds},
        "warnings": warnings(plan),
    }


def _sections(plan: RunPlan) -> list[tuple[str, list[str]]]:
    memory = plan.device.memory
    size = "memory unknown (--memory_gib)" if memory is None else f"{_gib(memory)} GiB"
    return [
        ("devices", [f"{plan.ranks:,} × {plan.device.name} on {counted(plan.hosts, 'machine')}, {size} each"]),
        ("model", _model(plan)),
        ("work", _work(plan)),
        (f"memory per {'GPU' if plan.device.is_gpu else 'rank'} in GiB, at the highest use", _memory(plan)),
        ("communication", [_communication(plan)]),
        ("time and cost", _cost(plan)),
    ]


def _model(plan: RunPlan) -> list[str]:
    counts = plan.parameters
    flops = _UNKNOWN_FLOPS if plan.flops_per_token is None else f"{plan.flops_per_token:.4g}"
    rows = "padded, one sequence a row" if plan.stream.layout.kind == "padded" else "packed"
    lines = [
        f"{counts.total:,} parameters: {counts.embeddings:,} in the embeddings, {counts.encoder:,} in the encoder, "
        f"{counts.head:,} in the head"
    ]
    if plan.run.config.optimizer.name == "muon":
        kinds = ", ".join(plan.hidden_matrix_names)
        lines.append(f"Muon updates {counts.hidden_matrices:,} of them ({kinds}), AdamW the others")
    return [*lines, f"FLOPs per token, forward and backward: {flops}; {rows}"]


def _work(plan: RunPlan) -> list[str]:
    lines = []
    for stage in plan.stages:
        batch, shape = stage.batch, stage.batch.largest
        steps = "until the budget is spent" if stage.steps is None else counted(stage.steps, "step")
        lines.append(
            f"{steps} of {counted(stage.sequences, 'sequence')} of at most {stage.max_seq_length} tokens: "
            f"{stage.tokens_per_step():,.0f} tokens per step in {counted(batch.microbatches, 'microbatch', 'es')} of "
            f"{shape.rows:,} × {shape.width:,} slots per rank, {stage.mean.filled:.0%} of them filled"
        )
    stream, begin = plan.stream, plan.stream.begin
    if stream.steps is not None:
        epochs = "" if stream.epochs is None else f", {format_epochs(stream.epochs)}"
        lines.append(f"in all {counted(stream.steps - begin, 'step')}, {plan.tokens:,} tokens{epochs}")
    elif plan.budget_steps is not None:
        steps, tokens = counted(plan.budget_steps - begin, "step"), float(f"{plan.budget_tokens:.3g}")
        lines.append(f"in all about {steps}, {tokens:,.0f} tokens, in {plan.run.config.schedule.budget}")
    done, total = plan.run.resume_plan.step, stream.steps or plan.budget_steps
    if begin:
        lines.append(f"these figures leave out {counted(begin, 'step')} of the run that it forks")
    if done > begin:
        included = "" if total is None or total < done else ", which these figures include"
        lines.append(f"done: {counted(done - begin, 'step')} of this run{included}")
    return lines


def _memory(plan: RunPlan) -> list[str]:
    chosen = plan.chosen.memory
    unsure = "whether it fits is unknown" if plan.device.memory is None else "it may NOT fit"
    fits = {True: "it fits", False: "it does NOT fit", None: unsure}[plan.fits]
    lines = [f"ZeRO {plan.zero_stage} in {plan.run.deepspeed.precision} ({plan.run.deepspeed.path.name}): {fits}"]
    per_host = plan.host_ranks
    if plan.device.is_gpu:
        low, high = plan.device.reserve
        lines.append(
            f"reserve: {_gib(low)} to {_gib(high)} GiB for the driver, CUDA, NCCL, workspaces and fragmentation"
        )
        whole = plan.parameters.total * (4 if plan.run.deepspeed.precision == "fp32" else 4 + 2)
        lines.append(
            f"host memory: {_gib(per_host * whole)} GiB per machine while its ranks build the model"
            + (f", {_gib(per_host * chosen.host)} GiB for what is offloaded" if chosen.host else "")
            + f", {_gib(chosen.checkpoint)} GiB on the first one for checkpoints"
        )
    else:
        lines.append(
            "on a CPU, the memory that malloc keeps comes on top: as much again in some runs (docs/planning.md)"
        )
    if chosen.disk:
        lines.append(f"disk: {_gib(per_host * chosen.disk)} GiB per machine for what is offloaded")
    return lines


def _memory_table(plan: RunPlan) -> Table:
    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in plan.zero:
        table.add_column(f"ZeRO {stage}{' *' if stage == plan.zero_stage else ''}", justify="right", no_wrap=True)
    for part in _PARTS:
        table.add_row(f"  {part}", *(_gib(getattr(zero.memory.parts, part)) for zero in plan.zero.values()))
    if plan.device.is_gpu:
        table.add_row("  with reserve", *("–".join(map(_gib, plan.needed_at(stage))) for stage in plan.zero))
    table.add_row("  peak at", *(zero.memory.peak for zero in plan.zero.values()))
    table.add_row("  fits", *({True: "yes", False: "no", None: "?"}[plan.fits_at(stage)] for stage in plan.zero))
    return table


def _communication(plan: RunPlan) -> str:
    others = ", ".join(f"ZeRO {stage} {_gb(z.sent_per_step)}" for stage, z in plan.zero.items())
    return f"each rank sends {_gb(plan.chosen.sent_per_step)} GB per step ({others})"


def _cost(plan: RunPlan) -> list[str]:
    rates, cost = plan.rates, plan.cost
    peak = "unknown" if rates.peak_flops is None else f"{rates.peak_flops / 1e12:g} TFLOP/s per device"
    lines = [
        f"assumed: peak {peak} (--peak_tflops), MFU {rates.mfu:.0%} (--mfu), {rates.bandwidth / 1e9:g} GB/s "
        f"{'between machines' if plan.hosts > 1 else 'between devices'} (--bandwidth)"
    ]
    if cost is None:
        needs_peak = f"unknown: state the device's peak as --peak_tflops; known for {known_devices()}"
        return [*lines, _UNKNOWN_FLOPS if plan.flops_per_token is None else needs_peak]
    steps = (plan.stream.steps or plan.budget_steps or 0) - plan.stream.begin
    per_step = f", {cost.seconds / steps:.3g} s per step" if steps else ""
    duration = describe_duration(cost.seconds) if cost.seconds >= 10 else f"{cost.seconds:.3g} s"
    lines.append(
        f"{duration}{per_step}; {cost.communicating / cost.seconds:.0%} of it communication, "
        "counted as if nothing overlapped"
    )
    kwh = "energy unknown (--watts)"
    if cost.kwh is not None:
        kwh = f"{_rounded(cost.kwh, 4)} kWh at {rates.watts:g} W per device"
    price = (
        "cost unknown (--price)" if cost.price is None else f"cost {cost.price:,.2f} at {rates.price:g} per device hour"
    )
    return [*lines, f"{_rounded(cost.device_hours, 4)} device hours; {kwh}; {price}"]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _gb(size: float) -> str:
    return _rounded(size / 1e9, 3)


def _rounded(number: float, digits: int) -> str:
    """Return a number with its first digits: 46,080, not 4.608e+04."""
    return f"{float(f'{number:.{digits}g}'):,.15g}"


def warnings(plan: RunPlan) -> list[str]:
    return [
        *_device_warnings(plan),
        *_memory_warnings(plan),
        *_batches_warnings(plan),
        *plan.run.config.warnings(plan.stream.steps if plan.stream.steps is not None else plan.budget_steps),
        *_communication_warnings(plan),
    ]


def _device_warnings(plan: RunPlan) -> Iterator[str]:
    """Yield warnings about this machine's CPU. Asking about a GPU would take it."""
    if not plan.device.is_gpu:
        yield from emulation_warnings(plan.run.deepspeed, "cpu")
        if lacks_avx512():
            yield "this CPU has no AVX-512: in fp32 those with it train 1.3 to 2.4 times as fast (docs/performance.md)"


def _memory_warnings(plan: RunPlan) -> Iterator[str]:
    parts, memory = plan.chosen.memory.parts, plan.device.memory
    if plan.fits is False:
        fitting = [str(stage) for stage in plan.zero if plan.fits_at(stage)]
        yield (
            "it does not fit: lower batch.microbatch_tokens"
            + ("" if plan.run.config.model.activation_checkpointing else ", set model.activation_checkpointing")
            + (f", or use ZeRO {' or '.join(fitting)} (engine.ds_config)" if fitting else ", or use more devices")
        )
    elif memory is not None and plan.fits is None:
        yield "it may not fit: that depends on the reserve (see docs/planning.md); lower batch.microbatch_tokens"
    elif memory is not None and not plan.device.is_gpu and parts.total > 0.9 * memory:
        yield "less than a tenth of the memory is left; fragmentation may take more (see docs/planning.md)"
    if plan.device.is_gpu and parts.buffers > max(_LARGE_BUFFERS, 8 * plan.parameters.total):
        yield (
            f"DeepSpeed's buffers take {parts.buffers / 2**30:.1f} GiB; set zero_optimization.reduce_bucket_size in "
            f"{plan.run.deepspeed.path.name} to about the number of parameters, {plan.parameters.total:.0e}"
        )
    zero_1 = plan.zero.get(1)
    less = zero_1 is not None and zero_1.sent_per_step < plan.chosen.sent_per_step
    if plan.zero_stage == 3 and plan.parameters.total < _SMALL_FOR_ZERO3 and less and plan.fits_at(1) is not False:
        yield (
            f"ZeRO 3 gathers the weights for every microbatch, but the model has only "
            f"{plan.parameters.total / 1e6:,.0f} M parameters: ZeRO 1 communicates less"
            + (" and fits too" if plan.fits_at(1) else "")
        )


def _batches_warnings(plan: RunPlan) -> Iterator[str]:
    planned = len(plan.run.config.stages)
    for number, stage in enumerate(plan.stages, 1 + planned - len(plan.stages)):  # a fork may begin after the first
        shape, where = stage.batch.largest, f" in stage {number}" if planned > 1 else ""
        slots, accumulates = shape.rows * shape.width, stage.batch.microbatches > 1
        if plan.device.is_gpu and slots < _SMALL_MICROBATCH:
            yield (
                f"microbatches of {slots:,} tokens{where} are too small for a GPU: "
                + ("raise batch.microbatch_tokens" if accumulates else "raise batch.sequences, or use fewer ranks")
            )
        if stage.sequences < plan.ranks:
            yield f"a batch{where} has {stage.sequences:,} sequences, fewer than the {plan.ranks:,} ranks"
        elif stage.mean.filled < _WELL_FILLED:
            advice = "" if accumulates else "; lower batch.microbatch_tokens, or raise batch.sequences"
            yield f"only {stage.mean.filled:.0%} of the computed slots{where} hold tokens; the rest is padding{advice}"


def _communication_warnings(plan: RunPlan) -> Iterator[str]:
    if plan.cost is not None and plan.cost.communicating > plan.cost.computing:
        # ZeRO 2 and 3 communicate in each microbatch.
        repeats = plan.zero_stage >= 2 and any(stage.batch.microbatches > 1 for stage in plan.stages)
        yield (
            "communication takes longer than computation: raise batch.sequences"
            + (" or batch.microbatch_tokens, or use a lower ZeRO stage" if repeats else "")
            + f", or use fewer {'machines' if plan.hosts > 1 else 'devices'} or a faster network"
        )
