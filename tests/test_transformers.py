"""The conventions of transformers: keyword inputs, output classes, `config`, pipelines, and `generate` with and without a cache."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from torchvision_models import declare_operations

from dynprune.errors import InputError
from dynprune.runtime.islands import Islands
from dynprune.runtime.model import DynamicModel

declare_operations()
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64, eos_token_id=None, bos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def decoder(llama) -> DynamicModel:
    return DynamicModel(llama, {"input_ids": ids(2, 6), "use_cache": False})


@pytest.fixture(scope="module")
def classifier() -> DynamicModel:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50, max_position_embeddings=32)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    return DynamicModel(model, {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)})


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3, "film": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_input_names=names)


def test_keywords_output_classes_and_the_models_attributes(classifier) -> None:
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    got, want = classifier(input_ids=ids(3, 6), attention_mask=mask), classifier.model(input_ids=ids(3, 6), attention_mask=mask)
    assert type(got) is type(want)
    assert torch.allclose(got.logits, want.logits, atol=1e-5)
    assert classifier.config is classifier.model.config and classifier.device.type == "cpu"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = classifier.no_such_thing


def test_an_encoder_of_one_layer_whose_branch_begins_with_its_own_mask() -> None:
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 1}, intermediate_size=64)
    dm = DynamicModel(transformers.BertModel(config).eval(), {"input_ids": ids(2, 6)})
    branch = next(site.name for site in dm.sites if site.kind == "branch")
    assert branch in [site.name for site in dm.plan.sites]
    got, want = dm(input_ids=ids(3, 6, 1)), dm.model(input_ids=ids(3, 6, 1))
    assert torch.allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-5)
    lists = {branch: [[0], [], [0]]}
    engine, hooked = (dm.run_with_active(input_ids=ids(3, 6, 1), active=lists, backend=name) for name in ("engine", "hooked"))
    assert torch.allclose(engine.last_hidden_state, hooked.last_hidden_state, atol=1e-5)
    assert not torch.allclose(engine.last_hidden_state[1], want.last_hidden_state[1], atol=1e-3)


def test_a_pipeline_runs_on_the_engine(classifier) -> None:
    before = classifier.stats().inferences
    texts = ["good film", "bad bad film"]
    got = transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer())(texts)
    want = transformers.pipeline("text-classification", model=classifier.model, tokenizer=tokenizer())(texts)
    assert classifier.stats().inferences == before + 2
    assert [answer["score"] for answer in got] == pytest.approx([answer["score"] for answer in want], abs=1e-5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"input_ids": ids(1, 40), "attention_mask": torch.ones(1, 40, dtype=torch.int64)}, "40"),
        ({"input_ids": ids(1, 6).float(), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}, "scalar type"),
        ({"input_ids": ids(2, 6), "attention_mask": torch.tril(torch.ones(2, 5, dtype=torch.int64), -1)}, "5"),
        ({"input_ids": ids(2, 6), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}, "one batch size"),
        ({"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.int64, device="meta")}, "one device, got cpu and meta"),
        ({"input_ids": ids(1, 6) + 99, "attention_mask": torch.ones(1, 6, dtype=torch.int64)}, r"\[0, 50\)"),
    ],
    ids=[
        "longer than the positions",
        "ids that are no whole numbers",
        "a mask of another length",
        "a mask of another batch",
        "a mask on another device",
        "ids that are no words",
    ],
)
def test_wrong_calls_are_refused_and_harm_nothing(classifier, call: dict, reason: str) -> None:
    with pytest.raises((InputError, TypeError), match=reason):
        classifier(**call)
    good = {"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    assert torch.allclose(classifier(**good).logits, classifier.model(**good).logits, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float64], ids=str)
def test_types_that_pytorch_converts_are_converted(classifier, kind: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    want = classifier.model(input_ids=ids(1, 6), attention_mask=mask).logits
    words = ids(1, 6).int() if kind is torch.int32 else ids(1, 6)
    assert torch.allclose(classifier(input_ids=words, attention_mask=mask.to(kind)).logits, want, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["cache", "beams", "no cache"])
def test_generate_at_level_0_gives_the_models_own_tokens(decoder, options: dict) -> None:
    prompt = ids(2, 6, seed=3)
    settings = {"max_new_tokens": 3, "do_sample": False, **options}
    assert torch.equal(decoder.generate(prompt, **settings), decoder.model.generate(prompt, **settings))


def test_decoding_runs_gated_mlps_on_the_engine(decoder, monkeypatch) -> None:
    dm = copy.deepcopy(decoder)
    dm.level = 1.0
    modules, forwards = list(dm.model._modules), [vars(module).get("forward") for module in dm.model.modules()]
    tokens = []
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    on_engine = dm.generate(ids(2, 6), **settings)
    assert dm._islands.paths == ("model.layers.0.mlp", "model.layers.1.mlp")
    monkeypatch.setattr(Islands, "run", lambda self, call, level, done: tokens.append(level) or call())
    in_pytorch = dm.generate(ids(2, 6), **settings)
    assert tokens == [1.0, 1.0, 1.0]
    for one, other, whole in zip(on_engine.logits, in_pytorch.logits, dm.model.generate(ids(2, 6), **settings).logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, whole, atol=1e-3), "nothing was skipped"
    assert list(dm.model._modules) == modules, "the user's model was changed"
    assert [vars(module).get("forward") for module in dm.model.modules()] == forwards


def with_token_curves(decoder: DynamicModel, tmp_path) -> DynamicModel:
    """A decoder as it is after a calibration, saved and loaded: gates that skip, and thresholds for single tokens."""
    dm = copy.deepcopy(decoder)
    for site in dm.sites:
        if "mlp" in site.name:
            dm.gate(site.name).token_curves = torch.tensor([[-1.0, 0.5, 1.0], [-1.0, 1e-4, 3e-4]])
    dm.save(tmp_path / "decoder")
    return DynamicModel.load(tmp_path / "decoder", dm.model)


def test_single_tokens_leave_out_small_inputs_of_mlps_and_nothing_else(decoder, tmp_path) -> None:
    dm = with_token_curves(decoder, tmp_path)
    dm.level = 1.0
    prompt, cache = ids(2, 6), transformers.DynamicCache()
    first = dm(input_ids=prompt, past_key_values=cache, use_cache=True)
    assert torch.allclose(first.logits, dm.model(prompt).logits, atol=1e-5), "a prompt with a cache runs whole"
    second = dm(input_ids=ids(2, 1, seed=5), past_key_values=cache, use_cache=True)

    def small(limit: float):
        return lambda _, args: (args[0] * (args[0].abs() > limit),)

    own = transformers.DynamicCache()
    dm.model(input_ids=prompt, past_key_values=own, use_cache=True)
    handles = [
        getattr(layer.mlp, name).register_forward_pre_hook(small(3e-4 if name == "down_proj" else 1.0))
        for layer in dm.model.model.layers
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    try:
        masked = dm.model(input_ids=ids(2, 1, seed=5), past_key_values=own, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(second.logits, masked.logits, atol=1e-5)
    whole = dm.model(input_ids=torch.cat([prompt, ids(2, 1, seed=5)], 1)).logits[:, -1:]
    assert not torch.allclose(second.logits, whole, atol=1e-3), "nothing was left out"


def test_decode_steps_are_counted(decoder, tmp_path) -> None:
    """Eight calls for two samples: a prompt of 6 tokens and 7 steps of one, of which only MLPs skip."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    gated, thin, whole = copy.deepcopy(decoder), with_token_curves(decoder, tmp_path), copy.deepcopy(decoder)
    gated.level = thin.level = 1.0
    for dm in (gated, thin, whole):
        dm.reset_stats()
        dm.generate(ids(2, 6), **settings)
        assert (dm.stats().inferences, dm.stats().samples, dm.stats().budget_misses) == (8, 16, 0)
        assert dm.stats().latency_ms.p50 > 0
    assert whole.stats().skip_rate == 0 and whole.stats().site_skip_rates == {}

    mlps = [site for site in gated.sites if "mlp" in site.name]
    rates = gated.stats().site_skip_rates
    assert set(rates) == {site.name for site in mlps}
    skipped = sum(rates[site.name] * site.macs for site in mlps)
    assert gated.stats().skip_rate == pytest.approx(skipped / gated.plan.macs * 7 / (6 + 7)), "prompts run whole"
    layers = [f"inputs of model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "down_proj")]
    rates = thin.stats().site_skip_rates
    assert set(rates) == set(layers) and all(0 < rate < 1 for rate in rates.values())
    assert 0 < thin.stats().skip_rate < 1

    gated.reset_stats()
    gated(input_ids=ids(2, 1), past_key_values=transformers.DynamicCache(), use_cache=True, deadline=time.monotonic() - 1)
    assert gated.stats().budget_misses == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_token", [False, True], ids=["gates", "thresholds"])
def test_a_decoder_in_half_precision_runs_its_mlps_on_the_engine(llama, monkeypatch, by_token: bool, dtype: torch.dtype) -> None:
    dm = DynamicModel(copy.deepcopy(llama).bfloat16(), {"input_ids": ids(2, 6), "use_cache": False}, dtype=dtype)
    assert len(dm.sites) == len(DynamicModel(llama, {"input_ids": ids(2, 6), "use_cache": False}).sites)
    for site in dm.sites:
        if "mlp" in site.name and by_token:
            dm.gate(site.name).token_curves = torch.tensor([[-1.0, 0.5], [-1.0, 1e-4]])
    dm.level = 1.0
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    on_engine = dm.generate(ids(2, 6), **settings)
    assert dm._islands.paths == ("model.layers.0.mlp", "model.layers.1.mlp") and dm._islands.by_token is by_token
    assert on_engine.logits[-1].isfinite().all()
    if not by_token:
        monkeypatch.setattr(Islands, "run", lambda self, call, level, done: call())
        in_pytorch = dm.generate(ids(2, 6), **settings)
        assert torch.allclose(on_engine.logits[1].float(), in_pytorch.logits[1].float(), atol=0.02 * in_pytorch.logits[1].abs().max())


def test_a_cache_that_comes_back_runs_in_pytorch_and_says_so(decoder) -> None:
    dm = copy.deepcopy(decoder)
    with pytest.warns(RuntimeWarning, match="run in PyTorch"):
        got = dm(ids(2, 6))
    want = dm.model(ids(2, 6))
    assert torch.allclose(got.logits, want.logits, atol=1e-6)
    assert got.past_key_values.get_seq_length() == 6
    assert torch.equal(dm(ids(2, 6)).logits, got.logits)


def test_a_model_without_generate_has_none() -> None:
    dm = DynamicModel(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(1, 3, 8, 8))
    assert not hasattr(dm, "generate")
