"""Mutated input files against every reader of data_prep, the stream, exported models, features and encoders of others: ``python -m tests.fuzz --count 100000``.

Runs in a process of its own under a memory limit, with an alarm on each case. A case must end in a result, a G3nError or a
Damage; anything else (another exception, MemoryError, the alarm, a crash) is printed with its number, which makes it again:
``--first N --count 1``.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import zstandard
from monai.networks.nets import ViT
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from monai.networks.nets.swin_unetr import SwinTransformer

from data_prep.check import look_at
from data_prep.cohorts.tables import read_table
from data_prep.formats import read_image
from data_prep.manifest import Scan, read_manifest
from data_prep.scrub import examine
from data_prep.shards import EncodedSample, encode_sample, write_index, write_shard
from data_prep.verify import verify_shard
from g3n import exported
from g3n.config import G3nError
from g3n.encoders.choose import open_encoder_of
from g3n.encoders.voxel_pca import fit_voxel_pca
from g3n.export import export
from g3n.features import Features, read_about, read_features, write_features
from g3n.nifti import atlas_grid
from g3n.probing.foreign import read_any, read_targets
from g3n.scans import image_scans
from g3n.stream.decode import Damage
from g3n.stream.index import load_index
from tests import shards, untrained

MAX_VOXELS = 1 << 20
LIMIT_BYTES = 768 << 20  # above what is there at the start; the largest frame an index may announce is 512 MiB
ALARM_S = 20
Rng = np.random.Generator
ODD_BYTES = [
    struct.pack(f, v)
    for f, values in (
        ("<h", (0, -1, 1, 32767, -32768)),
        ("<i", (0, -1, 2**31 - 1, -(2**31))),
        (">i", (348, 2**31 - 1)),
        ("<q", (0, -1, 2**63 - 1)),
        ("<f", (0.0, -1.0, 1e38, float("inf"), float("nan"))),
    )
    for v in values
]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, "../../etc/passwd",
    "/dev/zero", "pipe:cat /etc/passwd", "\x00", "é\ud800", [], {}, [[[[]]]], {"a": {"b": []}}, "1e999", [0] * 1000,
]  # fmt: skip


def mutate(data: bytes, rng: Rng) -> bytes:
    """One to eight changes: bits, bytes, odd numbers, cuts, copies, insertions."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if not out:
            break
        # headers decide, so half of the changes are in the first 600 bytes
        end = len(out) if rng.random() < 0.5 else min(len(out), 600)
        at, kind = int(rng.integers(end)), int(rng.integers(7))
        size = int(rng.integers(1, 40))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + size] = rng.bytes(min(size, len(out) - at))
        elif kind == 2:
            odd = ODD_BYTES[int(rng.integers(len(ODD_BYTES)))]
            out[at : at + len(odd)] = odd
        elif kind == 3:
            del out[at : len(out) if rng.random() < 0.2 else at + size]
        elif kind == 4:
            out[at:at] = rng.bytes(size)
        elif kind == 5:
            other = int(rng.integers(len(out)))
            out[at : at + size] = out[other : other + size]
        else:
            out[at:at] = out[at : at + size] * int(rng.integers(1, 4))
    return bytes(out)


