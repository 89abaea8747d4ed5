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
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from experiment.errors import UserError, notify, readable_disk_errors
from experiment.files import write_json
from experiment.process.hardware import prepare_process
from finetune.encoding.examples import Split
from finetune.inference import Inference, evaluation_microbatch
from finetune.kinds import embedding
from finetune.model import build_model
from finetune.resolve import ResolvedRun, load_run_config, resolve

_ITERATIONS = 1000

# Shape suffixes: N examples, D hidden.


def probe(run: ResolvedRun) -> dict[str, float]:
    """Return the metrics on validation of a probe that was fitted on train. Raises UserError."""
    kind, splits = run.task.kind, run.task.splits
    encoder = build_model(run.model).model.base_model.to(run.task.device.torch_device)
    train, validation = (features(encoder, splits[split], run) for split in ("train", "validation"))
    targets = np.array([example.target for example in splits["train"].examples])
    if len(set(targets)) == 1:
        raise UserError(f"{splits['train'].table.path}: every row has the label '{kind.labels[targets[0]]}'")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)  # close enough after so many iterations
        classifier.fit(train, targets)
    predictions = [{"label": kind.labels[number]} for number in classifier.predict(validation)]
    return kind.scores(splits["validation"].table.records, predictions)


def features(encoder: PreTrainedModel, split: Split, run: ResolvedRun) -> NDArray[np.float32]:
    """Compute features ND, a row for each example."""
    kind = embedding.Kind(embedding.Config(pooling="mean", normalize=False), ())
    inference = Inference(encoder, kind, run.task.padding, run.task.device, evaluation_microbatch(run.training))
    outputs, _ = inference.compute([replace(example, target=None) for example in split.examples])
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
