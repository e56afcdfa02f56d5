import pytest

import svdlib


@pytest.fixture(scope="module")
def trained(mnist):
    nets = svdlib.MLPEnsemble((784, 40, 40, 10), seeds=(0,), device="cpu")
    svdlib.train(nets, mnist.head(12800, 100), epochs=3, lr=0.1, progress=False)
    return nets[0], mnist.train_x[-1000:], mnist.train_y[-1000:]
