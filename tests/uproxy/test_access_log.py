"""The access log: one record per connection whatever its fields hold, and a sink that never holds anything up."""

import asyncio
import calendar
import fcntl
import itertools
import json
import os
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uproxy import access_log, plane
from uproxy.access_log import AccessLog, Style
from uproxy.errors import Flag
from uproxy.telemetry import Connection, Peer

WALL = 1_700_000_000.25  # 2023-11-14T22:13:20.25Z


def line_of(style: Style, closed: Connection, now: float, wall: float = WALL) -> str:
    """What is written of a connection that ended at `now`."""
    log = AccessLog(os.devnull, style, wall_clock=lambda: wall)
    log.record(closed, now)
    line = log._lines.popleft()
    log.close()
    return line


def workload(namespace: str, name: str):
    return SimpleNamespace(namespace=namespace, name=name)


def connection(**changes) -> Connection:
    web = Peer("10.0.0.1:40000", workload("shop", "web-1"), "spiffe://cluster.local/ns/shop/sa/web")
    db = Peer("10.0.0.2:15008", workload("shop", "db-1"), "spiffe://cluster.local/ns/shop/sa/db")
    fields = {
        "direction": "outbound",
        "source": web,
        "destination": db,
        "started": 5.0,
        "destination_service": "shop/db",
        "hbone_address": "10.0.0.2:6379",
        "bytes_sent": 10,
        "bytes_received": 20,
    }
    return Connection(**fields | changes)


def parse_json(line: str) -> dict:
    assert line.endswith("\n")
    return json.loads(line[:-1], object_pairs_hook=no_duplicates)


