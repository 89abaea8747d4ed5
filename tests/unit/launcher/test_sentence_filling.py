"""`deepcloze report` on a run with checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from experiment.run_files.checkpoints import mark_complete
from experiment.run_files.fillings import FilledSentence, MaskedSentence, read_fillings
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher import sentence_filling
from launcher.report import report_runs
from launcher.sentence_filling import choose_sentences, fill_new_checkpoints
from pretrain.corpus.added_tokens import extend_tokenizer
from pretrain.corpus.reader import open_corpus


@pytest.fixture
def run(tmp_path: Path, heldout_corpus: Path) -> RunFolder:
    """A run that has saved one checkpoint."""
    folder = open_run_folder(tmp_path / "run")
    corpus = shutil.copytree(heldout_corpus, tmp_path / "corpus")
    folder.config.write_text(f"corpus:\n  eval:\n    held_out: {corpus}\n")
    folder.metrics.write_text('{"step": 10, "loss": 3.0}\n')
    save_checkpoint(folder, 10, heldout_corpus / "tokenizer")
    return folder


def save_checkpoint(folder: RunFolder, step: int, tokenizer: Path, longest: int | None = None) -> None:
    loaded = load_tokenizer(tokenizer)
    if longest is not None:
        loaded.model_max_length = longest
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(step)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(loaded), **sizes))
    model.save_pretrained(folder.checkpoints / f"step-{step:08d}" / "hf")
    loaded.save_pretrained(folder.checkpoints / f"step-{step:08d}" / "hf")
    mark_complete(folder.checkpoints / f"step-{step:08d}")


@pytest.mark.usefixtures("empty_charts")
@pytest.mark.parametrize("longest", [None, 16])
def test_each_checkpoint_is_filled_once(
    run: RunFolder, tmp_path: Path, heldout_corpus: Path, longest: int | None
) -> None:
    """Catches other sentences for each checkpoint, sentences that are longer than the model reads, work that is done
    again, and fillings that go with a checkpoint."""
    threads = torch.get_num_threads()
    shutil.rmtree(run.checkpoints)
    save_checkpoint(run, 10, heldout_corpus / "tokenizer", longest)
    report_runs([str(run.path)], None)
    (first,) = read_fillings(run)
    assert first.step == 10
    assert len(first.sentences) == 10
    for filled in first.sentences:
        assert filled.sentence.answer.isalpha()
        probabilities = [probability for _, probability in filled.top]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
    written = run.fillings.read_bytes()
    shutil.rmtree(tmp_path / "corpus")  # the sentences are kept with the fillings
    fill_new_checkpoints(run)
    assert run.fillings.read_bytes() == written
    save_checkpoint(run, 20, run.checkpoints / "step-00000010" / "hf")
    shutil.rmtree(run.checkpoints / "step-00000010")
    page = report_runs([str(run.path)], None).read_text(encoding="utf-8")
    kept, second = read_fillings(run)
    assert kept == first
    assert [filled.sentence for filled in second.sentences] == [filled.sentence for filled in first.sentences]
    assert second.sentences != first.sentences
    assert "step 10</td>" in page
    assert "step 20</td>" in page
    assert torch.get_num_threads() == threads


def test_a_second_report_fills_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reports that each fill six more of a hundred checkpoints, and one that ignores new checkpoints."""
    sentence = FilledSentence(MaskedSentence("a ", "b", " c"), (("b", 0.5),))
    monkeypatch.setattr(sentence_filling, "_fill", lambda model, sentences: [sentence])
    for step in range(20, 80, 10):
        shutil.copytree(run.checkpoints / "step-00000010", run.checkpoints / f"step-{step:08d}")
    fill_new_checkpoints(run)
    steps = [found.step for found in read_fillings(run)]
    assert len(steps) == 6
    assert (steps[0], steps[-1]) == (10, 70)
    fill_new_checkpoints(run)
    assert [found.step for found in read_fillings(run)] == steps
    shutil.copytree(run.checkpoints / "step-00000010", run.checkpoints / "step-00000080")
    fill_new_checkpoints(run)
    assert read_fillings(run)[-1].step == 80


