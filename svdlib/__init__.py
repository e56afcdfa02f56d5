"""How much of a neural network's weights does it need?"""

from svdlib.data import Data, load
from svdlib.lowrank import SVD, randomized_svd, truncated_svd
from svdlib.networks import MLPEnsemble
from svdlib.projection import Projection, project_
from svdlib.ranks import loss_profile, refine_ranks, search_ranks, verify_ranks
from svdlib.rules import reveal_ranks
from svdlib.training import train

__all__ = [
    "SVD",
    "Data",
    "MLPEnsemble",
    "Projection",
    "load",
    "loss_profile",
    "project_",
    "randomized_svd",
    "refine_ranks",
    "reveal_ranks",
    "search_ranks",
    "train",
    "truncated_svd",
    "verify_ranks",
]
