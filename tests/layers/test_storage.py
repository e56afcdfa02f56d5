import importlib.util
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 9))


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "small.safetensors"
    svdlib.save_factorized(svdlib.factorize(model, {"0": 4}), path)
    return path


def test_round_trip(model, saved):
    x = torch.rand(5, 30)
    small = svdlib.factorize(model, {"0": 4})
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 9))
    before = other[0].weight.clone()
    again = svdlib.load_factorized(other, saved)
    assert torch.equal(again.eval()(x), small.eval()(x))
    assert torch.equal(other[0].weight, before)
    assert [path.name for path in saved.parent.iterdir()] == ["small.safetensors"]


def test_a_tied_weight_survives(tmp_path):
    model = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 20), nn.Linear(20, 30))
    model[2].weight = model[0].weight
    small = svdlib.factorize(model, {"1": 3})
    svdlib.save_factorized(small, tmp_path / "a.safetensors")
    again = svdlib.load_factorized(model, tmp_path / "a.safetensors")
    assert again[2].weight is again[0].weight
    tokens = torch.arange(4)
    assert torch.equal(again(tokens), small(tokens))


def test_what_does_not_fit_is_refused(model, saved):
    wrong = nn.Sequential(nn.Linear(30, 21), nn.BatchNorm1d(21), nn.ReLU(), nn.Linear(21, 9))
    with pytest.raises(ValueError, match="does not fit the model"):
        svdlib.load_factorized(wrong, saved)
    with pytest.raises(ValueError, match="factorizes layer '0', which the model does not have"):
        svdlib.load_factorized(nn.Sequential(nn.ReLU()), saved)
    with pytest.raises(ValueError, match="does not fit the model"):
        svdlib.load_factorized(nn.Sequential(nn.Linear(30, 20)), saved)
    with pytest.raises(ValueError, match=r"torch\.float64 .* torch\.float32"):
        svdlib.load_factorized(model.double(), saved)


def test_damaged_or_missing_files(model, saved):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere\.safetensors"):
        svdlib.load_factorized(model, saved.with_name("nowhere.safetensors"))
    content, tensors = saved.read_bytes(), load_file(saved)
    for text in (
        "",
        "[]",
        '{"format": 2}',
        '{"format": 3, "ranks": {}}',
        '{"format": 2, "ranks": 3}',
        '{"format": 2, "ranks": {"0": 0}}',
        '{"format": 2, "ranks": {"0": 1e9}}',
        '{"format": 2, "ranks": {"0": ' + "9" * 5000 + "}}",
        "[" * 100_000,
        '{"format": 2, "ranks": ' + '{"0": ' * 100_000,
    ):
        save_file(tensors, saved, metadata={"svdlib": text})
        with pytest.raises(ValueError, match="has no table of ranks"):
            svdlib.load_factorized(model, saved)
    save_file(tensors, saved)
    with pytest.raises(ValueError, match="tells no ranks; save_factorized writes them"):
        svdlib.load_factorized(model, saved)
    save_file(tensors, saved, metadata={"svdlib": '{"format": 2, "ranks": {"0": 5}}'})
    with pytest.raises(ValueError, match="does not fit the model"):
        svdlib.load_factorized(model, saved)
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04pickle" * 10):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not fit the model"):
            svdlib.load_factorized(model, saved)


