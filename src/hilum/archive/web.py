"""DICOMweb: one study or series of a server, listed (QIDO-RS) and fetched (WADO-RS, PS3.18).

Neither the address nor an identifier in it is written anywhere. A server that asks for a password finds it in ~/.netrc.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hilum.errors import InputError, UsageError
from hilum.records import explain_full_disk
from hilum.terminal import Progress

TIMEOUT_S = 60.0
_ADDRESS = re.compile(r"(?P<base>https?://.+?)/studies/(?P<study>[0-9.]+)(?:/series/(?P<series>[0-9.]+))?/?")


@dataclass(frozen=True)
class Address:
    """Where a study or series lies.

    base           of the service, up to "/studies"
    study, series  their UIDs; series None: the whole study
    """

    base: str
    study: str
    series: str | None = None

    def __repr__(self) -> str:  # a UID is an identifier: never print it
        return f"Address({self.host})"

    @property
    def host(self) -> str:
        return urlsplit(self.base).hostname or ""


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def parse_address(text: str) -> Address:
    """UsageError unless it is …/studies/UID or …/studies/UID/series/UID."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UsageError(
            "the address is no DICOMweb study or series; expected https://HOST/dicom-web/studies/UID or "
            "https://HOST/dicom-web/studies/UID/series/UID"
        )
    return Address(found["base"], found["study"], found["series"])


def list_instances(address: Address) -> list[str]:
    """SOP instance UIDs that the server has, sorted. InputError when it does not answer, refuses or has none."""
    with _Explained(address):
        found = _client(address).search_for_instances(
            address.study, address.series, fields=["SOPInstanceUID"], get_remaining=True
        )
        uids = sorted({str(row["00080018"]["Value"][0]) for row in found})
    if not uids:
        raise InputError(f"{address.host} knows no instance of this study or series; check the address")
    return uids


def fetch(address: Address, folder: Path, expected: list[str], progress: Progress | None = None) -> None:
    """Write all instances into a folder, in the encoding that the server stores.

    expected  what `list_instances` found; InputError when other instances arrive, or not all of them
    """
    arrived: set[str] = set()
    with _Explained(address), explain_full_disk(folder / "0.dcm"):
        for number, instance in enumerate(_instances(address)):
            arrived.add(str(instance.SOPInstanceUID))
            instance.save_as(folder / f"{number}.dcm", enforce_file_format=True)
            if progress:
                progress(number + 1, len(expected), "fetching instances")
    if arrived != set(expected):
        raise InputError(
            f"{address.host} lists {len(expected)} instances and sent {len(arrived)}, {len(arrived & set(expected))} of them "
            "listed; the study may still be arriving there. Run the same command again"
        )


def _instances(address: Address) -> Iterator[Any]:
    client, stored = _client(address), (("application/dicom", "*"),)
    if address.series is None:
        yield from client.iter_study(address.study, media_types=stored)
    else:
        yield from client.iter_series(address.study, address.series, media_types=stored)


def _client(address: Address) -> Any:
    from dicomweb_client.web import DICOMwebClient

    client = DICOMwebClient(address.base, timeout=TIMEOUT_S)
    client.set_http_retry_params(max_attempts=3)
    return client


class _Explained:
    """What goes wrong between here and the server, as an InputError without identifiers."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            return
        from pydicom.errors import InvalidDicomError
        from requests.exceptions import RequestException

        host = self.address.host
        response = getattr(error, "response", None)
        if isinstance(error, RequestException) and response is not None:
            raise InputError(f"{host} answers {response.status_code} ({response.reason}); expected the study. Check "
                             "the address, and the password in ~/.netrc") from None  # fmt: skip
        if isinstance(error, RequestException):
            raise InputError(f"{host} cannot be reached ({kind.__name__}); check the address and the network") from None
        if isinstance(error, (ValueError, KeyError, AttributeError, InvalidDicomError)):
            raise InputError(f"{host} sent what is no DICOMweb answer ({kind.__name__}); check the address") from None
