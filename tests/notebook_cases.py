"""Small parameters of every notebook, and others drawn at random."""

from pathlib import Path
from random import Random

from svdlib.study.running.parameters import defaults, parse

SMALL = {
    "01_baseline": {"seeds": "1", "sizes": "[784, 12, 10]", "epochs": "2", "progress": "true"},
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
    "09_explorer": {"seeds": "2", "epochs": "2"},
    "10_your_network": {"texts": "4", "pairs": "6", "shares": "[0.6]"},
    "11_when_to_cut": {
        "checkpoints": "[1, 2]",
        "ranks": "[4]",
        "compared": "[4]",
        "late": "[1]",
        "order_epochs": "1",
        "kept_at": "[1]",
        "validation": "100",
    },
    "13_language_model": {
        "passages": "4",
        "tested": "2",
        "layers": '["model.layers.29.*"]',
        "shares": "[0.99]",
    },
    "12_lenet": {
        "methods": '["dense", "narrow", "adaptive factors", "fixed factors"]',
        "budgets": "[9000]",
        "seeds": "2",
        "epochs": "2",
        "validation": "100",
    },
}

# 10 and 13 have no images.
IMAGES = {name: {"train_images": "640"} for name in SMALL if name[:2] not in ("10", "13")}


def network(random: Random) -> list[int]:
    return [784, *(random.randint(1, 40) for _ in range(random.randint(1, 3))), 10]


def some(random: Random, low: int, high: int, count: int = 0) -> list[int]:
    return random.sample(range(low, high + 1), count or random.randint(1, 3))


# How a parameter is drawn, by its name; those that are not here keep their small value.
DRAWS = {
    **dict.fromkeys(("seeds", "paper_seeds", "deviation_seeds", "sweep_seeds"), lambda r: r.randint(1, 3)),
    **dict.fromkeys(("graded", "projected", "repeats"), lambda r: r.randint(1, 3)),
    **dict.fromkeys(("epochs", "paper_epochs", "paper_more", "finetune"), lambda r: r.randint(1, 2)),
    **dict.fromkeys(("wide_epochs", "draws"), lambda r: r.randint(1, 3)),
    **dict.fromkeys(("rank", "start_rank", "narrow_rank"), lambda r: r.randint(1, 20)),
    **dict.fromkeys(("oversample", "power_iters"), lambda r: r.randint(0, 3)),
    **dict.fromkeys(("sizes", "paper_sizes", "wide", "narrow", "widths"), network),
    **dict.fromkeys(("ranks", "paper_ranks", "race_ranks", "oversamples"), lambda r: some(r, 1, 20)),
    **dict.fromkeys(("shapes", "race_shapes"), lambda r: [some(r, 8, 60, 2) for _ in range(r.randint(1, 3))]),
    **dict.fromkeys(("shares", "tails"), lambda r: r.sample([0.01, 0.05, 0.1, 0.3, 0.5, 0.9], r.randint(1, 3))),
    "first_seed": lambda r: r.choice([0, 7, 10**10]),
    "every": lambda r: r.choice(["epoch", "step", "published"]),
    "counts": lambda r: some(r, 1, 20),
    "budgets": lambda r: some(r, 500, 34_000),
    "wide_ranks": lambda r: some(r, 1, 50),
    "bench": lambda r: [network(r)],
    "tolerance": lambda r: r.choice([1e-9, 0.01, 5]),
    "methods": lambda r: r.sample(["narrow", "cut", "cut, trained on", "projected"], r.randint(1, 3)),
    "everything": lambda r: r.choice([True, False]),
    **dict.fromkeys(("validation", "wide_images", "bench_images"), lambda r: r.choice([1, 50])),
    "train_images": lambda r: r.choice([100, 640]),
}  # fmt: skip


def small(path: Path) -> dict[str, object]:
    """The notebook's small parameters, all of them."""
    given = {"progress": "false", **IMAGES.get(path.stem, {}), **SMALL[path.stem]}
    return defaults(path) | parse(path, given)


def drawn(parameters: dict[str, object], random: Random) -> dict[str, object]:
    """These, about a third of them drawn."""
    some = [name for name in parameters if name in DRAWS and random.random() < 0.35]
    return parameters | {name: DRAWS[name](random) for name in some}
