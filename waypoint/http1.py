"""HTTP/1.1 (RFC 9112) as a waypoint speaks it to both sides: events and heads, readers and writers. No I/O.

Reading, one message after the other (http1_reader.py):

    reader = RequestReader(b"10.0.0.7:9080")    # the authority dialled: the host of an HTTP/1.0 request that names none
    events = reader.feed(data)                  # of at most one message: RequestHead, Body..., End
    events = reader.proceed()                   # after End: the next message, from what was fed already
    reader.eof()                                # the peer has ended its side

    reader = ResponseReader()
    reader.expect(request.method)               # before each response
    events = reader.feed(data)                  # ResponseHead (1xx: several), Body..., End
    events = reader.eof()                       # may end a body that has no other end
    reader.reusable                             # after End: whether the connection may carry another request

Each raises `MessageError` for what is refused: its `status` is the answer (400, 414, 417, 431, 501; 502 from a
response), and the connection must be closed. What came before it in the same piece is lost.

Writing (http1_writer.py), to the two peers of one exchange:

    writer = RequestWriter()
    writer.head(request), writer.body(data), writer.end()       # bytes to send
    writer = ResponseWriter(request)
    writer.head(response, close=...), writer.body(data), writer.end()
    writer.close                                # after the head: the connection must be closed once all is sent

Messages are not passed on but written anew. Fields that hold between two peers only (Connection and what it names,
Transfer-Encoding, Content-Length, Trailer, ...) are read into the head's attributes, are not among its fields and are
written by the writer; trailers are dropped. So what a head's fields hold is all that the next parser gets to see.

The grammar is the strict one of RFC 9112 without its leniences: where a sender might mean one thing and another parser
read another, the message is refused. docs/http1.md lists what is, and has the measurement by which the parser is our
own and not httptools'.
"""

from waypoint.http1_reader import RequestReader, ResponseReader
from waypoint.http1_writer import RequestWriter, ResponseWriter
from waypoint.messages import (
    CHUNKED,
    END,
    NO_BODY,
    UNTIL_CLOSE,
    Body,
    End,
    Ending,
    Fields,
    Framing,
    MessageError,
    RequestEvent,
    RequestHead,
    ResponseEvent,
    ResponseHead,
    length,
)

__all__ = [
    "CHUNKED",
    "END",
    "NO_BODY",
    "UNTIL_CLOSE",
    "Body",
    "End",
    "Ending",
    "Fields",
    "Framing",
    "MessageError",
    "RequestEvent",
    "RequestHead",
    "RequestReader",
    "RequestWriter",
    "ResponseEvent",
    "ResponseHead",
    "ResponseReader",
    "ResponseWriter",
    "length",
]
