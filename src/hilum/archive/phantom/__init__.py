"""A synthetic torso in CT and MR with every label known.

One anatomy per patient, drawn from a seed: a map of tissues and a map of organs on one grid. CT turns tissues into
Hounsfield units, MR turns the *same* tissues into spin-echo signal from their proton density, T1 and T2. Size, shape
and topology vary with the patient, sex and age (gallbladders removed, one kidney or a horseshoe, ageing bone, calcified
aortas), and each patient has benign or malignant liver lesions of equal mean contrast that differ in shape and
texture only. Positions are LPS millimetres around a point in front of the first lumbar vertebra.
"""

from hilum.archive.phantom.body import ORGAN, ORGANS, Patient, sample_patient
from hilum.archive.phantom.files import write_phantom
from hilum.archive.phantom.scan import Anatomy, make_anatomy, organ_mask, scan_ct, scan_mr, survival

__all__ = [
    "ORGAN",
    "ORGANS",
    "Anatomy",
    "Patient",
    "make_anatomy",
    "organ_mask",
    "sample_patient",
    "scan_ct",
    "scan_mr",
    "survival",
    "write_phantom",
]
