"""DynamicModel as its user meets it: where calls run, what wrong arguments get, budgets and levels, weights that change, copies."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import time
import warnings

import models
import pytest
import torch
from test_executor import give_costs
from torch import Tensor, nn

from dynprune.control.monitor import ResourceMonitor
from dynprune.control.pressure import PressurePolicy, ResourceSample
from dynprune.errors import CalibrationError, DynpruneError, InputError, UnsupportedModelError
from dynprune.runtime.captured import MAX_SESSIONS
from dynprune.runtime.model import DynamicModel


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def shared() -> DynamicModel:
    """A wrapped model for tests that leave it as it was, statistics aside."""
    return DynamicModel(models.build("mbconv_se"), models.example("mbconv_se"))


def images(batch: int = 2, size: int = 16, seed: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wrap(name: str = "basic") -> DynamicModel:
    return DynamicModel(models.build(name), models.example(name))


def assert_runs_on_engine_as(dm: DynamicModel, x: Tensor, want: Tensor) -> None:
    before = dm.stats().inferences
    got = dm(x)
    assert dm.stats().inferences == before + 1, "the call did not run on the engine"
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


# ---------------------------------------------------------------- where calls run


def test_a_model_in_eval_mode_is_served_by_the_engine_at_once(shared) -> None:
    assert not shared.training
    assert_runs_on_engine_as(shared, images(), shared.model(images()))


def test_hooks_on_the_model_run() -> None:
    dm, seen = wrap(), []
    handles = [
        dm.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        dm.register_forward_hook(lambda module, args, output: seen.append(output)),
        nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)),
    ]
    got = dm(images())
    assert torch.allclose(got, dm.model(2 * images()), rtol=1e-4, atol=1e-4)
    assert any(x is got for x in seen) and any(x is dm for x in seen)
    for handle in handles:
        handle.remove()
    seen.clear()
    assert torch.allclose(dm(images()), dm.model(images()), rtol=1e-4, atol=1e-4) and not seen


def test_shapes_and_layouts_seen_before_are_told_apart() -> None:
    dm = wrap()
    for _ in range(2):
        for x in (images(1), images(3), images(2).double(), images(2, 20), images(2).to(memory_format=torch.channels_last)):
            if x.dtype is torch.float32:
                assert torch.allclose(dm(x), dm.model(x), rtol=1e-4, atol=1e-4)
            else:
                with pytest.raises(InputError):
                    dm(x)
        with pytest.raises(InputError, match="dense"):
            dm(images(3).to_sparse())


def test_without_example_inputs_the_first_call_captures() -> None:
    dm = DynamicModel(models.build("basic"))
    assert "not captured yet" in repr(dm)
    for read in (lambda: dm.sites, lambda: dm.plan, lambda: dm.example, lambda: dm.explain(), lambda: dm.graph, lambda: dm.gate("1")):
        with pytest.raises(InputError, match="first call"):
            read()
    assert_runs_on_engine_as(dm, images(), dm.model(images()))
    assert len(dm.sites) == 4 and "4 sites" in repr(dm)


def test_training_mode_runs_the_users_modules_and_reaches_the_gates() -> None:
    dm = wrap()
    dm.level = 1.0
    dm.train()
    with torch.enable_grad():
        dm(images(4)).square().sum().backward()
    assert dm.stats().inferences == 0
    channel_gates = [dm.gate(site.name) for site in dm.sites if site.kind == "channels"]
    assert all(gate.bias.grad is not None and gate.bias.grad.abs().sum() > 0 for gate in channel_gates)
    assert dm.model[0][0].weight.grad.abs().sum() > 0


def test_training_mode_of_the_model_is_taken_over() -> None:
    dm = DynamicModel(models.build("basic").train(), models.example("basic"))
    assert dm.training and dm.model.training
    dm(images())
    assert dm.stats().inferences == 0


def test_wanted_gradients_run_in_pytorch_and_say_so_once() -> None:
    dm = wrap()
    x = images().requires_grad_()
    with torch.enable_grad():
        with pytest.warns(RuntimeWarning, match=r"use torch.no_grad\(\)"):
            dm(x).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dm(x)
    assert x.grad.abs().sum() > 0
    assert dm.stats().inferences == 0
    assert_runs_on_engine_as(dm, x, dm.model(x))


def test_inference_mode_runs_on_the_engine() -> None:
    model = models.build("basic")
    with torch.inference_mode():
        dm = DynamicModel(model, images())
        assert_runs_on_engine_as(dm, images(), model(images()))
    assert_runs_on_engine_as(dm, images(), model(images()))


def test_autocast_runs_in_pytorch_and_says_so() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        dm = wrap()
        with pytest.warns(RuntimeWarning, match="Autocast is enabled"):
            got = dm(images())
        assert got.dtype == torch.bfloat16 and dm.stats().inferences == 0
    assert len(dm.sites) == 4, "autocast was captured with the model"
    assert_runs_on_engine_as(dm, images(), dm.model(images()))


def test_another_device_runs_in_pytorch(shared) -> None:
    dm = copy.deepcopy(shared)
    dm.to("meta")
    assert dm(images().to("meta")).device.type == "meta"
    assert dm.stats().inferences == 0


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("batch", (1, 2, 16, 17, 33, 50))
def test_any_batch_size(shared, batch: int) -> None:
    assert_runs_on_engine_as(shared, images(batch), shared.model(images(batch)))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.flip(3).transpose(2, 3),
        lambda x: x[::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: torch.cat([x, x], 3)[..., 1:17],
    ],
    ids=["channels_last", "transposed", "every_second", "expanded", "slice"],
)
def test_any_memory_layout(shared, layout) -> None:
    x = layout(images(6))
    assert_runs_on_engine_as(shared, x, shared.model(x))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(0, 3, 16, 16),), {}, "at least 1 sample, got 0"),
        ((torch.zeros(2, 4, 16, 16),), {}, r"float32 \(2, 4, 16, 16\).*3 channels"),
        ((torch.zeros(3, 16, 16),), {}, r"float32 \(3, 16, 16\)"),
        ((torch.zeros(3),), {}, r"float32 \(3,\)"),
        ((torch.zeros(()),), {}, r"float32 \(\)"),
        ((torch.zeros(2, 3, 16, 16, dtype=torch.float64),), {}, "float64"),
        ((torch.zeros(2, 3, 16, 16, dtype=torch.float16),), {}, "float16"),
        ((torch.zeros(2, 3, 16, 16, dtype=torch.int64),), {}, "int64"),
        ((torch.zeros(2, 3, 16, 16).to_sparse(),), {}, "dense"),
        ((), {}, "at least one tensor"),
        ((None,), {}, "at least one tensor"),
        ((torch.zeros(2, 3, 16, 16).numpy(),), {}, "at least one tensor"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)), {}, "positional arguments"),
        ((torch.zeros(2, 3, 16, 16),), {"strength": 1}, "strength"),
    ],
    ids=[
        *("empty-batch", "channels", "rank-3", "rank-1", "rank-0", "float64", "float16", "int64", "sparse"),
        *("nothing", "none", "numpy", "too-many", "keyword"),
    ],
)
def test_wrong_inputs_are_refused_and_harm_nothing(shared, args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shared(*args, **kwargs)
    with pytest.raises(InputError):
        shared.run_with_active(*args, active={}, **kwargs)
    assert_runs_on_engine_as(shared, images(), shared.model(images()))


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_stays_with_its_sample(shared, value: float) -> None:
    x = images(3)
    x[1, 0, 3, 3] = value
    want, got = shared.model(x), shared(x)
    assert torch.equal(got.isnan(), want.isnan()) and want[1].isnan().all()
    assert torch.allclose(got[::2], want[::2], atol=1e-5)


@pytest.mark.parametrize("name", ("basic", "vgg", "dense", "fire", "convnext", "mlp", "attention"))
def test_nan_is_not_swallowed_by_activations_and_pools(name: str) -> None:
    dm = wrap(name)
    inputs = models.example(name, 2)
    inputs[0][1, 0] = math.nan
    want, got = dm.model(*inputs), dm(*inputs)
    assert torch.equal(got.isnan(), want.isnan())


def test_image_sizes_are_captured_as_they_come_and_the_oldest_forgotten() -> None:
    dm = wrap()
    gates = [id(dm.gate(site.name)) for site in dm.sites]
    for size in range(12, 12 + 2 * (MAX_SESSIONS + 1), 2):
        assert_runs_on_engine_as(dm, images(2, size), dm.model(images(2, size)))
        assert_runs_on_engine_as(dm, images(1, 16), dm.model(images(1, 16)))
    assert len(dm._sessions) == MAX_SESSIONS
    assert [id(dm.gate(site.name)) for site in dm.sites] == gates
    assert dm.plan.inputs[0].sizes == (3, 16, 16), "`plan` is that of the example"


def test_several_inputs_keywords_and_nested_outputs() -> None:
    dm = wrap("two_inputs")
    image, text = images(3), torch.randn(3, 8)
    for args, kwargs in (((image, text, True), {}), ((image, text), {}), ((image,), {"text": text, "double": True})):
        want, got = dm.model(*args, **kwargs), dm(*args, **kwargs)
        assert type(got) is type(want)
        assert torch.allclose(got.logits, want.logits, atol=1e-5)
        assert torch.allclose(got.aux["joined"], want.aux["joined"], atol=1e-5)
        assert got.aux["none"] is None and torch.equal(got.aux["pair"][0], text) and got.aux["pair"][1] == 3
    assert dm.stats().inferences == 3
    with pytest.raises(InputError, match=r"one batch size, got \[3, 2\]"):
        dm(image, text[:2])


class Odd(nn.Module):
    """Returns an input, a parameter, the same value twice, a view, and numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> dict:
        y = self.conv(x)
        return {"y": y, "again": y, "input": x, "view": y[:, 2:4].flatten(1), "mean": y.mean(), "weight": self.conv.weight, "n": 7}


