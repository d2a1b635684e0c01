"""CuriaBench's tasks, on the tracks of Table 1 of the Curia-2 paper (arXiv 2604.01987), from the original data sets; and
the configurations of its own form on the Hugging Face hub, raidium/CuriaBench.

How most labels and slices were made is not published. Where that is so, `our_choice` says what we do; scores then compare
models with each other, and with the paper only loosely.
"""

from dataclasses import replace

from hilum.bench.catalogue.class_names import DEEPLESION_8, MERLIN_30, TOTALSEGMENTATOR_104, TOTALSEGMENTATOR_MR_56
from hilum.bench.task import Task, Unit

SEEDED = "seeded, 70/15/15 by patient, stratified where every patient has one class"
_SEVERITY = ("normal or mild", "moderate", "severe")
_LARGEST = "the slice in which the region covers most pixels"

_ORGANS_CT = Task(
    id="curiabench-2d:A1", title="Organ recognition in CT", dataset="TotalSegmentator", target="organ",
    kind="classification", unit="region", modality="CT", metric="accuracy", classes=TOTALSEGMENTATOR_104,
    label_rule="one case for each non-empty segmentations/<class>.nii.gz of a subject; the label is the file's name",
    split_rule="official: column split of meta.csv (by subject)",
    our_choice=f"the 104 structures of version 1 in the order of its label numbers; {_LARGEST}; structures below 30 voxels "
    "are left out",
    published=("2D", "A1"),
)  # fmt: skip
_ORGANS_MR = Task(
    id="curiabench-2d:A2", title="Organ recognition in MR", dataset="TotalSegmentator-MRI", target="organ",
    kind="classification", unit="region", modality="MR", metric="accuracy", classes=TOTALSEGMENTATOR_MR_56,
    label_rule="one case for each non-empty segmentations/<class>.nii.gz of a subject; the label is the file's name",
    split_rule="official: column split of meta.csv (by subject)",
    our_choice=f"{_LARGEST}; structures below 30 voxels are left out",
    published=("2D", "A2"),
)  # fmt: skip
_AGE = Task(
    id="curiabench-2d:A3", title="Age from brain MR", dataset="IXI", target="age",
    kind="regression", unit="slice", modality="MR", metric="r2", chance=0.0,
    label_rule="column AGE of IXI.xls, in years, joined on IXI_ID; subjects without an age, or with two, are left out",
    split_rule=SEEDED, our_choice="the middle slice of the acquisition", published=("2D", "A3"),
)  # fmt: skip
_KIDNEY = Task(
    id="curiabench-2d:O1", title="Malignancy of a kidney lesion", dataset="KiTS23", target="malignant",
    kind="classification", unit="region", modality="CT", metric="auroc", chance=0.5, classes=("benign", "malignant"),
    label_rule="field malignant of kits23.json, of the case",
    split_rule=SEEDED,
    our_choice="the region is label 2 (tumour; cysts are not counted); the slice with the largest lesion area",
    published=("2D", "O1"),
)  # fmt: skip
_NODULE = Task(
    id="curiabench-2d:O2", title="Malignancy of a lung nodule", dataset="LUNA16", target="malignancy",
    kind="classification", unit="region", modality="CT", metric="auroc", chance=0.5, classes=("benign", "malignant"),
    label_rule="malignancy 1 to 5 of the LIDC-IDRI readers (XML): the median below 3 is benign, above 3 malignant",
    split_rule=SEEDED + "; the scan stands for the patient, whom LUNA16 does not name",
    our_choice="nodules of annotations.csv; readers' outlines count when their centre lies within half a diameter (at least "
    "3 mm); a median of 3 is left out; the region is the cube of the diameter, the slice the one through its centre",
    published=("2D", "O2"),
)  # fmt: skip
_HAEMORRHAGE = Task(
    id="curiabench-2d:E1", title="Intracranial haemorrhage", dataset="RSNA-ICH", target="any",
    kind="classification", unit="slice", modality="CT", metric="auroc", chance=0.5, classes=("none", "haemorrhage"),
    label_rule="row ID_…_any of stage_2_train.csv, of the slice",
    split_rule=SEEDED + "; the patient stands in the DICOM header",
    our_choice="a balanced subset: of each class the 10,000 slices whose hashed names come first",
    published=("2D", "E1"),
)  # fmt: skip
_TRAUMA = Task(
    id="curiabench-2d:E2", title="Abdominal trauma", dataset="RSNA-Abdominal-Trauma", target="any_injury",
    kind="classification", unit="slice", modality="CT", metric="auroc", chance=0.5, classes=("none", "injury"),
    label_rule="field any_injury of train.csv, of the patient",
    split_rule=SEEDED,
    our_choice="one series a patient: complete organs first, then the highest aortic_hu. Injured: the middle one of the "
    "slices that image_level_labels.csv lists, else the middle slice; uninjured: the middle slice",
    published=("2D", "E2"),
)  # fmt: skip
_INFARCT = Task(
    id="curiabench-2d:E3", title="Myocardial infarction", dataset="EMIDEC", target="infarct",
    kind="classification", unit="region", modality="MR", metric="auroc", chance=0.5, classes=("none", "infarct"),
    label_rule="label 3 (infarct) or 4 (no-reflow) in the contours",
    split_rule=SEEDED,
    our_choice="every slice with myocardium is a case, positive when it holds infarct or no-reflow; the region is the heart "
    "(labels 1 to 4)",
    published=("2D", "E3"),
)  # fmt: skip

