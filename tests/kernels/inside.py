#!/sbin/python
"""The guest's first process: makes it a host as the project wants it, tries everything there, and ends it."""

import ctypes
import json
import os
import resource
import subprocess
import sys
import traceback
from pathlib import Path

PYTHON = os.readlink("/sbin/python")  # by its own path it knows its virtual environment
REPORT = "/dev/ttyS1"
PROJECT = Path(__file__).resolve().parents[2]
MOUNTS = {
    "/proc": "proc",
    "/sys": "sysfs",
    "/dev": "devtmpfs",
    "/run": "tmpfs",
    "/sys/fs/cgroup": "cgroup2",
    "/sys/fs/bpf": "bpf",
}
FINIT_MODULE = 313  # x86-64
DESCRIPTORS = 16384  # as service managers give; the kernel's own 1,024 are fewer than some tests open
RB_POWER_OFF = 0x4321FEDC  # <linux/reboot.h>

libc = ctypes.CDLL(None, use_errno=True)


def prepare() -> None:
    for place, kind in MOUNTS.items():
        if libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None):
            raise OSError(ctypes.get_errno(), f"mount {kind} on {place}")
    for path in sorted(Path("/modules").iterdir()):
        with path.open("rb") as module:
            if libc.syscall(FINIT_MODULE, module.fileno(), b"", 0):
                print(f"{path.name}: {os.strerror(ctypes.get_errno())}", flush=True)
    os.environ |= {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "HOME": "/root", "LANG": "C.UTF-8", "CI": "1"}
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", "198.18.0.1/32", "dev", "lo"], check=True)
    os.chdir(PROJECT)


def main(tests: list[str]) -> None:
    prepare()
    check = [PYTHON, "-m", "control.cli", "check", "-o", "json"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    found = {"release": os.uname().release, "check": done.stdout, "errors": done.stderr, "tests": None}
    if tests:
        run = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--color=no", "-m", "not soak", *tests]
        found["tests"] = subprocess.run(run, check=False).returncode
    Path(REPORT).write_text(json.dumps(found))


try:
    main(sys.argv[1:])
except BaseException:
    traceback.print_exc()
finally:
    os.sync()
    libc.reboot(RB_POWER_OFF)