@pytest.mark.parametrize("batch", (1, 20))
def test_odd_outputs(batch: int) -> None:
    model = Odd().eval()
    dm = DynamicModel(model, images(batch))
    x = images(batch, seed=9)
    want, got = model(x), dm(x)
    assert list(got) == list(want)
    for key, value in want.items():
        assert torch.allclose(got[key], value, atol=1e-5) if isinstance(value, Tensor) else got[key] == value, key


def test_outputs_of_two_calls_are_two_tensors(shared) -> None:
    a = shared(images(seed=1))
    kept = a.clone()
    b = shared(images(seed=2))
    assert torch.equal(a, kept) and not torch.equal(a, b)


def test_a_model_that_mixes_samples_runs_as_captured() -> None:
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y @ y.t()

    model = Mixing().eval()
    dm = DynamicModel(model, torch.randn(4, 8))
    for batch in (1, 4, 20):
        x = torch.randn(batch, 8)
        assert torch.allclose(dm(x), model(x), atol=1e-5)


def test_example_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(InputError, match=r"float32 \(1, 5, 16, 16\)"):
        DynamicModel(models.build("basic"), torch.zeros(1, 5, 16, 16))
    with pytest.raises(InputError, match="at least one tensor"):
        DynamicModel(models.build("basic"), ("image",))


