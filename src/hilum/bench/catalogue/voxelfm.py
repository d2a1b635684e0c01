"""VoxelFM's tasks (arXiv 2604.04133), from the original data sets. Report generation is not among them yet.

Paper and public code disagree in places (which part is held out by patient, which label, which unit). `split_rule` and
`our_choice` say what we do; patients never stand on both sides of a split here.
"""

from hilum.bench.catalogue.class_names import CT_RATE_18, MERLIN_30, TOTALSEGMENTATOR_117
from hilum.bench.catalogue.curiabench import SEEDED
from hilum.bench.task import Task

_BY_SERIES = "; the publisher's code splits by file"
_WHOLE = "whole scans instead of crops, so that a Dice is that of a patient; patients are the scans, which name none"

VOXELFM: tuple[Task, ...] = (
    Task(
        id="voxelfm:CT-RATE", title="Findings of chest CT", dataset="CT-RATE", target="findings",
        kind="multilabel", unit="volume", modality="CT", metric="macro_auroc", chance=0.5, classes=CT_RATE_18,
        label_rule="18 columns of multi_abnormality_labels/{train,valid}_predicted_labels.csv",
        split_rule="official valid is the test part; validation is drawn from train by patient (the paper says 20 %, its code "
        "keeps 3 to 5 %)",
        our_choice="all reconstructions of a scan are cases; patient is the first number of the name",
        published=("classification", "CT-RATE"),
    ),
    Task(
        id="voxelfm:Merlin", title="Findings of abdominal CT", dataset="Merlin", target="findings-absent",
        kind="multilabel", unit="volume", modality="CT", metric="macro_auroc", chance=0.5, classes=MERLIN_30,
        label_rule="30 columns of zero_shot_findings_disease_cls.csv; -1 (not mentioned) becomes 0, as in the public code",
        split_rule="official: column Split of reports_final.xlsx", published=("classification", "Merlin"),
    ),
    Task(
        id="voxelfm:RSNA-STR", title="Pulmonary embolism", dataset="RSNA-STR", target="embolism",
        kind="classification", unit="volume", modality="CT", metric="auroc", chance=0.5, classes=("none", "embolism"),
        label_rule="positive when any image has pe_present_on_image 1 in train.csv",
        split_rule=SEEDED + _BY_SERIES,
        our_choice="how the labels were made is not published; indeterminate studies are left out; the study stands for the "
        "patient",
        published=("classification", "RSNA-STR"),
    ),
    Task(
        id="voxelfm:iCTCF-Covid", title="COVID-19", dataset="iCTCF", target="covid",
        kind="classification", unit="volume", modality="CT", metric="auroc", chance=0.5, classes=("negative", "positive"),
        label_rule="SARS-CoV-2 nucleic acids of clinical.csv: Positive or Negative; other entries have no label",
        split_rule=SEEDED + "; the publisher's split depends on the file system",
        published=("classification", "iCTCF-Covid"),
    ),
    Task(
        id="voxelfm:iCTCF-severity", title="Severity of COVID-19", dataset="iCTCF", target="severity",
        kind="classification", unit="volume", modality="CT", metric="auroc", chance=0.5, classes=("milder", "severe"),
        label_rule="Morbidity outcome of clinical.csv: Severe or Critically ill, against every other entry",
        split_rule=SEEDED + "; the publisher's split depends on the file system",
        our_choice="patients with an empty field are left out, controls count as milder",
        published=("classification", "iCTCF-Severity"),
    ),
    Task(
        id="voxelfm:Mycobacterial", title="Tuberculosis or other mycobacteria", dataset="Mycobacterial", target="tuberculosis",
        kind="classification", unit="volume", modality="CT", metric="auroc", chance=0.5,
        classes=("non-tuberculous", "tuberculosis"),
        label_rule="the folder: NTMNiFTi or TBNifTI",
        split_rule=SEEDED, our_choice="the file stands for the patient, whom it does not name; HU = value · 1500 - 1350, "
        "clipped to -1350 … 150 as shipped",
        published=("classification", "Mycobacterial"),
    ),
    Task(
        id="voxelfm:OSIC", title="Forced vital capacity", dataset="OSIC", target="fvc_predicted",
        kind="regression", unit="volume", modality="CT", metric="mae",
        label_rule="column FVC PREDICTED of baselines.csv",
        split_rule=SEEDED + "; the publisher's split depends on the file system",
        our_choice="in the unit of the file; the published error is in standard deviations of all values, test included",
        published=("regression", "OSIC"),
    ),
    Task(
        id="voxelfm:NSCLC-Radiomics", title="Survival with lung cancer", dataset="NSCLC-Radiomics", target="survival",
        kind="survival", unit="volume", modality="CT", metric="c_index", chance=0.5,
        label_rule="Survival.time in days and deadstatus.event of the clinical table",
        split_rule=SEEDED + " (by event; the publisher's by sex)",
        our_choice="time stays in days: the C-index does not change with log1p(days / 100)",
        published=("survival", "NSCLC-Radiomics"),
    ),
    Task(
        id="voxelfm:CT-RATE-retrieval", title="Scans with the same finding", dataset="CT-RATE", target="retrieval",
        kind="retrieval", unit="volume", modality="CT", metric="recall_at_10", chance=0.1, classes=CT_RATE_18,
        label_rule="as voxelfm:CT-RATE; for each label, a scan that has it must be found among 99 that lack it",
        split_rule="official valid is judged: reconstructions ending in _1 with at least one finding",
        our_choice="nothing is trained; train scans that are there, of at most 1,000 patients, teach the protocol erased what "
        "scanners do",
        published=("retrieval", "CT-RATE"),
    ),
    Task(
        id="voxelfm:LUNA16", title="Where a lung nodule lies", dataset="LUNA16", target="position",
        kind="localisation", unit="volume", modality="CT", metric="mean_distance_mm",
        label_rule="centre of a nodule of annotations.csv, in a crop that holds it",
        split_rule=SEEDED + "; the publisher's is neither seeded nor sorted",
        our_choice="6 cubes a nodule, side drawn from max(40, 2 · diameter) to 240 mm (at most the scan), position drawn so "
        "that the whole nodule is inside, both from the nodule's hashed name; nodules above 20 mm, which a fault of the public "
        "code drops, are kept; the error is in mm, not in crop sides",
        published=("localisation", "LUNA16"),
    ),
    Task(
        id="voxelfm:TotalSegmentator", title="Segmentation of 117 structures", dataset="TotalSegmentator",
        target="segmentation", kind="segmentation", unit="volume", modality="CT", metric="dice", classes=TOTALSEGMENTATOR_117,
        label_rule="segmentations/<class>.nii.gz; where two meet, the later class in the list wins",
        split_rule="official: column split of meta.csv; the publisher's code draws its own by volume",
        our_choice=_WHOLE + "; the public order of classes is unknown, ours is that of the tool's label numbers (version 2)",
        published=("segmentation", "TotalSeg"),
    ),
    Task(
        id="voxelfm:Mediastinal", title="Segmentation of mediastinal lymph nodes", dataset="Mediastinal-Lymph-Node-SEG",
        target="segmentation", kind="segmentation", unit="volume", modality="CT", metric="dice", classes=("lymph node",),
        label_rule="any segment of the DICOM SEG of the patient", split_rule=SEEDED,
        our_choice="whole scans instead of crops; the first CT and the first SEG of metadata.csv for each subject",
        published=("segmentation", "Mediastinal"),
    ),
    Task(
        id="voxelfm:AirRC", title="Segmentation of airways and lung vessels", dataset="AirRC", target="segmentation",
        kind="segmentation", unit="volume", modality="CT", metric="dice",
        classes=("airway lumen", "airway wall", "veins", "arteries"),
        label_rule="labelsTr/<seriesuid>.nii.gz, numbers 1 to 4, over the LUNA16 scan of that name",
        split_rule=SEEDED, our_choice=_WHOLE, published=("segmentation", "AirRC"),
    ),
)  # fmt: skip
