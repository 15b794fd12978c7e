"""HBONE on the wire, without I/O: bytes in, events out; commands in, bytes out.

One `Connection` is one HTTP/2 connection that carries CONNECT streams (RFC 9113 section 8.5; docs/hbone.md 2). What is
said of heads, interim responses and trailers is for waypoints, which speak HTTP/2 inside of such streams.

Who does what:
- h2 keeps the connection preface, SETTINGS and PING: what happens once a connection, or once in seconds.
- This module does what happens once a stream or once a message: HEADERS, DATA, WINDOW_UPDATE, RST_STREAM and GOAWAY.
  h2's own path costs some 500 µs a stream and 60 µs a message (docs/decisions.md), and it closes itself at the
  first GOAWAY, while a draining tunnel must go on answering PINGs.

Rules:
1. Every DATA byte received counts on the connection window, also for streams that are gone; connection credit is given
   back on receipt, stream credit only for bytes that the application's socket took. So a slow reader stops its own
   sender and nobody else.
2. DATA is passed on as it arrives, in parts of frames: a view into the caller's buffer, valid until the next call.
3. Frames leave in the order in which they were made, through one output buffer of fixed size; what does not fit is not
   read from the application in the first place (`reserve`). Control frames may spill over, up to MAX_SPILL.
4. A peer that breaks the protocol gets a ProtocolError, which ends the connection; a malformed request ends its stream.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final, NamedTuple

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event as H2Event
from h2.events import PingAckReceived, RemoteSettingsChanged, SettingsAcknowledged
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings
from hpack.exceptions import HPACKDecodingError, OversizedHeaderListError

from uproxy.header_block import (
    Headers,
    encode_headers,
    read_literals,
    read_own,
    well_formed,
    well_formed_trailers,
)
from uproxy.hpack_decoder import Decoder

# Windows (docs/decisions.md): 1 MiB a stream keeps a fast link full; a stream starts with a quarter, so that many slow
# readers hold little, and has no more beside small messages of others, since those wait for all of it that is on its
# way. The connection's must exceed a stream's (docs/hbone.md 2.2).
INITIAL_STREAM_WINDOW: Final = 256 << 10
MAX_STREAM_WINDOW: Final = 1 << 20
SMALL_MESSAGE: Final = 8 << 10
# So much has come since the last small message before a window grows: 10 ms at 3 Gbit/s.
UNDISTURBED: Final = 4 << 20
# A stream that was quick and then stops holds its whole window: so many of a connection may have the large one.
MAX_LARGE_WINDOWS: Final = 16
CONNECTION_WINDOW: Final = 16 << 20
MAX_FRAME_SIZE: Final = 1 << 20  # as ztunnel; cut through, so its size costs no memory
MAX_CONCURRENT_STREAMS: Final = 1024  # Envoy's client limit; ztunnel and Envoy's server say 200 and 100
MAX_HEADER_LIST: Final = 64 << 10  # ztunnel's server limit
MAX_QUICK_BLOCK: Final = 4 << 10
MAX_CONTINUATIONS: Final = 64  # h2's limit; CVE-2024-27919 and -30255
MAX_REMEMBERED_RESETS: Final = 4096
# Frames that cost us work and move no data (CVE-2019-9511..9518), beyond what DATA and time give back.
CONTROL_QUOTA: Final = 10_000
CONTROL_QUOTA_PER_TICK: Final = 1_000
# PING and SETTINGS, of which honest peers send one in seconds, take ten times as long as others.
_COST_BY_H2: Final = 10
MAX_EARLY_RESETS: Final = 500  # Envoy's premature-reset guard (CVE-2023-44487)
# What one peer may have done in one turn, in steps of some 4 µs: half a millisecond. All others wait for it.
WORK_AT_ONCE: Final = 128
# Steps that a frame takes: a request until it is answered, a stream until it is put away, an answer by h2.
_WORK_OF_HEADERS: Final = 32
_WORK_OF_ANSWER: Final = 4  # to what was asked here: it only goes on with that
_WORK_OF_END: Final = 16
_WORK_BY_H2: Final = 10
# A frame or a header block that was begun is whole after so many ticks, whatever trickles in meanwhile.
MAX_TICKS_UNFINISHED: Final = 4

OUTPUT_SIZE: Final = 128 << 10
MAX_SPILL: Final = 256 << 10
OVERFLOW: Final = "the peer makes us answer and reads nothing"
MIN_DATA: Final = 1024  # below this room, wait for a flush rather than send crumbs
# What a stream may put into one frame, header included: whole TLS records of 16 KiB, so that none is nearly empty. All
# that the output buffer holds, while all who have something find room in it; when one does not, half as much for each,
# and so on, since a large frame delays its neighbours (docs/decisions.md).
RECORD: Final = 16 << 10
MOST_SHARE: Final = OUTPUT_SIZE

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW: Final = (1 << 31) - 1
# Of a peer's stream window this size or larger, the last quarter is left unused. Envoy gives 16 MiB a stream, 24 MiB a
# connection, and credit in halves: one stopped reader that holds a whole window can leave the connection without any,
# for good, and with it every other stream (docs/hbone.md 2.5). Three quarters cannot.
LARGE_PEER_WINDOW: Final = 1 << 20
_DEFAULT_WINDOW: Final = 65535
_SMALLEST_FRAME: Final = 16384
_CONNECTION_CREDIT: Final = CONNECTION_WINDOW * 3 // 4
"""What is left of the connection's window when it is filled up again."""
_HEADER = struct.Struct(">LBL")  # length (24 bits) and type, flags, stream
_U32 = struct.Struct(">L")
_new = tuple.__new__  # of an event, without the call into Python that its own takes
_EMPTY: Final = memoryview(b"")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY_FLAG = 0x1, 0x4, 0x8, 0x20
_WHOLE_BLOCK: Final = _END_HEADERS | _PADDED | _PRIORITY_FLAG
_WORK: Final = {HEADERS: _WORK_OF_HEADERS, RST_STREAM: _WORK_OF_END, SETTINGS: _WORK_BY_H2, PING: _WORK_BY_H2}
_FIXED_LENGTH: Final = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ProtocolError(Exception):
    """The peer broke HTTP/2: send GOAWAY with `code`, then close. `events` came before, and still count."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.events: list[Event] = []


class Limits(NamedTuple):
    """What one connection may hold: a tunnel's, by default."""

    streams: int = MAX_CONCURRENT_STREAMS
    """That the peer may open, or we."""
    stream_window: int = INITIAL_STREAM_WINDOW
    header_table: int = 0
    """Bytes of HPACK's dynamic table. None: blocks stay decodable on their own, and short (see `decode_literals`)."""
    output: int = OUTPUT_SIZE
    extended_connect: bool = False
    """Whether the peer may send CONNECT with a protocol (RFC 8441), if it is the client."""


