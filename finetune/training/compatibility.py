"""What a model can do, found out on a few examples before training."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from finetune.device import Device
from finetune.encoding.examples import Example, collate
from finetune.splits import Task
from finetune.training.microbatch import is_out_of_memory
from finetune.training.updater import loss_options

_EXAMPLES = 4
_TOLERANCE = 2e-5  # of a loss in fp32: more than rounding, far less than what padding changes if it counts


def adapt_to_model(model: nn.Module, task: Task, device: Device, max_length: int) -> tuple[Task, Device, list[str]]:
    """The task and the device as the model needs them, and a line for each change.

    Some models cannot compute in autocast, such as DeBERTa (v1) on a CPU: they are trained in fp32. The outputs of some
    depend on padding, such as FNet's, which has no attention mask: their batches are all padded to `max_length`.
    """
    if not (examples := _labelled_examples(task)):
        return task, device, []  # a task that is not trained, on texts without targets
    lines, name = [], getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not _ignores_padding(model, task, examples):
        lines.append(f"{name}: its outputs depend on padding, so all sequences are padded to {max_length} tokens")
        task = replace(task, padding=replace(task.padding, length=max_length))
    if device.dtype is not None and not _computes(model, task, examples, device):
        lines.append(f"{name} cannot compute in {device.precision} on {device.device.type}; it is trained in fp32")
        device = replace(device, dtype=None)
    return task, device, lines


def _ignores_padding(model: nn.Module, task: Task, examples: Sequence[Example]) -> bool:
    """Whether the loss of short examples stays the same next to a long one."""
    short, long = examples[:_EXAMPLES], examples[-1:]
    cpu = Device(torch.device("cpu"), None)
    model.eval()
    with torch.inference_mode():
        apart = sum((_loss(model, task, [example], cpu) for example in [*short, *long]), torch.zeros(()))
        together = _loss(model, task, [*short, *long], cpu)
    return bool((apart - together).abs() <= _TOLERANCE * (1 + apart.abs()))


def _computes(model: nn.Module, task: Task, examples: Sequence[Example], device: Device) -> bool:
    """Whether forward and backward work in the precision of the device."""
    model.to(device.device).train()
    try:
        with torch.enable_grad():
            _loss(model, task, examples[:2], device).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _labelled_examples(task: Task) -> list[Example]:
    """Those of a split with targets, the shortest first: of train, if there is one."""
    labelled = [split.examples for split in task.splits.values() if split.table.labelled]
    return sorted(labelled[0], key=lambda example: example.longest) if labelled else []


def _loss(model: nn.Module, task: Task, examples: Sequence[Example], device: Device) -> Tensor:
    batch = collate(task.kind, examples, task.padding, device.device)
    with device.autocast():
        outputs = task.kind.forward(model, batch)
    return task.kind.loss(outputs, batch, loss_options(task, device)).sum
