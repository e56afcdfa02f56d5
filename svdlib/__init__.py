"""How much of a neural network's weights does it need?"""

from importlib.metadata import version

from svdlib.compress import Compressed, compress
from svdlib.data import Data, load
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.layers.adapt import (
    LowRankTraining,
    orthogonality,
    singular_values,
    spectral_decay,
    truncate_,
)
from svdlib.layers.calibrate import Calibration
from svdlib.layers.cost import cost
from svdlib.layers.factorize import factorize, merge
from svdlib.layers.project import project_
from svdlib.layers.storage import export_onnx, load_factorized, save_factorized
from svdlib.linalg.svd import SVD, randomized_svd, truncated_svd
from svdlib.network.calls import next_token_losses
from svdlib.network.low_rank import LowRank
from svdlib.ranks.joint import front, joint_profile
from svdlib.ranks.predicted import predicted_profile
from svdlib.ranks.profile import loss_profile, search_ranks
from svdlib.ranks.reduced import refine_ranks, verify_ranks
from svdlib.ranks.rules import reveal_ranks

__all__ = [
    "SVD",
    "Calibration",
    "Compressed",
    "Data",
    "LowRank",
    "LowRankTraining",
    "MLPEnsemble",
    "Projection",
    "compress",
    "cost",
    "export_onnx",
    "factorize",
    "front",
    "joint_profile",
    "load",
    "load_factorized",
    "loss_profile",
    "merge",
    "next_token_losses",
    "orthogonality",
    "predicted_profile",
    "project_",
    "randomized_svd",
    "refine_ranks",
    "reveal_ranks",
    "save_factorized",
    "search_ranks",
    "singular_values",
    "spectral_decay",
    "train",
    "truncate_",
    "truncated_svd",
    "verify_ranks",
]

__version__ = version("svdlib")


def __dir__() -> list[str]:
    """The public names alone."""
    return [*__all__, "__version__"]
