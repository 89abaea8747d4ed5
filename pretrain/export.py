"""Write a Hugging Face folder that transformers opens without deepcloze."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from experiment.checkpoints import find_model_folder
from experiment.disk_errors import describe_disk_error
from experiment.errors import UserError
from experiment.files import removed_on_error
from experiment.positions import limit_tokenizer
from pretrain.model_card import write_card


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


def export(checkpoint: str, output: str) -> None:
    """Copy the Hugging Face folder of a checkpoint (or of a run's newest one) to `output`, which must not exist, and
    write its model card."""
    source, target = find_model_folder(Path(checkpoint)), Path(output).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists; choose another --output")
    aside = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        with removed_on_error(aside):
            shutil.copytree(source, aside)
            write_card(source, aside, title=target.name)
            if target.exists():
                target.rmdir()
            aside.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {describe_disk_error(error) or error}") from None
    print(f"{source} -> {target}")