def mutate_tree(tree: Any, rng: Rng) -> Any:
    """A JSON tree with one to four values replaced, removed or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 5))):
        parents: list[Any] = []
        stack = [tree]
        while stack:
            node = stack.pop()
            if isinstance(node, dict | list) and node:
                parents.append(node)
                stack += node.values() if isinstance(node, dict) else node
        if not parents:
            break
        parent = parents[int(rng.integers(len(parents)))]
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[int(rng.integers(len(keys)))]
        kind = int(rng.integers(4))
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent["odd" + str(key)] = parent.pop(key)
        elif kind == 2:
            other = parents[int(rng.integers(len(parents)))]
            parent[key] = json.loads(json.dumps(other))
        else:
            parent[key] = copy.deepcopy(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])
    return tree


def mutate_weights(tree: dict[str, Any], rng: Rng) -> dict[str, Any]:
    """One to three tensors of a state dict renamed, removed, reshaped or replaced."""
    state = dict(tree["state_dict"])
    for _ in range(int(rng.integers(1, 4))):
        key = list(state)[int(rng.integers(min(len(state), 12)) if rng.random() < 0.5 else rng.integers(len(state)))]
        value, kind = state.pop(key), int(rng.integers(6))
        if kind == 1:
            state["odd" + key] = value
        elif kind == 2:
            state[key] = torch.zeros([int(n) for n in rng.integers(0, 9, int(rng.integers(0, 6)))])
        elif kind == 3:
            state[key] = value.flatten()
        elif kind == 4:
            state[key] = value.transpose(0, -1).to(torch.float16) if value.ndim else value.int()
        elif kind == 5:
            state[key] = ODD_VALUES[int(rng.integers(10))]
    return {"state_dict": state} if rng.random() < 0.9 else state


class Cases:
    """The good files, and one function a kind of input: it writes a mutated one and reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        voxels = rng.integers(1, 900, (7, 6, 5)).astype(np.int16)
        affine = np.diag([-1.0, -2.0, 3.0, 1.0])
        second = nib.Nifti2Image(voxels, affine)
        scaled = nib.Nifti1Image(voxels.astype(np.float32), affine)
        scaled.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"x" * 40))
        self.images = {
            "a.nii": nib.Nifti1Image(voxels, affine).to_bytes(),
            "b.nii": second.to_bytes(),
            "c.nii": scaled.to_bytes(),
            "d.mgh": nib.MGHImage(voxels, affine).to_bytes(),
        }
        nib.save(nib.AnalyzeImage(voxels, affine), folder / "e.hdr")
        nib.save(nib.Nifti1Pair(voxels, affine), folder / "f.hdr")
        self.pairs = {name: (folder / f"{name}.hdr").read_bytes() for name in "ef"}
        self.shards = folder / "shards"
        shards.volumes(self.shards, (2, 1), (1,))
        self.index = json.loads((self.shards / "index.json").read_text())
        self.tar = (self.shards / "train-00000.tar").read_bytes()
        self.sample = encode_sample(shards.volume_sample(0))
        self.latent = encode_sample(shards.latent_sample(0, 3))
        header = "subject\tsession\tmodality\tpath\tage_years\tsex\tdiagnosis\tcohort\tfield_strength_t\tdays_from_baseline\tsplit"
        self.manifest = f"{header}\tmmse\na\t1\tT1\ta.nii\t40\tF\tHC\tX\t3\t0\ttrain\t28\nb\t1\tT1\ta.nii\tn/a\tM\tHC\tX\t3\t0\tval\tn/a\n".encode()
        self.crafted = folder / "crafted"
        self._foreign(rng)
        self.model = export(untrained.chain(folder / "chain", 2, 1) / "runs/dit", folder / "model", without_audit=True)
        self.config = (self.model / "config.json").read_bytes()
        self.weights = {
            p: (self.model / p / exported.WEIGHTS).read_bytes() for p in ("encoder", "tokenizer", "generator")
        }

    def _foreign(self, rng: Rng) -> None:
        """Features, fitted components and checkpoints of others."""
        table = pd.DataFrame({"key": ["a", "b", "c"], "age_years": [1.0, None, 3.0], "sex": ["F", None, "M"]})
        write_features(self.folder / "f.parquet", Features(table, {"mean": np.ones((3, 4), np.float32)}, {}))
        self.features = (self.folder / "f.parquet").read_bytes()
        rows = rng.standard_normal((4, 60)).astype(np.float32)
        fit_voxel_pca(rows, atlas_grid((3, 4, 5), 4), {}, self.folder / "pca.safetensors")
        self.pca = (self.folder / "pca.safetensors").read_bytes()
        vit = ViT(1, (16,) * 3, (8,) * 3, hidden_size=64, mlp_dim=8, num_layers=1, num_heads=1)
        mae = MaskedAutoEncoderViT(1, (8,) * 3, 4, 12, 8, 1, 2, decoder_hidden_size=6, decoder_num_heads=1)
        swin = SwinTransformer(1, 6, (2,) * 3, (2,) * 3, (1, 1, 1, 1), (1, 1, 1, 1))
        (self.folder / "mae.yaml").write_text("volume_shape: [8, 8, 8]\nheads: 2\n")
        self.checkpoints = {}
        for name, net in (("brainiac", vit), ("monai-mae", mae), ("brainsegfounder", swin)):
            torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, buffer := io.BytesIO())
            self.checkpoints[name] = buffer.getvalue()

    def features_file(self, rng: Rng) -> None:
        path = self.folder / "f.parquet"
        path.write_bytes(mutate(self.features, rng))
        for read in (read_features, read_about):
            try:
                read(path)
            except G3nError:
                continue
        raise G3nError("read")

    def checkpoint(self, rng: Rng) -> None:
        name, data = list(self.checkpoints.items())[int(rng.integers(len(self.checkpoints)))]
        if rng.random() < 0.3:
            data = mutate(data, rng)
        else:
            torch.save(mutate_weights(torch.load(io.BytesIO(data), weights_only=True), rng), buffer := io.BytesIO())
            data = buffer.getvalue()
        (self.folder / "w.pt").write_bytes(data)
        config = self.folder / "mae.yaml" if name == "monai-mae" else None
        open_encoder_of(f"{name}:{self.folder / 'w.pt'}", torch.device("cpu"), config)

    def components(self, rng: Rng) -> None:
        (self.folder / "pca.safetensors").write_bytes(mutate(self.pca, rng))
        open_encoder_of(f"voxel-pca:{self.folder / 'pca.safetensors'}", torch.device("cpu"))

    def image_table(self, rng: Rng) -> None:
        """A table of scans, and one of variables of a folder."""
        table, folder = self.folder / "images.tsv", self.folder / "images"
        folder.mkdir(exist_ok=True)
        (folder / "sub-a_T1w.nii").write_bytes(self.images["a.nii"])
        table.write_bytes(mutate(self.manifest, rng))
        for images, variables in ((table, None), (folder, table)):
            try:
                image_scans(images, None, variables, b"k" * 32)
            except G3nError:
                continue
        raise G3nError("read")

    def image(self, rng: Rng) -> None:
        name, data = list(self.images.items())[int(rng.integers(len(self.images)))]
        bad = mutate(data, rng)
        kind = int(rng.integers(3))
        if kind == 1:
            bad, name = gzip.compress(bad, 1), f"{name}.gz".replace(".mgh.gz", ".mgz")
        elif kind == 2:
            bad, name = mutate(gzip.compress(data, 1), rng), f"{name}.gz".replace(".mgh.gz", ".mgz")
        (self.folder / name).write_bytes(bad)
        read_image(self.folder / name, MAX_VOXELS)

    def pair(self, rng: Rng) -> None:
        name = "ef"[int(rng.integers(2))]
        (self.folder / f"{name}.hdr").write_bytes(mutate(self.pairs[name], rng))
        read_image(self.folder / f"{name}.hdr", MAX_VOXELS)

    def scanned(self, rng: Rng) -> None:
        """check and scrub read what others wrote: they report, they do not stop."""
        (self.folder / "a.nii").write_bytes(mutate(self.images["a.nii"], rng))
        look_at(str(self.folder), Scan("a", "1", "T1", "a.nii", None, None, None, None, None, None, "train"))
        derivative = "sub-0000000000000000/ses-01/anat/sub-0000000000000000_ses-01_T1.nii.gz"
        (self.folder / derivative).parent.mkdir(parents=True, exist_ok=True)
        bad = gzip.compress(mutate(self.images["a.nii"], rng), 1, mtime=0)
        (self.folder / derivative).write_bytes(bad if rng.random() < 0.5 else mutate(bad, rng))
        examine(str(self.folder), bool(rng.integers(2)), (b"erika",), derivative)

    def manifest_table(self, rng: Rng) -> None:
        (self.folder / "m.tsv").write_bytes(mutate(self.manifest, rng))
        (self.folder / "m.json").write_bytes(
            mutate(b'{"root": ".", "seed": 0}', rng) if rng.random() < 0.3 else b'{"root": "."}'
        )
        (self.folder / "t.csv").write_bytes(mutate(self.manifest.replace(b"\t", b","), rng))
        for read in (lambda: read_manifest(self.folder / "m.tsv"), lambda: read_table(self.folder / "t.csv")):
            try:
                read()
            except G3nError:
                continue

    def probed(self, rng: Rng) -> None:
        """Features and targets of anyone, as g3n probe takes them."""
        ids = np.array([f"s{i}" for i in range(8)])
        array = np.arange(16, dtype=np.float32).reshape(8, 2)
        files: dict[str, bytes] = {}
        for name in ("p.npz", "p.parquet"):
            buffer = io.BytesIO()
            if name == "p.npz":
                np.savez(buffer, features=array, ids=ids)
            else:
                pd.DataFrame({"ids": ids, "features": list(array), "site": "a"}).to_parquet(buffer)
            files[name] = buffer.getvalue()
        files["p.csv"] = b"ids,dx,score,sex\n" + b"".join(
            b"s%d,%s,%d.5,F\n" % (i, b"ab"[i % 2 :][:1], i) for i in range(8)
        )
        name = list(files)[int(rng.integers(len(files)))]
        (self.folder / name).write_bytes(mutate(files[name], rng))
        if name == "p.csv":
            read_targets(self.folder / name, "ids", 3)
        else:
            read_any(self.folder / name, "ids")

    def index_tree(self, rng: Rng) -> None:
        text = json.dumps(mutate_tree(self.index, rng))
        (self.shards / "index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        verify(self.shards)

    def index_bytes(self, rng: Rng) -> None:
        (self.shards / "index.json").write_bytes(mutate(json.dumps(self.index).encode(), rng))
        load_index(str(self.shards))

    def tar_bytes(self, rng: Rng) -> None:
        (self.shards / "index.json").write_text(json.dumps(self.index))
        (self.shards / "train-00000.tar").write_bytes(mutate(self.tar, rng))
        verify(self.shards)
        examine(str(self.shards), True, (), "train-00000.tar")

    def sample_bytes(self, rng: Rng) -> None:
        """Arrays and JSON that agree with every checksum but were made by somebody else."""
        good = self.sample if rng.random() < 0.5 else self.latent
        members = dict(good.members)
        kind = int(rng.integers(5))
        if kind == 0:
            members["npy.zst"] = mutate(members["npy.zst"], rng)
        elif kind == 1:
            members["npy.zst"] = zstandard.compress(mutate(zstandard.decompress(members["npy.zst"]), rng))
        elif kind == 2:
            members["npy.zst"] = zstandard.compress(bytes(1 << int(rng.integers(8, 27))))
        elif kind == 3:
            members["json"] = mutate(members["json"], rng)
        else:
            members["json"] = json.dumps(mutate_tree(json.loads(members["json"]), rng)).encode("utf-8", "surrogatepass")
        self._verify(
            EncodedSample(
                good.key,
                good.subject,
                good.modality,
                good.visits,
                {k: v or b"x" for k, v in members.items()},
                good.variables,
            )
        )

    def _verify(self, sample: EncodedSample) -> None:
        shutil.rmtree(self.crafted, ignore_errors=True)
        self.crafted.mkdir()
        entry = write_shard(self.crafted, "train-00000.tar", [sample])
        kind = "volume" if sample.key.count("_") == 2 else "latent"
        header = {"kind": kind, "recipe": {}, "grid": self.index["grid"], "variables": {"modality": ["T1"]}}
        write_index(self.crafted, header, {"train": [entry]})
        verify(self.crafted)
        examine(str(self.crafted), True, (), "train-00000.tar")

    def foreign_tar(self, rng: Rng) -> None:
        """Tars with links, long names, sparse and pax members."""
        buffer = io.BytesIO()
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        with tarfile.open(fileobj=buffer, mode="w", format=formats[int(rng.integers(3))]) as tar:
            for _ in range(int(rng.integers(1, 4))):
                info = tarfile.TarInfo(
                    str(rng.choice(["a" * 250, "../x.json", "/etc/x.json", "k.npy.zst", "k.json"]))[
                        : 95 if rng.random() < 0.5 else 250
                    ]
                )
                info.type = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE][int(rng.integers(4))]
                info.linkname = "/etc/passwd"
                payload = rng.bytes(int(rng.integers(0, 900)))
                info.size = len(payload) if info.type == tarfile.REGTYPE else 0
                try:
                    tar.addfile(info, io.BytesIO(payload))
                except ValueError:  # a name too long for the format
                    continue
        data = buffer.getvalue()
        (self.shards / "train-00000.tar").write_bytes(data if rng.random() < 0.3 else mutate(data, rng))
        examine(str(self.shards), True, (b"erika",), "train-00000.tar")

    def model_config(self, rng: Rng) -> None:
        if rng.random() < 0.5:
            bad = mutate(self.config, rng)
        else:
            tree = mutate_tree(json.loads(self.config), rng)
            bad = json.dumps(tree).encode("utf-8", "surrogatepass")
        (self.model / "config.json").write_bytes(bad)
        try:
            exported.load(self.model, "cpu")
        finally:
            (self.model / "config.json").write_bytes(self.config)

    def model_weights(self, rng: Rng) -> None:
        part, good = list(self.weights.items())[int(rng.integers(len(self.weights)))]
        header = int.from_bytes(good[:8], "little")
        kind = int(rng.integers(3))
        if kind == 0:
            bad = mutate(good, rng)
        elif kind == 1:
            bad = mutate(good[: 8 + header], rng) + good[8 + header :]
        else:
            text = json.dumps(mutate_tree(json.loads(good[8 : 8 + header]), rng)).encode("utf-8", "surrogatepass")
            bad = len(text).to_bytes(8, "little") + text + good[8 + header :]
        (self.model / part / exported.WEIGHTS).write_bytes(bad)
        try:
            exported.load(self.model, "cpu")
        finally:
            (self.model / part / exported.WEIGHTS).write_bytes(good)


