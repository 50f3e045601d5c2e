"""Engine: a plan run directly, without the model around it - instruction sets, groups of a batch, memory, PyTorch's steps."""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref

import models
import numpy as np
import pytest
import torch
from helpers import assert_close
from test_executor import wide_input, wide_model
from torch import Tensor, nn

from dynprune.errors import InputError, IsaError, PlanError
from dynprune.gates.attach import make_gate
from dynprune.gates.heads import Gate
from dynprune.graph.capture import capture
from dynprune.graph.sites import Site, find_sites
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.engine import MAX_GROUP, Engine, choose_isa
from dynprune.runtime.lower import lower
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.plan import Plan


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def parts_of(model: nn.Module, *inputs: Tensor) -> tuple[Plan, dict[str, Site], dict[str, Gate]]:
    graph = capture(model, inputs)
    sites = find_sites(graph)
    return lower(graph, sites), {s.name: s for s in sites.sites}, {s.name: make_gate(model, s) for s in sites.sites}


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Plan, dict[str, Site], dict[str, Gate]]:
    model = wide_model()
    return model, *parts_of(model, wide_input())


@pytest.mark.parametrize("batch", (1, MAX_GROUP, MAX_GROUP + 1, 2 * MAX_GROUP + 1))
def test_every_instruction_set_computes_the_model(wide, isa: str, batch: int) -> None:
    model, plan, sites, gates = wide
    x = wide_input(batch)
    (got,), execution = Engine(plan, sites, gates, num_threads=2, isa=isa).run([x])
    assert_close(got, model(x), factor=10)
    assert execution.macs == batch * plan.macs
    assert execution.counts.shape == (len(plan.sites), batch)
    assert (execution.counts == np.array([[site.num_channels] for site in plan.sites])).all()
    assert (execution.level, execution.guard_actions, execution.predicted_ms) == (0.0, 0, 0.0)


@pytest.mark.parametrize("level", (0.4, 1.0))
def test_every_instruction_set_chooses_the_same_groups(wide, isa: str, level: float) -> None:
    _, plan, sites, gates = wide
    x = wide_input(MAX_GROUP + 3)
    (want,), reference = Engine(plan, sites, gates, isa="scalar").run([x], level=level)
    (got,), execution = Engine(plan, sites, gates, num_threads=2, isa=isa).run([x], level=level)
    assert (execution.counts == reference.counts).all() and execution.macs == reference.macs < len(x) * plan.macs
    assert execution.level == pytest.approx(level)
    assert_close(got, want, factor=10)


