"""`deepcloze plan`: the needs of a run, without starting it."""

import json
from dataclasses import replace

from experiment.config import load_config
from experiment.errors import notify
from experiment.process.fast_imports import command_imports
from launcher.hosts.hostfile import Slots, allocated_hosts, read_hostfile
from launcher.hosts.machine import Machine, launch_machine
from launcher.launch_plan import resolve_run
from launcher.options import PlanOptions
from launcher.ranks.placement import is_local, place_ranks
from pretrain.config import PretrainConfig


def print_run_plan(options: PlanOptions) -> None:
    """Print the plan of a run, or one JSON object. Raises UserError for a config that `deepcloze pretrain` rejects."""
    config = load_config(PretrainConfig, options.config, options.overrides)
    machine = launch_machine()
    slots = _planned_slots(options, machine)

    with command_imports():
        from pretrain.corpus.cache import copy_urls
        from pretrain.plan.cost import UNKNOWN_GPU, Device, Rates, local_cpu, local_gpu
        from pretrain.plan.plan import plan_run
        from pretrain.plan.text import as_json, print_plan

    ranks_by_host = list(map(len, slots.values()))
    if options.device is not None:
        device = Device(options.device, None, None)
    else:
        device = local_gpu() if machine.devices.kind == "cuda" else local_cpu(max(ranks_by_host))
    is_here = is_local(slots) and sum(ranks_by_host) <= len(machine.devices.indices)
    if options.device is None and is_local(slots) and machine.devices.problem is not None:
        notify(f"warning: {machine.devices.problem}")
    if options.device is None and (not is_here or device == UNKNOWN_GPU):
        notify(f"warning: planned for this machine's device, {device.name}; name the one to plan for as --device")
    plan = plan_run(
        resolve_run(config, sum(ranks_by_host), copy_corpora=copy_urls),
        ranks_by_host=ranks_by_host,
        device=device if options.memory_gib is None else replace(device, memory=int(options.memory_gib * 2**30)),
        rates=Rates(
            peak_flops=None if options.peak_tflops is None else options.peak_tflops * 1e12,
            mfu=options.mfu,
            bandwidth=options.bandwidth * 1e9,
            watts=options.watts or device.watts,
            price=options.price,
        ),
    )
    if options.json_output:
        print(json.dumps(as_json(plan)))
    else:
        print_plan(plan)


def _planned_slots(options: PlanOptions, machine: Machine) -> Slots:
    """Return the slots as for a launch, but `--num_gpus` without a hostfile may exceed this machine's devices, which
    need not be usable."""
    hosts = read_hostfile(options.hostfile) if options.hostfile else allocated_hosts(machine.environ)
    is_filtered = options.include is not None or options.exclude is not None  # which `place_ranks` rejects
    if hosts is None and options.num_gpus is not None and not is_filtered:
        return {"localhost": tuple(range(options.num_gpus))}
    devices = replace(machine.devices, problem=None)
    return place_ranks(devices, options.model_copy(update={"oversubscribe": True}), hosts)
