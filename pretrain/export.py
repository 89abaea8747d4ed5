"""Write a Hugging Face folder that transformers opens without deepcloze."""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiment.tensor_files import save_tensors
from experiment.tokenizer import save_tokenizer
from experiment.transformers_models import limit_tokenizer


def write_hugging_face_folder(
    weights: dict[str, Tensor], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write safetensors, config and tokenizer.

    `weights`: fp32, by the model's own parameter names, tied ones once. Buffers that it lacks are those of `model`.
    """
    folder.mkdir(parents=True)
    save_tensors(persistent_buffers(model) | weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    limit_tokenizer(tokenizer, model)
    save_tokenizer(tokenizer, folder)


def persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the buffers that belong to the weights of a model, on the host."""
    persistent = model.state_dict().keys()
    return {
        name: buffer.detach().to("cpu", copy=True).contiguous()
        for name, buffer in model.named_buffers()
        if name in persistent
    }
