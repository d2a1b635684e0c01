"""Why a scan was not used, and what to keep in mind about one that was: codes, sentences, advice. One page."""

from dataclasses import dataclass

_EXPORT_AGAIN = "See what the numbers say, and export it again."
_NOTHING = "Nothing: this is as it should be."


@dataclass(frozen=True)
class Reason:
    """Why files were not used.

    sentence  for the user
    fault     True when this looked like a usable scan but could not be used; False when set aside by design
    advice    what the owner of the archive can do
    """

    sentence: str
    fault: bool
    advice: str


def _fault(sentence: str, advice: str = _EXPORT_AGAIN) -> Reason:
    return Reason(sentence, True, advice)


def _aside(sentence: str, advice: str = _NOTHING) -> Reason:
    return Reason(sentence, False, advice)


REASONS: dict[str, Reason] = {
    "unreadable": _fault(
        "The file or folder cannot be opened (permission, broken link, failing disk).",
        "Check the owner and the permissions of the file, and the disk it lies on.",
    ),
    "corrupt": _fault(
        "The file begins like a known format but cannot be parsed.",
        "Copy or export the file again from where it came from.",
    ),
    "detached_voxels": _fault(
        "The header keeps its voxels in other files: missing, several, or not in its folder.",
        "Put the voxel file beside its header, under the name that the header gives.",
    ),
    "truncated": _fault(
        "The file ends before its image does, or holds no pixels at all.",
        "Copy or export the file again: the transfer was cut off.",
    ),
    "cannot_decode": _fault(
        "The pixel data cannot be decoded: no decoder, or a broken stream.",
        "Have the archive send it uncompressed or as JPEG 2000, or transcode it (dcmconv, gdcmconv).",
    ),
    "reader_crashed": _fault(
        "Reading this scan failed or killed its process; it was left out, the others went on.",
        "Export it again, uncompressed; if it still fails, tell us the transfer syntax.",
    ),
    "no_geometry": _fault(
        "Position, orientation or spacing is missing or not usable.",
        "Export the original images: converted or anonymised copies often lose position and spacing.",
    ),
    "bad_orientation": _fault(
        "The direction vectors are not of unit length or not at right angles.",
        "Export the original images; a tool has rounded or overwritten the direction vectors.",
    ),
    "sheared": _fault(
        "The axes are not at right angles (gantry tilt), which an isotropic volume needs.",
        "Prepare the archive again with `--resample tilt`.",
    ),
    "no_body": _fault(
        "Nothing but air or background: no part of the scan is mostly filled.",
        "Look at it with `hilum inspect`; `--set background_px=0` keeps all of every scan.",
    ),
    "mixed_orientations": _fault(
        "Nearly every slice has its own orientation: a radial scan, no stack.",
        "Usually a radial scan or a set of reformats; use the series it was made from.",
    ),
    "mixed_patients": _fault(
        "One series identifier is shared by several patients or studies.",
        "Pseudonymise again with identifiers that differ between patients.",
    ),
    "missing_slices": _fault(
        "Slices are missing: some distances are multiples of the others.",
        "Send the series again; to interpolate small gaps use `--accept gap=6mm`.",
    ),
    "irregular_spacing": _fault(
        "The distance between slices changes, not in whole multiples.",
        "Look for missing slices and send the series again; to interpolate use `--accept gap=6mm`.",
    ),
    "positions_not_on_a_line": _fault(
        "The slice positions do not lie on one straight line.",
        "Usually a radial or curved reformat; use the series it was made from.",
    ),
    "duplicate_positions": _fault(
        "Several slices share a position and no attribute tells the volumes apart.",
        "Usually several time points, echoes or copies in one series: export them as separate series.",
    ),
    "incomplete_volume": _fault(
        "This part of a split series has fewer slices than its sisters.",
        "Send the series again: slices of this part did not arrive, or the scan was stopped.",
    ),
    "no_rescale": _fault(
        "No usable RescaleSlope and RescaleIntercept: a CT without them has no Hounsfield units.",
        "Export the original CT; a converter has dropped RescaleSlope and RescaleIntercept.",
    ),
    "not_hu": _fault(
        "The series calls itself CT but its values are another quantity than Hounsfield units.",
        "Use the plain CT reconstruction; this one holds another quantity.",
    ),
    "non_finite": _fault(
        "Voxels are NaN or infinite.",
        "Write the file again without NaN; they often mark what lies outside the field of view.",
    ),
    "too_large": _fault(
        "The image claims more voxels than fit here, or than any radiological image has.",
        "Check the header: real images are smaller. If it is real, use a machine with more memory.",
    ),
    "labels_off_grid": _fault(
        "Labels (a mask, SEG or RTSTRUCT) do not lie on the grid of the scan.",
        "Use labels that were drawn on this scan, or resample them onto it.",
    ),
    "mosaic": _fault(
        "A mosaic (a volume tiled into one image) that does not say where its tiles lie.",
        "Export it as one file per slice, or with the vendor's private attributes kept.",
    ),
    "noise": _fault(
        "Neighbouring voxels have nothing to do with each other: noise, not an image.",
        "Look at it with `hilum inspect`; some archives blank pixels with noise.",
    ),
    "repeated_slices": _fault(
        "Most slices are copies of their neighbours.", "Look at it with `hilum inspect`, and export it again."
    ),
    "not_an_image": _aside("No image: a document, a table, or an unknown format."),
    "other_format": _aside("An image format that this version does not read.", "Convert it to NIfTI or DICOM."),
    "dicomdir": _aside("A DICOMDIR: a directory of other files."),
    "localizer": _aside("A localizer or scout."),
    "secondary_capture": _aside("A secondary capture: a screenshot or a page of text."),
    "projection": _aside("A projection image (radiograph, mammogram, angiogram)."),
    "ultrasound": _aside("Ultrasound."),
    "segmentation": _aside(
        "A DICOM segmentation: labels, not an image.",
        "Nothing: use it as a mask (`hilum embed --level region --masks`).",
    ),
    "structure_set": _aside(
        "An RTSTRUCT: contours, not an image.", "Nothing: use it as a mask (`hilum embed --level region --masks`)."
    ),
    "report": _aside("A report or document in DICOM form."),
    "presentation": _aside("A presentation state: how to display other images."),
    "parametric_map": _aside("A parametric map: computed values, not an image."),
    "other_modality": _aside("An image of another modality than CT or MR."),
    "other_object": _aside("A DICOM object that is neither image nor report."),
    "multiframe": _aside(
        "Several frames in one file, in a form other than enhanced CT or MR.",
        "Export it as classic DICOM, one slice per file, or as enhanced CT or MR.",
    ),
    "derived": _aside(
        "A computed map, projection or curved reformat, not the acquired image.", "Use the images it was computed from."
    ),
    "colour": _aside("A colour image."),
    "label_map": _aside(
        "A label map: class numbers, not an image.", "Nothing: use it as a mask (`hilum embed --level region --masks`)."
    ),
    "not_3d": _aside("An image file whose axes are not space and time (vectors, spectra)."),
    "constant": _aside(
        "All voxels have one value: an empty image or an empty label map.", "Nothing: there is no image in it."
    ),
    "duplicate_instance": _aside(
        "A slice that exists twice (by SOPInstanceUID); one copy is used.", "Nothing: the other copy is used."
    ),
    "nearly_constant": _aside("Almost all voxels have one value."),
    "few_levels": _aside("Too few different grey values for an image."),
    "small_matrix": _aside("Too few rows or columns for an image."),
    "duplicate": _aside("The same voxels as another scan, which is stored.", "Nothing: the other copy is stored."),
    "too_few_slices": _aside("Fewer slices than asked for.", "Nothing, or lower `--min-slices`."),
}

