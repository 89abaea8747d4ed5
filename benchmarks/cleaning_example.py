"""Clean movie reviews with planted duplicates, spam and test sentences, then build, pretrain and fine-tune.

    python -m benchmarks.cleaning_example --reviews imdb/unsup.tsv.gz --glue glue --tokenizer bert-base-uncased

Prints how many of the planted documents each step finds, and how many reviews it takes besides; the reviews have
duplicates of their own. Then a small model trains for 200 steps on what is left, and is fine-tuned on SST-2.
"""

import csv
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fire
import yaml

from benchmarks.measuring import describe_machine
from pretrain.cleaning.parts import read_documents

_COPIES = 300  # of each kind
_REPAIRED = " It’s a cliché."
_BROKEN = _REPAIRED.encode().decode("cp1252")
_STEPS = {
    "ftfy": {},
    "gopher_repetition": {},
    "exact_dedup": {},
    "minhash": {},
    "decontaminate": {"against": ["sst2.yaml", "cola.yaml"]},
}
_MODEL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}


def cleaning_example(reviews: str, glue: str, tokenizer: str, documents: int = 20_000) -> None:
    """Run the commands, and print what they found.

    Args:
        reviews: IMDb reviews, a .tsv.gz with a column `text`
        glue: folder with the folders CoLA and SST-2
        tokenizer: Hugging Face tokenizer folder
        documents: reviews that are read
    """
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="deepcloze-cleaning-") as name:
        folder = Path(name)
        (folder / "data").symlink_to(Path(glue).absolute())
        planted = _plant(folder / "reviews.jsonl", _read(Path(reviews), documents), _evaluated(Path(glue)))
        _write_configs(folder)
        _deepcloze(folder, "clean", "--config=clean.yaml")
        _print_found(folder / "clean", planted)
        source = ["--source=clean", f"--tokenizer={Path(tokenizer).absolute()}", "--output=corpora/reviews"]
        _deepcloze(folder, "corpus", *source, "--holdout=200")
        _deepcloze(folder, "pretrain", "--config=pretrain.yaml")
        _deepcloze(folder, "finetune", "--config=sst2.yaml")


def _read(path: Path, count: int) -> list[str]:
    csv.field_size_limit(1 << 24)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [re.sub(r"\s*<br />\s*", " ", row["text"]) for _, row in zip(range(count), rows, strict=False)]


def _evaluated(glue: Path) -> list[str]:
    """Return the validation sentences of CoLA and SST-2 with at least five words: shorter ones occur anywhere. Those of
    SST-2, which are tokenized, get the spaces that reviews have."""
    cola = [line.split("\t")[3] for line in (glue / "CoLA/dev.tsv").read_text(encoding="utf-8").splitlines()]
    sst2 = [line.split("\t")[0] for line in (glue / "SST-2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    natural = [re.sub(r" (?=n't\b|'\w|[.,;:!?)])|(?<=\() ", "", text) for text in sst2]
    return [text for text in (*cola, *natural) if len(re.findall(r"\w+(?:['’]\w+)*", text)) >= 5]


def _plant(path: Path, reviews: list[str], evaluated: list[str]) -> Counter[str]:
    """Write the reviews and what is planted among them, after the originals of copies. Returns the number by kind."""
    generator = random.Random(0)
    long = [review for review in dict.fromkeys(reviews) if len(review.split()) > 150]
    words = sorted({word for review in reviews[:1000] for word in review.split()})
    planted: list[tuple[str, str]] = []
    for number, review in enumerate(generator.sample(long, 4 * _COPIES)):
        kind = ("exact copy", "near copy", "leak", "mojibake")[number % 4]
        if kind == "near copy":
            review += f" {' '.join(generator.choices(words, k=8))}"
        elif kind == "leak":
            middle = review.index(" ", len(review) // 2)
            review = f"{' '.join(generator.choices(words, k=150))} {generator.choice(evaluated)}{review[middle:]}"
        elif kind == "mojibake":
            review = f"{' '.join(generator.choices(words, k=150))}{_BROKEN}"
        planted.append((kind, review))
    planted += [("spam", f"{word}! Click here to buy it now. " * 30) for word in generator.choices(words, k=_COPIES)]
    with path.open("w", encoding="utf-8") as file:
        for kind, text in (*(("review", review) for review in reviews), *planted):
            file.write(json.dumps({"text": text, "kind": kind}) + "\n")
    return Counter(kind for kind, _ in planted) + Counter(review=len(reviews))


def _write_configs(folder: Path) -> None:
    tasks = {
        name: yaml.safe_load((Path(__file__).parents[1] / f"finetune/recipes/{name}.yaml").read_text(encoding="utf-8"))
        for name in ("sst2", "cola")
    }
    tasks["sst2"]["training"] |= {"lr": 3e-4, "epochs": 1, "seeds": [1]}
    tasks["sst2"]["model"]["init_from"] = "runs/reviews"
    configs = tasks | {
        "clean": {
            "source": "reviews.jsonl",
            "output": "clean",
            "metadata": ["kind"],
            "steps": [{name: keys} for name, keys in _STEPS.items()],
        },
        "pretrain": {
            "run": {"dir": "runs/reviews"},
            "corpus": {"train": "corpora/reviews", "eval": {"heldout": "corpora/reviews-heldout"}},
            "model": {"config": {"model_type": "bert", "max_position_embeddings": 128, **_MODEL}},
            "batch": {"sequences": 64, "max_seq_length": 128, "microbatch_tokens": 4096},
            "optimizer": {"lr": 5e-4},
            "schedule": {"steps": 200, "warmup_steps": 20},
            "engine": {"ds_config": "fp32_zero1"},
        },
    }
    for name, tree in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _deepcloze(folder: Path, *arguments: str) -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "launcher", *arguments], cwd=folder, check=True)
    print(f"deepcloze {' '.join(arguments)}: {time.monotonic() - start:.0f} s\n", flush=True)


def _print_found(clean: Path, planted: Counter[str]) -> None:
    kept = [document for path in sorted(clean.glob("*.jsonl.zst")) for document in read_documents(path)]
    for kind, count in planted.items():
        left = sum(document.metadata["kind"] == kind for document in kept)
        print(f"{kind}: {count - left:,} of {count:,} dropped")
    repaired = sum(found.metadata["kind"] == "mojibake" and found.text.endswith(_REPAIRED) for found in kept)
    print(f"mojibake: {repaired:,} repaired", flush=True)


if __name__ == "__main__":
    fire.Fire(cleaning_example)
