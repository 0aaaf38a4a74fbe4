"""Every test that takes ``device`` runs on the CPU and, marked ``gpu``, on CUDA.

pytest                          everything that runs on this machine
pytest -m gpu --gpu-report      the GPU suite, recorded in tests/gpu_report.json

What tests share:

common.py      cases, inputs, references, and what an error may be
exact.py       whole numbers, laid out in memory in any way, and results that have no error at all
plans.py       the table of plans, and each plan forced by name on such numbers
sanitize.py    all plans, for compute-sanitizer
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from glob import glob
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-report", action="store_true", help=f"write {REPORT.relative_to(ROOT)} at the end of the run"
    )


def csrc_sha256() -> str:
    """A fingerprint of the sources that a GPU run speaks for."""
    digest = hashlib.sha256()
    for path in sorted(glob("csrc/**/*", recursive=True, root_dir=ROOT)):
        if (ROOT / path).is_file():
            digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> str:
    """Whether the last GPU run was of the sources that stand here."""
    if not REPORT.exists():
        return "gpu report: none"
    report = json.loads(REPORT.read_text())
    fresh = "fresh" if report["csrc_sha256"] == csrc_sha256() else "STALE: csrc/ has changed since"
    return (
        f"gpu report: {fresh}; {report['date']}, {report['gpu']}, torch {report['torch']}: "
        f"{report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped"
    )


def _driver_version() -> str:
    proc = Path("/proc/driver/nvidia/version")
    words = proc.read_text().split() if proc.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "unknown")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--gpu-report") or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if not torch.cuda.is_available():
        terminalreporter.write_line("gpu report: not written, there is no CUDA device")
        return

    def count(*outcomes: str) -> int:
        return sum(len(terminalreporter.stats.get(outcome, [])) for outcome in outcomes)

    report = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "csrc_sha256": csrc_sha256(),
        "passed": count("passed"),
        "failed": count("failed", "error"),
        "skipped": count("skipped"),
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    terminalreporter.write_line(f"gpu report: written to {REPORT}")
