"""DICOM series through dcm2niix: the folders stay, the voxels too, one bad folder does not stop the rest."""

from __future__ import annotations

import datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep import dicom
from data_prep.loose import scan_loose
from data_prep.manifest import read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from g3n.nifti import read_volume

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (pip install 'g3n[dev]')")


def write_series(folder: Path, description: str, voxels: np.ndarray, number: int = 1) -> None:
    """Axial slices of 1.5 x 1.5 x 2 mm with a patient's name in every place for one."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series, study = generate_uid(), generate_uid()
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        image.PatientName, image.PatientID, image.PatientBirthDate = "Mustermann^Erika", "MRN20931", "19610405"
        image.Modality, image.Manufacturer, image.MagneticFieldStrength = "MR", "SIEMENS", "3"
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, study
        image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = number, k + 1, 1
        image.SeriesDescription = image.ProtocolName = description
        image.StudyDate = image.SeriesDate = image.AcquisitionDate = datetime.date(2020, 5, 4).strftime("%Y%m%d")
        image.StudyTime = image.SeriesTime = image.AcquisitionTime = "101112"
        image.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        image.ScanningSequence, image.SequenceVariant, image.MRAcquisitionType = "GR", "SP", "3D"
        image.EchoTime, image.RepetitionTime, image.FlipAngle = "3", "2300", "9"
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Rows, image.Columns = voxels.shape[1], voxels.shape[0]
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.PixelSpacing, image.SliceThickness, image.SpacingBetweenSlices = [1.5, 1.5], "2", "2"
        image.ImageOrientationPatient, image.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-30.0, -40.0, 2.0 * k]
        image.SliceLocation = str(2.0 * k)
        image.PixelData = np.ascontiguousarray(voxels[:, :, k].T.astype("<u2")).tobytes()
        image.save_as(folder / f"IM{k:04d}", enforce_file_format=True)


@pytest.fixture
def tool() -> str:
    try:
        return dicom.find_dcm2niix()
    except G3nError:
        pytest.skip("needs dcm2niix (pip install 'g3n[dicom]')")


def test_series_become_nifti_and_scans(tool: str, tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    voxels = np.random.default_rng(0).integers(1, 900, (40, 48, 12))
    write_series(root / "3001/T1-anatomical/2020-05-01_10_00_00.0/I1", "MPRAGE GRAPPA", voxels)
    write_series(root / "3001/FLAIR/2020-05-01_10_00_00.0/I2", "T2 FLAIR", voxels + 7, 2)
    bad = root / "3002/T1/2020-06-01_10_00_00.0/I3"
    bad.mkdir(parents=True)
    (bad / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    (root / "3002/notes.txt").write_text("no image")
    done, failed = dicom.convert(root, out, workers=1)
    assert done == 2
    assert [folder for folder, _ in failed] == ["3002/T1/2020-06-01_10_00_00.0/I3"]
    assert "dcm2niix ended" in (out / "failures.tsv").read_text()
    [image] = (out / "3001/T1-anatomical").rglob("*.nii.gz")
    volume, affine = read_volume(image)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))
    np.testing.assert_array_equal(nib.orientations.apply_orientation(volume, turn), voxels)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (1.5, 1.5, 2))
    sidecars = b"".join(p.read_bytes() for p in out.rglob("*.json"))
    assert b"Mustermann" not in sidecars
    assert b"19610405" not in sidecars
    scan_loose(out, tmp_path / "m.tsv", Shares(0, 0, 0))
    rows = [(s.subject, s.modality, s.field_strength_t) for s in read_manifest(tmp_path / "m.tsv").scans]
    assert rows == [("3001", "FLAIR", 3), ("3001", "T1", 3)]


def test_again_converts_only_what_is_missing(tool: str, tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    voxels = np.ones((16, 16, 4), int) * 5
    write_series(root / "a/T1", "T1", voxels)
    write_series(root / "b/T1", "T1", voxels)
    dicom.convert(root, out, workers=1)
    [kept], [lost] = (list((out / s).rglob("*.nii.gz")) for s in "ab")
    before = kept.stat().st_mtime_ns
    (out / "b/T1/.converted").unlink()
    lost.unlink()
    assert dicom.convert(root, out, workers=1) == (2, [])
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == before


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(dicom.shutil, "which", lambda name: "/bin/true")
    for root, output, words in (
        (tmp_path / "none", tmp_path / "o", "does not exist"),
        (tmp_path / "in", tmp_path / "o", "no DICOM file"),
        (tmp_path / "in", tmp_path / "in/o", "lies inside"),
    ):
        with pytest.raises(G3nError, match=words):
            dicom.convert(root, output)
    monkeypatch.setattr(dicom.shutil, "which", lambda name: None)
    monkeypatch.setattr(dicom.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError()))
    with pytest.raises(G3nError, match=r"pip install 'g3n\[dicom\]'"):
        dicom.find_dcm2niix()
