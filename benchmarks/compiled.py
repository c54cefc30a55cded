"""Compile every kernel and configuration for sm_80, sm_90 and sm_100 without a GPU: ``python -m benchmarks.compiled``.

What the compiler reports needs no device: registers, spills, shared memory, and how wide the loads are. A spill or a narrow load is the first
reason for a slow memory-bound kernel. Writes ``benchmarks/results/compiled/kernels.csv``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, write_rows

CAPABILITIES = (80, 90, 100)
WIDTHS = (192, 384, 768, 1152, 1536)
GRIDS = ((16, (160, 192, 160)), (8, (160, 192, 160)), (8, (40, 48, 40)))
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16", torch.uint8: "u8",
         torch.int64: "i64", torch.bool: "i1"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel with the types and constants of one launch. Integers are taken as divisible by 16, as widths and strides are."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    launch: dict[str, Any]  # constants and options, as the kernel is launched
    small: tuple[str, ...] = ()  # integers that need not be divisible by 16


def _pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def _adaln() -> Iterator[Case]:
    from kernels import adaln

    for D in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kind = KINDS[dtype]
            for gated in (False, True):
                for per_token in (False, True):
                    name = f"{'gate_residual_' if gated else ''}adaln {D} {kind} {'token' if per_token else 'sample'}"
                    pointers = _pointers("x_ptr h_ptr gate_ptr shift_ptr scale_ptr x1_ptr y_ptr", kind)
                    pointers |= _pointers("mean_ptr rstd_ptr", "fp32") | {"eps": "fp32"}
                    launch = {"GATED": gated, **adaln.FORWARD.config(D)}
                    yield Case(f"{name} forward", adaln._forward, pointers, launch, ("T",))
                    pointers = _pointers("dy_ptr dx1_ptr x1_ptr h_ptr gate_ptr scale_ptr dx_ptr dh_ptr", kind)
                    pointers |= _pointers("mean_ptr rstd_ptr", "fp32")
                    pointers |= _pointers("dmod_ptr", kind if per_token else "fp32")
                    launch = {"GATED": gated, "PER_TOKEN": per_token, "SLICE": adaln.SLICE, "STAGES": adaln.STAGES}
                    launch |= adaln.BACKWARD[gated].config(D)
                    yield Case(f"{name} backward", adaln._backward, pointers, launch, ("T", "slices"))


def _gate() -> Iterator[Case]:
    from kernels import gate, rows

    for D in WIDTHS:
        for kind in ("fp32", "bf16"):
            pointers = _pointers("x_ptr h_ptr gate_ptr x1_ptr", kind)
            yield Case(f"gate_residual {D} {kind} forward", gate._forward, pointers, gate.FORWARD.config(D), ("T",))
            pointers = _pointers("d_ptr h_ptr gate_ptr dh_ptr", kind) | _pointers("dgate_ptr", "fp32")
            launch = {"PER_TOKEN": False, "SLICE": gate.SLICE, **gate.BACKWARD[False].config(D)}
            yield Case(f"gate_residual {D} {kind} backward", gate._backward, pointers, launch, ("T", "slices"))
    pointers = _pointers("parts_ptr", "fp32") | _pointers("out_ptr", "bf16")
    yield Case("sum_slices bf16", rows._sum_slices, pointers, rows.SUM, ("S",))


def _patches() -> Iterator[Case]:
    from kernels import masked_loss, patchify

    for patch, shape in GRIDS:
        sides = dict(zip("XYZ", shape, strict=True))
        where = f"{patch} of {'x'.join(map(str, shape))}"
        move = {**patchify.config(patch), **sides}
        for kind in ("i16", "u8", "bf16", "fp32"):
            masked = kind == "fp32"
            flags = {"HAS_INDEX": True, "NORMALIZE": True, "HAS_MASK": masked}
            pointers = _pointers("volume_ptr", kind) | _pointers("mask_ptr", "i1" if masked else kind)
            pointers |= _pointers("index_ptr", "i64") | _pointers("mean_ptr rstd_ptr", "fp32")
            forward = {**pointers, **_pointers("out_ptr", "bf16")}
            yield Case(f"patchify {where} {kind}", patchify._patchify, forward, {**move, **flags}, ("K",))
            if kind in ("bf16", "fp32"):
                backward = {**pointers, **_pointers("d_ptr", "bf16"), **_pointers("out_ptr", kind)}
                launch = {**move, **flags, "KBLOCK": 512}
                yield Case(
                    f"patchify {where} {kind} backward", patchify._patchify_backward, backward, launch, ("K", "N")
                )
        yield Case(
            f"unpatchify {where} bf16", patchify._unpatchify, _pointers("patches_ptr out_ptr", "bf16"), move, ("N",)
        )
        for kind in ("bf16", "fp32"):
            for norm, square in ((False, False), (True, True)):
                launch = {**masked_loss.config(patch), **sides, "NORM": norm, "SQUARE": square, "GRADIENT": True}
                pointers = _pointers("pred_ptr slope_ptr", kind) | _pointers("volume_ptr", "i16")
                pointers |= _pointers("index_ptr", "i64") | _pointers("mean_ptr rstd_ptr sum_ptr", "fp32")
                name = f"masked_loss {where} {kind} {'l2 standardized' if norm else 'l1'}"
                yield Case(name, masked_loss._masked_loss, pointers, launch, ("K",))
    pointers = _pointers("slope_ptr out_ptr", "bf16") | _pointers("dloss_ptr", "fp32") | {"share": "fp32"}
    yield Case("masked_loss scale bf16", masked_loss._scale, pointers, masked_loss.SCALE)


def cases() -> list[Case]:
    return [*_adaln(), *_gate(), *_patches()]


def build(case: Case, capability: int) -> dict[str, int]:
    """Compile and report. Raises RuntimeError where no cubin comes out or cuobjdump is missing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = {k: v for k, v in case.launch.items() if k in names}
    options = {k: v for k, v in case.launch.items() if k not in names}
    types = {name: "constexpr" if name in constants else case.pointers.get(name, "i32") for name in names}
    whole = [n for n in names if types[n].startswith("*") or (types[n] == "i32" and n not in case.small)]
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = done.asm["cubin"]
    if cubin[:4] != b"\x7fELF":
        raise RuntimeError(f"{case.name}: what came out for sm_{capability} is no cubin")
    used = _resources(cubin)
    return {
        "registers": used["REG"],
        "spill_bytes": used.get("LOCAL", 0) + used.get("STACK", 0),
        "shared_bytes": done.metadata.shared,
        "warps": options["num_warps"],
        **_widths(done.asm["ptx"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack and local memory, by the cuobjdump in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = str(tool) if tool.is_file() else shutil.which("cuobjdump")
    if path is None:
        raise RuntimeError("cuobjdump is neither in Triton's wheel nor on the PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def _widths(ptx: str) -> dict[str, int]:
    """Bytes that global loads and stores of one thread move, by the width of the instruction."""
    found = {"bytes_wide": 0, "bytes_narrow": 0}
    for vector, bits in re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        size = int(vector or 1) * int(bits) // 8
        found["bytes_wide" if size >= 16 else "bytes_narrow"] += size
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for case in cases():
        for capability in CAPABILITIES:
            row = {"kernel": case.name, "target": f"sm_{capability}", **build(case, capability)}
            rows.append(row)
            print("  ".join(str(v) for v in row.values()))
    (RESULTS / "compiled" / "kernels.csv").unlink(missing_ok=True)  # what a compiler says is no series over time
    print(write_rows("kernels", rows, RESULTS / "compiled"))


if __name__ == "__main__":
    main()