def verify(folder: Path) -> None:
    """``verify_all`` without its progress bar."""
    index = load_index(str(folder))
    for entries in index.splits.values():
        for shard in entries:
            verify_shard(index, shard)


KINDS: tuple[Callable[[Cases, Rng], None], ...] = (
    Cases.image, Cases.pair, Cases.scanned, Cases.manifest_table, Cases.index_tree, Cases.index_bytes, Cases.tar_bytes,
    Cases.sample_bytes, Cases.foreign_tar, Cases.model_config, Cases.model_weights, Cases.features_file, Cases.checkpoint,
    Cases.components, Cases.image_table, Cases.probed,
)  # fmt: skip


def limit_memory() -> None:
    """No more than LIMIT_BYTES beyond what this process has mapped by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def alarm(number: int, frame: object) -> None:
    raise TimeoutError(f"over {ALARM_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, alarm)
    refused, wrong = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        limit_memory()
        for number in range(args.first, args.first + args.count):
            rng = np.random.default_rng([args.seed, number])
            kind = KINDS[number % len(KINDS)]
            signal.alarm(ALARM_S)
            try:
                with np.errstate(all="ignore"):
                    kind(cases, rng)
            except (G3nError, Damage) as error:
                refused += 1
                if "\n" in str(error) or len(str(error)) > 2000:
                    wrong += 1
                    print(f"case {number} ({kind.__name__}): its error is no line: {str(error)[:200]!r}")
            except Exception as error:
                wrong += 1
                print(f"case {number} ({kind.__name__}): {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.alarm(0)
    print(f"{args.count} cases, {refused} refused, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
