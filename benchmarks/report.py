"""docs/benchmarks.md and its pictures from the CSV rows of benchmarks/results: ``python -m benchmarks.report``.

The newest row of each case counts. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.measure import RESULTS, read_rows

DOCS = Path(__file__).parents[1] / "docs"
GPUS = {"A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200", "L40S": "l40s", "RTX 4090": "4090"}
TARGET = "H200"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGE = 4 * 2**20  # bytes of x; below, a call costs the host more than the device
COMPILE = ("compile", "compile-static")
MARKERS = {"g3n": "o", "compile": "s", "compile-static": "D", "eager": "x", "liger": "^", "apex": "v"}
Row = dict[str, str]

# which columns tell cases apart; every other file has ``value`` columns that are listed as they are
KEYS = {
    "kernels": ("op", "pass", "impl", "dtype", "B", "T", "D", "shape", "modulation", "option", "flush", "mix_order"),
    "attention": ("backend", "pass", "dtype", "B", "T", "H", "K", "flush"),
    "tune": ("op", "pass", "dtype", "B", "T", "D", "option", "candidate"),
    "data": ("part", "case", "what", "unit"),
    "stream": ("kind", "reader", "format", "workers", "cache", "batch"),
    "checkpoint": ("parameters", "precision"),
    "recovery": ("config", "save_every"),
    "sweep": ("sweep",),
    "probing": ("scans", "width", "tasks", "cores"),
    "embedding": ("encoder", "batch"),
    "train": ("task", "source", "config", "gpus", "micro_batch"),
}
PROVENANCE = ("device", "driver", "cuda", "torch", "triton", "python", "git")


# --- rows


def newest(rows: Iterable[Row], columns: Sequence[str]) -> list[Row]:
    """Of rows with the same key the last written, in the order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(c, "") for c in columns)
        # what inductor's environment says is part of a case for its own code alone
        found[key if row.get("impl", "compile") in COMPILE else key[:-1]] = row
    return list(found.values())


@dataclass(frozen=True)
class Machine:
    """The newest rows of one device, by file."""

    folder: str
    files: dict[str, list[Row]]

    @property
    def name(self) -> str:
        """As in ``GPUS``, else the folder's name."""
        parts = self.folder.split("-")
        return next((name for name, part in GPUS.items() if part in parts), self.folder)

    @property
    def gpu(self) -> bool:
        return not self.folder.startswith("cpu")

    def rows(self, file: str, **wanted: Any) -> list[Row]:
        return [r for r in self.files.get(file, []) if all(r.get(c, "") == str(v) for c, v in wanted.items())]


def read(results: Path) -> list[Machine]:
    machines = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir() and p.name != "compiled"):
        files = {p.stem: read_rows(p) for p in sorted(folder.glob("*.csv"))}
        files = {name: newest(rows, KEYS[name]) if name in KEYS else rows for name, rows in files.items()}
        if files:
            machines.append(Machine(folder.name, files))
    return machines


def fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda r: float(r["ms"]), default=None)


def x_bytes(row: Row) -> int:
    return int(row["B"]) * int(row["T"]) * int(row["D"]) * BYTES[row["dtype"]]


def case_key(row: Row) -> tuple[str, ...]:
    return tuple(row[c] for c in ("op", "pass", "dtype", "B", "T", "D", "shape", "modulation", "option", "flush"))


def shape_of(row: Row) -> str:
    parts = [f"{row['B']}x{row['T']}x{row['D']}", row["dtype"].replace("bfloat", "bf").replace("float", "fp")]
    parts += [row[c] for c in ("modulation", "option") if row[c] not in ("", "sample")]
    return " ".join(parts)


def pairs(machine: Machine, others: Sequence[str]) -> list[tuple[Row, Row]]:
    """Each flushed row of g3n (a CPU has no other) with the fastest of ``others`` for the same case."""
    rows = [r for r in machine.rows("kernels") if r["flush"] != "False"]
    found: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["impl"] in others:
            found.setdefault(case_key(r), []).append(r)
    both = ((r, fastest(found.get(case_key(r), []))) for r in rows if r["impl"] == "g3n")
    return [(ours, other) for ours, other in both if other is not None]


# --- goals


@dataclass(frozen=True)
class Verdict:
    """held: None where it was not measured."""

    held: bool | None
    detail: str = ""

    def __str__(self) -> str:
        if self.held is None:
            return "not measured"
        return f"**{'held' if self.held else 'missed'}**: {self.detail}"


