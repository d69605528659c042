"""Provenance of a result: packages, git revision and time."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lpc_lightning

PACKAGES = ("lpc-lightning", "torch", "lightning", "transformers", "peft", "lm-eval", "datasets", "torchmetrics")


def provenance() -> dict[str, Any]:
    """Return what is needed to reproduce a result, as JSON: `date` (UTC), `packages`, `platform` and `git`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": package_versions(),
        "platform": platform.platform(),
        "git": git_revision(),
    }


def short_hash(*parts: object) -> str:
    """Return a text of 16 characters that changes with the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`. None: not installed as a package."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(file: Path = Path(lpc_lightning.__file__)) -> dict[str, Any] | None:
    """Return the git `revision` of a file's repository, and whether there are uncommitted changes (`dirty`).

    Returns:
        None if git does not track the file. The repository of an environment that contains the installed package is
        not the repository of the project.
    """
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        return {"revision": _git(file, "rev-parse", "HEAD"), "dirty": bool(_git(file, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
