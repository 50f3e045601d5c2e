"""Save files: what comes back is what was saved, and a file that is not whole, not ours or not of this model is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import NamedTuple

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_executor import give_costs
from torch import Tensor, nn

from dynprune.control.frontier import Frontier
from dynprune.errors import CheckpointError, InputError
from dynprune.runtime.model import DynamicModel


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DynamicModel]:
    """A file and the model it was saved from: gates, curve lengths, compensation, frontier and costs are no defaults."""
    dm = DynamicModel(models.build("basic"), models.example("basic"), exclude=("2.conv1",), group_size=2)
    with torch.no_grad():
        for site in dm.sites:
            gate = dm.gate(site.name)
            gate.down.normal_()
            gate.bias.normal_()
            gate.set_curve(torch.linspace(-1, 0.5, 7))
            gate.calibrated.fill_(True)
        channels = dm.gate("1.conv1")
        channels.channel_means.normal_()
        channels.compensated.fill_(True)
    give_costs(dm, ms_per_step=0.25)
    path = tmp_path_factory.mktemp("saved") / "model.dynprune"
    dm.save(path)
    return path, dm


def rewrite(path: Path, to: Path, change) -> Path:
    """Writes a copy of a save file whose description, a dict, was changed by `change`."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dynprune"])
    about = change(about) or about
    save_file(load_file(path), to, {"dynprune": json.dumps(about)})
    return to


@pytest.mark.parametrize("kind", (Path, str), ids=["path", "text"])
def test_what_comes_back_is_what_was_saved(saved, kind) -> None:
    path, dm = saved
    twin = DynamicModel.load(kind(path), models.build("basic"))
    assert twin.sites == dm.sites
    assert (twin.include, twin.exclude, twin.group_size) == (dm.include, dm.exclude, dm.group_size)
    assert twin.frontier == dm.frontier
    assert twin.costs.fixed_ms == dm.costs.fixed_ms and twin.costs.fits(twin.plan)
    assert (twin.costs.level_ms == dm.costs.level_ms).all()
    x = models.example("basic", 5, seed=8)[0]
    for level in (0.0, 0.3, 1.0):
        twin.level = dm.level = level
        twin.reset_stats()
        dm.reset_stats()
        assert torch.equal(twin(x), dm(x)), f"level {level}"
        assert twin.stats().skip_rate == dm.stats().skip_rate
        assert twin.stats().inferences == 1
    assert dm.stats().skip_rate > 0
    dm.level = 0.0
    twin.level = 0.0
    twin.set_latency_budget(ms=50)


def test_saving_again_gives_the_same_file(saved, tmp_path) -> None:
    path, _ = saved
    DynamicModel.load(path, models.build("basic")).save(tmp_path / "again")
    with safe_open(path, "pt") as a, safe_open(tmp_path / "again", "pt") as b:
        assert json.loads(a.metadata()["dynprune"]) == json.loads(b.metadata()["dynprune"])
        assert set(a.keys()) == set(b.keys()) and all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_a_model_not_calibrated_is_saved_too(tmp_path) -> None:
    dm = DynamicModel(models.build("mlp"), models.example("mlp"))
    dm.save(tmp_path / "plain")
    twin = DynamicModel.load(tmp_path / "plain", models.build("mlp"))
    assert twin.frontier is None and twin.costs is None
    twin.level = dm.level = 1.0
    x = models.example("mlp", 3)[0]
    assert torch.equal(twin(x), dm(x))


def test_the_file_holds_no_code_and_not_the_models_weights(saved) -> None:
    path, dm = saved
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert not names & set(dm.model.state_dict())
    assert path.read_bytes()[8:9] == b"{", "a safetensors file begins with the length of its JSON header and the header"


@pytest.mark.parametrize("share", (0.0, 0.001, 0.1, 0.5, 0.99), ids=lambda share: f"{share:.1%}")
def test_a_truncated_file(saved, tmp_path, share: float) -> None:
    path, _ = saved
    whole = path.read_bytes()
    (tmp_path / "part").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        DynamicModel.load(tmp_path / "part", models.build("basic"))