@pytest.mark.parametrize("model", (None, lambda x: x, nn.Linear), ids=["none", "function", "class"])
def test_what_is_no_module_is_refused(model) -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        DynamicModel(model)


def test_a_dynamic_model_is_not_wrapped_again(shared) -> None:
    with pytest.raises(InputError, match=r"`\.model`"):
        DynamicModel(shared)


def test_a_model_that_cannot_be_captured_says_why() -> None:
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if y.sum().item() > 0 else -y

    with pytest.raises(UnsupportedModelError, match="Branching"):
        DynamicModel(Branching().eval(), torch.ones(2, 4))


def test_unknown_and_impossible_site_patterns() -> None:
    with pytest.raises(InputError, match="'layer9' matches no site"):
        DynamicModel(models.build("basic"), models.example("basic"), include=("layer9",))
    with pytest.raises(InputError, match="group_size=8"):
        DynamicModel(models.build("basic"), models.example("basic"), group_size=16)
    dm = DynamicModel(models.build("basic"), models.example("basic"), include=("1*",), exclude=("1",), group_size=4)
    assert [(site.name, site.num_groups) for site in dm.sites] == [("1.conv1", 4)]


# ---------------------------------------------------------------- given lists


@pytest.mark.parametrize("backend", ("engine", "hooked"))
@pytest.mark.parametrize(
    ("active", "message"),
    [
        ({"nope": [[0], [0]]}, "No site is named 'nope'"),
        ({"1": [[1], [0]]}, "got 1"),
        ({"1": [[0]]}, "one list per sample, 2, got 1"),
        ({"1": [0, 0]}, "list of ints per sample"),
        ({"1": None}, "leave the site out"),
        ({"1.expand.0": [[3, 2], []]}, "got 2 after 3"),
        ({"1.expand.0": [[0, 0], []]}, "got 0 after 0"),
        ({"1.expand.0": [[-1], []]}, "got -1"),
        ({"1.expand.0": [[32], []]}, "got 32"),
        ({"1.expand.0": [[1.5], []]}, "list of ints"),
        ({"1.expand.0": [["a"], []]}, "list of ints"),
        ({"1.expand.0": [[2**40], []]}, "list of ints"),
        ([[0], [0]], "dict from site names"),
        (None, "dict from site names"),
    ],
)
def test_wrong_lists_are_refused(shared, active, message: str, backend: str) -> None:
    shared.reset_stats()
    with pytest.raises(InputError, match=message):
        shared.run_with_active(images(), active=active, backend=backend)
    assert shared.stats().inferences == 0


