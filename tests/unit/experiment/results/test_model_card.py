from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from experiment.formatting import escape_markdown
from experiment.models.hub_names import hub_name
from experiment.results.model_card import attempt_row, front_matter, render_card, replace_usage, snippet, usage_section

USAGE = "## Usage\n\n```bash\nrun it\n```\n\n"
SECTIONS = """\
{% extends "model_card.md.j2" %}
{% block introduction %}
What it is.
{% endblock %}
{% block sections %}
## Data

{{ table(["name", "rows"], rows) }}
{% endblock %}
"""


def card(
    folder: Path, title: str = "a_b", data: ModelCardData | None = None, ancestors: Any = None, **values: Any
) -> str:
    (folder / "card.md.j2").write_text(SECTIONS, encoding="utf-8")
    usage = usage_section(snippet("python", "## not a heading\nprint(1)"))
    values = {"data": data or ModelCardData(library_name="transformers"), "rows": [], "hardware": [], **values}
    return render_card(folder / "card.md.j2", title, usage, ancestors, **values)


def read_front_matter(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_data_of_users_cannot_break_a_table(tmp_path: Path) -> None:
    """Catches a file name or label that adds a column or a row, or is shown as HTML or emphasis."""
    text = card(tmp_path, rows=[["a|b\nc", "1"], ["<img src=x> *x* [y](z) `c` _d_ e_f", "2"]])
    assert text[text.index("## Data") : text.index("## License")].splitlines()[2:] == [
        "| name | rows |",
        "|---|---:|",
        r"| a\|b c | 1 |",
        r"| \<img src=x\> \*x\* \[y\](z) \`c\` \_d\_ e_f | 2 |",
        "",
    ]
    assert escape_markdown("weighted_f1") == "weighted_f1"


def test_front_matter_is_yaml_whatever_the_names(tmp_path: Path) -> None:
    """Catches a task whose name ends the front matter or adds a key, and a license that nobody chose."""
    name = 'x: "y"\n---\nlicense: mit'
    data = front_matter("fill-mask", ["bert"], [], name, [(name, "test", "macro_f1", 0.5)])
    text = card(tmp_path, name, data)
    found = yaml.safe_load(text[4 : text.index("\n# license")])
    assert found["model-index"][0]["name"] == name
    (result,) = found["model-index"][0]["results"]
    assert result["task"] == {"type": "fill-mask"}
    assert result["dataset"] == {"name": name, "type": name, "split": "test"}
    assert result["metrics"] == [{"type": "f1", "name": "macro_f1", "value": 0.5}]
    assert "license" not in found
    assert "base_model" not in found


def test_the_license_is_a_slot(tmp_path: Path) -> None:
    """Catches a card without a place for the license, and one with a value that the Hub rejects."""
    text = card(tmp_path)
    assert "\n# license: apache-2.0\n" in text
    assert list(read_front_matter(text)) == ["library_name"]
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
def test_only_a_folder_of_the_hub_names_a_base_model(tmp_path: Path, folder: str, name: str | None) -> None:
    """Catches a local path as base_model, which the Hub shows as a broken link and which names the user's folders."""
    ancestors = [{"relation": "init_from", "folder": folder, "name": "x", "weights": {"model.safetensors": "ab"}}]
    assert hub_name(folder) == name
    data = front_matter(None, [], ancestors, "t", [])
    assert data.base_model == name
    text = card(tmp_path, data=data, ancestors=ancestors)
    assert "/home" not in text
    assert f"| {name or 'bert'} |" in text


def test_a_card_names_no_host_and_no_path() -> None:
    """Catches a published card with the name of the user's machine or folders."""
    attempt = {"host": "secret-host", "directory": "/home/me", "command": ["/home/me/x"], "world_size": 16, "hosts": 2}
    row = attempt_row(
        {**attempt, "versions": {"torch": "2.11"}, "git": {"commit": "a" * 40, "dirty": True}}, "8 × H100"
    )
    assert row == ["8 × H100", "16", "2", "–", "2.11", "–", "–", "aaaaaaaaaa (changed)"]


def test_another_format_changes_the_usage_only(tmp_path: Path) -> None:
    """Catches an exported format whose card has the snippet of transformers, or loses what a user wrote."""
    text = card(tmp_path, data=ModelCardData(library_name="transformers", tags=["x"]))
    changed = replace_usage(text.replace("| name | rows |", "My own words."), USAGE, "onnx")
    assert read_front_matter(changed) == {"library_name": "onnx", "tags": ["x"]}
    assert changed.count("## Usage") == 1
    assert "```bash\nrun it\n```\n\n## Data\n\nMy own words." in changed
    assert "print(1)" not in changed
    without = replace_usage("---\na: 1\n---\n\nText.\n\n## Data\n", USAGE, "onnx")
    assert without == f"---\nlibrary_name: onnx\na: 1\n---\n\nText.\n\n{USAGE}## Data\n"


@pytest.mark.parametrize("text", ["# Title\n\nText.", "# Title\n\nText.\n\n---\n\nMore.\n"])
def test_a_card_without_front_matter_gets_one(text: str) -> None:
    """Catches text above a rule that is taken for front matter, and a section glued to the last line."""
    found = replace_usage(text, USAGE, "onnx")
    assert found == f"---\nlibrary_name: onnx\n---\n\n{text.strip()}\n\n{USAGE}"