CURIABENCH: tuple[Task, ...] = (
    _ORGANS_CT,
    _ORGANS_MR,
    _AGE,
    _KIDNEY,
    _NODULE,
    Task(
        id="curiabench-2d:O3", title="Site of a lesion", dataset="DeepLesion", target="lesion_type",
        kind="classification", unit="region", modality="CT", metric="balanced_accuracy", chance=1 / 8, classes=DEEPLESION_8,
        label_rule="Coarse_lesion_type 1 to 8 of DL_info.csv; -1 has no label",
        split_rule="official test (Train_Val_Test 3); official validation, the only other part with types, is our training "
        "part, from which validation is drawn by patient",
        our_choice="the key slice; the region is the bounding box; rows marked Possibly_noisy are left out",
        published=("2D", "O3"),
    ),
    Task(
        id="curiabench-2d:M1", title="Subarticular stenosis", dataset="RSNA-Lumbar", target="subarticular_stenosis",
        kind="classification", unit="region", modality="MR", metric="auroc", chance=0.5, classes=_SEVERITY,
        label_rule="Normal/Mild, Moderate or Severe of train.csv, by level and side; slice and point of "
        "train_label_coordinates.csv, in axial T2",
        split_rule=SEEDED, our_choice="the region is the square of 20 mm about the point", published=("2D", "M1"),
    ),
    Task(
        id="curiabench-2d:M2", title="Foraminal narrowing", dataset="RSNA-Lumbar", target="neural_foraminal_narrowing",
        kind="classification", unit="region", modality="MR", metric="auroc", chance=0.5, classes=_SEVERITY,
        label_rule="as M1, in sagittal T1",
        split_rule=SEEDED, our_choice="the region is the square of 20 mm about the point", published=("2D", "M2"),
    ),
    Task(
        id="curiabench-2d:M3", title="Spinal canal stenosis", dataset="RSNA-Lumbar", target="spinal_canal_stenosis",
        kind="classification", unit="region", modality="MR", metric="auroc", chance=0.5, classes=_SEVERITY,
        label_rule="as M1, by level, in sagittal T2/STIR",
        split_rule=SEEDED, our_choice="the region is the square of 20 mm about the point", published=("2D", "M3"),
    ),
    _HAEMORRHAGE,
    _TRAUMA,
    _INFARCT,
    Task(
        id="curiabench-2d:E4", title="Stroke lesion", dataset="ATLAS-R2", target="lesion",
        kind="classification", unit="slice", modality="MR", metric="auroc", chance=0.5, classes=("none", "lesion"),
        label_rule="whether the lesion mask meets the slice",
        split_rule=SEEDED,
        our_choice="two axial slices a subject: the one with the largest lesion area, and the lesion-free one nearest to the "
        "middle of the brain, at least 10 mm from any lesion",
        published=("2D", "E4"),
    ),
    Task(
        id="curiabench-2d:I", title="Pulmonary infection", dataset="COVIDx-CT", target="infection",
        kind="classification", unit="slice", modality="OT", metric="balanced_accuracy", chance=1 / 3,
        classes=("normal", "pneumonia", "COVID-19"),
        label_rule="class 0, 1 or 2 of {train,val,test}_COVIDx_CT-2A.txt (or -3A)",
        split_rule="official lists",
        our_choice="of each class the 2,000 training and 1,000 validation and test slices whose hashed names come first; "
        "8-bit PNG have lost their Hounsfield units, so they count as images without a unit; the crop box is not used",
        published=("2D", "I"),
    ),
    replace(_ORGANS_CT, id="curiabench-3d:A1", published=("3D", "A1"),
            our_choice="as on the 2D track, all slices that the region meets"),
    replace(_ORGANS_MR, id="curiabench-3d:A2", published=("3D", "A2"),
            our_choice="as on the 2D track, all slices that the region meets"),
    replace(_AGE, id="curiabench-3d:A3", unit="volume", published=("3D", "A3"), our_choice=""),
    replace(_KIDNEY, id="curiabench-3d:O1", published=("3D", "O1"),
            our_choice="the region is label 2 (tumour; cysts are not counted); all slices that it meets"),
    replace(_NODULE, id="curiabench-3d:O2", published=("3D", "O2")),
    Task(
        id="curiabench-3d:O4", title="Survival with kidney cancer", dataset="TCGA-KIRC", target="survival",
        kind="survival", unit="volume", modality="CT", metric="c_index", chance=0.5,
        label_rule="vital_status: the event is death after days_to_death; else censored at days_to_last_follow_up (GDC)",
        split_rule=SEEDED,
        our_choice="overall survival from diagnosis; the tumour masks of the paper are not published, so the whole scan is "
        "used: of each patient the CT series with most images",
        published=("3D", "O4"),
    ),
    Task(
        id="curiabench-3d:M4", title="Tear of the anterior cruciate ligament", dataset="KneeMRI", target="acl",
        kind="classification", unit="region", modality="MR", metric="auroc", chance=0.5,
        classes=("intact", "partial tear", "complete tear"),
        label_rule="aclDiagnosis 0, 1 or 2 of metadata.csv", split_rule=SEEDED,
        our_choice="the region is the box roiX … roiDepth; examId stands for the patient", published=("3D", "M4"),
    ),
    replace(_HAEMORRHAGE, id="curiabench-3d:E1", unit="volume", published=("3D", "E1"),
            label_rule="positive when any slice of the series is (ID_…_any of stage_2_train.csv)",
            our_choice="all series, each a volume of the slices that share a SeriesInstanceUID"),
    replace(_TRAUMA, id="curiabench-3d:E2", unit="volume", published=("3D", "E2"),
            our_choice="one series a patient: complete organs first, then the highest aortic_hu"),
    replace(_INFARCT, id="curiabench-3d:E3", published=("3D", "E3"),
            our_choice="of the whole scan; the region is the heart (labels 1 to 4)"),
    Task(
        id="curiabench-3d:N", title="Dementia", dataset="OASIS-1", target="dementia",
        kind="classification", unit="volume", modality="MR", metric="balanced_accuracy", chance=0.5,
        classes=("not demented", "demented"),
        label_rule="CDR above 0 is demented", split_rule=SEEDED,
        our_choice="first visits only; no CDR (the young, never rated) counts as not demented, as the publisher says; the "
        "skull-stripped image in Talairach space",
        published=("3D", "N"),
    ),
    Task(
        id="curiabench-3d:F", title="Findings of abdominal CT", dataset="Merlin", target="findings",
        kind="multilabel", unit="volume", modality="CT", metric="macro_auroc", chance=0.5, classes=MERLIN_30,
        label_rule="1 present, 0 absent, -1 not mentioned, of zero_shot_findings_disease_cls.csv",
        split_rule="official: column Split of reports_final.xlsx",
        our_choice="the paper's labels (about 200 questions that a language model answered, RATE) are not published: we take "
        "Merlin's 30 findings, and -1 is unknown. The published score is of other labels",
        published=("3D", "F"),
    ),
)  # fmt: skip

