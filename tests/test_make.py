"""What `make` does before there is an environment: with any Python, or with none that will do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` needs to make an environment, in a folder of its own."""
    folder = tmp_path / "checkout"
    (folder / "requirements").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements/run.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # As from a shell, also where the tests run under make.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def python(folder: Path, before: str) -> str:
    """An interpreter that runs `before` first, whatever it is to do."""
    path = folder.parent / "python"
    path.write_text(
        f"""#!{sys.executable}
import os, runpy, sys
{before}
sys.argv = sys.argv[1:]
if sys.argv[0] == "-c":
    exec(sys.argv[1])
elif sys.argv[0] == "-m":
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
    )
    path.chmod(0o755)
    return str(path)


def environments(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".venv*")]


def test_help_has_a_line_for_every_target() -> None:
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M))
    for arguments in ([], ["help"]):
        shown = make(ROOT, *arguments).stdout
        assert sorted(re.findall(r"^  ([\w-]+) +\S", shown, re.M)) == sorted(phony.split())


def test_proof_gets_its_number_of_runs() -> None:
    for arguments, number in (([], 200), (["RUNS=5"], 5)):
        commands = make(ROOT, "--dry-run", "proof", *arguments).stdout
        assert commands.splitlines()[-1].rstrip().endswith(f"-m bench.proof {number}")
        assert f"touch {number}" not in commands


def test_a_python_that_is_too_old_is_named_and_leaves_nothing(checkout: Path) -> None:
    old = python(checkout, "sys.version_info = (3, 10, 4)")
    done = make(checkout, "demo", f"PYTHON={old}")
    assert done.returncode
    assert f"{old} is Python 3.10, and sseproxy needs 3.11 or later." in done.stderr
    assert "make demo PYTHON=python3.12" in done.stderr
    assert not environments(checkout)


def test_the_package_with_virtual_environments_is_named(checkout: Path) -> None:
    bare = python(checkout, 'sys.modules["ensurepip"] = None')
    done = make(checkout, "test", f"PYTHON={bare}")
    assert done.returncode
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install python{version}-venv" in done.stderr
    assert not environments(checkout)


def test_a_python_that_does_not_exist_is_named(checkout: Path) -> None:
    done = make(checkout, "demo", "PYTHON=python9.9")
    assert done.returncode
    assert "There is no python9.9 on this machine." in done.stderr


def test_an_environment_that_fails_half_way_is_removed(checkout: Path) -> None:
    half = python(checkout, '"venv" in sys.argv and (os.makedirs(sys.argv[-1] + "/bin"), sys.exit(1))')
    assert make(checkout, "demo", f"PYTHON={half}").returncode
    assert not environments(checkout)


@pytest.mark.timeout(120)
def test_each_interpreter_has_an_environment_and_a_broken_one_is_made_again(checkout: Path) -> None:
    name = f".venv-{sys.executable.strip('/').replace('/', '-')}"
    programs = checkout / name / "bin"
    programs.mkdir(parents=True)
    # As it is left by an interpreter that was removed, after the environment was complete.
    (programs / "python").symlink_to("/nowhere/python3.10")
    (checkout / name / ".made").touch()
    for time in ("first", "second"):
        done = make(checkout, f"{name}/.made", f"PYTHON={sys.executable}")
        assert done.returncode == 0, done.stderr
        assert ("Making" in done.stdout) == (time == "first")
        assert environments(checkout) == [name]
        subprocess.run([programs / "python", "-m", "pip", "--version"], check=True, capture_output=True)