def test_unknown_backend(shared) -> None:
    with pytest.raises(InputError, match="'engine' or 'hooked', got 'gpu'"):
        shared.run_with_active(images(), active={}, backend="gpu")


def test_lists_of_a_large_batch_go_with_their_samples(shared) -> None:
    x = images(35)
    lists = {"1": [[0] if i % 3 else [] for i in range(35)], "1.expand.0": [list(range(i % 33)) for i in range(35)]}
    got = shared.run_with_active(x, active=lists)
    for i in (0, 1, 11, 17, 18, 34):
        alone = shared.run_with_active(x[i : i + 1], active={name: [chosen[i]] for name, chosen in lists.items()})
        assert torch.allclose(got[i], alone[0], atol=1e-5), f"sample {i}"


# ---------------------------------------------------------------- levels, threads, deadlines


@pytest.mark.parametrize("level", (-0.01, 1.01, math.nan, math.inf, "0.5", None, True))
def test_wrong_levels_are_refused(shared, level) -> None:
    with pytest.raises(InputError, match=r"number in \[0, 1\]"):
        shared.level = level
    assert shared.level == 0


@pytest.mark.parametrize("num_threads", (0, -1, 1.5, True, "2", None))
def test_wrong_thread_counts_are_refused(shared, num_threads) -> None:
    with pytest.raises(InputError, match="int >= 1"):
        shared.set_num_threads(num_threads)


@pytest.mark.parametrize("deadline", (math.nan, math.inf, "soon", True))
def test_wrong_deadlines_are_refused(shared, deadline) -> None:
    with pytest.raises(InputError, match=r"time\.monotonic\(\)"):
        shared(images(), deadline=deadline)


def test_a_new_model_skips_at_level_1_more_than_at_half() -> None:
    dm = wrap("mbconv_se")
    rates = []
    for level in (0.0, 0.5, 1.0):
        dm.level = level
        dm.reset_stats()
        out = dm(images())
        rates.append(dm.stats().skip_rate)
        assert dm.level == level == dm.stats().level
        assert torch.isfinite(out).all()
    assert rates[0] == 0 and 0 < rates[1] < rates[2] < 1


def test_level_0_is_exact_whatever_the_gates_hold() -> None:
    dm = wrap("basic")
    want = dm(images())
    for site in dm.sites:
        gate = dm.gate(site.name)
        gate.bias.fill_(math.nan if site.kind == "branch" else -1e30)
        gate.set_curve(torch.full((4,), 1e30))
    assert torch.equal(dm(images()), want)


# ---------------------------------------------------------------- budgets and monitor


def test_a_budget_needs_a_calibrated_model(shared) -> None:
    with pytest.raises(CalibrationError, match="calibrate"):
        shared.set_latency_budget(ms=10)
    shared.set_latency_budget(None)


@pytest.fixture(scope="module")
def costed() -> DynamicModel:
    """A wrapped model that believes it takes 20 ms at level 0 and a quarter of it at level 1."""
    dm = wrap()
    give_costs(dm, ms_per_step=20 / len(dm.plan.steps))
    return dm


@pytest.mark.parametrize("ms", (0, -1, math.nan, math.inf, "10", True, [5]))
def test_wrong_budgets_are_refused(costed, ms) -> None:
    with pytest.raises(InputError, match="budget_ms"):
        costed.set_latency_budget(ms=ms)
    assert costed.stats().budget_ms is None