Goal = tuple[str, Callable[[Machine], Verdict]]
PUBLISHED = {"B": 16, "T": 1200, "D": 1152, "dtype": "bfloat16", "modulation": "sample", "flush": True}
PATCHES = {"B": 16, "dtype": "bfloat16", "shape": "160x192x160", "flush": True}


def _at_least_share(share: float, **case: Any) -> Callable[[Machine], Verdict]:
    def check(machine: Machine) -> Verdict:
        row = fastest(machine.rows("kernels", impl="g3n", **case))
        if row is None:
            return Verdict(None)
        found = float(row["share_of_copy"])
        return Verdict(found >= share, f"{100 * found:.1f} %")

    return check


def _at_least_times(times: float, others: Sequence[str], **case: Any) -> Callable[[Machine], Verdict]:
    def check(machine: Machine) -> Verdict:
        wanted = {c: str(v) for c, v in case.items()}
        found = [(a, b) for a, b in pairs(machine, others) if all(a[c] == v for c, v in wanted.items())]
        if not found:
            return Verdict(None)
        speed = min(float(b["ms"]) / float(a["ms"]) for a, b in found)
        return Verdict(speed >= times, f"{speed:.2f}x")

    return check


def _never_slower(machine: Machine) -> Verdict:
    found = [(float(b["ms"]) / float(a["ms"]), a) for a, b in pairs(machine, COMPILE) if x_bytes(a) >= LARGE]
    if not found:
        return Verdict(None)
    slower = [pair for pair in found if pair[0] < 1]
    worst, row = min(found, key=lambda pair: pair[0])
    where = f"{row['op']} {row['pass']} {shape_of(row)}"
    return Verdict(not slower, f"slower in {len(slower)} of {len(found)} cases, least speedup {worst:.2f}x ({where})")


def _roofline(machine: Machine) -> Verdict:
    rows = machine.rows("kernels", op="masked_patch_loss", impl="g3n", **{"pass": "forward"}, **PATCHES)
    if not rows:
        return Verdict(None)
    worst = max(1 / float(r["share_of_copy"]) for r in rows)
    return Verdict(worst <= 1.4, f"{worst:.2f}x")


def _memory(pass_: str) -> Callable[[Machine], Verdict]:
    def check(machine: Machine) -> Verdict:
        rows = machine.rows("kernels", op="masked_patch_loss", impl="g3n", **{"pass": pass_}, **PATCHES)
        ratios = [float(r["memory_ratio"]) for r in rows if r.get("memory_ratio")]
        return Verdict(max(ratios) <= 1.1, f"{max(ratios):.2f}x") if ratios else Verdict(None)

    return check


def _auto(machine: Machine) -> Verdict:
    behind = [
        float(r["behind_best_percent"])
        for r in machine.rows("attention", backend="auto", flush=True)
        if r["behind_best_percent"]
    ]
    if not behind:
        return Verdict(None)
    within = sum(b <= 3 for b in behind)
    middle, worst = statistics.median(behind), max(behind)
    detail = f"{within} of {len(behind)} measured cases, median {middle:.1f} % behind, worst {worst:.1f} %"
    return Verdict(within >= 0.95 * len(behind), detail)


def _error(machine: Machine) -> Verdict:
    found = [(float(a["error"]), float(b["error"]), a) for a, b in pairs(machine, ("eager",))]
    if not found:
        return Verdict(None)
    above = [f for f in found if not f[0] <= 1.02 * f[1]]
    if not above:
        return Verdict(True, f"{len(found)} cases")
    ours, eager, row = max(above, key=lambda f: f[0] / f[1] if f[1] else float("inf"))
    where = f"{row['op']} {row['pass']} {shape_of(row)}"
    return Verdict(
        False, f"above in {len(above)} of {len(found)} cases, worst {ours:.2e} against {eager:.2e} ({where})"
    )


def _published(op: str, pass_: str) -> dict[str, Any]:
    return {"op": op, "pass": pass_, **PUBLISHED}


