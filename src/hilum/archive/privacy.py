"""Keyed hashes instead of identifiers.

Names, patient ids, UIDs and paths stay in this room. What we write carries `HMAC-SHA256(key, kind:identifier)` cut to
16 hex digits: stable for whoever holds the key, meaningless for everyone else (a plain hash of a patient number could
be undone by trying all numbers). The key is a small file that its owner keeps; labels are joined by hashing their
identifiers with the same key, on the fly. Dates become days from a secret origin of each patient: intervals within a
patient stay exact, the calendar does not show.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from dataclasses import dataclass
from datetime import date as calendar_date
from pathlib import Path
from typing import Literal

from hilum.errors import InputError

Kind = Literal["patient", "study", "series", "item"]

ORIGIN_SPAN_DAYS = 36525  # a century: every study_day fits many dates
_FIRST_ORIGIN = calendar_date(1900, 1, 1).toordinal()


@dataclass(frozen=True)
class Key:
    """The secret that turns identifiers into hashes."""

    secret: bytes

    def __repr__(self) -> str:  # never print the secret
        return f"Key({self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that tell two keys apart and reveal neither."""
        return hashlib.sha256(b"hilum-key:" + self.secret).hexdigest()[:8]

    def hash(self, kind: Kind, identifier: str) -> str:
        """16 hex digits. An empty identifier stays empty: an unknown patient is not one common patient."""
        if not identifier:
            return ""
        message = f"{kind}:{identifier}".encode("utf-8", "surrogateescape")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:16]

    def study_day(self, patient: str, date: str) -> int | None:
        """Days from the patient's secret origin to a date: two studies of one patient keep their exact interval.

        patient  the identifier itself, not its hash; "" when unknown
        date     DICOM DA, yyyymmdd (PS3.5 6.2); also yyyy.mm.dd of ACR-NEMA
        returns  None when the patient is unknown or the date is missing or no date

        The origin is a day of 1900 to 1999, drawn from the HMAC of the identifier: dates are modified, intervals
        retained (PS3.15 Annex E.3.6, Retain Longitudinal Temporal Information with Modified Dates). Without the patient
        there is no origin that only their studies share, so no number is given.
        """
        digits = date.strip(" \0").replace(".", "")
        if not patient or len(digits) != 8 or not (digits.isascii() and digits.isdigit()):
            return None
        try:
            day = calendar_date(int(digits[:4]), int(digits[4:6]), int(digits[6:])).toordinal()
        except ValueError:
            return None
        message = f"origin:{patient}".encode("utf-8", "surrogateescape")
        drawn = int.from_bytes(hmac.new(self.secret, message, hashlib.sha256).digest()[:8], "big")
        return day - _FIRST_ORIGIN - drawn % ORIGIN_SPAN_DAYS


def key_path() -> Path:
    """`$HILUM_KEY`, or `~/.config/hilum/key`."""
    given = os.environ.get("HILUM_KEY")
    return Path(given) if given else Path.home() / ".config" / "hilum" / "key"


def _make_key(path: Path) -> None:
    """Of several processes that make the key at once, one does; a link never replaces a file and appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as made:  # mode 0600
        made.write(secrets.token_hex(32) + "\n")
        made.flush()
        os.fsync(made.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(made.name, path)


def read_key(path: Path | None = None) -> Key:
    """The user's key; made at random, readable by its owner only, when there is none yet."""
    path = path or key_path()
    try:
        if not path.exists():
            _make_key(path)
        secret = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        raise InputError(
            f"the key file {path} cannot be read or made ({error}); expected 64 hex digits. Point HILUM_KEY to the "
            "right file"
        ) from None
    if len(secret) < 16:
        raise InputError(f"the key in {path} has {len(secret)} bytes; expected at least 16")
    return Key(secret)
