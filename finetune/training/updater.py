"""Updates of a model: which examples, forward, backward, clipping, optimizer step, learning rate."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from experiment.models.dropout import use_fast_dropout
from experiment.models.fast_linear import use_fast_linear
from experiment.models.fp32_sums import use_fp32_sums
from finetune.config import TrainingConfig
from finetune.device import MicrobatchSize
from finetune.encoding.examples import Batch, Example
from finetune.inference import collate
from finetune.prepared_task import PreparedTask
from finetune.task_kind import Loss

# Examples of this many batches are sorted by length together: less padding, still random. They are at most a quarter of
# the split, as in transformers' group_by_length: otherwise a batch would have nearly the same examples in every epoch.
_SORTED_BATCHES = 50


class Updater:
    """AdamW with linear warmup and decay, as BERT (Devlin et al. 2019) is fine-tuned."""

    def __init__(self, model: nn.Module, task: PreparedTask, config: TrainingConfig) -> None:
        model.to(task.device.torch_device)
        use_fast_dropout(model)
        use_fast_linear(model)
        use_fp32_sums(model)
        self.steps = 0
        self.total_steps = total_steps(task, config)
        self._model, self._task, self._config, self._device = model, task, config, task.device
        self._warmup = config.warmup_ratio * self.total_steps if config.warmup_steps is None else config.warmup_steps
        self._microbatch = MicrobatchSize(config.microbatch_size or config.batch_size)
        groups = parameter_groups(model, config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, eps=config.adam_eps, fused=True)
        self._scaler = torch.amp.GradScaler(self._device.torch_device.type, enabled=self._device.dtype == torch.float16)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, examples: Sequence[Example]) -> Loss:
        """Update the model on these examples.

        It is the gradient of their mean loss. If they are fewer than a batch, as at the end of an epoch, it is scaled
        down by their number, so that every example of an epoch counts the same.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * lr_factor(self.steps, self.total_steps, self._warmup)
        loss = self._backward(examples)
        self._scaler.unscale_(self._optimizer)
        self._scale_and_clip_gradients(len(examples) / loss.weight)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.steps += 1
        return loss

    def state(self) -> dict[str, Any]:
        """State for `load_state` to continue exactly: the weights, and everything that the next updates depend on."""
        return {
            "steps": self.steps,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": self._random_state(),  # for dropout
            "microbatch_size": self._microbatch.reduced,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._set_random_state(state["random"])
        if (size := state.get("microbatch_size")) is not None:  # version 0.2.0 did not save it
            self._microbatch.reduce(size)

    def _random_state(self) -> list[torch.Tensor]:
        on_gpu = self._device.torch_device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device.torch_device)] if on_gpu else [])]

    def _set_random_state(self, state: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        for of_gpu in state[1:]:
            torch.cuda.set_rng_state(of_gpu, self._device.torch_device)

    def _backward(self, examples: Sequence[Example]) -> Loss:
        """Add up the gradients of the summed loss, divided by the batch size to keep them within the range of fp16."""
        losses: list[Loss] = []
        compares, random_state = self._task.kind.compares_examples, self._random_state()

        def compute(parts: Sequence[Sequence[Example]]) -> None:
            losses.clear()
            self._optimizer.zero_grad()  # of a computation that ran out of memory
            self._set_random_state(random_state)
            if compares and len(parts) > 1:
                losses.append(self._backward_cached(parts))
                return
            for part in parts:
                batch = self._collate(part)
                losses.append(self._backward_loss(self._forward(batch), batch))

        # The parts have sequences of similar length: less padding.
        self._microbatch.compute(sorted(examples, key=lambda each: each.longest) if compares else examples, compute)
        return Loss(*torch.stack([torch.stack([loss.sum, loss.weight]) for loss in losses]).sum(0))

    def _backward_cached(self, parts: Sequence[Sequence[Example]]) -> Loss:
        """Add up the gradients of a loss that compares the outputs of all parts, with the memory of one part.

        Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup": the outputs are
        computed without activations, then the gradients of the loss with respect to them, then each part again, with
        the same dropout.
        """
        batches = [self._collate(part) for part in parts]
        random_states, outputs = [], []
        with torch.no_grad():
            for batch in batches:
                random_states.append(self._random_state())
                outputs.append(self._forward(batch))
        whole = torch.cat(outputs).requires_grad_()
        loss = self._backward_loss(whole, self._collate([example for part in parts for example in part]))
        assert whole.grad is not None
        gradients = torch.split(whole.grad, [len(output) for output in outputs])
        for batch, random_state, gradient in zip(batches, random_states, gradients, strict=True):
            self._set_random_state(random_state)
            torch.autograd.backward(self._forward(batch), gradient)
        return loss

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return collate(self._task.kind, examples, self._task.padding, self._device.torch_device)

    def _forward(self, batch: Batch) -> torch.Tensor:
        with self._device.autocast():
            return self._task.kind.forward(self._model, batch)

    def _backward_loss(self, outputs: torch.Tensor, batch: Batch) -> Loss:
        loss = self._task.kind.loss(outputs, batch, self._task.loss_options)
        self._scaler.scale(loss.sum / self._config.batch_size).backward()  # type: ignore[no-untyped-call]
        return Loss(loss.sum.detach(), loss.weight)

    def _scale_and_clip_gradients(self, factor: torch.Tensor) -> None:
        """Scale and clip in one pass over the gradients, because a second one would take long in small batches."""
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        if self._config.grad_clip:
            norm = get_total_norm(gradients) * factor
            factor = factor * (self._config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at a step (from 0): linear warmup, then linear to 0 after the last step."""
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(steps - warmup, 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay for matrices, none for vectors, which are biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def total_steps(task: PreparedTask, config: TrainingConfig) -> int:
    return (config.steps or steps_per_epoch(task, config) * config.epochs) if task.kind.config.is_trained else 0


def steps_per_epoch(task: PreparedTask, config: TrainingConfig) -> int:
    return -(-len(task.splits["train"].examples) // config.batch_size)


def training_order(lengths: Sequence[int], batch_size: int, seed: int, first: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the epoch (from 1) and the examples of each update from number `first` on, without end.

    A pure function of the seed and the number of the update.
    """
    epoch, position = divmod(first, -(-len(lengths) // batch_size))
    for number in itertools.count(epoch + 1):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        for indices in training_batches(lengths, batch_size, generator)[position:]:
            yield number, indices
        position = 0


def training_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Return the examples of one epoch by index: each once, in shuffled batches of similar length.

    If the last batch is smaller than the others, its examples are drawn at random like theirs.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(shuffled) - len(shuffled) % batch_size
    group = batch_size * max(1, min(_SORTED_BATCHES, whole // batch_size // 4))
    batches = [shuffled[whole:]] if shuffled[whole:] else []
    for start in range(0, whole, group):
        by_length = sorted(shuffled[start : min(start + group, whole)], key=lambda index: lengths[index])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
