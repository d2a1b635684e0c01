"""Enhanced CT and MR: the frames of one file, each described by functional groups (PS3.3 C.7.6.16).

A group stands either in the shared sequence or with each frame. Position, orientation and spacing are taken from there
alone: a frame without them is refused, nothing is filled in. Everything that may tell several volumes of one file apart
(stack, echo, time, b-value, gradient, cardiac phase, label or control, dimension indices) is kept for splitting.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from hilum.archive.dicom.header import PROJECTIONS, SPLIT_KEYWORDS, TAGS, Header, Texts, describe, integer


def _tag(keyword: str) -> int:
    return int(tag_for_keyword(keyword) or 0)


_SHARED, _PER_FRAME = _tag("SharedFunctionalGroupsSequence"), _tag("PerFrameFunctionalGroupsSequence")
_DIMENSIONS = _tag("DimensionIndexSequence")
MORE_TAGS = [Tag(t) for t in (_SHARED, _PER_FRAME, _DIMENSIONS)]
# Legacy converted files keep here what has no functional group; the true groups override it.
_UNASSIGNED = tuple(
    _tag(k) for k in ("UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence")
)
_POSITION, _ORIENTATION, _MEASURES, _VALUES = (
    _tag(k) for k in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
                      "PixelValueTransformationSequence")
)  # fmt: skip
# Functional group → attributes taken from it.
_GROUPS: dict[int, tuple[int, ...]] = {
    **{
        sequence: tuple(TAGS[k] for k in SPLIT_KEYWORDS if k in TAGS and k != "SOPInstanceUID")
        for sequence in (
            *_UNASSIGNED,
            *(_tag(k) for k in (
                "FrameContentSequence", "MREchoSequence", "MRDiffusionSequence", "MRModifierSequence",
                "MRTimingAndRelatedParametersSequence", "MRVelocityEncodingSequence", "MRMetaboliteMapSequence",
                "MRArterialSpinLabelingSequence", "CardiacSynchronizationSequence", "TemporalPositionSequence",
                "CTXRayDetailsSequence", "CTReconstructionSequence",
            )),
        )
    },
    **{
        _tag(k): tuple(TAGS[a] for a in ("FrameType", "ComplexImageComponent", "VolumeBasedCalculationTechnique"))
        for k in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence")
    },
    _POSITION: (TAGS["ImagePositionPatient"],),
    _ORIENTATION: (TAGS["ImageOrientationPatient"],),
    _MEASURES: tuple(TAGS[a] for a in ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")),
    _VALUES: tuple(TAGS[a] for a in ("RescaleSlope", "RescaleIntercept", "RescaleType")),
}  # fmt: skip
_CONTENT, _GRADIENTS = _tag("FrameContentSequence"), _tag("DiffusionGradientDirectionSequence")
# What a file says of itself as a whole is no statement about a frame.
_NOT_OF_THE_FILE = {tag for tags in _GROUPS.values() for tag in tags} - {TAGS["ImageType"]}
_PLACES = {_tag("InStackPositionNumber"), TAGS["ImagePositionPatient"]}  # dimensions that run through the slices
_SPLITS = tuple(k for k in SPLIT_KEYWORDS if k in TAGS)


def describe_frames(data: Dataset, path: Path, size: int, forced: bool) -> list[Header]:
    """The frames of an enhanced file; one refused Header when none can be used, for one and the same reason.

    data  its header up to the pixels, with MORE_TAGS
    """
    text = Texts(data)
    whole = text.with_elements({t: e for t, e in text.elements.items() if t not in _NOT_OF_THE_FILE})
    count = integer(text["NumberOfFrames"] or "1")
    per_frame, shared = _items(data, _PER_FRAME), _items(data, _SHARED)
    first = describe(whole, path, size, forced, num_frames=1)
    if first.refusal == "truncated":
        return [first]
    if not per_frame:
        return [replace(first, refusal="no_geometry", detail="no per-frame functional groups")]
    if len(per_frame) != count or len(shared) > 1:
        detail = f"NumberOfFrames {count}, functional groups for {len(per_frame)}"
        return [replace(first, refusal="no_geometry", detail=detail)]
    of_all = _elements(shared[0]) if shared else {}
    dimensions = [_pointer(item) for item in _items(data, _DIMENSIONS)]
    headers = []
    for n, item in enumerate(per_frame):
        elements = whole.elements | of_all | _elements(item)
        if TAGS["FrameType"] in elements:  # its values mean what those of ImageType mean (PS3.3 C.8.16.1)
            elements[TAGS["ImageType"]] = elements[TAGS["FrameType"]]
        frame = whole.with_elements(elements)
        header = describe(frame, path, size, forced, frame=n, num_frames=count)
        headers.append(_frame(header, frame, dimensions))
    if headers[0].refusal and len({(h.refusal, h.detail) for h in headers}) == 1:
        return [headers[0]]
    return headers


def _frame(header: Header, text: Texts, dimensions: list[int]) -> Header:
    """What is said of frames only: their kind, whether they have a place, and what tells their volumes apart."""
    splits = {k: text[k] for k in _SPLITS if text[k]}
    for n, value in enumerate(text["DimensionIndexValues"].split("\\")[:9]):
        if value and not (n < len(dimensions) and dimensions[n] in _PLACES):
            splits[f"DimensionIndexValues[{n + 1}]"] = value
    refusal, detail = header.refusal, header.detail
    if not refusal:
        technique, component = text["VolumeBasedCalculationTechnique"], text["ComplexImageComponent"]
        missing = [
            name
            for name, value in (("PlanePosition", header.position), ("PlaneOrientation", header.orientation),
                                ("PixelMeasures", header.pixel_spacing))
            if not value
        ]  # fmt: skip
        if technique in PROJECTIONS or component in ("PHASE", "IMAGINARY"):
            refusal, detail = "derived", technique if technique in PROJECTIONS else component
        elif missing:
            refusal, detail = "no_geometry", f"functional group missing or not usable: {', '.join(missing)}"
    return replace(header, splits=splits, refusal=refusal, detail=detail)


def _items(data: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence; none when it is absent or something else."""
    value = data[tag].value if tag in data else None
    return list(value) if isinstance(value, Sequence) else []


def _pointer(item: Dataset) -> int:
    """The attribute that a dimension index counts; 0 when it is not stated."""
    value = item.get("DimensionIndexPointer")
    return int(value) if isinstance(value, int) and keyword_for_tag(value) else 0


def _elements(groups: Dataset) -> dict[int, Any]:
    """The attributes of interest in one set of functional groups, by tag."""
    return {tag: element for sequence in _GROUPS if sequence in groups for tag, element in _of_group(groups, sequence)}


def _of_group(groups: Dataset, sequence: int) -> Iterator[tuple[int, Any]]:
    for item in _items(groups, sequence)[:1]:
        elements = {int(tag): element for tag, element in item.items()}
        for wanted in _GROUPS[sequence]:
            if wanted in elements:
                yield wanted, elements[wanted]
        if sequence == _CONTENT and TAGS["DimensionIndexValues"] in elements:
            yield TAGS["DimensionIndexValues"], elements[TAGS["DimensionIndexValues"]]
        for gradient in _items(item, _GRADIENTS)[:1]:
            tag = TAGS["DiffusionGradientOrientation"]
            if tag in gradient:
                yield tag, gradient.get_item(tag)
