import csv
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from pyarrow import parquet
from torch import Tensor
from transformers import BertModel

from experiment.config import build_config, dump_config
from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.config import FinetuneConfig, TrainingConfig
from finetune.data.records import Record, Table, read_table
from finetune.data.splits import read_splits, related_records
from finetune.device import Device, MicrobatchSize
from finetune.encoding.encoder import Encoder, Tokens
from finetune.encoding.examples import Batch, Example, Padding, Split
from finetune.evaluation_texts import texts_of
from finetune.inference import collate, evaluate
from finetune.kinds.embedding import Config, EmbeddingColumns, Kind
from finetune.model import ModelSpec, build_model
from finetune.options import PredictOptions
from finetune.prediction.predict import predict_command
from finetune.prediction.predictor import Predictor
from finetune.prepared_task import PreparedTask
from finetune.resolve import config_settings, load_run_config
from finetune.results.predictions import open_row_file, optional_inputs, prediction_rows, read_predictions
from finetune.run import run
from finetune.serve.served_model import load_served_model
from finetune.task_kind import Loss, LossOptions
from finetune.training.updater import Updater
from hub_server import HubServer, status

WORDS = [f"word{number}" for number in range(40)]
CPU = Device(torch.device("cpu"), None)
PAIRS = {"train": "f", "validation": "f", "metric": "mrr"}


def make_kind(**task: Any) -> Kind:
    return Kind(build_config(Config, {**PAIRS, **task}), ())


def examples_of(rows: Sequence[tuple[str, ...]], scores: Sequence[float] | None = None) -> list[Example]:
    """Examples without tokens: a text, its pair and its negatives."""
    tokens = Tokens(torch.tensor([1]), None)
    targets = [list(row[1:]) for row in rows] if scores is None else scores
    return [Example((tokens,) * len(row), target, row[0]) for row, target in zip(rows, targets, strict=True)]


def loss_of(kind: Kind, examples: Sequence[Example], outputs: Tensor) -> Tensor:
    """The mean over the examples."""
    targets = kind.targets(examples)
    loss = kind.loss(outputs, Batch(tuple(examples), {}, targets), LossOptions())
    assert loss.weight == len(examples)
    return loss.sum / loss.weight


TRIPLETS = examples_of([(f"text {n}", f"document {n}", f"negative {n}") for n in range(6)])
SCORED = examples_of([(f"text {n}", f"text {-n}") for n in range(9)], [0.0, 3.0, 1.0, 3.0, 2.5, 0.0, 5.0, 1.0, 4.0])


@pytest.mark.parametrize("dimensions", [(), (4, 8)], ids=["whole", "cut"])
@pytest.mark.parametrize("examples", [TRIPLETS, SCORED], ids=["in-batch negatives", "CoSENT"])
def test_losses_are_those_of_sentence_transformers(examples: list[Example], dimensions: tuple[int, ...]) -> None:
    """Catches another loss, and gradients that differ."""
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed: nothing to compare with"
    )
    from sentence_transformers.sentence_transformer import losses

    columns = len(examples[0].sequences)
    torch.manual_seed(0)
    outputs = torch.randn(len(examples) * columns, 16, dtype=torch.float64, requires_grad=True)
    ours = loss_of(make_kind(dimensions=dimensions, scale=15.0), examples, outputs)
    (gradient,) = torch.autograd.grad(ours, outputs)

    peer = losses.MultipleNegativesRankingLoss if columns == 3 else losses.CoSENTLoss
    compute = peer(torch.nn.Identity(), scale=15.0)
    labels = torch.tensor([0.0 if columns == 3 else example.target for example in examples])
    parts = list(outputs.view(len(examples), columns, 16).unbind(dim=1))
    theirs = sum(
        compute.compute_loss_from_embeddings([F.normalize(part[:, :size], dim=-1) for part in parts], labels)
        for size in (*dimensions, 16)
    )
    assert isinstance(theirs, Tensor)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, outputs)[0], rtol=0, atol=1e-6)


