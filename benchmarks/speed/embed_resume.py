"""How long it takes to see that nothing is left to do: 1,000 series, all encoded, the same command again.

    python benchmarks/speed/embed_resume.py [--series 1000] [--slices 4] >> benchmarks/results/embed_resume_MACHINE_DATE.jsonl

In the order of a user: the first run; again, nothing changed (goal: 5 s); one scan added; all files copied, so that only
their content says that they are the same. The scans are small: what is measured is everything but the encoder.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from measure import print_lines

from hilum.archive.privacy import Key
from hilum.encode.table.embed import embed


def write_scans(folder: Path, num_series: int, num_slices: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(num_series):
        voxels = rng.normal(200, 80, (32, 32, num_slices)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{n:06}.nii.gz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--slices", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scans, seconds = Path(place) / "scans", {}
        write_scans(scans, given.series, given.slices)

        def run(name: str, source: Path, expected: int) -> None:
            began = time.perf_counter()
            report = embed(source, model="pixels", out=Path(place) / "f.parquet", key=Key(bytes(32)))
            seconds[name] = [time.perf_counter() - began]
            assert report["num_encoded"] == expected, report

        run("first run, s", scans, given.series)
        run("again, nothing changed, s", scans, 0)
        shutil.copy(scans / "000000.nii.gz", scans / "new.nii.gz")
        run("again, one scan added, s", scans, 1)
        shutil.copytree(scans, Path(place) / "copy", copy_function=shutil.copyfile)
        run("again, all files copied, s", Path(place) / "copy", 0)
    print_lines(seconds, series=given.series, slices=given.slices)


if __name__ == "__main__":
    main()
