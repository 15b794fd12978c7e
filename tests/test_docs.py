"""The documentation names what the code has, and nothing else; what it tells people to type is understood."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from bpf import layout
from control.api import mesh, resources
from control.api.address import FORBIDDEN_PORTS, HBONE_PORT
from control.server.enrolment import CERTIFICATES_PORT
from control.server.metrics import METRICS_PORT as CONTROL_METRICS_PORT
from uproxy import admin, admission, config, dns, door, process, run, tls
from uproxy.node.metrics import METRICS_PORT as NODE_METRICS_PORT
from uproxy.tap import Taps

ROOT = Path(__file__).parent.parent
TRACKED = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TRACKED, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").glob("*.md"))]
COMMANDS = {
    "uproxy run": "uproxy.run",
    "uproxy exec": "uproxy.launch",
    "uproxy upgrade": "uproxy.upgrade",
    "uproxy fork-server": "uproxy.fork_server",
    "uproxy node": "uproxy.node.agent",
    "waypoint run": "waypoint.run",
    "meshctl": "control.cli.__main__",
    "python -m control.client.csr": "control.client.csr",
}
UNIVERSAL = {"--help", "-h", "--version"}
ERRORS = (ROOT / "docs" / "errors.md").read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = heading.index(" ")
    below = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", below, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Every row of every table, but for heads and rules."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        for table in tables
        for line in table.splitlines()[2:]
    ]


def code_marks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


class FoundError(Exception):
    """Carries a parser out of the command that made it."""


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    main = importlib.import_module(COMMANDS[command]).main
    with pytest.MonkeyPatch.context() as patch:

        def found(self, arguments=None, namespace=None):
            raise FoundError(self)

        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        with pytest.raises(FoundError) as caught:
            main([])
    return caught.value.args[0]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Its options, and those of the commands below it."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options_of(below)
    return found


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--?[A-Za-z][a-z0-9-]*)(?=[ `=…,]|$)", "\n".join(code_marks(text)), re.MULTILINE))


# -- commands


@pytest.mark.parametrize(
    "command", ["uproxy run", "uproxy exec", "uproxy upgrade", "uproxy node", "waypoint run", "meshctl"]
)
def test_every_option_is_documented_and_every_documented_one_exists(command):
    text = section((ROOT / "docs" / "commands.md").read_text(), f"## {command}")
    in_tables = options_in("\n".join(row[0] for row in rows(text)))
    known = options_of(parser_of(command))
    hidden = {"--direct-socket", "--probe-fd"} if command == "uproxy run" else set()
    assert in_tables >= known - UNIVERSAL - hidden
    assert options_in(text) - UNIVERSAL <= known


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines() -> list[tuple[str, list[str]]]:
    """Every command line of ours in a page's shell blocks and in a unit, in words."""
    texts = [(page.name, block) for page in PAGES for block in blocks(page, "sh")]
    for unit in [*sorted((ROOT / "deploy").glob("*.service")), *sorted((ROOT / "deploy").glob("*.conf"))]:
        texts += [
            (unit.name, text)
            for text in re.findall(r"^Exec(?:Start|Reload)=((?:.*\\\n)*.*)$", unit.read_text(), re.MULTILINE)
        ]
    found = []
    for name, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\{?\w+\}?|\$\([^)]*\)", "x", line), comments=True)
            words = [word.rpartition("/")[2] if word.startswith(("/opt/uproxy/", ".venv/")) else word for word in words]
            if (words and words[0] in ("uproxy", "meshctl")) or words[:2] == ["python", "-m"]:
                found.append((name, words))
    return found


@pytest.mark.parametrize(
    ("page", "words"), command_lines(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40]
)
def test_commands_in_the_documentation_are_understood(page, words, monkeypatch):
    command = next((known for known in COMMANDS if " ".join(words).startswith(known)), None)
    if command is None:
        assert words[:3] == ["python", "-m", "http.server"], words
        return
    arguments = words[len(command.split()) :]
    for mark in ("--", "&", "<", ">", "2>", "|"):  # what follows is not for us
        if mark in arguments:
            arguments = arguments[: arguments.index(mark)]
    known = [("--id", "spiffe://x/ns/x/sa/x")]
    for option, value in known:
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
    parser_of(command).parse_args(arguments)  # exits when it is wrong


def test_run_accepts_the_readmes_settings():
    for page, words in command_lines():
        if words[:2] == ["uproxy", "run"]:
            assert config.parse([word for word in words[2:] if word != "&"]).captured is False, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_hold_together(page):
    provided = {"curl", "systemctl", "uproxy", "meshctl", "waypoint", "redis-cli"}
    for block in blocks(page, "sh"):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        for line in block.replace("\\\n", " ").splitlines():
            word = re.match(r"\s*([a-z][\w.-]*)(?!\S*=)", line)
            if word is None or word[1] in provided:
                continue
            builtin = subprocess.run(["bash", "-c", f"type -t {word[1]}"], capture_output=True, check=False)
            assert builtin.returncode == 0 or shutil.which(word[1]), f"{page.name}: {line}"


