"""The examples in the documentation run and print what they say."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import fdk_jax
from fdk_jax import models

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["docs/format.md"])
def test_doctest_examples(name):
    failures, tried = doctest.testfile(str(ROOT / name), module_relative=False)
    assert tried and not failures


def test_the_example_of_the_readme_runs():
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 16
    exec(compile(example, "README.md", "exec"), {})


def test_links_to_files_lead_somewhere():
    dead = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if ":" not in link]
        dead += [(page.name, link) for link in links if not (page.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("package", [fdk_jax, models], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    imported = re.findall(r"^from .* as (\w+)$", inspect.getsource(package), re.MULTILINE)
    names = [name for name in imported if not inspect.ismodule(getattr(package, name))]
    assert names
    assert not [n for n in names if not re.search(rf"::? {package.__name__}\.{n}$", text, re.M)]


def test_decisions_are_numbered_one_by_one():
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{i:03}-" for i in range(1, len(pages) + 1)]
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith(f"# {page.name[:3]}: "), page.name


def test_links_to_decisions_name_their_number():
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(
            r"\[[^\]]*?(\d{3})\]\([^)\s]*?(\d{3})-[^)\s]*\)", page.read_text(encoding="utf-8")
        )
        wrong += [(page.name, *link) for link in links if link[0] != link[1]]
    assert not wrong
