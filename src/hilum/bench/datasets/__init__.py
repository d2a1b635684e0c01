"""Publishers' folders → cases, and their files → volumes: a file for each publisher or kind, one table of readers.

A reader takes the folder of a data set and a task, and returns every case it can vouch for and a `Problem` for everything
else. It chooses slices by content or by place in the patient, never by the order of files, and reads few voxels.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hilum.bench.datasets.cardiac_and_brain import read_atlas, read_emidec, read_oasis
from hilum.bench.datasets.chest_and_abdomen import read_ct_rate, read_ictcf, read_merlin, read_mycobacterial, read_osic
from hilum.bench.datasets.collect import Collector, Unusable, no_progress
from hilum.bench.datasets.covidx import read_covidx
from hilum.bench.datasets.curiabench import read_curiabench
from hilum.bench.datasets.deeplesion import read_deeplesion
from hilum.bench.datasets.forms import read_region as read_region
from hilum.bench.datasets.forms import read_scan as read_scan
from hilum.bench.datasets.forms import read_source as read_source
from hilum.bench.datasets.forms import read_truth as read_truth
from hilum.bench.datasets.forms import source_hash as source_hash
from hilum.bench.datasets.ixi import read_ixi
from hilum.bench.datasets.kits23 import read_kits23
from hilum.bench.datasets.kneemri import read_kneemri
from hilum.bench.datasets.luna16 import read_airrc, read_luna16
from hilum.bench.datasets.rsna import read_embolism, read_lumbar, read_trauma
from hilum.bench.datasets.rsna_ich import read_ich
from hilum.bench.datasets.tcia import read_mediastinal, read_nsclc_radiomics, read_tcga_kirc
from hilum.bench.datasets.totalsegmentator import read_totalsegmentator
from hilum.bench.task import Found, Problem, Task
from hilum.errors import UsageError
from hilum.terminal import Progress

READERS: dict[str, Callable[[Collector], None]] = {
    "TotalSegmentator": read_totalsegmentator,
    "TotalSegmentator-MRI": read_totalsegmentator,
    "IXI": read_ixi,
    "KiTS23": read_kits23,
    "LUNA16": read_luna16,
    "DeepLesion": read_deeplesion,
    "TCGA-KIRC": read_tcga_kirc,
    "RSNA-Lumbar": read_lumbar,
    "KneeMRI": read_kneemri,
    "RSNA-ICH": read_ich,
    "RSNA-Abdominal-Trauma": read_trauma,
    "EMIDEC": read_emidec,
    "ATLAS-R2": read_atlas,
    "COVIDx-CT": read_covidx,
    "OASIS-1": read_oasis,
    "Merlin": read_merlin,
    "CT-RATE": read_ct_rate,
    "RSNA-STR": read_embolism,
    "iCTCF": read_ictcf,
    "Mycobacterial": read_mycobacterial,
    "OSIC": read_osic,
    "NSCLC-Radiomics": read_nsclc_radiomics,
    "Mediastinal-Lymph-Node-SEG": read_mediastinal,
    "AirRC": read_airrc,
    "CuriaBench": read_curiabench,
}


def dataset_folder(root: Path, task: Task) -> Path:
    """Where the data set of a task lies: below the root under its name, or the root itself."""
    return root / task.dataset if (root / task.dataset).is_dir() else root


def read_cases(root: Path, task: Task, *, progress: Progress | None = None, cache: Path | None = None) -> Found:
    """The cases of a task in a user's folder.

    root      holds the data set's folder under its name (`Dataset.name`), or is that folder
    progress  called while label maps or headers are read, where a task needs them
    cache     folder that keeps what was counted in label maps, by keyed hashes, so that a second call is quick
    returns   cases in order of their ids, and everything that did not become one; without a case one problem is fatal

    Raises UsageError when the task's data set has no reader.
    """
    if task.dataset not in READERS:
        raise UsageError(f"data set '{task.dataset}' has no reader; expected one of {', '.join(READERS)}")
    into = Collector(task=task, folder=dataset_folder(root, task), progress=progress or no_progress, cache=cache)
    if not root.is_dir():
        return Found(cases=(), problems=(Problem(path=str(root), found="missing", expected="a folder", fatal=True),))
    try:
        READERS[task.dataset](into)
    except Unusable as unusable:
        into.problems.append(replace(unusable.problem, fatal=not into.cases))
    return into.found()