# Cautions on a scan that is used: written "code: numbers". Guesses are marked as such.
FLAGS: dict[str, str] = {
    "modality_guessed": "CT or MR guessed from the values; the file does not say.",
    "spacing_tag": "SpacingBetweenSlices disagrees with the positions, which count.",
    "split_by_order": "Volumes told apart by the order of InstanceNumber alone; no other attribute does.",
    "lossy": "The pixels went through lossy compression, with the ratio when it is stated.",
    "philips_scaling": "Values are the displayed ones (rescaled), not the precise ones that Philips keeps apart.",
    "sform_qform": "The two affines of a NIfTI file disagree (corners in mm, axes in degrees); the sform counts.",
    "pixdim": "The voxel sizes of a NIfTI header disagree with its affine, which counts.",
    "gaps_between": "Slices are thinner than the distance between them: tissue between them was not imaged.",
    "hu_suspect": "A CT whose values do not prove to be Hounsfield units.",
    "noisy": "Neighbouring voxels have little to do with each other.",
    "few_levels": "Few different grey values.",
    "saturated": "Many voxels stand at the highest value: bright tissue may be cut off.",
    "repeated_slices": "Some slices are copies of their neighbours.",
    "small_matrix": "Few rows or columns.",
    "field_size": "An unlikely field of view: a crop, or a spacing in another unit.",
    "mostly_background": "Few slices, or none, show anatomy on half of their area (Curia-2 trains on no others).",
    "duplicate": "The same voxels as another stored scan.",
    "looks_like": "Looks like a scan of another patient: perhaps the same scan under two names.",
    "burned_in": "Pixels look like rendered text (score 0 to 1): names may be burned into the image.",
    "residual_identifiers": "The header still carries what looks like identifiers (score 0 to 1, attributes).",
    "face": "A head whose face could be rendered (score 0 to 1).",
}


def flag(code: str, numbers: str = "") -> str:
    """A caution for `Entry.flags`."""
    assert code in FLAGS, code
    return f"{code}: {numbers}" if numbers else code
