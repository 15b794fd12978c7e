"""How a workload becomes a member of a mesh, before its proxy starts.

`python -m uproxy.joining DIR TOKEN_FILE` does it for a launcher, which lives long and should not hold what this takes:
exit status 0 when DIR holds a usable identity, else 1 and why on standard output.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from control.client import certificates
from control.client.membership import Membership, MembershipError
from uproxy.tls import Credentials, CredentialsError

log = logging.getLogger(__name__)


class JoinError(Exception):
    """This workload is no member of a mesh, and did not become one; the text says why and what to do."""


def member(identity_dir: Path, token_file: Path | None) -> Membership:
    """The membership that an identity directory holds; joins with the token first when it holds none that is usable.

    Blocks, for a minute while no control plane answers. Raises JoinError.
    """
    try:
        return usable(identity_dir)
    except (MembershipError, CredentialsError) as error:
        if token_file is None:
            raise JoinError(f"{error}. `meshctl token create` makes a token to join with (--join)") from None
        log.info("joining the mesh: %s", error)
    try:
        asyncio.run(certificates.join(identity_dir, token_file))
        return usable(identity_dir)
    except certificates.JoinError as error:
        raise JoinError(f"cannot join with {token_file}: {error}") from None
    except (MembershipError, CredentialsError) as error:
        raise JoinError(f"joined with {token_file}, but the identity cannot be used: {error}") from None


def usable(identity_dir: Path) -> Membership:
    """The membership that an identity directory holds. Raises MembershipError or CredentialsError."""
    found = Membership.load(identity_dir)
    Credentials.load(identity_dir, found.identity)
    return found


def main() -> int:
    """The exit status."""
    identity_dir, token_file = map(Path, sys.argv[1:])
    try:
        member(identity_dir, token_file)
    except JoinError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
