"""Try a model on a few examples: which precision it can compute in, and whether padding changes its outputs."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiment.errors import is_out_of_memory
from experiment.models.model_folder import first_use
from finetune.device import CPU, Device
from finetune.encoding.examples import Batch, Example, Padding
from finetune.inference import collate
from finetune.prepared_task import PreparedTask
from finetune.task_kind import LossOptions, TaskKind

_PADDING = 8  # tokens
_TOLERANCE = 2e-5  # of outputs in fp32: more than rounding, far less than padding changes if it counts


def adapt_to_model(
    model: PreTrainedModel, task: PreparedTask, probe: Example, max_length: int
) -> tuple[PreparedTask, list[str]]:
    """Return the task as the model needs it on its device, and a line for each change.

    Some models cannot compute in autocast, such as DeBERTa (v1) on a CPU: they compute in fp32. The outputs of some
    depend on padding, such as FNet's, which has no attention mask: their batches are all padded to `max_length`. Raises
    UserError for a model that cannot compute at all.

    probe: as from `TaskKind.probe`.
    """
    lines, name, device = [], model.config.model_type, task.device
    if not ignores_padding(model, task.kind, task.padding, probe, max_length):
        lines.append(f"{name}: its outputs depend on padding, so all sequences are padded to {max_length} tokens")
        task = replace(task, padding=replace(task.padding, length=max_length))
    if device.dtype is not None:
        trained = task.kind.config.is_trained
        examples = sorted(next(iter(task.splits.values())).examples, key=lambda example: example.longest)[:2]
        batch = collate(task.kind, examples, task.padding, device.torch_device)
        options = task.loss_options if trained else None
        if not computes(model.to(device.torch_device).train(trained), task.kind, batch, device, options):
            lines.append(f"{name} cannot compute in {device.precision} on {device.torch_device.type}; fp32 is used")
            task = replace(task, device=replace(device, dtype=None))
    return task, lines


def ignores_padding(model: nn.Module, kind: TaskKind[Any], padding: Padding, probe: Example, max_length: int) -> bool:
    """Return whether padding leaves the outputs of a short example the same, but for rounding. The model is on the CPU.

    Examples of a task would not do: they may all have `max_length` tokens.
    """
    length = min(probe.longest + _PADDING, max_length)
    model.eval()
    with first_use(model), torch.inference_mode():
        paddings = padding, replace(padding, length=length)
        batches = (collate(kind, [probe], each, CPU.torch_device) for each in paddings)
        alone, padded = (kind.forward(model, batch).float() for batch in batches)
    shown = padded[tuple(map(slice, alone.shape))]  # without outputs of padding
    return bool((alone - shown).abs().max() <= _TOLERANCE * (1 + alone.abs().max()))


def computes(
    model: nn.Module, kind: TaskKind[Any], batch: Batch, device: Device, options: LossOptions | None = None
) -> bool:
    """Return whether a model can compute a batch in the device's precision; with loss options, gradients too."""
    try:
        with torch.set_grad_enabled(options is not None):
            with device.autocast():
                outputs = kind.forward(model, batch)
            if options is not None:
                kind.loss(outputs, batch, options).sum.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):  # the device has failed, not the model
            raise
        return False
    return True
