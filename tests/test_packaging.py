"""The distribution: its version, and the wheel and source archive that ``python -m build`` makes."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mfx

ROOT = Path(__file__).parents[1]


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mfx.__version__)
    assert f"\nversion: {mfx.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def modules_of(*roots: str) -> set[str]:
    return {
        str(path.relative_to(base))
        for base, package in ((ROOT, "mfx"), (ROOT / "passes", "mfx_passes"))
        if package in roots
        for path in (base / package).rglob("*")
        if path.suffix in (".py", ".typed", ".md")
    }


def test_the_wheel_holds_both_packages(tmp_path):
    pytest.importorskip("hatchling")
    build(tmp_path, "-m", "hatchling", "build", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    (source,) = tmp_path.glob("*.tar.gz")
    assert wheel.name == f"mfx-{mfx.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"mfx-{mfx.__version__}.dist-info/METADATA").decode()
        entries = archive.read(f"mfx-{mfx.__version__}.dist-info/entry_points.txt").decode()
    assert files == modules_of("mfx", "mfx_passes")
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "mfx = mfx.cli:main" in entries
    assert "mfx = mfx.compiler.backend:momentum" in entries
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "examples/quickstart.py"} <= packed
    assert modules_of("mfx") <= packed


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_installed_runs_the_quickstart_outside_of_the_repository(tmp_path, pattern):
    pytest.importorskip("hatchling")
    pytest.importorskip("sklearn")
    build(tmp_path, "-m", "hatchling", "build", "-d", str(tmp_path))
    (archive,) = tmp_path.glob(pattern)
    site, script = tmp_path / "site", ROOT / "examples" / "quickstart.py"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site), str(archive)]
    build(tmp_path, *install)
    code = (
        "import mfx, mfx_passes, runpy, sys; assert {mfx.__file__[: len(site)], mfx_passes.__file__[: len(site)]} == "
        "{site}; sys.argv[1:] = ['--tiny']; runpy.run_path(script, run_name='__main__')"
    )
    names = f"site, script = {str(site)!r}, {str(script)!r}; "
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", names + code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.zoo
def test_both_install_and_run_the_quickstart(tmp_path):
    """In an empty environment, from outside of the repository; needs a network or a local package index."""
    venv.create(tmp_path / "builder", with_pip=True)
    builder, script = str(tmp_path / "builder/bin/python"), ROOT / "examples" / "quickstart.py"
    subprocess.run([builder, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([builder, "-m", "build", "-o", str(tmp_path), str(ROOT)], check=True)
    for archive in (*tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz")):
        venv.create(tmp_path / "empty", with_pip=True, clear=True)
        python = str(tmp_path / "empty/bin/python")
        subprocess.run([python, "-m", "pip", "install", "-q", f"{archive}[examples]"], check=True)
        subprocess.run([python, str(script)], check=True, cwd=tmp_path)


def build(path: Path, *words: str) -> None:
    """Build in the repository, without leaving anything there."""
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
