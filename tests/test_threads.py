import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import svdlib
from svdlib import threads
from svdlib.ensemble.networks import perceptron


def test_inner_threads_are_restored_whatever_happens():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads.inside(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_the_first_piece_s_exception_comes_once_all_are_done():
    done = []

    def work(piece):
        if piece in (1, 2):
            raise ValueError(piece)
        done.append(piece)

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="1"):
        threads.side_by_side(pool, work, range(6), lambda: None, threading.Event())
    assert sorted(done) == [0, 3, 4, 5]


def test_an_interrupt_stops_the_work_and_waits_for_it():
    stop, ended = threading.Event(), []

    def work(piece):
        assert stop.wait(10)
        ended.append(piece)

    def interrupt():
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            threads.side_by_side(pool, work, range(4), interrupt, stop)
        assert sorted(ended) == [0, 1, 2, 3]


# Each public call that computes: made outside of any mode, then called within one.


def prepared(name, data, folder):
    torch.manual_seed(0)
    net = perceptron((12, 60, 3))
    small = svdlib.factorize(net, {"0": 3})
    x, y = data.test_x, data.test_y

    def trained(nets, **settings):
        history = svdlib.train(nets, data, epochs=2, progress=False, **settings)
        return [*nets.parameters(), *numbers(history)]

    if name in ("train", "adam", "factors", "validation"):
        nets = svdlib.MLPEnsemble.from_modules([copy.deepcopy(net) for _ in range(3)])
        settings = {"projection": svdlib.Projection("rsvd", 2, "step", 0, 1), "dropout": 0.1}
        if name == "adam":
            settings = {"optimizer": "adam", "shuffle": True}
        if name == "validation":
            settings = {"validation": (x, y)}
        if name == "factors":
            nets = svdlib.MLPEnsemble.from_modules([copy.deepcopy(small) for _ in range(3)])
            settings = {"tail": 0.1}
        return partial(trained, nets, **settings)
    if name == "load_factorized":
        path = f"{folder}/small.safetensors"
        svdlib.save_factorized(small, path)
        return lambda: list(svdlib.load_factorized(net, path).parameters())
    ranks = {"0": 5, "2": 2}
    nets = svdlib.MLPEnsemble.from_modules([copy.deepcopy(small) for _ in range(3)])
    return {
        "from_modules": lambda: list(svdlib.MLPEnsemble.from_modules([net, net]).parameters()),
        "one network": lambda: list(nets[1].parameters()),
        "truncate_": lambda: (nets.truncate_(0.5), list(nets.parameters()))[1],
        "losses": lambda: list(nets.losses(x, y)),
        "spectra": lambda: numbers(nets.spectra()),
        "factorize": lambda: list(svdlib.factorize(net, {"0": 3}, calibration=x).parameters()),
        "merge": lambda: list(svdlib.merge(small).parameters()),
        "cost": lambda: numbers(svdlib.cost(small, x, repeats=1)),
        "project_": lambda: list(svdlib.project_(net, 2).parameters()),
        "truncated_svd": lambda: list(svdlib.truncated_svd(net[0].weight.detach(), 2)),
        "randomized_svd": lambda: list(
            svdlib.randomized_svd(
                net[0].weight.detach(), 2, generator=torch.Generator().manual_seed(0)
            )
        ),
        "loss_profile": lambda: numbers(svdlib.loss_profile(net, x, y, progress=False)),
        "batches": lambda: numbers(
            svdlib.loss_profile(
                net, [x], objective=lambda m, x: m(x).square().sum(1), progress=False
            )
        ),
        "joint_profile": lambda: numbers(svdlib.joint_profile(net, x, y, progress=False)),
        "predicted_profile": lambda: numbers(svdlib.predicted_profile(net, x, y)),
        "search_ranks": lambda: numbers(
            pd.Series(svdlib.search_ranks(net, x, y, lambda rows: rows.increase <= 0.1)).to_frame()
        ),
        "verify_ranks": lambda: numbers(
            pd.Series(svdlib.verify_ranks(net, ranks, x, y)).to_frame()
        ),
        "refine_ranks": lambda: numbers(
            pd.Series(svdlib.refine_ranks(net, x, y, ranks, tolerance=0.1)).to_frame()
        ),
    }[name]