def test_losses_are_those_of_the_papers() -> None:
    """Catches what the test above does, where sentence-transformers is missing."""
    torch.manual_seed(0)
    outputs = torch.randn(18, 16)
    texts, documents, negatives = F.normalize(outputs, dim=-1).view(6, 3, 16).unbind(dim=1)
    scores = 20 * texts @ torch.cat([documents, negatives]).T
    expected = -scores.log_softmax(dim=1).diagonal().mean()
    assert loss_of(make_kind(), TRIPLETS, outputs).item() == pytest.approx(expected.item())
    cosines = F.cosine_similarity(outputs[::2], outputs[1::2]).tolist()
    targets = [example.target for example in SCORED]
    pairs = [(i, j) for i in range(9) for j in range(9) if targets[i] < targets[j]]
    expected_sum = 1 + sum(np.exp(20 * (cosines[i] - cosines[j])) for i, j in pairs)
    assert loss_of(make_kind(), SCORED, outputs).item() == pytest.approx(np.log(expected_sum))


def test_right_documents_are_no_negatives() -> None:
    """Catches a text that is pushed away from a document of its own: one that another row has too, another document of
    the same text, a negative that is a copy of its document, or the text itself as the document of another row."""
    examples = examples_of([("a", "x"), ("a", "y", "x"), ("b", "x"), ("c", "z", "z"), ("d", "c")])
    excluded = make_kind().targets(examples)
    candidates = ["x of a", "y", "x of b", "z", "c", "negative x", "negative z"]
    found = [{name for name, left_out in zip(candidates, row, strict=True) if left_out} for row in excluded.tolist()]
    assert found[0] == {"y", "x of b", "negative x"}
    assert found[1] == {"x of a", "x of b", "negative x"}
    assert found[2] == {"x of a", "negative x"}
    assert found[3] == {"c", "negative z"}
    assert found[4] == set()


class CountedText(str):
    """A text that counts how often it is looked up."""

    lookups = 0

    def __hash__(self) -> int:
        CountedText.lookups += 1
        return super().__hash__()


def test_candidates_are_not_looked_up_for_each_text() -> None:
    """Catches targets that take longer than the update of a large batch, with the GPU waiting."""
    make_kind().targets(examples_of([(CountedText(f"t{n}"), CountedText(f"d{n}")) for n in range(50)]))
    assert CountedText.lookups <= 50 * 10


RATE = 1e6  # also of adam_eps, so that AdamW subtracts the gradient: lr * g / (|g| + eps)


def make_updater(encoder: Path, microbatch_size: int) -> tuple[Updater, list[Example], BertModel]:
    """An updater of a model, and the examples of an update: texts with one to three others."""
    draw, tokenizer = random.Random(0), load_tokenizer(encoder)
    values = [{"text": text(draw), "text_pair": text(draw), "negative": [text(draw)] * (n % 3)} for n in range(20)]
    records = tuple(Record("f", each) for each in values)
    kind = make_kind(columns={"negative": "negative"})
    encode = Encoder(tokenizer, 16, token_types=True)
    examples = [example for record in records for example in kind.expand(record, encode, training=True)]
    split = Split(Table(Path("f"), records, labelled=True), tuple((each,) for each in examples))
    torch.manual_seed(0)
    model = build_model(ModelSpec(encoder, True, kind.auto_model, kind.head)).model
    config = TrainingConfig(
        batch_size=20,
        microbatch_size=microbatch_size,
        grad_clip=0.0,
        weight_decay=0.0,
        lr=RATE,
        adam_eps=RATE,
        steps=1,
        warmup_steps=0,
    )
    return Updater(model, PreparedTask(kind, {"train": split}, Padding.of(tokenizer)), config), examples, model


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))


