from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from uproxy import claims
from uproxy.claims import ClaimError, claimed_name, claimed_uid

_HOLD = """
import sys, time
from pathlib import Path
from uproxy import claims
claims.LOCK_DIR = Path(sys.argv[1])
with claims.claimed_name(claims.LOCK_DIR / "web.lock"), claims.claimed_uid(None) as uid:
    print(uid, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(claims, "LOCK_DIR", tmp_path)
    return tmp_path


def test_held_by_another_process_until_it_dies(locks: Path) -> None:
    argv = [sys.executable, "-c", _HOLD, str(locks)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        uid = int(holder.stdout.readline())
        with pytest.raises(ClaimError, match=f"pid {holder.pid}"), claimed_name(locks / "web.lock"):
            pass
        with pytest.raises(ClaimError, match="another sidecar's"), claimed_uid(uid):
            pass
        with claimed_uid(None) as other:
            assert other != uid
        holder.kill()
    with claimed_name(locks / "web.lock"), claimed_uid(uid) as again:
        assert again == uid
        assert (locks / "web.lock").read_text() == f"{os.getpid()}\n"
    assert not (locks / "web.lock").exists()


def test_errors_of_the_block_come_through(locks: Path) -> None:
    with pytest.raises(BlockingIOError), claimed_uid(None):
        raise BlockingIOError


def test_uid_is_in_the_range_that_no_person_has(locks: Path) -> None:
    with ExitStack() as stack:
        assert 61184 <= stack.enter_context(claimed_uid(None)) <= 65519