def test_make_targets_are_documented_and_every_documented_one_exists():
    makefile = (ROOT / "Makefile").read_text()
    public = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    mentioned = {target for page in PAGES for target in re.findall(r"\bmake ([a-z]+)`", page.read_text())}
    assert mentioned <= public
    assert mentioned >= public - {"help"}


# -- ports


def test_ports_are_documented_and_every_documented_one_is_in_the_code():
    text = section((ROOT / "ARCHITECTURE.md").read_text(), "## Ports")
    listed = {int(row[0]) for row in rows(text)}
    assert listed == {
        parser_of("uproxy run").get_default("admin_port"),
        run.OUTBOUND_PORT,
        door.PLAINTEXT_PORT,
        HBONE_PORT,
        process.METRICS_PORT,
        process.READY_PORT,
        dns.FIRST_PORT,
    }
    documented = {int(port) for port in re.findall(r"\b15\d{3}\b", text)}
    assert documented >= FORBIDDEN_PORTS
    in_code = FORBIDDEN_PORTS | listed | {layout.constant("MESH_PORT_RESERVED_LAST")}
    in_code |= {CERTIFICATES_PORT, CONTROL_METRICS_PORT, NODE_METRICS_PORT}
    everywhere = {int(port) for page in PAGES for port in re.findall(r"\b15[01]\d{2}\b(?!\.\d)", page.read_text())}
    assert everywhere <= in_code


def test_admin_pages_are_documented():
    text = section((ROOT / "ARCHITECTURE.md").read_text(), "## Ports")
    routes = {
        *admin.admin_routes(dict, lambda: None, bytes, Taps()),
        *admin.metrics_routes(bytes),
        *admin.ready_routes(list),
    } - {"/"}
    assert {mark.partition("?")[0] for mark in code_marks(text) if mark.startswith("/")} == routes


# -- errors