@pytest.mark.parametrize("rank", [10, 2_000_000])
def test_a_rank_beyond_the_layer_is_refused_before_anything_is_made(saved, rank, monkeypatch):
    save_file(
        load_file(saved), saved, metadata={"svdlib": f'{{"format": 2, "ranks": {{"3": {rank}}}}}'}
    )
    monkeypatch.setattr("svdlib.layers.storage.thin_twins", None)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 9))
    with pytest.raises(ValueError, match=rf"layer '3' at rank {rank}, but .* is 9 at most"):
        svdlib.load_factorized(model, saved)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_user_s_files_have(model, tmp_path, mask):
    before = os.umask(mask)
    try:
        svdlib.save_factorized(model, tmp_path / "small.safetensors")
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
            svdlib.export_onnx(model.eval(), torch.rand(3, 30), tmp_path / "small.onnx")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_a_failed_save_leaves_what_was_there(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(*arguments, **more):
        raise OSError("disk full")

    monkeypatch.setattr("svdlib.layers.storage.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        svdlib.save_factorized(svdlib.factorize(model, {"0": 2}), saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def test_names_of_any_kind_touch_no_other_file(model, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    small, other = svdlib.factorize(model, {"0": 4}), svdlib.factorize(model, {"0": 3})
    svdlib.save_factorized(small, tmp_path / "config.safetensors")
    svdlib.save_factorized(other, tmp_path / "config.st")
    svdlib.save_factorized(small, tmp_path / "small.json")
    assert (tmp_path / "config.json").read_text() == "mine"
    ranks = [
        svdlib.load_factorized(model, tmp_path / name)[0].rank
        for name in ("config.safetensors", "config.st", "small.json")
    ]
    assert ranks == [4, 3, 4]


def test_what_is_no_file_is_refused_and_a_link_followed(model, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is there and no regular file"):
            svdlib.save_factorized(model, tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere to write a into"):
        svdlib.save_factorized(model, tmp_path / "nowhere" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    svdlib.save_factorized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()


def test_onnx(model, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = svdlib.factorize(model.eval(), {"0": 4})
    x = torch.rand(3, 30)
    svdlib.export_onnx(small, x, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (found,) = session.run(None, {"x": torch.rand(7, 30).numpy()})
    assert found.shape == (7, 9)
    with pytest.raises(ValueError, match="onnxruntime's outputs differ"):
        svdlib.export_onnx(small, x, tmp_path / "other.onnx", tolerance=-1.0)
    assert not (tmp_path / "other.onnx").exists()
    with torch.no_grad():
        small[3].weight.zero_()
        small[3].bias.zero_()
    svdlib.export_onnx(small, x, tmp_path / "zero.json")  # all outputs are zero; any name will do


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_what_onnx_can_not_check_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="must put out one tensor, not tuple"):
        svdlib.export_onnx(Two(), torch.rand(3, 30), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="takes no bfloat16 inputs"):
        svdlib.export_onnx(model, torch.rand(3, 30).bfloat16(), tmp_path / "a.onnx")


class Product(nn.Module):
    """Two inputs, and an output with logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(9, 8), nn.Linear(9, 8)

    def forward(self, a, b):
        return SimpleNamespace(logits=self.left(a) * self.right(b))


@pytest.mark.parametrize(
    ("kind", "names"),
    [("tuple", ["x0", "x1"]), ("mapping", ["b", "a"]), ("loader", ["x0", "x1"]), ("call", ["x"])],
)
def test_onnx_of_several_inputs(kind, names, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, a, b, call = Product(), torch.rand(4, 9), torch.rand(4, 9), None
    data = {
        "tuple": (a, b),
        "mapping": {"b": b, "a": a, "labels": torch.arange(4)},
        "loader": DataLoader(TensorDataset(a, b, torch.arange(4)), batch_size=2),
        "call": [a],
    }[kind]
    if kind == "call":
        call = lambda model, x: model(x, x)
    svdlib.export_onnx(model, data, tmp_path / "a.onnx", call=call)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    assert [given.name for given in session.get_inputs()] == names
    values = dict(zip(names, torch.rand(len(names), 7, 9), strict=True))
    (found,) = session.run(None, {name: value.numpy() for name, value in values.items()})
    by_name = {"x": "a", "x0": "a", "x1": "b"}
    given = {by_name.get(name, name): value for name, value in values.items()}
    expected = model(**{"b": values.get("x"), **given})
    torch.testing.assert_close(torch.from_numpy(found), expected.logits, rtol=1e-4, atol=1e-5)
    assert model.training
    with pytest.raises(ValueError, match=r"the model does not take float32 .4, 9."):
        svdlib.export_onnx(model, a, tmp_path / "b.onnx")


class Extra(nn.Sequential):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        self.state = state


def with_buffers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30))
    block = torch.rand(10, 6)
    buffers = {
        "expanded": [torch.rand(1, 5).expand(4, 5)],
        "overlapping": [block.view(-1)[:36], block.view(-1)[24:]],
        "part of another": [block[:3], block],
        "the same": [block, block],
        "strided": [block[:, ::2], block.mT],
        "empty": [torch.empty(0), torch.empty(0)],
        "complex": [block.to(torch.complex64)],
        "sparse": [block.to_sparse()],
        "meta": [block.to("meta")],
        "complex128": [block.to(torch.complex128)],
    }[kind]
    for number, buffer in enumerate(buffers):
        model.register_buffer(f"buffer{number}", buffer)
    return model


def zeroed(module):
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer if 0 in buffer.stride() else buffer.zero_())


@pytest.mark.parametrize(
    "kind",
    ["expanded", "overlapping", "part of another", "the same", "strided", "empty", "complex"],
)
def test_buffers_that_share_memory_are_saved_by_their_values(kind, tmp_path):
    model = with_buffers(kind)
    small = svdlib.factorize(model, 3)
    svdlib.save_factorized(small, tmp_path / "small")
    loaded = svdlib.load_factorized(with_buffers(kind).apply(zeroed), tmp_path / "small")
    expected = small.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sparse", "'buffer0' .*sparse_coo.*make it dense"),
        ("meta", "'buffer0' .*device meta"),
        ("complex128", "no tensors of type torch.complex128"),
    ],
)
def test_what_can_not_be_stored_is_named_and_nothing_written(kind, message, tmp_path):
    small = svdlib.factorize(with_buffers(kind), 3)
    with pytest.raises(ValueError, match=message):
        svdlib.save_factorized(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_extra_state_is_refused_unless_it_is_a_tensor(tmp_path, monkeypatch):
    model = nn.Sequential(Extra(nn.Linear(30, 30)))
    small = svdlib.factorize(model, 3)
    with pytest.raises(ValueError, match=r"'0\._extra_state' is a dict, and only tensors"):
        svdlib.save_factorized(small, tmp_path / "small")
    monkeypatch.setattr(Extra, "get_extra_state", lambda self: torch.tensor(3))
    svdlib.save_factorized(small, tmp_path / "small")
    assert svdlib.load_factorized(model, tmp_path / "small")[0].state == 3


def test_a_full_disk_leaves_no_part(tmp_path):
    resource = pytest.importorskip("resource")
    small = svdlib.factorize(nn.Sequential(nn.Linear(300, 300)), 30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"small can't be written, and nothing is left"):
            svdlib.save_factorized(small, tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