def no_duplicates(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def parse_text(line: str) -> dict:
    """Bare values have no quote or space; quoted ones are JSON strings; nothing may be left over."""
    assert line.endswith("\n")
    stamp, level, scope, message, rest = line[:-1].split("\t", 4)
    pairs = [("time", stamp), ("level", level), ("scope", scope), ("message", message)]
    at = 0
    field = re.compile(r'([a-z_.]+)=("(?:[^"\\]|\\.)*"|[^" ]+)( |$)')
    while at < len(rest):
        match = field.match(rest, at)
        assert match, rest[at:]
        name, value = match[1], match[2]
        if value.startswith('"'):
            value = json.loads(value)
        elif name.startswith("bytes"):
            value = int(value)
        pairs.append((name, value))
        at = match.end()
    return no_duplicates(pairs)


PARSERS = {Style.JSON: parse_json, Style.TEXT: parse_text}


def test_the_fields_are_ztunnels():
    line = line_of(Style.JSON, connection(), 6.006)
    assert json.loads(line, object_pairs_hook=list) == [
        ("level", "info"),
        ("time", "2023-11-14T22:13:20.250000Z"),
        ("scope", "access"),
        ("message", "connection complete"),
        ("src.addr", "10.0.0.1:40000"),
        ("src.workload", "web-1"),
        ("src.namespace", "shop"),
        ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("dst.addr", "10.0.0.2:15008"),
        ("dst.hbone_addr", "10.0.0.2:6379"),
        ("dst.service", "db.shop.svc.cluster.local"),
        ("dst.workload", "db-1"),
        ("dst.namespace", "shop"),
        ("dst.identity", "spiffe://cluster.local/ns/shop/sa/db"),
        ("direction", "outbound"),
        ("bytes_sent", 10),
        ("bytes_recv", 20),
        ("duration", "1006ms"),
    ]


def test_text_looks_like_ztunnels():
    refused = connection(
        source=Peer("[fd00::1]:40000"),
        destination=Peer("10.0.0.2:15008"),
        destination_service="",
        hbone_address="",
        error='policy-denied: "x"',
        flag=Flag.DENY,
        policy="shop/p[0]",
        request_id="ab",
    )
    assert line_of(Style.TEXT, refused, 5.0) == (
        "2023-11-14T22:13:20.250000Z\terror\taccess\tconnection complete\t"
        "src.addr=[fd00::1]:40000 dst.addr=10.0.0.2:15008 "
        'direction="outbound" bytes_sent=10 bytes_recv=20 duration="0ms" error="policy-denied: \\"x\\"" '
        'response_flags="DENY" policy="shop/p[0]" request_id="ab"\n'
    )


BREAKERS = [
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\x7f",
    "\x85",
    "\u2028",
    "\x1b[2J",
    '"',
    "\\",
    '","level":"',
    " x=",
    "=",
    "\ud800",
    "a",
]
hostile = st.text(max_size=30) | st.lists(st.sampled_from(BREAKERS), max_size=8).map("".join)
peers = st.builds(Peer, hostile, st.none() | st.builds(workload, hostile, hostile), hostile)
connections = st.builds(
    Connection,
    direction=st.sampled_from(["inbound", "outbound"]),
    source=peers,
    destination=peers,
    started=st.floats(0, 1e6),
    destination_service=hostile,
    hbone_address=hostile,
    request_id=hostile,
    bytes_sent=st.integers(0, 2**63),
    bytes_received=st.integers(0, 2**63),
    flag=st.sampled_from(Flag),
    error=hostile,
    policy=hostile,
)


@pytest.mark.parametrize("style", Style)
@settings(deadline=None)
@given(hurt=connections, now=st.floats(0, 1e6))
def test_any_connection_is_one_record_that_reads_back(style, hurt, now):
    line = line_of(style, hurt, now)
    assert line.isascii()
    assert all(character.isprintable() or character == "\t" for character in line[:-1])
    record = PARSERS[style](line)
    wanted = {
        "src.addr": hurt.source.address,
        "src.identity": hurt.source.identity,
        "dst.addr": hurt.destination.address,
        "dst.identity": hurt.destination.identity,
        "dst.hbone_addr": hurt.hbone_address,
        "error": hurt.error,
        "policy": hurt.policy,
        "request_id": hurt.request_id,
        "response_flags": "" if hurt.flag is Flag.NONE else hurt.flag.value,
    }
    for side, peer in (("src", hurt.source), ("dst", hurt.destination)):
        wanted[f"{side}.workload"] = peer.workload.name if peer.workload else ""
        wanted[f"{side}.namespace"] = peer.workload.namespace if peer.workload else ""
    assert {name: record.pop(name, "") for name in wanted} == wanted
    assert record.pop("dst.service", "") == (hurt.destination_hostname if hurt.destination_service else "")
    assert (record.pop("bytes_sent"), record.pop("bytes_recv")) == (hurt.bytes_sent, hurt.bytes_received)
    assert record.pop("level") == ("error" if hurt.error or hurt.flag is not Flag.NONE else "info")
    assert set(record) == {"time", "scope", "message", "direction", "duration"}


def test_a_long_value_is_cut():
    record = parse_json(line_of(Style.JSON, connection(error="x" * 100_000), 6.0))
    assert record["error"] == "x" * access_log.MAX_VALUE


@given(st.floats(0, 4e9))
def test_timestamps(wall):
    stamp = access_log._timestamp(wall)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    seconds = calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))
    assert seconds + float(stamp[19:26]) == pytest.approx(wall, abs=1e-6)


def open_log(path, **options) -> AccessLog:
    return AccessLog(str(path), Style.JSON, wall_clock=lambda: WALL, **options)


def errors_in(text: str) -> list[str]:
    return [json.loads(line).get("error", "") for line in text.splitlines()]


def test_nothing_is_written_before_a_flush_and_all_after(tmp_path):
    path = tmp_path / "log"
    log = open_log(path)
    for begin in range(0, 2700, 900):  # each nearly what the buffer holds
        before = path.read_text()
        for i in range(begin, begin + 900):
            log.record(connection(error=str(i)), 6.0)
        assert path.read_text() == before
        log.flush()
        log.flush()
    assert errors_in(path.read_text()) == [str(i) for i in range(2700)]
    assert path.stat().st_mode & 0o777 == 0o640
    log.close()
    assert log.dropped == 0


