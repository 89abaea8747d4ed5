"""Write a model folder whose model is ONNX, compare it with the original, and say how to use it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

from experiment.errors import UserError
from experiment.models.fast_linear import use_fast_linear
from experiment.results.model_card import MODEL, snippet, usage_section
from experiment.run_files.checkpoints import unlisted_files
from finetune.export.exported_card import write_card
from finetune.export.graph import check_quantizable, quantize, takes_choices, write_graph
from finetune.export.parity import OutputDifference, compare, sample_batches
from finetune.model import model_files
from finetune.prediction.loaded_model import LoadedModel, load_on_cpu
from finetune.prediction.mask_filler import ranking_task
from finetune.prediction.onnx_model import ONNX_FILE
from finetune.prediction.saved_task import is_masked_lm, read_saved_task
from finetune.results.finetuned_card import COMMANDS

_TOLERANCE = 1e-4  # of outputs in fp32: in units of the largest, or of 1 if that is larger

_TEXTS = '["A text.", "Another text, which is longer."]'
_ONE_TEXT = '["A text."]  # compute texts of different lengths one by one: padding changes the outputs'

_CODE = """
import onnxruntime
from transformers import AutoTokenizer

$model
tokenizer = AutoTokenizer.from_pretrained(model)
session = onnxruntime.InferenceSession(f"{model}/$file")
texts = $texts
options = {"return_attention_mask": True, "return_tensors": "np"}
tokens = tokenizer(texts, padding=$padding, truncation=True, max_length=$length, **options)
inputs = {each.name: $value for each in session.get_inputs()}
for output, values in zip(session.get_outputs(), session.run(None, inputs)):
    print(output.name, values.shape)
"""


def write_onnx_folder(source: Path, folder: Path, title: str, int8: bool) -> list[str]:
    """Write the model in `source` to `folder`, with all that it takes to predict and to serve it, and its card.

    Returns lines about sizes and differences. Raises UserError for a model that cannot be exported, or whose outputs
    differ.
    """
    original, graph = _load(source), folder / ONNX_FILE
    if int8:
        check_quantizable(original.model)
    folder.mkdir()
    more = (path for pattern in ("deepcloze*.json", "LICENSE*") for path in source.glob(pattern) if path.is_file())
    for path in {*model_files(source, weights=False), *more} - unlisted_files(source):
        shutil.copyfile(path, folder / path.name)
    write_graph(original, graph)
    use_fast_linear(original.model)  # as `deepcloze predict` computes it
    batches = sample_batches(original)
    found = compare(original, _load(folder), batches)
    for name, difference in found.items():
        if difference.largest > (most := _TOLERANCE * difference.scale):
            raise UserError(
                f"{source}: {name} of ONNX Runtime differ from those of PyTorch by up to {difference.largest:.1e}; "
                f"expected at most {most:.1e}, as they are up to {difference.scale:.1e}"
            )
    weights = set(model_files(source, weights=True)) - set(model_files(source, weights=False))
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    texts = sum(len(batch["input_ids"]) for batch in batches)
    lines = [
        f"PyTorch    {_megabytes(*weights)}  largest differences from it, on {texts} texts of up to {longest} tokens:",
        f"ONNX fp32  {_megabytes(*folder.glob(f'{ONNX_FILE}*'))}  {_describe(found)}",
    ]
    if int8:
        quantize(graph)
        lines.append(f"ONNX int8  {_megabytes(graph)}  {_describe(compare(original, _load(folder), batches))}")
    write_card(source, folder, title, _usage(original), library="onnx")
    return lines


def _load(folder: Path) -> LoadedModel:
    """Load a model. Raises UserError for one that `deepcloze serve` rejects."""
    return load_on_cpu(folder, ranking_task() if is_masked_lm(folder) else read_saved_task(folder))


def _describe(found: Mapping[str, OutputDifference]) -> str:
    return ", ".join(f"{name} {each.largest:.1e} of {each.scale:.3g}" for name, each in found.items())


def _megabytes(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:7.1f} MB"


def _usage(original: LoadedModel) -> str:
    """Return the section *Usage* of the card. original: the model that was exported."""
    padding = original.padding
    values = {
        "texts": _ONE_TEXT if padding.is_avoided else _TEXTS,
        "padding": "True" if padding.length is None else '"max_length"',
        "length": original.encoder.max_length,
        "value": "tokens[each.name][None]" if takes_choices(original.model) else "tokens[each.name]",
    }
    code = snippet("python", Template(_CODE).substitute(values, model=MODEL, file=ONNX_FILE))
    if is_masked_lm(original.folder):
        return usage_section(code)
    return usage_section(code, "deepcloze prepares texts as in training:", COMMANDS)
