"""A contract in words, and what it will do to one scan. Without torch or arrays: a contract is read as plain values."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hilum.settings import to_dict

if TYPE_CHECKING:
    from hilum.encode.encoder import AnyContract
    from hilum.volume import Volume

_DIRECTIONS = {"P": "Posterior", "L": "Left", "I": "Inferior", "A": "Anterior", "R": "Right", "S": "Superior"}
_SHOWN = {"CT": "CT in Hounsfield units", "MR": "MR in its own unit", "OT": "images of unknown origin"}
_POOLED = {
    "class": "the class token",
    "mean": "the mean of the patch tokens",
    "class+mean": "the class token and the mean of the patch tokens, one after the other",
}


def in_words(contract: Mapping[str, Any]) -> tuple[str, ...]:
    """What a model expects of its input, one sentence a step, in their order.

    contract  a contract as plain values (`to_dict`), of slices or of volumes
    """
    return _volume_words(contract) if "background_px" in contract else _slice_words(contract)


def notes_of(volume: "Volume", contract: "AnyContract") -> tuple[str, ...]:
    """What the contract does to this scan beside what it does to every scan: short notes for its feature rows.

    Whether the scan may be shown at all is for `check_scan` to say.
    """
    values = to_dict(contract)
    return _volume_notes(volume, values) if "background_px" in values else _slice_notes(volume, values)


def _slice_words(c: Mapping[str, Any]) -> tuple[str, ...]:
    planes = zip(("axial", "coronal", "sagittal"), c["orientation"])
    seen = "; ".join(f"{plane} {_DIRECTIONS[code[0]]}, {_DIRECTIONS[code[1]]}" for plane, code in planes)
    words = [_takes(c["modalities"]), f"Slices are seen with rows and columns running to: {seen}."]
    if c["rounding"] == "int16":
        words.append("Fractions are cut off and the whole numbers divided by 32767.")
    if c["clip_hu"] is not None:
        words.append(f"CT values are cut to {_range(c['clip_hu'])} HU.")
    if c["windows"]:
        shown = ", ".join(_range(window) for window in c["windows"])
        where = "in one channel each" if len(c["windows"]) > 1 else "in every channel"
        words.append(f"CT is shown from 0 to 1 between {shown} HU, {where}.")
    if c["percentiles"] is not None:
        low, high = c["percentiles"]
        words.append(f"What has no HU is shown from 0 to 1 between percentiles {low:g} and {high:g} of the slice.")
    sized, normalised = _sized(c), _normalised(c)
    words += [sized, normalised] if c["normalise_last"] else [normalised, sized]
    words.append(f"The network sees {'one channel' if c['channels'] == 1 else str(c['channels']) + ' channels'}.")
    words.append(f"The vector of a slice is {_POOLED[c['pooling']]}.")
    return tuple(words)


def _sized(c: Mapping[str, Any]) -> str:
    size, how = c["size_px"], c["resampling"] + ("" if c["antialias"] else ", without antialiasing")
    if c["fit"] == "crop":
        return f"The short side becomes {c['short_px']} px ({how}); the middle {size}×{size} px are cut out."
    return f"It is stretched to {size}×{size} px ({how}); the aspect ratio is not kept."


def _normalised(c: Mapping[str, Any]) -> str:
    if c["normalise"] == "constants":
        return f"Of each channel {_numbers(c['mean'])} is subtracted; it is divided by {_numbers(c['std'])}."
    whose = "all slices of the scan" if c["normalise"] == "volume" else "the slice"
    return (
        f"The mean of {whose} is subtracted; it is divided by the unbiased standard deviation"
        f" unless that is below {c['eps']:g}."
    )


def _volume_words(c: Mapping[str, Any]) -> tuple[str, ...]:
    axes = ", ".join(_DIRECTIONS[letter] for letter in c["orientation"])
    words = [
        _takes(c["modalities"]),
        f"Slices, rows and columns run to {axes}.",
        f"Values are cut to {_range(c['clip_hu'])} HU.",
    ]
    told = {"modalities", "orientation", "clip_hu", "background_px", "min_spacing_mm", "max_patches", "patch"}
    told |= {"mean", "std", "pooling", "edges", "longest"}
    limit = f", and coarser where a side would have more than {c['longest']} voxels" if c.get("longest") else ""
    pads = c.get("edges") == "pad"
    rest = "its edges are repeated until patches are whole" if pads else "what is over is cut evenly"
    if c["background_px"]:
        words.append(f"Air around the patient is cut off (box filter of {c['background_px']} voxels, above -800 HU).")
    patch = "×".join(map(str, c["patch"]))
    others = any(modality != "CT" for modality in c["modalities"])
    if others and c["background_px"]:
        words.append("What has no HU is not cut to a range; its background ends at a threshold of its own.")
    elif others:
        words.append("What has no HU is not cut to a range.")
    words += [
        f"It is made isotropic at its smallest spacing, but not finer than {c['min_spacing_mm']:g} mm{limit}.",
        f"It is made smaller until it has at most {c['max_patches']:,} patches of {patch} voxels; {rest}.",
        f"{c['mean']:g} HU is subtracted; it is divided by {c['std']:g} HU.",
    ]
    if others:
        words.append(
            "What has no HU is normalised by mean and standard deviation of the scan before it is made isotropic."
        )
    words += [f"{name.replace('_', ' ')}: {value}." for name, value in c.items() if name not in told]
    words.append(f"The vector of a volume is {_POOLED[c['pooling']]}.")
    return tuple(words)


def _slice_notes(volume: "Volume", c: Mapping[str, Any]) -> tuple[str, ...]:
    from hilum.volume import PLANES

    notes = _placed(volume, tuple(PLANES.values()))
    if c["rounding"] == "int16" and volume.voxels.dtype.kind == "f":
        notes.append("fractions cut off")
    if volume.unit == "HU":
        if c["clip_hu"] is not None:
            notes.append(f"cut to {_range(c['clip_hu'])} HU")
        if c["windows"]:
            notes.append(f"window {', '.join(_range(window) for window in c['windows'])} HU")
    elif c["percentiles"] is not None:
        notes.append(f"no HU: percentiles {c['percentiles'][0]:g} to {c['percentiles'][1]:g} of each slice")
    rows, columns = volume.shape[1:]
    if c["fit"] == "crop":
        share = c["size_px"] ** 2 / c["short_px"] ** 2 * min(rows, columns) / max(rows, columns)
        if share < 1:
            notes.append(f"{1 - share:.0%} of each slice cut off at its edges")
    elif rows != columns:
        notes.append(f"{rows}×{columns} px stretched to a square")
    return tuple(notes)


def _volume_notes(volume: "Volume", c: Mapping[str, Any]) -> tuple[str, ...]:
    notes = _placed(volume, (c["orientation"],))
    if volume.unit == "HU":
        notes.append(f"cut to {_range(c['clip_hu'])} HU")
    if volume.affine is not None:
        spacing = volume.spacing_mm
        aim = max(min(spacing), c["min_spacing_mm"])
        if any(abs(mm - aim) > 1e-3 * aim for mm in spacing):
            notes.append(f"resampled from {'×'.join(f'{mm:.3g}' for mm in spacing)} mm to {aim:.3g} mm or coarser")
    return tuple(notes)


def _placed(volume: "Volume", planes: Sequence[str]) -> list[str]:
    if volume.affine is None:
        return ["plane unknown: shown as stored"]
    if volume.orientation in planes:
        return []
    return [f"turned from {volume.orientation}" + (f" to {planes[0]}" if len(planes) == 1 else "")]


def _takes(modalities: Sequence[str]) -> str:
    return f"Takes {', '.join(_SHOWN.get(modality, modality) for modality in modalities)}."


def _range(pair: Sequence[float]) -> str:
    return f"{pair[0]:g} to {pair[1]:g}"


def _numbers(values: Sequence[float]) -> str:
    return " / ".join(f"{value:g}" for value in values)
