"""What records say of Extensions, and back: part of `records`."""

from __future__ import annotations

from control.api.extension import (
    MAX_CHECK_S,
    MAX_CHECKED_BODY,
    MAX_FILTER_MS,
    MAX_HEADERS,
    MAX_SETTINGS,
    EnvoyFilter,
    ExternalAuthorization,
    Filter,
    Language,
    PythonFilter,
    wrong_code_file,
    wrong_entry_point,
    wrong_header_pattern,
    wrong_inline,
    wrong_path_prefix,
    wrong_setting,
    wrong_sha256,
)
from control.api.fields import (
    Fields,
    RecordError,
    check_ordered,
    checked,
    number_in,
    read_flag,
    read_key,
    read_member,
    read_port,
    typed,
)
from control.api.http_text import wrong_field_value
from control.api.messages import Body, Value
from control.api.names import wrong_service_name
from control.api.route import wrong_modified


def write_external_authorization(found: ExternalAuthorization) -> Body:
    """As a field of a policy."""
    lists: dict[str, list[Value]] = {
        "checked": list(found.checked),
        "added": [[name, value] for name, value in found.added],
        "upstreamOnAllow": list(found.upstream_on_allow),
        "downstreamOnAllow": list(found.downstream_on_allow),
        "downstreamOnDeny": list(found.downstream_on_deny),
    }
    return {
        "service": found.service,
        "port": found.port,
        "timeout": found.timeout_ms,
        "prefix": found.path_prefix,
        "status": found.status_on_error,
        "bytes": found.body_bytes,
        **({"failOpen": True} if found.fail_open else {}),
        **({"partial": True} if found.partial_body else {}),
        **{name: items for name, items in lists.items() if items},
    }


def write_filter(found: Filter) -> Value:
    """As an item of a TrafficPolicy."""
    config: list[Value] = [[name, value] for name, value in found.config]
    if isinstance(found, PythonFilter):
        return [found.extension, found.entry_point, config, found.timeout_ms, found.fail_open]
    code: Value = found.inline if found.inline else [found.file, found.sha256]
    return [found.extension, found.language.value, code, config, found.fail_open]


def read_filter(value: Value, name: str) -> Filter:
    """Raises RecordError."""
    found: Filter
    match value:
        case [extension, entry_point, list(config), int(timeout_ms), bool(fail_open)]:
            found = PythonFilter(
                read_key(extension, name),
                checked(typed(entry_point, str, name), lambda text: wrong_entry_point(text) if text else "", name),
                tuple(_setting(item, name) for item in config),
                number_in(timeout_ms, 1, MAX_FILTER_MS, name),
                fail_open,
            )
        case [extension, language, bytes(inline), list(config), bool(fail_open)]:
            its = read_member(language, Language, name)
            if problem := wrong_inline(inline, its):
                raise RecordError(f"{name}: the code {problem}")
            settings = tuple(_setting(item, name) for item in config)
            found = EnvoyFilter(read_key(extension, name), its, inline, config=settings, fail_open=fail_open)
        case [extension, language, [str(file), str(sha256)], list(config), bool(fail_open)]:
            found = EnvoyFilter(
                read_key(extension, name),
                read_member(language, Language, name),
                b"",
                checked(file, wrong_code_file, name),
                checked(sha256, wrong_sha256, name),
                tuple(_setting(item, name) for item in config),
                fail_open,
            )
        case _:
            raise RecordError(
                f"{name}: each must be [extension, entry point, config, milliseconds, fails open] or "
                "[extension, language, code or [file, sha256], config, fails open]"
            )
    check_ordered([setting for setting, _ in found.config], name)
    if len(found.config) > MAX_SETTINGS:
        raise RecordError(f"{name}: {len(found.config)} settings; at most {MAX_SETTINGS}")
    if found.config and isinstance(found, EnvoyFilter) and found.language is Language.LUA:
        raise RecordError(f"{name}: Lua has no config")
    return found


def _setting(value: Value, name: str) -> tuple[str, str]:
    match value:
        case [str(setting), str(text)]:
            return checked(setting, wrong_setting, name), checked(text, wrong_setting, name)
    raise RecordError(f"{name}: each setting must be [name, value]")


def read_external_authorization(value: Value, name: str) -> ExternalAuthorization:
    """Raises RecordError."""
    fields = Fields(value, name)
    found = ExternalAuthorization(
        service=read_key(fields.take("service", str), "service", wrong_service_name),
        port=read_port(fields.take("port", int), "port"),
        timeout_ms=fields.number("timeout", 1, MAX_CHECK_S * 1000),
        path_prefix=checked(fields.take("prefix", str), lambda text: wrong_path_prefix(text) if text else "", "prefix"),
        fail_open=read_flag(fields, "failOpen"),
        status_on_error=fields.number("status", 400, 599),
        checked=_patterns(fields, "checked"),
        added=fields.optional_list("added", _added),
        body_bytes=fields.number("bytes", 0, MAX_CHECKED_BODY),
        partial_body=read_flag(fields, "partial"),
        upstream_on_allow=_patterns(fields, "upstreamOnAllow"),
        downstream_on_allow=_patterns(fields, "downstreamOnAllow"),
        downstream_on_deny=_patterns(fields, "downstreamOnDeny"),
    )
    check_ordered([header for header, _ in found.added], "added")
    if len(found.added) > MAX_HEADERS:
        raise RecordError(f"added has {len(found.added)} headers; at most {MAX_HEADERS}")
    fields.finish()
    return found


def _patterns(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.optional_list(name, lambda value, name: checked(typed(value, str, name), wrong_header_pattern, name))
    check_ordered(found, name)
    if len(found) > MAX_HEADERS:
        raise RecordError(f"{name} has {len(found)} headers; at most {MAX_HEADERS}")
    return found


def _added(value: Value, name: str) -> tuple[str, str]:
    match value:
        case [header, content]:
            return (
                checked(typed(header, str, name), wrong_modified, name),
                checked(typed(content, str, name), wrong_field_value, name),
            )
    raise RecordError(f"{name}: each must be [name of a header, value]")
