"""Where and with what a run was made, so that it can be repeated."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

PACKAGES = ("torch", "numpy", "safetensors", "scikit-learn", "optuna", "unicorn", "ziglang")


def environment() -> dict[str, Any]:
    """Return the versions, the platform, the git revision of the current folder (if any) and the time.

    Versions are read from the installed metadata: nothing is imported.

    >>> {"thrifty", "python", "numpy", "platform", "git", "time"} <= set(environment())
    True
    """
    from thrifty import __version__

    found = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "thrifty": __version__,
        "python": platform.python_version(),
        **found,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "git": git_revision(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """Return the short revision of the current folder, "+" added when files differ from it, or None."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    loaded = sys.modules.get(package)
    if isinstance(version := getattr(loaded, "__version__", None), str):
        return version
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
