"""JupyterLab on copies of the notebooks, so that its autosave changes no committed one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from svdlib import files
from svdlib.study.running.parameters import NOTEBOOKS, find

LAB = Path("lab")
COPIED = ".copied.json"  # in it, a hash of each notebook when it was copied


def main(arguments: Sequence[str] = ()) -> int:
    """Bring the copies up to date, and become JupyterLab in their folder, with these options."""
    for line in copies():
        print(f"svdlib: {line}", file=sys.stderr)
    os.chdir(LAB)
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyterlab", *root, *arguments]
    if os.name == "posix":
        os.execv(sys.executable, command)
    return subprocess.call(command)  # elsewhere a process can't become another


def copies(folder: Path = NOTEBOOKS, lab: Path = LAB) -> list[str]:
    """Copy the notebooks, except over changed copies, which are returned in a sentence each."""
    notebooks = find(folder=folder)
    if lab.exists() and not lab.is_dir():
        raise ValueError(f"{lab} is to be the folder of the copies, but is a file; move it")
    lab.mkdir(exist_ok=True)
    changed = []
    with files.alone(lab):
        record = lab / COPIED
        copied = json.loads(record.read_text("utf-8")) if record.is_file() else {}
        for notebook in notebooks:
            copy, now, before = lab / notebook.name, _digest(notebook), copied.get(notebook.name)
            if copy.exists() and _digest(copy) not in (before, now):
                if before != now:
                    changed.append(
                        f"{copy} has changes of yours and stays; {notebook} has changed since it "
                        f"was copied, rename or remove {copy} to get that"
                    )
                continue
            if not copy.exists() or before != now:
                files.put(copy, notebook.read_text("utf-8"))
            copied[notebook.name] = now
        files.put(record, json.dumps(copied, indent=1))
    for beside in ("runs", "figures"):
        link, target = lab / beside, folder.absolute().parent / beside
        if not link.exists() and not link.is_symlink():
            target.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(target, lab.absolute()))
    return changed


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
