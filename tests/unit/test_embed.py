"""``g3n embed``: the right features beside the right people, whatever the batch, after a kill, and without names."""

from __future__ import annotations

import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from data_prep.shards import write_index, write_split
from g3n import cli, embed
from g3n.config import G3nError
from g3n.embed import Images
from g3n.encoders import choose
from g3n.evaluate import feature_map
from g3n.features import Features, read_features
from g3n.latent import open_encoder
from g3n.names import hash_label, read_key
from g3n.stream.decode import read_latent_sample, read_volume_sample
from g3n.stream.index import load_index
from tests import nano, shards, untrained


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.chain(tmp_path_factory.mktemp("chain"), 4, 2)


@pytest.fixture(scope="module")
def found(root: Path) -> Features:
    """Of all 12 volumes, by batches of 5 across shards of 2."""
    embed.embed(str(root / "runs/decoder"), str(root / "shards"), root / "out/f.parquet", "cpu", 5)
    return read_features(root / "out/f.parquet")


def test_each_scan_has_its_own_features_and_variables(root: Path, found: Features) -> None:
    index = load_index(str(root / "shards"))
    encoder = open_encoder(root / "runs/mae")[0]
    assert len(found) == 12
    assert found.table["split"].value_counts().to_dict() == {"train": 8, "val": 4}
    rows = found.table.set_index("key")
    for split, members in index.splits.items():
        for shard in members:
            for sample in shard.samples:
                volume = read_volume_sample(index, shard, sample)
                row, at = rows.loc[sample.key], rows.index.get_loc(sample.key)
                assert (row["split"], row["subject"]) == (split, f"sub-{sample.subject}")
                assert (row["age_years"], row["sex"]) == (volume.variables["age_years"], volume.variables["sex"])
                assert row["session"] == sample.key.split("_ses-")[1][:2]
                x = torch.from_numpy(volume.voxels)[None]
                z = encoder(
                    x, torch.tensor([volume.brain_mean]).float(), torch.tensor([1 / volume.brain_std]).float(), cls=True
                )
                np.testing.assert_allclose(found.array("cls")[at], z[0, 0].numpy(), atol=2e-6)
                np.testing.assert_allclose(found.array("mean")[at], z[0, 1:].mean(0).numpy(), atol=2e-6)


def test_latent_is_the_mean_of_what_data_prep_encodes(root: Path, found: Features) -> None:
    index = load_index(str(root / "latents"))
    rows = {key: i for i, key in enumerate(found.table["key"])}
    for shard in index.shards("val"):
        for sample in shard.samples:
            for visit, tokens in enumerate(read_latent_sample(index, shard, sample).tokens, 1):
                at = rows[f"sub-{sample.subject}_ses-{visit:02d}_T1"]
                np.testing.assert_allclose(found.array("latent")[at], tokens.astype(np.float32).mean(0), atol=2e-3)


