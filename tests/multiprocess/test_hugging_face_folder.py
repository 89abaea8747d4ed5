"""The hf/ folder of a checkpoint opens in transformers without our code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM

from experiment.run_files.checkpoints import checkpoint_path, read_state
from finetune.export.command import export_command
from finetune.options import ExportOptions
from pretrain.corpus.reader import open_corpus
from rank_pool import RankPool
from runs import TINY, Tree, pretrain_case, run_config, saved_tensors

# Run in a process that does not import our code.
_READER = """
import json, sys
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

found = {}
for number, folder in enumerate(sys.argv[2:]):
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("de fi go lu mar", return_tensors="pt")
    with torch.inference_mode():
        torch.save((text["input_ids"], model.eval()(**text).logits), f"{sys.argv[1]}/{number}.pt")
    _, classifier = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    found[folder] = {
        "problems": [sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "dtype": str(model.dtype),
        "mask": tokenizer.mask_token,
        "fresh": sorted(classifier["missing_keys"]),
    }
ours = [name for name in sys.modules if name.split(".")[0] in ("pretrain", "experiment", "deepspeed")]
print(json.dumps({"found": found, "ours": ours}))
"""

# `test_ema.py` compares the weights of `hf/` at other layouts.
RUNS = [
    (3, "fp32_zero3", TINY | {"tie_word_embeddings": False}),
    (
        2,
        "bf16_zero1",
        {"model_type": "modernbert", "local_attention": 16}
        | {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    ),
]


@pytest.fixture(scope="module")
def folders(pools: dict[int, RankPool], wordpiece_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint of each of RUNS."""
    made = []
    for world_size, ds_config, model in RUNS:
        folder = tmp_path_factory.mktemp("run")
        tree = run_config(folder, wordpiece_corpus, ds_config, model__config=model, schedule__steps=1)
        assert set(pools[world_size].run(pretrain_case, tree)) == {"done"}
        made.append(checkpoint_path(folder / "checkpoints", 1))
    return made


def test_transformers_computes_the_logits_of_the_master_weights(folders: list[Path], tmp_path: Path) -> None:
    """Catches weights that are rounded, sharded or renamed, tied weights that are lost, and a missing tokenizer."""
    hf = [str(folder / "hf") for folder in folders]
    command = [sys.executable, "-c", _READER, str(tmp_path), *hf]
    read = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    report: Tree = json.loads(read.stdout.splitlines()[-1])
    assert report["ours"] == []
    for number, (folder, run) in enumerate(zip(folders, RUNS, strict=True)):
        found = report["found"][str(folder / "hf")]
        assert found["problems"] == [[], [], []], run
        assert found["dtype"] == "torch.float32", run
        assert found["mask"] == "[MASK]", run
        assert found["fresh"], "a classifier has a new head"
        assert all("classifier" in name or "pooler" in name or "head" in name for name in found["fresh"]), run

        ids, logits = torch.load(tmp_path / f"{number}.pt")
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder / "hf"))
        masters = saved_tensors(folder)
        with torch.inference_mode():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[f"model.{name}/fp32"].view(parameter.shape))
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-6)
        if "bf16" in run[1]:
            assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters()), "masters are rounded"


def test_an_exported_encoder_has_a_card(
    pools: dict[int, RankPool],
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an export without a card, one that needs the run or the corpora, that has held-out figures of another
    step or the user's paths, and a snippet that does not run."""
    tree = run_config(
        tmp_path / "run",
        wordpiece_corpus,
        corpus__eval={"held": str(heldout_corpus)},
        evaluation__every_steps=2,
        schedule__steps=4,
        checkpoint__every_steps=3,
        model__ema_decay=0.9,
    )
    assert pools[2].run(pretrain_case, tree) == ["done", "done"]
    copy, encoder = tmp_path / "copy", tmp_path / "encoder"
    shutil.copytree(checkpoint_path(tmp_path / "run" / "checkpoints", 3), copy)
    shutil.move(tmp_path / "run", tmp_path / "gone")
    export_command(ExportOptions(checkpoint=str(copy), output=str(encoder)))
    card = (encoder / "README.md").read_text(encoding="utf-8")

    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["pipeline_tag"], front["library_name"]) == ("fill-mask", "transformers")
    events = [json.loads(line) for line in (tmp_path / "gone" / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [event for event in events if event["step"] == 2 and "eval/held/loss" in event]
    (result,) = front["model-index"][0]["results"]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {
        name: pytest.approx(evaluation[f"eval/held/{name}"], abs=1e-5) for name in ("loss", "perplexity", "accuracy")
    }
    assert "Evaluated at step 2." in card
    corpus = open_corpus(wordpiece_corpus)
    seen = next(event["tokens"] for event in events if event["step"] == 3)
    of_epoch = read_state(copy)["tokens_per_epoch"][corpus.name]
    assert of_epoch > corpus.tokens, "special tokens"
    epochs = f"{seen / of_epoch:.2f}"
    counts = f"{corpus.documents:,} | {corpus.tokens:,} | {corpus.fingerprint}"
    assert f"| {corpus.name} | {counts} | {corpus.manifest.recipe.source} | 100.0% | {seen:,} | {epochs} |" in card
    assert open_corpus(heldout_corpus).fingerprint in card
    assert f"| tokens | {seen:,} |" in card
    assert "| 2 | 1 | " in card, "ranks and hosts"
    assert "/" + tmp_path.parts[1] not in card

    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(encoder)
    capsys.readouterr()
    exec(snippet, {})
    assert len(capsys.readouterr().out.splitlines()) == 5

    export_command(ExportOptions(checkpoint=str(copy / "hf-ema"), output=str(tmp_path / "average")))
    averaged = (tmp_path / "average" / "README.md").read_text(encoding="utf-8")
    assert "with the weights that are not averaged" in averaged
    assert "model-index" not in averaged
