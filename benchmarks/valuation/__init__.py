"""Data values on OpenDataVal's tasks, by its own methods and by ours."""

import torch

try:
    import torchvision  # noqa: F401  opendataval imports it
except ImportError:
    pass
except RuntimeError:
    # PyPI's torchvision is built for CUDA: beside a CPU build of torch its operators do not load, and its
    # import fails because they are not declared. None of them is used here.
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)
