"""Says in a table what runs where, what each step costs, and what cannot be gated and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynprune.gates.heads import Gate
from dynprune.graph.sites import Sites, Ungated
from dynprune.runtime.costs import CostTable
from dynprune.runtime.lowering.sparse import describe
from dynprune.runtime.plan import Plan, Step


def explain(
    plan: Plan, sites: Sites, unhooked: Sequence[Ungated], gates: Mapping[str, Gate], costs: CostTable | None, level: float = 1.0
) -> str:
    """Returns the table.

    Args:
        plan: of the model.
        sites: found in its graph.
        unhooked: sites that hooks cannot gate.
        gates: by site name.
        costs: predicted times; None shows shares of multiply-adds only.
        level: at which to say whether the gates depend on the input.
    """
    if costs is not None and not costs.fits(plan):
        costs = None
    header = ["step", "runs on", "operation", "name", "site", "MACs"] + ([] if costs is None else ["ms"])
    lines = [header]
    for i, step in enumerate(plan.steps):
        macs = _gate_macs(step, plan, gates) if step.op == "gate" else step.macs
        line = [str(i), *_where(step), step.name, _sites(step, plan), f"{100 * macs / max(plan.macs, 1):.2f} %" if macs else ""]
        if costs is not None:
            line.append(f"{costs.fixed_ms[i] + costs.scaled_ms[i]:.3f}")
        lines.append(line)
    parts = [_summary(plan, sites, gates), _aligned(lines)]
    if sites.sites:
        kept = {site.name for site in plan.sites}
        table = [["site", "kind", "groups", "MACs that can go"]]
        table += [[s.name, s.kind, str(s.num_groups), f"{100 * s.macs_share:.1f} %"] for s in sites.sites if s.name in kept]
        parts.append(_aligned(table))
    dependence = _dependence([gates[site.name] for site in plan.sites], level)
    if dependence:
        parts.append(dependence)
    zeros = [(step.name, words) for step in plan.steps if (words := describe(step)) is not None]
    if zeros:
        parts.append("Sparse weights:\n" + "\n".join(f"  {name}: {words}" for name, words in zeros))
    refused = [(u.name, u.reason) for u in (*sites.ungated, *unhooked)] + list(plan.ungated)
    if refused:
        parts.append("Not gated:\n" + "\n".join(f"  {name or '(root)'}: {reason}" for name, reason in refused))
    return "\n\n".join(parts)


def _summary(plan: Plan, sites: Sites, gates: Mapping[str, Gate]) -> str:
    torch_steps = sum(step.torch_call is not None for step in plan.steps)
    gate_macs = sum(_gate_macs(step, plan, gates) for step in plan.steps if step.op == "gate")
    return (
        f"{len(plan.steps)} steps, {torch_steps} of them in PyTorch; {sites.macs / 1e6:.1f} million multiply-adds per sample; "
        f"{len(plan.sites)} gates cost {100 * gate_macs / max(plan.macs, 1):.2f} % of them; "
        f"{4 * plan.arena_size / 2**20:.1f} MiB of activations per sample."
    )


ALWAYS = 0.01
"""A group that is active for all but this share of the inputs, or inactive for all but it, is called decided."""


def _dependence(gates: Sequence[Gate], level: float) -> str:
    """Returns how many gates choose by the input at a level, and what to do where none does; "" before a calibration."""
    frequencies = [gate.frequency(level) for gate in gates]
    if not frequencies or any(frequency is None for frequency in frequencies):
        return ""
    decided = [bool(((f <= ALWAYS) | (f >= 1 - ALWAYS)).all()) for f in frequencies]
    line = f"At level {level:g}, {len(decided) - sum(decided)} of {len(decided)} gates choose by the input."
    skips = any((f < 1 - ALWAYS).any() for f in frequencies)
    if not all(decided) or not skips:
        return line
    return f"{line} The same groups are skipped for every input, so dm.freeze({level:g}) does the same without gates."


def _gate_macs(step: Step, plan: Plan, gates: Mapping[str, Gate]) -> int:
    gate = gates[plan.sites[step.ints["site"][0]].name]
    return gate.down.numel() + gate.up.numel()


def _where(step: Step) -> tuple[str, str]:
    return ("PyTorch", step.nodes[-1]) if step.torch_call is not None else ("engine", step.op)


def _sites(step: Step, plan: Plan) -> str:
    if step.op == "gate":
        return f"decides {plan.sites[step.ints['site'][0]].name}"
    words = []
    if step.in_site >= 0 and step.in_site == step.out_site:
        words.append(f"in {plan.sites[step.in_site].name}")
    else:
        words += [f"reads {plan.sites[step.in_site].name}"] if step.in_site >= 0 else []
        words += [f"writes {plan.sites[step.out_site].name}"] if step.out_site >= 0 else []
    return ", ".join([*words, *(f"if {plan.sites[branch].name}" for branch in step.branches)])


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
