"""A missing file, a malformed row, a mask of another size: in every publisher's folder it costs its case, and is told."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hilum.bench.catalogue.tasks import TASKS
from hilum.bench.datasets import read_cases

sys.path.insert(0, str(Path(__file__).parent))
import publishers as made

sys.path.pop(0)


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def other_mask(name: str) -> Callable[[Path], object]:
    return lambda root: made.nifti(
        root / name, made.mask((1, (0, 4), (3, 9), (3, 8)), (2, (1, 2), (3, 9), (3, 8)), shape=(5, 12, 10))
    )


# (task, maker, what breaks it, the case that is lost or "" for all, what the problem says)
BROKEN: list[tuple[str, str, Callable[[Path], object], str, str]] = [
    ("curiabench-2d:A1", "TotalSegmentator", remove("TotalSegmentator/s1/ct.nii.gz"), "s1/liver", "missing"),
    (
        "curiabench-2d:A1",
        "TotalSegmentator",
        other_mask("TotalSegmentator/s2/segmentations/liver.nii.gz"),
        "s2/liver",
        "5×12×10",
    ),
    (
        "curiabench-2d:A1",
        "TotalSegmentator",
        rewrite("TotalSegmentator/meta.csv", "image_id", "name"),
        "",
        "no column image_id",
    ),
    (
        "voxelfm:TotalSegmentator",
        "TotalSegmentator",
        lambda root: None,
        "-",
        "of 117 structures have no mask in any subject",
    ),
    ("curiabench-2d:A3", "IXI", rewrite("IXI/IXI.csv", "2,1,35.8", "2,1"), "IXI002", "has 2 fields"),
    ("curiabench-2d:A3", "IXI", remove("IXI/IXI.csv"), "", "missing"),
    (
        "curiabench-2d:O1",
        "KiTS23",
        rewrite("KiTS23/dataset/kits23.json", "true", "null"),
        "case_00000",
        "malignant is None",
    ),
    (
        "curiabench-2d:O1",
        "KiTS23",
        other_mask("KiTS23/dataset/case_00001/segmentation.nii.gz"),
        "case_00001",
        "5×12×10",
    ),
    ("curiabench-2d:O2", "LUNA16", remove("LUNA16/subset0/1.3.1.raw"), "", "missing"),
    ("curiabench-2d:O2", "LUNA16", rewrite("LUNA16/LIDC-XML-only/157/158.xml", "</roi>", ""), "", "no XML"),
    (
        "curiabench-2d:O3",
        "DeepLesion",
        rewrite("DeepLesion/DL_info.csv", "2.5, 3.2, 6.1, 8.4", "2.5, x"),
        "000001_01_01/109/1",
        "malformed",
    ),
    (
        "curiabench-2d:O3",
        "DeepLesion",
        remove("DeepLesion/Images_png/000004_01_01/109.png"),
        "000004_01_01/109/4",
        "missing",
    ),
    (
        "curiabench-3d:O4",
        "TCGA-KIRC",
        rewrite("TCGA-KIRC/clinical.tsv", "days_to_death", "death"),
        "",
        "no column days_to_death",
    ),
    (
        "curiabench-2d:M3",
        "RSNA-Lumbar",
        remove("RSNA-Lumbar/train_images/11/5/2.dcm"),
        "11/spinal_canal_stenosis_l1_l2",
        "missing",
    ),
    (
        "curiabench-2d:M3",
        "RSNA-Lumbar",
        rewrite("RSNA-Lumbar/train_label_coordinates.csv", "30.0,20.0", "300.0,20.0"),
        "11/spinal_canal_stenosis_l1_l2",
        "outside",
    ),
    (
        "curiabench-3d:M4",
        "KneeMRI",
        rewrite("KneeMRI/metadata.csv", "0,1,0,1,2,3,4,6", "0,1,0,1,2,3,4,60"),
        "0/1",
        "a box to",
    ),
    ("curiabench-2d:E1", "RSNA-ICH", remove("RSNA-ICH/stage_2_train/ID_3a.dcm"), "ID_3a", "missing"),
    (
        "curiabench-2d:E1",
        "RSNA-ICH",
        rewrite("RSNA-ICH/stage_2_train.csv", "ID_0a_any,0", "ID_0a_any,yes"),
        "ID_0a",
        "Label is 'yes'",
    ),
    (
        "curiabench-3d:E2",
        "RSNA-Abdominal-Trauma",
        rewrite("RSNA-Abdominal-Trauma/train.csv", "8,0,0", "8,0,"),
        "8/80",
        "any_injury",
    ),
    ("curiabench-3d:E3", "EMIDEC", remove("EMIDEC/Case_P001/Contours/Case_P001.nii.gz"), "Case_P001", "missing"),
    ("curiabench-3d:E3", "EMIDEC", other_mask("EMIDEC/Case_N006/Contours/Case_N006.nii.gz"), "Case_N006", "5×12×10"),
    (
        "curiabench-2d:I",
        "COVIDx-CT",
        rewrite("COVIDx-CT/val_COVIDx_CT-2A.txt", " 1 1 2", " 7 1 2"),
        "CP_3_4_0007.png",
        "malformed",
    ),
    (
        "curiabench-2d:I",
        "COVIDx-CT",
        rewrite("COVIDx-CT/test_COVIDx_CT-2A.txt", "Normal_9_1_0002", "Normal_7_1_0009"),
        "Normal_9_1_0002.png",
        "is also in train",
    ),
    (
        "curiabench-3d:N",
        "OASIS-1",
        remove("OASIS-1/disc1/OAS1_0003_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0003_MR1_mpr_n4_anon_111_t88_masked_gfc.img"),
        "OAS1_0003_MR1",
        "detached_voxels",
    ),
    ("voxelfm:Merlin", "Merlin", remove("Merlin/merlin_data/AC421.nii.gz"), "AC421", "missing"),
    (
        "voxelfm:Merlin",
        "Merlin",
        rewrite("Merlin/zero_shot_findings_disease_cls.csv", "AC420,1", "AC420,2"),
        "AC420",
        "malformed",
    ),
    (
        "voxelfm:CT-RATE",
        "CT-RATE",
        remove("CT-RATE/dataset/multi_abnormality_labels/valid_predicted_labels.csv"),
        "valid_1_a_1",
        "missing",
    ),
    (
        "voxelfm:RSNA-STR",
        "RSNA-STR",
        rewrite("RSNA-STR/train.csv", "indeterminate", "unclear"),
        "",
        "no column indeterminate",
    ),
    ("voxelfm:iCTCF-Covid", "iCTCF", rewrite("iCTCF/clinical.csv", "Positive", "Postive"), "Patient_1", "Postive"),
    ("voxelfm:OSIC", "OSIC", remove("OSIC/ct/1_0.nii.gz"), "1_0", "missing"),
    (
        "voxelfm:NSCLC-Radiomics",
        "NSCLC-Radiomics",
        rewrite("NSCLC-Radiomics/metadata.csv", "155,0", "155,2"),
        "LUNG1-002",
        "no usable outcome",
    ),
    (
        "voxelfm:Mediastinal",
        "Mediastinal-Lymph-Node-SEG",
        remove("Mediastinal-Lymph-Node-SEG/M/case_01/SEG/1-1.dcm"),
        "",
        "no .dcm file",
    ),
    ("voxelfm:AirRC", "AirRC", remove("LUNA16/subset0/1.3.1.mhd"), "1.3.1", "missing"),
    ("voxelfm:AirRC", "AirRC", other_mask("AirRC/labelsTr/1.3.2.nii.gz"), "1.3.2", "(5, 12, 10)"),
    (
        "voxelfm:Mycobacterial",
        "Mycobacterial",
        lambda root: (root / "Mycobacterial/TBNifTI").rename(root / "x"),
        "TBNifTI/2",
        "missing",
    ),
    ("curiabench-2d:E4", "ATLAS-R2", lambda root: (root / "ATLAS-R2/Training").rename(root / "x"), "", "missing"),
    (
        "curiabench-hub:luna16-3D",
        "CuriaBench-folders",
        lambda root: np.save(root / "CuriaBench/luna16-3D/test/images/a.mask.npy", made.mask()),
        "test/a",
        "a mask of shape (8, 12, 10)",
    ),
    (
        "curiabench-hub:kits",
        "CuriaBench-tables",
        lambda root: (root / "CuriaBench/kits/test-00000-of-00001.parquet").write_bytes(b"PAR1x"),
        "test/0",
        "no table that can be read",
    ),
]


@pytest.mark.parametrize(
    ("task", "maker", "damage", "lost", "message"), BROKEN, ids=[f"{b[0]}-{n}" for n, b in enumerate(BROKEN)]
)
def test_a_broken_folder_says_what_is_wrong(
    task: str, maker: str, damage: Callable[[Path], object], lost: str, message: str, tmp_path: Path
) -> None:
    """A missing file, a malformed row or a mask of another size costs its case, and is told; the other cases stay."""
    made.MAKERS[maker](tmp_path)
    before = {case.id for case in read_cases(tmp_path, TASKS[task]).cases}
    damage(tmp_path)
    found = read_cases(tmp_path, TASKS[task])
    after = {case.id for case in found.cases}
    assert any(message in problem.found for problem in found.problems), found.problems
    if lost == "":
        assert not after
        assert any(problem.fatal for problem in found.problems)
    elif lost != "-":
        assert lost in before
        assert lost not in after
        assert after
        assert any(problem.cases or problem.fatal is False for problem in found.problems)
