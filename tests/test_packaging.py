"""What an installation holds: by wheel, by source distribution, editable, and from a bare checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = """
import importlib.resources, pathlib, sys
import pymoe
try:
    folder = pathlib.Path(str(importlib.resources.files("pymoe.cuda_src")))
except ModuleNotFoundError:
    folder = pathlib.Path(pymoe.__file__).parents[1] / "cuda_src"
assert (folder / "__init__.py").is_file(), folder
assert pathlib.Path(pymoe.__file__).with_name("py.typed").is_file()
print(pymoe.__file__)
"""


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_package_is_listed():
    listed = set(setup_cfg()["options"]["packages"].split())
    there = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("pymoe/**/__init__.py")}
    assert listed == there | {"pymoe.cuda_src"}


def test_no_extra_lists_torch():
    extras = setup_cfg()["options.extras_require"]
    assert set(extras) == {
        "cu12",
        "cu13",
        "numba-cu12",
        "numba-cu13",
        "mpi",
        "plot",
        "bench",
        "docs",
        "test",
        "interop",
    }
    assert [name for name in extras if "torch" in extras[name]] == []
    assert setup_cfg()["options"]["install_requires"].split() == ["numpy>=2.0", "ml_dtypes>=0.5", "numba>=0.61"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree without what builds and tools leave behind."""
    tree = tmp_path_factory.mktemp("checkout") / "pymoe"
    leftovers = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", "api"
    )
    shutil.copytree(ROOT, tree, ignore=leftovers)
    return tree


@pytest.fixture(scope="module")
def dist(checkout, tmp_path_factory):
    """Both archives; the wheel is built from the source distribution, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, checkout, cwd=checkout)
    return folder


@pytest.fixture
def python(tmp_path):
    """The interpreter of an empty environment."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    return tmp_path / "venv/bin/python"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_source_distribution(dist, checkout):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    assert {
        name for name in wanted if name.split("/")[0] in ("pymoe", "cuda_src", "tests", "docs", "examples")
    } <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.cfg", "pyproject.toml", ".ci/run"} <= names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel(dist, checkout):
    (archive,) = dist.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
        (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(opened.read(f"{folder}/METADATA").decode())
        scripts = opened.read(f"{folder}/entry_points.txt").decode()
    modules = {path.relative_to(checkout).as_posix() for path in (checkout / "pymoe").rglob("*.py")}
    sources = {f"pymoe/{path.relative_to(checkout)}" for path in (checkout / "cuda_src").rglob("*") if path.is_file()}
    assert {n for n in names if ".dist-info/" not in n} == modules | sources | {"pymoe/py.typed"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [r for r in metadata.get_all("Requires-Dist") if "torch" in r] == []
    assert "pymoe = pymoe.__main__:main" in scripts


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed(kind, python, dist, checkout, tmp_path):
    what = next(dist.glob("*.whl")) if kind == "wheel" else checkout
    run(python, "-m", "pip", "install", "-q", *(["-e"] if kind == "editable" else []), what, cwd=tmp_path)
    imported = Path(run(python, "-c", FOUND, cwd=tmp_path).strip())
    assert imported.is_relative_to(checkout if kind == "editable" else python.parents[1])
    assert "run" in run(python.with_name("pymoe"), "--help", cwd=tmp_path)
    assert "run" in run(python, "-m", "pymoe", "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bare_checkout(checkout, tmp_path):
    """Without an installation, from the folder itself: what the dependencies of the running environment allow."""
    copy = tmp_path / "bare"
    shutil.copytree(checkout, copy)
    shutil.rmtree(copy / "pymoe.egg-info", ignore_errors=True)
    assert Path(run(sys.executable, "-c", FOUND, cwd=copy, PYTHONPATH="").strip()).is_relative_to(copy)
    assert "run" in run(sys.executable, "-m", "pymoe", "--help", cwd=copy)
