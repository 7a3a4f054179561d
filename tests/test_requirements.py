"""`requirements/` is what `make lock` makes of pyproject.toml: the versions that were tested."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RENEW = "make lock"


def pinned(name: str) -> dict[str, tuple[str, bool]]:
    """Each package of a list, with its version, and whether it has hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    found: dict[str, tuple[str, bool]] = {}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = line.split("--hash=sha256:")
            parsed = Requirement(requirement.strip())
            (pin,) = parsed.specifier
            assert pin.operator == "=="
            found[canonicalize_name(parsed.name)] = (pin.version, bool(hashes))
    return found


def test_every_dependency_is_pinned_to_a_version_that_is_allowed() -> None:
    for name, declared in (
        # The extra redis too: an image that cannot share limits would be of no use to several replicas.
        ("run", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["redis"]]),
        ("dev", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]),
    ):
        versions = pinned(name)
        for requirement in map(Requirement, declared):
            version, _ = versions.get(canonicalize_name(requirement.name), ("", False))
            assert version, f"{requirement.name}: {RENEW}"
            assert requirement.specifier.contains(version), f"{requirement.name}: {RENEW}"


def test_every_pin_has_hashes_and_all_lists_agree() -> None:
    run, dev, constraints = pinned("run"), pinned("dev"), pinned("constraints")
    assert all(hashed for _, hashed in [*run.values(), *dev.values()])
    # pip takes no constraints with hashes for what has none itself.
    assert not any(hashed for _, hashed in constraints.values())
    assert {name: version for name, (version, _) in constraints.items()} == {
        name: version for name, (version, _) in run.items()
    }
    assert run.items() <= dev.items()


def test_the_image_installs_what_is_pinned() -> None:
    assert "--require-hashes --requirement run.txt" in (ROOT / "Dockerfile").read_text()
    assert "!requirements/run.txt" in (ROOT / ".dockerignore").read_text().splitlines()