_BY_ID = {task.id: task for task in CURIABENCH}
# Configuration on the hub → (the task it is the published form of, what one row is, number of classes whose order is not
# published: their names are then numbers).
_CONFIGS: dict[str, tuple[str, Unit, int]] = {
    "anatomy-ct": ("2d:A1", "region", 54), "anatomy-ct-hard": ("2d:A1", "region", 104), "anatomy-mri": ("2d:A2", "region", 56),
    "ixi": ("2d:A3", "slice", 0), "kits": ("2d:O1", "region", 0), "luna16": ("2d:O2", "region", 0),
    "deep-lesion-site": ("2d:O3", "region", 0), "subarticular_stenosis": ("2d:M1", "region", 0),
    "neural_foraminal_narrowing": ("2d:M2", "region", 0), "spinal_canal_stenosis": ("2d:M3", "region", 0),
    "ich": ("2d:E1", "slice", 0), "abdominal-trauma": ("2d:E2", "slice", 0),
    "emidec-classification-mask": ("2d:E3", "region", 0), "atlas-stroke": ("2d:E4", "slice", 0),
    "covidx-ct": ("2d:I", "slice", 0), "luna16-3D": ("3d:O2", "region", 0), "kneeMRI": ("3d:M4", "region", 0),
    "oasis": ("3d:N", "volume", 0),
}  # fmt: skip


def hub_task(config: str) -> Task:
    """The task of one configuration of raidium/CuriaBench: image, mask and target as shipped."""
    known, unit, num_classes = _CONFIGS[config]
    original = _BY_ID[f"curiabench-{known}"]
    return replace(
        original,
        id=f"curiabench-hub:{config}",
        dataset="CuriaBench",
        target=config,
        unit=unit,
        classes=tuple(str(n) for n in range(num_classes)) or original.classes,
        label_rule="column target, as shipped",
        split_rule="official: train, validation and test, as shipped",
        our_choice="a row without one of the columns patient, patient_id, subject, case_id, study_id or series_id stands for "
        "its own patient" + ("; the order of the classes is not published" if num_classes else ""),
        published=None
        if config == "anatomy-ct"
        else original.published,  # 54 classes: only the first Curia names a score
    )


HUB_CONFIGS: tuple[Task, ...] = tuple(hub_task(config) for config in _CONFIGS)
