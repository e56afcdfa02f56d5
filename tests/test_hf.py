"""Models of the transformers library: saved thin, read thin, and used as before."""

import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("svdlib.hf", exc_type=ImportError)

import svdlib
from svdlib.network.low_rank import low_rank_layers

LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(tied):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    )


def gpt2(_=False):
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def bert(_=False):
    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    return transformers.BertForMaskedLM(transformers.BertConfig(**small, num_attention_heads=4))


def t5(_=False):
    small = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    config = transformers.T5Config(**small, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def vit(_=False):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 8}
    config = transformers.ViTConfig(**small, num_attention_heads=4, patch_size=4, num_labels=7)
    return transformers.ViTForImageClassification(config)


def pegasus(_=False):
    small = {"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    sides = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.PegasusConfig(**small, **sides, **heads, decoder_start_token_id=0)
    return transformers.PegasusForConditionalGeneration(config)


def siglip(_=False):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "image_size": 8}
    config = transformers.SiglipVisionConfig(**small, num_attention_heads=4, patch_size=4)
    return transformers.SiglipVisionModel(config)


MODELS = {
    "Llama, tied": lambda: llama(True),
    "Llama, untied": lambda: llama(False),
    "GPT-2": gpt2,
    "BERT": bert,
    "T5": t5,
    "ViT": vit,
    "Pegasus": pegasus,
    "Siglip": siglip,
}


