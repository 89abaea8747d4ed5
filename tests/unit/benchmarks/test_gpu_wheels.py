"""Which wheels `benchmarks.gpu_session --prepare` gathers. That pip downloads them needs a network."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_wheels
from benchmarks.gpu_wheels import prepare
from experiment.errors import UserError

RESOLVED: dict[str, list[str]] = {
    "torch==2.11.0": ["nvidia-cublas", "triton==3.6.0"],
    "nvidia-cublas==13.1": [],
    "triton==3.6.0": [],
    "deepspeed==0.19.8": ["msgpack", "numpy"],
    "seqeval==1.2.2": [],
    "transformers==5.23.0": ["tokenizers<0.25,>=0.24", "numpy>=1.17", 'pillow>=10; extra == "vision"'],
    "tokenizers==0.24.1": [],
    "numpy==2.5.2": [],
    "msgpack==1.2": [],
    "pytest_xdist==3.8": ["pytest>=7"],
    "pytest==9.2": [],
}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The calls of pip, which resolves to the above."""
    calls: list[tuple[str, ...]] = []

    def call(*arguments: str) -> str:
        calls.append(arguments)
        metadata = [dict(zip(("name", "version"), pin.split("=="), strict=True)) for pin in RESOLVED]
        needs: list[dict[str, Any]] = [{"requires_dist": needed} for needed in RESOLVED.values()]
        return json.dumps({"install": [{"metadata": one | two} for one, two in zip(metadata, needs, strict=True)]})

    monkeypatch.setattr(gpu_wheels, "_pip", call)
    return calls


def test_what_is_there_is_left_out(pip: list[tuple[str, ...]], tmp_path: Path) -> None:
    """Catches gigabytes of CUDA, a version that is there but too old, and what only a missing package needs."""
    installed = tmp_path / "installed.txt"
    lines = [
        "torch==2.11.0+cu130",
        "transformers==5.17.0",
        "Tokenizers==0.23.2",
        "numpy",
        "pytest @ file:///a",
        "# end",
    ]
    installed.write_text("\n".join(lines), encoding="utf-8")
    prepare(tmp_path / "wheels", "3.12.3", "2.11.0+cu130", installed)
    built, resolved, downloaded = pip[-3:]
    assert {arguments[0] for arguments in pip} == {"wheel", "install", "download"}
    assert built[-1].startswith("seqeval")
    assert {"torch==2.11.0", "3.12", "manylinux_2_28_x86_64"} <= {*resolved}
    assert not any(argument.startswith("wandb") for argument in resolved)
    assert [argument for argument in downloaded if "==" in argument and not argument.startswith("-")] == [
        "tokenizers==0.24.1",
        "msgpack==1.2",
        "pytest-xdist==3.8",
    ]


def test_without_a_list_only_torch_is_there(pip: list[tuple[str, ...]], tmp_path: Path) -> None:
    """Catches a missing wheel that is not reported, and wheels of two calls in one folder."""
    prepare(tmp_path / "wheels", "3.12", "2.11.0", None)
    assert {"numpy==2.5.2", "transformers==5.23.0", "pytest==9.2"} <= {*pip[-1]}
    assert not any(argument.startswith(("torch==", "triton==", "nvidia", "deepspeed==")) for argument in pip[-1])
    with pytest.raises(UserError, match=r"--installed .*none.txt: No such file"):
        prepare(tmp_path / "wheels", "3.12", "2.11.0", tmp_path / "none.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.whl").touch()
    with pytest.raises(UserError, match="full is not empty"):
        prepare(tmp_path / "full", "3.12", "2.11.0", None)
