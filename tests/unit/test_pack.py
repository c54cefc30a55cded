"""pack: what goes in comes out, the same bytes each time, and nobody's name."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import webdataset
import xxhash
import zstandard

from data_prep.bids import scan_bids
from data_prep.manifest import read_manifest, write_manifest
from data_prep.pack import Packing, choose, crop_grid, crop_volume, pack_all, quantize
from data_prep.preprocess import preprocess_all, refuse_labels
from data_prep.recipe import Recipe
from data_prep.scan import Shares
from g3n.config import G3nError
from g3n.names import hash_label, read_key
from g3n.nifti import Grid, read_volume
from g3n.stream.decode import Damage, read_volume_sample
from g3n.stream.index import load_index

RECIPE = Recipe((10, 12, 10), 16.0)
SECRETS = ("Mustermann", "MRN20931", "Erika", "1961-04-05", "KlinikSued")


def make_bids(root: Path, subjects: int) -> None:
    """Subjects with names wherever names get into BIDS folders."""
    rng = np.random.default_rng(0)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = np.array([0, -22.1, 9.5]) - 8 * np.array([19, 23, 19]) / 2
    rows = ["participant_id\tname\tmrn\tage\tsex\tdiagnosis\tcohort"]
    for i in range(subjects):
        label = f"Mustermann{i:02d}"
        rows.append(f"sub-{label}\tErika Mustermann\tMRN20931\t{30 + i}\t{'FM'[i % 2]}\tHC\tX{i % 3}")
        lines = ["session_id\tdays\tbirth"]
        for v in range(1 + i % 3):
            lines.append(f"ses-KlinikSued{v}\t{100 * v}\t1961-04-05")
            for suffix in ("T1w", "FLAIR")[: 1 + i % 2]:
                volume = np.zeros((20, 24, 20), np.float32)
                volume[3:-3, 3:-3, 3:-3] = rng.gamma(9, 100, (14, 18, 14))
                image = nib.Nifti1Image(volume, affine)
                image.header["descrip"] = b"Mustermann, Erika"
                image.header["db_name"] = b"MRN20931"
                image.header["aux_file"] = b"KlinikSued"
                path = root / f"sub-{label}/ses-KlinikSued{v}/anat/sub-{label}_ses-KlinikSued{v}_{suffix}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(image, path)
                sidecar = {"PatientName": "Mustermann^Erika", "PatientID": "MRN20931", "MagneticFieldStrength": 3}
                path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))
        (root / f"sub-{label}/sub-{label}_sessions.tsv").write_text("\n".join(lines) + "\n")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Mustermann_pack")
    make_bids(folder / "bids", 20)
    scan_bids(folder / "bids", folder / "manifest.tsv", Shares(0.2, 0.1, 0))
    (folder / "subjects.key").write_text("ab" * 32 + "\n")
    preprocess_all(folder / "manifest.tsv", folder / "derivatives", RECIPE, workers=1)
    pack(folder, folder / "shards")
    return folder


def pack(work: Path, output: Path, workers: int = 1, **more: object) -> dict:
    packing = Packing(allow_faces=True, **more)  # type: ignore[arg-type]
    return pack_all(work / "derivatives/manifest.tsv", output, packing, workers)[0]


def test_round_trip(work: Path) -> None:
    index = load_index(str(work / "shards"))
    scans = read_manifest(work / "derivatives/manifest.tsv").scans
    assert index.kind == "volume"
    assert index.grid == RECIPE.grid
    assert index.variables["modality"] == ["T1", "FLAIR"]
    assert index.variables["age_years"] == [30, 49.27]
    assert index.variables["cohort"] == ["X0", "X1", "X2"]
    assert index.variables["field_strength_t"] == [3, 3]
    key = bytes.fromhex("ab" * 32)
    labels = {hash_label(s.subject, key) for s in read_manifest(work / "manifest.tsv").scans}
    assert {s.subject for s in scans} == labels
    by_key = {f"sub-{s.subject}_ses-{s.session}_{s.modality}": s for s in scans}
    found = 0
    for split, shards in index.splits.items():
        for shard in shards:
            assert xxhash.xxh3_64_hexdigest((work / "shards" / shard.name).read_bytes()) == shard.xxh3
            for sample in shard.samples:
                scan = by_key.pop(sample.key)
                volume = read_volume_sample(index, shard, sample)
                raw, _ = read_volume(work / "derivatives" / scan.path)
                assert scan.split == split
                np.testing.assert_allclose(volume.voxels * volume.scale, raw, atol=0.51 * volume.scale)
                assert meta_of(work / "shards" / shard.name, sample)["max_error"] <= 0.51 * volume.scale
                np.testing.assert_array_equal(volume.voxels == 0, raw == 0)
                inside = volume.voxels[volume.voxels != 0].astype(float)
                assert volume.brain_mean == pytest.approx(inside.mean())
                assert volume.brain_std == pytest.approx(inside.std())
                assert volume.variables == scan.variables
                assert volume.days_from_baseline == scan.days_from_baseline
                found += 1
    assert not by_key
    assert found == len(scans)


def meta_of(shard: Path, sample) -> dict:  # type: ignore[no-untyped-def,type-arg]
    offset, size = sample.members["json"]
    return dict(json.loads(shard.read_bytes()[offset : offset + size]))


def test_subjects_stay_whole_and_shards_are_many(work: Path) -> None:
    index = load_index(str(work / "shards"))
    shards_of = defaultdict(set)
    for split, shards in index.splits.items():
        for shard in shards:
            for sample in shard.samples:
                shards_of[sample.subject].add((split, shard.name))
    assert len(shards_of) == 20
    assert all(len(places) == 1 for places in shards_of.values())
    subjects = {s.subject for s in read_manifest(work / "derivatives/manifest.tsv").scans if s.split == "train"}
    assert len(index.splits["train"]) == min(16, len(subjects))


def test_same_bytes_each_time(work: Path, tmp_path: Path) -> None:
    pack(work, tmp_path / "b", workers=2)
    names = sorted(p.name for p in (work / "shards").iterdir())
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (work / "shards" / name).read_bytes()
    with tarfile.open(work / "shards/train-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    pack(work, tmp_path / "c", seed=1)
    first, other = (load_index(str(p)) for p in (work / "shards", tmp_path / "c"))
    assert [s.subject for s in first.splits["train"][0].samples] != [
        s.subject for s in other.splits["train"][0].samples
    ]
    assert first.fingerprint == other.fingerprint  # the same samples, laid out in another order


def test_no_identity_in_the_shards(work: Path) -> None:
    """Names stand in the labels, tables, headers, sidecars and paths of the source: not one gets into the shards."""
    secrets = [s.lower() for s in SECRETS] + [str(work.resolve()).lower()]
    assert any("mustermann" in p.name.lower() for p in (work / "bids").iterdir())
    checked = 0
    for path in (work / "shards").iterdir():
        blobs = [path.name.encode(), path.read_bytes()]
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    payload = tar.extractfile(member).read()  # type: ignore[union-attr]
                    blobs.append(zstandard.decompress(payload) if member.name.endswith(".zst") else payload)
        for blob in blobs:
            checked += 1
            assert not [s for s in secrets if s.encode() in blob.lower()]
    assert checked > 60


def test_hashes_need_the_key(work: Path, tmp_path: Path) -> None:
    key = read_key(tmp_path / "new.key", tmp_path / "out")
    assert ((tmp_path / "new.key").stat().st_mode & 0o777) == 0o600
    assert read_key(tmp_path / "new.key", tmp_path / "out") == key
    assert hash_label("Mustermann00", key) != hash_label("Mustermann00", bytes.fromhex("ab" * 32))
    with pytest.raises(G3nError, match="inside the output"):
        read_key(tmp_path / "c" / "k", tmp_path / "c")
    (tmp_path / "bad.key").write_text("short")
    with pytest.raises(G3nError, match="damaged"):
        read_key(tmp_path / "bad.key", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert ((work / "subjects.tsv").stat().st_mode & 0o777) == 0o600


def test_labels_and_raw_manifests_are_refused(work: Path, tmp_path: Path) -> None:
    scans = list(read_manifest(work / "manifest.tsv").scans)
    refuse_labels(scans)
    with pytest.raises(G3nError, match="contains the subject label"):
        refuse_labels([*scans, replace(scans[0], diagnosis="HC (see Mustermann03)")])
    shutil.copytree(work / "derivatives", tmp_path / "d")
    text = (tmp_path / "d/manifest.tsv").read_text()
    (tmp_path / "d/manifest.tsv").write_text(
        text.replace(read_manifest(tmp_path / "d/manifest.tsv").scans[0].subject, "Erika")
    )
    with pytest.raises(G3nError, match="not a hash"):
        pack_all(tmp_path / "d/manifest.tsv", tmp_path / "s")


def test_flagged_scans_stay_out_unless_allowed(work: Path, tmp_path: Path) -> None:
    scans = list(read_manifest(work / "derivatives/manifest.tsv").scans)
    with pytest.raises(G3nError, match=f"nothing to pack: {len(scans)} skull"):
        pack_all(work / "derivatives/manifest.tsv", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    mixed = [
        replace(scans[0], flag="spacing,overlap"),
        replace(scans[1], flag=None),
        replace(scans[2], flag="skull,overlap"),
    ]
    assert choose(mixed, Packing()) == ([mixed[1]], {"overlap": 2, "skull": 1, "spacing": 1})
    assert choose(mixed, Packing(allowed_flags=("spacing", "overlap", "skull")))[0] == mixed[:2]
    assert choose(mixed, Packing(allow_faces=True, allowed_flags=("overlap",)))[0] == mixed[1:]
    open_one = replace(mixed[1], license="open")
    assert choose([open_one, mixed[1]], Packing(commercial=True)) == ([open_one], {"license": 1})
    refused = replace(open_one, phenotypes={"commercial_use": "no"})
    assert choose([refused], Packing(commercial=True))[0] == []


def test_published_crop() -> None:
    """240x240x155 -> 160x192x160: x 40 and y 24 off each side, z 2 below and 3 above; world places stay."""
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix[:3, 3] = (119.5, 102.5, -72)
    grid = Grid((240, 240, 155), tuple(map(tuple, matrix.tolist())))
    volume = np.arange(240 * 240 * 155, dtype=np.int32).reshape(240, 240, 155)
    cropped, new = crop_volume(volume, (160, 192, 160)), crop_grid(grid, (160, 192, 160))
    np.testing.assert_array_equal(cropped[:, :, 2:157], volume[40:200, 24:216])
    assert not cropped[:, :, :2].any()
    assert not cropped[:, :, 157:].any()
    np.testing.assert_allclose(new.matrix @ [0, 0, 2, 1], matrix @ [40, 24, 0, 1])
    assert crop_grid(grid, None) == grid


def test_phenotypes_group_and_statistics(work: Path, tmp_path: Path) -> None:
    """Phenotypes and the hashed family go into the sample; statistics are those of the train split alone."""
    shutil.copytree(work / "derivatives", tmp_path / "derivatives")
    manifest = read_manifest(tmp_path / "derivatives/manifest.tsv")
    scans = [
        replace(s, phenotypes={"mmse": 27.0, "site": "Site B"}, group="0123456789abcdef") for s in manifest.scans[:1]
    ]
    scans = [replace(s, split=manifest.scans[0].split) for s in scans] + list(manifest.scans[1:])
    write_manifest(tmp_path / "derivatives/manifest.tsv", Path(), scans, {})
    pack(tmp_path, tmp_path / "s", samples_per_shard=4)
    index = load_index(str(tmp_path / "s"))
    metas = {
        s.key: meta_of(tmp_path / "s" / shard.name, s)
        for p in index.splits.values()
        for shard in p
        for s in shard.samples
    }
    found = [m for m in metas.values() if "phenotypes" in m]
    assert [(m["phenotypes"], m["group"]) for m in found] == [({"mmse": 27.0, "site": "Site B"}, "0123456789abcdef")]
    train = [s for s in scans if s.split == "train" and s.modality == "T1"]
    voxels = [read_volume(tmp_path / "derivatives" / s.path)[0] for s in train]
    statistics = index.raw["statistics"]["T1"]
    assert statistics["scans"] == len(train)
    assert statistics["mean"] == pytest.approx(np.mean([v[v > 0].mean() for v in voxels]), rel=1e-3)
    assert index.raw["licenses"] == {"unknown": len(scans)}


def test_webdataset_reads_it(work: Path) -> None:
    index = load_index(str(work / "shards"))
    urls = [str(work / "shards" / shard.name) for shard in index.splits["train"]]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None)
    samples = list(pipeline)
    expected = [s.key for shard in index.splits["train"] for s in shard.samples]
    assert [s["__key__"] for s in samples] == expected
    for sample in samples:
        assert set(sample) >= {"npy.zst", "json"}
        array = np.load(io.BytesIO(zstandard.decompress(sample["npy.zst"])), allow_pickle=False)
        meta = json.loads(sample["json"])
        assert array.dtype == np.int16
        assert list(array.shape) == meta["shape"] == [10, 12, 10]
        assert xxhash.xxh3_64_hexdigest(array.tobytes()) == meta["xxh3"]


def test_damage_is_seen(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "shards", tmp_path / "s")
    index = load_index(str(tmp_path / "s"))
    shard = index.splits["train"][0]
    sample = shard.samples[0]
    offset, size = sample.members["npy.zst"]
    data = bytearray((tmp_path / "s" / shard.name).read_bytes())
    data[offset + size // 2] ^= 0x10
    (tmp_path / "s" / shard.name).write_bytes(data)
    with pytest.raises(Damage, match=sample.key):
        read_volume_sample(index, shard, sample)


def test_interrupted_goes_on_and_strangers_are_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_prep.pack as module

    written, original = [], module.write_shard

    def stop_after_three(output: Path, name: str, samples):  # type: ignore[no-untyped-def]
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return original(output, name, samples)

    monkeypatch.setattr(module, "write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        pack(work, tmp_path / "s")
    assert not (tmp_path / "s/index.json").exists()
    with pytest.raises(G3nError, match="no readable index"):
        load_index(str(tmp_path / "s"))
    stamps = {name: (tmp_path / "s" / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(module, "write_shard", original)
    with pytest.raises(G3nError, match="not begun by this call"):
        pack(work, tmp_path / "s", seed=5)
    pack(work, tmp_path / "s")
    assert {name: (tmp_path / "s" / name).stat().st_mtime_ns for name in written} == stamps
    for path in (work / "shards").iterdir():
        assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes()
    assert pack(work, tmp_path / "s") == json.loads((work / "shards/index.json").read_text())["splits"]
    with pytest.raises(G3nError, match="holds other shards"):
        pack(work, tmp_path / "s", seed=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    with pytest.raises(G3nError, match="not empty"):
        pack(work, tmp_path / "full")


def test_raw_or_foreign_volumes_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(G3nError, match=r"no recipe\.json"):
        pack_all(work / "manifest.tsv", tmp_path / "a")
    shutil.copytree(work / "derivatives", tmp_path / "d")
    scan = read_manifest(tmp_path / "d/manifest.tsv").scans[0]
    shutil.copy(work / "bids" / read_manifest(work / "manifest.tsv").scans[0].path, tmp_path / "d" / scan.path)
    with pytest.raises(G3nError, match="not on the grid"):
        pack_all(tmp_path / "d/manifest.tsv", tmp_path / "b", Packing(allow_faces=True), workers=1)
    assert not (tmp_path / "b/index.json").exists()


def test_quantize_keeps_detail_and_background() -> None:
    rng = np.random.default_rng(0)
    volume = np.where(rng.random((30, 30, 30)) < 0.5, rng.gamma(9, 0.01, (30, 30, 30)), 0).astype(np.float32)
    volume[3, 3, 3] = 50.0  # a spike must not eat the resolution
    volume[4, 4, 4] = 1e-7  # and a dim voxel is not background
    stored, scale, error = quantize(volume)
    inside = volume > 0
    np.testing.assert_array_equal(stored != 0, inside)
    rest = inside & (volume < 1) & (volume > 1e-6)
    assert np.abs(stored * scale - volume)[rest].max() < volume[rest].std() / 500
    assert stored.max() == 32767
    assert error == pytest.approx(50 - 32767 * scale)
    whole = np.where(inside, np.rint(volume * 1e4), 0).astype(np.float32).clip(0, 32767)
    stored, scale, error = quantize(whole)
    np.testing.assert_array_equal(stored, whole)
    assert (scale, error) == (1.0, 0.0)
