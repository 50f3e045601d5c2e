"""The monitor reads what a made-up root directory says, loses sources gracefully, and its thread ends with its owner."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest

from dynprune.control.cgroup import cgroup_directories, cgroup_quota
from dynprune.control.monitor import HostCpu, ResourceMonitor
from dynprune.control.sources import CgroupCpu, CgroupMemory, PressureStall, RunQueue, Steal, UsableCores, cpu_quota, pressures, thread_cap
from dynprune.errors import InputError

FILE_SOURCES = {
    "run-queue wait",
    "steal time",
    "container CPU quota",
    "container memory limit",
    "cpu pressure stall",
    "memory pressure stall",
    "io pressure stall",
}
MIB = 2**20


class FakeRoot:
    """A directory that looks like the root of a machine with control groups of version 1, 2 or both ("hybrid")."""

    def __init__(self, path: Path, layout: str) -> None:
        self.path = path
        self.layout = layout
        self.own = "/kube/pod"
        v1 = "6:memory:/kube/pod\n4:cpu,cpuacct:/kube/pod\n"
        v2 = "0::/kube/pod\n"
        mounts_v1 = "".join(
            f"{30 + i} 24 0:{30 + i} / /sys/fs/cgroup/{names} rw,nosuid shared:{i} - cgroup cgroup rw,{names}\n"
            for i, names in enumerate(("memory", "cpu,cpuacct"))
        )
        mount_v2 = "40 24 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
        self.write("proc/self/cgroup", {"v1": v1, "v2": v2, "hybrid": v1 + v2}[layout])
        other = "24 1 8:1 / / rw,relatime - ext4 /dev/root rw\n"
        self.write("proc/self/mountinfo", other + {"v1": mounts_v1, "v2": mount_v2, "hybrid": mounts_v1 + mount_v2}[layout])
        self.cpu(quota_cores=None, throttled_us=0, used_us=0)
        self.memory(limit=None, used=100 * MIB, inactive=0)
        self.stall("cpu", 0)
        self.stall("memory", 0)
        self.stall("io", 0)
        self.schedstat({1: (0, 0)})
        self.stat([0] * 10)

    def write(self, path: str, text: str) -> None:
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        (self.path / path).write_text(text)

    def cpu(self, *, quota_cores: float | None, throttled_us: int, used_us: int, group: str = "/kube/pod") -> None:
        if self.layout == "v2":
            quota = "max" if quota_cores is None else str(round(quota_cores * 1e5))
            self.write(f"sys/fs/cgroup/unified{group}/cpu.max", f"{quota} 100000\n")
            self.write(f"sys/fs/cgroup/unified{group}/cpu.stat", f"usage_usec {used_us}\nnr_periods 9\nthrottled_usec {throttled_us}\n")
            return
        directory = f"sys/fs/cgroup/cpu,cpuacct{group}"
        self.write(f"{directory}/cpu.cfs_quota_us", f"{-1 if quota_cores is None else round(quota_cores * 1e5)}\n")
        self.write(f"{directory}/cpu.cfs_period_us", "100000\n")
        self.write(f"{directory}/cpu.stat", f"nr_periods 9\nnr_throttled 3\nthrottled_time {throttled_us * 1000}\n")
        self.write(f"{directory}/cpuacct.usage", f"{used_us * 1000}\n")

    def memory(self, *, limit: int | None, used: int, inactive: int, high: int | None = None, group: str = "/kube/pod") -> None:
        if self.layout == "v2":
            directory = f"sys/fs/cgroup/unified{group}"
            self.write(f"{directory}/memory.max", f"{limit or 'max'}\n")
            self.write(f"{directory}/memory.high", f"{high or 'max'}\n")
            self.write(f"{directory}/memory.current", f"{used}\n")
            self.write(f"{directory}/memory.stat", f"anon 5\ninactive_file {inactive}\n")
            return
        directory = f"sys/fs/cgroup/memory{group}"
        self.write(f"{directory}/memory.limit_in_bytes", f"{limit or 9223372036854771712}\n")
        self.write(f"{directory}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{directory}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}\n")

    def stall(self, kind: str, total_us: int, path: str = "proc/pressure/{kind}") -> None:
        averages = "avg10=0.00 avg60=0.00 avg300=0.00"
        self.write(path.format(kind=kind), f"some {averages} total={total_us}\nfull {averages} total=0\n")

    def schedstat(self, threads: dict[int, tuple[int, int]]) -> None:
        shutil.rmtree(self.path / "proc/self/task", ignore_errors=True)
        for thread, (run_ns, wait_ns) in threads.items():
            self.write(f"proc/self/task/{thread}/schedstat", f"{run_ns} {wait_ns} 12\n")

    def stat(self, times: list[int]) -> None:
        self.write("proc/stat", f"cpu  {' '.join(map(str, times))}\ncpu0 {' '.join(map(str, times))}\nintr 5\n")


@pytest.fixture(params=["v1", "v2", "hybrid"])
def root(request, tmp_path):
    return FakeRoot(tmp_path, request.param)


@pytest.fixture
def root_v2(tmp_path):
    return FakeRoot(tmp_path, "v2")


def test_own_group_is_found_with_those_above_it(root):
    version, directories = cgroup_directories(str(root.path), "cpu")
    top = f"{root.path}/sys/fs/cgroup/" + ("unified" if root.layout == "v2" else "cpu,cpuacct")
    assert version == (2 if root.layout == "v2" else 1)
    assert directories == [f"{top}/kube/pod", f"{top}/kube", top]


@pytest.mark.parametrize(
    ("own", "mount_root", "expected"),
    [
        pytest.param("/docker/abc", "/docker/abc", "", id="mounted-from-own"),
        pytest.param("/docker/abc/job", "/docker/abc", "/job", id="below-the-mount"),
        pytest.param("/not/visible", "/", "", id="path-not-here"),
        pytest.param("/../../other", "/", "", id="outside-the-namespace"),
    ],
)
def test_group_seen_from_inside_a_container(tmp_path, own, mount_root, expected):
    root = FakeRoot(tmp_path, "v2")
    root.write("proc/self/cgroup", f"0::{own}\n")
    root.write("proc/self/mountinfo", f"40 24 0:40 {mount_root} /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n")
    root.write("sys/fs/cgroup/unified/job/cpu.max", "max 100000\n")
    root.write("sys/fs/other/cpu.max", "max 100000\n")
    assert cgroup_directories(str(tmp_path), "cpu")[1][0] == f"{tmp_path}/sys/fs/cgroup/unified{expected}"


def test_no_control_groups(tmp_path):
    assert cgroup_directories(str(tmp_path), "cpu") == (0, [])
    assert cgroup_quota(str(tmp_path)) is None
    assert cpu_quota(str(tmp_path)) >= 1


def test_quota_is_the_tightest_on_the_way_up(root):
    assert cgroup_quota(str(root.path)) is None
    root.cpu(quota_cores=0.75, throttled_us=0, used_us=0)
    assert cgroup_quota(str(root.path)) == 0.75
    root.cpu(quota_cores=0.5, throttled_us=0, used_us=0, group="/kube")
    assert cgroup_quota(str(root.path)) == 0.5
    assert cpu_quota(str(root.path)) == 0.5


@pytest.mark.parametrize("text", ["", "garbage here\n", "100 0\n", "1 2 3\n"], ids=repr)
def test_unreadable_quota_counts_as_none(root_v2, text):
    root_v2.write("sys/fs/cgroup/unified/kube/pod/cpu.max", text)
    assert cgroup_quota(str(root_v2.path)) is None


def test_throttled_share_of_the_runnable_time(root):
    root.cpu(quota_cores=1, throttled_us=5_000_000, used_us=7_000_000)
    source = CgroupCpu(str(root.path))
    assert source.detail.endswith("1 cores")
    assert source.read(0.0) == {}
    root.cpu(quota_cores=1, throttled_us=5_300_000, used_us=7_100_000)
    assert source.read(1.0) == pytest.approx({"throttled_fraction": 0.75})
    assert source.read(2.0) == {"throttled_fraction": 0.0}


def test_throttling_is_read_where_the_tightest_quota_stands(root):
    root.cpu(quota_cores=1, throttled_us=0, used_us=0, group="/kube")
    source = CgroupCpu(str(root.path))
    source.read(0.0)
    root.cpu(quota_cores=1, throttled_us=100, used_us=100, group="/kube")
    assert source.read(1.0) == {"throttled_fraction": 0.5}


def test_memory_against_the_limit(root):
    root.memory(limit=400 * MIB, used=350 * MIB, inactive=50 * MIB)
    assert CgroupMemory(str(root.path)).read(0.0) == {"container_memory_fraction": 0.75, "memory_available_bytes": 100 * MIB}


def test_hits_of_the_memory_limit_are_counted(root):
    own = "sys/fs/cgroup/unified/kube/pod" if root.layout == "v2" else "sys/fs/cgroup/memory/kube/pod"

    def events(hits: int, kills: int) -> None:
        if root.layout == "v2":
            root.write(f"{own}/memory.events", f"low 0\nhigh {hits}\nmax 2\noom 0\noom_kill {kills}\n")
        else:
            root.write(f"{own}/memory.failcnt", f"{hits}\n")
            root.write(f"{own}/memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")

    root.memory(limit=400 * MIB, used=320 * MIB, inactive=0)
    events(5, 1)
    source = CgroupMemory(str(root.path))
    assert source.read(0.0).keys() == {"container_memory_fraction", "memory_available_bytes"}
    events(9, 1)
    seen = source.read(1.0)
    assert (seen["memory_limit_hits"], seen["memory_oom_kills"]) == (4, 0)
    assert pressures(seen, 1.0)[1] == 1.0, "reclaim at the limit while most of it is held"
    events(9, 1)
    quiet = source.read(2.0)
    assert pressures(quiet, 1.0)[1] == pytest.approx(0.8)
    root.memory(limit=400 * MIB, used=399 * MIB, inactive=300 * MIB)
    events(99, 1)
    assert pressures(source.read(3.0), 1.0)[1] < 0.5, "the page cache alone hit the limit"
    events(99, 2)
    assert pressures(source.read(4.0), 1.0)[1] == 1.0, "a process was killed"


def test_usable_cores_follow_the_quota(root):
    source = UsableCores(str(root.path))
    allowed = source.read(0.0)["quota_cores"]
    assert allowed == cpu_quota(str(root.path))
    root.cpu(quota_cores=0.5, throttled_us=0, used_us=0, group="/kube")
    assert source.read(1.0) == {"quota_cores": 0.5}


@pytest.mark.parametrize(("cores", "threads"), [(0.5, 1), (1.0, 1), (1.5, 1), (2.0, 2), (3.9, 3)])
def test_threads_are_the_whole_cores_of_the_quota(cores, threads):
    assert thread_cap(cores) == threads


def test_memory_without_limit_says_nothing(root):
    source = CgroupMemory(str(root.path))
    assert source.read(0.0) == {}
    assert source.detail.endswith("no limit")


def test_memory_high_limits_before_max(root_v2):
    root_v2.memory(limit=400 * MIB, used=150 * MIB, inactive=0, high=200 * MIB)
    assert CgroupMemory(str(root_v2.path)).read(0.0)["container_memory_fraction"] == 0.75


@pytest.mark.parametrize("kind", ["cpu", "memory", "io"])
def test_stall_is_the_growth_of_the_total(root, kind):
    root.stall(kind, 5_000_000)
    source = PressureStall(str(root.path), kind)
    assert source.read(10.0) == {}
    root.stall(kind, 5_050_000)
    assert source.read(10.2) == pytest.approx({f"{kind}_stall_fraction": 0.25})
    root.stall(kind, 9_000_000)
    assert source.read(10.4) == {f"{kind}_stall_fraction": 1.0}


def test_own_stall_goes_before_the_hosts(root_v2):
    root_v2.stall("cpu", 0, path="sys/fs/cgroup/unified/kube/pod/{kind}.pressure")
    source = PressureStall(str(root_v2.path), "cpu")
    source.read(0.0)
    root_v2.stall("cpu", 500_000, path="sys/fs/cgroup/unified/kube/pod/{kind}.pressure")
    assert source.read(1.0) == {"cpu_stall_fraction": 0.5}


def test_a_counter_that_starts_over_is_skipped_once(root):
    root.stall("cpu", 5_000_000)
    source = PressureStall(str(root.path), "cpu")
    source.read(1.0)
    root.stall("cpu", 100_000)
    assert source.read(2.0) == {}
    root.stall("cpu", 300_000)
    assert source.read(3.0) == pytest.approx({"cpu_stall_fraction": 0.2})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({1: (0, 0)}, {1: (300_000_000, 100_000_000)}, 0.25, id="one"),
        pytest.param({1: (0, 0), 2: (5, 5)}, {1: (10**8, 0), 2: (5, 10**8 + 5)}, 0.5, id="two"),
        pytest.param({1: (0, 0), 2: (0, 10**12)}, {1: (3 * 10**8, 10**8)}, 0.25, id="one-ended"),
        pytest.param({1: (0, 0)}, {1: (0, 0), 2: (10**8, 3 * 10**8)}, 0.75, id="one-began"),
        pytest.param({1: (0, 0)}, {1: (1_000, 9_000)}, 0.0, id="asleep"),
    ],
)
def test_run_queue_wait_share(root_v2, before, after, expected):
    root_v2.schedstat(before)
    source = RunQueue(str(root_v2.path))
    assert source.read(1.0) == {}
    root_v2.schedstat(after)
    assert source.read(2.0) == pytest.approx({"runqueue_wait_fraction": expected})


def test_steal_share(root_v2):
    source = Steal(str(root_v2.path))
    source.read(0.0)
    root_v2.stat([10, 0, 10, 60, 0, 0, 0, 20, 5, 0])
    assert source.read(1.0) == {"steal_fraction": 0.2}


def test_host_load_is_the_growth_of_the_cores_times(monkeypatch):
    times = type(psutil.cpu_times())
    idle = dict.fromkeys(times._fields, 0.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [times(**idle), times(**idle)])
    source = HostCpu()
    assert source.read(0.0) == {}
    now = [times(**idle | {"user": 3.0, "guest": 3.0, "idle": 1.0}), times(**idle | {"idle": 3.0, "iowait": 1.0})]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: now)
    figures = source.read(4.0)
    assert figures["per_cpu_fraction"] == (0.75, 0.0)
    assert figures["cpu_fraction"] == 0.375
    assert 0 <= figures["own_cpu_fraction"] < 0.375


@pytest.mark.parametrize(
    ("figures", "wanted_share", "cpu", "memory"),
    [
        pytest.param({}, 1.0, None, None, id="nothing"),
        pytest.param({"runqueue_wait_fraction": 0.5, "steal_fraction": 0.1}, 1.0, 0.5, None, id="largest"),
        pytest.param({"cpu_stall_fraction": 1.0}, 1.0, 0.5, None, id="stall"),
        pytest.param({"cpu_fraction": 1.0, "own_cpu_fraction": 0.0}, 1.0, 0.5, None, id="others-everywhere"),
        pytest.param({"cpu_fraction": 1.0, "own_cpu_fraction": 1.0}, 1.0, 0.0, None, id="only-we"),
        pytest.param({"cpu_fraction": 0.5, "own_cpu_fraction": 0.0}, 0.25, 0.0, None, id="enough-free-cores"),
        pytest.param({"container_memory_fraction": 0.9, "host_memory_fraction": 0.2}, 1.0, None, 0.9, id="memory"),
    ],
)
def test_pressures(figures, wanted_share, cpu, memory):
    assert pressures(figures, wanted_share) == (pytest.approx(cpu), pytest.approx(memory))


def test_monitor_samples_this_machine():
    monitor = ResourceMonitor(interval_s=0.01)
    first = monitor.sample()
    assert first.cpu_fraction is None
    assert first.cpu_pressure is None
    assert first.rss_bytes > MIB
    assert first.memory_available_bytes > 0
    second = first
    until = time.monotonic() + 10
    while second.cpu_fraction is None and time.monotonic() < until:  # the system may count in ticks, and late
        time.sleep(0.05)
        second = monitor.sample()
    assert second.timestamp_s > first.timestamp_s
    assert 0 <= second.cpu_fraction <= 1
    assert 0 <= second.cpu_pressure <= 1
    assert 0 <= second.memory_pressure <= 1


def test_monitor_reads_its_root(root):
    root.memory(limit=400 * MIB, used=390 * MIB, inactive=0)
    monitor = ResourceMonitor(interval_s=0.01, root=str(root.path))
    assert monitor.sample().memory_pressure == 0.975
    assert monitor.sample().memory_available_bytes == 10 * MIB
    root.schedstat({1: (10**12, 10**12)})
    time.sleep(0.02)
    assert monitor.sample().runqueue_wait_fraction == 0.5
    assert {state.name for state in monitor.sources() if state.available} >= FILE_SOURCES


def test_monitor_works_where_there_is_nothing(tmp_path):
    states = {state.name: state for state in ResourceMonitor(root=str(tmp_path)).sources()}
    assert not any(states[name].available for name in FILE_SOURCES)
    assert all(states[name].detail for name in FILE_SOURCES)
    assert states["CPU load"].available


def test_without_the_thread_a_sample_lasts_for_the_interval():
    monitor = ResourceMonitor(interval_s=60)
    assert monitor.sample() is monitor.sample()


def _vanish(path: Path) -> None:
    path.unlink()


def _garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00 what?\n")


def _empty(path: Path) -> None:
    path.write_text("")


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [_vanish, _garble, _empty, _replace_by_directory], ids=lambda harm: harm.__name__.strip("_"))
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("run-queue wait", "proc/self/task/1/schedstat"),
        ("steal time", "proc/stat"),
        ("cpu pressure stall", "proc/pressure/cpu"),
        ("container CPU quota", "sys/fs/cgroup/unified/kube/pod/cpu.stat"),
    ],
)
def test_a_source_that_breaks_is_dropped_with_one_warning(root_v2, name, path, harm):
    monitor = ResourceMonitor(interval_s=0.001, root=str(root_v2.path))
    monitor.sample()
    harm(root_v2.path / path)
    time.sleep(0.002)
    with pytest.warns(RuntimeWarning, match=name) as caught:
        monitor.sample()
    assert len(caught) == 1
    broken_s = monitor.sample().timestamp_s
    time.sleep(0.002)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.sample().timestamp_s > broken_s
    states = {state.name: state for state in monitor.sources()}
    assert not states[name].available
    assert states[name].detail.startswith("dropped")
    assert sum(state.available for state in states.values() if state.name in FILE_SOURCES) == len(FILE_SOURCES) - 1


def test_psutil_that_breaks_is_dropped(root_v2, monkeypatch):
    monitor = ResourceMonitor(interval_s=0.001, root=str(root_v2.path))
    monitor.sample()

    def broken(percpu):
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "cpu_times", broken)
    time.sleep(0.002)
    with pytest.warns(RuntimeWarning, match="CPU load"):
        assert monitor.sample().cpu_fraction is None


def monitor_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dynprune-monitor"]


def wait_until(condition, seconds: float = 5.0) -> bool:
    end_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.005)
    return condition()


def test_thread_samples_and_stops():
    with ResourceMonitor(interval_s=0.01) as monitor:
        assert len(monitor_threads()) == 1
        assert monitor.start() is monitor
        assert len(monitor_threads()) == 1
        first = monitor.sample()
        assert wait_until(lambda: monitor.sample() is not first)
    assert not monitor_threads()
    monitor.stop()
    time.sleep(0.02)
    assert monitor.sample().timestamp_s > first.timestamp_s
    with monitor:
        assert len(monitor_threads()) == 1
    assert not monitor_threads()


class Listener:
    def __init__(self) -> None:
        self.seen = []

    def hear(self, sample) -> None:
        self.seen.append(sample)

    def fail(self, sample) -> None:
        raise RuntimeError("deaf")


def test_listeners_get_every_sample_while_they_live():
    listener, monitor = Listener(), ResourceMonitor(interval_s=60)
    monitor.subscribe(listener.hear)
    monitor.subscribe(listener.hear)
    sample = monitor.sample()
    assert listener.seen == [sample], "known already: not called twice"
    monitor._refresh()
    assert len(listener.seen) == 2 and listener.seen[1] is monitor.sample()
    monitor.unsubscribe(listener.hear)
    monitor.unsubscribe(listener.hear)
    monitor._refresh()
    assert len(listener.seen) == 2
    monitor.subscribe(listener.hear)
    del listener
    gc.collect()
    monitor._refresh()


def test_a_listener_that_fails_is_dropped_with_one_warning():
    failing, hearing, monitor = Listener(), Listener(), ResourceMonitor(interval_s=60)
    monitor.subscribe(failing.fail)
    monitor.subscribe(hearing.hear)
    with pytest.warns(RuntimeWarning, match="RuntimeError: deaf"):
        monitor._refresh()
    monitor._refresh()
    assert len(hearing.seen) == 2


def test_stop_without_start():
    ResourceMonitor().stop()


def test_thread_ends_with_the_last_reference():
    monitor = ResourceMonitor(interval_s=60).start()
    assert monitor_threads()
    del monitor
    gc.collect()
    assert wait_until(lambda: not monitor_threads())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_samples_itself():
    with ResourceMonitor(interval_s=0.01) as monitor:
        monitor.sample()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                before = len(monitor_threads())
                first = monitor.sample()
                restarted = len(monitor_threads())
                fresh = wait_until(lambda: monitor.sample() is not first)
                status = 0 if (before, restarted, fresh) == (0, 1, True) and first.cpu_fraction is None else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(monitor_threads()) == 1


def test_interpreter_ends_with_a_running_monitor():
    code = "from dynprune.control.monitor import ResourceMonitor; monitor = ResourceMonitor(60).start()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_sampling_is_cheap_enough():
    monitor = ResourceMonitor(interval_s=0.2)
    with monitor:
        begin_s = time.thread_time()
        for _ in range(20):
            monitor._refresh()
        assert (time.thread_time() - begin_s) / 20 < 0.1 * monitor.interval_s


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), "1", None], ids=repr)
def test_bad_interval_is_refused(interval_s):
    with pytest.raises(InputError, match="interval_s"):
        ResourceMonitor(interval_s)
