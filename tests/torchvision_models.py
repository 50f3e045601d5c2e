"""Imports torchvision where its compiled operations are missing, as on machines that have no CPU build of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, bool aligned)"
    " -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as this object


def declare_operations() -> None:
    """Declares torchvision's compiled operations where they are missing, so that it can be imported."""
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            _library.define(schema)


def torchvision_model(name: str) -> nn.Module:
    """Returns an untrained torchvision model in eval mode with batch norms that are no identity; skips the test without torchvision."""
    declare_operations()
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model
