import pytest

import svdlib
from svdlib.study.pictures.explorer import Session
from svdlib.study.pictures.explorer.runs import describe


@pytest.fixture
def session(mnist):
    return Session(svdlib.load("MNIST", device="cpu").head(640, 100), epochs=2)


def test_a_run_is_the_library_s_own_training(session):
    choice = svdlib.Projection("truncsvd", 5)
    seen = []
    history = session.train(choice, seeds=2, watch=lambda rows: seen.append(int(rows.epoch.max())))
    nets = svdlib.MLPEnsemble(session.sizes, seeds=[0, 1, 0, 1], device="cpu")
    expected = svdlib.train(
        nets, session.data, epochs=2, projection=[None, None, choice, choice], progress=False
    )
    assert history.test_loss.tolist() == expected.test_loss.tolist()
    assert seen == [1, 2]
    table = session.table()
    last = history[(history.epoch == 2) & (history.method != "stock")]
    assert table["test error (%)"].tolist() == [round(last.test_error.mean(), 2)]
    assert session.nets[0] and len(session.nets) == 4


def test_stock_alone_has_nothing_to_add(session):
    session.train(None, seeds=1)
    assert session.table()["points added to stock"].tolist() == [""]


def test_one_training_at_a_time_and_a_failing_watcher_frees_the_session(session):
    def again(_):
        session.train(None, 1)

    with pytest.raises(RuntimeError, match="a training is under way"):
        session.train(None, 1, watch=again)
    assert not session.runs
    assert len(session.train(None, 1)) == 2


def test_a_stopped_training_keeps_the_epochs_that_it_had(session):
    session.epochs = 50
    history = session.train(None, 1, watch=lambda rows: session.stop())
    assert 1 <= history.epoch.max() < 50
    assert session.runs[0] is history


def test_projections_are_described_in_words():
    choice = svdlib.Projection("rsvd", 10, every=3, oversample=2, power_iters=0)
    assert describe(choice) == "rSVD, rank 10, p = 2, q = 0, every 3 steps"
    assert describe(svdlib.Projection("truncsvd", 5)) == "truncSVD, rank 5, every epoch"
    assert describe(None) == "stock"
