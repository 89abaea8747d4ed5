"""Tiny models of every kind that is served, and a client of a server in this process."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from serving_clients import LIMITS, Connect
from starlette.testclient import TestClient
from transformers import AutoConfig, BertForMaskedLM, PreTrainedModel
from transformers import BertForMultipleChoice as MultipleChoice
from transformers import BertForSequenceClassification as SequenceClassification
from transformers import BertForTokenClassification as TokenClassification

from finetune.serve.app import make_app
from finetune.serve.served_model import load_served_model
from finetune.serve.serving_state import ServingState

_HEADS: dict[str, tuple[type[PreTrainedModel], list[str]]] = {
    "sequence": (SequenceClassification, ["no", "yes"]),
    "token": (TokenClassification, ["O", "B-X", "I-X"]),
    "choice": (MultipleChoice, []),
    "masked": (BertForMaskedLM, []),
}


@pytest.fixture(scope="session")
def folders(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of transformers by head. Large weights, so that answers differ."""
    made = {}
    for name, (model_type, labels) in _HEADS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        config = AutoConfig.from_pretrained(encoder, initializer_range=0.3, **(names if labels else {}))
        model_type(config).save_pretrained(folder)
        shutil.copy(encoder / "vocab.txt", folder)
    return made


@contextmanager
def _servers() -> Iterator[Connect]:
    with ExitStack() as stack:

        def start(
            folder: Path, token: str | None = None, batch_tokens: int | None = None, **limits: float
        ) -> TestClient:
            load = partial(load_served_model, folder, "fp32")
            state = ServingState(load(), load, replace(LIMITS, **limits), 0.001, batch_tokens)
            client = TestClient(make_app(state, token), raise_server_exceptions=False)
            client.state = state  # type: ignore[attr-defined]
            return stack.enter_context(client)

        yield start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Starts a server in this process: connect(folder, token=None, batch_tokens=None, **limits)."""
    with _servers() as start:
        yield start


@pytest.fixture(scope="module")
def clients(folders: dict[str, Path]) -> Iterator[Callable[[str], TestClient]]:
    """A server for each head, which tests of a file share: clients(head). They leave its state as it is."""
    with _servers() as start:
        yield cache(lambda head: start(folders[head]))