@pytest.mark.usefixtures("empty_charts")
def test_a_report_does_not_need_fillings(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a report that fails for a run without held-out text, or whose corpus or checkpoint is missing."""
    run.config.write_text("corpus: {eval: {}}\n")
    assert report_runs([str(run.path)], None) == run.report / "index.html"
    assert capsys.readouterr().err == ""
    run.config.write_text("corpus: {eval: {wiki: missing}}\n")
    assert report_runs([str(run.path)], None) == run.report / "index.html"
    assert "report: no held-out sentences: " in capsys.readouterr().err
    assert not read_fillings(run)


@pytest.mark.usefixtures("empty_charts")
def test_a_checkpoint_that_is_being_copied(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a checkpoint without its model, or half of its checksums, that keeps the others from being filled."""
    save_checkpoint(run, 20, run.checkpoints / "step-00000010" / "hf")
    (run.checkpoints / "step-00000010" / "hf" / "model.safetensors").unlink()
    save_checkpoint(run, 30, run.checkpoints / "step-00000020" / "hf")
    (run.checkpoints / "step-00000030" / "COMPLETE").write_text("{")
    assert report_runs([str(run.path)], None) == run.report / "index.html"
    assert [found.step for found in read_fillings(run)] == [20]
    assert "report: no fillings of step-00000010: " in capsys.readouterr().err


def test_several_runs_share_a_folder(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page about several runs in the folder of one of them."""
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run.path, tmp_path / "other")
    assert report_runs([str(run.path), str(other)], None) == tmp_path / "report" / "index.html"
    assert report_runs([str(run.path), "other"], "page") == tmp_path / "page" / "index.html"
    assert report_runs([str(run.path)], "one") == tmp_path / "one" / "index.html"
    assert not run.report.exists()
    with pytest.raises(UserError, match="no run folder"):
        report_runs(["missing"], None)


@pytest.mark.parametrize("corpus", ["heldout_corpus", "byte_level_corpus"])
def test_sentences_can_be_put_together_again(corpus: str, request: pytest.FixtureRequest) -> None:
    """Catches a masked part of a word, and a space that is lost before it."""
    opened = open_corpus(request.getfixturevalue(corpus))
    tokenizer = load_tokenizer(opened.tokenizer_path)
    lengths = np.concatenate(list(opened.document_lengths())).astype(np.int64)[:200]
    starts = np.cumsum(lengths) - lengths
    texts = [opened.read(starts[at : at + 1], lengths[at : at + 1]) for at in range(len(lengths))]
    given = [(text, None) for text in texts]
    sentences = choose_sentences(iter(given), tokenizer)
    assert len(set(sentences)) == len(sentences) == 10
    assert choose_sentences(iter(given), tokenizer) == sentences
    for sentence in sentences:
        whole = sentence.before + sentence.answer + sentence.after
        assert any(tokenizer.decode(text.tolist()).startswith(whole) for text in texts)
        assert not sentence.before or sentence.before[-1:] == " "
        assert not sentence.after[:1].isalnum()


@pytest.fixture
def chinese(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each character, and two for "python"."""
    characters = "我们支持手机，他说的对。很好"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "py", "##thon"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    return load_tokenizer(tmp_path)


def test_a_word_of_a_chinese_sentence_is_masked(chinese: PreTrainedTokenizerFast) -> None:
    """Catches one of the two characters of a Chinese word that is masked, words that are never masked because they have
    several characters, and spaces between characters."""
    ids = np.array(chinese("我们支持手机，他说的对。", add_special_tokens=False)["input_ids"], dtype=np.int32)
    starts = np.array([number in (0, 2, 4, 6, 7, 8, 9, 10, 11) for number in range(len(ids))])
    sentences = choose_sentences(iter([(ids, starts)] * 100), chinese)
    assert {f"{sentence.before}[{sentence.answer}]{sentence.after}" for sentence in sentences} == {
        "[我们]支持手机，他说的对。",
        "我们[支持]手机，他说的对。",
        "我们支持[手机]，他说的对。",
        "我们支持手机，[他]说的对。",
        "我们支持手机，他[说]的对。",
        "我们支持手机，他说[的]对。",
        "我们支持手机，他说的[对]。",
    }


def test_an_added_word_of_a_chinese_sentence_is_masked(chinese: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Catches words that were added to the tokenizer and are shown with spaces inside, or never masked."""
    chinese.save_pretrained(tmp_path / "old")
    (tmp_path / "words.txt").write_text("支持\n手机\n")
    extend_tokenizer(tmp_path / "old", tmp_path / "words.txt", tmp_path / "new")
    extended = load_tokenizer(tmp_path / "new")
    ids = np.array(extended("支持他说我们的手机，很好。", add_special_tokens=False)["input_ids"], dtype=np.int32)
    sentences = choose_sentences(iter([(ids, np.ones(len(ids), dtype=np.bool_))] * 100), extended)
    assert {sentence.before + sentence.answer + sentence.after for sentence in sentences} == {
        "支持他说我们的手机，很好。"
    }
    assert {sentence.answer for sentence in sentences} == {"支持", *"他说我们的", "手机", *"很好"}


def test_a_word_of_pieces_is_not_masked(chinese: PreTrainedTokenizerFast) -> None:
    """Catches a Latin word of two tokens, whose fillings would be pieces in a row, such as "py##thon"."""
    ids = np.array(chinese("他说python很好。", add_special_tokens=False)["input_ids"], dtype=np.int32)
    starts = np.array([number != 3 for number in range(len(ids))])
    answers = {sentence.answer for sentence in choose_sentences(iter([(ids, starts)] * 50), chinese)}
    assert answers == {"他", "说", "很", "好"}


def test_a_word_of_several_tokens_is_filled(chinese: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Catches one mask in place of a word of two characters, probabilities of a part of it, and words that are missing
    because another first character is more probable."""
    folder = open_run_folder(tmp_path / "run")
    chinese.save_pretrained(tmp_path / "hf")
    save_checkpoint(folder, 10, tmp_path / "hf")
    sentences = [MaskedSentence("我们支持", "手机", "，他说的对。"), MaskedSentence("我们支持手机，他说", "的", "对。")]
    two, one = sentence_filling._fill(folder.checkpoints / "step-00000010" / "hf", sentences)
    for filled in (two, one):
        assert len({word for word, _ in filled.top}) == 5
        probabilities = [probability for _, probability in filled.top]
        assert probabilities == sorted(probabilities, reverse=True)
    assert all(probability < one.top[-1][1] for _, probability in two.top)
    first = [{"token": "手", "probability": 0.6}, {"token": "很", "probability": 0.4}]
    second = [{"token": "机", "probability": 0.7}, {"token": "好", "probability": 0.2}]
    assert sentence_filling._best_words([first, second]) == (
        ("手机", 0.42),
        ("很机", 0.28),
        ("手好", 0.12),
        ("很好", 0.08),
    )


def test_a_word_that_is_cut_off_is_not_masked(chinese: PreTrainedTokenizerFast) -> None:
    """Catches a sentence that ends in a part of a word, because it is long."""
    ids = np.array(chinese("我们支持手机，他说", add_special_tokens=False)["input_ids"], dtype=np.int32)
    starts = np.array([number in (0, 8) for number in range(len(ids))])
    assert choose_sentences(iter([(ids, starts)] * 10), chinese) == []


@pytest.mark.usefixtures("empty_charts")
def test_all_runs_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `report runs` that fails for a run that has not started or a task that is not trained, or counts its own
    page as a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        open_run_folder(Path("runs") / name).metrics.write_text('{"step": 10, "loss": 3.0}\n')
    open_run_folder(Path("runs/new")).metrics.touch()
    zero_shot = open_run_folder(Path("runs/zero-shot"))
    zero_shot.metrics.touch()
    score = {"values": [0.5], "mean": 0.5, "std": None, "median": 0.5}
    results = {"task": "t", "init": "m", "metric": "accuracy", "splits": {"test": {"accuracy": score}}}
    zero_shot.results.write_text(json.dumps(results))
    for _ in range(2):
        page = report_runs(["runs"], None)
        assert page == tmp_path / "runs/report/index.html"
        text = page.read_text(encoding="utf-8")
        assert "<h1>3 runs</h1>" in text
        assert 'data-run="zero-shot"' in text
        assert 'data-run="a"' in text
        assert 'data-run="new"' not in text
    assert report_runs(["runs", "runs/a"], None) == tmp_path / "report/index.html"
    sweep = open_run_folder(Path("sweeps/lr")).path
    (sweep / "sweep.json").write_text(json.dumps({"metric": "loss", "runs": {"lr=1": {}, "lr=2": {}}}))
    open_run_folder(sweep / "lr=1").metrics.write_text('{"step": 10, "loss": 3.0}\n')
    assert report_runs([str(sweep), "runs/a"], None) == tmp_path / "report/index.html", "lr=2 has no folder yet"
    capsys.readouterr()
    assert report_runs(sorted(map(str, Path("runs").iterdir())), None) == tmp_path / "report/index.html"
    without = [f"deepcloze: runs/{name} is left out: no run in it has logged anything" for name in ("new", "report")]
    assert capsys.readouterr().err.splitlines() == without
    open_run_folder(Path("none/new")).lock.touch()
    with pytest.raises(UserError, match="none has nothing to report: no run in it has logged anything"):
        report_runs(["none"], None)
