import contextlib
import os
import stat
import subprocess
import sys

import pytest

from svdlib import files

HOLD = """
import sys, time
from pathlib import Path
from svdlib import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(function, folder):
    """A process inside a block of this function; it says so when it is."""
    command = [sys.executable, "-c", HOLD, function, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, bufsize=1, **pipes)


def test_what_killed_processes_left_half_written_goes(tmp_path):
    """But nothing of a living process."""
    other = hold("unfinished", tmp_path)
    assert other.stdout.readline() == "held\n"
    (theirs,) = tmp_path.iterdir()
    (theirs / "file").touch()
    (tmp_path / "more").mkdir()
    with files.unfinished(tmp_path) as mine:
        files.tidy(tmp_path)
        assert {*tmp_path.iterdir()} == {theirs, mine, tmp_path / "more"}
        other.kill()
        other.communicate()
        files.tidy(tmp_path)
        assert {*tmp_path.iterdir()} == {mine, tmp_path / "more"}
    assert [*tmp_path.iterdir()] == [tmp_path / "more"]


def test_an_unfinished_folder_that_is_tidied_before_it_is_locked_is_made_again(
    tmp_path, monkeypatch
):
    alone, removed = files.alone, []

    def late(folder):
        if not removed:
            removed.append(folder)
            folder.rmdir()
            return contextlib.nullcontext()
        return alone(folder)

    monkeypatch.setattr(files, "alone", late)
    with files.unfinished(tmp_path) as folder:
        assert folder.is_dir() and folder != removed[0]


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
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


def test_a_folder_takes_the_place_of_another_completely_or_not_at_all(tmp_path, monkeypatch):
    place = tmp_path / "runs" / "a"
    for content in ("old", "new"):
        with files.complete_folder(place) as part:
            (part / "file").write_text(content)
            assert not place.exists() or (place / "file").read_text() == "old"
        assert (place / "file").read_text() == content
    with pytest.raises(OSError, match="full"), files.complete_folder(place) as part:
        raise OSError("full")
    rename = files.Path.rename

    def fails(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(files.Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), files.complete_folder(place) as part:
        (part / "file").write_text("newer")
    assert (place / "file").read_text() == "new" and [*place.parent.iterdir()] == [place]


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path, capsys):
    holder = hold("alone", tmp_path)
    assert holder.stdout.readline() == "held\n"
    waits = hold("alone", tmp_path)
    assert "waiting for another process that writes to" in waits.stderr.readline()
    holder.kill()
    assert waits.stdout.readline() == "held\n"
    for process in (holder, waits):
        process.kill()
        process.communicate()
    with files.alone(tmp_path):
        assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""
