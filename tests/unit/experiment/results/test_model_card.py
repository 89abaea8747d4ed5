from typing import Any

import pytest
import yaml

from experiment.hub_names import hub_name
from experiment.results.model_card import (
    ModelCard,
    Score,
    Snippet,
    attempt_row,
    escape,
    lineage_blocks,
    metadata_of,
    render_block,
    render_card,
    replace_usage,
)
from experiment.results.page import Heading, Table, Text


def front_matter(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def card(**metadata: Any) -> str:
    usage = [Snippet("python", "## not a heading\nprint(1)")]
    blocks = [Text("What it is."), Heading("Data"), Text("Rows.")]
    return render_card(ModelCard("a_b", {"library_name": "transformers", **metadata}, usage, blocks))


def test_data_of_users_cannot_break_a_table() -> None:
    """Catches a file name or label that adds a column or a row, or is shown as HTML or emphasis."""
    table = Table(["name", "rows"], [["a|b\nc", "1"], ["<img src=x> *x* [y](z) `c` _d_ e_f", "2"]])
    lines = render_block(table).splitlines()
    assert lines[2] == r"| a\|b c | 1 |"
    assert lines[3] == r"| \<img src=x\> \*x\* \[y\](z) \`c\` \_d\_ e_f | 2 |"
    assert len(lines) == 4
    assert escape("weighted_f1") == "weighted_f1"


def test_front_matter_is_yaml_whatever_the_names() -> None:
    """Catches a task whose name ends the front matter or adds a key, and a license that nobody chose."""
    name = 'x: "y"\n---\nlicense: mit'
    text = card(**metadata_of("fill-mask", ["bert"], [], name, [Score("macro_f1", 0.5, name, "test")]))
    found = yaml.safe_load(text[4 : text.index("\n# license")])
    assert found["model-index"][0]["name"] == name
    (result,) = found["model-index"][0]["results"]
    assert result["task"] == {"type": "fill-mask"}
    assert result["dataset"] == {"name": name, "type": name, "split": "test"}
    assert result["metrics"] == [{"type": "f1", "name": "macro_f1", "value": 0.5}]
    assert "license" not in found
    assert "base_model" not in found


def test_the_license_is_a_slot() -> None:
    """Catches a card without a place for the license, and one with a value that the Hub rejects."""
    text = card()
    assert "\n# license: apache-2.0\n" in text
    assert list(front_matter(text)) == ["library_name"]
    assert "Not chosen yet" in text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (
            "/home/me/.cache/huggingface/hub/models--google-bert--bert-base-uncased/snapshots/86b5",
            "google-bert/bert-base-uncased",
        ),
        ("/cache/models--gpt2/snapshots/607a", "gpt2"),
        ("/home/me/models/bert", None),
    ],
)
def test_only_a_folder_of_the_hub_names_a_base_model(folder: str, name: str | None) -> None:
    """Catches a local path as base_model, which the Hub shows as a broken link and which names the user's folders."""
    ancestors = [{"relation": "init_from", "folder": folder, "name": "x", "weights": {"model.safetensors": "ab"}}]
    assert hub_name(folder) == name
    assert metadata_of(None, [], ancestors, "t", []).get("base_model") == name
    text = "".join(map(render_block, lineage_blocks(ancestors)))
    assert "/home" not in text
    assert f"| {name or 'bert'} |" in text


def test_a_card_names_no_host_and_no_path() -> None:
    """Catches a published card with the name of the user's machine or folders."""
    attempt = {"host": "secret-host", "directory": "/home/me", "command": ["/home/me/x"], "world_size": 16, "hosts": 2}
    row = attempt_row(
        {**attempt, "versions": {"torch": "2.11"}, "git": {"commit": "a" * 40, "dirty": True}}, "8 × H100"
    )
    assert row == ["8 × H100", "16", "2", "–", "2.11", "–", "–", "aaaaaaaaaa (changed)"]


def test_another_format_changes_the_usage_only() -> None:
    """Catches an exported format whose card has the snippet of transformers, or loses what a user wrote."""
    text = card(tags=["x"]).replace("Rows.", "My own words.")
    changed = replace_usage(text, [Snippet("bash", "run it")], "onnx")
    assert front_matter(changed) == {"library_name": "onnx", "tags": ["x"]}
    assert changed.count("## Usage") == 1
    assert "```bash\nrun it\n```\n\n## Data\n\nMy own words." in changed
    assert "print(1)" not in changed
    without = replace_usage("---\na: 1\n---\n\nText.\n\n## Data\n", [Snippet("bash", "run it")], "onnx")
    assert without == f"---\nlibrary_name: onnx\na: 1\n---\n\nText.\n\n{USAGE}## Data\n"


USAGE = "## Usage\n\n```bash\nrun it\n```\n\n"


@pytest.mark.parametrize("text", ["# Title\n\nText.", "# Title\n\nText.\n\n---\n\nMore.\n"])
def test_a_card_without_front_matter_gets_one(text: str) -> None:
    """Catches text above a rule that is taken for front matter, and a section glued to the last line."""
    found = replace_usage(text, [Snippet("bash", "run it")], "onnx")
    assert found == f"---\nlibrary_name: onnx\n---\n\n{text.strip()}\n\n{USAGE}"
