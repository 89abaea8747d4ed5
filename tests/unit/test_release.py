"""What a release is made from."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_newest_one_in_the_changelog() -> None:
    """Catches a release without its changes, and one that keeps the version of the last."""
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == PYPROJECT["project"]["version"]
    assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", headings[1][1]), "the date of the release"


def test_images_in_the_docs_have_the_version() -> None:
    """Catches commands with the image of the last release."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "hostfiles").iterdir()]
    images = [tag for page in pages for tag in re.findall(r"deepcloze:(\d[\w.]*)-", page.read_text(encoding="utf-8"))]
    assert images
    assert set(images) == {PYPROJECT["project"]["version"]}


def test_installed_docs_have_the_files_that_they_link() -> None:
    """Catches pages without their pictures and notebooks in a wheel."""
    installed = {
        path.relative_to(ROOT).as_posix()
        for patterns in PYPROJECT["tool"]["setuptools"]["data-files"].values()
        for pattern in patterns
        for path in ROOT.glob(pattern)
    }
    pages = (ROOT / "docs").glob("*.md")
    links = [link for page in pages for link in re.findall(r"\]\(([\w./-]+)", page.read_text(encoding="utf-8"))]
    assert {f"docs/{link}" for link in links if (ROOT / "docs" / link).is_file() and ".." not in link} <= installed


def test_make_image_names_the_programs_that_it_needs() -> None:
    """Catches a shell error about `build` where neither docker, podman nor buildah is installed."""
    done = subprocess.run(["make", "image", "ENGINE="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make image needs docker, podman or buildah" in done.stderr


def test_an_image_is_built_from_what_a_wheel_contains() -> None:
    """Catches a package that `.dockerignore` keeps from an image."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    needed = {pattern.removesuffix("*") for pattern in setuptools["packages"]["find"]["include"]}
    needed |= {pattern.partition("/")[0] for patterns in setuptools["data-files"].values() for pattern in patterns}
    needed |= {f"{module}.py" for module in setuptools["py-modules"]}
    needed |= {"pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == needed


def make_setup(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a folder with our Makefile. `python3` is 3.10, and can make no virtual environment."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, folder)
    write_program(folder / "programs" / "python3", "exit 1")
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "TORCH", "PYTHON")  # to the make that runs the tests
    environ = {name: value for name, value in os.environ.items() if name not in given} | variables
    environ["PATH"] = f"{folder / 'programs'}:{environ['PATH']}"
    return subprocess.run(["make", "setup", *arguments], cwd=folder, env=environ, capture_output=True, text=True)


def write_program(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def write_python(path: Path, version: str, log: Path) -> None:
    write_program(path, f"[ $1 != --version ] || echo Python {version}\n[ $1 != -m ] || echo $@ >> {log}")


@pytest.mark.parametrize(
    ("arguments", "installed", "message"),
    [
        ([], [], ""),
        (["TORCH=torch==9.0"], ["torch==9.0", "."], ""),
        (["PYTHON=./python3.12"], [], ".venv has Python 3.11.0, not Python 3.12.0: remove it, or name another"),
        (["PYTHON=./.venv/bin/python"], ["."], ""),
    ],
)
def test_an_environment_that_exists(tmp_path: Path, arguments: list[str], installed: list[str], message: str) -> None:
    """Catches a TORCH or PYTHON on the command line of make that has no effect, without a word."""
    log, scripts = tmp_path / "installed", tmp_path / ".venv" / "bin"
    for python, version in ((scripts / "python", "3.11.0"), (tmp_path / "python3.12", "3.12.0")):
        write_python(python, version, log)
    shutil.copy(scripts / "python", scripts / "pip")
    (tmp_path / ".venv" / ".ready").touch()
    os.utime(tmp_path / ".venv" / ".ready", (2**32, 2**32))
    done = make_setup(tmp_path, *arguments)
    assert message in done.stderr
    assert (done.returncode == 0) is (not message)
    assert [line.split()[-1] for path in tmp_path.glob("installed") for line in path.open()] == installed


def test_setup_with_a_good_environment_ignores_the_default_python(tmp_path: Path) -> None:
    """Catches a `python3` that is too old, which stops `make setup` although .venv has a newer one."""
    scripts = tmp_path / ".venv" / "bin"
    for name in ("python", "pip"):
        write_python(scripts / name, "3.12.0", tmp_path / "installed")
    done = make_setup(tmp_path, VENV=str(tmp_path / "exported"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("programs", "message"), [([], "has no bin/pip: remove it"), (["pip"], "bin/python does not start: remove")]
)
def test_setup_keeps_a_folder_that_it_has_not_made(tmp_path: Path, programs: list[str], message: str) -> None:
    """Catches `make setup` that deletes a folder of the user's, and bash's error for an interpreter that is gone."""
    folder = tmp_path / "envs"
    folder.mkdir()
    (folder / "mine").touch()
    for name in programs:
        write_program(folder / "bin" / name, "")
    write_python(tmp_path / "python3.12", "3.12.0", tmp_path / "installed")
    with (tmp_path / "python3.12").open("a") as python:
        python.write("[ $1 != -m ]\n")
    done = make_setup(tmp_path, "VENV=envs", "PYTHON=./python3.12")
    assert done.returncode == 2
    assert f"envs{'/bin/python' if programs else ''}" in done.stderr
    assert message in done.stderr
    assert (folder / "mine").exists()


def test_the_label_of_an_image_names_changes(tmp_path: Path) -> None:
    """Catches an image of a changed checkout whose label names its commit alone."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"], ["tag", "v1"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    make = ["make", "--dry-run", "image", "ENGINE=docker"]
    for ending in ("", "-dirty"):
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert f"image.revision={commit}{ending} " in done.stdout
        with (tmp_path / "Makefile").open("a") as makefile:
            makefile.write("# changed\n")
