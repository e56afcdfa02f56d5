import torch

from svdlib.ensemble import traced as module
from svdlib.ensemble.traced import traced


def halved(pair, x, *, times):
    """Writes through a copy that a layout without gaps would make unnecessary."""
    A, B = pair
    whole = A.contiguous()
    for _ in range(times):
        whole = whole / 2
    A.copy_(whole)
    return B.add_(x)


def arguments():
    A = torch.ones(3, 5)[:, :4]
    return A, torch.zeros(2), torch.ones(2)


def test_does_what_the_function_does(monkeypatch):
    results = []
    for with_torchscript in (True, False):
        if not with_torchscript:
            monkeypatch.delattr(torch.jit, "trace")
        A, B, x = arguments()
        run = traced(halved, ((A, B),), x, times=3)
        assert (A == 1).all() and not B.any(), "making it changes nothing"
        for number in (1.0, 2.0):
            assert torch.equal(run(torch.full((2,), number)), B)
        results += [A, B]
    assert torch.equal(results[0], torch.full((3, 4), 1 / 64))
    assert torch.equal(results[1], torch.full((2,), 3.0))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_one_trace_for_arguments_of_one_layout(recwarn):
    def count(*settings):
        A, B, x = arguments()
        traced(halved, ((A, B),), x, times=settings[0])
        return len(module._traces)

    first = count(5)
    assert count(5) == first
    assert count(6) == first + 1
    assert not recwarn.list, "no word of TorchScript's being deprecated"


def test_a_gpu_has_no_use_for_it():
    A, B, x = (tensor.to("meta") for tensor in arguments())
    assert traced(halved, ((A, B),), x, times=1).func is halved
