"""Choose the channels yourself: the engine and the hooked PyTorch model agree on what a list means."""

import torch
from torch import nn

from dynprune import DynamicModel

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()).eval()
x = torch.rand(2, 3, 24, 24)
dm = DynamicModel(model, x).eval()

site = dm.sites[0]
active = {site.name: [list(range(0, site.num_groups, 2)), [0, 1, 5]]}  # one ascending list per sample
with torch.no_grad():
    engine = dm.run_with_active(x, active=active)
    hooked = dm.run_with_active(x, active=active, backend="hooked")
assert torch.allclose(engine, hooked, atol=1e-5)
print(f"site {site.name!r}: {site.num_groups} groups, {site.macs_share:.0%} of the multiply-adds; {dm.stats().skip_rate:.0%} skipped")
print(f"largest difference between engine and hooked model: {(engine - hooked).abs().max():.1e}")
