"""Runs a plan slowly and plainly, one sample and one step at a time: the oracle beside which lowering and engine are tested.

All memory starts as NaN and the arena is one tensor with the plan's own offsets, so a step that reads what was never written, or
memory that two live values share, shows in the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from dynprune.runtime.plan import Plan, Rows, Step, Value, View

INF = float("inf")

ACTIVATIONS = {
    1: lambda x, low, high: x.clamp(low, high),
    2: lambda x, low, high: F.hardswish(x),
    3: lambda x, low, high: F.hardsigmoid(x),
    4: lambda x, low, high: x.sigmoid(),
    5: lambda x, low, high: F.silu(x),
    6: lambda x, low, high: F.gelu(x),
    7: lambda x, low, high: F.gelu(x, approximate="tanh"),
    8: lambda x, low, high: x.tanh(),
    9: lambda x, low, high: F.leaky_relu(x, low),
    10: lambda x, low, high: F.elu(x, low),
    11: lambda x, low, high: x.exp(),
    12: lambda x, low, high: F.softplus(x),
    13: lambda x, low, high: F.mish(x),
    14: lambda x, low, high: x.sqrt(),
    15: lambda x, low, high: x.rsqrt(),
    16: lambda x, low, high: -x,
    17: lambda x, low, high: x.abs(),
    18: lambda x, low, high: x.square(),
    19: lambda x, low, high: x.reciprocal(),
    20: lambda x, low, high: x.erf(),
    21: lambda x, low, high: x.log(),
}


@dataclass
class Run:
    """What a run of a plan gave: the outputs, and the pooled input, (N, channels), of every gate that was asked, by site name."""

    outputs: list
    pooled: dict[str, torch.Tensor] = field(default_factory=dict)


def run_plan(plan: Plan, inputs: list[torch.Tensor], active: dict[str, list[list[int]]] | None = None) -> Run:
    """Returns the plan's outputs; `active` has a list of active groups per sample for each site named, the others run whole."""
    return _Interpreter(plan, inputs, active or {}).run()


