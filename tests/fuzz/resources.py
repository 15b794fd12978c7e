"""Resources in YAML (`control.api`: document, resources, mesh): errors with their lines, or records for proxies.

PyYAML's own parser, which is another than libyaml, must find the same structure; and as it is Python, it guides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from control.api import messages, records, resources
from control.api.document import List, Map, Node, Scalar, read_documents
from control.api.identity import parse_trust_domain
from control.api.mesh import Mesh
from control.api.messages import Envelope, MessageError
from control.api.problems import MAX_PROBLEMS, Report, ResourceErrors
from control.api.topics import parse_topic

MAX_BYTES = 4096
WORDS = (
    b"apiVersion: v1\n", b"kind: Service\n", b"kind: Namespace\n", b"metadata: {name: web, namespace: shop}\n",
    b"spec:\n", b"\n---\n", b"\n...\n", b"&a ", b"*a", b"!!str ", b"<<: ", b"? ", b"- ", b": ", b"|\n ", b">-\n ",
    b"'", b'"', b"{", b"}", b"[", b"]", b"\t", b"\r", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8", b"010", b"yes",
    b"~", b"1e3", b".nan", b"# ", b"%YAML 1.1\n", b"\\x41", b"security.istio.io/v1", b"rules:\n",
    b"gateway.networking.k8s.io/v1",
    b"kind: AuthorizationPolicy\n", b"kind: HTTPRoute\n", b"kind: Gateway\n", b"kind: WorkloadEntry\n",
)  # fmt: skip
_NOTHING = (None, "", "~", "null", "Null", "NULL")
"""Documents that say nothing, as PyYAML reads them as text."""
_TRUST_DOMAIN = parse_trust_domain("cluster.local")
_DOCS = Path(__file__).parents[2] / "docs"


def seeds() -> Iterable[bytes]:
    """What the documentation shows, each document by itself and each page whole."""
    for page in sorted(_DOCS.glob("*.md")):
        shown = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
        for block in shown:
            yield from (part.encode() for part in block.split("---\n"))
        yield "---\n".join(shown).encode()
    for number in (b".nan", b"-.inf", b"1.e5", b"0x1F", b"1_000", b"on", b"~"):
        yield b"kind: " + number


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    _check_structure(text)
    try:
        mesh = Mesh.build(resources.parse(text, "f"), _TRUST_DOMAIN)
    except ResourceErrors as error:
        _check_errors(error, text)
        return
    for topic_text, body in mesh.records().items():
        try:
            payload = messages.encode(Envelope(1, 1, 0, body))
        except MessageError:
            continue
        topic = parse_topic(_TRUST_DOMAIN, topic_text)
        found = records.read(topic, messages.decode(payload).body, _TRUST_DOMAIN)
        assert records.write(found) == body


def _check_errors(error: ResourceErrors, text: str) -> None:
    assert 1 <= len(error.errors) <= MAX_PROBLEMS + 1
    lines = len(re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)) + 1
    for each in error.errors:
        assert each.problem
        assert 0 <= each.line <= lines, f"line {each.line} of {lines}"
        assert str(each).isprintable() or "\n" in each.problem, repr(str(each))


def _check_structure(text: str) -> None:
    report = Report()
    documents = [_plain(document) for document in read_documents(text, "f", report)]
    try:
        second = [each for each in yaml.load_all(text, Loader=yaml.BaseLoader) if each not in _NOTHING]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return
    if not report.errors:
        assert documents == second, f"\n{documents}\n{second}"


def _plain(node: Node) -> Any:
    match node:
        case Map():
            return {name: _plain(value) for name, value in node.entries.items()}
        case List():
            return [_plain(item) for item in node.items]
        case Scalar():
            return node.text