GATHER = {"op": "patchify3d 30 %", "pass": "forward", **PATCHES}
GOALS: tuple[Goal, ...] = (
    (
        "LN + modulate, forward: 85 % of copy bandwidth",
        _at_least_share(0.85, **_published("adaln_modulate", "forward")),
    ),
    (
        "gate + residual + LN + modulate, forward: 85 % of copy bandwidth",
        _at_least_share(0.85, **_published("gate_residual_adaln", "forward")),
    ),
    (
        "LN + modulate, backward: 75 % of copy bandwidth",
        _at_least_share(0.75, **_published("adaln_modulate", "backward")),
    ),
    (
        "gate + residual + LN + modulate, backward: 75 % of copy bandwidth",
        _at_least_share(0.75, **_published("gate_residual_adaln", "backward")),
    ),
    (
        "LN + modulate, backward: 1.8x torch.compile",
        _at_least_times(1.8, COMPILE, **_published("adaln_modulate", "backward")),
    ),
    (
        "gate + residual + LN + modulate, backward: 1.8x torch.compile",
        _at_least_times(1.8, COMPILE, **_published("gate_residual_adaln", "backward")),
    ),
    ("never slower than torch.compile where x has 4 MB or more", _never_slower),
    ("gather of visible patches: 70 % of copy bandwidth", _at_least_share(0.70, **GATHER)),
    ("gather of visible patches: 3x einops + index", _at_least_times(3, ("eager",), **GATHER)),
    ("masked loss, forward with slope: at most 1.4x the time of its bytes", _roofline),
    ("masked loss, forward with slope: at most 1.1x the memory of prediction + volume", _memory("forward")),
    ("masked loss, forward without gradients: at most 1.1x the memory of prediction + volume", _memory("no_grad")),
    ("auto attention within 3 % of the best backend in 95 % of cases", _auto),
    ("error against float64 at most eager torch's, within 2 %", _error),
)


# --- tables


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown; columns of numbers are aligned right."""
    cells = [[str(cell) for cell in line] for line in lines]
    columns = [[line[i] for line in cells] for i in range(len(head))]
    numbers = [all(c == "" or c[0] in "-0123456789" for c in column) and any(column) for column in columns]
    rule = "|".join("---:" if right else "---" for right in numbers)
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in cells), ""]


def stream_section(name: str, rows: Sequence[Row]) -> list[str]:
    """A line a reader, a column a case: volumes a second, and how many times as fast g3n is in the same run."""
    cases = list(dict.fromkeys((r["workers"], r["cache"]) for r in rows))
    readers: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for r in rows:
        readers.setdefault((r["reader"], r["reader_version"], r["format"]), {})[r["workers"], r["cache"]] = r
    values = []
    for (reader, release, kind), found in readers.items():
        cells = [f"{r['samples_per_second']} ({r['g3n_ratio']})" if (r := found.get(case)) else "" for case in cases]
        values.append((f"{reader} {release}, {kind}", *cells, max(r["date"] for r in found.values())))
    head = ("reader", *(f"{w if 'core' in w else w + ' workers'}, {c}" for w, c in cases), "day")
    words = "Volumes a second; in parentheses how many times as fast g3n is. Workers are threads of g3n, processes of the others."
    return [f"### Stream on {name}", "", *prose(words), *table(head, values)]


def number(text: str | None, digits: int = 3, factor: float = 1.0) -> str:
    return f"{factor * float(text):.{digits}f}" if text else ""


def prose(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 120), ""]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def machines_section(machines: Sequence[Machine]) -> list[str]:
    lines = ["## Machines", ""]
    described = []
    for m in machines:
        rows = [r for rows in m.files.values() for r in rows]
        last = rows[-1]
        several = [", ".join(sorted({r.get(c, "") for r in rows} - {""})) for c in ("torch", "triton", "git", "date")]
        described.append((f"{m.name} (`{m.folder}`)", last.get("driver", ""), *several, len(rows)))
    lines += table(("machine", "driver", "torch", "triton", "commit", "days", "newest rows"), described)
    measured = {m.name for m in machines}
    lines += [
        f"- {name}: no rows: run `make bench-gpu` there and send the CSV" for name in GPUS if name not in measured
    ]
    return [*lines, ""]


def goals_section(machines: Sequence[Machine]) -> list[str]:
    gpus = [m for m in machines if m.gpu]
    target = [m for m in gpus if m.name == TARGET] or [Machine(f"nvidia-{GPUS[TARGET]}", {})]
    columns = [*target, *(m for m in gpus if m.name != TARGET)]
    lines = [
        "## Goals",
        "",
        *prose(f"""
            Set for the {TARGET}, with the L2 cache flushed; bandwidth and the factor over torch.compile at the
            published shape 16x1200x1152 in bf16, patches at 16 volumes of 160x192x160 with patches of 16. The
            fastest of torch.compile's variants counts."""),
    ]
    return lines + table(
        ("goal", *(m.name for m in columns)), [(n, *(check(m) for m in columns)) for n, check in GOALS]
    )


