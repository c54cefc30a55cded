"""Every kernel compiles to a cubin for sm_80, sm_90 and sm_100 without a GPU, and keeps its values in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's functions cannot be compiled"
)

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16"}


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def cases() -> list[Any]:
    """(label, kernel, signature, constants, warps)."""
    from kernels import adaln, patchify

    found: list[Any] = []
    for width in (192, 1152):
        for kind in ("fp32", "bf16", "fp16"):
            blocks = adaln._blocks(width)
            warps = blocks.pop("num_warps")
            statistics = pointers("mean_ptr rstd_ptr", "fp32")
            signature = (
                pointers("x_ptr shift_ptr scale_ptr y_ptr", kind)
                | statistics
                | integers("T D shift_b shift_t scale_b scale_t")
                | {"eps": "fp32"}
            )
            found.append((f"adaln forward {width} {kind}", adaln._forward, signature, blocks, warps))
            for per_token in (False, True):
                sums = pointers("dshift_ptr dscale_ptr", kind if per_token else "fp32")
                signature = pointers("dy_ptr x_ptr scale_ptr", kind) | statistics | pointers("dx_ptr", kind) | sums
                signature |= integers("T D slices scale_b scale_t")
                constants = {**blocks, "PER_TOKEN": per_token, "SLICE": adaln.SLICE}
                label = f"adaln backward {width} {kind} {'token' if per_token else 'sample'}"
                found.append((label, adaln._backward, signature, constants, warps))
    for patch in (8, 16):
        block = patchify._grid(1, patch)[1]
        for stored in ("i16", "fp32"):
            signature = pointers("volume_ptr", stored) | pointers("index_ptr", "i64")
            signature |= pointers("mean_ptr rstd_ptr", "fp32") | pointers("out_ptr", "bf16") | integers("K X Y Z")
            constants = {"P": patch, "HAS_INDEX": True, "NORMALIZE": True, "BLOCK": block}
            found.append((f"patchify {patch} {stored}", patchify._patchify, signature, constants, 4))
        signature = pointers("patches_ptr out_ptr", "bf16") | integers("N X Y Z")
        found.append((f"unpatchify {patch}", patchify._unpatchify, signature, {"P": patch, "BLOCK": block}, 4))
    return found


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack (spills) of the kernel, by cuobjdump of the triton wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = str(tool) if tool.is_file() else shutil.which("cuobjdump")
    if path is None:
        return {}
    (folder / "k.cubin").write_bytes(cubin)
    text = subprocess.run([path, "-res-usage", str(folder / "k.cubin")], capture_output=True, text=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int, tmp_path: Path, record_property: Any) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    seen = 0
    for label, kernel, signature, constants, warps in cases():
        ordered = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(
                fn=kernel, signature=ordered, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        cubin = compiled.asm["cubin"]
        assert cubin[:4] == b"\x7fELF", label
        used = resources(cubin, tmp_path)
        record_property(label, str(used))
        assert used.get("LOCAL", 0) == 0, f"{label} spills on sm_{capability}: {used}"
        assert used.get("STACK", 0) == 0, f"{label} spills on sm_{capability}: {used}"
        seen += 1
    assert seen == 24
