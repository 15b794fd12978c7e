"""An identity directory, and what mesh.json in it says: who this workload is, and where its control plane is.

`control.client.certify` writes the directory when the workload joins, and keeps it fresh.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import IdentityError, SpiffeId, make_id, parse_trust_domain
from control.api.names import wrong_dns_label, wrong_subdomain
from control.api.workload import key

KEY_FILE: Final = "key.pem"
NEXT_KEY_FILE: Final = "key.next.pem"
"""The key that is being certified. It becomes key.pem after its chain.pem is there, so of a moment both may exist."""
CHAIN_FILE: Final = "chain.pem"
BUNDLE_FILE: Final = "bundle.pem"
MEMBERSHIP_FILE: Final = "mesh.json"

CONTROL_SCHEME: Final = "https"
BROKER_SCHEME: Final = "mqtts"

_MAX_BYTES: Final = 64 * 1024
_MAX_LISTED: Final = 16  # addresses of a workload; brokers of a mesh
_URL: Final = re.compile(r"([a-z]+)://(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]{1,253})):([0-9]{1,5})")
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9-]{1,63}")  # RFC 1123 section 2.1


class MembershipError(Exception):
    """mesh.json is missing or cannot be used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Membership:
    """One workload's place in the mesh. A node agent is a workload here, without addresses."""

    identity: SpiffeId
    workload: str
    """Name of its WorkloadEntry, in the identity's namespace."""
    addresses: tuple[IpAddress, ...]
    control: str
    """Where certificates are renewed: `https://host:15012`."""
    brokers: tuple[str, ...]
    """At least one, any of which will do: `mqtts://host:8883`."""

    @property
    def key(self) -> str:
        return key(self.identity.namespace, self.workload)

    @classmethod
    def parse(cls, document: object) -> Membership:
        """From the JSON of mesh.json. Raises MembershipError.

        Fields that are not known are left out: a newer control plane may say more.
        """
        if type(document) is not dict:
            raise MembershipError("a membership is a JSON object")
        namespace, workload = _text(document, "namespace"), _text(document, "workload")
        try:
            identity = make_id(
                parse_trust_domain(_text(document, "trust_domain")), namespace, _text(document, "service_account")
            )
            addresses = tuple(parse_address(text) for text in _texts(document, "addresses"))
        except (IdentityError, AddressError) as error:
            raise MembershipError(str(error)) from None
        wrong = wrong_dns_label(namespace) or wrong_subdomain(workload)
        if wrong:
            raise MembershipError(wrong)
        control, brokers = _text(document, "control"), tuple(_texts(document, "brokers"))
        if not brokers:
            raise MembershipError("'brokers' is empty")
        host_and_port(control, CONTROL_SCHEME)
        for broker in brokers:
            host_and_port(broker, BROKER_SCHEME)
        return cls(identity, workload, addresses, control, brokers)

    @classmethod
    def load(cls, identity_dir: str | Path) -> Membership:
        """Read mesh.json of an identity directory. Raises MembershipError."""
        path = Path(identity_dir) / MEMBERSHIP_FILE
        try:
            # Nonblocking: whose directory it is may put a FIFO there, at which a node's agent would wait for ever.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise MembershipError(f"{path} is not a regular file")
                content = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            raise MembershipError(f"{path} does not exist: this workload has not joined a mesh (--join)") from None
        except OSError as error:
            raise MembershipError(f"{path} cannot be read: {error.strerror}") from None
        try:
            if len(content) > _MAX_BYTES:
                raise MembershipError(f"it has more than {_MAX_BYTES} bytes")
            return cls.parse(json.loads(content))
        except (ValueError, RecursionError, MembershipError) as error:
            raise MembershipError(f"{path} is damaged: {error}. Join again with a new token") from None

    def encode(self) -> bytes:
        """The content of mesh.json."""
        document = {
            "trust_domain": self.identity.trust_domain,
            "namespace": self.identity.namespace,
            "service_account": self.identity.service_account,
            "workload": self.workload,
            "addresses": list(self.addresses),
            "control": self.control,
            "brokers": list(self.brokers),
        }
        return (json.dumps(document, indent=2) + "\n").encode()


def host_and_port(url: str, scheme: str) -> tuple[str, int]:
    """Host (an IPv6 address without brackets) and port of `scheme://host:port`. Raises MembershipError."""
    found = _URL.fullmatch(url)
    if found is None or found[1] != scheme or not 0 < int(found[4]) < 65536:
        raise MembershipError(f"{url[:80]!r} is not of the form {scheme}://host:port")
    if found[2] is not None:
        try:
            return parse_address(found[2]), int(found[4])
        except AddressError as error:
            raise MembershipError(f"{url[:80]!r}: {error}") from None
    if not all(_HOST_LABEL.fullmatch(label) for label in found[3].split(".")):
        raise MembershipError(f"{url[:80]!r}: {found[3][:80]!r} is not a host name")
    return found[3], int(found[4])


def _text(document: Mapping[str, object], name: str) -> str:
    value = document.get(name)
    if type(value) is not str:
        raise MembershipError(f"{name!r} must be text")
    return value


def _texts(document: Mapping[str, object], name: str) -> list[str]:
    values = document.get(name)
    if type(values) is not list or len(values) > _MAX_LISTED or not all(type(value) is str for value in values):
        raise MembershipError(f"{name!r} must be a list of at most {_MAX_LISTED} texts")
    return values
