"""Shared settings of the tests: double precision, fixed seeds, and no silent skips where CI promises the data."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # The wheel's compiled half does not load beside a CPU build of torch; two schemas are all that is missing.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds fixed, double precision as default; a test that needs float32 says so."""
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` formats a stack for each device that is not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and os.environ.get("EQUIPOISE_REQUIRE_DATA")
        and item.get_closest_marker("gpu") is None
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped although all packages and data sets are promised: {report.longrepr}"
    return report
