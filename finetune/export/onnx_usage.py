"""How to use an ONNX folder, for its model card."""

from pathlib import Path

from experiment.results.model_card import MODEL, CardBlock, Snippet
from experiment.results.page import Text
from finetune.onnx_model import FILE
from finetune.results.model_card import COMMANDS
from finetune.saved_task import is_masked_lm, read_saved_task

_CODE = """
import onnxruntime
from transformers import AutoTokenizer

{model}
tokenizer = AutoTokenizer.from_pretrained(model)
session = onnxruntime.InferenceSession(f"{{model}}/{file}")
texts = ["A text.", "Another text, which is longer."]
tokens = tokenizer(texts, padding={padding}, truncation=True, return_tensors="np")
inputs = {{each.name: {value} for each in session.get_inputs()}}
for output, values in zip(session.get_outputs(), session.run(None, inputs)):
    print(output.name, values.shape)
"""


def onnx_usage(folder: Path) -> list[CardBlock]:
    """folder: holds the ONNX model, its config and tokenizer, and its task, if it has one."""
    if is_masked_lm(folder):
        return [Snippet("python", _code(padding="True"))]
    task = read_saved_task(folder)
    padding = f'"max_length", max_length={task.max_seq_length}' if task.padded else "True"
    code = _code(padding, choices=task.kind.auto_model == "AutoModelForMultipleChoice")
    return [Snippet("python", code), Text("deepcloze prepares texts as in training:"), COMMANDS]


def _code(padding: str, choices: bool = False) -> str:
    """choices: whether the model takes the choices of several questions."""
    value = "tokens[each.name][None]" if choices else "tokens[each.name]"
    return _CODE.format(model=MODEL, file=FILE, padding=padding, value=value)
