"""Extensions in Lua and WebAssembly, in a real Envoy: what they may do, and that what fails costs its own request."""

from __future__ import annotations

import base64
import hashlib
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.conformance import Answer, Suite, route, running_suite, to
from tests.support.site import eventually
from tests.support.wasm import REQUEST, RESPONSE, UNREACHABLE, Module
from waypoint.engine_envoy import serving

EXTENSION = (
    "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: Extension\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with running_suite(tmp_path_factory.mktemp("extensions"), "envoy") as found:
        yield found


@pytest.fixture
def suite(running: Suite) -> Suite:
    running.apply()
    for echo in running.echoes.values():
        echo.seen.clear()
    return running


def attached(*names: str) -> str:
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: extended, namespace: shop}\n"
        f"spec:\n  targetRefs: [{{group: '', kind: Service, name: echo}}]\n  extensions: [{', '.join(names)}]\n"
    )


def lua(source: str, name: str = "code", more: str = "") -> str:
    text = textwrap.indent(textwrap.dedent(source), "      ")
    return EXTENSION.format(name=name) + f"  type: Lua\n  lua:\n    inline: |\n{text}\n{more}"


def wasm(module: bytes, name: str = "code", more: str = "") -> str:
    return (
        EXTENSION.format(name=name) + f"  type: Wasm\n  wasm:\n    inline: {base64.b64encode(module).decode()}\n{more}"
    )


def failed(answer: Answer, by: str = "shop/code") -> bool:
    """Whether it is a refusal since a filter has failed."""
    told = (answer.status, answer.headers.get("x-uproxy-reason"), answer.headers.get("x-uproxy-policy", ""))
    assert told[0] in (200, 503), told
    return told == (503, "extension", by)


WRITES = """
function envoy_on_request(handle)
  local headers = handle:headers()
  headers:add("x-order", "NAME")
  headers:replace("x-user", headers:get("x-forwarded-client-cert"))
end
function envoy_on_response(handle)
  handle:headers():add("x-order", "NAME")
end
"""


def test_lua_changes_heads_one_after_the_other_and_routes_see_it(suite: Suite) -> None:
    named = f"{{matches: [{{headers: [{{name: x-order, value: 'one,two'}}]}}], backendRefs: [{to('v2')}]}}"
    codes = [lua(WRITES.replace("NAME", name), name) for name in ("one", "two")]
    suite.apply(*codes, attached("one", "two"), route(named, f"{{backendRefs: [{to('v1')}]}}"))
    assert not suite.warnings
    answer = suite.ask(x_user="mallory")
    assert answer.by == "v2"
    assert answer.echoed["headers"]["x-user"] == "URI=spiffe://cluster.local/ns/shop/sa/web"
    assert answer.headers["x-order"] == "two,one"
    suite.apply(*codes, attached("two"), route(named, f"{{backendRefs: [{to('v1')}]}}"))
    assert suite.ask().by == "v1"


def test_lua_answers_and_reads_bodies(suite: Suite) -> None:
    source = """
    function envoy_on_request(handle)
      local body = handle:body()
      handle:respond({[":status"] = "418", ["x-length"] = tostring(body and body:length() or 0)}, "tea")
    end
    """
    suite.apply(lua(source), attached("code"))
    answer = suite.ask(method="POST", body=b"12345")
    assert (answer.status, answer.body, answer.headers["x-length"]) == (418, b"tea", "5")
    assert not suite.echoes["v1"].seen


FAILS = """
local function does(handle, what)
  local headers = handle:headers()
  if what == "raise" then error("no")
  elseif what == "raise what cannot be told" then error(setmetatable({}, {__tostring = function() error("no") end}))
  elseif what == "raise while reading" then for name in pairs(headers) do error("no") end
  elseif what == "loop while reading" then while true do for name in pairs(headers) do end end
  elseif what == "loop" then while true do end
  elseif what == "loop and catch" then while true do pcall(function() while true do end end) end
  elseif what == "loop in a handler" then while true do xpcall(error, function() while true do end end) end
  elseif what == "after the body" then handle:body() error("no")
  elseif what == "call" then handle:httpCall("shop/echo-v1:8080", {}, "", 1000)
  elseif what == "stream" then for chunk in handle:bodyChunks() do end
  elseif what == "body" then handle:body():setBytes("other")
  elseif what == "state" then handle:streamInfo():dynamicMetadata():set("uproxy.guard", "request", "")
  elseif what == "filter state" then handle:streamInfo():filterState()
  elseif what == "files" then io.open("/etc/passwd")
  elseif what == "programs" then os.execute("true")
  elseif what == "ffi" then require("ffi")
  elseif what == "debug" then debug.sethook()
  elseif what == "strings" then getmetatable("").__index = nil
  elseif what == "objects" then getmetatable(handle).__gc(handle)
  elseif what == "load" then load("return 1")
  elseif what == "answer of the mesh" then handle:respond({[":status"] = "200", ["x-uproxy-reason"] = "none"}, "")
  elseif what == "answer in capitals" then handle:respond({[":status"] = "200", ["X-Uproxy-Reason"] = "none"}, "")
  end
end
function envoy_on_request(handle) does(handle, handle:headers():get("x-do")) end
function envoy_on_response(handle) does(handle, handle:headers():get("do")) end
"""
WHATS = [
    *(
        "raise",
        "raise what cannot be told",
        "raise while reading",
        "loop while reading",
        "loop",
        "loop and catch",
        "loop in a handler",
        "after the body",
        "call",
        "stream",
        "body",
        "state",
    ),
    *("filter state", "files", "programs", "ffi", "debug", "strings", "objects", "load"),
]