def test_the_batch_changes_nothing(root: Path, found: Features, tmp_path: Path) -> None:
    embed.embed(str(root / "runs/decoder"), str(root / "shards"), tmp_path / "f.parquet", "cpu", 1, flat=True)
    one = read_features(tmp_path / "f.parquet")
    pd.testing.assert_frame_equal(one.table, found.table)
    for kind in found.arrays:
        np.testing.assert_allclose(one.array(kind), found.array(kind), atol=2e-6)
    np.testing.assert_allclose(one.array("latent_tokens").reshape(12, 8, 4).mean(1), one.array("latent"), atol=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Sizes of the batches that the encoder sees; a kill after some."""
    seen: list[int] = []
    real = choose.open_encoder_of

    def opened(*given, **more):
        encoder = real(*given, **more)

        def features(scans):
            if stop_after is not None and sum(seen) >= stop_after:
                raise KeyboardInterrupt
            seen.append(len(scans.volume_BXYZ))
            return encoder.features(scans)

        return replace(encoder, features=features)

    monkeypatch.setattr(embed, "open_encoder_of", opened)
    return seen


def test_a_killed_call_goes_on_where_it_stopped(root, found, tmp_path, monkeypatch) -> None:
    output, given = tmp_path / "f.parquet", (str(root / "runs/decoder"), str(root / "shards"))
    with monkeypatch.context() as patch:
        counted(patch, stop_after=6)
        with pytest.raises(KeyboardInterrupt):
            embed.embed(*given, output, "cpu", 3)
    assert not output.exists()
    assert (
        len(list((tmp_path / "f.parts").glob("*.parquet"))) == 1
    )  # of batches of 3 over shards of 2, one was put away
    with pytest.raises(G3nError, match="parts of another encoder or input"):
        embed.embed(str(root / "runs/mae"), given[1], output, "cpu", 3)
    seen = counted(monkeypatch)
    embed.embed(*given, output, "cpu", 8)
    assert sum(seen) == 12 - 2
    assert not (tmp_path / "f.parts").exists()
    pd.testing.assert_frame_equal(read_features(output).table, found.table)
    for kind in found.arrays:
        np.testing.assert_allclose(read_features(output).array(kind), found.array(kind), atol=2e-6)
    seen.clear()
    assert embed.embed(*given, output, "cpu").rows == 12  # there already
    assert not seen
    with pytest.raises(G3nError, match=r"holds other features \(its encoder, fingerprint differs\)"):
        embed.embed(str(root / "runs/mae"), given[1], output, "cpu")


def test_damaged_scans_are_left_out_and_named(root: Path, tmp_path: Path, found: Features) -> None:
    shutil.copytree(root / "shards", tmp_path / "shards")
    index = load_index(str(tmp_path / "shards"))
    shards.flip(index, "train", 1, 0)
    done = embed.embed(str(root / "runs/mae"), str(tmp_path / "shards"), tmp_path / "f.parquet", "cpu", 4)
    bad = index.shards("train")[1].samples[0].key
    assert [key for key, _ in done.left_out] == [bad]
    assert "checksum" in done.left_out[0][1]
    left = read_features(tmp_path / "f.parquet")
    assert left.table["key"].tolist() == [key for key in found.table["key"] if key != bad]
    kept = found.table["key"].to_numpy() != bad
    np.testing.assert_allclose(left.array("cls"), found.array("cls")[kept], atol=2e-6)
    assert left.about["left_out"][0][0] == bad
    for shard in index.splits["train"] + index.splits["val"]:
        (tmp_path / "shards" / shard.name).unlink()
    with pytest.raises(G3nError, match="none of the 12 scans can be encoded"):
        embed.embed(str(root / "runs/mae"), str(tmp_path / "shards"), tmp_path / "g.parquet", "cpu")


def test_phenotypes_and_families_come_along(tmp_path: Path) -> None:
    samples = [shards.volume_sample(i) for i in range(4)]
    samples[1] = replace(samples[1], meta={**samples[1].meta, "phenotypes": {"mmse": 28}, "group": "f" * 16})
    shards.write(tmp_path / "shards", "volume", train=[samples])
    embed.embed("voxel-pca", str(tmp_path / "shards"), tmp_path / "f.parquet", "cpu")
    table = read_features(tmp_path / "f.parquet").table
    assert table["mmse"].fillna(-1).tolist() == [-1, 28, -1, -1]
    assert table["group"].tolist() == [*table["subject"][:1], f"sub-{'f' * 16}", *table["subject"][2:]]
    assert table["days_from_baseline"].tolist() == [0] * 4


def test_voxel_pca_is_fitted_on_the_train_split_alone(root: Path, tmp_path: Path) -> None:
    embed.embed("voxel-pca", str(root / "shards"), tmp_path / "pca.parquet", "cpu", 3)
    got = read_features(tmp_path / "pca.parquet")
    index = load_index(str(root / "shards"))
    z = {"train": [], "val": []}
    for split, rows in z.items():
        for shard in index.shards(split):
            for sample in shard.samples:
                v = read_volume_sample(index, shard, sample)
                rows.append(np.where(v.voxels == 0, 0, (v.voxels - v.brain_mean) / v.brain_std).ravel())
    pca = PCA(7, svd_solver="full").fit(np.stack(z["train"]))
    expected = pca.transform(np.stack(z["val"]))
    signs = np.sign((got.array("pca")[got.table["split"] == "val"] * expected).sum(0))
    np.testing.assert_allclose(got.array("pca")[got.table["split"] == "val"] * signs, expected, atol=1e-2)
    again = embed.embed(
        f"voxel-pca:{tmp_path / 'pca.pca.safetensors'}", str(root / "shards"), tmp_path / "b.parquet", "cpu"
    )
    assert again.encoder.fingerprint == got.about["fingerprint"]
    with pytest.raises(G3nError, match="give --shards, or voxel-pca:FILE"):
        embed.embed("voxel-pca", Images(tmp_path), tmp_path / "c.parquet", "cpu")


def test_shards_on_another_grid_are_brought_to_the_encoders(root: Path, tmp_path: Path) -> None:
    """The same scans with axes to R, A, S."""
    embed.embed("voxel-pca", str(root / "shards"), tmp_path / "a.parquet", "cpu")
    flipped = []
    for subject in range(2):
        rng = np.random.default_rng(0)
        sample = [nano.packed(s, visit, rng) for s in range(subject + 1) for visit in (1, 2)][-1]
        flipped.append(replace(sample, array=np.ascontiguousarray(sample.array[::-1, ::-1])))
    affine = [[1.0, 0, 0, -7], [0, 1.0, 0, -7], [0, 0, 1.0, -8], [0, 0, 0, 1]]
    header = {
        "kind": "volume",
        "recipe": {},
        "grid": {"shape": list(nano.SHAPE), "affine": affine},
        "variables": nano.VARIABLES,
    }
    (tmp_path / "ras").mkdir()
    write_index(tmp_path / "ras", header, {"test": write_split(tmp_path / "ras", "test", [flipped])})
    pca = f"voxel-pca:{tmp_path / 'a.pca.safetensors'}"
    embed.embed(pca, str(tmp_path / "ras"), tmp_path / "b.parquet", "cpu")
    first, second = (read_features(tmp_path / f"{name}.parquet") for name in "ab")
    rows = first.table.set_index("key").index.get_indexer(second.table["key"])
    assert (rows >= 0).all()
    np.testing.assert_allclose(second.array("pca"), first.array("pca")[rows], atol=2e-3)
    assert second.about["grid_mm"] == [16, 16, 16, 1.0, 1.0, 1.0]


@pytest.fixture
def images(root: Path, tmp_path: Path) -> Path:
    """The first two subjects of the shards as BIDS files, one of them in RAS."""
    index = load_index(str(root / "shards"))
    folder = tmp_path / "bids"
    for subject, shard in zip(("ERIKA1", "MUSTER2"), index.shards("train"), strict=False):
        for sample, session in zip(shard.samples, ("20190312", "20210101"), strict=True):
            image = nib.Nifti1Image(read_volume_sample(index, shard, sample).voxels, np.array(nano.AFFINE))
            image = nib.as_closest_canonical(image) if subject == "ERIKA1" else image
            path = folder / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            nib.save(image, path)
            nib.save(image, path.with_name(path.name.replace("T1w", "desc-brain_mask")))
    (folder / "participants.tsv").write_text(
        "participant_id\tage\tsex\tsource_id\tscan_date\tmmse\tremark\tsite\nsub-ERIKA1\t61.5\tF\tEM-1\t2019\tn/a\tof Erika\tA\nsub-MUSTER2\t44\tM\tX\t2020\t29\tother\tA\n"
    )
    return folder


def test_files_give_the_features_of_their_shards_without_names(root, found, images, tmp_path) -> None:
    output = tmp_path / "out/f.parquet"
    done = embed.embed(str(root / "runs/decoder"), Images(images), output, "cpu", 3)
    assert (done.rows, done.left_out) == (4, ())
    got = read_features(output)
    for kind in ("mean", "cls", "latent"):
        expected = found.array(kind)[(found.table["split"] == "train").to_numpy()][:4]
        np.testing.assert_allclose(got.array(kind), expected, atol=1e-4)
    secret = read_key(output.parent / "subjects.key", output)
    assert got.table["subject"].tolist() == [
        f"sub-{hash_label(s, secret)}" for s in ("ERIKA1", "ERIKA1", "MUSTER2", "MUSTER2")
    ]
    assert got.table["session"].tolist() == ["01", "02"] * 2
    assert got.table["age_years"].tolist() == [61.5, 61.5, 44.0, 44.0]
    assert got.table["mmse"].fillna(-1).tolist() == [-1, -1, 29, 29]
    assert set(got.table["modality"]) == {"T1"}
    assert (set(got.table["sex"]), set(got.table["site"])) == ({"F", "M"}, {"A"})
    brain_ml = [np.count_nonzero(nib.load(p).get_fdata()) / 1000 for p in sorted(images.rglob("*T1w.nii.gz"))]
    np.testing.assert_allclose(got.table["foreground_ml"], brain_ml, atol=0.051)
    written = output.read_bytes() + str(got.table.to_dict()).encode() + str(got.about).encode()
    assert not any(word in written for word in (b"ERIKA", b"MUSTER", b"20190312", b"EM-1", b"scan_date", b"Erika"))
    names = pd.read_csv(output.with_suffix(".names.tsv"), sep="\t")
    assert names["key"].tolist() == got.table["key"].tolist()
    assert names["subject"].tolist() == ["ERIKA1", "ERIKA1", "MUSTER2", "MUSTER2"]


def test_what_sessions_say_of_a_visit_comes_before_what_participants_say(
    root: Path, images: Path, tmp_path: Path
) -> None:
    (images / "sub-ERIKA1/sub-ERIKA1_sessions.tsv").write_text(
        "session_id\tage\tacq_time\tcdr_global\nses-20190312\t60.5\t2019-03-12\t0\nses-20210101\t62.3\t2021-01-01\t0.5\n"
    )
    embed.embed(str(root / "runs/mae"), Images(images), tmp_path / "a.parquet", "cpu")
    table = read_features(tmp_path / "a.parquet").table
    assert table["age_years"].tolist() == [60.5, 62.3, 44, 44]
    assert table["cdr_global"].fillna(-1).tolist() == [0, 0.5, -1, -1]
    assert (set(table["sex"]), "acq_time" in table) == ({"F", "M"}, False)
    (images / "sessions.tsv").write_text(
        "participant_id\tsession_id\tage\nsub-ERIKA1\tses-20190312\t1\nsub-MUSTER2\tses-20210101\t46.5\n"
    )
    embed.embed(str(root / "runs/mae"), Images(images), tmp_path / "b.parquet", "cpu")
    assert read_features(tmp_path / "b.parquet").table["age_years"].tolist() == [60.5, 62.3, 44, 46.5]
    (images / "sessions.tsv").write_text("session_id\tage\nses-20190312\t1\n")
    with pytest.raises(G3nError, match="needs session_id and participant_id"):
        embed.embed(str(root / "runs/mae"), Images(images), tmp_path / "c.parquet", "cpu")


def test_names_can_be_kept_and_a_table_can_say_what_to_read(root, images, tmp_path) -> None:
    encoder = str(root / "runs/mae")
    embed.embed(encoder, Images(images, keep_names=True), tmp_path / "a.parquet", "cpu")
    table = read_features(tmp_path / "a.parquet").table
    assert table["subject"].tolist()[0] == "sub-ERIKA1"
    assert table["key"].tolist()[0] == "sub-ERIKA1/ses-20190312/anat/sub-ERIKA1_ses-20190312_T1w.nii.gz"
    assert table["source_id"].tolist()[0] == "EM-1"
    assert not (tmp_path / "a.names.tsv").exists()
    rows = [
        (table["key"][3], "b", "02", "FLAIR", 44, "fam", "val"),
        (table["key"][0], "a", "01", "T1", 61, "fam", "train"),
    ]
    manifest = tmp_path / "manifest.tsv"
    columns = ["path", "subject", "session", "modality", "age_years", "group", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(manifest, sep="\t", index=False)
    manifest.with_suffix(".json").write_text(f'{{"root": "{images}"}}')
    embed.embed(encoder, Images(manifest), tmp_path / "b.parquet", "cpu")
    other = read_features(tmp_path / "b.parquet").table
    assert other["modality"].tolist() == ["FLAIR", "T1"]
    assert other["split"].tolist() == ["val", "train"]
    assert other["group"].nunique() == 1
    assert "fam" not in other["group"][0]
    with pytest.raises(G3nError, match="is a table of variables already"):
        embed.embed(encoder, Images(manifest, manifest), tmp_path / "c.parquet", "cpu")


def test_wrong_inputs_are_named(root: Path, images: Path, tmp_path: Path) -> None:
    encoder, output = str(root / "runs/mae"), tmp_path / "f.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.tsv").write_text("participant_id\tage\nsub-NOBODY\t3\n")
    (tmp_path / "twice.tsv").write_text("participant_id\tage\nsub-ERIKA1\t3\nsub-ERIKA1\t4\n")
    (tmp_path / "long.tsv").write_text("participant_id\tage\nsub-ERIKA1\t3\t4\n")
    (tmp_path / "keyless.tsv").write_text("age\n3\n")
    (tmp_path / "none.tsv").write_text("path\nnone.nii.gz\n")
    for inputs, message in (
        (Images(tmp_path / "empty"), "has no .nii or .nii.gz"),
        (Images(tmp_path / "missing"), "do not exist"),
        (Images(images, tmp_path / "v.tsv"), "none of the participant_id .* is that of a scan, such as 'ERIKA1'"),
        (Images(images, tmp_path / "twice.tsv"), "has participant_id 'ERIKA1' in two rows"),
        (Images(images, tmp_path / "keyless.tsv"), "no column path, participant_id or subject"),
        (Images(images, tmp_path / "long.tsv"), "long.tsv' cannot be read .*Length of header"),
        (Images(tmp_path / "keyless.tsv"), "needs a column 'path'"),
        (
            Images(tmp_path / "none.tsv"),
            "none of the 1 scans can be encoded; the first: '.*none.nii.gz' cannot be read",
        ),
        (str(root / "latents"), "hold latents, expected volumes"),
    ):
        with pytest.raises(G3nError, match=message):
            embed.embed(encoder, inputs, output, "cpu")
    with pytest.raises(G3nError, match=r"must end in .parquet"):
        embed.embed(encoder, str(root / "shards"), tmp_path / "f.csv", "cpu")


def test_command_line(root: Path, images: Path, tmp_path: Path) -> None:
    next(images.rglob("sub-MUSTER2*T1w.nii.gz")).write_bytes(b"cut")
    words = ["embed", "--encoder", str(root / "runs/decoder"), "--images", str(images), "--device", "cpu", "--no-umap"]
    done = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "o/f.parquet")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "3 scans in " in done.output
    assert "mean [48], cls [48], latent [4]" in done.output
    assert "1 scans left out:" in done.output
    assert (tmp_path / "o/f.png").stat().st_size > 10_000
    assert "MUSTER" not in str(read_features(tmp_path / "o/f.parquet").about)
    with pytest.raises(G3nError, match="either --shards or --images"):
        CliRunner().invoke(cli.app, [*words, "--shards", "x", "--output", "f.parquet"], catch_exceptions=False)


def test_principal_components_are_those_of_the_correlation_matrix() -> None:
    x = np.random.default_rng(0).standard_normal((40, 6)) @ np.diag([1, 2, 3, 50, 5, 6]) + 7
    x[:, 1] += x[:, 0] * 3
    scores, shares = feature_map.principal(x.astype(np.float32))
    values, vectors = np.linalg.eigh(np.corrcoef(x.T))
    np.testing.assert_allclose(shares, values[::-1] / 6, atol=1e-5)
    z = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(np.abs(scores), np.abs(z @ vectors[:, ::-1]), atol=1e-4)


def test_umap_has_a_fixed_seed_and_is_asked_for_by_name(found: Features, tmp_path: Path, monkeypatch) -> None:
    asked = {}

    class UMAP:
        def __init__(self, **given) -> None:
            asked.update(given)

        def fit_transform(self, x):
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP, __spec__=types.SimpleNamespace()))
    assert feature_map.write_feature_map(found, tmp_path / "m.png", umap=True) == ["PCA", "UMAP"]
    assert asked["random_state"] == 0
    assert feature_map.write_feature_map(found, tmp_path / "m.png", umap=False) == ["PCA"]
    monkeypatch.setattr(feature_map.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(G3nError, match="umap-learn"):
        feature_map.write_feature_map(found, tmp_path / "m.png", umap=True)