def numbers(table):
    """A table's numbers, but for those of the clock."""
    timed = [name for name in table if "seconds" in str(name)]
    values = table.drop(columns=timed).select_dtypes("number").values
    return [torch.tensor(values, device="cpu", dtype=torch.float64)]


CALLS = [
    "train", "adam", "factors", "validation", "factorize", "merge", "load_factorized", "cost",
    "project_", "truncated_svd", "randomized_svd", "loss_profile", "search_ranks", "verify_ranks",
    "refine_ranks", "joint_profile", "predicted_profile", "batches", "from_modules", "one network", "truncate_", "losses", "spectra",
]  # fmt: skip


@contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "double by default": double_by_default,
    "another device by default": lambda: torch.device("meta"),
}


@pytest.mark.filterwarnings("ignore:left as they were")
@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_torch_as_it_was_and_heed_no_mode(name, blobs, tmp_path):
    torch.manual_seed(5)
    before, callers = torch.get_rng_state(), torch.get_num_threads()
    call = prepared(name, blobs, tmp_path)
    torch.set_rng_state(before)
    usual = call()
    assert torch.equal(torch.get_rng_state(), before), "no random number is drawn"
    assert torch.get_num_threads() == callers and torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    for mode, context in MODES.items():
        call = prepared(name, blobs, tmp_path)
        with context():
            found = call()
        for one, other in zip(usual, found, strict=True):
            assert one.dtype == other.dtype, mode
            torch.testing.assert_close(
                other.detach(), one.detach(), rtol=0, atol=0, equal_nan=True, msg=mode
            )
            assert not (isinstance(other, nn.Parameter) and other.is_inference()), mode


class Augmented(torch.utils.data.Dataset):
    """Images that are changed by random numbers of torch, numpy and Python at each reading."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return (self.x[i] + 0.01 * noise).float(), self.y[i]


def drawn():
    """What the next numbers of torch, numpy and Python will be."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1:], random.getstate()  # noqa: NPY002


OF_LOADERS = {
    "factorize": lambda net, data: svdlib.factorize(net, {"0": 3}, calibration=data),
    "sequential": lambda net, data: svdlib.factorize(
        net, {"0": 3}, calibration=svdlib.Calibration(data, sequential=True)
    ),
    "compress": lambda net, data: svdlib.compress(net, data, parameters=0.6, progress=False),
    "cost": lambda net, data: svdlib.cost(net, data, repeats=1),
    "loss_profile": lambda net, data: svdlib.loss_profile(net, data, progress=False),
    "joint_profile": lambda net, data: svdlib.joint_profile(net, data, progress=False),
    "verify_ranks": lambda net, data: svdlib.verify_ranks(net, {"0": 5, "2": 2}, data),
    "search_ranks": lambda net, data: svdlib.search_ranks(
        net, data, None, lambda rows: rows.increase <= 0.1
    ),
    "refine_ranks": lambda net, data: svdlib.refine_ranks(
        net, data, None, {"0": 5, "2": 2}, tolerance=0.1
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OF_LOADERS)
def test_data_that_augment_leave_the_caller_s_random_numbers(name, blobs):
    net = perceptron((12, 60, 3))
    data = torch.utils.data.DataLoader(
        Augmented(blobs.test_x, blobs.test_y), batch_size=64, shuffle=True
    )
    before = drawn()
    OF_LOADERS[name](net, data)
    after = drawn()
    assert before[0] == after[0] and before[2] == after[2]
    np.testing.assert_equal(before[1], after[1])


def test_random_states_are_restored_after_an_error():
    before = drawn()
    with pytest.raises(ZeroDivisionError), threads.same_random():
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        1 / 0  # noqa: B018
    assert before[0] == drawn()[0] and before[2] == drawn()[2]
    np.testing.assert_equal(before[1], drawn()[1])