def test_unknown_and_missing_instruction_sets(wide, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, sites, gates = wide
    with pytest.raises((IsaError, PlanError), match="avx9"):
        Engine(plan, sites, gates, isa="avx9")
    monkeypatch.setenv("DYNPRUNE_MAX_ISA", "scalar")
    assert choose_isa() == "scalar" and Engine(plan, sites, gates).isa == "scalar"
    monkeypatch.setenv("DYNPRUNE_MAX_ISA", "avx51")
    with pytest.raises(IsaError, match=r"'avx51'.*scalar"):
        choose_isa()


def test_lists_for_unknown_sites_do_nothing_and_wrong_ones_are_refused(wide) -> None:
    model, plan, sites, gates = wide
    engine = Engine(plan, sites, gates)
    x = wide_input(2)
    (got,), _ = engine.run([x], active={"nowhere": [[], []]})
    assert_close(got, model(x), factor=10)
    with pytest.raises(InputError, match="one list per sample"):
        engine.run([x], active={plan.sites[0].name: [[0]]})


def test_executed_for_counts_what_a_run_would(wide) -> None:
    _, plan, sites, gates = wide
    engine = Engine(plan, sites, gates)
    lists = {site.name: [list(range(0, site.num_groups, 2)), []] for site in sites.values()}
    foretold = engine.executed_for(lists, 2)
    _, execution = engine.run([wide_input(2)], active=lists)
    assert foretold.macs == execution.macs and (foretold.counts == execution.counts).all()


def test_predicted_time_is_that_of_what_ran(wide) -> None:
    _, plan, sites, gates = wide
    steps = len(plan.steps)
    costs = CostTable((1.0,) * steps, (10.0,) * steps, np.zeros((32, steps)), plan_signature(plan))
    engine = Engine(plan, sites, gates, costs=costs)
    _, whole = engine.run([wide_input(3)])
    others = [step for step in plan.steps if step.op != "gate" and "for_gates" not in step.ints]
    assert len(others) < steps and whole.predicted_ms == pytest.approx(3 * 11.0 * len(others))
    _, guarded = engine.run([wide_input(1)], deadline_ns=2**62)
    gates_alone = sum(step.op == "gate" for step in plan.steps)
    assert guarded.predicted_ms == pytest.approx(11.0 * (len(others) + gates_alone)), "gates look at the clock; their inputs are not needed"
    _, gated = engine.run([wide_input(1)], level=1e-6)
    assert gated.predicted_ms > 11.0 * (len(others) + gates_alone)
    off = {site.name: [[]] for site in sites.values()}
    _, nothing = engine.run([wide_input(1)], active=off)
    branches = {i for i, site in enumerate(plan.sites) if site.kind == "branch"}
    left = sum(1.0 + 10.0 * (step.in_site < 0 and step.out_site < 0) for step in others if not branches.intersection(step.branches))
    assert nothing.predicted_ms == pytest.approx(left)


def test_costs_of_another_plan_are_not_used(wide) -> None:
    _, plan, sites, gates = wide
    costs = CostTable((1.0,), (1.0,), np.zeros((32, 1)), "another plan")
    _, execution = Engine(plan, sites, gates, costs=costs).run([wide_input()], deadline_ns=1)
    assert execution.predicted_ms == 0 and execution.guard_actions == 0


def test_step_times_are_one_per_step_and_sum_to_about_the_whole(wide) -> None:
    _, plan, sites, gates = wide
    for num_threads in (1, 2):
        engine = Engine(plan, sites, gates, num_threads=num_threads)
        began = time.perf_counter()
        times = engine.step_times_ms([wide_input()])
        whole_ms = 1e3 * (time.perf_counter() - began)
        assert len(times) == len(plan.steps)
        assert all(ms >= 0 for ms in times) and 0 < sum(times) <= whole_ms


def test_workspaces_are_used_again_and_given_back(wide) -> None:
    _, plan, sites, gates = wide
    engine = Engine(plan, sites, gates)
    x = wide_input()
    (want,), _ = engine.run([x])
    first = engine._acquire(1)
    address = first.arena_address()
    engine._compiled.release(first)
    engine.run([x])
    again = engine._acquire(1)
    assert again.arena_address() == address, "a second run made a second workspace"
    other = engine._acquire(1)
    assert other.arena_address() != address, "one workspace was given to two"
    engine._compiled.release(again)
    engine._compiled.release(other)
    engine.trim()
    (got,), _ = engine.run([x])
    assert torch.equal(got, want)


def test_inputs_and_outputs_are_let_go_after_a_run(wide) -> None:
    _, plan, sites, gates = wide
    engine = Engine(plan, sites, gates)
    x = wide_input()
    (y,), _ = engine.run([x])
    gone = weakref.ref(x), weakref.ref(y)
    del x, y
    assert [ref() for ref in gone] == [None, None]


def test_a_batch_that_does_not_fit_in_memory_says_what_it_needs() -> None:
    class Huge(nn.Module):
        """Keeps the batch whole, because PyTorch runs a step."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.interpolate(x, scale_factor=64.0).cumsum(3).relu()

    plan, sites, gates = parts_of(Huge().eval(), torch.zeros(1, 1, 64, 64))
    engine = Engine(plan, sites, gates)
    with pytest.raises(PlanError, match=r"needs \d+ MiB.*smaller batch"):
        engine.executed_for({}, 2**30)


def test_an_inconsistent_plan_is_refused(wide) -> None:
    _, plan, sites, gates = wide
    with pytest.raises(PlanError, match="arena of 16"):
        Engine(dataclasses.replace(plan, arena_size=16), sites, gates)


class Between(nn.Module):
    """A convolution, a step that PyTorch runs, and a residual block with such a step inside the branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1), Cumulated(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        order = x.mean((2, 3)).argsort(1)
        x = x + self.branch(x)
        return self.head(x.mean((2, 3))), order


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(2) / 4


@pytest.mark.parametrize("num_threads", (1, 3))
@pytest.mark.parametrize("batch", (1, 4, MAX_GROUP + 5))
def test_steps_of_pytorch_in_between(num_threads: int, batch: int) -> None:
    model = Between().eval()
    x = torch.randn(batch, 3, 9, 9)
    plan, sites, gates = parts_of(model, x[:1])
    assert any(step.torch_call is not None and step.branches for step in plan.steps), "the branch holds no step of PyTorch"
    engine = Engine(plan, sites, gates, num_threads=num_threads)
    for _ in range(3):
        got, _ = engine.run([x])
        for a, b in zip(got, model(x), strict=True):
            assert torch.allclose(a, b, atol=1e-4) and a.dtype == b.dtype
    branch = next(site.name for site in sites.values() if site.kind == "branch")
    off = [[0] if i % 2 else [] for i in range(batch)]
    (logits, _), execution = engine.run([x], active={branch: off})
    stem = model.stem(x).relu()
    mask = torch.tensor([len(chosen) for chosen in off])[:, None, None, None]
    assert torch.allclose(logits, model.head((stem + mask * model.branch(stem)).mean((2, 3))), atol=1e-4)
    assert execution.macs < batch * plan.macs


def test_other_dtypes_pass_through_steps_of_pytorch() -> None:
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(10, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(self.table(tokens).mean(1)) * scale, tokens > 4

    model = Embedded().eval()
    tokens, scale = torch.randint(0, 10, (6, 7)), torch.rand(6, 1)
    plan, sites, gates = parts_of(model, tokens[:2], scale[:2])
    got, _ = Engine(plan, sites, gates).run([tokens, scale])
    want = model(tokens, scale)
    assert_close(got[0], want[0], factor=10)
    assert torch.equal(got[1], want[1])


def test_many_threads_share_one_engine(wide) -> None:
    model, plan, sites, gates = wide
    engine = Engine(plan, sites, gates, num_threads=2)
    inputs = [wide_input(1 + i % 3, i) for i in range(6)]
    wants = [model(x) for x in inputs]
    wrong = []

    def work(number: int) -> None:
        with torch.no_grad():
            for i in range(20):
                (got,), _ = engine.run([inputs[(i + number) % 6]])
                if not torch.allclose(got, wants[(i + number) % 6], atol=1e-4):
                    wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_new_gate_costs_no_matrix_product_and_a_used_one_does() -> None:
    model = models.build("basic")
    plan, sites, gates = parts_of(model, *models.example("basic"))
    x = models.example("basic", 6)[0]
    _, same = Engine(plan, sites, gates).run([x], level=0.6)
    assert (same.counts == same.counts[:, :1]).all(), "an untrained gate ranks groups alike for every input"
    for gate in gates.values():
        gate.down.normal_()
        gate.bias.zero_()
        gate.set_curve(torch.tensor([-1.0, 0.0]))
    _, differ = Engine(plan, sites, gates).run([x], level=1.0)
    assert (differ.counts != differ.counts[:, :1]).any()


def test_numbers_outside_an_embedding_are_refused():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()
    dm = DynamicModel(model, torch.tensor([[1, 2]]))
    assert not any(step.torch_call for step in dm.plan.steps)
    with torch.no_grad():
        assert_close(dm(torch.tensor([[0, 9]])), model(torch.tensor([[0, 9]])))
        for wrong in (10, -1):
            with pytest.raises(InputError, match=rf"\[0, 10\), got {wrong}"):
                dm(torch.tensor([[3, wrong]]))


class Rating(nn.Module):
    """Numbers of two tables side by side in one tensor."""

    def __init__(self):
        super().__init__()
        self.user, self.item, self.fc = nn.Embedding(50, 4), nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.user(x[:, 0]) * self.item(x[:, 1]))


def test_columns_of_one_input_select_from_tables_of_their_own():
    model = Rating().eval()
    dm = DynamicModel(model, torch.tensor([[1, 2]]))
    assert not any(step.torch_call for step in dm.plan.steps)
    with torch.no_grad():
        x = torch.tensor([[49, 6], [0, 0], [30, 3]])
        assert_close(dm(x), model(x))
        with pytest.raises(InputError, match=r"\[0, 7\), got 7"):
            dm(torch.tensor([[8, 7]]))
        with pytest.raises(InputError, match=r"\[0, 50\), got 50"):
            dm(torch.tensor([[50, 1]]))