def test_the_buffer_is_bounded_and_losses_are_counted(tmp_path):
    path = tmp_path / "log"
    log = open_log(path)
    for i in range(5000):
        log.record(connection(error=str(i)), 6.0)
    log.close()
    written = errors_in(path.read_text())
    assert written == [str(i) for i in range(len(written))]  # the newest are lost
    assert 0 < len(written) == 5000 - log.dropped
    assert path.stat().st_size <= access_log.MAX_BUFFER


class Fifo:
    """A named pipe of 4096 bytes with a reader that reads when told to."""

    def __init__(self, path):
        os.mkfifo(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, 4096)

    def read(self) -> bytes:
        try:
            return os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return b""


def test_a_stuck_reader_costs_lines_not_time(tmp_path):
    fifo = Fifo(tmp_path / "pipe")
    log = open_log(tmp_path / "pipe")
    begin = time.monotonic()
    for i in range(5000):
        log.record(connection(error=str(i)), 6.0)
        if i % 100 == 0:
            log.flush()
    assert time.monotonic() - begin < 20
    assert log.dropped > 1000
    dropped = log.dropped
    # the reader comes back: whole lines, in order, and no more is lost
    received = b""
    for _ in range(1000):
        piece = fifo.read()
        received += piece
        log.flush()
        if not piece and not log._lines and not log._chunk:
            break
    numbers = [int(error) for error in errors_in(received.decode())]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 5000 - dropped
    assert log.dropped == dropped
    begin = time.monotonic()
    log.close()
    os.close(fifo.fd)
    assert time.monotonic() - begin < 10


def test_closing_waits_for_a_slow_reader_but_not_for_ever(tmp_path):
    fifo = Fifo(tmp_path / "pipe")
    log = open_log(tmp_path / "pipe")
    for i in range(100):
        log.record(connection(error=str(i)), 6.0)
    begin = time.monotonic()
    log.close(wait_s=0.1)
    assert time.monotonic() - begin < 10
    assert len(errors_in(fifo.read().decode())) + log.dropped == 100
    os.close(fifo.fd)


def test_a_line_longer_than_a_write_arrives_whole(tmp_path):
    fifo = Fifo(tmp_path / "pipe")
    log = open_log(tmp_path / "pipe")
    for error in ("before", "é" * 2000, "after"):
        log.record(connection(error=error), 6.0)
    received = b""
    for _ in range(20):
        log.flush()
        received += fifo.read()
    assert errors_in(received.decode()) == ["before", "é" * 2000, "after"]
    log.close()
    os.close(fifo.fd)


def test_a_reader_that_goes_away_does_not_join_lines(tmp_path):
    """Half a long line is in the pipe when the reader dies; the next reader's lines begin on a line of their own."""
    fifo = Fifo(tmp_path / "pipe")
    log = open_log(tmp_path / "pipe")
    log.record(connection(error="é" * 2000), 6.0)
    log.flush()
    os.close(fifo.fd)
    log.record(connection(error="lost"), 6.0)
    log.flush()
    assert log.dropped == 2
    os.unlink(tmp_path / "pipe")
    log._fd, old = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_CREAT), log._fd
    os.close(old)
    log.record(connection(error="next"), 6.0)
    log.close()
    assert (tmp_path / "pipe").read_text().startswith('\n{"level"')


def test_a_sink_that_filled_up_since_it_was_asked_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "log"
    log = open_log(path)
    log.record(connection(error="one"), 6.0)

    def busy(fd: int, data: bytes) -> int:
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", busy)
        log.flush()
    log.flush()
    log.close()
    assert (errors_in(path.read_text()), log.dropped) == (["one"], 0)


