import json

import pytest
import torch
from torch import nn

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
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "small.json",
        "small.safetensors",
    ]


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
    ranks = saved.with_suffix(".json")
    whole = ranks.read_text()
    for text in (
        "",
        "[]",
        '{"format": 1}',
        '{"format": 2, "ranks": {}}',
        '{"format": 1, "ranks": 3}',
    ):
        ranks.write_text(text)
        with pytest.raises(ValueError, match="is not a table of ranks"):
            svdlib.load_factorized(model, saved)
    ranks.write_text(json.dumps({"format": 1, "ranks": {"0": 5}}))
    with pytest.raises(ValueError, match="does not fit the model"):
        svdlib.load_factorized(model, saved)
    ranks.write_text(whole)
    content = saved.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04pickle" * 10):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not fit the model"):
            svdlib.load_factorized(model, saved)


def test_a_failed_save_leaves_what_was_there(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("svdlib.layers.storage.save_model", fails)
    with pytest.raises(OSError, match="disk full"):
        svdlib.save_factorized(svdlib.factorize(model, {"0": 2}), saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 2


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