def test_microbatches_are_compared_with_each_other(encoder: Path) -> None:
    """Catches negatives of the own microbatch only, and gradient caching that keeps the activations of all of them."""
    found = []
    for size in (20, 3):
        updater, examples, model = make_updater(encoder, size)
        with_gradients: list[int] = []
        model.eval().register_forward_pre_hook(
            lambda _, __, inputs, kept=with_gradients: kept.append(len(inputs["input_ids"]) * torch.is_grad_enabled()),
            with_kwargs=True,
        )
        loss = updater.step(examples)
        found.append(([parameter.detach() for parameter in model.parameters()], loss.sum / loss.weight, loss.weight))
        assert sum(with_gradients) == sum(len(example.sequences) for example in examples)
        assert max(with_gradients) <= size * 4
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_cached_gradients_are_those_of_the_same_dropout(encoder: Path) -> None:
    """Catches other dropout masks in the second pass: the gradients would be those of another loss."""
    updater, examples, model = make_updater(encoder, 7)
    kind, model = make_kind(), model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    examples.sort(key=lambda each: each.longest)
    padding = Padding.of(load_tokenizer(encoder))
    torch.manual_seed(1)
    batches = [collate(kind, examples[start : start + 7], padding, CPU.torch_device) for start in range(0, 20, 7)]
    outputs = torch.cat([kind.forward(model, batch) for batch in batches])
    loss_of(kind, examples, outputs).backward()
    expected = {name: before[name] - p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(1)
    updater.step(examples)
    found = {name: p.detach() for name, p in model.named_parameters() if name in expected}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def write_rows(path: Path, seed: int, count: int = 40, **columns: Callable[[random.Random], Any]) -> str:
    """A JSONL file. columns: make the cells; sentence1 and sentence2 are given."""
    draw = random.Random(seed)
    made = {"sentence1": text, "sentence2": text, **columns}
    rows = [{name: make(draw) for name, make in made.items()} for _ in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def config_of(encoder: Path, folder: Path, task: dict[str, Any], **training: Any) -> FinetuneConfig:
    tree = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": "t", "kind": "embedding", **task},
        "model": {"init_from": str(encoder), "max_seq_length": 16},
        "training": {"lr": 1e-3, "steps": 2, "batch_size": 16, "precision": "fp32", **training},
    }
    return build_config(FinetuneConfig, tree, {})


def score(draw: random.Random) -> float:
    return draw.randint(0, 5)


def test_pairs_are_trained_and_scores_are_validated(encoder: Path, tmp_path: Path) -> None:
    """Catches a training split that must have the scores or the negatives of another split, a run that cannot score
    what it trains on, and scores of cut vectors that are missing."""
    task = {
        "train": write_rows(tmp_path / "train.jsonl", 0, hard=lambda draw: [text(draw), text(draw)]),
        "validation": write_rows(tmp_path / "validation.jsonl", 1, score=score),
        "test": write_rows(tmp_path / "test.jsonl", 2, score=score),
        "columns": {"negative": "hard", "score": "score"},
        "dimensions": [8, 32],
    }
    results = run(config_of(encoder, tmp_path, task, score_train=True))
    assert set(results["splits"]["test"]) == {"spearman", "alignment", "uniformity"}
    assert set(results["splits"]["train"]) == {"mrr", "ndcg@10", "alignment", "uniformity"}
    folder = tmp_path / "run" / "seed-42"
    small, whole = csv.DictReader((folder / "dimensions-test.csv").open())
    assert float(small["spearman"]) != float(whole["spearman"])
    assert float(whole["spearman"]) == pytest.approx(results["splits"]["test"]["spearman"]["mean"])
    predictions = read_predictions(folder / "predictions-test.jsonl")
    assert "embedding" not in predictions[0]
    table = read_table(Path(task["test"]), EmbeddingColumns(score="score"))
    found = make_kind(metric="spearman").scores(table.records, predictions)
    assert found["spearman"] == pytest.approx(results["splits"]["test"]["spearman"]["mean"])


def test_metrics_of_queries_and_documents() -> None:
    """Catches documents that are counted twice, queries that count more for having more documents, and negatives that
    are left out: the values are computed by hand."""
    vectors = {"q": [1.0, 0.0], "r": [0.0, 1.0], "a": [1.0, 0.1], "b": [1.0, 0.5], "c": [1.0, 0.3], "d": [0.2, 1.0]}
    rows = [("q", "a"), ("q", "b"), ("r", "b", "c", "d")]
    roles = ("text", "text_pair", "negative")
    records = [Record("f", dict(zip(roles, (*row[:2], list(row[2:])), strict=True))) for row in rows]
    kind = make_kind(columns={"negative": "negative"})
    outputs = [[np.array(vectors[name], dtype=np.float32) for name in row] for row in rows]
    predictions = [kind.decode(record, [], each) for record, each in zip(records, outputs, strict=True)]
    related = kind.relate(records, predictions)
    found = kind.scores(records, related)
    # Documents by similarity: to q a, c, b, d; to r d, b, c, a.
    assert found["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    q = (1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert found["ndcg@10"] == pytest.approx((q + 1 / np.log2(3)) / 2)
    cosines = [np.dot(vectors[x], vectors[y]) / np.linalg.norm(vectors[y]) for x, y, *_ in rows]
    assert found["alignment"] == pytest.approx(2 - 2 * np.mean(cosines))
    assert found["uniformity"] == pytest.approx(-4)  # two vectors at a right angle: squared distance 2
    assert [row["rank"] for row in related] == [1, 3, 2]
    assert kind.scores(records[2:] * 3, related[2:] * 3)["mrr"] == 1 / 2  # as a bootstrap draws them


def test_scores_of_a_sample_without_a_query() -> None:
    """Catches a confidence interval that is NaN: of records with an empty text, which are drawn one by one, only the
    first has the numbers of the text."""
    records = [Record("f", {"text": "", "text_pair": document}) for document in ("a", "b")]
    predictions = [
        {"embedding": np.array([1.0, 0.0]), "others": np.array([other])} for other in ([1.0, 0.1], [1.0, 0.5])
    ]
    kind = make_kind(metric="mrr")
    assert related_records(records, kind.config.columns) == [[0], [1]]
    scorer = kind.scorer(records, kind.relate(records, predictions))
    drawn, whole = scorer(np.array([1, 1])), scorer(np.array([0, 1]))
    assert [drawn[name] for name in ("mrr", "ndcg@10", "uniformity")] == [
        whole[name] for name in ("mrr", "ndcg@10", "uniformity")
    ]


@pytest.mark.parametrize(("documents", "ranks"), [(["a", "q"], [2, 1]), (["a", "b"], [1, 2])])
def test_a_text_may_be_a_document_of_itself(documents: list[str], ranks: list[int]) -> None:
    """Catches two documents of a text with the same rank, and so nDCG above 1; q is nearest to q, then a, then b."""
    vectors = {"q": [1.0, 0.0], "a": [1.0, 0.1], "b": [1.0, 0.5]}
    pairs = [*(("q", document) for document in documents), ("b", "q")]
    records = [Record("f", {"text": text, "text_pair": document}) for text, document in pairs]
    predictions = [{"embedding": vectors[text], "others": [vectors[document]]} for text, document in pairs]
    related = make_kind().relate(records, predictions)
    assert [row["rank"] for row in related[:2]] == ranks
    assert related[0]["ndcg@10"] == pytest.approx(1)


def test_vectors_of_a_split_are_kept_as_arrays() -> None:
    """Catches evaluations that take 10 times the memory of the vectors, and arrays in rows, which JSON cannot hold."""
    record = Record("f", {"text": "q", "text_pair": "a"})
    outputs = list(np.arange(4, dtype=np.float32).reshape(2, 2))
    kind = make_kind()
    prediction = kind.decode(record, [], outputs)
    for output, kept in zip(outputs, [prediction["embedding"], *prediction["others"]], strict=True):
        assert np.shares_memory(output, kept)
    ((_, shown),) = kind.rows(record, prediction)
    assert shown == {"embedding": [0.0, 1.0], "similarity": pytest.approx(3 / 13**0.5)}


@pytest.mark.parametrize(("texts", "collapsed"), [(["a", "b"], True), (["a", "a"], False)])
def test_equal_vectors_are_a_collapse(texts: list[str], collapsed: bool) -> None:
    """Catches a model that is said to have collapsed because a split has a single text."""
    records = [Record("f", {"text": text, "text_pair": f"x{n}"}) for n, text in enumerate(texts)]
    predictions = [{"embedding": [1.0, 0.0], "others": [[1.0, 0.0]]} for _ in records]
    kind = make_kind()
    assert kind.is_collapsed(records, kind.relate(records, predictions)) == collapsed


def test_alignment_is_of_similar_pairs() -> None:
    """Catches pairs with low scores that are counted as similar."""
    records = [
        Record("f", {"text": str(n), "text_pair": "x", "score": score}) for n, score in enumerate([0.0, 3.0, 4.0, 5.0])
    ]
    predictions = [{"similarity": similarity, "potential": 0.5} for similarity in (0.1, 0.2, 0.7, 0.9)]
    found = make_kind(metric="spearman").scores(records, predictions)
    assert found == pytest.approx({"spearman": 1.0, "alignment": 2 - 2 * 0.8, "uniformity": np.log(0.5)})


def test_negatives_are_drawn_at_random(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches batches of texts of the same length, as other kinds have them."""
    files = {split: write_rows(tmp_path / f"{split}.jsonl", 0, 400) for split in ("train", "validation")}
    spreads: list[int] = []
    step = Updater.step

    def spy(updater: Updater, examples: Sequence[Example]) -> Loss:
        lengths = [example.longest for example in examples]
        spreads.append(max(lengths) - min(lengths))
        return step(updater, examples)

    monkeypatch.setattr(Updater, "step", spy)
    run(config_of(encoder, tmp_path, {**files, "metric": "mrr"}, steps=25))
    assert fmean(spreads) > 4  # of 3 to 11 tokens


def test_seeds_of_a_run_have_the_same_validation_loss(encoder: Path, tmp_path: Path) -> None:
    """Catches texts that are compared with the others of a microbatch only, which memory limits, and a training that is
    discarded because its microbatches are smaller."""
    _, examples, model = make_updater(encoder, 20)
    records = tuple(Record("f", {"text": str(n), "text_pair": str(n)}) for n in range(20))
    split = Split(Table(Path("f"), records, labelled=True), tuple((each,) for each in examples))
    ready = PreparedTask(make_kind(), {}, Padding.of(load_tokenizer(encoder)))
    losses = [evaluate(model, ready, split, MicrobatchSize(size)).loss for size in (20, 3)]
    examples.sort(key=lambda each: -each.longest)
    outputs = make_kind().forward(model, collate(make_kind(), examples, ready.padding, CPU.torch_device))
    assert losses == pytest.approx([loss_of(make_kind(), examples, outputs).item()] * 2, abs=1e-5)
    sizes = ({}, {"microbatch_size": 4}, {"microbatch_size": 4, "eval_batch_size": 64})
    settings = [config_settings(config_of(encoder, tmp_path, {"train": "train.jsonl"}, **each)) for each in sizes]
    assert settings[0] == settings[1] == settings[2]


def test_a_diverged_run_says_so(encoder: Path, tmp_path: Path) -> None:
    """Catches a traceback of the scores of vectors that are not numbers."""
    files = {split: write_rows(tmp_path / f"{split}.jsonl", 0) for split in ("train", "validation")}
    with pytest.raises(SystemExit, match=r"step 1: training diverged \(loss \S+ on train, nan on validation\)"):
        run(config_of(encoder, tmp_path, {**files, "metric": "mrr"}, steps=1, lr=1e30, warmup_steps=0))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {},
            r"validation\.jsonl:1: no score, which task\.metric: spearman needs; name its column in task\.columns",
        ),
        ({"columns": {"score": "points"}, "metric": "mrr"}, r"validation\.jsonl:1: pairs with scores have no mrr"),
        ({"columns": {"score": "points"}, "dimensions": [64]}, r"task\.dimensions: 64 is more than the model has: 32"),
    ],
    ids=["no score", "score", "dimensions"],
)
def test_mistakes(encoder: Path, tmp_path: Path, task: dict[str, Any], message: str) -> None:
    """Catches a task that fails after its training."""
    splits = {split: write_rows(tmp_path / f"{split}.jsonl", 0, points=score) for split in ("train", "validation")}
    with pytest.raises(UserError, match=message):
        run(config_of(encoder, tmp_path, {**splits, **task}))


def test_negatives_are_texts_lists_or_columns(tmp_path: Path) -> None:
    """Catches a text that is not read as one negative, and cells without any that are negatives."""
    path = tmp_path / "f.csv"
    path.write_text('sentence1,sentence2,hard,other\na,b,c d,e\na,b,"[""c"", ""d""]",e\na,b,,\n')
    read = [
        [record.values["negative"] for record in read_table(path, EmbeddingColumns(negative=names)).records[:count]]
        for names, count in (("hard", 3), (("other", "hard"), 3))
    ]
    assert read == [[["c d"], ["c", "d"], []], [["e", "c d"], ["e", '["c", "d"]'], []]]


def test_rows_without_a_negative(tmp_path: Path) -> None:
    """Catches a JSON object that must have the key."""
    path = tmp_path / "f.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a", "sentence2": "b", "hard": "c"}\n')
    found = read_table(path, EmbeddingColumns(negative="hard")).records
    assert [record.values.get("negative") for record in found] == [None, ["c"]]


def test_a_test_split_without_scores_is_not_scored(tmp_path: Path) -> None:
    """Catches the score -1 of a hidden test split, which would give a correlation of 0."""
    path = tmp_path / "f.csv"
    path.write_text("sentence1,sentence2,score\na,b,-1\nc,d,-1\n")
    table = read_table(path, EmbeddingColumns(score="score"), targets_required=False)
    assert not table.labelled
    assert [record.values for record in table.records] == [{"text": "a"}, {"text": "c"}]


def test_a_score_that_only_some_rows_have(tmp_path: Path) -> None:
    """Catches rows that would be trained with another loss than the others."""
    path = tmp_path / "f.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\na,b,\n")
    with pytest.raises(UserError, match=r"f\.csv:3: the score is empty"):
        read_table(path, EmbeddingColumns(score="score"))


def test_the_texts_of_an_evaluation_are_those_of_all_columns(tmp_path: Path) -> None:
    """Catches documents that a corpus is not decontaminated against."""
    path = tmp_path / "f.csv"
    path.write_text("sentence1,sentence2,hard,score\na b,c d,e f,1\n")
    columns = EmbeddingColumns(negative="hard", score="score")
    assert [found.text for found in texts_of(Config(validation=str(path), columns=columns))] == ["a b", "c d", "e f"]


TEXTS = ["word1", "word2 word3 word4", "word5 [SEP] " * 12, ""]


MEAN = {"pooling": "mean", "normalize": True}
CLS = {"pooling": "cls", "normalize": False}


@pytest.fixture(scope="module", params=[MEAN, CLS], ids=["mean", "cls"])
def model(request: pytest.FixtureRequest, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained model."""
    folder = tmp_path_factory.mktemp("trained")
    files = {split: write_rows(folder / f"{split}.jsonl", 0) for split in ("train", "validation")}
    run(config_of(encoder, folder, {**files, "columns": {"negative": "hard"}, "metric": "mrr", **request.param}))
    return folder / "run" / "seed-42" / "model"


def predicted(folder: Path) -> Any:
    return [found["embedding"] for found in Predictor.load(folder, "fp32").predict([{"text": text} for text in TEXTS])]


def test_sentence_transformers_opens_the_folder(model: Path) -> None:
    """Catches another pooling, length or tokenization, or vectors that are scaled in one of them only."""
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed: nothing to compare with"
    )
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(str(model), device="cpu")
    assert opened.max_seq_length == 16
    np.testing.assert_allclose(predicted(model), opened.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "cls", "embedding_dimension": 8}, "cls"),  # as sentence-transformers 6 writes it
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),  # as sentence-transformers reads it
        (None, "mean"),
    ],
)
def test_the_pooling_of_a_model_is_the_default(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: dict[str, Any] | None, expected: str
) -> None:
    """Catches models trained with the first token, such as BGE, that continue with the mean, and the pooling of another
    model, with which the run began."""
    folder = Path(shutil.copytree(encoder, tmp_path / "model"))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    tree = {"run": {"dir": "run"}, "task": {"kind": "embedding", "train": "f.csv"}, "model": {"init_from": str(folder)}}
    config = tmp_path / "task.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert load_run_config(config).task.pooling == expected
    assert load_run_config(config, {"task.pooling": "mean"}).task.pooling == "mean"
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(dump_config(load_run_config(config, {"task.pooling": "mean"})))
    assert load_run_config(config).task.pooling == "mean"  # as the run began
    Path("run/config.yaml").write_text(dump_config(load_run_config(config, {"model.init_from": str(encoder)})))
    assert load_run_config(config).task.pooling == expected, "it began with another model"
    shutil.rmtree("run")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"1_Pooling/config\.json is damaged"):
        load_run_config(config)


