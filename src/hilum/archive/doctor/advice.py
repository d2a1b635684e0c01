"""What the owner of an archive can do about a refused scan, by reason."""

from hilum.archive.ledger import REASONS

_ADVICE = {
    "unreadable": "Check the owner and the permissions of the file, and the disk it lies on.",
    "corrupt": "Copy or export the file again from where it came from.",
    "truncated": "Copy or export the file again: the transfer was cut off.",
    "cannot_decode": "Have the archive send it uncompressed or as JPEG 2000, or transcode it (dcmconv, gdcmconv).",
    "reader_crashed": "Export it again, uncompressed; if it still fails, tell us the transfer syntax.",
    "no_geometry": "Export the original images: converted or anonymised copies often lose position and spacing.",
    "bad_orientation": "Export the original images; a tool has rounded or overwritten the direction vectors.",
    "mixed_orientations": "Usually a localizer or a set of reformats. For training, export each orientation as its own series.",
    "mixed_patients": "Pseudonymise again with identifiers that differ between patients.",
    "irregular_spacing": "Look for missing slices and send the series again; for small gaps see `hilum prepare --help`.",
    "positions_not_on_a_line": "Usually a radial or curved reformat; use the series it was made from.",
    "duplicate_positions": "Usually several time points, echoes or copies in one series: export them as separate series.",
    "incomplete_volume": "Send the series again: slices of this part did not arrive, or the scan was stopped.",
    "no_rescale": "Export the original CT; a converter has dropped RescaleSlope and RescaleIntercept.",
    "not_hu": "Use the plain CT reconstruction; this one holds another quantity.",
    "monochrome1": "Export it as MONOCHROME2.",
    "non_finite": "Write the file again without NaN; they often mark what lies outside the field of view.",
    "too_large": "Check the header: real images are smaller. If it is real, use a machine with more memory.",
    "constant": "Nothing: there is no image in it.",
    "label_map": "Nothing: use it as a mask (`hilum embed --level region --masks`).",
    "multiframe": "Export it as classic DICOM, one slice per file.",
    "duplicate_instance": "Nothing: the other copy is used.",
    "too_few_slices": "Nothing, or lower `--min-slices`.",
    "derived": "Use the images it was computed from.",
    "other_format": "Convert it to NIfTI or DICOM.",
}


def advice(reason: str) -> str:
    """One sentence on what to do; "" for a scan that is used."""
    if not reason:
        return ""
    plain = (
        "See what the numbers say, and export it again."
        if REASONS[reason].fault
        else "Nothing: this is as it should be."
    )
    return _ADVICE.get(reason, plain)