@pytest.mark.parametrize("percentile", (0, 100, -5, math.nan, "95", None, True))
def test_wrong_percentiles_are_refused(costed, percentile) -> None:
    with pytest.raises(InputError, match="percentile"):
        costed.set_latency_budget(ms=5, percentile=percentile)
    assert costed.stats().budget_ms is None


def test_a_budget_that_no_level_meets_warns_once_runs_at_level_1_and_counts_misses(costed) -> None:
    costed.reset_stats()
    costed.set_latency_budget(ms=1e-4)
    try:
        with pytest.warns(RuntimeWarning, match=r"0\.0001 ms; running at level 1"):
            costed(images(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                costed(images(1))
        stats = costed.stats()
        assert (stats.inferences, stats.budget_misses, stats.budget_ms, stats.level) == (4, 4, 1e-4, 1.0)
        assert costed.level == 1.0
        with pytest.raises(InputError, match="budget picks the level"):
            costed.level = 0.5
        costed.set_latency_budget(ms=1e6, percentile=50)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(40):
                costed(images(1))
        assert costed.level == 0.0 and costed.stats().budget_misses == 4
    finally:
        costed.set_latency_budget(None)
    assert costed.stats().budget_ms is None
    costed.level = 0.25
    costed(images(1))
    assert costed.stats().level == 0.25
    costed.level = 0.0


class FakeMonitor(ResourceMonitor):
    """Reports a given pressure, at once and without a thread."""

    def __init__(self, cpu_pressure: float):
        super().__init__()
        self.cpu_pressure, self.started = cpu_pressure, False

    def start(self) -> None:
        self.started = True

    def sample(self) -> ResourceSample:
        return ResourceSample(timestamp_s=0.0, cpu_pressure=self.cpu_pressure)


def test_a_monitor_tightens_under_pressure_with_and_without_a_budget(costed) -> None:
    monitor = FakeMonitor(0.0)
    costed.attach_monitor(monitor)
    assert monitor.started
    try:
        costed(images(1))
        assert costed.stats().level == 0
        monitor.cpu_pressure = 0.95
        costed(images(1))
        assert costed.stats().level == 1
        costed.set_pressure_policy(PressurePolicy(cpu_start=1))
        costed(images(1))
        assert costed.stats().level == 0
        costed.set_latency_budget(ms=1e6)
        costed.set_pressure_policy(PressurePolicy())
        costed(images(1))
        assert costed.stats().level == 0, "the budget alone answers to CPU load"
        costed.set_pressure_policy(PressurePolicy(cpu_under_budget=True))
        costed(images(1))
        assert costed.stats().level == 1
    finally:
        costed.set_latency_budget(None)
        costed.attach_monitor(None)
    costed(images(1))
    assert costed.stats().level == 0


def test_a_real_monitor_attaches(costed) -> None:
    with ResourceMonitor(interval_s=0.05) as monitor:
        costed.attach_monitor(monitor)
        costed(images(1))
        costed.attach_monitor(None)


@pytest.mark.parametrize("monitor", (ResourceMonitor, 0.5, "psutil"), ids=["class", "number", "text"])
def test_what_is_no_monitor_is_refused(costed, monitor) -> None:
    with pytest.raises(InputError, match="ResourceMonitor or None"):
        costed.attach_monitor(monitor)
    with pytest.raises(InputError, match="PressurePolicy"):
        costed.set_pressure_policy(monitor)


def test_budgets_may_change_while_others_call(costed) -> None:
    stop, errors = threading.Event(), []

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    costed(images(1))
                except Exception as error:  # whatever it is, the test reports it
                    errors.append(error)
                    return

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        costed.set_latency_budget(None if i % 2 else 1e6)
        costed.stats()
    stop.set()
    for thread in threads:
        thread.join()
    costed.set_latency_budget(None)
    assert not errors


@pytest.mark.parametrize("far", (1e9, 1e30))
def test_budgets_and_deadlines_may_be_far_away(costed, far: float) -> None:
    costed.set_latency_budget(ms=far)
    try:
        costed.reset_stats()
        costed(images(1), deadline=far)
        assert costed.stats().level == 0 and costed.stats().guard_actions == 0
    finally:
        costed.set_latency_budget(None)


def test_a_budget_ends_before_a_later_deadline_and_after_an_earlier_one(costed) -> None:
    costed.set_latency_budget(ms=1e6)
    try:
        costed.reset_stats()
        costed(images(1), deadline=time.monotonic() - 1)
        assert costed.last_call.level == 1 and costed.stats().budget_misses == 1
        costed(images(1), deadline=time.monotonic() + 60)
        assert costed.last_call.level == 0 and costed.stats().budget_misses == 1, "one late call does not tighten the next"
    finally:
        costed.set_latency_budget(None)


def test_the_last_call_tells_how_long_the_engine_took(shared) -> None:
    for batch in (1, 40):  # the latter runs in three groups
        shares = []
        for _ in range(20):
            began = time.monotonic()
            shared(images(batch))
            taken_ms = (time.monotonic() - began) * 1e3
            assert 0 < shared.last_call.engine_ms < taken_ms
            shares.append(shared.last_call.engine_ms / taken_ms)
        assert max(shares) > 0.1, "a busy machine may put aside some of the calls, not all"


def test_a_deadline_picks_the_level_without_a_budget(costed) -> None:
    costed.reset_stats()
    costed(images(1), deadline=time.monotonic() + 60)
    assert costed.last_call.level == 0
    costed(images(1), deadline=time.monotonic() + 1e-6)
    assert costed.last_call.level == 1
    assert costed.stats().budget_ms is None and costed.stats().budget_misses == 1
    costed.level = 0.5
    try:
        costed(images(1), deadline=time.monotonic() + 60)
        assert costed.last_call.level == 0.5, "the level set stays the least"
    finally:
        costed.level = 0.0


# ---------------------------------------------------------------- weights that change


def _scale(model: nn.Module) -> None:
    model[0][0].weight.mul_(1.5)


def _bias(model: nn.Module) -> None:
    model[3].fc.bias.add_(1)


def _statistics(model: nn.Module) -> None:
    model[1].bn1.running_mean.add_(0.3)


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 1.2 for key, value in model.state_dict().items()})