@pytest.mark.parametrize(
    ("pooling", "layer", "named"),
    [
        ({"pooling_mode": ["max"]}, "2_Dropout", "max"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "2_Normalize", "max, mean"),
        ({"pooling_mode": "mean"}, "2_Dense", "2_Dense"),
    ],
)
def test_vectors_that_are_made_in_another_way(
    encoder: Path, tmp_path: Path, pooling: dict[str, Any], layer: str, named: str
) -> None:
    """Catches a model that continues with the mean of its encoder without a word, because its own vectors cannot be
    computed."""
    folder = Path(shutil.copytree(encoder, tmp_path / "model"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / layer).mkdir()
    tree = {"run": {"dir": "run"}, "task": {"kind": "embedding", "train": "f.csv"}, "model": {"init_from": str(folder)}}
    config = tmp_path / "task.yaml"
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=rf"task\.pooling is not set: .* makes vectors by {named}, which is not"):
        load_run_config(config)
    assert load_run_config(config, {"task.pooling": "cls"}).task.pooling == "cls"


def test_the_pooling_of_a_model_of_the_hub(hub: HubServer, encoder: Path, tmp_path: Path) -> None:
    """Catches the mean for a model whose pooling cannot be read."""
    modes = b'{"pooling_mode_cls_token": true}'
    hub.repository("org/tiny").push_folder(encoder, **{"1_Pooling/config__json": modes})
    tree = {"run": {"dir": "run"}, "task": {"kind": "embedding", "train": "f.csv"}, "model": {"init_from": "org/tiny"}}
    config = tmp_path / "task.yaml"
    config.write_text(yaml.safe_dump(tree))
    hub.fault("1_Pooling/config.json", *[status(403)] * 99)
    assert load_run_config(config, {"task.pooling": "mean"}).task.pooling == "mean"
    with pytest.raises(UserError, match=r"^task\.pooling is not set: org/tiny@"):
        load_run_config(config)
    hub.faults.clear()
    assert load_run_config(config).task.pooling == "cls"


