"""One layer of each kind that holds a matrix, with an input for it."""

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """As the transformers library has it: a Linear whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.1 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        places = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(places)


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    window = {"stride": 2, "padding": 1, "dilation": 2}
    made = {
        "Linear": lambda: nn.Linear(18, 16),
        "Conv1d": lambda: nn.Conv1d(8, 12, 5, **window),
        "Conv1d, groups": lambda: nn.Conv1d(16, 12, 5, groups=2, padding="same"),
        "Conv2d": lambda: nn.Conv2d(8, 12, (3, 2), **window, padding_mode="circular"),
        "Conv2d, groups": lambda: nn.Conv2d(16, 24, 3, groups=4, bias=False, **window),
        "Conv3d": lambda: nn.Conv3d(6, 9, (3, 2, 3), padding=(1, 0, 2), stride=(1, 2, 2)),
        "Conv3d, groups": lambda: nn.Conv3d(8, 12, 2, groups=2, padding_mode="replicate", **window),
        "Conv1D": lambda: Conv1D(16, 18),
        "Embedding": lambda: nn.Embedding(40, 12, padding_idx=3),
        "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 5, output_padding=1, **window),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, 3, bias=False, **window),
        "ConvTranspose2d, groups": lambda: nn.ConvTranspose2d(16, 12, 3, groups=2, **window),
        "ConvTranspose3d": lambda: nn.ConvTranspose3d(8, 6, 2, **window),
    }
    return made[kind]().double()


KINDS = (
    "Linear", "Conv1d", "Conv1d, groups", "Conv2d", "Conv2d, groups", "Conv3d", "Conv3d, groups",
    "Conv1D", "Embedding", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose2d, groups",
    "ConvTranspose3d",
)  # fmt: skip


def inputs(part: nn.Module, n: int = 5) -> Tensor:
    """Inputs (n, …) that the layer takes."""
    g = torch.Generator().manual_seed(1)
    if isinstance(part, nn.Embedding):
        return torch.randint(part.num_embeddings, (n, 7), generator=g)
    if not hasattr(part, "in_channels"):
        return torch.randn(n, 7, 18, generator=g, dtype=torch.float64)
    places = range(9, 9 + part.weight.ndim - 2)
    return torch.randn(n, part.in_channels, *places, generator=g, dtype=torch.float64)


def matrices(part: nn.Module) -> list[Tensor]:
    """The layer's matrices, one a group, straight from what its weight is documented to be."""
    weight = part.weight.detach()
    if "Transpose" in type(part).__name__:  # (in, out / groups, …)
        return [W.flatten(1).mT for W in weight.chunk(part.groups)]
    if type(part).__name__ in ("Embedding", "Conv1D"):
        return [weight.mT]
    return [W.flatten(1) for W in weight.chunk(getattr(part, "groups", 1))]


class Scores(nn.Module):
    """Class scores (n, 3) from one layer, its output's tanh summed over places."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        z = self.part(x).flatten(1).tanh()
        return torch.stack([each.mean(1) for each in z.chunk(3, 1)], 1)
