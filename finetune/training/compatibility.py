"""What a model can do, found out on a few examples before training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.device import Device
from finetune.encoding.encoded_split import collate
from finetune.encoding.examples import Batch, Example
from finetune.splits import Task
from finetune.task_kind import LossOptions, TaskKind
from finetune.training.microbatch import is_out_of_memory

_EXAMPLES = 4
_TOLERANCE = 2e-5  # of outputs in fp32: more than rounding, far less than what padding changes if it counts


def adapt_to_model(model: nn.Module, task: Task, device: Device, max_length: int) -> tuple[Task, Device, list[str]]:
    """The task and the device as the model needs them, and a line for each change.

    Some models cannot compute in autocast, such as DeBERTa (v1) on a CPU: they compute in fp32. The outputs of some
    depend on padding, such as FNet's, which has no attention mask: their batches are all padded to `max_length`.
    """
    examples = sorted(next(iter(task.splits.values())).examples, key=lambda example: example.longest)
    lines, name = [], getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not _ignores_padding(model, task, examples):
        lines.append(f"{name}: its outputs depend on padding, so all sequences are padded to {max_length} tokens")
        task = replace(task, padding=replace(task.padding, length=max_length))
    if device.dtype is not None:
        batch = collate(task.kind, examples[:2], task.padding, device.device)
        options = task.loss_options(device.device) if task.is_trained else None
        if not computes(model.to(device.device).train(task.is_trained), task.kind, batch, device, options):
            lines.append(f"{name} cannot compute in {device.precision} on {device.device.type}; fp32 is used")
            device = replace(device, dtype=None)
    return task, device, lines


def _ignores_padding(model: nn.Module, task: Task, examples: Sequence[Example]) -> bool:
    """Whether the outputs of short examples stay the same next to a long one. examples: the shortest first."""
    compared = [*examples[:_EXAMPLES], examples[-1]]
    model.eval()
    with torch.inference_mode():
        together = torch.split(_outputs(model, task, compared), [len(example.sequences) for example in compared])
        return all(map(_same, [_outputs(model, task, [example]) for example in compared], together))


def _outputs(model: nn.Module, task: Task, examples: Sequence[Example]) -> Tensor:
    """In fp32 on the CPU. The first dimension is that of the sequences."""
    return task.kind.forward(model, collate(task.kind, examples, task.padding, torch.device("cpu"))).float()


def _same(alone: Tensor, together: Tensor) -> bool:
    """Whether outputs are the same but for rounding. together: perhaps for more tokens, which are padding."""
    shown = together[tuple(map(slice, alone.shape))]
    return bool((alone - shown).abs().max() <= _TOLERANCE * (1 + alone.abs().max()))


def computes(
    model: nn.Module, kind: TaskKind[Any], batch: Batch, device: Device, options: LossOptions | None = None
) -> bool:
    """Whether a model can compute a batch in the precision of the device; with loss options, the gradients too."""
    try:
        with torch.set_grad_enabled(options is not None):
            with device.autocast():
                outputs = kind.forward(model, batch)
            if options is not None:
                kind.loss(outputs, batch, options).sum.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True
