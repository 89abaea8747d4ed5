"""The tutorials in docs/ run as they are written, on a small model and few documents."""

import io
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from documented import TUTORIALS, Terminal, commands, configs, validate_configs, write_configs
from documented_files import CHINESE, write_chinese_text, write_lines, write_model, write_public_tasks, write_task
from experiment.files import parse_json
from experiment.storage import upload
from language_models import write_language_model
from rank_pool import RankPool
from runs import SHALLOW, pretrain_case, run_config, sampled


@dataclass(frozen=True)
class Given:
    """What the tests have built already."""

    texts: list[str]
    tokenizer: Path
    corpus: Path
    pool: RankPool


def own_text(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_lines(folder / "papers/all.txt", given.texts * 2)
    write_task(folder, given.texts, word="ba")


def own_task(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_task(folder, given.texts, word="ba")
    changes = {"model__config": SHALLOW | {"max_position_embeddings": 512}, "checkpoint__every_steps": 3}
    given.pool.run(pretrain_case, run_config(folder / "runs/mine", given.corpus, **changes))


def run_mlm(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-uncased", given.tokenizer)
    write_lines(folder / "train.txt", given.texts[:300])
    write_lines(folder / "validation.txt", given.texts[300:330])


def chinese(folder: Path, given: Given) -> None:
    write_model(folder / "bert-base-chinese", sorted(set(CHINESE)))
    write_task(folder, write_chinese_text(folder), word="好")


def web_archives(folder: Path, given: Given) -> None:
    """Two archives of pages in a bucket. One page is short, one is German, one differs from another in a single line,
    and one has evaluation text."""
    import s3fs
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    write_public_tasks(folder / "data", given.texts, word="ba")
    write_language_model(folder / "lid.176.bin")
    evaluated = max(given.texts[60:90], key=len)
    pages = [_prose(Random(number)) for number in range(60)]
    pages += ["Buy the one now.", "Das Haus der Frau und von der Katze mit dem Hut."]
    pages += [pages[0].replace(" the ", " a ", 1), f"{_prose(Random(60))} {evaluated}"]
    s3fs.S3FileSystem().mkdir("bucket")
    for number in range(2):
        archive = folder / f"{number}.warc.gz"
        with archive.open("wb") as file:
            writer = WARCWriter(file)
            for page, text in list(enumerate(pages))[number::2]:
                headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
                paragraphs = text.replace(". ", ".</p><p>")
                content = io.BytesIO(f"<html><body><article><p>{paragraphs}</p></article></body></html>".encode())
                url = f"https://example.org/{page}"
                writer.write_record(writer.create_warc_record(url, "response", content, http_headers=headers))
        upload(archive, f"s3://bucket/crawl/{archive.name}")
        archive.unlink()


def _prose(random: Random) -> str:
    """Sixteen sentences of made-up words."""
    stop_words = ["the", "of", "and", "that", "with", "to", "a", "in", "was", "by"]
    syllables = [first + vowel for first in "bdfglmnprst" for vowel in "aeio"]

    def word() -> str:
        return random.choice(stop_words) if random.random() < 0.4 else "".join(random.choices(syllables, k=3))

    return " ".join(f"The {' '.join(word() for _ in range(random.randint(9, 15)))}." for _ in range(16))


PREPARED: dict[str, tuple[Callable[[Path, Given], None], str]] = {
    "docs/continue_a_model.md": (own_text, "my-bert/model.safetensors"),
    "docs/compare_on_your_task.md": (own_task, "labels.csv"),
    "docs/from_run_mlm.md": (run_mlm, "my-model/model.safetensors"),
    "docs/chinese.md": (chinese, "labels.csv"),
    "docs/corpora_at_scale.md": (web_archives, "crawl.html"),
}
"""Page -> what makes the files that its reader has, and a file that its reader has at the end."""


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("page", sampled(TUTORIALS, ["docs/from_run_mlm.md"]))
def test_a_tutorial_runs(
    page: str,
    tmp_path: Path,
    text_file: Path,
    wordpiece: Path,
    wordpiece_corpus: Path,
    pools: dict[int, RankPool],
    handed_over: Mapping[str, str],
) -> None:
    """Catches a tutorial with a command or a config that does not work."""
    prepare, result = PREPARED[page]
    texts = text_file.read_text(encoding="utf-8").splitlines()
    prepare(tmp_path, Given(texts, wordpiece, wordpiece_corpus, pools[1]))
    write_configs(page, tmp_path)
    found = commands(page)
    assert len(found) > 4
    with closing(Terminal(tmp_path, variables=handed_over)) as terminal:
        for command in found:
            if command.mark is None:
                terminal.run(command)
    assert (tmp_path / result).is_file()
    if page == "docs/corpora_at_scale.md":
        steps = parse_json((tmp_path / "clean/clean.json").read_bytes())["steps"]
        dropped = {step["name"]: step["dropped"] for step in steps if step["dropped"]}
        assert dropped == {"language": 1, "gopher_repetition": 1, "minhash": 1, "decontaminate": 1}
    validate_configs(page, tmp_path)


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_has_the_configs_that_it_names(page: str) -> None:
    """Catches a config that was renamed in one place only."""
    texts = [command.text for command in commands(page)]
    copied = {text.split()[-1] for text in texts if text.startswith("deepcloze recipes cp ")}
    named = {name for text in texts for name in re.findall(r"[\w-]+\.yaml", text)}
    assert named == configs(page).keys() | {name for name in copied if name.endswith(".yaml")}