def test_lua_that_fails_costs_its_own_request(suite: Suite) -> None:
    suite.apply(lua(FAILS), attached("code"))
    for what in (*WHATS, "answer of the mesh", "answer in capitals"):
        assert failed(suite.ask(method="POST", body=b"12", x_do=what, x_request_id=f"lua-{what}")), what
        assert suite.ask().status == 200, what
    assert suite.record_of("lua-raise").policy == "shop/code"
    assert {seen["method"] for echo in suite.echoes.values() for seen in echo.seen} == {"GET"}
    for what in WHATS:
        answer = suite.ask(answer_do=what)
        assert failed(answer), what
        assert answer.body == b"a filter of this waypoint failed\n"
        assert suite.ask().status == 200, what


def test_lua_that_fails_may_be_gone_on_without(suite: Suite) -> None:
    suite.apply(lua(FAILS, more="    failOpen: true\n"), attached("code"))
    for what in ("raise", "loop"):
        assert [suite.ask(x_do=what).status, suite.ask(answer_do=what).status] == [200, 200]


@pytest.mark.parametrize("source", ["function (", "while true do end", "error('no')"])
def test_lua_that_does_not_load_refuses_and_a_better_one_serves(suite: Suite, source: str) -> None:
    suite.apply(lua(source), attached("code"))
    refused = suite.ask()
    assert (refused.status, refused.headers["x-uproxy-reason"]) == (503, "not-expressible")
    suite.apply(lua("x = 1"), attached("code"))
    assert suite.ask().status == 200


HEADS = {":path": "/admin", ":authority": "other", ":method": "PUT", "x-forwarded-client-cert": "URI=boss"} | {
    "x-forwarded-for": "6.6.6.6",
    "x-uproxy-caller": "spiffe://cluster.local/ns/shop/sa/boss;1.2.3.4:5",
    "content-length": "3",
    "transfer-encoding": "chunked",
}


@pytest.mark.parametrize("name", HEADS)
def test_no_code_writes_what_policy_has_seen_or_by_what_messages_end(suite: Suite, name: str) -> None:
    change = f"handle:headers():replace('{name}', '{HEADS[name]}')"
    in_lua = lua(f"function envoy_on_request(handle) {change} end")
    module = Module()
    in_wasm = wasm(module.made(module.replace(REQUEST, name, HEADS[name])))
    of_response = lua(f"function envoy_on_response(handle) {change} end")
    for code in (in_lua, in_wasm, *([] if name.startswith((":", "x-forwarded")) else [of_response])):
        suite.apply(code, attached("code"))
        for echo in suite.echoes.values():
            echo.seen.clear()
        assert failed(suite.ask(), by="")
        assert code is of_response or not any(echo.seen for echo in suite.echoes.values())


def test_wasm_changes_heads_and_answers(suite: Suite, tmp_path: Path) -> None:
    module = Module()
    answers = module.when("x-answer", module.answer(418, "tea"))
    code = module.made(
        answers + module.add(REQUEST, "x-wasm", "seen") + module.configured(), module.add(RESPONSE, "x-wasm", "left")
    )
    settings = "    config: {b: two, a: '1'}\n"
    inline = wasm(code, more=settings)
    file = tmp_path / "code.wasm"
    file.write_bytes(code)
    digest = hashlib.sha256(code).hexdigest()
    stored = (
        EXTENSION.format(name="code") + f"  type: Wasm\n  wasm:\n    file: {file}\n    sha256: {digest}\n{settings}"
    )
    for which in (inline, stored):
        suite.apply(which, attached("code"))
        answer = suite.ask()
        assert (answer.echoed["headers"]["x-wasm"], answer.headers["x-wasm"]) == ("seen", "left")
        assert answer.echoed["headers"]["x-config"] == '{"a": "1", "b": "two"}'
        told = suite.ask(x_answer="1")
        assert (told.status, told.body) == (418, b"tea")


