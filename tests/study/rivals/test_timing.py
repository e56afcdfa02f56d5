import pytest

from svdlib.study.rivals import timing


@pytest.mark.parametrize(
    ("everyone", "own", "sentence"),
    [
        (20.5, 20.0, "Timed alone: other processes took under 0.15 of 2 cores."),
        (19.9, 20.0, "Timed alone: "),  # clocks of their own
        (20.0, 5.0, "Not alone: other processes took 1.5 of 2 cores while this was timed."),
        (0.0, 20.0, "This system doesn't tell what other processes do"),
    ],
)
def test_times_say_whether_they_were_alone(everyone, own, sentence, monkeypatch, capsys):
    spent = iter([(100.0, 50.0, 7.0), (110.0, 50.0 + everyone, 7.0 + own)])
    monkeypatch.setattr(timing, "_spent", lambda: next(spent))
    monkeypatch.setattr(timing.psutil, "cpu_count", lambda: 2)
    with timing.watched():
        pass
    assert capsys.readouterr().out.startswith(sentence)


def test_what_fails_while_it_is_timed_says_nothing_of_the_time(capsys):
    with pytest.raises(ZeroDivisionError), timing.watched():
        1 / 0  # noqa: B018
    assert not capsys.readouterr().out


def test_this_process_and_its_children_are_not_others():
    wall, everyone, own = timing._spent()
    assert wall > 0 and everyone >= 0 and own > 0
