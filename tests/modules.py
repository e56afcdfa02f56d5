"""Networks of many kinds for the tests of layers and ranks."""

import torch
from torch import nn


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "tanh":
        return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.GELU(),
                             nn.Linear(7, 3))  # fmt: skip
    if kind == "in-place relu":
        return nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 3))
    if kind == "convolutions":
        return nn.Sequential(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 2, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 4, 3, stride=2), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(3),
        )  # fmt: skip
    if kind == "groups":
        return nn.Sequential(
            nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 3)
        )
    if kind == "tied":
        shared = nn.Linear(12, 12)
        return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(12, 3))
    if kind == "hooked":
        model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))
        model[0].register_forward_hook(lambda layer, inputs, output: output * 2)
        return model

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x.view(-1, 3, 4)).relu_()
            return self.out(self.attention(x, x, x)[0].mean(1))

    if kind == "tokens":
        return Tokens()

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(x + torch.relu(self.inner(x)))

    return Residual()