def made(name, share=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    return svdlib.factorize(model, share)


def logits(model):
    if "pixel_values" in inspect.signature(model.forward).parameters:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        output = model(pixel_values=x.to(model.dtype))
        return getattr(output, "logits", getattr(output, "pooler_output", None))
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def assert_same(again, small):
    own, other = dict(small.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    if small.dtype == torch.float32:  # in bfloat16 transformers keeps some buffers in float32
        assert torch.equal(logits(again.eval()), logits(small))


pytestmark = [
    pytest.mark.filterwarnings("ignore:left as they were"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(name, dtype, tmp_path):
    small = made(name, dtype=dtype)
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    ranks = {name: layer.rank for name, layer in low_rank_layers(small).items()}
    assert config["ranks"] == ranks and ranks
    again = type(small).from_pretrained(tmp_path, dtype=dtype)
    assert {name: layer.rank for name, layer in low_rank_layers(again).items()} == ranks
    assert_same(again, small)
    count = sum(p.numel() for p in small.parameters())
    assert sum(p.numel() for p in again.parameters()) == count
    again.save_pretrained(tmp_path / "again")
    assert_same(type(small).from_pretrained(tmp_path / "again", dtype=dtype), small)
    # The config read back still refuses a process without the import.
    first, second = (
        json.loads((tmp_path / way / "config.json").read_text()) for way in ("", "again")
    )
    assert first["fusion_config"] == second["fusion_config"]


@torch.no_grad()
def test_a_fresh_process_reads_it_by_the_import_alone(tmp_path):
    small = made("Llama, tied")
    small.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys, torch, svdlib.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.load(sys.argv[1] + '/ids.pt')).logits, sys.argv[1] + '/z.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "z.pt"), small(IDS).logits)


def test_without_the_import_reading_fails_and_says_what_to_run(tmp_path):
    for name in ("Llama, tied", "BERT", "T5", "ViT"):
        small = made(name)
        small.save_pretrained(tmp_path / type(small).__name__, max_shard_size="20KB")
    code = (
        "import pathlib, sys, transformers\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    for kind in ('AutoModel', folder.name):\n"
        "        try:\n"
        "            getattr(transformers, kind).from_pretrained(folder)\n"
        "        except ValueError as error:\n"
        "            print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("run `import svdlib.hf` first") == 8
    svdlib.merge(small).save_pretrained(tmp_path / "merged")
    assert "svdlib" not in (tmp_path / "merged" / "config.json").read_text()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2", "T5"])
def test_generation_with_a_cache_goes_on_as_without(name, tmp_path):
    made(name).save_pretrained(tmp_path)
    small = MODELS[name]().from_pretrained(tmp_path).eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(IDS, **settings, use_cache=True)
    assert torch.equal(cached, small.generate(IDS, **settings, use_cache=False))
    assert torch.equal(cached, made(name).generate(IDS, **settings))


@torch.no_grad()
def test_a_base_is_read_from_a_model_with_a_head_and_back(tmp_path):
    small = made("BERT")
    small.save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False).eval()
    state = small.bert(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, state)
    base.save_pretrained(tmp_path / "base")
    with_head = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(with_head.bert(IDS).last_hidden_state, state)


@torch.no_grad()
def test_a_tied_head_gets_the_factors_of_the_base_that_is_read(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    base = svdlib.factorize(transformers.LlamaModel(config).eval(), 0.3)
    base.save_pretrained(tmp_path)
    with_head = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    expected = base(IDS).last_hidden_state @ base.embed_tokens.weight.mT
    torch.testing.assert_close(with_head(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2", "T5", "Pegasus"])
def test_tied_factors_stay_tied(name):
    small = made(name)
    ranks = {name: layer.rank for name, layer in low_rank_layers(small).items()}
    assert ranks["lm_head"] == small.get_input_embeddings().rank
    before = logits(small)
    small.tie_weights()
    assert torch.equal(logits(small), before)
    assert small.lm_head[1].weight is small.get_input_embeddings()[0].weight


@torch.no_grad()
def test_parts_and_wrappers_know_their_ranks(tmp_path):
    small = made("BERT")
    assert small.bert.config is small.config
    small.bert.save_pretrained(tmp_path / "part")
    again = transformers.BertModel.from_pretrained(tmp_path / "part", add_pooling_layer=False)
    state = small.bert(IDS).last_hidden_state
    assert torch.equal(again.eval()(IDS).last_hidden_state, state)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = MODELS["GPT-2"]().eval(), nn.Linear(60, 2)

    torch.manual_seed(0)
    wrapped = svdlib.factorize(Wrapper(), 0.3)
    wrapped.inner.save_pretrained(tmp_path / "wrapped")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "wrapped").eval()
    assert torch.equal(logits(again), logits(wrapped.inner))


def test_a_model_that_others_quantized_keeps_its_config():
    model = MODELS["GPT-2"]()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.warns(UserWarning, match="bitsandbytes"):
        small = svdlib.factorize(model, 0.3)
    assert small.config.quantization_config == {"quant_method": "bitsandbytes"}


@torch.no_grad()
def test_ranks_that_change_later_are_written(tmp_path):
    small = made("Llama, tied")
    svdlib.truncate_(small, 0.5)
    small.save_pretrained(tmp_path / "truncated")
    again = type(small).from_pretrained(tmp_path / "truncated").eval()
    assert torch.equal(logits(again), logits(small))
    merged = svdlib.merge(small)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    again = type(small).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(small), rtol=1e-4, atol=1e-5)


def test_what_was_read_trains_on_and_the_original_is_left_alone(tmp_path):
    torch.manual_seed(0)
    model = MODELS["Llama, tied"]()
    small = svdlib.factorize(model, 0.3)
    assert not hasattr(model.config, "quantization_config")
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = again(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2", "BERT", "T5", "ViT"])
def test_int8_on_top_runs_and_keeps_ranks_and_sizes(name):
    small = made(name)
    int8 = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    exact, near = logits(small), logits(int8)  # T5 reads a weight at each call
    assert (near - exact).norm() < 0.05 * exact.norm()
    layers = low_rank_layers(small)
    for part, layer in low_rank_layers(int8).items():
        assert layer.rank == layers[part].rank and layer.weight.shape == layers[part].weight.shape
    for refused in (svdlib.merge, lambda model: svdlib.factorize(model, 2)):
        with pytest.raises(ValueError, match="call svdlib before you quantize"):
            refused(int8)


def with_lora(small, targets):
    """The model with random adapters, and its logits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(small, config).eval()
    return model, logits(model.base_model.model)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["Llama, tied", "Llama, untied", "GPT-2", "BERT", "T5", "ViT"])
def test_adapters_on_factors_are_merged_and_written(name, tmp_path):
    small = made(name)
    before, ranks = logits(small), {n: layer.rank for n, layer in low_rank_layers(small).items()}
    model, after = with_lora(small, "all-linear")  # not those whose weight two layers share
    assert not torch.allclose(after, before)
    assert {layer.rank for layer in low_rank_layers(model).values()} == set(ranks.values())
    with pytest.raises(ValueError, match="merge adapters into the factors first"):
        svdlib.merge(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert {n: layer.rank for n, layer in low_rank_layers(again).items()} == ranks
    assert_same(again, merged)


@torch.no_grad()
@pytest.mark.parametrize(
    "target", ["q_proj", "lm_head", "lm_head.0", "lm_head.1", "embed_tokens.1"]
)
def test_adapters_are_refused_around_a_product_and_on_shared_factors(target):
    with pytest.raises(ValueError, match=r"Target module (LowRank|TiedLinear)\("):
        with_lora(made("Llama, tied"), [target])


@torch.no_grad()
def test_adapters_are_read_onto_the_factors_they_were_written_from(tmp_path):
    peft = pytest.importorskip("peft")
    made("Llama, tied").save_pretrained(tmp_path / "model")
    read = lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model, after = with_lora(read(), ["q_proj.0", "q_proj.1"])
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(read(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again.base_model.model), after)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama, tied", "Llama, untied", "GPT-2", "BERT", "T5"])
def test_factorized_embeddings_are_not_resized_until_they_are_merged(name, tmp_path):
    small = made(name)
    before = logits(small)
    small.save_pretrained(tmp_path)
    for model in (small, type(small).from_pretrained(tmp_path), copy.deepcopy(small)):
        with pytest.raises(ValueError, match=r"resize svdlib\.merge\(model\)"):
            model.resize_token_embeddings(64)
        assert torch.equal(logits(model.eval()), before)
    merged = svdlib.merge(small)
    merged.resize_token_embeddings(64)
    torch.testing.assert_close(logits(merged)[..., :60], before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dense_embedding_is_resized_beside_factors(tmp_path):
    torch.manual_seed(0)
    small = svdlib.factorize(llama(True).eval(), {"model.layers.0.mlp.up_proj": 3})
    before = logits(small)
    small.resize_token_embeddings(64)
    assert torch.equal(logits(small)[..., :60], before)
    small.save_pretrained(tmp_path)
    assert_same(type(small).from_pretrained(tmp_path), small)


@torch.no_grad()
def test_a_dispatched_model_keeps_its_hooks(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = MODELS["Llama, tied"]().eval()
    expected, places = logits(model), dict.fromkeys(dict(model.named_children()), "cpu")
    model = accelerate.dispatch_model(model, places, force_hooks=True)
    with pytest.warns(UserWarning, match="load the model without device_map"):
        same = svdlib.factorize(model, 0.3)
    assert all(hasattr(part, "_hf_hook") for part in same.lm_head.modules())
    assert torch.equal(logits(same), expected)
    with pytest.raises(ValueError, match="load the model without device_map"):
        svdlib.factorize(model, {"lm_head": 3, "model.embed_tokens": 3})
    with pytest.raises(ValueError, match="its weight has no numbers here"):
        offloaded = accelerate.cpu_offload(model, "cpu")
        svdlib.factorize(offloaded, {"model.layers.0.mlp.up_proj": 3})


PLACES = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm"], "cpu") | {
    "lm_head": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "disk",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "places"),
    [("Llama, tied", "auto"), ("Llama, tied", PLACES), ("T5", "auto"), ("ViT", "auto")],
)
def test_a_device_map_is_kept(name, places, tmp_path):
    pytest.importorskip("accelerate")
    small = made(name)
    small.save_pretrained(tmp_path / "model")
    read = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    again = type(small).from_pretrained(tmp_path / "model", **read).eval()
    again = again.cpu() if next(again.parameters()).is_cuda else again
    assert torch.equal(logits(again), logits(small))
    again.save_pretrained(tmp_path / "again")
    assert_same(type(small).from_pretrained(tmp_path / "again"), small)


@pytest.mark.parametrize("name", ["Llama, tied", "T5"])
def test_a_trainer_resumes_from_its_checkpoint(name, tmp_path):
    pytest.importorskip("accelerate")
    texts = torch.randint(60, (8, 9), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": text, "labels": text} for text in texts]

    def trained(model, steps, resume=None):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, logging_steps=1, use_cpu=True, seed=3,
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, learning_rate=1e-2,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model

    small = made(name)
    straight = trained(copy.deepcopy(small), 4)
    again = type(small).from_pretrained(tmp_path / "checkpoint-2")
    assert low_rank_layers(again).keys() == low_rank_layers(small).keys()
    resumed = trained(copy.deepcopy(small), 4, str(tmp_path / "checkpoint-2"))
    assert not torch.equal(logits(straight.eval()), logits(small))
    assert_same(resumed, straight.eval())


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    made("BERT").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, named in (
        ({"format": 9}, "9"),
        ({"ranks": {"bert.encoder.layer.0.output.dense": 1000}}, "1000"),
    ):
        config["quantization_config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=named):
            transformers.BertForMaskedLM.from_pretrained(tmp_path)
        config["quantization_config"] |= {"format": 1}


def test_other_models_are_left_alone():
    small = svdlib.factorize(nn.Sequential(nn.Linear(20, 20)), 3)
    assert not hasattr(small, "config")
