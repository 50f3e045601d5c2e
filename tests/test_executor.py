"""The executor: whatever threads do, and whoever else takes the cores, results are those of one thread, and deadlines are watched."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from helpers import active_list
from torch import Tensor, nn

from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.errors import InputError
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.engine import Execution
from dynprune.runtime.model import DynamicModel

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def wide_model(seed: int = 0) -> nn.Module:
    """Returns a model whose steps have several chunks each, so that threads share them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        models.stem(32),
        models.BasicBlock(32, 48),
        models.BasicBlock(48, 48),
        models.InvertedResidual(48, 96, 48, squeezed=8),
        models.Head(48),
    ).eval()


def wide_input(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def lists_for(dm: DynamicModel, batch: int, seed: int) -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(seed)
    kinds = ("random", "all", "empty") if seed % 2 else ("random",)
    return {site.name: [active_list(rng.choice(kinds), site.num_groups, rng).tolist() for _ in range(batch)] for site in dm.sites}


def give_costs(dm: DynamicModel, ms_per_step: float) -> None:
    """Makes the deadline guard expect that each step takes `ms_per_step` at level 0, and nothing at level 1."""
    steps, levels = len(dm.plan.steps), len(dm.gate(dm.sites[0].name).curve)
    level_ms = np.linspace(ms_per_step, 0.0, levels)[:, None] * np.ones(steps)
    table = CostTable((ms_per_step,) * steps, (0.0,) * steps, level_ms, plan_signature(dm.plan))
    total = ms_per_step * steps
    dm.set_frontier(Frontier((OperatingPoint(0, total, total, 0, 1), OperatingPoint(1, total / 4, total / 4, 0.5, 0.5))), table)


@pytest.mark.parametrize(("num_threads", "batch"), [(2, 1), (4, 3), (7, 1), (1000, 2)])
def test_more_threads_give_the_same(num_threads: int, batch: int) -> None:
    model = wide_model()
    alone, together = DynamicModel(model, wide_input()), DynamicModel(model, wide_input())
    alone.set_num_threads(1)
    together.set_num_threads(num_threads)
    assert together.num_threads == num_threads
    x = wide_input(batch)
    want = model(x)
    for seed in range(6):
        assert torch.allclose(together(x), want, atol=1e-4)
        lists = lists_for(alone, batch, seed)
        a, b = alone.run_with_active(x, active=lists), together.run_with_active(x, active=lists)
        assert (a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1)


def _burn(stop_after_s: float) -> None:
    end = time.monotonic() + stop_after_s
    while time.monotonic() < end:
        pass


def test_threads_put_aside_by_busy_neighbours_change_no_result() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    dm.set_num_threads(4)
    cases = [(wide_input(batch, seed), lists_for(dm, batch, seed)) for seed, batch in enumerate((1, 2, 1, 3, 1))]
    wants = [dm.run_with_active(x, active=lists, backend="hooked") for x, lists in cases]
    context = multiprocessing.get_context("spawn")
    neighbours = [context.Process(target=_burn, args=(6.0,), daemon=True) for _ in range(os.cpu_count() or 2)]
    for neighbour in neighbours:
        neighbour.start()
    first = [dm.run_with_active(x, active=lists) for x, lists in cases]
    end = time.monotonic() + 4.0
    try:
        for i in range(300):
            x, lists = cases[i % len(cases)]
            got = dm.run_with_active(x, active=lists)
            assert torch.equal(got, first[i % len(cases)]), f"inference {i} differs"
            if time.monotonic() > end and i > 60:
                break
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()
    for got, want in zip(first, wants, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_threads_put_aside_while_python_steps_stand_in_between_change_no_result() -> None:
    class Mixed(nn.Module):
        """Engine steps with steps of PyTorch between them, so that one call is several runs of one workspace."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = torch.cumsum(conv(x).relu(), 3) / 10
            return x.mean((2, 3))

    model = Mixed().eval()
    x = wide_input(2)
    dm = DynamicModel(model, x)
    assert sum(step.torch_call is not None for step in dm.plan.steps) >= 4
    dm.set_num_threads(8)
    want = model(x)
    for _ in range(100):
        assert torch.allclose(dm(x), want, rtol=1e-4, atol=1e-4)


def test_several_threads_may_call_one_model_and_several_models_at_once() -> None:
    twins = [DynamicModel(wide_model(seed), wide_input()) for seed in (0, 1)]
    for dm in twins:
        dm.set_num_threads(3)
    cases = []
    for seed in range(6):
        dm, x = twins[seed % 2], wide_input(1 + seed % 3, seed)
        lists = lists_for(dm, len(x), seed)
        cases.append((dm, x, lists, dm.run_with_active(x, active=lists, backend="hooked")))

    def call(number: int) -> float:
        dm, x, lists, want = cases[number % len(cases)]
        with torch.no_grad():
            got = dm.run_with_active(x, active=lists)
        return ((got - want).abs().max() / want.abs().max()).item()

    with ThreadPoolExecutor(6) as pool:
        errors = list(pool.map(call, range(120)))
    assert max(errors) < 1e-4
    assert sum(dm.stats().inferences for dm in twins) == 120 + len(cases)


def test_new_shapes_may_be_captured_by_several_threads_at_once() -> None:
    model = models.build("basic")
    dm = DynamicModel(model)
    inputs = [torch.randn(1, 3, size, size) for size in (16, 20, 24)] * 2
    wants = [model(x) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return dm(x)

    with ThreadPoolExecutor(6) as pool:
        for got, want in zip(pool.map(call, inputs), wants, strict=True):
            assert torch.allclose(got, want, atol=1e-5)


def test_a_model_may_go_while_others_run() -> None:
    kept = DynamicModel(wide_model(), wide_input())
    kept.set_num_threads(4)
    x = wide_input()
    want = kept(x)
    stop = threading.Event()
    errors = []

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(kept(x), want):
                    errors.append("another result")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for seed in range(3):
            dm = DynamicModel(wide_model(seed), wide_input())
            dm.set_num_threads(4)
            for _ in range(5):
                dm(wide_input())
            gone = weakref.ref(dm)
            del dm
            gc.collect()
            assert gone() is None
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_weights_may_change_while_others_call() -> None:
    model = models.build("basic")
    dm = DynamicModel(model, models.example("basic"))
    x = models.example("basic")[0]
    stop, errors = threading.Event(), []

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    dm(x)
                except Exception as error:  # whatever it is, the test reports it
                    errors.append(error)
                    return

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        model[0][0].weight.mul_(1.01)
        dm(x)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.allclose(dm(x), model(x), atol=1e-5)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_an_inference() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    dm.set_num_threads(3)
    x = wide_input()
    want = dm(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(dm(x), want) and torch.equal(dm(x), want) else 1)
    end = time.monotonic() + 30
    status = 0
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(dm(x), want)


def _wrap_and_answer(x: torch.Tensor, answers) -> None:
    with torch.no_grad():
        answers.put(DynamicModel(wide_model(), wide_input())(x).tolist())


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_processes_of_torch_multiprocessing(method: str) -> None:
    dm, x = DynamicModel(wide_model(), wide_input()), wide_input(2)
    dm.set_num_threads(2)
    want = dm(x)
    context = torch.multiprocessing.get_context(method)
    answers = context.SimpleQueue()

    def answer() -> None:  # a forked child has the model of its parent
        with torch.no_grad():
            answers.put(dm(x).tolist())

    if method == "spawn":
        with pytest.raises(InputError, match=r"dm\.save"):
            context.Process(target=_wrap_and_answer, args=(dm, answers)).start()
    child = context.Process(target=answer) if method == "fork" else context.Process(target=_wrap_and_answer, args=(x, answers))
    child.start()
    waiting = threading.Timer(120, child.kill)
    waiting.start()
    try:
        assert torch.allclose(torch.tensor(answers.get()), want, atol=1e-5)
    finally:
        child.join()
        waiting.cancel()
    assert child.exitcode == 0


@pytest.mark.parametrize("serving", (False, True), ids=["idle", "serving"])
def test_the_interpreter_ends_cleanly(serving: bool) -> None:
    # The daemon thread calls the extension alone: PyTorch's own calls may abort the process in a daemon thread at that moment.
    script = f"""
import sys, threading
sys.path.insert(0, {str(TESTS)!r})
import numpy, torch, test_executor as t
from dynprune.runtime.model import DynamicModel
torch.set_grad_enabled(False)
dm = DynamicModel(t.wide_model(), t.wide_input())
dm.set_num_threads(4)
for _ in range(5):
    dm(t.wide_input())
if {serving}:
    workspace = dm.engine_for(t.wide_input())._acquire(1)
    workspace.begin(0.0)
    for place, size in ((dm.plan.inputs[0], 3 * 56 * 56), (dm.plan.outputs[0], 10)):
        memory = numpy.zeros(size, numpy.float32)
        workspace.bind(place.buffer, memory.ctypes.data, size, memory)
    run, steps = workspace.run, len(dm.plan.steps)
    threading.Thread(target=lambda: [run(0, steps, 4) for _ in range(100000)], daemon=True).start()
print("done", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "done\n", result.stderr[-2000:]
    assert result.returncode == 0 and not result.stderr, (result.returncode, result.stderr[-2000:])


def test_a_deadline_in_the_past_tightens_every_gate() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    give_costs(dm, ms_per_step=0.1)
    _, guarded = dm.engine_for(wide_input()).run([wide_input()], level=0.1, deadline_ns=1)
    assert guarded.level == 1.0
    assert guarded.guard_actions >= 1
    _, tight = dm.engine_for(wide_input()).run([wide_input()], level=1.0)
    assert np.array_equal(guarded.counts, tight.counts)


def test_a_deadline_far_away_changes_nothing() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    give_costs(dm, ms_per_step=0.1)
    dm.level = 0.25
    want = dm(wide_input())
    got = dm(wide_input(), deadline=time.monotonic() + 3600)
    assert torch.equal(got, want)
    assert dm.stats().guard_actions == 0 and dm.stats().level == 0.25


def test_a_deadline_between_takes_the_lowest_level_that_meets_it() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    give_costs(dm, ms_per_step=1e6)
    steps = len(dm.plan.steps)
    due_ns = time.monotonic_ns() + int(1e12 * steps / 2)
    _, guarded = dm.engine_for(wide_input()).run([wide_input()], deadline_ns=due_ns)
    assert 0.4 < guarded.level < 0.6
    assert guarded.guard_actions >= 1


def test_the_guard_skips_branches_last() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    give_costs(dm, ms_per_step=1e6)
    branches = [i for i, site in enumerate(dm.plan.sites) if site.kind == "branch"]
    channels = [i for i, site in enumerate(dm.plan.sites) if site.kind == "channels"]
    assert branches and channels
    for site in dm.sites:  # a branch is off from level 0.3 on, channels go one by one
        gate = dm.gate(site.name)
        gate.curve.copy_(torch.linspace(-1.0, 1.0, len(gate.curve)))
        gate.bias.copy_(torch.full_like(gate.bias, -0.4) if site.kind == "branch" else torch.linspace(-0.9, 1.5, site.num_groups))
    dm.refresh()
    engine, x = dm.engine_for(wide_input()), wide_input()
    _, plain = engine.run([x], level=0.5)
    assert not plain.counts[branches].any(), "without a deadline the level decides"
    _, guarded = engine.run([x], deadline_ns=time.monotonic_ns() + int(1e12 * len(dm.plan.steps) / 2))
    assert guarded.counts[branches].all() and guarded.guard_actions >= 1, "channels can still meet the deadline"
    assert (guarded.counts[channels] < np.array([dm.plan.sites[i].num_channels for i in channels])[:, None]).any()
    _, late = engine.run([x], deadline_ns=1)
    assert not late.counts[branches].any(), "nothing else can"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_run_that_the_guard_raises_from_level_0_computes_what_its_lists_say(num_threads: int) -> None:
    """The means that gates read do not run before the guard acts; then they do, and all is whole again in the next run."""
    dm, x = DynamicModel(wide_model(), wide_input()), wide_input()
    give_costs(dm, ms_per_step=1e6)
    for site in dm.sites:
        gate = dm.gate(site.name)
        gate.down.copy_(torch.randn_like(gate.down))
        gate.up.copy_(torch.randn_like(gate.up))
        gate.curve.copy_(torch.linspace(-1.0, 1.0, len(gate.curve)))
    dm.refresh()
    engine, whole = dm.engine_for(x), dm.model(x)
    for share in (0.0, 0.5, 0.9):
        due_ns = time.monotonic_ns() + int(1e12 * len(dm.plan.steps) * share)
        workspace = engine._acquire(1)
        (raised,) = engine._execute(workspace, [x], 1, 0.0, due_ns, 1.0, None, num_threads)
        done = Execution._make(workspace.executed())
        assert done.level > 0 and done.guard_actions >= 1 and 0 < done.counts.sum() < sum(site.num_channels for site in dm.plan.sites)
        lists = {site.name: [workspace.active(i, 0)] for i, site in enumerate(dm.plan.sites)}
        engine._compiled.release(workspace)
        (want,), _ = engine.run([x], active=lists, num_threads=num_threads)
        assert torch.equal(raised, want)
        (again,), calm = engine.run([x], deadline_ns=2**62, num_threads=num_threads)
        assert torch.allclose(again, whole, atol=1e-4) and calm.guard_actions == 0


def test_a_deadline_without_costs_is_not_watched() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    dm(wide_input(), deadline=time.monotonic() - 1)
    assert dm.stats().guard_actions == 0 and dm.stats().level == 0


def test_given_lists_are_kept_whatever_the_time() -> None:
    dm = DynamicModel(wide_model(), wide_input())
    give_costs(dm, ms_per_step=1e6)
    dm.set_latency_budget(ms=1e9)
    lists = {site.name: [list(range(site.num_groups))] for site in dm.sites}
    dm.run_with_active(wide_input(), active=lists)
    assert dm.stats().skip_rate == 0 and dm.stats().guard_actions == 0
