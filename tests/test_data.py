import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

import svdlib
from svdlib import data as module
from svdlib.data import FILES


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def cached(name: str) -> Path:
    """The folder with the real files, once they are fetched."""
    return Path(os.environ.get("SVDLIB_DATA") or platformdirs.user_cache_dir("svdlib"), name, "raw")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_mnist_is_the_published_one(mnist):
    assert mnist.train_x.shape == (60000, 784)
    assert mnist.test_x.shape == (10000, 784)
    assert torch.bincount(mnist.train_y).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    pixels = (mnist.test_x * 255).round().byte().numpy()
    digest = hashlib.md5(idx(pixels.reshape(-1, 28, 28))).hexdigest()
    assert digest == module.PUBLISHED["MNIST"][2]


def test_own_folder_gzipped_or_not(folder):
    data = svdlib.load("FashionMNIST", root=folder, device="cpu")
    assert data.train_x.shape == (20, 784)
    assert data.test_y.shape == (10,)
    assert data.train_x.dtype == torch.float32
    assert data.train_x.min() >= 0 and data.train_x.max() <= 1


def test_cache_needs_no_network(mnist, monkeypatch):
    monkeypatch.setattr(module, "_from_torchvision", None)
    monkeypatch.setattr(module, "_from_wheel", None)
    assert torch.equal(svdlib.load("MNIST", device="cpu").test_y, mnist.test_y)


def no_network(name, part):
    raise OSError("no network")


def test_no_network_and_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SVDLIB_DATA", str(tmp_path))
    monkeypatch.setattr(module, "_from_torchvision", no_network)
    monkeypatch.setattr(module, "_from_wheel", no_network)
    with pytest.raises(ConnectionError, match=r"no network.*load\(root"):
        svdlib.load("MNIST")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_wheel_that_pip_cannot_reach(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="no matching distribution"):
        module._from_wheel("MNIST", tmp_path)


def test_damaged_cache_is_fetched_anew(mnist, monkeypatch, tmp_path):
    intact = cached("MNIST")
    cache = tmp_path / "MNIST" / "raw"
    cache.mkdir(parents=True)
    for file in module.FILES:
        os.link(intact / file, cache / file)
    damaged = cache / module.FILES[3]
    content = bytearray(damaged.read_bytes())
    damaged.unlink()
    content[-1] ^= 1
    damaged.write_bytes(content)

    def again(name, part):
        for file in module.FILES:
            shutil.copy(intact / file, part)
        return part

    monkeypatch.setenv("SVDLIB_DATA", str(tmp_path))
    monkeypatch.setattr(module, "_from_torchvision", again)
    again.__name__ = "_from_torchvision"
    assert torch.equal(svdlib.load("MNIST", device="cpu").test_y, mnist.test_y)
    assert hashlib.md5(damaged.read_bytes()).hexdigest() == module.PUBLISHED["MNIST"][3]


def test_wrong_download_is_refused(monkeypatch, tmp_path, folder):
    def wrong(name, part):
        for file in module.FILES:
            (part / file).write_bytes(b"half")
        return part

    wrong.__name__ = "_from_torchvision"
    monkeypatch.setenv("SVDLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_from_torchvision", wrong)
    monkeypatch.setattr(module, "_from_wheel", wrong)
    with pytest.raises(ConnectionError, match="other checksums"):
        svdlib.load("MNIST")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-5], "half downloaded"),
        (lambda content: content + b"x", "should hold"),
        (lambda content: b"PK" + content[2:], "not an IDX file"),
        (lambda content: content[:3], "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
    ],
)
def test_broken_files(folder, change, message):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        svdlib.load("MNIST", root=folder)


def test_half_gzip(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match="half downloaded"):
        svdlib.load("MNIST", root=folder)


def test_images_and_labels_of_other_lengths(folder):
    labels = np.zeros(3, np.uint8)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(ValueError, match="10 t10k images but 3 labels"):
        svdlib.load("MNIST", root=folder)


def test_missing_file(folder):
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-images"):
        svdlib.load("MNIST", root=folder)


def test_unknown_name_and_device():
    with pytest.raises(ValueError, match="unknown data set 'CIFAR'; known: MNIST"):
        svdlib.load("CIFAR")
    with pytest.raises(ValueError, match="'quantum' is not there"):
        svdlib.load("MNIST", device="quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not there"):
            svdlib.load("MNIST", device="cuda")