def state(flush: str) -> str:
    return {"True": "flushed", "False": "warm"}.get(flush, "")


def variant(row: Row) -> str:
    """The implementation, with inductor's environment where it was set."""
    own = row["impl"] in COMPILE and row["mix_order"]
    return f"{row['impl']} mix_order={row['mix_order']}" if own else row["impl"]


def full_table(rows: Sequence[Row]) -> list[str]:
    """One line a row."""
    head = (
        "op",
        "pass",
        "implementation",
        "shape",
        "cache",
        "ms",
        "20 % - 80 %",
        "GB/s",
        "of copy",
        "error",
        "peak MiB",
        "memory / (pred + volume)",
    )
    lines = [
        (
            r["op"],
            r["pass"],
            variant(r),
            shape_of(r),
            state(r["flush"]),
            number(r["ms"], 4),
            f"{number(r['ms_20'], 4)} - {number(r['ms_80'], 4)}",
            r["gb_per_s"],
            f"{number(r['share_of_copy'], 1, 100)} %",
            r["error"],
            r.get("peak_mib", ""),
            number(r.get("memory_ratio"), 2),
        )
        for r in rows
    ]
    empty = [i for i in range(len(head)) if all(line[i] == "" for line in lines)]
    keep = [i for i in range(len(head)) if i not in empty]
    return table([head[i] for i in keep], [[line[i] for i in keep] for line in lines])


def ratio_table(machine: Machine) -> list[str]:
    """g3n against the others, one line a case."""
    eager = {case_key(a): b for a, b in pairs(machine, ("eager",))}
    compiled = {case_key(a): b for a, b in pairs(machine, COMPILE)}
    lines = []
    for r in machine.rows("kernels", impl="g3n"):
        if r["flush"] == "False":
            continue
        times = [
            f"{float(o[case_key(r)]['ms']) / float(r['ms']):.2f}" if case_key(r) in o else "" for o in (eager, compiled)
        ]
        lines.append(
            (
                r["op"],
                r["pass"],
                shape_of(r),
                number(r["ms"], 4),
                f"{number(r['share_of_copy'], 1, 100)} %",
                *times,
                r["error"],
                eager[case_key(r)]["error"] if case_key(r) in eager else "",
            )
        )
    return table(("op", "pass", "shape", "ms", "of copy", "x eager", "x compile", "error", "eager's error"), lines)


def small_table(machine: Machine) -> list[str]:
    rows = [r for r in machine.rows("kernels") if r.get("host_us") and r["flush"] != "True"]
    lines = [
        (
            r["op"],
            r["pass"],
            r["impl"],
            shape_of(r),
            number(r["ms"], 1, 1e3),
            number(r["host_us"], 1),
            number(r.get("graph_us"), 1),
        )
        for r in rows
    ]
    head = ("op", "pass", "implementation", "shape", "device us, warm", "host us", "CUDA graph us")
    return table(head, lines) if lines else []


def kernels_section(machine: Machine, pictures: dict[str, str]) -> list[str]:
    rows = machine.rows("kernels")
    if not rows:
        return []
    lines = [f"### Kernels on {machine.name}", ""]
    if not machine.gpu:
        lines += [
            *prose("""
                Plain torch stands in for the kernels here, on small shapes: these rows prove the path and say
                nothing about speed."""),
        ]
        return [*lines, *folded(f"{len(rows)} rows", full_table(rows))]
    published = [r for r in rows if all(r[c] == str(v) for c, v in PUBLISHED.items() if c != "flush")]
    patches = [r for r in rows if all(r[c] == str(v) for c, v in PATCHES.items() if c != "flush")]
    lines += ["The published shape:", "", *(full_table(published) if published else ["not measured", ""])]
    lines += ["Patches of 16 volumes:", "", *(full_table(patches) if patches else ["not measured", ""])]
    if "roofline" in pictures:
        lines += [f"![bytes moved against bandwidth]({pictures['roofline']})", ""]
    lines += folded("every shape, cache flushed: g3n against eager torch and torch.compile", ratio_table(machine))
    small = small_table(machine)
    return lines + (folded("small shapes: what the host and a CUDA graph take", small) if small else [])


