"""Every kernel and configuration becomes a cubin for sm_80, sm_90 and sm_100 without a GPU, and keeps its values in registers."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions cannot be compiled"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

from benchmarks import compiled  # noqa: E402


@pytest.mark.parametrize("capability", compiled.CAPABILITIES)
def test_kernels_compile_without_spills(capability: int, record_property: Any) -> None:
    cases = compiled.cases()
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) > 150
    for case in cases:
        used = compiled.build(case, capability)
        record_property(case.name, str(used))
        assert used["spill_bytes"] == 0, f"{case.name} spills on sm_{capability}: {used}"
        assert used["registers"] <= 255
        assert used["shared_bytes"] <= 48 * 1024  # what every GPU gives without asking


def test_the_published_width_moves_memory_sixteen_bytes_at_a_time() -> None:
    seen = 0
    for case in compiled.cases():
        if " 1152 " in f" {case.name} " or "16 of 160x192x160" in case.name:
            used = compiled.build(case, 90)
            assert used["bytes_wide"] >= 1.9 * used["bytes_narrow"], f"{case.name}: {used}"
            seen += 1
    assert seen > 30


def test_a_spill_would_be_seen() -> None:
    case = next(c for c in compiled.cases() if c.name == "gate_residual_adaln 1536 fp32 sample backward")
    squeezed = {**case.launch, "maxnreg": 64}
    assert compiled.build(dataclasses.replace(case, launch=squeezed), 90)["spill_bytes"] > 0
