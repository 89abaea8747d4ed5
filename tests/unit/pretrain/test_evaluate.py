import json
import math
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from experiment.run_files.checkpoints import checkpoint_path, mark_complete, write_best
from experiment.run_files.retention import discard
from pretrain import evaluate as evaluate_module
from pretrain.batching import sequences
from pretrain.batching.batch import Microbatch
from pretrain.batching.masking import MaskingSchedule
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import MaskingConfig
from pretrain.corpus.reader import open_corpus
from pretrain.evaluate import (
    HeldOutCorpus,
    HeldOutEvaluator,
    Predict,
    Scores,
    evaluate_command,
    open_held_out,
)
from pretrain.modeling.masked_lm import Predictions
from pretrain.world import World

MASKING = MaskingConfig()


def held_out(corpus: Path, layout: MicrobatchLayout, seed: int = 42, masking: MaskingConfig = MASKING) -> HeldOutCorpus:
    vocabulary = build_vocabulary(load_tokenizer(corpus / "tokenizer"))
    opened = open_held_out({"held": open_corpus(corpus)}, vocabulary, masking, seed, layout, World(), corpus, 256)
    return opened.corpora["held"]


def evaluate(held: HeldOutCorpus, predict: Predict) -> Scores:
    return HeldOutEvaluator({"held": held}).evaluate(predict, torch.device("cpu"))["held"]


def copying_logits(ids: Tensor) -> Tensor:
    """Logits [B, W, 200] of a model that predicts the token it sees, with probability e^3 / (e^3 + 199)."""
    return 3.0 * F.one_hot(ids, 200).float()


def predict(microbatch: Microbatch) -> Predictions:
    logits = copying_logits(microbatch.input_ids).flatten(0, 1)[microbatch.masked_positions]
    loss = F.cross_entropy(logits, microbatch.labels, reduction="sum", ignore_index=-100)
    return Predictions(loss, (logits.argmax(-1) == microbatch.labels).sum())


def test_scores_are_exact_at_any_microbatch_size(heldout_corpus: Path) -> None:
    """Catches means of means, fillers that count, and scores that depend on the microbatch size or packing."""
    scores = [
        evaluate(held_out(heldout_corpus, MicrobatchLayout(40, tokens, rows)), predict)
        for tokens, rows in ((40, "packed"), (400, "packed"), (4000, "padded"), (400, "flat"))
    ]
    first = scores[0]
    assert first.masked_tokens > 50
    right = first.accuracy * first.masked_tokens
    assert right == pytest.approx(round(right))
    # The prediction is right where a masked token was kept, a tenth of the time.
    wrong_loss, right_loss = math.log(math.exp(3) + 199), math.log(math.exp(3) + 199) - 3
    assert first.loss == pytest.approx(
        (right * right_loss + (first.masked_tokens - right) * wrong_loss) / first.masked_tokens
    )
    assert first.perplexity == pytest.approx(math.exp(first.loss))
    for other in scores[1:]:
        assert other == pytest.approx(first, rel=1e-6)