def test_inputs_with_ones_are_a_view_where_they_are_stored_so(generator):
    x = torch.rand(5, 20, generator=generator)
    wider = module.with_ones(x)
    assert torch.equal(wider[:, :-1], x) and (wider[:, -1] == 1).all()
    again = module.with_ones(wider[:, :-1])
    assert again.data_ptr() == wider.data_ptr() and torch.equal(again, wider)
    tail = module.with_ones(wider[3:, :-1])
    assert tail.data_ptr() == wider[3:].data_ptr() and torch.equal(tail, wider[3:])
    for other in (x, x[:, :7], x.T, wider[:, :7], torch.ones(4, 3)[:, :2].contiguous()):
        copied = module.with_ones(other)
        assert copied.data_ptr() != other.data_ptr() and torch.equal(copied[:, :-1], other)
    end = torch.ones(12).as_strided((2, 5), (7, 1))  # nothing lies behind its last row
    assert torch.equal(module.with_ones(end), torch.ones(2, 6))


def written(folder, sizes=((6, 28, 28), (6,), (4, 28, 28), (4,)), label=3):
    """Four IDX files of these shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, shape in zip(FILES, sizes, strict=True):
        (folder / file).write_bytes(idx(np.full(shape, label, np.uint8)))


def test_a_flipped_byte_in_a_gz_file(tmp_path):
    written(tmp_path)
    packed = bytearray(gzip.compress((tmp_path / FILES[0]).read_bytes()))
    (tmp_path / FILES[0]).unlink()
    for place in range(10, len(packed), 7):
        damaged = packed.copy()
        damaged[place] ^= 0xFF
        (tmp_path / f"{FILES[0]}.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or only half downloaded"):
            svdlib.load("MNIST", tmp_path, "cpu")


def test_swapped_images_and_labels_and_labels_above_nine(tmp_path):
    written(tmp_path, ((6,), (6, 28, 28), (4,), (4, 28, 28)))
    with pytest.raises(ValueError, match="are they swapped"):
        svdlib.load("MNIST", tmp_path, "cpu")
    written(tmp_path, label=10)
    with pytest.raises(ValueError, match="train labels run to 10, not 9"):
        svdlib.load("MNIST", tmp_path, "cpu")


def test_a_folder_of_the_name_goes_before_loose_files(tmp_path, monkeypatch):
    written(tmp_path, label=1)
    written(tmp_path / "KMNIST" / "raw", label=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (tmp_path, "~"):
        assert svdlib.load("KMNIST", root, "cpu").train_y.unique().tolist() == [2]
        assert svdlib.load("MNIST", root, "cpu").train_y.unique().tolist() == [1]
    monkeypatch.setenv("SVDLIB_DATA", "~")
    assert svdlib.load("KMNIST", device="cpu").train_y.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_y": torch.zeros(90).long()}, "train: 64 images and 90 labels"),
        ({"test_y": torch.zeros(0).long(), "test_x": torch.rand(0, 9)}, "test: 0 images"),
        ({"train_x": torch.rand(64, 3, 3)}, r"train_x must be .* not torch.float32 \(64, 3, 3\)"),
        ({"train_x": torch.ones(64, 9).byte()}, "train_x must be a floating-point tensor"),
        ({"train_x": np.ones((64, 9))}, "train_x must be .* not ndarray"),
        ({"train_y": torch.zeros(64)}, "train_y must be a tensor .* of whole class numbers"),
        ({"test_y": [0, 1]}, "test_y must be a tensor .* not list"),
        ({"test_x": torch.rand(8, 7)}, "training images have 9 features but the test images 7"),
        ({"test_y": torch.zeros(8, device="meta").long()}, "on one device, not on cpu, meta"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changed, message):
    valid = {
        "train_x": torch.rand(64, 9),
        "train_y": torch.zeros(64).long(),
        "test_x": torch.rand(8, 9),
        "test_y": torch.zeros(8).long(),
    }
    svdlib.Data("mine", **valid)
    with pytest.raises(ValueError, match=message):
        svdlib.Data("mine", **valid | changed)


def test_a_head_or_a_split_takes_a_whole_number_of_images(mnist):
    for images in (-5, 0, 2.5, "3"):
        with pytest.raises(ValueError, match="train must be"):
            mnist.head(images)
        with pytest.raises(ValueError, match="images must be"):
            mnist.hold_out(images)
    with pytest.raises(ValueError, match="test must be at least 1"):
        mnist.head(5, 0)


@pytest.fixture
def published(mnist, tmp_path):
    """A folder with MNIST's four files, by links."""
    folder = tmp_path / "published"
    folder.mkdir()
    for file in FILES:
        os.link(cached("MNIST") / file, folder / file)
    return folder


