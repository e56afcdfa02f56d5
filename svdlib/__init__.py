"""How much of a neural network's weights does it need?"""

from svdlib.compression import factorize, merge
from svdlib.cost import cost
from svdlib.data import Data, load
from svdlib.lowrank import SVD, randomized_svd, truncated_svd
from svdlib.modules import LowRank
from svdlib.networks import MLPEnsemble
from svdlib.projection import Projection, project_
from svdlib.ranks import loss_profile, refine_ranks, search_ranks, verify_ranks
from svdlib.rules import reveal_ranks
from svdlib.storage import export_onnx, load_factorized, save_factorized
from svdlib.training import train

__all__ = [
    "SVD",
    "Data",
    "LowRank",
    "MLPEnsemble",
    "Projection",
    "cost",
    "export_onnx",
    "factorize",
    "load",
    "load_factorized",
    "loss_profile",
    "merge",
    "project_",
    "randomized_svd",
    "refine_ranks",
    "reveal_ranks",
    "save_factorized",
    "search_ranks",
    "train",
    "truncated_svd",
    "verify_ranks",
]
