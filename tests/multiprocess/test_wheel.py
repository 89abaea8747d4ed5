"""deepcloze installed from a wheel, in a virtual environment and a working directory of its own, and in an image."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from experiment.run_files.checkpoints import complete_checkpoints
from launches import config_file
from rank_pool import RankPool
from runs import logged, pretrain_case, run_config

REPOSITORY = Path(__file__).parents[2]
_PACKAGES = ("launcher", "pretrain", "finetune", "experiment", "ds_configs")
_DOCUMENTS = ("docs", "hostfiles")


class Installed(NamedTuple):
    command: Path
    packages: Path
    folder: Path  # the working directory

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.command, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


class Wheel(NamedTuple):
    path: Path
    source: Path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*_PACKAGES, *_DOCUMENTS):  # a copy: a build writes to the folder of its source
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("deepcloze.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"  # as pip does
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (path,) = folder.glob("deepcloze-*.whl")
    return Wheel(path, source)


@pytest.fixture(scope="module")
def installed(wheel: Wheel) -> Installed:
    folder = wheel.path.parent
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel.path)]
    subprocess.run(install, check=True, capture_output=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # Finds what deepcloze depends on, but not this checkout: .pth files in folders that a .pth file names are not read.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    work = folder / "work"
    work.mkdir()
    return Installed(python.with_name("deepcloze"), packages, work)


def test_a_wheel_has_all_files(wheel: Wheel) -> None:
    """Catches files that only a source checkout has."""
    source = wheel.source
    files = [path.relative_to(source) for name in _PACKAGES for path in (source / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} > {".py", ".json", ".j2", ".html", ".css", ".js", ".md"}
    documents = [path.relative_to(source) for name in ("docs/*.md", "hostfiles/*") for path in source.glob(name)]
    assert {path.suffix for path in documents} > {".md", ".sbatch"}
    share = Path("-".join(wheel.path.name.split("-")[:2]) + ".data/data/share/doc/deepcloze")
    packed = set(map(Path, zipfile.ZipFile(wheel.path).namelist()))
    assert {Path("deepcloze.py"), *files, *(share / path for path in documents)} - packed == set()
    assert not any(path.parts[0] == "hostfiles" for path in packed), "no package"


@pytest.mark.soak
def test_an_installed_wheel_finds_its_files(installed: Installed) -> None:
    """Catches a recipe that is looked up, or documents that are installed, in the wrong folder."""
    done = installed.run("recipes")
    assert done.returncode == 0, done.stderr
    assert "roberta-base" in done.stdout
    folder = installed.command.parents[1] / "share" / "doc" / "deepcloze"
    assert (folder / "docs" / "commands.md").is_file()
    assert (folder / "hostfiles").is_dir()


@pytest.fixture
def losses(wordpiece_corpus: Path, tmp_path: Path, pools: dict[int, RankPool]) -> list[float]:
    """Of a run of this checkout."""
    pools[2].run(pretrain_case, run_config(tmp_path / "pooled", wordpiece_corpus))
    return logged(tmp_path / "pooled")


@pytest.mark.soak
def test_a_wheel_trains_as_the_source_does(
    installed: Installed, wordpiece_corpus: Path, tmp_path: Path, losses: list[float]
) -> None:
    """Catches ranks that do not find the packages of a wheel, find others, or import a backport that is installed in
    place of the standard library."""
    for name in ("launcher", "pretrain", "finetune", "experiment", "torch", "deepspeed"):
        (installed.folder / f"{name}.py").write_text("raise SystemExit('imported from the working directory')\n")
    (installed.packages / "argparse.py").write_text("raise SystemExit('not of the standard library')\n")
    config = config_file(tmp_path, wordpiece_corpus, engine__ds_config="fp32_zero1")
    done = installed.run("pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe")
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "run") == losses
    assert "ds_config: fp32_zero1\n" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.skipif("TEST_IMAGE" not in os.environ, reason="TEST_IMAGE does not name an image; see CONTRIBUTING.md")
def test_an_image_trains_as_the_source_does(wordpiece_corpus: Path, tmp_path: Path, losses: list[float]) -> None:
    """Catches an image that lacks what a run needs, or that only root can use."""
    engine = os.environ.get("ENGINE") or shutil.which("docker") or "podman"
    user = os.getuid() or 12345  # has no name in the image
    config = config_file(tmp_path, wordpiece_corpus, engine__ds_config="fp32_zero1")
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [
            *(engine, "run", "--rm", f"--user={user}", "--env=DS_ACCELERATOR=cpu", "--env=OMP_NUM_THREADS=1"),
            *(f"--volume={tmp_path}:{tmp_path}", f"--volume={wordpiece_corpus}:{wordpiece_corpus}:ro"),
            *(os.environ["TEST_IMAGE"], "pretrain", "--config", str(config), "--num_gpus=2", "--oversubscribe"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "run") == losses
