"""A process's own certificate while it runs: a renewed one is taken up, and trouble with it ends nothing."""

import asyncio
import errno

import pytest

from control.server.ca import Authority
from tests.support.certificates import WEB, identity_dir
from tests.support.waiting import until
from uproxy import credentials as module
from uproxy.credentials import CurrentCredentials
from uproxy.tls import Credentials


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "ca", "cluster.local")


@pytest.mark.parametrize("where", ["reading", "using"])
def test_a_lack_of_descriptors_delays_a_renewed_certificate(authority, tmp_path, monkeypatch, caplog, where):
    monkeypatch.setattr(module, "_WATCH_S", 0.02)
    directory = identity_dir(authority, tmp_path / "web", WEB)
    current = CurrentCredentials(directory, WEB)
    before, taken, lacking = current.value.serial, [], [True]

    def scarce(act):
        def tried(*arguments):
            if lacking:
                raise OSError(errno.EMFILE, "Too many open files")
            return act(*arguments)

        return tried

    used = scarce(lambda: taken.append(current.value.serial)) if where == "using" else lambda: taken.append(1)
    if where == "reading":
        monkeypatch.setattr(Credentials, "load", scarce(Credentials.load))

    async def scenario():
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(current.watch(used))
            identity_dir(authority, tmp_path / "web", WEB)
            await until(lambda: "Too many open files" in caplog.text)
            assert not taken
            lacking.clear()
            await until(lambda: taken)
            watching.cancel()

    asyncio.run(scenario())
    assert current.value.serial != before
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