def test_one_rank_uses_no_process_group(heldout_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `deepcloze.evaluate` in one rank of a caller's process group that waits for the others forever."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: pytest.fail("waits for other ranks"))
    evaluate(held_out(heldout_corpus, MicrobatchLayout(40, 400)), predict)


def test_masks_depend_only_on_the_seed(heldout_corpus: Path) -> None:
    """Catches scores that are not comparable within a run, and a seed that is ignored."""
    layout = MicrobatchLayout(40, 400)
    again = [evaluate(held_out(heldout_corpus, layout, seed), predict) for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_a_corpus_without_masked_tokens_has_no_scores(heldout_corpus: Path) -> None:
    """Catches NaN in metrics.jsonl, or a division by zero at the end of a long run."""

    def nothing(microbatch: Microbatch) -> Predictions:
        return Predictions(torch.zeros(()), torch.zeros((), dtype=torch.int64))

    held = held_out(heldout_corpus, MicrobatchLayout(40, 400))
    maker = replace(held.maker, masking_schedule=MaskingSchedule((1e-9,), "stepped", steps=1))
    held = replace(held, maker=maker)
    assert evaluate(held, nothing).masked_tokens == 0
    assert HeldOutEvaluator({"held": held}).metrics(nothing, torch.device("cpu")) == {
        "eval/held/loss": None,
        "eval/held/perplexity": None,
        "eval/held/accuracy": None,
    }


@pytest.fixture
def folder(tmp_path: Path, wordpiece: Path) -> Path:
    """A Hugging Face folder that is not from a run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    BertForMaskedLM(BertConfig(vocab_size=200, max_position_embeddings=48, **sizes)).save_pretrained(tmp_path / "m")
    save_tokenizer(load_tokenizer(wordpiece), tmp_path / "m")
    return tmp_path / "m"


def test_the_table_has_the_accuracy_of_other_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches per cent in one place where training and --json have a fraction."""
    evaluate_module._print({"held": Scores(3.77, 43.39, 0.35954, 13_253)}, {}, as_json=False)
    assert "│   0.3595 │" in capsys.readouterr().out


def test_corpora_of_the_same_name(
    folder: Path,
    heldout_corpus: Path,
    wordpiece_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches the scores of one corpus under the name of another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(heldout_corpus, "old/held")
    shutil.copytree(wordpiece_corpus, "held")
    for names in ("old/held,held", "held,old/held"):
        evaluate_command(str(folder), names, as_json=True)
        assert set(json.loads(capsys.readouterr().out)) == {"old/held", f"{tmp_path.name}/held"}


def test_evaluate_scores_any_hugging_face_folder(
    folder: Path, heldout_corpus: Path, wordpiece_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that accepts only runs, sequences longer than the model's positions, output besides the JSON,
    and scores that are not those of the model in the folder."""
    evaluate_command(str(folder), f"{heldout_corpus},{wordpiece_corpus}", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {heldout_corpus.name, wordpiece_corpus.name}
    for scores in printed.values():
        assert set(scores) == {"loss", "perplexity", "accuracy", "masked_tokens", "masks"}
        assert scores["masks"] == {"seed": 42, "unit": "token", "rate": 0.15, "max_seq_length": 48}

    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    held = held_out(heldout_corpus, MicrobatchLayout(48, 48, kind="padded"))
    loss_sum = 0.0
    for step in range(held.batches):
        for micro in held.maker[step].microbatches:
            used, real = int((micro.segments[0] > 0).sum()), micro.labels >= 0
            with torch.inference_mode():
                logits = model(input_ids=micro.input_ids[:1, :used]).logits[0]
            loss = F.cross_entropy(logits[micro.masked_positions[real]], micro.labels[real], reduction="sum")
            loss_sum += float(loss)
    found = printed[heldout_corpus.name]
    assert loss_sum / found["masked_tokens"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_checkpoint_is_scored_as_its_run_scores_it(
    folder: Path, heldout_corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint that is scored with another masking unit or rate than its run, scores that do not say which
    masks they are for, and an import of DeepSpeed for the masking unit."""
    monkeypatch.setitem(sys.modules, "pretrain.resolve", None)  # imports DeepSpeed
    folder = folder.rename(folder.with_name("hf"))
    masking = {"unit": "span", "rate": [0.5, 0.3], "schedule": "linear"}
    config = {"masking": masking, "run": {"seed": 7}, "batch": {"max_seq_length": 40}}
    (folder.parent / "state.json").write_text(json.dumps({"identity": {}, "config": config}))
    mark_complete(folder.parent)
    evaluate_command(str(folder), str(heldout_corpus), as_json=True)
    found = json.loads(capsys.readouterr().out)[heldout_corpus.name]
    evaluate_command(str(folder), str(heldout_corpus))
    assert "masks: seed 7, unit span, rate 0.3, max_seq_length 40\n" in capsys.readouterr().err
    masked = {}
    for unit in ("token", "span"):
        held = held_out(heldout_corpus, MicrobatchLayout(40, 400), seed=7, masking=MaskingConfig(rate=0.3, unit=unit))
        masked[unit] = sum(held.maker[step].masked_tokens for step in range(held.batches))
    assert found["masked_tokens"] == masked["span"] != masked["token"]


def test_a_model_is_scored_with_the_masks_of_a_run_that_continues_it(
    folder: Path, heldout_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches perplexities before and after a run that are not comparable, because the masks of its base differ."""
    checkpoint = checkpoint_path(tmp_path / "run" / "checkpoints", 1)
    shutil.copytree(folder, checkpoint / "hf")
    masking = {"unit": "span", "rate": 0.3}
    config = {"masking": masking, "run": {"seed": 7}, "batch": {"max_seq_length": 40}}
    (checkpoint / "state.json").write_text(json.dumps({"identity": {}, "config": config}))
    mark_complete(checkpoint)
    evaluate_command(str(tmp_path / "run"), str(heldout_corpus), as_json=True)
    of_run = json.loads(capsys.readouterr().out)
    evaluate_command(str(folder), str(heldout_corpus), as_json=True, masks_of=str(tmp_path / "run"))
    assert json.loads(capsys.readouterr().out) == of_run  # the models are the same
    with pytest.raises(UserError, match=r"^--masks_of: .*m is not a pretraining run or a checkpoint of one$"):
        evaluate_command(str(tmp_path / "run"), str(heldout_corpus), masks_of=str(folder))


def test_an_evaluation_of_a_run_names_its_best_checkpoint(
    folder: Path, heldout_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an overfitted model that is measured without a word."""
    for step in (1, 2):
        shutil.copytree(folder, checkpoint_path(tmp_path / "run" / "checkpoints", step) / "hf")
        mark_complete(checkpoint_path(tmp_path / "run" / "checkpoints", step))
    write_best(tmp_path / "run" / "checkpoints", 1)
    evaluate_command(str(tmp_path / "run"), str(heldout_corpus), as_json=True)
    assert capsys.readouterr().err.endswith(f"the best one is step 1: {tmp_path}/run/checkpoints/best\n")


def test_nothing_is_left_of_a_killed_evaluation(
    folder: Path, heldout_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an index in a temporary folder, of a corpus that is read-only, that nothing removes after SIGKILL."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    corpus = Path(shutil.copytree(heldout_corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("index")))
    monkeypatch.setattr(sequences.os, "access", lambda *_: False)
    before = set(tmp_path.iterdir())
    during: list[set[Path]] = []
    score = HeldOutEvaluator.evaluate

    def look(self: HeldOutEvaluator, *arguments: Any, **options: Any) -> dict[str, Scores]:
        during.append(set(tmp_path.iterdir()))
        return score(self, *arguments, **options)

    monkeypatch.setattr(HeldOutEvaluator, "evaluate", look)
    evaluate_command(str(folder), str(corpus), as_json=True)
    assert during == [before]


def test_json_has_null_where_nothing_was_masked(
    folder: Path, heldout_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches NaN in the output, which is not JSON."""
    folder = folder.rename(folder.with_name("hf"))
    config = {"masking": {"rate": 1e-9}, "run": {"seed": 7}, "batch": {"max_seq_length": 40}}
    (folder.parent / "state.json").write_text(json.dumps({"identity": {}, "config": config}))
    mark_complete(folder.parent)
    evaluate_command(str(folder), str(heldout_corpus), as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[heldout_corpus.name]
    assert found.pop("masks") == {"seed": 7, "unit": "token", "rate": 1e-9, "max_seq_length": 40}
    assert found == {"loss": None, "perplexity": None, "accuracy": None, "masked_tokens": 0}


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertModel])
def test_evaluate_rejects_a_folder_without_a_masked_lm_head(
    folder: Path, heldout_corpus: Path, kind: type[PreTrainedModel]
) -> None:
    """Catches scores of a randomly initialized head, for a classifier or an encoder."""
    kind.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match=r"has no masked-LM head: its weights lack cls\.predictions"):
        evaluate_command(str(folder), str(heldout_corpus))


@pytest.mark.parametrize(("state", "is_checkpoint"), [('{"config": {"mask', True), ('{"version": 4}', False)])
def test_another_state_json_beside_a_model(
    folder: Path, heldout_corpus: Path, capsys: pytest.CaptureFixture[str], state: str, is_checkpoint: bool
) -> None:
    """Catches a trace for a damaged checkpoint, or for a file of another program that is named as a checkpoint's."""
    (folder.parent / "state.json").write_text(state)
    if is_checkpoint:
        mark_complete(folder.parent)
        with pytest.raises(UserError, match=r"state\.json is damaged: it is not JSON"):
            evaluate_command(str(folder), str(heldout_corpus), as_json=True)
    else:
        evaluate_command(str(folder), str(heldout_corpus), as_json=True)
        assert json.loads(capsys.readouterr().out)[heldout_corpus.name]["masked_tokens"] > 0


def test_evaluate_rejects_invalid_input(
    folder: Path, byte_level_corpus: Path, tmp_path: Path, heldout_corpus: Path
) -> None:
    """Catches traces, and scores on token ids of another tokenizer."""
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_command(str(folder), str(byte_level_corpus))
    with pytest.raises(UserError, match="no corpus to evaluate on"):
        evaluate_command(str(folder), ",")
    with pytest.raises(UserError, match="names a corpus twice"):
        evaluate_command(str(folder), f"{heldout_corpus},{heldout_corpus}/")
    with pytest.raises(UserError, match="nowhere"):
        evaluate_command(str(tmp_path / "nowhere"), str(heldout_corpus))


@pytest.mark.parametrize("step", ["load_tokenizer", "resolve_model_config", "build_model"])
def test_a_checkpoint_that_its_run_deletes_meanwhile(
    folder: Path, heldout_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Catches a traceback, and a mistake in `model.init_from`, a key that the command does not have."""
    checkpoint = checkpoint_path(tmp_path / "run" / "checkpoints", 1)
    shutil.copytree(folder, checkpoint / "hf")
    mark_complete(checkpoint)
    write_best(checkpoint.parent, 1)
    wrapped = getattr(evaluate_module, step)

    def call_late(*arguments: Any, **options: Any) -> Any:
        discard(checkpoint)
        return wrapped(*arguments, **options)

    monkeypatch.setattr(evaluate_module, step, call_late)
    with pytest.raises(UserError, match=rf"^{checkpoint}/hf was deleted while it was read: .*; run the command again$"):
        evaluate_command(str(checkpoint.parent / "best"), str(heldout_corpus), as_json=True)


def test_evaluate_rejects_a_damaged_corpus(folder: Path, heldout_corpus: Path, tmp_path: Path) -> None:
    """Catches scores of text that is not what was built."""
    damaged = Path(shutil.copytree(heldout_corpus, tmp_path / "damaged"))
    (shard,) = damaged.glob("data-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard} is damaged: its SHA-256 is "):
        evaluate_command(str(folder), str(damaged), as_json=True)
