"""`uproxy.landlock`: what a process that has given up a directory can open, and what it cannot."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import json, os, socket, subprocess, sys
from pathlib import Path
from uproxy.landlock import close_to_us
closed, open_ = map(Path, sys.argv[1:])
close_to_us(closed)

def can(act):
    try:
        act()
    except OSError:
        return False
    return True

print(json.dumps({
    "read": can((closed / "key.pem").read_bytes),
    "list": can(lambda: list(closed.iterdir())),
    "write": can(lambda: (closed / "new").write_text("x")),
    "around": can(Path(f"/proc/self/root{closed}/key.pem").read_bytes),
    "link": can((open_ / "link").read_bytes),
    "child": subprocess.run(["cat", closed / "key.pem"], stderr=subprocess.DEVNULL).returncode == 0,
    "beside": can((open_ / "file").read_bytes),
    "log": can(lambda: (open_ / "log").write_text("x")),
    "modules": can(lambda: __import__("email.mime.text")),
    "signal": can(lambda: os.kill(os.getppid(), 0)),
    "trace": can(lambda: os.readlink(f"/proc/{os.getppid()}/fd/0")),
    "abstract": can(lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + closed.parent.name)),
}))
"""


def test_a_directory_is_closed_and_what_is_beside_it_is_not(tmp_path: Path) -> None:
    closed, opened = tmp_path / "db", tmp_path / "logs"
    for each in (closed, opened):
        each.mkdir()
    (closed / "key.pem").write_text("a key")
    (opened / "file").write_text("no key")
    (opened / "link").symlink_to(closed / "key.pem")
    command = [sys.executable, "-c", _CHILD, str(closed), str(opened)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + tmp_path.name)
        listener.listen()
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    scoped = set() if _is_scoped() else {"signal", "abstract"}
    assert {name for name, can in found.items() if can} == {"beside", "log", "modules"} | scoped


def _is_scoped() -> bool:
    """Whether the kernel has what Landlock scopes: Linux 6.12."""
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= (6, 12)


_UNLISTED = """
import json, os, sys
from pathlib import Path
from uproxy.landlock import close_to_us
outer = Path(sys.argv[1])
sys.path.append(str(outer / "modules"))
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
key, other = outer / "db" / "key.pem", outer / "file"
before = [key.read_text(), other.read_text()]
close_to_us(outer / "db")

def can(act):
    try:
        act()
    except OSError:
        return False
    return True

print(json.dumps([before, can(key.read_text), can(other.read_text), __import__("module_of_a_filter").VALUE]))
"""


def test_a_directory_is_closed_below_one_that_may_be_entered_and_not_listed() -> None:
    """Of that, modules can be loaded and nothing else."""
    outer = Path(tempfile.mkdtemp())  # tmp_path is closed to other users, as whom root's child goes on
    try:
        for name in ("db", "modules"):
            (outer / name).mkdir()
        (outer / "db" / "key.pem").write_text("a key")
        (outer / "file").write_text("something")
        (outer / "modules" / "module_of_a_filter.py").write_text("VALUE = 5")
        outer.chmod(0o111)
        command = [sys.executable, "-c", _UNLISTED, str(outer)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    finally:
        outer.chmod(0o700)
        shutil.rmtree(outer)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [["a key", "something"], False, False, 5]
