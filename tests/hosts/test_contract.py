"""Both hosts offer what the protocol asks of a host: the same names with the same arguments, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HOSTS = Path(__file__).resolve().parents[2] / "hosts"


def offered(path: str, *classes: str) -> dict[str, str]:
    """What classes of a file offer: arguments with their defaults by name of a method, nothing for an attribute."""
    found: dict[str, str] = {}
    for node in ast.parse((HOSTS / path).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or (classes and node.name not in classes):
            continue
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                given = part.args
                for one in (*given.args, *given.kwonlyargs):
                    one.annotation = None
                found[part.name] = ast.unparse(given)
            elif isinstance(part, ast.AnnAssign):
                found[ast.unparse(part.target)] = ""
            elif isinstance(part, ast.Assign):
                found[ast.unparse(part.targets[0])] = ""
    return found


def asked() -> dict[str, str]:
    """What the groups of the protocol ask."""
    tree = ast.parse((HOSTS / "contract.py").read_text(encoding="utf-8"))
    host = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Host")
    return offered("contract.py", *(ast.unparse(base) for base in host.bases if ast.unparse(base) != "Protocol"))


@pytest.mark.parametrize(("path", "name"), [("comfyui/host.py", "ComfyUI"), ("headless/host.py", "Headless")])
def test_a_host_offers_what_is_asked_of_it(path, name):
    assert offered(path, name) == asked()


def test_every_method_of_the_protocol_says_what_it_promises():
    tree = ast.parse((HOSTS / "contract.py").read_text(encoding="utf-8"))
    silent = [
        part.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef) and not ast.get_docstring(part)
    ]
    assert asked() and not silent


def test_no_code_is_given_a_host_of_any_type():
    found = [
        f"{path.relative_to(HOSTS)}:{arguments.lineno}"
        for path in HOSTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for arguments in (*node.args.args, *node.args.kwonlyargs)
        if arguments.arg == "host" and ast.unparse(arguments.annotation or ast.Name("Any")) == "Any"
    ]
    assert not found
