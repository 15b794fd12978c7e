"""Extensions in Lua and WebAssembly as filters of Envoy's.

They stand where policy has let a request in and no route was looked for yet, as filters of the built-in engine do. Each
fills a slot of a place; what it holds stands with the routes of the place. Around them stand two guards of our own,
since what runs in Envoy could write what filters may not: headers by which messages end or callers are known, and of a
request what policy has seen of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from control.api.extension import EnvoyFilter, Language
from control.api.route import OURS, UNTOUCHED
from control.api.traffic import MAX_FILTERS, TrafficPolicy
from waypoint.engine_envoy.parts import Json, extension, injected, slot
from waypoint.engine_envoy.rules import NotExpressibleError, NotThereError

MAX_FILE: Final = 32 << 20
"""Bytes of a file of code."""

REFUSED_TEXT: Final = "a filter of this waypoint failed\n"
OF_THE_MESH: Final = tuple(f"{OURS}{name}" for name in ("reason", "policy", "caller"))
"""What it says of requests."""
FALSE_ANSWER: Final = "has(metadata.filter_metadata['uproxy.guard'].response) && ({})".format(
    " || ".join(f"'{name}' in response.headers" for name in (*OF_THE_MESH, *sorted(UNTOUCHED - {"content-length"})))
)
"""A condition (CEL): an Extension's own answer, in place of a response that the guard behind has seen, has headers that
it may not write. It comes past no guard. Envoy answers nothing by itself by then, and says where answers end."""
_BEFORE: Final = "guard-before"
_BEHIND: Final = "guard-behind"
_LUA: Final = Path(__file__).with_name("lua")
_RELOAD: Final = {"backoff": {"base_interval": "0.1s", "max_interval": "30s"}}
_MAY: Final = (
    *(
        "proxy_log",
        "proxy_get_log_level",
        "proxy_get_current_time_nanoseconds",
        "proxy_get_property",
        "proxy_set_tick_period_milliseconds",
    ),
    *("proxy_get_buffer_bytes", "proxy_get_buffer_status", "proxy_get_configuration", "proxy_set_effective_context"),
    *("proxy_get_header_map_pairs", "proxy_get_header_map_size", "proxy_get_header_map_value"),
    *("proxy_add_header_map_value", "proxy_replace_header_map_value", "proxy_remove_header_map_value"),
    *("proxy_set_header_map_pairs", "proxy_send_local_response", "proxy_send_http_response"),
    *("proxy_continue_stream", "proxy_continue_request", "proxy_continue_response", "proxy_done"),
    *("proxy_define_metric", "proxy_increment_metric", "proxy_record_metric", "proxy_get_metric"),
    *("proxy_on_memory_allocate", "malloc", "proxy_on_context_create", "proxy_on_vm_start", "proxy_on_configure"),
    *("proxy_validate_configuration", "proxy_on_tick", "proxy_on_done", "proxy_on_log", "proxy_on_delete"),
    *("proxy_on_request_headers", "proxy_on_request_body", "proxy_on_request_trailers", "proxy_on_request_metadata"),
    *(
        "proxy_on_response_headers",
        "proxy_on_response_body",
        "proxy_on_response_trailers",
        "proxy_on_response_metadata",
    ),
    *("fd_write", "fd_read", "fd_seek", "fd_close", "fd_fdstat_get", "environ_get", "environ_sizes_get", "args_get"),
    *("args_sizes_get", "proc_exit", "clock_time_get", "random_get", "sched_yield"),
)
"""Of Proxy-Wasm and WASI. No calls to anywhere, no state that others rely on, no foreign functions, no other bodies."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module of WebAssembly, which Envoy reads from a file that is named after its content."""

    content: bytes

    @property
    def name(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def idle_filters() -> list[Json]:
    """For a place without Extensions."""
    return [slot(name) for name in (_BEFORE, *map(_name, range(MAX_FILTERS)), _BEHIND)]


def wanted(policies: Sequence[TrafficPolicy]) -> list[EnvoyFilter]:
    """In the order in which requests come to them. `policies`: in the order of their keys, without what Envoy does not
    know. Raises NotExpressibleError.
    """
    found = [one for policy in policies for one in policy.filters if isinstance(one, EnvoyFilter)]
    if len(found) > MAX_FILTERS:
        raise NotExpressibleError(f"{len(found)} Extensions at one destination: this engine takes {MAX_FILTERS}")
    return found


def modules(filters: Sequence[EnvoyFilter]) -> Iterator[Module]:
    """Those that they are. Reads files. Raises NotExpressibleError."""
    return (Module(_code(one)) for one in filters if one.language is Language.WASM)


def held(filters: Sequence[EnvoyFilter], directory: Path) -> dict[str, Json]:
    """What the slots of a place hold, by their names. `directory`: where Envoy finds modules. Reads files. Raises
    NotExpressibleError.
    """
    if not filters:
        return {}
    found = {_name(index): injected(_filter(one, directory)) for index, one in enumerate(filters)}
    passed = [one.extension for one in filters if one.language is Language.LUA and not one.fail_open]
    return {_BEFORE: injected(_guard("request", ())), **found, _BEHIND: injected(_guard("response", passed))}


def file_of(directory: Path, module: Module) -> Path:
    """Where Envoy finds it."""
    return directory / f"module-{module.name}.wasm"


def _name(index: int) -> str:
    return f"extension-{index}"


def _filter(what: EnvoyFilter, directory: Path) -> Json:
    code = _code(what)
    if what.language is Language.WASM:
        return _wasm(what, file_of(directory, Module(code)))
    try:
        source = code.decode()
    except UnicodeDecodeError:
        raise NotThereError(f"Extension {what.extension}: {what.file} is not in UTF-8") from None
    opens = "true" if what.fail_open else "false"
    own = f"local NAME, OPEN = {_quoted(what.extension)}, {opens}\nlocal SOURCE = {_quoted(source)}\n"
    return _lua(own, "sandbox.lua")


def _guard(side: str, passed: Iterable[str]) -> Json:
    return _lua(f"local SIDE, PASSED = {_quoted(side)}, {{{', '.join(map(_quoted, passed))}}}\n", "guard.lua")


def _lua(own: str, script: str) -> Json:
    names = ", ".join(f"[{_quoted(name)}] = true" for name in sorted(UNTOUCHED))
    known = f"local UNTOUCHED, OURS, TEXT = {{{names}}}, {_quoted(OURS)}, {_quoted(REFUSED_TEXT)}\n"
    source = known + own + "".join((_LUA / name).read_text() for name in ("refuse.lua", script))
    return extension("lua", "extensions.filters.http.lua.v3.Lua", default_source_code={"inline_string": source})


def _quoted(text: str) -> str:
    """As a string of Lua's."""
    escaped = (f"\\{byte:03}" if byte < 32 or byte > 126 or byte in b'"\\' else chr(byte) for byte in text.encode())
    return f'"{"".join(escaped)}"'


def _wasm(what: EnvoyFilter, file: Path) -> Json:
    text = json.dumps(dict(what.config)) if what.config else ""
    config = {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": text}
    fails = (
        {"failure_policy": "FAIL_OPEN"}
        if what.fail_open
        else {"failure_policy": "FAIL_RELOAD", "reload_config": _RELOAD}
    )
    virtual_machine = {
        "vm_id": what.extension,
        "runtime": "envoy.wasm.runtime.v8",
        "code": {"local": {"filename": str(file)}},
    }
    plugin: Json = {
        "name": what.extension,
        "root_id": what.extension,
        "vm_config": virtual_machine,
        "capability_restriction_config": {"allowed_capabilities": {name: {} for name in _MAY}},
        "configuration": config,
        **fails,
    }
    return extension("wasm", "extensions.filters.http.wasm.v3.Wasm", config=plugin)


def _code(what: EnvoyFilter) -> bytes:
    """Raises NotThereError where its file is not what the Extension says."""
    if what.inline:
        return what.inline
    path = Path(what.file)
    problem = f"has more than {MAX_FILE} bytes"
    try:
        stat = path.stat()
        if stat.st_size <= MAX_FILE:
            return _read(path, what.sha256, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; install it on the waypoint's host"
    except ValueError as error:
        problem = f"has another SHA-256, {error}; install what was applied, or apply this"
    raise NotThereError(f"Extension {what.extension}: {what.file} {problem}")


@lru_cache(maxsize=MAX_FILTERS)
def _read(path: Path, sha256: str, changed_ns: int, size: int) -> bytes:
    """Read once, while it does not change. Raises OSError, and ValueError for another content."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(found)
    return content