def test_a_server_gives_the_same_vectors(model: Path) -> None:
    """Catches `/v1/embed` with the mean of a model that was trained with another pooling."""
    served = load_served_model(model, "fp32")
    found = {
        pooling: [each["embedding"] for each in embedder.predict([{"text": text} for text in TEXTS])]
        for pooling, embedder in served.embedders.items()
    }
    np.testing.assert_allclose(found[served.pooling], predicted(model), rtol=0, atol=1e-5)
    assert np.abs(np.subtract(found["mean"], found["cls"])).max() > 0.1


@pytest.mark.soak
@pytest.mark.parametrize("model", [MEAN], ids=["mean"], indirect=True)
def test_onnx_gives_the_same_vectors(model: Path, export_onnx: Callable[..., Path]) -> None:
    """Catches a graph that needs a head."""
    np.testing.assert_allclose(predicted(export_onnx(model)), predicted(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [MEAN], ids=["mean"], indirect=True)
def test_predict_writes_vectors_and_scores(model: Path, tmp_path: Path) -> None:
    """Catches a file of texts that must have pairs, pairs that must have negatives, and documents that are written
    without being asked for."""
    (tmp_path / "texts.csv").write_text("sentence1\nword1\nword2 word3\n")
    output = tmp_path / "vectors.jsonl"
    predict_command(PredictOptions(model=str(model), input=str(tmp_path / "texts.csv"), output=str(output)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row) for row in rows] == [["row", "text", "predicted"]] * 2
    assert rows[0]["predicted"] == pytest.approx(predicted(model)[0], abs=1e-2)  # perhaps in bf16
    source = write_rows(tmp_path / "pairs.jsonl", 0)
    predict_command(PredictOptions(model=str(model), input=source, output=str(output), score=True))
    assert list(json.loads(output.read_text().splitlines()[0])) == [
        "row",
        "text",
        "text_pair",
        "predicted",
        "similarity",
    ]
    scores = json.loads((tmp_path / "vectors.scores.json").read_text())["scores"]
    assert set(scores) == {"mrr", "ndcg@10", "alignment", "uniformity"}
    mixed = ({"sentence1": "word1", "sentence2": f"word{2 + len(more)}", **more} for more in ({}, {"hard": ["word9"]}))
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    options = PredictOptions(model=str(model), input=str(tmp_path / "mixed.jsonl"), output=str(output), score=True)
    predict_command(options)
    assert [json.loads(line)["negative"] for line in output.read_text().splitlines()] == [[], ["word9"]]


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_rows_may_lack_negatives(tmp_path: Path, format: str) -> None:
    """Catches a traceback after training, and negatives that are dropped, if only some JSON objects have the key."""
    kind = make_kind(columns={"negative": "negative"})
    lines = [{"negative": negatives} if negatives else {} for negatives in ([], ["c"], [])]
    rows = [json.dumps({"sentence1": "a", "sentence2": "b", **line}) for line in lines]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    records = read_table(tmp_path / "rows.jsonl", kind.config.columns).records
    with open_row_file(tmp_path / f"out.{format}") as write:
        for record in records:  # as `deepcloze predict` writes chunks
            write(prediction_rows(kind, [record], [{"similarity": 0.5}], optional=optional_inputs(kind, records)))
    if format == "csv":
        found = list(csv.DictReader((tmp_path / "out.csv").open()))
    else:
        found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert list(found[0]) == ["row", "text", "text_pair", "negative", "similarity"]
    assert [row["negative"] for row in found] == ["[]", '["c"]', "[]"]
    together = prediction_rows(kind, records, [{"similarity": 0.5}] * 3)
    assert [row["negative"] for row in together] == [[], ["c"], []]


def test_pairs_and_scored_pairs_are_not_trained_together(encoder: Path, tmp_path: Path) -> None:
    """Catches a traceback, and a message about the model, for a loss that fits one of two splits only."""
    files = {
        "train": write_rows(tmp_path / "train.jsonl", 0, count=2),
        "validation": write_rows(tmp_path / "validation.jsonl", 1, count=2, score=score),
    }
    found = {"columns": {"score": "score"}, "metric": "spearman"}
    for task in (files, {"train": files["validation"], "validation": files["train"]}):
        with pytest.raises(
            UserError, match=r"fit_on: .*/validation\.jsonl has .* task\.columns\.score, .*/train\.jsonl"
        ):
            read_splits(build_config(Config, {**task, **found}), None, "train+validation")
    both = build_config(Config, {**files, "validation": files["train"], **found})
    assert len(read_splits(both, None, "train+validation")["train"]) == 4
