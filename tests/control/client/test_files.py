"""Files to batches through the real child, and changes that are noticed."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from control.client import files
from control.client.files import ConfigError, FileSource
from control.client.state import State

WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: web-{n}, namespace: shop, labels: {{app: web}}}}
spec: {{address: 10.0.0.{n}, serviceAccount: web}}
---
"""


def workloads(*numbers):
    return "".join(WORKLOAD.format(n=n) for n in numbers)


def keys(state):
    return {workload.key for workload in state.workloads()}


def test_what_goes_away_gets_a_tombstone_and_what_comes_back_comes_back(tmp_path):
    path = tmp_path / "mesh.yaml"
    source, state = FileSource([path], "cluster.local"), State("cluster.local")
    path.write_text(workloads(1, 2))
    state.apply(source.load())
    assert keys(state) == {"shop/web-1", "shop/web-2"}
    path.write_text(workloads(2))
    assert state.apply(source.load()).workloads == {"shop/web-1"}
    assert not state.apply(source.load())
    path.write_text(workloads(1, 2))
    source.load()  # a batch that is never applied
    path.write_text(workloads(1))
    state.apply(source.load())
    assert keys(state) == {"shop/web-1"}


def test_refused_files_raise_every_error_and_the_next_good_load_goes_on(tmp_path):
    path = tmp_path / "mesh.yaml"
    source, state = FileSource([path], "cluster.local"), State("cluster.local")
    path.write_text(workloads(1))
    state.apply(source.load())
    path.write_text(workloads(1).replace("address", "adress").replace("serviceAccount", "serviceAcount"))
    with pytest.raises(ConfigError, match=r"(?s)mesh\.yaml:4: spec\.adress.*mesh\.yaml:4: spec\.serviceAcount"):
        source.load()
    path.write_text(workloads(2))
    state.apply(source.load())
    assert keys(state) == {"shop/web-2"}


def test_warnings_of_a_good_load_are_kept(tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_text("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n")
    source = FileSource([path], "cluster.local")
    source.load()
    assert source.warnings.startswith(f"warning: {path}:1: Service default/web has no selector")


def test_a_module_in_the_working_directory_does_not_stand_in_for_ours(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("raise SystemExit('hijacked')\n")
    (tmp_path / "mesh.yaml").write_text(workloads(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    topics = [topic.split("/")[3] for topic, _ in FileSource([Path("mesh.yaml")], "cluster.local").load()]
    assert topics == ["wl", "addr"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; sys.exit('Traceback\\nMemoryError')", "failed with status 1: MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", "failed with status -9: "),
        (r"import sys; sys.stdout.buffer.write(b'\0\0')", "stopped in the middle of its output"),
        (r"import sys; sys.stdout.buffer.write(b'\0\0\0\x09abc')", "stopped in the middle of its output"),
        ("import time; time.sleep(60)", "took more than 0 s"),
    ],
)
def test_a_child_that_fails_is_a_config_error(tmp_path, monkeypatch, script, expected):
    child = tmp_path / "python"
    child.write_text(f"#!{sys.executable}\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    monkeypatch.setattr(files, "_RENDER_TIMEOUT_S", 0.4 if "sleep" in script else 20.0)
    with pytest.raises(ConfigError, match=expected):
        FileSource([tmp_path], "cluster.local").load()


def test_a_child_that_cannot_start_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="does not start"):
        FileSource([tmp_path], "cluster.local").load()


def test_a_changed_replaced_added_or_removed_file_is_noticed(tmp_path):
    asyncio.run(_watch_notices_changes(tmp_path))


async def _watch_notices_changes(tmp_path):
    source, state = FileSource([tmp_path], "cluster.local"), State("cluster.local")
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(workloads(1))
    state.apply(source.load())
    happened = asyncio.Event()
    errors = []

    def applied(batch):
        state.apply(batch)
        happened.set()

    def refused(error):
        errors.append(str(error))
        happened.set()

    async def next_change():
        async with asyncio.timeout(30):
            await happened.wait()
        happened.clear()

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(source.watch(applied, refused, interval_s=0.02))
        first.write_text(workloads(1, 2))
        await next_change()
        assert keys(state) == {"shop/web-1", "shop/web-2"}
        second.write_text("a: [")
        await next_change()
        assert "b.yaml:" in errors[0]
        assert keys(state) == {"shop/web-1", "shop/web-2"}
        draft = tmp_path / "draft"
        draft.write_text(workloads(3))
        os.replace(draft, second)
        while keys(state) != {"shop/web-1", "shop/web-2", "shop/web-3"}:
            await next_change()
        first.unlink()
        while keys(state) != {"shop/web-3"}:
            await next_change()
        watching.cancel()


def test_nothing_is_loaded_again_while_nothing_changes(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(workloads(1))
    source = FileSource([tmp_path, tmp_path / "missing.yaml"], "cluster.local")
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        source.load()

    async def watch():
        async with asyncio.timeout(0.2):
            await source.watch(
                lambda batch: pytest.fail("loaded"), lambda error: pytest.fail("loaded"), interval_s=0.01
            )

    with pytest.raises(TimeoutError):
        asyncio.run(watch())
