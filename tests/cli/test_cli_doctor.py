"""`dynprune doctor`: its advice on made-up machines, and one run on this one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dynprune.cli import main
from dynprune.cli.doctor import Facts, advice, clock_governors
from dynprune.control.host import cpu_name

IDLE = Facts(
    cores=4,
    quota=4.0,
    threads=4,
    isa="avx512",
    available_isas=("scalar", "avx2", "avx512"),
    load_average=0.2,
    cpu_fraction=0.02,
    throttled_fraction=0.0,
    governors=("performance",),
    swap_fraction=0.0,
    memory_available_bytes=8 << 30,
)
TROUBLES = {
    "ISA capped": ({"isa": "avx2", "max_isa": "avx2"}, "DYNPRUNE_MAX_ISA=avx2 holds the kernels at avx2, avx512 would run"),
    "no vectors": ({"isa": "scalar", "available_isas": ("scalar",)}, "no vector instructions"),
    "quota": ({"quota": 1.5, "threads": 1}, "may use 1.5 of 4 cores"),
    "threads": ({"threads": 8}, "8 threads share 4 cores; call torch.set_num_threads(4)"),
    "throttled": ({"throttled_fraction": 0.3}, "throttled 30% of the time"),
    "load": ({"load_average": 9.0}, "The load average is 9.0 on 4 cores"),
    "busy": ({"cpu_fraction": 0.6}, "The CPU is 60% busy"),
    "governor": ({"governors": ("powersave",)}, "'powersave'"),
    "swap": ({"swap_fraction": 0.4}, "40% of the swap space"),
    "memory": ({"memory_available_bytes": 100 << 20}, "Only 100 MiB"),
    "battery": ({"on_battery": True}, "battery"),
}


def test_an_idle_machine_needs_no_advice():
    assert advice(IDLE) == []


def test_what_the_machine_does_not_tell_is_no_trouble():
    unknown = {"load_average", "cpu_fraction", "throttled_fraction", "swap_fraction", "memory_available_bytes", "on_battery"}
    assert advice(replace(IDLE, governors=(), **dict.fromkeys(unknown))) == []


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_has_its_one_sentence(trouble):
    changes, expected = TROUBLES[trouble]
    found = advice(replace(IDLE, **changes))
    assert len(found) == 1
    assert expected in found[0]


def test_governors_are_read_once_each(tmp_path):
    for core, governor in enumerate(["powersave", "performance", "powersave"]):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
    assert clock_governors(tmp_path) == ("performance", "powersave")
    assert clock_governors(tmp_path / "absent") == ()


def test_cpu_name(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Made-up CPU 3000\nprocessor\t: 1\nmodel name\t: Made-up CPU 3000\n")
    assert cpu_name(path) == "Made-up CPU 3000"
    assert cpu_name(tmp_path / "absent") != ""


def test_doctor_here(capsys, monkeypatch):
    monkeypatch.delenv("DYNPRUNE_MAX_ISA", raising=False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^kernels +(scalar|avx2|avx512|avx512_bf16), of scalar", printed, flags=re.MULTILINE)
    assert "monitor source" in printed
    assert "CPU load" in printed


def test_unknown_isa_is_refused_with_the_choices(capsys, monkeypatch):
    monkeypatch.setenv("DYNPRUNE_MAX_ISA", "avx51")
    assert main(["doctor"]) == 2
    printed = capsys.readouterr().err
    assert "avx51" in printed
    assert "scalar" in printed
