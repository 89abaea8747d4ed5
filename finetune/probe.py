"""A linear probe: how well a linear classifier separates the labels by the outputs of a frozen encoder.

It takes seconds where fine-tuning takes minutes, for `deepcloze watch`. The features of a text are the mean of the last
hidden states over its tokens, special tokens included. They are standardized with the mean and standard deviation of
the training split, and fitted by logistic regression with the L2 penalty of scikit-learn's default, C = 1. Nothing is
chosen on validation.

    python -m finetune.probe FILE [SECTION.KEY=VALUE …]
"""

import signal
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from experiment.errors import UserError, notify, readable_disk_errors
from experiment.files import write_json
from experiment.process.hardware import prepare_process
from finetune.encoding.examples import Split
from finetune.model import build_model
from finetune.pooling import hidden_states, pool
from finetune.prediction.inference import Inference, evaluation_microbatch
from finetune.resolve import ResolvedRun, load_run_config, resolve

_C = 1.0
_ITERATIONS = 1000

# Shape suffixes: N examples, S sequences of a batch, D hidden.


class MeanPooled(nn.Module):
    """The mean of an encoder's last hidden states, in the place of logits."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Pool the hidden states. logits: SD."""
        return SequenceClassifierOutput(
            logits=pool(hidden_states(self.encoder, inputs), inputs["attention_mask"], "mean")
        )


def probe(run: ResolvedRun) -> dict[str, float]:
    """Return the metrics on validation of a probe that was fitted on train. Raises UserError."""
    kind, splits = run.task.kind, run.task.splits
    encoder = build_model(run.model).model.base_model.to(run.device.device).eval()
    model = MeanPooled(encoder)
    train, validation = (features(model, splits[split], run) for split in ("train", "validation"))
    targets = np.array([example.target for example in splits["train"].examples])
    if len(set(targets)) == 1:
        raise UserError(f"{splits['train'].table.path}: every row has the label '{kind.labels[targets[0]]}'")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)  # close enough after so many iterations
        classifier.fit(train, targets)
    predictions = [{"label": kind.labels[number]} for number in classifier.predict(validation)]
    return kind.scores(splits["validation"].table.records, predictions)


def features(model: MeanPooled, split: Split, run: ResolvedRun) -> NDArray[np.float32]:
    """Compute features ND, a row for each example."""
    microbatch = evaluation_microbatch(run.training)
    inference = Inference(model, run.task.kind, run.task.padding, run.device, microbatch)
    outputs, _ = inference.compute(split.examples)
    return np.stack([rows[0] for rows in outputs])


def main(argv: Sequence[str]) -> int:
    """Probe an encoder, and write the metrics to results.json in run.dir as fine-tuning does. Returns an exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prepare_process()
    file, overrides = argv[0], dict(argument.split("=", 1) for argument in argv[1:])
    torch.manual_seed(0)  # for the head, which is not used
    try:
        run = resolve(load_run_config(file, overrides), uses_head=False)
        scores = {name: {"mean": value} for name, value in probe(run).items()}
        with readable_disk_errors():
            write_json(run.folder.results, {"task": run.task.kind.config.name, "splits": {"validation": scores}})
    except UserError as error:
        notify(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
