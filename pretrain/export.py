"""Write a Hugging Face folder that transformers opens without deepcloze."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiment.positions import limit_tokenizer


def write_hugging_face_folder(
    weights: dict[str, Tensor], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write safetensors, config and tokenizer. `weights`: fp32, by the model's own parameter names, tied ones once."""
    folder.mkdir(parents=True)
    persistent = model.state_dict().keys()
    buffers = {name: buffer.detach().cpu().contiguous() for name, buffer in model.named_buffers() if name in persistent}
    save_file(weights | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    limit_tokenizer(tokenizer, model)
    tokenizer.save_pretrained(folder)