@pytest.mark.parametrize("side", ["request", "response"])
@pytest.mark.parametrize("name", ["x_uproxy_reason", "X_Uproxy_Caller", "x_forwarded_for", "Connection"])
def test_wasm_does_not_answer_with_what_it_may_not_write(suite: Suite, name: str, side: str) -> None:
    module = Module()
    code = module.answer(418, "tea", **{name: "close"})
    suite.apply(wasm(module.made(**{f"on_{side}": code})), attached("code"))
    answer = suite.ask()
    assert failed(answer, by="")
    assert (answer.headers.get("x-uproxy-caller", ""), answer.body) == ("", b"a filter of this waypoint failed\n")


def test_wasm_may_answer_in_place_of_a_response(suite: Suite) -> None:
    module = Module()
    suite.apply(wasm(module.made(on_response=module.answer(418, "tea", x_own="yes"))), attached("code"))
    answer = suite.ask()
    assert (answer.status, answer.headers["x-own"], answer.body) == (418, "yes", b"tea")


@pytest.mark.parametrize("body", ["", "tea"])
def test_wasm_does_not_say_where_its_answer_ends(suite: Suite, body: str) -> None:
    module = Module()
    suite.apply(wasm(module.made(module.answer(418, body, Content_Length="2"))), attached("code"))
    answer = suite.ask()
    assert answer.status == 418, answer
    assert (int(answer.headers["content-length"]), answer.body.decode()) == (len(body), body)


def test_a_trap_costs_its_own_request_and_the_module_is_loaded_again(suite: Suite) -> None:
    module = Module()
    suite.apply(wasm(module.made(module.when("x-trap", UNREACHABLE))), attached("code"))
    assert suite.ask().status == 200
    trapped = suite.ask(x_trap="1")
    assert (trapped.status, trapped.headers["x-uproxy-reason"]) == (503, "extension")
    until = time.monotonic() + 10
    while (status := suite.ask().status) != 200:
        assert status == 503, "nobody goes past it"
        assert time.monotonic() < until


def test_wasm_calls_nobody(suite: Suite) -> None:
    module = Module()
    suite.apply(wasm(module.made(module.call("shop/echo-v1:8080"))), attached("code"))
    assert "x-called" not in suite.ask().echoed["headers"]


def test_a_file_that_is_not_what_was_applied_is_not_run(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LOOK_S", 0.2)
    source = b"function envoy_on_request(handle) handle:headers():add('x-lua', 'here') end"
    file = tmp_path / "code.lua"
    digest = hashlib.sha256(source).hexdigest()
    code = EXTENSION.format(name="code") + f"  type: Lua\n  lua: {{file: {file}, sha256: {digest}}}\n"
    suite.apply(code, attached("code"))
    assert "cannot be read: No such file" in suite.ask().body.decode()
    file.write_bytes(b"-- another")

    def told(text: str) -> bool:
        answer = suite.ask()
        assert answer.status == 200 or answer.headers["x-uproxy-reason"] == "not-expressible"
        return text in answer.body.decode()

    eventually(lambda: told("code.lua has another SHA-256"))
    file.write_bytes(source)
    eventually(lambda: told('"x-lua": "here"'))


def test_what_is_refused_by_policy_comes_to_no_code(suite: Suite) -> None:
    deny = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\n"
        "spec: {targetRefs: [{group: '', kind: Service, name: echo}], action: DENY, rules: [{}]}\n"
    )
    suite.apply(
        deny, attached("code"), lua("function envoy_on_request(handle) handle:respond({[':status'] = '200'}) end")
    )
    assert suite.ask().status == 403


def test_a_filter_in_python_is_refused_by_name(suite: Suite) -> None:
    python = EXTENSION.format(name="greeter") + "  type: PythonFilter\n  pythonFilter: {name: greeter}\n"
    suite.apply(python, attached("greeter"))
    assert any("the engine envoy of Gateway shop/wp does not know" in one for one in suite.warnings)
    refused = suite.ask()
    assert (refused.status, refused.headers["x-uproxy-reason"]) == (503, "not-expressible")
    assert "Extension shop/greeter (PythonFilter)" in refused.body.decode()
