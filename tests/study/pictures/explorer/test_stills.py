import io

import ipywidgets as widgets
import nbformat
import pandas as pd
from PIL import Image

from svdlib.study.pictures import explorer
from svdlib.study.pictures.explorer.pictures import static_html
from svdlib.study.running.execute import cleaned, execute


def picture(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "png")
    return widgets.Image(value=stream.getvalue(), format="png")


def test_a_still_holds_the_words_and_the_pictures():
    panel = widgets.VBox([widgets.HBox([picture(4, 3)]), widgets.HTML("so"), widgets.HTML("")])
    text = static_html(panel)
    assert text.count("<img") == 1 and text.endswith("<div>so</div>")


def test_saved_pictures_stand_one_above_another(tmp_path):
    panel = widgets.VBox([picture(4, 3), picture(9, 2)])
    data = pd.DataFrame({"a": [1]})
    explorer.save(panel, "09_x", data, "")
    explorer.save(panel, "09_x", data, tmp_path)
    with Image.open(tmp_path / "09_x.png") as page:
        assert page.size == (9, 5)
    assert (tmp_path / "09_x.csv").read_text() == "a\n1\n"


def test_a_stored_notebook_keeps_the_still_and_no_widget():
    source = (
        "import ipywidgets as w\nfrom svdlib.study.pictures import explorer\n"
        "explorer.show(w.VBox([w.HTML('rank 3')]))\nw.IntSlider()"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    done = execute(nbformat.writes(book), "a", None, ".")
    assert done.error is None
    (cell,) = nbformat.reads(cleaned(done.files["a.ipynb"].decode()), as_version=4).cells
    (output,) = cell.outputs
    assert "rank 3" in output.data["text/html"]
    assert not any("widget" in kind for kind in output.data)
