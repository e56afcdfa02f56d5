import pytest

from svdlib.study.evidence import readme


def test_the_readme_s_numbers_are_those_of_the_tables():
    text = (readme.ROOT / "README.md").read_text()
    assert text == readme.render(text), "python -m svdlib readme writes them anew"


def test_every_block_is_there_and_no_other():
    text = (readme.ROOT / "README.md").read_text()
    with pytest.raises(ValueError, match="the README has the blocks"):
        readme.render(text.replace("<!-- curves -->", "<!-- other -->"))
    with pytest.raises(ValueError, match="the README has the blocks"):
        readme.render("")


def test_other_text_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(readme, "BLOCKS", {"one": lambda: "1", "two": lambda: "a\nb"})
    text = "Of <!-- one -->9<!-- end --> things.\n\n<!-- two --><!-- end -->\nMore.\n"
    assert readme.render(text) == (
        "Of <!-- one -->1<!-- end --> things.\n\n<!-- two -->\na\nb\n<!-- end -->\nMore.\n"
    )
