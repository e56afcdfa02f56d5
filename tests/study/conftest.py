import pytest

from svdlib.study.running import sweeps


@pytest.fixture(scope="session")
def scheduler():
    """The address of a cluster that the tests of runs share, since each takes seconds to start."""
    with sweeps.local(1) as client:
        yield client.scheduler.address


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of notebooks in a project of its own, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"