def strings(node: ast.AST) -> set[str]:
    """The texts that an expression can be: a constant, or either end of a conditional."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return strings(node.body) | strings(node.orelse)
    return set()


def reasons_in_code() -> set[str]:
    found = {*tls._CHAIN_REASONS.values(), *tls._HANDSHAKE_REASONS.values()}
    for path in (*(ROOT / "uproxy").rglob("*.py"), ROOT / "control/client/x509.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("RefusedError", "X509Error", "_identity_refusal"):
                    found |= strings(node.args[0])
                # reason = _SOME_REASONS.get(key, "the default"), {400: "a", 401: "b"}.get(status, "the default")
                if called == "get" and len(node.args) == 2:
                    owner = node.func.value
                    if isinstance(owner, ast.Dict) and all(strings(value) for value in owner.values):
                        found |= set().union(*map(strings, owner.values), strings(node.args[1]))
                    elif getattr(owner, "id", "").endswith("_REASONS"):
                        found |= strings(node.args[1])
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if getattr(target, "id", "") == "reason":
                        found |= strings(node.value)
                    elif isinstance(target, ast.Tuple) and getattr(target.elts[0], "id", "") == "reason":
                        found |= strings(node.value.elts[0])
    return found


def test_every_reason_is_documented_and_every_documented_one_exists():
    documented = [code_marks(row[0])[0] for row in rows(section(ERRORS, "## Reasons"))]
    assert sorted(documented) == sorted(reasons_in_code())


def test_statuses_are_documented():
    documented = {mark for row in rows(section(ERRORS, "## What a peer sees")) for mark in code_marks(row[0])}
    source = "".join(path.read_text() for path in (ROOT / "uproxy").rglob("*.py"))
    in_code = set(re.findall(r"\bstatus(?:: int)? ?= ?([2-5]\d\d)\b", source)) - {"502"} | {"200"}
    headers = set(re.findall(r'b"(x-[a-z-]+)"', source)) - {admission.CALLER.decode()}  # which only requests have
    assert documented == in_code | headers


def test_kernel_counters_are_documented():
    names = [name for name in layout.members("mesh_counter") if name != "MESH_COUNTERS"]
    documented = [code_marks(row[0])[0] for row in rows(section(ERRORS, "## Counters of the kernel"))]
    assert sorted(documented) == sorted(name.removeprefix("MESH_").lower() for name in names)


# -- resources


def fields_in_code() -> set[str]:
    """Names of the fields that the readers ask for or refuse."""
    asked = ("text", "parsed", "parsed_list", "choice", "integer", "integer_or_text", "boolean", "child", "children")
    found = set()
    for name in ("resources", "security", "metadata", "gateway_api"):
        for node in ast.walk(ast.parse((ROOT / "control" / "api" / f"{name}.py").read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in (*asked, "pairs") and node.args:
                found |= strings(node.args[0])
            elif node.func.attr == "refuse":
                found |= {
                    text
                    for key in ast.walk(node)
                    if isinstance(key, ast.Dict)
                    for k in key.keys
                    if k
                    for text in strings(k)
                }
                found |= {
                    text
                    for names in ast.walk(node)
                    if isinstance(names, ast.Tuple)
                    for text in set().union(*map(strings, names.elts))
                }
    return found


def test_every_kind_and_field_is_documented():
    text = (ROOT / "docs" / "resources.md").read_text()
    kinds = {row[0]: tuple(code_marks(row[1])) for row in rows(text.split("\n## ", 1)[0])}
    assert kinds == {kind: versions for kind, (versions, _) in resources._KINDS.items()}
    for kind in kinds:
        assert f"\n## {kind}\n" in text
    for later in resources._LATER:
        assert later in text
    missing = {name for name in fields_in_code() if not re.search(rf"\b{re.escape(name)}\b", text)}
    assert not missing


def test_the_examples_of_every_kind_make_a_mesh():
    text = "---\n".join(blocks(ROOT / "docs" / "resources.md", "yaml"))
    built = mesh.Mesh.build(resources.parse(text, "docs/resources.md"), "cluster.local")
    assert [service.key for service in built.services] == ["shop/resolver", "shop/reviews"]
    assert built.virtual_datagrams == {"shop/resolver": (53,)}
    assert len(built.endpoints) == len(built.peer_authentications) == 1
    assert len(built.policies) == 2
    assert len(built.gateways) == 1
    assert [route.key for route in built.routes] == ["shop/reviews", "shop/reviews-grpc"]


@pytest.mark.parametrize("file", sorted((ROOT / "deploy" / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_deployed_examples_make_a_mesh_without_warnings(file):
    built = mesh.Mesh.build(resources.parse(file.read_text(), file.name), "cluster.local")
    assert built.services
    assert built.warnings == ()


def test_units_find_what_they_read():
    unit = (ROOT / "deploy" / "uproxy-exec@.service").read_text()
    settings = (ROOT / "deploy" / "examples" / "workload.env").read_text()
    wanted = set(re.findall(r"\$\{?([A-Z_]+)", unit))
    assert wanted == set(re.findall(r"^([A-Z_]+)=", settings, re.MULTILINE))


# -- what pages point at


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_files_and_names_in_the_architecture_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for mark in code_marks(text):
        path = re.fullmatch(r"(?:\w+/)+[\w.]+\.(?:py|c|h)", mark)
        assert path is None or (ROOT / mark).is_file(), mark
        name = re.fullmatch(r"(\w+)\.((?:[A-Z_]\w*)(?:\.\w+)?|\w+)", mark)
        if name is None or mark.endswith((".py", ".h", ".toml")):
            continue
        for package in ("uproxy", "waypoint", "control.api", "control.client", "control.server", "bpf"):
            spec = importlib.util.find_spec(f"{package}.{name[1]}")
            if spec is not None and spec.origin is not None:
                found = importlib.import_module(f"{package}.{name[1]}")
                for part in name[2].split("."):
                    assert hasattr(found, part), mark
                    found = getattr(found, part)


def is_written(value: float, text: str) -> bool:
    """Whether a page has a limit: as a count, bytes or seconds."""
    whole = int(value)
    forms = {
        f"{whole:,}",
        f"{whole} s",
        f"{value * 1000:g} ms",
        f"{whole // 60} min",
        f"{whole >> 10} KiB",
        f"{whole >> 20} MiB",
    }
    forms |= {f"{whole >> 20} Mi"}
    return any(re.search(rf"(?<![\d,]){form}(?![\d\w]|,\d)", text) for form in forms if not form.startswith("0 "))


def test_limits_in_the_architecture_exist_and_have_these_values():
    module = ""
    for row in rows(section((ROOT / "ARCHITECTURE.md").read_text(), "## Limits")):
        for mark in code_marks(row[2]):
            owner, dot, name = mark.rpartition(".")
            if "/" in mark:
                continue
            module = owner if dot else module
            packages = ("uproxy", "waypoint", "control.api", "control.client", "control.server", "uproxy.node")
            packages += ("waypoint.engine_envoy",)
            owners = [p for p in packages if importlib.util.find_spec(f"{p}.{module}") is not None]
            values = [getattr(importlib.import_module(f"{p}.{module}"), name, None) for p in owners]
            value = next((value for value in values if value is not None), None)
            assert value is not None, mark
            assert is_written(value, row[1]), f"{mark} is {value}, not {row[1]}"


def test_tests_that_a_page_names_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "authorization-tests.md").read_text()))
    assert len(named) > 20
    assert not [name for name in sorted(named) if f"def {name}(" not in sources]


def test_pages_that_the_code_points_at_exist():
    for package in ("bpf", "control", "uproxy", "waypoint", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w-]+\.md", path.read_text()):
                assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} points at {page}"


def test_the_readme_keeps_a_place_for_measurements():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- bench:begin -->") == text.count("<!-- bench:end -->") == 1
    assert text.index("<!-- bench:begin -->") < text.index("<!-- bench:end -->")
