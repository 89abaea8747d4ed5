"""The hf/ folder of a checkpoint opens in transformers without our code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from experiment.checkpoints import checkpoint_path
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

RUNS = [
    (1, "fp32_zero0", TINY),
    (2, "fp32_zero1", TINY),
    (2, "bf16_zero2", TINY),
    (3, "fp32_zero3", TINY),
    (2, "bf16_zero3", TINY | {"tie_word_embeddings": False}),
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
        tree = run_config(folder, wordpiece_corpus, ds_config, model__config=model, schedule__steps=2)
        assert set(pools[world_size].run(pretrain_case, tree)) == {"done"}
        made.append(checkpoint_path(folder / "checkpoints", 2))
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
