"""Small files of the names that README and docs use: text, tasks, models."""

import csv
import gzip
import json
import random
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer

from experiment.models.tokenizer import save_tokenizer
from runs import TINY

CHINESE = "我们在图书馆里学习自然语言处理的新方法今天气很好"


def write_model(folder: Path, tokenizer: Path | Iterable[str]) -> None:
    """A Hugging Face folder like one that is downloaded, small. `tokenizer`: a folder, or the words of a vocabulary."""
    folder.mkdir(parents=True)
    if isinstance(tokenizer, Path):
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    else:
        entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokenizer]
        (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
        loaded = BertTokenizer(str(folder / "vocab.txt"))
    config = AutoConfig.for_model(**TINY | {"max_position_embeddings": 512}, vocab_size=len(loaded))
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    save_tokenizer(loaded, folder)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_table(path: Path, header: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> None:
    """CSV, or TSV without quoting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **kind)  # type: ignore[arg-type]
        writer.writerows([header] if header else [])
        writer.writerows(rows)


def write_task(folder: Path, texts: Sequence[str], word: str) -> None:
    """train.csv, test.csv and new.csv: does a text contain this word?"""
    rows = [(text, "yes" if word in text else "no") for text in texts[:90]]
    write_table(folder / "train.csv", ("text", "label"), rows[:60])
    write_table(folder / "test.csv", ("text", "label"), rows[60:])
    write_table(folder / "new.csv", ("text",), [row[:1] for row in rows[60:]])
    pairs = [{"question": text, "answer": text} for text in dict.fromkeys(texts[:90])]
    write_lines(folder / "questions.jsonl", map(json.dumps, pairs))


def write_public_tasks(data: Path, texts: Sequence[str], word: str) -> None:
    """SST-2, CoLA and MELD in their original formats."""
    rows = [(text, int(word in text)) for text in texts[:90]]
    splits = {"train": rows[:60], "dev": rows[60:], "test": rows[60:]}
    for split, part in splits.items():
        if split == "test":
            write_table(data / "SST-2/test.tsv", ("index", "sentence"), [(n, text) for n, (text, _) in enumerate(part)])
        else:
            write_table(data / f"SST-2/{split}.tsv", ("sentence", "label"), part)
            write_table(data / f"CoLA/{split}.tsv", None, [("source", label, "*", text) for text, label in part])
        emotions = [(text, "joy" if label else "neutral") for text, label in part]
        write_table(data / f"MELD/{split}_sent_emo.csv", ("Utterance", "Emotion"), emotions)


def write_texts(folder: Path, texts: Sequence[str]) -> None:
    """The same English text in the formats that the pages name. `texts`: the first 200 are enough."""
    texts = texts[:200]
    for part in "abcd":
        write_lines(folder / f"books/{part}.txt", texts)
        (folder / f"books/{part}.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        write_lines(folder / f"papers/{part}.txt", texts)
    write_lines(folder / "words.txt", ["nephritis", "stent", "##itis"])
    write_lines(folder / "reviews.jsonl", [f'{{"text": "{text}"}}' for text in texts])
    write_table(folder / "reviews.csv", ("review",), [(text,) for text in (*texts, *texts)])
    (folder / "phrases.tsv.gz").write_bytes(gzip.compress("\n".join(("text", *texts)).encode()))
    write_lines(folder / "wiki.train.raw", [" = A title = ", *texts, " = Another title = ", *texts])
    with zipfile.ZipFile(folder / "library.zip", "w") as library:
        for number, text in enumerate(texts):
            library.writestr(f"{number}.txt", text)
    write_chinese_text(folder)


def write_chinese_text(folder: Path) -> list[str]:
    draw = random.Random(1)
    texts = ["".join(draw.choices(CHINESE, k=20)) for _ in range(1000)]
    for name in ("news.txt", "zh.txt"):
        write_lines(folder / name, texts)
    return texts
