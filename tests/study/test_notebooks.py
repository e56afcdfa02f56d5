"""Every notebook runs through on a small case, headless."""

from pathlib import Path

import pytest

from svdlib.study import runner

FOLDER = Path(__file__).parents[2] / "notebooks"

SMALL = {
    "01_baseline": {"seeds": "3", "epochs": "2"},
    "02_rsvd": {"seeds": "3", "epochs": "2"},
    "03_truncsvd": {"seeds": "3", "epochs": "2"},
    "04_comparison": {
        "seeds": "3",
        "epochs": "2",
        "deviation_seeds": "2",
        "sweep_seeds": "2",
        "ranks": "[2, 9, 12]",
    },
    "05_speed": {"counts": "[1, 2]", "projected": "2", "repeats": "1"},
    "06_rank_revealer": {
        "seeds": "3",
        "graded": "2",
        "epochs": "2",
        "shares": "[0.4, 0.6]",
        "wide": "[784, 40, 40, 10]",
        "wide_ranks": "[1, 10, 40]",
        "wide_images": "100",
        "bench": "[[784, 15, 15, 10]]",
    },
    "07_randomized_svd": {
        "draws": "5",
        "widths": "[784, 60, 60, 10]",
        "shapes": "[[15, 60], [40, 40]]",
        "ranks": "[2, 5]",
        "race_shapes": "[[40, 60], [80, 50]]",
        "race_ranks": "[2, 5]",
        "repeats": "1",
    },
    "08_compression": {
        "paper_seeds": "2",
        "paper_epochs": "1",
        "paper_more": "1",
        "paper_ranks": "[3, 5]",
        "wide": "[784, 40, 40, 10]",
        "seeds": "2",
        "epochs": "1",
        "finetune": "1",
        "budgets": "[20000, 5000]",
        "start_rank": "10",
        "narrow": "[784, 20, 20, 10]",
        "narrow_rank": "4",
        "everything": "true",
    },
    "10_your_network": {"texts": "4", "pairs": "6", "shares": "[0.6]"},
    "09_explorer": {"seeds": "2", "epochs": "2"},
}


def test_every_notebook_has_a_small_case():
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


# One has no images.
IMAGES: dict[str, dict[str, str]] = {"10_your_network": {}}


@pytest.mark.parametrize("name", SMALL)
def test_small_case(name, tmp_path, mnist):
    (outcome,) = runner.run(
        [name],
        {"progress": "false", **IMAGES.get(name, {"train_images": "640"}), **SMALL[name]},
        out=tmp_path / "runs",
        figures=tmp_path / "figures",
        folder=FOLDER,
        progress=False,
    )
    assert outcome.error is None
    drawn = sorted(path.name for path in (tmp_path / "figures").glob(f"{name[:2]}_*"))
    assert drawn and any(figure.endswith(".png") for figure in drawn)
