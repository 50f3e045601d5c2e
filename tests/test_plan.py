"""The plan as data: what it hands to the engine and how it prints."""

import numpy as np
import pytest

from dynprune.runtime.plan import Buffer, Plan, PlanSite, Rows, Step, TorchCall, View


@pytest.fixture
def plan() -> Plan:
    conv = Step(
        op="conv",
        name="block.conv",
        inputs=(Rows(0, 0, 3, 16, 16),),
        output=Rows(1, 8, 4, 16, 16),
        ints={"groups": [1]},
        constants={"weight": np.ones((4, 27), np.float32)},
        out_site=1,
        branches=(0,),
        macs=75,
        nodes=("conv2d", "relu"),
    )
    fft = Step("torch", "block", macs=25, nodes=("fft_fft",), torch_call=TorchCall(abs, (View(1, 0, (4, 16), (16, 1)),), {}, "fft_fft"))
    return Plan(
        steps=(Step("gate", "block", (Rows(0, 0, 3, 16, 16),), None, {"site": [0]}), conv, fft),
        buffers=(Buffer("x", "input", 48), Buffer("conv2d", "arena", 72, 32)),
        arena_size=112,
        sites=(PlanSite("block", "branch", 1, 1), PlanSite("block.conv", "channels", 4, 2)),
        inputs=(View(0, 0, (3, 4, 4), (16, 4, 1)),),
        outputs=(),
        ungated=(("block.other", "PyTorch reads it"),),
    )


def test_spec_is_plain_data_of_every_step(plan):
    spec = plan.to_spec()
    assert spec["arena_size"] == 112
    assert spec["buffers"] == [("input", 48, 0), ("arena", 72, 32)]
    assert spec["sites"] == [("branch", 1, 1), ("channels", 4, 2)]
    assert [step["op"] for step in spec["steps"]] == ["gate", "conv", "torch"]
    conv = spec["steps"][1]
    assert (conv["inputs"], conv["output"]) == ([(0, 0, 3, 16, 16)], (1, 8, 4, 16, 16))
    assert (conv["in_site"], conv["out_site"], conv["branches"], conv["macs"]) == (-1, 1, [0], 75)
    assert conv["constants"]["weight"] is plan.steps[1].constants["weight"]
    assert (spec["steps"][2]["inputs"], spec["steps"][2]["output"]) == ([], None)


def test_table_says_what_runs_where(plan):
    header, gate, conv, fft, refused = str(plan).splitlines()
    assert header.split() == ["step", "op", "name", "input", "output", "site", "share", "runs", "on"]
    assert "decides block" in gate
    for word in ("conv", "block.conv", "3x16", "4x16", "writes block.conv", "if block", "75.0 %", "engine"):
        assert word in conv
    assert "fft_fft" in fft and "25.0 %" in fft and fft.endswith("PyTorch")
    assert refused == "not gated: block.other: PyTorch reads it"


def test_macs_are_those_of_all_steps(plan):
    assert plan.macs == 100
