"""A kernel of Debian's in an emulator, with this project and its interpreter as the whole file system."""

from __future__ import annotations

import itertools
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Final

PROJECT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = PROJECT / "build" / "kernels"
REPORT_PORT: Final = "/dev/ttyS1"
MODULES: Final = (
    *("veth", "dummy", "tcp_diag", "udp_diag", "sctp"),
    *("nf_tables", "nft_chain_nat", "nft_redir", "nft_ct", "nft_fib_inet", "nft_reject_inet"),
)
"""What the tests and the nftables capture would have the kernel load, which finds no modprobe here."""

_PROGRAMS: Final = ("ip", "nft", "ss")
_LIBRARIES: Final = ("libbpf.so.1",)  # what is opened by name, and no file asks for
_LEFT_OUT: Final = (  # of the interpreter and the virtual environment: large, and of no use there
    *("test", "idlelib", "ensurepip", "lib2to3", "turtledemo", "config-3.*"),
    *(
        "envoy",
        "mypy",
        "mypyc",
        "*__mypyc*",
        "pip",
        "setuptools",
        "pkg_resources",
        "grimp",
        "importlinter",
        "rich",
        "ruff",
        "nats-server",
    ),
)
_OWN: Final = ("bpf", "control", "uproxy", "waypoint", "benchmarks", "tests", "pyproject.toml")
_MEMORY_MB: Final = 1024
_BATCH: Final = 64  # files per call of ldd


class GuestError(Exception):
    """The kernel cannot be had or booted; the text says why."""


def newest(series: str) -> str:
    """The package of the newest cloud kernel of a series, such as 6.1. Raises GuestError."""
    if platform.machine() != "x86_64":
        raise GuestError(f"the emulated host is x86-64, and the interpreter here is for {platform.machine()}")
    known = _output("apt-cache", "pkgnames", f"linux-image-{series}.").split()
    wanted = re.compile(rf"linux-image-{re.escape(series)}\.[^-]+(-\d+)?-cloud-amd64")
    found = [name for name in known if wanted.fullmatch(name)]
    if not found:
        raise GuestError(
            f"no package linux-image-{series}.*-cloud-amd64 is known: run `apt-get update`, or use a Debian that has it"
        )
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def fetch(package: str) -> Path:
    """Where a kernel package is unpacked; it is not installed. Raises GuestError."""
    place = CACHE / package
    if not place.exists():
        unpacked, downloads = CACHE / f"{package}.part", CACHE / "downloads"
        for directory in (unpacked, downloads):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        _output("apt-get", "-q", "download", package, cwd=downloads)
        archive = next(downloads.glob("*.deb"))
        _output("dpkg-deb", "-x", str(archive), str(unpacked))
        archive.unlink()
        unpacked.rename(place)
    return place