def test_a_root_with_the_published_files_gives_no_warning(published, recwarn):
    svdlib.load("MNIST", published, "cpu")
    assert not recwarn.list


@pytest.mark.parametrize("file", FILES)
def test_a_root_with_one_changed_byte_gives_a_warning(published, file):
    content = bytearray((published / file).read_bytes())
    content[-7] ^= 1
    (published / file).unlink()
    (published / file).write_bytes(content)
    with pytest.warns(UserWarning, match="other files than the published ones of MNIST") as warned:
        assert svdlib.load("MNIST", published, "cpu").train_x.shape == (60000, 784)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_the_files_of_another_data_set_are_refused(published, name):
    with pytest.raises(ValueError, match=f"{FILES[0]} is that of MNIST, not of {name}"):
        svdlib.load(name, published, "cpu")
    (published / FILES[0]).unlink()  # one file of them is enough
    (published / FILES[0]).write_bytes(idx(np.ones((60000, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match=f"{FILES[1]} is that of MNIST, not of {name}"):
        svdlib.load(name, published, "cpu")


def test_gzipped_files_in_the_cache_are_read_as_a_root_s(folder, monkeypatch, tmp_path):
    raw = tmp_path / "cache" / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in folder.glob("*ubyte*"):
        shutil.copy(file, raw)
    monkeypatch.setenv("SVDLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_from_torchvision", no_network)
    before = sorted(raw.iterdir())
    data = svdlib.load("KMNIST", device="cpu")
    assert torch.equal(data.train_x, svdlib.load("KMNIST", folder, "cpu").train_x)
    assert sorted(raw.iterdir()) == before


@pytest.mark.parametrize(
    "value", ["file", "file/below", "/proc/nowhere", "~nobody-of-that-name", "x" * 300]
)
def test_a_bad_cache_folder_is_refused_in_one_line(monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("SVDLIB_DATA", value)
    with pytest.raises(ValueError, match=r"give a folder|name a folder that can be") as caught:
        svdlib.load("MNIST", device="cpu")
    assert "\n" not in str(caught.value) and value in str(caught.value)
    assert caught.value.__suppress_context__ and (tmp_path / "file").read_text() == "mine"


# Loads KMNIST from a source that starts, and continues once there is a file "go".
LOADS = """
import pathlib, time, svdlib, sys
from svdlib import data
def source(name, part):
    (part / "begun").write_bytes(b"x" * 1000)
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    for file in data.FILES:
        (part / file).write_bytes(pathlib.Path(file).read_bytes())
    return part
source.__name__ = "_from_torchvision"
data._from_torchvision = source
print(len(svdlib.load("KMNIST", device="cpu").train_y))
"""


@pytest.mark.slow
def test_leftovers_of_killed_downloads_are_removed_and_a_running_one_is_waited_for(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SVDLIB_DATA", str(tmp_path / "cache"))
    written(tmp_path)
    raw = tmp_path / "cache" / "KMNIST" / "raw"

    def begun():
        end = time.monotonic() + 300
        while not list(raw.glob(".svdlib_*/begun")):
            assert time.monotonic() < end
            time.sleep(0.02)

    def start():
        command = [sys.executable, "-c", LOADS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)

    for _ in range(2):
        killed = start()
        begun()
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        (left,) = raw.glob(".svdlib_*")
        (left / "begun").unlink()
    first = start()
    begun()
    (going,) = raw.glob(".svdlib_*")
    second = start()
    assert "waiting for another process that writes to" in second.stderr.readline()
    assert going.is_dir() and list(raw.iterdir()) == [going]
    (tmp_path / "go").touch()
    for process in (first, second):
        assert process.communicate(timeout=300)[0] == "6\n" and process.returncode == 0
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)
