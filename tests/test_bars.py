import nbformat
from nbclient import NotebookClient

from svdlib import bars
from svdlib.study.running.execute import lasting

CODE = """
from svdlib.bars import bar
for _ in bar(range(3), desc="all of it"):
    pass
for _ in bar(range(3), desc="gone", leave=False):
    pass
print("done")
"""


def test_a_bar_is_text_in_a_saved_notebook():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    NotebookClient(notebook, kernel_name="python3", extra_arguments=["--log-level=40"]).execute()
    bar, gone, done = notebook.cells[0].outputs
    assert bar.data["text/plain"].startswith("all of it: 100%|██████████| 3/3")
    assert set(bar.data) == {"text/plain"} and gone.data["text/plain"] == ""
    assert done.text == "done\n"
    assert lasting([bar, gone, done]) == [done]


def test_elsewhere_it_is_a_line_of_standard_error(capsys):
    assert list(bars.bar(range(3), desc="all of it")) == [0, 1, 2]
    written = capsys.readouterr()
    assert "all of it: 100%" in written.err and not written.out


def test_no_bar_says_nothing(capsys):
    assert list(bars.bar("ab", progress=False)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