def test_half_a_line_is_not_finished_in_the_new_file(tmp_path):
    path = tmp_path / "pipe"
    fifo = Fifo(path)
    log = open_log(path)
    log.record(connection(error="é" * 2000), 6.0)
    log.flush()
    path.rename(tmp_path / "moved")
    log.reopen()
    log.record(connection(error="new"), 6.0)
    log.close()
    os.close(fifo.fd)
    assert (errors_in(path.read_text()), log.dropped) == (["new"], 1)


def test_a_full_disk_costs_lines_only():
    log = open_log("/dev/full")
    for _ in range(30):
        log.record(connection(), 6.0)
    log.flush()
    assert log.dropped == 30
    log.close()


def test_reopen_follows_a_moved_file(tmp_path):
    path, moved = tmp_path / "log", tmp_path / "log.1"
    log = open_log(path)
    log.record(connection(error="one"), 6.0)
    path.rename(moved)
    log.record(connection(error="two"), 6.0)
    log.reopen()
    log.record(connection(error="three"), 6.0)
    log.close()
    assert errors_in(moved.read_text()) == ["one", "two"]
    assert errors_in(path.read_text()) == ["three"]


def test_a_reopen_that_fails_keeps_the_old_file(tmp_path, caplog):
    (tmp_path / "dir").mkdir()
    path = tmp_path / "dir" / "log"
    log = open_log(path)
    (tmp_path / "dir").rename(tmp_path / "gone")
    log.reopen()
    assert "cannot reopen" in caplog.text
    log.record(connection(error="kept"), 6.0)
    log.close()
    assert errors_in((tmp_path / "gone" / "log").read_text()) == ["kept"]


def test_a_target_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_log(tmp_path / "no" / "log")


def test_the_loop_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(access_log, "FLUSH_INTERVAL_S", 0.01)
    path = tmp_path / "log"

    async def run() -> None:
        log = open_log(path, loop=asyncio.get_running_loop())
        for i in itertools.count():
            log.record(connection(error=str(i)), 6.0)
            await asyncio.sleep(0.005)
            if i > 20 and path.read_text().count("\n") > 10:
                break
        assert log._lines or log._timer is None  # no timer without work
        log.close()

    plane.run(run())
    written = errors_in(path.read_text())
    assert written == [str(i) for i in range(len(written))]


SCRIPT = """
import fcntl, os, sys
from uproxy.access_log import AccessLog, Style
from uproxy.telemetry import Connection, Peer
log = AccessLog("-", Style.JSON)
log.record(Connection("inbound", Peer("a"), Peer("b"), 0.0), 1.0)
log.close()
assert os.get_blocking(1), "somebody else's output became non-blocking"
print("still open")
"""


@pytest.mark.parametrize("sink", ["pipe", "file"])
def test_standard_output_is_shared_politely(sink, tmp_path):
    with open(tmp_path / "out", "w+b") as file:
        stdout = subprocess.PIPE if sink == "pipe" else file
        done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=stdout, timeout=30, check=True)
        file.seek(0)
        lines = (done.stdout if sink == "pipe" else file.read()).decode().splitlines()
    assert json.loads(lines[0])["direction"] == "inbound"
    assert lines[1:] == ["still open"]


@pytest.mark.parametrize("into", ["file", "pipe"])
def test_only_a_file_takes_more_in_one_write_than_a_pipe_takes_whole(tmp_path, monkeypatch, into):
    path, lines, sizes = tmp_path / "log", 100, []
    if into == "pipe":
        os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CREAT)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    log = open_log(path)
    for _ in range(lines):
        log.record(connection(), 6.0)
    log.flush()
    monkeypatch.undo()
    assert os.read(reader, 1 << 20).count(b"\n") == lines
    assert (max(sizes) > select.PIPE_BUF) is (into == "file")
    log.close()
    os.close(reader)
