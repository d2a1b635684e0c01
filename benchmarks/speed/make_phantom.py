"""How fast synthetic patients are made: painted, scanned, and written as DICOM.

    python benchmarks/speed/make_phantom.py [--patients 8] [--repeats 3] >> benchmarks/results/phantom_MACHINE_DATE.jsonl

CT+MR pairs of 96×256×256 a minute. The limit of the writing is the bytes: 25 MB of pixels a pair.
"""

import argparse
import tempfile
from pathlib import Path

from measure import print_lines, take_turns

from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct, scan_mr, write_phantom


def make_pairs(count: int) -> None:
    for index in range(count):
        anatomy = make_anatomy(sample_patient(index))
        scan_ct(anatomy)
        scan_mr(anatomy)


def write_pairs(count: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        write_phantom(Path(temporary) / "phantom", num_patients=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    make_pairs(1)  # warm up
    steps = {
        "pairs made a minute, one core": (lambda: make_pairs(given.patients), 60.0 * given.patients),
        "pairs written a minute, two processes": (lambda: write_pairs(given.patients), 60.0 * given.patients),
    }
    print_lines(take_turns(steps, given.repeats), num_patients=given.patients, shape=[96, 256, 256])


if __name__ == "__main__":
    main()
