import pytest

from svdlib.study.running import sweeps


@pytest.fixture(scope="session")
def scheduler():
    """The address of a cluster that the tests of runs share, since each takes seconds to start."""
    with sweeps.local(1) as client:
        yield client.scheduler.address