def boot(kernel: Path, files: Path, arguments: list[str], timeout_s: float) -> tuple[str, str]:
    """What the guest wrote to its report port, and its console. Raises GuestError when it does not end by itself."""
    image = next((kernel / "boot").glob("vmlinuz-*"))
    report, console = files.with_name("report"), files.with_name("console")
    words = " ".join(arguments)
    # One processor: with two, 6.1 has now and then no socket for a segment of a connection that closes (5 of 2,000),
    # and the tests of what is dropped count exactly.
    command = [
        *("qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-accel", "tcg", "-smp", "1"),
        *("-m", str(_MEMORY_MB), "-nographic", "-no-reboot", "-nic", "none", "-monitor", "none"),
        *("-serial", f"file:{console}", "-serial", f"file:{report}"),
        *("-kernel", str(image), "-initrd", str(files)),
        # A panic ends the emulator. It is slow, so that a CPU that does not answer for long is not stuck.
        *("-append", f"console=ttyS0 quiet panic=-1 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 -- {words}"),
    ]
    try:
        done = subprocess.run(command, timeout=timeout_s, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise GuestError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86") from None
    except subprocess.TimeoutExpired:
        raise GuestError(f"{image.name} did not end within {timeout_s:g} s; {_tail(console)}") from None
    if done.returncode or not report.stat().st_size:
        raise GuestError(f"{image.name} ended without a report; {done.stderr.strip()} {_tail(console)}")
    return report.read_text(errors="replace"), console.read_text(errors="replace")


def _tail(console: Path) -> str:
    lines = console.read_text(errors="replace").splitlines()[-20:] if console.exists() else []
    return "\n  ".join(["its console ends with:", *lines])


# -- the file system


def pack(kernel: Path) -> Path:
    """The guest's file system: everything at the same path as here, so that the virtual environment works there too."""
    archive = CACHE / "files.cpio"
    roots = [*(PROJECT / name for name in _OWN), Path(sys.prefix), Path(os.__file__).parent]
    files = {path for root in roots for path in _below(root)}
    files |= {_program(name) for name in _PROGRAMS}
    files |= {path for name in _LIBRARIES for path in Path("/usr/lib").glob(f"*-linux-gnu/{name}")}
    files |= _needed(files)
    files |= {target for path in files for target in _targets(path)}
    with archive.open("wb") as out:
        writer = _Cpio(out)
        for name in ("proc", "sys", "run", "tmp", "root"):
            writer.add(Path("/", name), stat.S_IFDIR | 0o755)
        writer.add(Path("/dev/console"), stat.S_IFCHR | 0o600, device=(5, 1))
        writer.add(Path("/init"), stat.S_IFLNK | 0o777, os.fsencode(PROJECT / "tests/kernels/inside.py"))
        writer.add(Path("/sbin/python"), stat.S_IFLNK | 0o777, os.fsencode(sys.executable))
        for at, (name, content) in enumerate(_modules(kernel)):
            writer.add(Path(f"/modules/{at:02}-{name}.ko"), stat.S_IFREG | 0o644, content)
        for path in sorted(files):
            status = path.lstat()
            content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            # With the time of its source, compiled Python is not compiled again.
            writer.add(path, status.st_mode, content, changed_s=int(status.st_mtime))
        writer.end()
    return archive


class _Cpio:
    """What the kernel unpacks: cpio's `newc` (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._inodes = itertools.count(1)
        self._made = {Path("/")}

    def add(
        self, path: Path, mode: int, content: bytes = b"", *, changed_s: int = 0, device: tuple[int, int] = (0, 0)
    ) -> None:
        """A file, and the directories above it."""
        if path in self._made:
            return
        self._made.add(path)
        self.add(path.parent, stat.S_IFDIR | 0o755)
        self._write(str(path).lstrip("/"), mode, content, changed_s, device)

    def end(self) -> None:
        self._write("TRAILER!!!", 0, b"", 0, (0, 0))

    def _write(self, name: str, mode: int, content: bytes, changed_s: int, device: tuple[int, int]) -> None:
        encoded = os.fsencode(name) + b"\0"
        fields = (next(self._inodes), mode, 0, 0, 1, changed_s, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._out.write(_padded(header) + _padded(content))


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)


def _below(root: Path) -> Iterable[Path]:
    if not root.is_dir():
        yield root
        return
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if not _is_left_out(name)]
        yield from (Path(directory, name) for name in names if not _is_left_out(name))


def _targets(link: Path) -> Iterable[Path]:
    """What a symbolic link leads to, step by step."""
    while link.is_symlink():
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
        yield link


def _is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_OUT)


def _program(name: str) -> Path:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise GuestError(f"{name} is missing: make setup")
    return Path(found)


def _needed(files: Iterable[Path]) -> set[Path]:
    """The libraries that programs and libraries ask for, and their loader."""
    binaries = [path for path in files if path.is_file() and _is_elf(path)]
    found = set()
    for at in range(0, len(binaries), _BATCH):
        listed = subprocess.run(
            ["ldd", *binaries[at : at + _BATCH]], capture_output=True, text=True, check=False
        ).stdout
        found |= {Path(path) for path in re.findall(r"^\t(?:\S+ => )?(/\S+) \(", listed, re.MULTILINE)}
    return found


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(18)[:4] == b"\x7fELF" and path.suffix not in (".o", ".a")


def _modules(kernel: Path) -> Iterable[tuple[str, bytes]]:
    """Kernel modules, each after those that it depends on."""
    paths = {path.name.partition(".ko")[0].replace("-", "_"): path for path in kernel.rglob("*.ko*")}
    done: set[str] = set()

    def load(name: str) -> Iterable[tuple[str, bytes]]:
        if name in done or name not in paths:
            return  # or it is part of the kernel
        done.add(name)
        content = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            content = lzma.decompress(content)
        stated = re.search(rb"\0depends=([^\0]*)\0", content)
        for wanted in stated[1].decode().split(",") if stated else ():
            yield from load(wanted.replace("-", "_"))
        yield name, content

    for name in MODULES:
        yield from load(name)


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
