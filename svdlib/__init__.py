"""How much of a neural network's weights does it need?"""

from svdlib.data import Data, load
from svdlib.lowrank import SVD, randomized_svd, truncated_svd
from svdlib.networks import MLPEnsemble
from svdlib.projection import Projection, project_
from svdlib.training import train

__all__ = [
    "SVD",
    "Data",
    "MLPEnsemble",
    "Projection",
    "load",
    "project_",
    "randomized_svd",
    "train",
    "truncated_svd",
]
