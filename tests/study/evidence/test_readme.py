import jinja2
import pytest

from svdlib.study.evidence import readme


def test_the_readme_is_its_template_with_the_numbers_of_the_tables(tmp_path):
    readme.write(tmp_path / "README.md")
    written = (tmp_path / "README.md").read_text()
    hint = "edit docs/README.md.j2, then run python -m svdlib readme"
    assert written == (readme.ROOT / "README.md").read_text(), hint


def test_a_number_that_nobody_provides_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md.j2").write_text("n = {{ unheard_of }}\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="'unheard_of' is undefined"):
        readme.render()
