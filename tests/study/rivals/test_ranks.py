import torch

from svdlib.study.rivals.ranks import profile_race


def test_every_way_is_timed(generator):
    x, y = torch.rand(20, 12, generator=generator), torch.arange(20) % 3
    times = profile_race((12, 6, 3), x, y, sample=2)
    assert set(times) == {"paper", "one SVD", "nested", "search", "bound"}
    assert min(times.values()) > 0
