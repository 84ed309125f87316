"""The examples in the documentation run and print what they say."""

import doctest
import re
from pathlib import Path

import pytest

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