def attention_section(machine: Machine, pictures: dict[str, str]) -> list[str]:
    rows = machine.rows("attention")
    if not rows:
        return []
    lines = [f"### Attention on {machine.name}", ""]
    if not machine.gpu:
        lines += ["Small shapes on a CPU: these rows prove the path and say nothing about speed.", ""]
    if "attention" in pictures:
        lines += [f"![TFLOP/s of attention backends]({pictures['attention']})", ""]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        if r["flush"] != "False":
            shape = f"{r['B']}x{r['T']}x{r['H']}x{r['K']} {r['dtype'].replace('bfloat', 'bf').replace('float', 'fp')}"
            cases.setdefault((shape, r["pass"]), {})[r["backend"]] = r
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    text = []
    for (shape, pass_), found in cases.items():
        auto = found.get("auto", {})
        times = [number(found[b]["ms"], 4) if b in found else "" for b in backends]
        speed = max(float(r["tflop_per_s"]) for r in found.values())
        error = max((float(r["error"]) for r in found.values()), default=0.0)
        text.append(
            (
                shape,
                pass_,
                *times,
                auto.get("chosen", ""),
                number(auto.get("behind_best_percent"), 1),
                f"{speed:.3g}",
                f"{error:.1e}",
            )
        )
    head = (
        "BxTxHxK",
        "pass",
        *(f"{b} ms" for b in backends),
        "auto took",
        "% behind the best",
        "best TFLOP/s",
        "worst error",
    )
    return [*lines, *folded(f"{len(text)} cases", table(head, text))]


def other_sections(machine: Machine) -> list[str]:
    lines: list[str] = []
    if rows := machine.rows("data"):
        values = [(r["part"], r["case"], r["what"], r["value"], r["unit"], r["date"]) for r in rows]
        lines += [
            f"### Data preparation on {machine.name}",
            "",
            *table(("part", "case", "what", "value", "unit", "day"), values),
        ]
    if rows := machine.rows("stream"):
        lines += stream_section(machine.name, rows)
    sections = {"train": "Training", "checkpoint": "Checkpoints", "recovery": "Recovery from a kill", "sweep": "Sweeps"}
    sections |= {"embedding": "Features", "probing": "Probes"}
    for name, what in sections.items():
        if rows := machine.rows(name):
            columns = [c for c in rows[-1] if c not in PROVENANCE]
            values = [[r.get(c, "") for c in columns] for r in rows]
            lines += [f"### {what} on {machine.name}", "", *table([c.replace("_", " ") for c in columns], values)]
    if rows := machine.rows("tune"):
        best: dict[tuple[str, ...], Row] = {}
        for r in rows:
            key = tuple(r[c] for c in KEYS["tune"][:-1])
            best[key] = min(best.get(key, r), r, key=lambda row: float(row["ms"]))
        values = [
            (
                r["op"],
                r["pass"],
                f"{r['B']}x{r['T']}x{r['D']} {r['option']}".strip(),
                r["candidate"],
                number(r["ms"], 4),
                f"{number(r['share_of_copy'], 1, 100)} %",
            )
            for r in best.values()
        ]
        head = ("op", "pass", "shape", "fastest candidate", "ms", "of copy")
        lines += [f"### Tuning on {machine.name}", "", *table(head, values)]
    return lines


def compiled_section(results: Path) -> list[str]:
    path = results / "compiled" / "kernels.csv"
    lines = ["## Compiled kernels", ""]
    if not path.exists():
        return [*lines, "no rows: run `python -m benchmarks.compiled`", ""]
    rows = [r for r in read_rows(path) if r["target"] == "sm_90"]
    rows = [
        r
        for r in rows
        if "1152 bf16" in r["kernel"]
        or ("16 of 160x192x160" in r["kernel"] and ("bf16" in r["kernel"] or "i16" in r["kernel"]))
    ]
    lines += [
        *prose("""
            What the compiler says of the kernels at the published width in bf16, for sm_90, without a GPU. Narrow
            bytes are those that a thread loads and stores by instructions of fewer than 16 bytes, as the
            program's text has them."""),
    ]
    columns = ("registers", "spill_bytes", "shared_bytes", "warps", "bytes_wide", "bytes_narrow")
    head = ("kernel", *(c.replace("_", " ") for c in columns))
    return lines + table(head, [(r["kernel"], *(r[c] for c in columns)) for r in rows])


