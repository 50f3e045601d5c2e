"""Models by name or file, their weights and inputs."""

from __future__ import annotations

import argparse
import functools

import pytest
import torch
from safetensors.torch import save_file

from dynprune.cli.models import declare_torchvision_operators, load_model
from dynprune.errors import InputError

SOURCE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))

def make_with_inputs():
    return nn.Linear(5, 2), torch.arange(10.0).reshape(2, 5)

def make_two_inputs():
    return nn.Bilinear(3, 4, 2), (torch.ones(1, 3), torch.ones(1, 4))

def make_list():
    return [1, 2]

def make_bad_inputs():
    return nn.Linear(5, 2), "a picture"

def fails():
    raise OSError("the disk is gone")
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def arguments(model, *, weights=None, shape=None, batch=1):
    return argparse.Namespace(model=str(model), weights=weights, shape=shape, batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_function_of_a_file(source, batch):
    loaded = load_model(arguments(f"{source}:make", shape=(3, 8, 8), batch=batch))
    assert [tuple(x.shape) for x in loaded.inputs] == [(batch, 3, 8, 8)]
    assert not loaded.model.training
    assert loaded.model(*loaded.inputs).shape == (batch, 2)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_inputs_of_the_function_are_taken_and_repeated(source, batch):
    loaded = load_model(arguments(f"{source}:make_with_inputs", batch=batch))
    assert loaded.inputs[0].shape == (batch, 5)
    assert torch.equal(loaded.inputs[0][0], torch.arange(5.0))


def test_several_inputs(source):
    loaded = load_model(arguments(f"{source}:make_two_inputs", batch=2))
    assert [tuple(x.shape) for x in loaded.inputs] == [(2, 3), (2, 4)]


def test_same_call_gives_the_same_weights_and_inputs(source):
    first, second = (load_model(arguments(f"{source}:make", shape=(3, 8, 8))) for _ in range(2))
    assert torch.equal(first.inputs[0], second.inputs[0])
    assert torch.equal(first.model(*first.inputs), second.model(*second.inputs))


@pytest.mark.parametrize("kind", ["pt", "safetensors", "checkpoint"])
def test_weights(source, tmp_path, kind):
    state = {name: torch.full_like(value, 0.5) for name, value in load_model(arguments(f"{source}:make")).model.state_dict().items()}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if kind == "checkpoint" else state, path)
    model = load_model(arguments(f"{source}:make", weights=path)).model
    assert all((parameter == 0.5).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_list", "must return a torch.nn.Module or .module, inputs., got list"),
        ("make_bad_inputs", "must be a tensor or a tuple of tensors, got str"),
        ("fails", "failed with OSError: the disk is gone"),
        ("absent", "failed with AttributeError"),
    ],
)
def test_function_that_gives_no_model(source, function, message):
    with pytest.raises(InputError, match=message):
        load_model(arguments(f"{source}:{function}"))


@pytest.mark.parametrize("kind", ["absent", "garbage.pt", "garbage.safetensors", "list", "other model"])
def test_weights_that_do_not_fit(source, tmp_path, kind):
    path = tmp_path / (kind if kind.startswith("garbage") else "w.pt")
    if kind.startswith("garbage"):
        path.write_bytes(b"\x13garbage" * 10)
    elif kind != "absent":
        torch.save([1, 2] if kind == "list" else torch.nn.Linear(2, 2).state_dict(), path)
    expected = {
        "absent": "does not exist",
        "garbage.pt": "cannot be read",
        "garbage.safetensors": "cannot be read",
        "list": "must hold a state_dict, got list",
        "other model": "do not fit the model",
    }[kind]
    with pytest.raises(InputError, match=expected):
        load_model(arguments(f"{source}:make", weights=path))


def test_torchvision_model_and_near_names():
    declare_torchvision_operators()
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    loaded = load_model(arguments("torchvision:squeezenet1_1", shape=(3, 64, 64)))
    assert loaded.model(*loaded.inputs).shape == (1, 1000)
    with pytest.raises(InputError, match=r"torchvision has no model 'resnet5'; did you mean .*resnet50"):
        load_model(arguments("torchvision:resnet5"))


def test_torchvision_model_with_a_backbone_fetches_nothing():
    declare_torchvision_operators()
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert "backbone" in dict(load_model(arguments("torchvision:lraspp_mobilenet_v3_large", shape=(3, 64, 64))).model.named_children())


def test_timm_model_has_its_own_input_size():
    declare_torchvision_operators()
    pytest.importorskip("timm", reason="timm is not installed")
    loaded = load_model(arguments("timm:test_resnet"))
    assert loaded.inputs[0].shape == (1, *loaded.model.default_cfg["input_size"])
    with pytest.raises(InputError, match="timm has no model 'resnet5O'"):
        load_model(arguments("timm:resnet5O"))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("BertModel", (5,), (2, 5)),
        ("GPT2LMHeadModel", None, (2, 128)),
        ("ViTModel", None, (2, 3, 224, 224)),
        ("Wav2Vec2Model", (400,), (2, 400)),
    ],
)
def test_transformers_model_with_its_default_configuration(monkeypatch, name, shape, expected):
    declare_torchvision_operators()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, name).config_class
    small = functools.partial(config, **{config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 1})
    monkeypatch.setattr(getattr(transformers, name), "config_class", small)
    loaded = load_model(arguments(f"transformers:{name}", shape=shape, batch=2))
    assert tuple(loaded.inputs[0].shape) == expected and not loaded.model.training
    with torch.no_grad():
        assert loaded.model(*loaded.inputs)[0].shape[0] == 2


def test_a_last_layer_of_zeros_gets_values():
    pytest.importorskip("timm", reason="timm is not installed")
    loaded = load_model(arguments("timm:vit_tiny_patch16_224"))
    assert loaded.model(*loaded.inputs).std() > 0


def test_unknown_transformers_model():
    declare_torchvision_operators()
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(InputError, match="transformers has no model 'BertModell'; did you mean BertModel"):
        load_model(arguments("transformers:BertModell"))