TUNNEL: Final = Limits()


class Stream:
    """One CONNECT stream: its id, its two windows and which sides have ended. `owner` is the tunnel's to use."""

    __slots__ = (
        "answered",
        "id",
        "local_closed",
        "owner",
        "recv_limit",
        "recv_window",
        "remote_closed",
        "send_window",
        "unacknowledged",
    )

    def __init__(self, stream_id: int, send_window: int, recv_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.recv_window = recv_window
        self.recv_limit = recv_window
        self.unacknowledged = 0
        self.answered = False
        self.local_closed = False
        self.remote_closed = False
        self.owner: Any = None


class RequestReceived(NamedTuple):
    stream: Stream
    headers: Headers
    ended: bool


class ResponseReceived(NamedTuple):
    stream: Stream
    headers: Headers
    ended: bool


class InterimReceived(NamedTuple):
    """A response 1xx: the response itself is still to come."""

    stream: Stream
    headers: Headers


class DataReceived(NamedTuple):
    stream: Stream
    data: memoryview


class StreamEnded(NamedTuple):
    stream: Stream
    trailers: Headers = ()


class StreamReset(NamedTuple):
    """The stream is gone: the peer reset it, refused it in a GOAWAY, or sent something malformed on it."""

    stream: Stream
    code: int


class WindowOpened(NamedTuple):
    """There is room again: for one stream, or (None) for all of them."""

    stream: Stream | None


class GoawayReceived(NamedTuple):
    last_stream_id: int
    code: int


class PongReceived(NamedTuple):
    payload: bytes


class SettingsReceived(NamedTuple):
    """The peer's first SETTINGS arrived: its limits are known."""


Event = (
    RequestReceived
    | ResponseReceived
    | InterimReceived
    | DataReceived
    | StreamEnded
    | StreamReset
    | WindowOpened
    | GoawayReceived
    | PongReceived
    | SettingsReceived
)


class Connection:
    """The state of one HBONE connection, either end."""

    def __init__(self, *, client: bool, limits: Limits = TUNNEL) -> None:
        self.client = client
        self.limits = limits
        self.streams: dict[int, Stream] = {}
        self._is_tunnel = limits is TUNNEL  # its peer is a uProxy, most likely
        self.peer_max_streams = 100  # until its SETTINGS say otherwise (RFC 9113 section 6.5.2 advises at least 100)
        self.peer_extended_connect = False
        self.goaway_sent = False
        self.goaway_received = False
        self.overflowed = False  # frames were lost, because the peer reads none: the connection is over
        self.unread = 0  # bytes at the end of what arrived last that are work for later
        self.send_window = _DEFAULT_WINDOW
        self._peer_initial_window = _DEFAULT_WINDOW
        self._withheld = 0  # of each stream's window
        self._most_data = RECORD - 9  # in one frame, as the peer allows it, in whole records with its header
        self._recv_window = CONNECTION_WINDOW
        self._large: set[int] = set()  # streams that were given the large window; some may be gone
        self._bulk: Stream | None = None  # of which something larger than a small message came last
        self._undisturbed = UNDISTURBED  # bytes of such since the last small message of another stream
        self._next_id = 1
        self._highest_peer_id = 0
        self._last_admitted_id = MAX_WINDOW
        self._reset_ids: OrderedDict[int, None] = OrderedDict()
        self._quota = CONTROL_QUOTA
        self._opened = 0
        self._early_resets = 0
        # input: an unfinished frame, the DATA frame being cut through, the header block being collected
        self._partial = bytearray()
        self._data_left = 0
        self._data_padding = 0
        self._data_stream: Stream | None = None
        self._data_ends = False
        self._block = bytearray()
        self._block_stream = 0
        self._block_ends = False
        self._continuations = 0
        self._ticks_unfinished = 0
        self._preface_left = b"" if client else PREFACE
        self._settings_seen = False
        self._decoder = Decoder(max_header_list_size=MAX_HEADER_LIST)
        # output
        self._table_emptied = False
        self._output = memoryview(bytearray(limits.output))
        self._used = 0
        self._share = MOST_SHARE
        self._crowded = False  # somebody found no room since the last output was taken
        self._spill = bytearray()
        self._h2 = _h2_connection(client, limits)
        self._append(self._h2.data_to_send())
        self._frame(WINDOW_UPDATE, 0, 0, _U32.pack(CONNECTION_WINDOW - _DEFAULT_WINDOW))

    # -- output

    @property
    def has_output(self) -> bool:
        return self._used > 0

    def output(self) -> Iterable[memoryview]:
        """What is to be sent, in order; then call `sent`."""
        if self._spill:
            return (self._output[: self._used], memoryview(bytes(self._spill)))
        return (self._output[: self._used],)

    def sent(self) -> None:
        """The output was taken whole."""
        self._used = 0
        self._spill.clear()
        if self._crowded:
            self._crowded = False
            if self._share > RECORD:
                self._share //= 2
        elif self._share < MOST_SHARE:
            self._share *= 2

    def reserve(self, stream: Stream) -> memoryview:
        """Room for DATA of this stream now: the caller writes into it, then commits. Empty: wait for a WindowOpened.

        The room is bounded by both windows, the frame size and the output buffer: nothing queues here.
        """
        used = self._used + 9
        left = len(self._output) - used
        if self._spill or left < MIN_DATA:
            self._crowded = True
            return _EMPTY
        room = min(left, self._share - 9, self._most_data, stream.send_window, self.send_window)
        return self._output[used : used + room] if room > 0 else _EMPTY

    @property
    def frames_at_once(self) -> int:
        """Frames that a stream may send in one turn: more than one where the peer wants them small, as Envoy does."""
        return max(self._share // (self._most_data + 9), 1)

    def commit(self, stream: Stream, length: int, *, end: bool = False) -> None:
        """Send the `length` > 0 bytes that were written into the last `reserve` of this stream. `end`: no more come."""
        used = self._used
        _HEADER.pack_into(self._output, used, length << 8, _END_STREAM if end else 0, stream.id)  # of DATA, which is 0
        self._used = used + 9 + length
        stream.send_window -= length
        self.send_window -= length
        if self._quota < CONTROL_QUOTA:
            # A WINDOW_UPDATE for the stream and one for the connection; some peers send both with each KiB they read.
            self._quota += 2 + (length >> 9)
        if end:
            self._local_end(stream)

    def write(self, stream: Stream, data: bytes, *, end: bool = False) -> bool:
        """`reserve` and `commit`, if there is room for all of it in one frame; at least a byte. `end`: no more come."""
        length = len(data)
        room = self.reserve(stream)
        if length > len(room):
            return False
        room[:length] = data
        self.commit(stream, length, end=end)
        return True

    def open(self, headers: Headers, *, end: bool = False) -> Stream:
        """Start a request stream (client only). Raises ValueError for too many headers."""
        block = encode_headers(headers)
        stream = Stream(self._next_id, self._peer_initial_window - self._withheld, self.limits.stream_window)
        self._next_id += 2
        self.streams[stream.id] = stream
        if self._quota < CONTROL_QUOTA:
            self._quota += 4  # a stream that we opened may be refused with a few control frames
        self._header_block(_END_STREAM if end else 0, stream.id, block)
        stream.local_closed = end
        return stream

    @property
    def new_window(self) -> int:
        """Bytes that the peer would take now on another stream."""
        return min(self._peer_initial_window - self._withheld, self.send_window)

    @property
    def can_open(self) -> bool:
        """Whether another stream may be opened: limits, GOAWAY, and ids that have not run out."""
        return (
            not self.goaway_received
            and len(self.streams) < min(self.peer_max_streams, self.limits.streams)
            and self._next_id < MAX_WINDOW
        )

    def respond(self, stream: Stream, headers: Headers, *, end: bool = False) -> None:
        """Answer a request (server only). Nothing is sent on a stream that was reset meanwhile (RFC 9113 5.1)."""
        if stream.local_closed:
            return
        stream.answered = True
        if self._quota < CONTROL_QUOTA:
            self._quota += 4  # a stream that was answered may end with a few control frames
        self._header_block(_END_STREAM if end else 0, stream.id, encode_headers(headers))
        if end:
            self._local_end(stream)

    def inform(self, stream: Stream, headers: Headers) -> None:
        """Send a response 1xx before the response itself (server only)."""
        if not stream.local_closed:
            self._header_block(0, stream.id, encode_headers(headers))

    def end(self, stream: Stream, trailers: Headers = ()) -> None:
        """Half-close: no more DATA from here."""
        if not stream.local_closed:
            if trailers:
                self._header_block(_END_STREAM, stream.id, encode_headers(trailers))
            else:
                self._frame(DATA, _END_STREAM, stream.id, b"")
            self._local_end(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End the stream at once, both ways."""
        if self.streams.pop(stream.id, None) is not None:
            stream.local_closed = stream.remote_closed = True
            self._remember_reset(stream.id)
            self._frame(RST_STREAM, 0, stream.id, _U32.pack(code))

    def consumed(self, stream: Stream, length: int, *, keeps_up: bool) -> None:
        """The application took `length` bytes: give the peer credit, in steps of a quarter of the window.

        A stream whose application keeps up gets the large window, and beside small messages of others it is taken back.
        """
        if length > SMALL_MESSAGE:
            self._undisturbed += length
            self._bulk = stream
        elif stream is not self._bulk and stream.recv_limit == self.limits.stream_window:
            self._undisturbed = 0
        stream.unacknowledged += length
        if stream.unacknowledged * 4 >= stream.recv_limit and not stream.remote_closed:
            credit = stream.unacknowledged
            stream.unacknowledged = 0
            if self._undisturbed >= UNDISTURBED or len(self.streams) == 1:
                if keeps_up and stream.recv_limit < MAX_STREAM_WINDOW:
                    credit += self._grow(stream)
            elif self._undisturbed <= credit and stream.recv_limit > self.limits.stream_window:
                credit -= self._shrink(stream, credit)
            if credit:
                stream.recv_window += credit
                self._frame(WINDOW_UPDATE, 0, stream.id, _U32.pack(credit))

    def _grow(self, stream: Stream) -> int:
        """By how much the window of a stream grows."""
        if len(self._large) >= MAX_LARGE_WINDOWS:
            self._large = {one for one in self._large if one in self.streams}
            if len(self._large) >= MAX_LARGE_WINDOWS:
                return 0
        self._large.add(stream.id)
        grown = MAX_STREAM_WINDOW - stream.recv_limit
        stream.recv_limit = MAX_STREAM_WINDOW
        return grown

    def _shrink(self, stream: Stream, credit: int) -> int:
        """How much of the credit of a stream is not given, so that its window becomes a small one."""
        kept = min(credit, stream.recv_limit - self.limits.stream_window)
        stream.recv_limit -= kept
        if stream.recv_limit == self.limits.stream_window:
            self._large.discard(stream.id)
        return kept

    def ping(self, payload: bytes) -> None:
        """Send a PING with 8 bytes of payload; the answer is a PongReceived."""
        self._h2.ping(payload)
        self._append(self._h2.data_to_send())

    def goaway(self, code: ErrorCode = ErrorCode.NO_ERROR, *, final: bool = True, text: str = "") -> None:
        """Tell the peer to open no more streams. A graceful drain sends one that is not final first (RFC 9113 6.8)."""
        if final:
            self._last_admitted_id = self._highest_peer_id
        self.goaway_sent = True
        last = self._highest_peer_id if final else MAX_WINDOW
        self._frame(GOAWAY, 0, 0, struct.pack(">LL", last, code) + text.encode()[:256])

    def tick(self) -> None:
        """Called every few seconds: time gives back part of the control frames a peer may send.

        Raises ProtocolError when the peer takes too long over one frame or header block, or over its first one.
        """
        self._quota = min(CONTROL_QUOTA, self._quota + CONTROL_QUOTA_PER_TICK)
        if self._settings_seen and not self._partial and not self._block_stream:
            self._ticks_unfinished = 0
            return
        self._ticks_unfinished += 1
        if self._ticks_unfinished > MAX_TICKS_UNFINISHED:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "a frame or a header block that does not end")

    # -- input

    def receive(self, data: memoryview) -> list[Event]:
        """Parse what arrived. Raises ProtocolError when the peer broke the protocol; the connection is over then.

        What is too much work for one turn is left: the last `unread` bytes are to be given again, before any others.
        """
        events: list[Event] = []
        try:
            position, end = 0, len(data)
            work = WORK_AT_ONCE
            if self._preface_left:
                position = self._take_preface(data)
            while position < end and work > 0:
                work -= 1
                if self._data_left:
                    position = self._take_data(data, position, end, events)
                    continue
                if self._data_padding:
                    skipped = min(self._data_padding, end - position)
                    self._data_padding -= skipped
                    position += skipped
                    if not self._data_padding:
                        self._finish_data(events)
                    continue
                if self._partial or end - position < 9:
                    position = self._take_partial(data, position, end, events)
                    continue
                first, flags, stream_id = _HEADER.unpack_from(data, position)
                length, kind = first >> 8, first & 0xFF
                after = position + 9 + length
                if kind == DATA and not flags & _PADDED and self._settings_seen and not self._block_stream:
                    stream = self._count_data(stream_id & 0x7FFFFFFF, flags, length, length)
                    position += 9
                    if after > end:
                        self._data_stream, self._data_ends, self._data_left = stream, bool(flags & _END_STREAM), length
                        continue
                    # Whole, as nearly always.
                    if stream is not None:
                        if length:
                            events.append(_new(DataReceived, (stream, data[position:after])))
                        if flags & _END_STREAM:
                            work -= _WORK_OF_END
                            self._remote_end(stream)
                            events.append(StreamEnded(stream))
                    position = after
                    continue
                if DATA < kind <= CONTINUATION and after <= end:  # whole, as nearly always
                    stream_id &= 0x7FFFFFFF
                    whole_block = kind == HEADERS and flags & _WHOLE_BLOCK == _END_HEADERS
                    if not (
                        whole_block
                        and stream_id
                        and length <= MAX_QUICK_BLOCK
                        and self._settings_seen
                        and not self._block_stream
                    ):
                        self._check_frame(kind, flags, stream_id, length)
                    if whole_block:
                        self._take_block(
                            stream_id, bytes(data[position + 9 : after]), bool(flags & _END_STREAM), events
                        )
                        work -= _WORK_OF_ANSWER if self.client else _WORK_OF_HEADERS
                        position = after
                        continue
                    self._handle(kind, flags, stream_id, bytes(data[position:after]), events)
                    work -= _WORK.get(kind, 0)
                    position = after
                    continue
                position = self._take_partial(data, position, end, events)
            self.unread = end - position
            if self.overflowed:
                raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, OVERFLOW)
        except ProtocolError as error:
            error.events = events
            raise
        return events

    def _take_preface(self, data: memoryview) -> int:
        taken = min(len(self._preface_left), len(data))
        if data[:taken] != self._preface_left[:taken]:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 connection preface")
        self._preface_left = self._preface_left[taken:]
        if not self._preface_left:
            self._h2.receive_data(PREFACE)
        return taken

    def _take_partial(self, data: memoryview, position: int, end: int, events: list[Event]) -> int:
        """Collect a frame that came in parts, or is padded or unknown: its header, its (small) payload; handle it."""
        partial = self._partial
        if len(partial) < 9:
            taken = min(9 - len(partial), end - position)
            partial += data[position : position + taken]
            position += taken
            if len(partial) < 9:
                return position
        first, flags, stream_id = _HEADER.unpack_from(partial)
        length, kind, stream_id = first >> 8, first & 0xFF, stream_id & 0x7FFFFFFF
        self._check_frame(kind, flags, stream_id, length)
        needed = 9 + length
        if kind == DATA:
            if flags & _PADDED and not length:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a padded DATA frame without its padding length")
            needed = 10 if flags & _PADDED else 9
        elif kind > CONTINUATION:
            needed = 9
        taken = min(needed - len(partial), end - position)
        partial += data[position : position + taken]
        position += taken
        if len(partial) < needed:
            return position
        frame = bytes(partial)
        partial.clear()
        if not self._block_stream:
            self._ticks_unfinished = 0
        if kind == DATA:
            padding = frame[9] if needed == 10 else 0
            overhead = 1 + padding if needed == 10 else 0
            if overhead > length:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding longer than the DATA frame")
            self._data_stream = self._count_data(stream_id, flags, length, length - overhead)
            self._data_ends = bool(flags & _END_STREAM)
            self._data_left, self._data_padding = length - overhead, padding
            if not self._data_left and not padding:
                self._finish_data(events)
        elif kind > CONTINUATION:
            # Unknown type: ignored, unread (RFC 9113 section 4.1).
            self._spend(1)
            self._data_stream, self._data_ends, self._data_left = None, False, length
        else:
            self._handle(kind, flags, stream_id, frame, events)
        return position

    def _check_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """What a frame's header alone can break (RFC 9113 sections 4 and 6)."""
        if not self._settings_seen and (kind != SETTINGS or flags & 1):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block_stream and (kind != CONTINUATION or stream_id != self._block_stream):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
        if length > MAX_FRAME_SIZE:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {MAX_FRAME_SIZE}")
        fixed = _FIXED_LENGTH.get(kind)
        if fixed is not None and length != fixed:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"frame type {kind} of {length} bytes, not {fixed}")
        if kind in (HEADERS, CONTINUATION):
            self._check_block(kind, stream_id, length)
        elif kind in (SETTINGS, PING, GOAWAY):
            if stream_id:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on stream {stream_id}")
            odd = (kind == SETTINGS and length % 6 > 0) or (kind == GOAWAY and length < 8)
            if odd or length > 16384 or (kind == SETTINGS and flags & 1 and length):
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"frame type {kind} of {length} bytes")
        elif kind in (DATA, PRIORITY, RST_STREAM) and not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on stream 0")
        elif kind == PUSH_PROMISE:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody allowed")

    def _check_block(self, kind: int, stream_id: int, length: int) -> None:
        if not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on stream 0")
        if len(self._block) + length > MAX_HEADER_LIST:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"a header block of more than {MAX_HEADER_LIST} bytes")
        if kind == CONTINUATION and not self._block_stream:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")

    # -- DATA

    def _count_data(self, stream_id: int, flags: int, length: int, payload: int) -> Stream | None:
        """Count a DATA frame of `length` bytes, of which `payload` are data, on both windows. None: nobody wants it."""
        if length > MAX_FRAME_SIZE:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {MAX_FRAME_SIZE}")
        self._recv_window -= length
        if self._recv_window <= _CONNECTION_CREDIT:
            if self._recv_window < 0:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection window")
            self._frame(WINDOW_UPDATE, 0, 0, _U32.pack(CONNECTION_WINDOW - self._recv_window))
            self._recv_window = CONNECTION_WINDOW
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_gone(stream_id, "DATA")
        elif stream.remote_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"DATA on stream {stream_id} after its END_STREAM")
        else:
            stream.recv_window -= length
            if stream.recv_window < 0:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, f"more DATA than stream {stream_id}'s window")
            if length > payload:
                # Padding reaches no application, so nobody else gives its credit back.
                self.consumed(stream, length - payload, keeps_up=False)
        if payload:
            if self._quota < CONTROL_QUOTA:
                self._quota += 1
        elif not flags & _END_STREAM:
            self._spend(1)
        return stream

    def _take_data(self, data: memoryview, position: int, end: int, events: list[Event]) -> int:
        taken = min(self._data_left, end - position)
        stream = self._data_stream
        if stream is not None and not stream.remote_closed:  # closed: we reset it amid the frame
            events.append(DataReceived(stream, data[position : position + taken]))
        self._data_left -= taken
        if not self._data_left and not self._data_padding:
            self._finish_data(events)
        return position + taken

    def _finish_data(self, events: list[Event]) -> None:
        stream, self._data_stream = self._data_stream, None
        if stream is not None and self._data_ends and not stream.remote_closed:
            self._remote_end(stream)
            events.append(StreamEnded(stream))

    # -- everything else

    def _handle(self, kind: int, flags: int, stream_id: int, frame: bytes, events: list[Event]) -> None:
        if kind == HEADERS:
            self._handle_headers(flags, stream_id, frame, events)
        elif kind == CONTINUATION:
            self._continuations += 1
            if self._continuations > MAX_CONTINUATIONS:
                raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
            self._block += frame[9:]
            if flags & _END_HEADERS:
                self._finish_block(events)
        elif kind == WINDOW_UPDATE:
            self._handle_window_update(stream_id, _U32.unpack_from(frame, 9)[0] & MAX_WINDOW, events)
        elif kind == RST_STREAM:
            self._handle_reset(stream_id, _U32.unpack_from(frame, 9)[0], events)
        elif kind == GOAWAY:
            self._handle_goaway(frame, events)
        elif kind == PRIORITY:
            self._spend(1)
            if _U32.unpack_from(frame, 9)[0] & MAX_WINDOW == stream_id:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")
        else:
            self._handle_by_h2(kind, frame, events)

    def _handle_by_h2(self, kind: int, frame: bytes, events: list[Event]) -> None:
        self._spend(_COST_BY_H2)
        try:
            h2_events = self._h2.receive_data(frame)
        except H2ProtocolError as error:
            raise ProtocolError(ErrorCode(int(error.error_code)), str(error)) from error
        self._append(self._h2.data_to_send())
        if kind == SETTINGS and not self._settings_seen:
            self._settings_seen = True
            events.append(SettingsReceived())
        for event in h2_events:
            self._apply_h2_event(event, events)

    def _apply_h2_event(self, event: H2Event, events: list[Event]) -> None:
        if isinstance(event, RemoteSettingsChanged):
            for code, change in event.changed_settings.items():
                if code == SettingCodes.INITIAL_WINDOW_SIZE:
                    self._change_windows(change.new_value)
                    events.append(WindowOpened(None))
                elif code == SettingCodes.MAX_FRAME_SIZE:
                    self._most_data = (change.new_value + 9) // RECORD * RECORD - 9
                elif code == SettingCodes.MAX_CONCURRENT_STREAMS:
                    self.peer_max_streams = change.new_value
                elif code == SettingCodes.ENABLE_CONNECT_PROTOCOL:
                    self.peer_extended_connect = change.new_value == 1
        elif isinstance(event, SettingsAcknowledged):
            # Until now the peer was free to use the default table of 4096 bytes (RFC 7541 section 4.2).
            self._decoder.max_allowed_table_size = self.limits.header_table
        elif isinstance(event, PingAckReceived):
            events.append(PongReceived(event.ping_data))

    def _change_windows(self, initial: int) -> None:
        """RFC 9113 section 6.9.2: a new initial window applies to the streams that exist; they may go negative."""
        before = self._peer_initial_window - self._withheld
        self._peer_initial_window = initial
        self._withheld = initial // 4 if initial >= LARGE_PEER_WINDOW else 0
        for stream in self.streams.values():
            stream.send_window += initial - self._withheld - before
            if stream.send_window + self._withheld > MAX_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS overflow a stream's window")

    def _handle_window_update(self, stream_id: int, increment: int, events: list[Event]) -> None:
        self._spend(1)
        if increment == 0:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        if stream_id == 0:
            self.send_window += increment
            if self.send_window > MAX_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "the connection window overflows")
            events.append(WindowOpened(None))
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "WINDOW_UPDATE")
            return
        stream.send_window += increment
        if stream.send_window + self._withheld > MAX_WINDOW:
            self.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
            events.append(StreamReset(stream, ErrorCode.FLOW_CONTROL_ERROR))
        else:
            events.append(WindowOpened(stream))

    def _handle_reset(self, stream_id: int, code: int, events: list[Event]) -> None:
        self._spend(1)
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            self._check_not_idle(stream_id, "RST_STREAM")
            return
        stream.local_closed = stream.remote_closed = True
        events.append(StreamReset(stream, code))
        if not self.client and not stream.answered:
            self._count_early_reset()

    def _count_early_reset(self) -> None:
        self._early_resets += 1
        if self._early_resets > MAX_EARLY_RESETS and self._early_resets * 2 > self._opened:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "most streams end before they were answered")

    def _handle_goaway(self, frame: bytes, events: list[Event]) -> None:
        self._spend(1)
        last, code = struct.unpack_from(">LL", frame, 9)
        last &= MAX_WINDOW
        self.goaway_received = True
        if self.client:
            for stream in [s for s in self.streams.values() if s.id > last]:
                del self.streams[stream.id]
                stream.local_closed = stream.remote_closed = True
                self._remember_reset(stream.id)
                events.append(StreamReset(stream, ErrorCode.REFUSED_STREAM))
        events.append(GoawayReceived(last, code))

    def _handle_headers(self, flags: int, stream_id: int, frame: bytes, events: list[Event]) -> None:
        ends = bool(flags & _END_STREAM)
        if flags & _WHOLE_BLOCK == _END_HEADERS:  # as nearly always
            self._take_block(stream_id, frame[9:], ends, events)
            return
        start, end = 9, len(frame)
        if flags & _PADDED:
            if start >= end:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a padded HEADERS frame without its padding length")
            start, end = start + 1, end - frame[9]
        if flags & _PRIORITY_FLAG:
            if end - start >= 5 and _U32.unpack_from(frame, start)[0] & MAX_WINDOW == stream_id:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")
            start += 5
        if start > end:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding longer than the HEADERS frame")
        self._block += frame[start:end]
        self._block_stream, self._block_ends, self._continuations = stream_id, ends, 0
        if flags & _END_HEADERS:
            self._finish_block(events)

    def _finish_block(self, events: list[Event]) -> None:
        stream_id, block = self._block_stream, bytes(self._block)
        self._block.clear()
        self._block_stream = self._ticks_unfinished = 0
        self._take_block(stream_id, block, self._block_ends, events)

    def _take_block(self, stream_id: int, block: bytes, ends: bool, events: list[Event]) -> None:
        stream = self.streams.get(stream_id)
        headers = read_own(block) if self._is_tunnel else None
        formed = headers is not None and (headers[0][0] == b":status") is self.client
        if headers is None:
            # A byte can stand for a whole header: a long block goes to the decoder that counts what comes out.
            known = read_literals(block, request=not self.client) if len(block) <= MAX_QUICK_BLOCK else None
            if known is None:
                headers = self._decode(block)
                formed = well_formed(headers, request=not self.client)
            else:
                headers, formed = known
        if stream is not None:
            self._continue_stream(stream, headers, formed, ends, events)
        elif self.client:
            self._check_gone(stream_id, "HEADERS")
        else:
            self._admit(stream_id, headers, formed, ends, events)

    def _decode(self, block: bytes) -> Headers:
        """With the dynamic table, which the peer keeps too."""
        try:
            return self._decoder.decode(block)
        except OversizedHeaderListError as error:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"header block: {error}") from error
        except HPACKDecodingError as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, f"header block: {error}") from error

    def _admit(self, stream_id: int, headers: Headers, formed: bool, ends: bool, events: list[Event]) -> None:
        if not stream_id & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"a client's stream has the even id {stream_id}")
        if stream_id <= self._highest_peer_id:
            if stream_id in self._reset_ids:
                self._spend(1)
                return
            # RFC 9113 section 5.1.1: an id that was skipped may not be used later.
            skipped = self._opened * 2 - 1 < self._highest_peer_id
            code = ErrorCode.PROTOCOL_ERROR if skipped else ErrorCode.STREAM_CLOSED
            raise ProtocolError(code, f"HEADERS on stream {stream_id}, which is closed")
        self._highest_peer_id = stream_id
        stream = Stream(stream_id, self._peer_initial_window - self._withheld, self.limits.stream_window)
        self.streams[stream_id] = stream
        self._opened += 1
        if stream_id > self._last_admitted_id or len(self.streams) > self.limits.streams:
            self.reset(stream, ErrorCode.REFUSED_STREAM)
            self._spend(1)
            return
        if not formed:
            self._malformed(stream)
            return
        if ends:
            self._remote_end(stream)
        events.append(RequestReceived(stream, headers, ends))

    def _malformed(self, stream: Stream) -> None:
        self.reset(stream, ErrorCode.PROTOCOL_ERROR)
        self._spend(1)
        self._count_early_reset()

    def _continue_stream(self, stream: Stream, headers: Headers, formed: bool, ends: bool, events: list[Event]) -> None:
        """A response, an interim response, or trailers.

        `formed`: it is a well-formed response.
        """
        if stream.remote_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream.id} after its END_STREAM")
        expects_response = self.client and not stream.answered
        if expects_response and formed:
            if headers[0][1][:1] == b"1" and not ends:
                self._spend(1)
                events.append(InterimReceived(stream, headers))
                return
            stream.answered = True
            if ends:
                self._remote_end(stream)
            events.append(ResponseReceived(stream, headers, ends))
        elif not expects_response and ends and well_formed_trailers(headers):
            self._remote_end(stream)
            events.append(StreamEnded(stream, headers))
        else:
            events.append(StreamReset(stream, ErrorCode.PROTOCOL_ERROR))
            self._malformed(stream)

    # -- small things

    def _check_not_idle(self, stream_id: int, what: str) -> None:
        if not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"{what} on stream 0")
        ours = bool(stream_id & 1) == self.client
        if stream_id >= self._next_id if ours else stream_id > self._highest_peer_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream_id}, which is idle")
        if ours and not self.client:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream_id}, which nobody opened")

    def _check_gone(self, stream_id: int, what: str) -> None:
        """A frame for a stream that we reset a moment ago was on its way: let it pass. Anything else is an error."""
        self._check_not_idle(stream_id, what)
        if stream_id not in self._reset_ids:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"{what} on stream {stream_id}, which is closed")

    def _remember_reset(self, stream_id: int) -> None:
        self._reset_ids[stream_id] = None
        if len(self._reset_ids) > MAX_REMEMBERED_RESETS:
            self._reset_ids.popitem(last=False)

    def _local_end(self, stream: Stream) -> None:
        stream.local_closed = True
        if stream.remote_closed:
            self.streams.pop(stream.id, None)

    def _remote_end(self, stream: Stream) -> None:
        stream.remote_closed = True
        if stream.local_closed:
            self.streams.pop(stream.id, None)

    def _spend(self, cost: int) -> None:
        self._quota -= cost
        if self._quota < 0:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames for the data they move")

    def _header_block(self, flags: int, stream_id: int, block: bytes) -> None:
        if not self._table_emptied:
            # A peer that allows less than the default table wants to hear that ours has shrunk (RFC 7541 section
            # 4.2); a table of 0 is right whatever it allows.
            self._table_emptied = True
            block = b"\x20" + block
        kind = HEADERS
        while len(block) > _SMALLEST_FRAME:  # which every peer takes
            self._frame(kind, flags, stream_id, block[:_SMALLEST_FRAME])
            block, kind, flags = block[_SMALLEST_FRAME:], CONTINUATION, 0
        self._frame(kind, flags | _END_HEADERS, stream_id, block)

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        length, used = len(payload), self._used
        end = used + 9 + length
        if end > len(self._output) or self._spill:
            self._append(_HEADER.pack(length << 8 | kind, flags, stream_id) + payload)
            return
        _HEADER.pack_into(self._output, used, length << 8 | kind, flags, stream_id)
        self._output[used + 9 : end] = payload
        self._used = end

    def _append(self, frames: bytes) -> None:
        used = self._used + len(frames)
        if used <= len(self._output) and not self._spill:
            self._output[self._used : used] = frames
            self._used = used
            return
        if len(self._spill) + len(frames) <= MAX_SPILL:
            self._spill += frames
        else:
            # Commands come from anywhere, so this is not the place to raise: `receive` and the tunnel's flush look.
            self.overflowed = True


def _h2_connection(client: bool, limits: Limits) -> H2Connection:
    connection = H2Connection(H2Configuration(client_side=client, header_encoding=None))
    values = {
        SettingCodes.HEADER_TABLE_SIZE: limits.header_table,
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
        SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
        SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
    }
    if not client:
        values[SettingCodes.MAX_CONCURRENT_STREAMS] = limits.streams
        if limits.extended_connect:
            values[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
    connection.local_settings = Settings(client=client, initial_values=values)
    connection.initiate_connection()
    return connection
