"""Names of classes in the order of their numbers, as the publishers of the data sets order them."""


def _names(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Version 1 of the data set (Zenodo 6802614): 104 structures.
TOTALSEGMENTATOR_104 = _names("""
    spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava
    portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left lung_upper_lobe_left
    lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right vertebrae_L5
    vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9
    vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1
    vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 vertebrae_C3 vertebrae_C2 vertebrae_C1 esophagus trachea
    heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right heart_ventricle_right
    pulmonary_artery brain iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right small_bowel
    duodenum colon rib_left_1 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8
    rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5
    rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11 rib_right_12 humerus_left
    humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right hip_left
    hip_right sacrum face gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right
    gluteus_minimus_left gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right
    urinary_bladder
""")

# Version 2 (Zenodo 10047292): 117 structures, in the order of the tool's own label numbers.
TOTALSEGMENTATOR_117 = _names("""
    spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left
    lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right
    esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left
    kidney_cyst_right sacrum vertebrae_S1 vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1
    vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5
    vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4
    vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein brachiocephalic_trunk
    subclavian_artery_right subclavian_artery_left common_carotid_artery_right common_carotid_artery_left
    brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left superior_vena_cava
    inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right iliac_vena_left
    iliac_vena_right humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right
    femur_left femur_right hip_left hip_right spinal_cord gluteus_maximus_left gluteus_maximus_right
    gluteus_medius_left gluteus_medius_right gluteus_minimus_left gluteus_minimus_right autochthon_left
    autochthon_right iliopsoas_left iliopsoas_right brain skull rib_left_1 rib_left_2 rib_left_3 rib_left_4
    rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1
    rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10
    rib_right_11 rib_right_12 sternum costal_cartilages
""")

# The MR data set (Zenodo 11367005): 56 structures.
TOTALSEGMENTATOR_MR_56 = _names("""
    spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left
    lung_left lung_right esophagus small_bowel duodenum colon urinary_bladder prostate sacrum vertebrae
    intervertebral_discs spinal_cord heart aorta inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left
    iliac_artery_right iliac_vena_left iliac_vena_right humerus_left humerus_right fibula tibia femur_left
    femur_right hip_left hip_right gluteus_maximus_left gluteus_maximus_right gluteus_medius_left
    gluteus_medius_right gluteus_minimus_left gluteus_minimus_right autochthon_left autochthon_right
    iliopsoas_left iliopsoas_right quadriceps_femoris_left quadriceps_femoris_right thigh_medial_compartment_left
    thigh_medial_compartment_right thigh_posterior_compartment_left thigh_posterior_compartment_right
    sartorius_left sartorius_right brain
""")

# The 18 label columns of CT-RATE.
CT_RATE_18 = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip

# The 30 finding columns of Merlin's zero-shot table.
MERLIN_30 = (
    "submucosal_edema", "renal_hypodensities", "aortic_valve_calcification", "coronary_calcification", "thrombosis",
    "metastatic_disease", "pancreatic_atrophy", "renal_cyst", "osteopenia", "surgically_absent_gallbladder", "atelectasis",
    "abdominal_aortic_aneurysm", "anasarca", "hiatal_hernia", "lymphadenopathy", "prostatomegaly",
    "biliary_ductal_dilation", "cardiomegaly", "splenomegaly", "hepatomegaly", "atherosclerosis", "ascites",
    "pleural_effusion", "hepatic_steatosis", "appendicitis", "gallstones", "hydronephrosis", "bowel_obstruction",
    "free_air", "fracture",
)  # fmt: skip

# DeepLesion, Coarse_lesion_type 1 to 8.
DEEPLESION_8 = ("bone", "abdomen", "mediastinum", "liver", "lung", "kidney", "soft tissue", "pelvis")
