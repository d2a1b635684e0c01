"""The data sets of the benchmark: where they come from, on what terms, and which files belong where."""

from hilum.bench.task import Dataset

_LIST = (
    Dataset(
        name="TotalSegmentator", title="TotalSegmentator CT (version 1: 1,204 subjects, 104 structures; 2: 1,228, 117)",
        url="https://doi.org/10.5281/zenodo.6802614 (version 1), https://doi.org/10.5281/zenodo.10047292 (version 2)",
        licence="CC BY 4.0",
        layout="""
        meta.csv                                  semicolons; image_id, split, …
        sNNNN/ct.nii.gz
        sNNNN/segmentations/<class>.nii.gz        one binary mask for each structure
        """,
    ),
    Dataset(
        name="TotalSegmentator-MRI", title="TotalSegmentator MRI (298 subjects with 56 structures; later 616 with 50)",
        url="https://doi.org/10.5281/zenodo.11367005", licence="CC BY-NC-SA 2.0",
        layout="""
        meta.csv                                  semicolons; image_id, split, …
        sNNNN/mri.nii.gz
        sNNNN/segmentations/<class>.nii.gz        one binary mask for each structure
        """,
    ),
    Dataset(
        name="IXI", title="Information eXtraction from Images: T1 brain MR of 581 healthy subjects",
        url="https://brain-development.org/ixi-dataset/", licence="CC BY-SA 3.0",
        layout="""
        IXI-T1/IXInnn-{Guys,HH,IOP}-nnnn-T1.nii.gz
        IXI.csv                                   IXI.xls saved as CSV; IXI_ID, AGE, … (.xlsx is read, too)
        """,
    ),
    Dataset(
        name="KiTS23", title="Kidney tumour segmentation challenge 2023: 489 cases",
        url="https://github.com/neheller/kits23", licence="CC BY-NC-SA 4.0",
        layout="""
        dataset/kits23.json                       case_id, malignant, …
        dataset/case_NNNNN/imaging.nii.gz
        dataset/case_NNNNN/segmentation.nii.gz    1 kidney, 2 tumour, 3 cyst
        """,
    ),
    Dataset(
        name="LUNA16", title="Lung nodule analysis 2016: 888 chest CT of LIDC-IDRI",
        url="https://luna16.grand-challenge.org; readers' XML: https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX",
        licence="CC BY 4.0 (scans: CC BY 3.0)",
        layout="""
        subset0 … subset9/<seriesuid>.mhd, .raw
        annotations.csv                           seriesuid, coordX, coordY, coordZ, diameter_mm
        LIDC-XML-only/**/*.xml                    malignancy ratings (task O2 only), from LIDC-IDRI
        """,
    ),
    Dataset(
        name="DeepLesion", title="DeepLesion: 32,735 lesions in 10,594 CT studies of 4,427 patients",
        url="https://nihcc.app.box.com/v/DeepLesion", licence="usage statement of the NIH Clinical Center",
        layout="""
        DL_info.csv                               File_name, Patient_index, Bounding_boxes, Coarse_lesion_type, …
        Images_png/<patient_study_series>/<slice>.png      16 bits, HU = value - 32768
        """,
    ),
    Dataset(
        name="TCGA-KIRC", title="Kidney renal clear cell carcinoma of The Cancer Genome Atlas: CT of 267 patients",
        url="https://doi.org/10.7937/K9/TCIA.2016.V6PBVTDR; clinical table: https://portal.gdc.cancer.gov",
        licence="CC BY 3.0",
        layout="""
        metadata.csv                              of the NBIA download: Series UID, Subject ID, Modality, File Location, …
        TCGA-KIRC/…                               the series folders it names
        clinical.tsv                              GDC: case_submitter_id, vital_status, days_to_death, …
        """,
    ),
    Dataset(
        name="RSNA-Lumbar", title="RSNA 2024 lumbar spine degenerative classification: 1,975 training studies",
        url="https://www.kaggle.com/competitions/rsna-2024-lumbar-spine-degenerative-classification",
        licence="competition rules (non-commercial)",
        layout="""
        train.csv                                 study_id, 25 columns <condition>_<level>
        train_label_coordinates.csv               study_id, series_id, instance_number, condition, level, x, y
        train_series_descriptions.csv             study_id, series_id, series_description
        train_images/<study>/<series>/<instance>.dcm
        """,
    ),
    Dataset(
        name="KneeMRI", title="KneeMRI of the clinical hospital centre Rijeka: 917 volumes",
        url="http://www.riteh.uniri.hr/~istajduh/projects/kneeMRI/", licence="research use, on the page",
        layout="""
        metadata.csv                              examId, seriesNo, aclDiagnosis, roiX … roiDepth, volumeFilename
        vol01 … vol10/<volumeFilename>            pickled NumPy arrays (read without running them)
        """,
    ),
    Dataset(
        name="RSNA-ICH", title="RSNA 2019 intracranial haemorrhage detection: 752,803 training slices",
        url="https://www.kaggle.com/competitions/rsna-intracranial-hemorrhage-detection",
        licence="competition rules (non-commercial)",
        layout="""
        stage_2_train.csv                         ID ("ID_<hash>_<subtype>"), Label
        stage_2_train/ID_<hash>.dcm
        """,
    ),
    Dataset(
        name="RSNA-Abdominal-Trauma", title="RSNA 2023 abdominal trauma detection: 3,147 training patients",
        url="https://www.kaggle.com/competitions/rsna-2023-abdominal-trauma-detection",
        licence="competition rules (non-commercial)",
        layout="""
        train.csv                                 patient_id, …, any_injury
        train_series_meta.csv                     patient_id, series_id, aortic_hu, incomplete_organ
        image_level_labels.csv                    patient_id, series_id, instance_number, injury_name (2D track)
        train_images/<patient>/<series>/<instance>.dcm
        """,
    ),
    Dataset(
        name="EMIDEC", title="EMIDEC: late-enhancement cardiac MR of 100 training cases",
        url="http://emidec.com/dataset", licence="CC BY-NC-SA 4.0",
        layout="""
        Case_{N,P}NNN/Images/Case_{N,P}NNN.nii.gz
        Case_{N,P}NNN/Contours/Case_{N,P}NNN.nii.gz      1 cavity, 2 myocardium, 3 infarct, 4 no-reflow
        """,
    ),
    Dataset(
        name="ATLAS-R2", title="Anatomical tracings of lesions after stroke, release 2.0: 655 training scans",
        url="https://fcon_1000.projects.nitrc.org/indi/retro/atlas.html", licence="data use agreement of the archive",
        layout="""
        Training/RNNN/sub-rNNNsNNN/ses-1/anat/*_space-MNI152NLin2009aSym_T1w.nii.gz
        Training/RNNN/sub-rNNNsNNN/ses-1/anat/*_label-L_desc-T1lesion_mask.nii.gz
        """,
    ),
    Dataset(
        name="COVIDx-CT", title="COVIDx CT-2A or 3A: 194,922 chest CT slices of 3,745 patients (2A)",
        url="https://www.kaggle.com/datasets/hgunraj/covidxct", licence="CC BY-NC 4.0 (parts CC BY-NC-SA)",
        layout="""
        2A_images/*.png                           8 bits (3A_images for 3A)
        {train,val,test}_COVIDx_CT-2A.txt         file class xmin ymin xmax ymax, one line each
        metadata.csv                              patient id, … (optional: without it the patient is told from the file name)
        """,
    ),
    Dataset(
        name="OASIS-1", title="Open access series of imaging studies, cross-sectional: 416 subjects",
        url="https://sites.wustl.edu/oasisbrains", licence="OASIS data use terms",
        layout="""
        oasis_cross-sectional.csv                 ID, …, CDR (.xlsx is read, too)
        disc*/OAS1_NNNN_MR1/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.{hdr,img}      Analyze 7.5
        """,
    ),
    Dataset(
        name="Merlin", title="Merlin abdominal CT: 25,494 scans of 18,317 patients",
        url="https://stanfordaimi.azurewebsites.net/datasets/60b9c7ff-877b-48ce-96c3-0194c8205c40",
        licence="Stanford research use agreement",
        layout="""
        merlin_data/**/<study id>.nii.gz
        zero_shot_findings_disease_cls.csv        study id, 30 findings as 1, 0, -1
        reports_final.xlsx                        study id, Split, … (or .csv)
        """,
    ),
    Dataset(
        name="CT-RATE", title="CT-RATE: 25,692 chest CT of 21,304 patients",
        url="https://huggingface.co/datasets/ibrahimhamamci/CT-RATE", licence="CC BY-NC-SA 4.0",
        layout="""
        dataset/train_fixed/**/train_N_x_n.nii.gz      or dataset/train
        dataset/valid_fixed/**/valid_N_x_n.nii.gz      or dataset/valid
        dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv     VolumeName, 18 findings
        """,
    ),
    Dataset(
        name="RSNA-STR", title="RSNA 2020 pulmonary embolism detection: 7,279 training studies",
        url="https://www.kaggle.com/competitions/rsna-str-pulmonary-embolism-detection",
        licence="competition rules (non-commercial)",
        layout="""
        train.csv                                 StudyInstanceUID, SeriesInstanceUID, pe_present_on_image, indeterminate, …
        train/<StudyInstanceUID>/<SeriesInstanceUID>/*.dcm
        """,
    ),
    Dataset(
        name="iCTCF", title="iCTCF: chest CT and laboratory values of 1,521 patients in Wuhan",
        url="https://ngdc.cncb.ac.cn/ictcf/", licence="research use, on the page",
        layout="""
        clinical.csv                              ID, SARS-CoV-2 nucleic acids, Morbidity outcome
        ct/Patient_N/*.dcm                        (folders named "Patient N" are found, too)
        """,
    ),
    Dataset(
        name="Mycobacterial", title="Tuberculous and non-tuberculous mycobacterial lung disease: 1,301 chest CT",
        url="https://www.kaggle.com/datasets/damianhan/nifti-dataset (version 5)", licence="as stated on the page",
        layout="""
        NTMNiFTi/*.nii                            HU in -1350 … 150, scaled to 0 … 1
        TBNifTI/*.nii
        """,
    ),
    Dataset(
        name="OSIC", title="Open source imaging consortium: 881 CT with lung function",
        url="https://www.osicild.org", licence="OSIC data use agreement",
        layout="""
        baselines.csv                             PATIENT ID, FVC PREDICTED
        ct/<PATIENT ID>_0.nii.gz
        """,
    ),
    Dataset(
        name="NSCLC-Radiomics", title="NSCLC-Radiomics (Lung1): CT and survival of 422 patients",
        url="https://doi.org/10.7937/K9/TCIA.2015.PF0M9REI", licence="CC BY-NC 3.0",
        layout="""
        metadata.csv                              the clinical table (or NSCLC-Radiomics-Lung1*.csv): PatientID,
                                                  Survival.time, deadstatus.event
        <PatientID>/…/*.dcm                       CT, RTSTRUCT and SEG series (below NSCLC-Radiomics/, too)
        """,
    ),
    Dataset(
        name="Mediastinal-Lymph-Node-SEG", title="Mediastinal lymph nodes of the LNQ2023 challenge: 513 CT",
        url="https://doi.org/10.7937/QVAZ-JA09", licence="CC BY 4.0",
        layout="""
        metadata.csv                              Series UID, Subject ID, Modality (CT, SEG), File Location
        …                                         the series folders it names
        """,
    ),
    Dataset(
        name="AirRC", title="AirRC: airways and lung vessels on 254 scans of LUNA16",
        url="see the publication of AirRC; the scans: https://luna16.grand-challenge.org", licence="as its publisher states",
        layout="""
        labelsTr/<seriesuid>.nii.gz               1 airway lumen, 2 wall, 3 veins, 4 arteries
        subset0 … subset9/<seriesuid>.mhd, .raw   of LUNA16 (a folder LUNA16 beside this one is found, too)
        """,
    ),
    Dataset(
        name="CuriaBench", title="CuriaBench as its authors ship it: slices or volumes with mask and target",
        url="https://huggingface.co/datasets/raidium/CuriaBench (access on request)", licence="as stated on the page",
        layout="""
        <config>/{train,validation,test}*.parquet      image, mask, target, … (or .arrow); or, as it was uploaded from:
        <config>/{train,val,test}/extra_data.npy       filename, target, …
        <config>/{train,val,test}/images/<name>.npy    and <stem>.mask.npy
        """,
    ),
)  # fmt: skip

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _LIST}