class _Interpreter:
    def __init__(self, plan: Plan, inputs: list[torch.Tensor], active: dict[str, list[list[int]]]):
        self.plan = plan
        self.batch = inputs[0].shape[0]
        self.arena = torch.full((self.batch, plan.arena_size), float("nan"))
        self.own = {i: torch.full((self.batch, b.size), float("nan")) for i, b in enumerate(plan.buffers) if b.kind == "output"}
        self.values = {}
        for view, tensor in zip(plan.inputs, inputs, strict=True):
            self.values[plan.buffers[view.buffer].name] = tensor
            if view.batch_dim == 0:
                self.own[view.buffer] = tensor.reshape(self.batch, -1).clone()
        self.rows_of_site = []
        for site in plan.sites:
            groups = active.get(site.name, [list(range(site.num_channels // site.group_size))] * self.batch)
            self.rows_of_site.append([[g * site.group_size + i for g in sample for i in range(site.group_size)] for sample in groups])
        self.pooled: dict[str, torch.Tensor] = {}

    def run(self) -> Run:
        for step in self.plan.steps:
            self.run_torch(step) if step.op == "torch" else self.run_samples(step)
        outputs = [self.value(o) if isinstance(o, View | Value) else o for o in self.plan.outputs]
        for output in outputs:
            shared = isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() == self.arena.untyped_storage().data_ptr()
            assert not shared, "an output lies in the arena, which the next run writes again"
        return Run(outputs, self.pooled)

    def memory(self, buffer: int) -> torch.Tensor:
        """Returns (N, size) of a buffer."""
        spec = self.plan.buffers[buffer]
        return self.arena[:, spec.offset : spec.offset + spec.size] if spec.kind == "arena" else self.own[buffer]

    def value(self, item: View | Value) -> torch.Tensor:
        if isinstance(item, Value):
            return self.values[item.name]
        memory = self.memory(item.buffer)
        sizes, strides = list(item.sizes), list(item.strides)
        sizes.insert(item.batch_dim, self.batch)
        strides.insert(item.batch_dim, memory.stride(0))
        return memory.as_strided(sizes, strides, memory.storage_offset() + item.offset)

    def run_torch(self, step: Step) -> None:
        if not any(self.runs(step, sample) for sample in range(self.batch)):
            return
        call = step.torch_call
        args, kwargs = pytree.tree_map(lambda item: self.value(item) if isinstance(item, View | Value) else item, (call.args, call.kwargs))
        self.values[call.result] = result = call.target(*args, **kwargs)
        if call.store is not None:
            self.value(call.store).copy_(result)
        for name in call.last_use:
            del self.values[name]

    def runs(self, step: Step, sample: int) -> bool:
        return all(self.rows_of_site[branch][sample] for branch in step.branches)

    def run_samples(self, step: Step) -> None:
        for sample in range(self.batch):
            if self.runs(step, sample):
                self.run_sample(step, sample)
            elif step.op == "conv" and len(step.inputs) == 2:
                self.write(step, sample, activated(step, self.read(step.inputs[1], sample, -1)))
            elif "handover" in step.ints:
                handed = step.inputs[step.ints["handover"][0]]
                self.write(step, sample, activated(step, self.read(handed, sample, -1)))

    def read(self, rows: Rows, sample: int, site: int) -> torch.Tensor:
        """Returns all rows of an operand, (rows, positions); those that do not run are zero."""
        memory = self.memory(rows.buffer)[sample]
        if site < 0 or rows.row_stride == 0:
            return strided(memory, rows, rows.rows)
        channels, repeat = self.plan.sites[site].num_channels, rows.rows // self.plan.sites[site].num_channels
        index = torch.tensor(self.rows_of_site[site][sample], dtype=torch.long)
        full = torch.zeros(channels, repeat, rows.positions)
        full[index] = strided(memory, rows, len(index) * repeat).reshape(len(index), repeat, rows.positions)
        return full.reshape(rows.rows, rows.positions)

    def write(self, step: Step, sample: int, result: torch.Tensor) -> None:
        rows = step.output
        result = result.reshape(rows.rows, rows.positions)
        if step.out_site >= 0:
            result = result[torch.tensor(self.rows_of_site[step.out_site][sample], dtype=torch.long)]
        strided(self.memory(rows.buffer)[sample], rows, len(result)).copy_(result)

    def run_sample(self, step: Step, sample: int) -> None:
        if step.op in ("copy", "fill"):
            copy(step, None if not step.inputs else self.memory(step.inputs[0].buffer)[sample], self.memory(step.output.buffer)[sample])
            return
        if step.op in BY_STRIDES:
            output = self.memory(step.output.buffer)[sample]
            BY_STRIDES[step.op](step, [self.memory(rows.buffer)[sample] for rows in step.inputs], output)
            return
        if step.op == "attention" and step.in_site >= 0:
            self.run_heads(step, sample)
            return
        residual = step.inputs[1] if step.op == "conv" and len(step.inputs) == 2 else None  # never gated
        operands = [self.read(rows, sample, -1 if rows is residual else step.in_site) for rows in step.inputs]
        if step.op == "gate":
            name = self.plan.sites[step.ints["site"][0]].name
            self.pooled.setdefault(name, torch.full((self.batch, len(operands[0])), float("nan")))[sample] = operands[0][:, 0]
            return
        self.write(step, sample, activated(step, OPS[step.op](step, operands)))

    def run_heads(self, step: Step, sample: int) -> None:
        """Attention of which a site owns the heads: those that run stand first in every group, in queries, output and maybe keys."""
        outer, heads = step.ints.get("outer", [1])[0], step.ints["heads"][0]
        active = torch.tensor(self.rows_of_site[step.in_site][sample], dtype=torch.long)
        size = self.plan.sites[step.in_site].group_size
        running = active[::size] // size
        compact = (True, *[bool(step.ints["gated_keys"][0])] * 2, *[False] * (len(step.inputs) - 3))
        operands = []
        for rows, first in zip(step.inputs, compact, strict=True):
            x = strided(self.memory(rows.buffer)[sample], rows, rows.rows).clone()
            if first:
                x = x.reshape(outer, heads, size, -1)
                full = torch.zeros_like(x)
                full[:, running] = x[:, : len(running)]
                x = full.reshape(rows.rows, -1)
            operands.append(x)
        result = attention(step, operands).reshape(outer, heads, size, -1)[:, running]
        target = strided(self.memory(step.output.buffer)[sample], step.output, step.output.rows)
        for group in range(outer):
            for slot in range(len(running)):
                target[(group * heads + slot) * size : (group * heads + slot + 1) * size] = result[group, slot]


def strided(memory: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
    return memory.as_strided((count, rows.positions), (rows.row_stride, 1), memory.storage_offset() + rows.offset)


def activated(step: Step, x: torch.Tensor) -> torch.Tensor:
    kind = step.ints.get("activation", [0])[0]
    return ACTIVATIONS[kind](x, *step.floats["activation"]) if kind else x


def constant(step: Step, name: str) -> torch.Tensor:
    return torch.from_numpy(step.constants[name])


def copy(step: Step, source: torch.Tensor | None, target: torch.Tensor) -> None:
    ints = step.ints
    out = target.as_strided(ints["sizes"], ints["out_strides"], target.storage_offset() + step.output.offset)
    if step.op == "fill":
        out.fill_(step.floats["value"][0])
    elif source is None:
        out.copy_(constant(step, "source").reshape(-1).as_strided(ints["sizes"], ints["in_strides"]))
    else:
        out.copy_(source.as_strided(ints["sizes"], ints["in_strides"], source.storage_offset() + step.inputs[0].offset))


def conv(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    ints, weight = step.ints, constant(step, "weight")
    groups = ints.get("groups", [len(weight)])[0]
    top, left, bottom, right = ints["padding"]
    x = F.pad(operands[0].reshape(ints["in_size"]), (left, right, top, bottom))
    weight = weight.reshape(ints["out_size"][0], ints["in_size"][0] // groups, *ints["kernel"])
    y = F.conv2d(x[None], weight, constant(step, "bias"), ints["stride"], 0, ints["dilation"], groups)
    assert list(y.shape[1:]) == ints["out_size"]
    y = y.reshape(len(weight), -1)
    return y + operands[1] if len(operands) > 1 else y


def linear(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    return F.linear(operands[0].reshape(step.ints["in_features"]), constant(step, "weight"), constant(step, "bias"))


def pool(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    ints = step.ints
    x, kernel, stride = operands[0].reshape(ints["in_size"]), ints["kernel"], ints["stride"]
    pad, wanted = ints["padding"][:2], ints["out_size"]
    for ceil in (False, True):
        if ints["mode"] == [0]:
            y = F.max_pool2d(x, kernel, stride, pad, ints["dilation"], ceil)
        else:
            y = F.avg_pool2d(x, kernel, stride, pad, ceil, bool(ints["count_include_pad"][0]), ints["divisor"][0] or None)
        if list(y.shape) == wanted:
            return y
    raise AssertionError(f"{step.name}: no pooling gives {wanted}")


def adaptive_pool(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    function = F.adaptive_max_pool2d if step.ints["mode"] == [0] else F.adaptive_avg_pool2d
    return function(operands[0].reshape(step.ints["in_size"]), step.ints["out_size"][1:])


def binary(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    a, b = operands[0], operands[1] if len(operands) > 1 else constant(step, "operand")
    if step.ints["reverse"][0]:
        a, b = b, a
    functions = (torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum)
    return functions[step.ints["kind"][0]](a, b)


def layer_norm(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    x = operands[0].t() if step.ints["axis"] == [0] else operands[0]
    weight, bias = (constant(step, name) if name in step.constants else None for name in ("weight", "bias"))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, step.floats["eps"][0])
    return (y.t() if step.ints["axis"] == [0] else y).contiguous()


def rms_norm(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    x = operands[0].t() if step.ints["axis"] == [0] else operands[0]
    weight = constant(step, "weight") if "weight" in step.constants else None
    y = F.rms_norm(x, x.shape[-1:], weight, step.floats["eps"][0])
    return (y.t() if step.ints["axis"] == [0] else y).contiguous()


def attention(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    outer, heads = step.ints.get("outer", [1])[0], step.ints["heads"][0]
    key_heads = step.ints.get("key_heads", [heads])[0]
    counts = (outer * heads, outer * key_heads, outer * key_heads)
    query, key, value = (x.reshape(n, -1, x.shape[1]).transpose(1, 2) for n, x in zip(counts, operands[:3], strict=True))
    key, value = (x.repeat_interleave(heads // key_heads, 0) for x in (key, value))
    mask = operands[3] if len(operands) > 3 else constant(step, "mask") if "mask" in step.constants else None
    if mask is not None:
        mask = mask.reshape(-1, key.shape[1], query.shape[1]).transpose(1, 2)
        mask = mask.repeat(len(query) // len(mask), 1, 1)
    causal, scale = bool(step.ints["causal"][0]), step.floats["scale"][0]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale).transpose(1, 2).contiguous()


def matmul(step: Step, memories: list[torch.Tensor], out: torch.Tensor) -> None:
    ints = step.ints
    shapes = ((ints["rows"], ints["inner"]), (ints["inner"], ints["positions"]), (ints["rows"], ints["positions"]))
    names, operands = ("left_strides", "right_strides", "out_strides"), (*step.inputs, step.output)
    left, right, target = (
        memory.as_strided([*ints["batch"], *rows, *columns], ints[name], memory.storage_offset() + operand.offset)
        for memory, operand, name, (rows, columns) in zip((*memories, out), operands, names, shapes, strict=True)
    )
    target.copy_(left @ right * step.floats.get("scale", [1.0])[0])


def embedding(step: Step, memories: list[torch.Tensor], out: torch.Tensor) -> None:
    first = step.inputs[0].offset // 2
    numbers = memories[0][first : first + step.output.positions]
    assert step.inputs[0].positions == 2 * len(numbers) and numbers.dtype == torch.int64
    strided(out, step.output, step.output.rows).copy_(constant(step, "table")[numbers].t())


def resample(step: Step, operands: list[torch.Tensor]) -> torch.Tensor:
    x = operands[0].reshape(step.ints["in_size"])
    for axis, name in ((1, "y"), (2, "x")):
        weight = constant(step, f"{name}_weight")
        index = torch.tensor(step.ints[f"{name}_index"]).reshape(weight.shape)
        matrix = torch.zeros(len(weight), x.shape[axis]).scatter_add_(1, index, weight)
        x = torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)
    return x.contiguous()


BY_STRIDES = {"matmul": matmul, "embedding": embedding}
OPS = {
    "attention": attention,
    "conv": conv,
    "depthwise": conv,
    "linear": linear,
    "pool": pool,
    "resample": resample,
    "adaptive_pool": adaptive_pool,
    "mean": lambda step, operands: operands[0].mean(1, keepdim=True),
    "unary": lambda step, operands: operands[0].clone(),
    "affine": lambda step, operands: operands[0] * constant(step, "scale")[:, None] + constant(step, "shift")[:, None],
    "binary": binary,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "softmax": lambda step, operands: operands[0].softmax(step.ints["axis"][0]),
}