def _assign(model: nn.Module) -> None:
    state = {key: value * 1.2 if value.is_floating_point() else value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _parameter(model: nn.Module) -> None:
    model[3].fc.weight = nn.Parameter(torch.randn_like(model[3].fc.weight))


def _module(model: nn.Module) -> None:
    model[3].fc = nn.Linear(24, 5)


def _double_and_back(model: nn.Module) -> None:
    model.double()
    model[0][0].weight.mul_(1.5)
    model.float()
    model[1].bn1.running_mean.add_(0.3)


def _optimizer(model: nn.Module) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        model(images()).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("change", (_scale, _bias, _statistics, _load, _assign, _parameter, _module, _double_and_back, _optimizer))
def test_the_engine_sees_weights_that_change(change) -> None:
    dm = wrap()
    before = dm(images())
    for _ in range(2):
        change(dm.model)
        want = dm.model(images())
        assert_runs_on_engine_as(dm, images(), want)
        assert_runs_on_engine_as(dm, images(1, 20), dm.model(images(1, 20)))
    assert want.shape != before.shape or not torch.allclose(want, before, atol=1e-3), "the change changes nothing"
    assert len(dm.sites) == 4


def test_load_state_dict_of_the_whole_is_seen() -> None:
    dm, other = wrap(), DynamicModel(models.build("basic", seed=1), models.example("basic"))
    other.gate("1.conv1").bias.normal_()
    dm.load_state_dict(other.state_dict())
    dm.level = other.level = 0.7
    assert torch.equal(dm(images()), other(images()))


def test_writes_through_data_are_seen_after_refresh() -> None:
    dm = wrap()
    dm(images())
    dm.model[3].fc.weight.data.mul_(2)
    dm.refresh()
    assert_runs_on_engine_as(dm, images(), dm.model(images()))


def test_gates_that_change_are_seen() -> None:
    dm = wrap()
    dm.level = 1.0
    dm(images())
    gate = dm.gate("1.conv1")
    for change in (lambda: gate.bias.fill_(-100), lambda: gate.bias.fill_(100), lambda: gate.set_curve(torch.tensor([0.0, 1e6]))):
        change()
        dm.reset_stats()
        want, masks = dm.attachment.run((images(),), level=1.0)
        assert_runs_on_engine_as(dm, images(), want)
        assert dm.stats().site_skip_rates["1.conv1"] == pytest.approx(1 - masks["1.conv1"].mean().item())


@pytest.mark.parametrize("use", ("level", "deadline", "lists"))
def test_gates_that_change_between_calls_at_level_0_are_seen_once_they_matter(use: str) -> None:
    dm = wrap()
    if use == "deadline":
        give_costs(dm, 1.0)
    dm(images())
    gate = dm.gate("1.conv1")
    gate.bias.fill_(-100)
    gate.channel_means[0].fill_(3.0)
    gate.compensated[0] = True
    dm(images())  # no gate decides here, so nobody looked at them
    dm.reset_stats()
    if use == "lists":
        half = {"1.conv1": [list(range(0, dm.sites[[s.name for s in dm.sites].index("1.conv1")].num_groups, 2))] * len(images())}
        want = dm.run_with_active(images(), active=half, backend="hooked")
        assert torch.allclose(dm.run_with_active(images(), active=half), want, atol=1e-5)
        return
    want, masks = dm.attachment.run((images(),), level=1.0)
    if use == "level":
        dm.level = 1.0
        got = dm(images())
    else:
        got = dm(images(), deadline=time.monotonic() - 1)
    assert torch.allclose(got, want, atol=1e-5)
    assert dm.stats().site_skip_rates["1.conv1"] == pytest.approx(1 - masks["1.conv1"].mean().item())


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_another_dtype_and_back(dtype: torch.dtype) -> None:
    dm = wrap()
    want = dm(images())
    dm.to(dtype)
    got = dm(images().to(dtype))
    assert got.dtype == dtype
    assert torch.allclose(got.float(), want, rtol=0.1, atol=0.1)
    with pytest.raises(InputError, match="float32"):
        dm(images())
    dm.float()
    assert_runs_on_engine_as(dm, images(), dm.model(images()))


# ---------------------------------------------------------------- copies


def test_a_copy_is_whole_and_apart() -> None:
    dm = wrap()
    dm.gate("1.conv1").bias.normal_()
    dm.set_num_threads(3)
    dm.level = 0.6
    give_costs(dm, 1.0)
    twin = copy.deepcopy(dm)
    assert torch.equal(twin(images()), dm(images()))
    assert (twin.level, twin.num_threads, twin.frontier, twin.sites) == (0.6, 3, dm.frontier, dm.sites)
    assert twin.stats().inferences == 1 and not twin.training
    want = dm(images())
    twin.model[3].fc.weight.zero_()
    twin.gate("1.conv1").bias.zero_()
    twin.level = 1.0
    assert torch.equal(dm(images()), want)


def test_a_copy_of_a_model_not_captured_yet() -> None:
    twin = copy.deepcopy(DynamicModel(models.build("basic")))
    assert_runs_on_engine_as(twin, images(), twin.model(images()))


def test_a_copy_keeps_which_parts_train() -> None:
    dm = wrap()
    dm.train()
    dm.model[0].eval()
    twin = copy.deepcopy(dm)
    assert twin.training and twin.model.training and not twin.model[0].training and twin.gate("1").training


def test_pickling_is_refused_with_the_cure(shared) -> None:
    with pytest.raises(InputError, match=r"dm\.save\(path\)"):
        pickle.dumps(shared)


# ---------------------------------------------------------------- what it says


def test_explain_names_every_step_site_and_refusal(shared) -> None:
    text = shared.explain()
    for step in shared.plan.steps:
        assert step.name in text
    for site in shared.sites:
        assert site.name in text
    for item in (*shared._captured().sites.ungated, *(name for name, _ in shared.plan.ungated)):
        assert getattr(item, "reason", item) in text


def test_explain_says_what_runs_in_pytorch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax2d(), nn.Conv2d(8, 4, 3)).eval()

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = model

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sort(dim=-1).values

    dm = DynamicModel(Sorted().eval(), images())
    line = next(line for line in dm.explain().splitlines() if "sort" in line)
    assert "PyTorch" in line
    assert torch.allclose(dm(images()), dm.model(images()), atol=1e-5)


def test_every_error_is_a_dynprune_error() -> None:
    assert all(issubclass(error, DynpruneError) for error in (InputError, CalibrationError, UnsupportedModelError))
    assert issubclass(InputError, ValueError)