# --- pictures


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def draw_roofline(machine: Machine, path: Path) -> bool:
    rows = [r for r in machine.rows("kernels", flush=True) if r["pass"] in ("forward", "backward")]
    if not rows:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    roof = statistics.median(float(r["copy_gb_per_s"]) for r in rows)
    for ax, pass_ in zip(axes, ("forward", "backward"), strict=True):
        for impl, marker in MARKERS.items():
            some = [r for r in rows if r["impl"] == impl and r["pass"] == pass_]
            if some:
                x = [int(r["bytes"]) / 1e6 for r in some]
                y = [float(r["gb_per_s"]) for r in some]
                ax.scatter(x, y, s=22 if impl == "g3n" else 14, marker=marker, label=impl, alpha=0.75, linewidths=1)
        ax.axhline(roof, color="black", linewidth=1, label=f"copy, {roof:.0f} GB/s")
        ax.set(xscale="log", xlabel="bytes moved, MB", title=f"{pass_}, cache flushed")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s")
    axes[0].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), bbox_to_anchor=(0.5, -0.08))
    figure.suptitle(machine.name)
    save(figure, path)
    return True


def draw_attention(machine: Machine, path: Path) -> bool:
    """TFLOP/s at 16 volumes of 1200 tokens by head width."""
    rows = machine.rows("attention", flush=True, B=16, T=1200)
    if not rows:
        return False
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    widths = sorted({int(r["K"]) for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    step = 0.8 / len(backends)
    for ax, pass_ in zip(axes, ("forward", "backward"), strict=True):
        for i, backend in enumerate(backends):
            speed = {
                int(r["K"]): float(r["tflop_per_s"]) for r in rows if r["backend"] == backend and r["pass"] == pass_
            }
            at = [n + (i - (len(backends) - 1) / 2) * step for n in range(len(widths))]
            ax.bar(at, [speed.get(w, 0.0) for w in widths], step, label=backend)
        ax.set_xticks(range(len(widths)), [f"{1152 // w} x {w}" for w in widths])
        ax.set_xlabel("heads x width of a head")
        ax.set_title(f"{pass_}, 16 x 1200 tokens, bf16")
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("TFLOP/s")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(backends), bbox_to_anchor=(0.5, -0.08)
    )
    figure.suptitle(machine.name)
    save(figure, path)
    return True


def draw(machine: Machine, docs: Path) -> dict[str, str]:
    """Pictures of a GPU that there are rows for, as links from the page."""
    links = {}
    if machine.gpu:
        for kind, function in (("roofline", draw_roofline), ("attention", draw_attention)):
            link = f"benchmarks/{machine.folder}-{kind}.svg"
            if function(machine, docs / link):
                links[kind] = link
    return links


def report(results: Path, docs: Path) -> Path:
    """Writes the page and pictures; pictures of devices that are gone are removed."""
    machines = read(results)
    with matplotlib.rc_context({"svg.hashsalt": "g3n", "svg.fonttype": "none", "font.size": 9}):
        pictures = {m.folder: draw(m, docs) for m in machines}
    wanted = {docs / link for links in pictures.values() for link in links.values()}
    for old in sorted((docs / "benchmarks").glob("*.svg")):
        if old not in wanted:
            old.unlink()
    lines = [
        "# Benchmarks",
        "",
        *prose("""
            Made by `python -m benchmarks.report` from the rows in `benchmarks/results/`; do not edit it. What has
            no row was not measured."""),
        *prose("""
            Times are medians of one call on the device. Bandwidth counts the bytes that an op cannot do without:
            each input read once, each output written once. "Of copy" is that bandwidth over the one of a large
            copy in the same run. Errors are relative to float64, in the norm, of the output or gradient where
            they are largest."""),
        *machines_section(machines),
        *goals_section(machines),
        "## Measured",
        "",
    ]
    for m in sorted(machines, key=lambda m: (not m.gpu, m.name != TARGET, m.folder)):
        lines += [
            *kernels_section(m, pictures[m.folder]),
            *attention_section(m, pictures[m.folder]),
            *other_sections(m),
        ]
    lines += compiled_section(results)
    page = docs / "benchmarks.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of <device>/*.csv")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of benchmarks.md and benchmarks/*.svg")
    args = parser.parse_args(arguments)
    print(report(args.results, args.output))


if __name__ == "__main__":
    main()
