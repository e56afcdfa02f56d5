import os
import stat
import subprocess
import sys

import pytest

from svdlib import files


def test_what_killed_processes_left_half_written_goes(tmp_path):
    """Also where another process has their number now; but nothing of a living one's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    other, mine = subprocess.Popen(["sleep", "600"]), files.unfinished()
    theirs = f"{files.UNFINISHED}{other.pid}-{files._birth(other.pid)}-x"
    gone = [f"{files.UNFINISHED}{number}-12-x" for number in (ended.pid, os.getpid(), other.pid)]
    try:
        for name in (*gone, f"{files.UNFINISHED}{ended.pid}-x", f"{mine}x", theirs, "more"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").touch()
        files.tidy(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {f"{mine}x", theirs, "more"}
    finally:
        other.kill()
        other.wait()
    files.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{mine}x", "more"}


def test_a_file_is_put_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    link.symlink_to(path)
    before = os.umask(0o027)
    try:
        files.put(path, "old")
    finally:
        os.umask(before)
    assert path.read_text() == "old" and stat.S_IMODE(path.stat().st_mode) == 0o640
    files.put(link, "by a link")
    assert link.is_symlink() and path.read_text() == "by a link"

    def half(place, text, encoding):
        place.write_bytes(text[:1].encode())
        raise OSError("full")

    monkeypatch.setattr(files.Path, "write_text", half)
    with pytest.raises(OSError, match="full"):
        files.put(path, "new")
    assert path.read_text() == "by a link" and len(list(tmp_path.iterdir())) == 2


HOLD = """
import sys, time
from pathlib import Path
from svdlib import files
with files.alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waits = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert "waiting for another process that writes to" in waits.stderr.readline()
    holder.kill()
    assert waits.stdout.readline() == "held\n"
    for process in (holder, waits):
        process.kill()
        process.communicate()
    with files.alone(tmp_path) as held:
        assert held and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""