@pytest.mark.parametrize("place", range(8))
def test_flipped_bits_never_raise_anything_else(saved, tmp_path, place: int) -> None:
    path, _ = saved
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[header * place // 8] ^= 0x5A
    (tmp_path / "flipped").write_bytes(content)
    with contextlib.suppress(CheckpointError):  # a flip in a word that means nothing to us may well load
        DynamicModel.load(tmp_path / "flipped", models.build("basic"))


def test_a_foreign_safetensors_file(tmp_path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not one that dynprune saved"):
        DynamicModel.load(tmp_path / "foreign", models.build("basic"))


@pytest.mark.parametrize("content", (b"", b"hello, this is text\n" * 100, b"\x80\x04\x95" + b"\0" * 50), ids=["empty", "text", "pickle"])
def test_another_kind_of_file(tmp_path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'.*other' is not a whole safetensors file"):
        DynamicModel.load(tmp_path / "other", models.build("basic"))


def test_no_file_and_a_folder(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no file '.*gone'"):
        DynamicModel.load(tmp_path / "gone", models.build("basic"))
    with pytest.raises(CheckpointError):
        DynamicModel.load(tmp_path, models.build("basic"))


@pytest.mark.parametrize(
    "model",
    [
        lambda: models.build("basic", seed=1),
        lambda: models.build("mlp"),
        lambda: models.build("basic").double(),
        lambda: nn.Sequential(models.build("basic")),
    ],
    ids=["weights", "architecture", "dtype", "names"],
)
def test_a_file_of_another_model(saved, model) -> None:
    with pytest.raises(CheckpointError, match="other parameters"):
        DynamicModel.load(saved[0], model())


@pytest.mark.parametrize("written", (4, 99, "1", None, 1.5))
def test_a_newer_or_unknown_format(saved, tmp_path, written) -> None:
    path = rewrite(saved[0], tmp_path / "newer", lambda about: about | {"format": written})
    with pytest.raises(CheckpointError, match=rf"has format {written!r}.*reads up to 3"):
        DynamicModel.load(path, models.build("basic"))


@pytest.mark.parametrize("key", ("fingerprint", "include", "exclude", "group_size", "example", "sites", "frontier", "costs", "format"))
@pytest.mark.parametrize("value", ("missing", 7, "x", [["x"]], {}), ids=repr)
def test_a_damaged_description(saved, tmp_path, key: str, value) -> None:
    def change(about: dict) -> None:
        if value == "missing":
            del about[key]
        else:
            about[key] = value

    path = rewrite(saved[0], tmp_path / "damaged", change)
    with pytest.raises(CheckpointError):
        DynamicModel.load(path, models.build("basic"))


@pytest.mark.parametrize("about", ([], 3, "text", None), ids=repr)
def test_a_description_that_is_no_object(saved, tmp_path, about) -> None:
    save_file(load_file(saved[0]), tmp_path / "odd", {"dynprune": json.dumps(about)})
    with pytest.raises(CheckpointError, match="damaged"):
        DynamicModel.load(tmp_path / "odd", models.build("basic"))


@pytest.mark.parametrize("fault", ("missing", "extra", "shape", "costs", "nan"))
def test_tensors_that_do_not_fit(saved, tmp_path, fault: str) -> None:
    tensors = load_file(saved[0])
    name = next(name for name in tensors if name.endswith(".bias"))
    costs = next(name for name in tensors if name.startswith("costs"))
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["more"] = torch.zeros(1)
    elif fault == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif fault == "costs":
        tensors[costs] = tensors[costs][:, :-1].clone()
    else:
        tensors[name].fill_(float("nan"))
    with safe_open(saved[0], "pt") as file:
        about = file.metadata()
    save_file(tensors, tmp_path / "unfit", about)
    with pytest.raises(CheckpointError, match="damaged"):
        DynamicModel.load(tmp_path / "unfit", models.build("basic"))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Keyed(nn.Module):
    """Takes token ids, a nest of tensors and plain values by keyword."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor, *, more: dict, scale: float = 1.0, name: str | None = None) -> Tensor:
        x = self.embed(ids) * scale + more["add"][0]
        return self.down(self.up(x).relu())


def test_a_model_of_several_inputs(tmp_path) -> None:
    inputs = models.example("two_inputs", 3)
    dm = DynamicModel(models.build("two_inputs"), inputs)
    dm.save(tmp_path / "file")
    twin = DynamicModel.load(tmp_path / "file", models.build("two_inputs"))
    assert torch.equal(twin(*inputs).logits, dm(*inputs).logits)


def test_keywords_nests_and_plain_values_come_back(tmp_path) -> None:
    model = Keyed().eval()
    call = {"ids": torch.tensor([[3, 8], [1, 0]]), "more": {"add": [torch.randn(2, 2, 8)]}, "scale": 0.5, "name": "x"}
    dm = DynamicModel(model, call)
    dm.save(tmp_path / "file")
    twin = DynamicModel.load(tmp_path / "file", model)
    assert torch.equal(twin.example[1]["ids"], call["ids"]) and twin.example[1]["scale"] == 0.5
    assert torch.equal(twin(**call), dm(**call))


def test_an_example_that_cannot_be_written_down(tmp_path) -> None:
    model = Keyed().eval()
    pair = Pair(torch.randn(1, 2, 8), torch.zeros(1, 2, 8))
    dm = DynamicModel(model, {"ids": torch.tensor([[3, 8]]), "more": {"add": pair}})
    with pytest.raises(InputError, match="holds a Pair, which cannot be saved"):
        dm.save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_nothing_to_save_and_nowhere_to_save_it(saved, tmp_path) -> None:
    with pytest.raises(InputError, match="first call"):
        DynamicModel(models.build("basic")).save(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        saved[1].save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        saved[1].save(tmp_path)


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch) -> None:
    path = tmp_path / "kept"
    saved[1].save(path)
    before = path.read_bytes()
    monkeypatch.setattr(Frontier, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved[1].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_module_can_be_loaded_into(saved) -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        DynamicModel.load(saved[0], None)
