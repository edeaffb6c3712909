"""The pages of the package documentation say what the code does: their examples, recipes, names and references."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import itertools
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyterrier as pt
import pytest

import pt_dance
from pt_dance import Round, recipes

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "pt_dance" / "pt_docs"
PAGES = sorted(path.stem for path in FOLDER.glob("*.rst"))
METHODS = {
    name: name.replace("_", "-")
    for name in recipes.__all__
    if name not in ("Round", "check_recipe", "current_model") and inspect.isfunction(getattr(recipes, name))
}
SECTIONS = [
    "In one sentence",
    "Formula",
    "Source",
    "Recipe",
    "What the papers report",
    "When it helps and when it hurts",
    "Known faults of the original that this does not share",
    "See also",
]

# What the names of the examples are.
VARIABLES = {
    "ance": pt_dance.DanceRetriever,
    "again": pt_dance.DanceRetriever,
    "corpus": pt_dance.Corpus,
    "dance": pt_dance.DanceRetriever,
    "dense": pt_dance.DenseRetriever,
    "encoder": pt_dance.DualEncoder,
    "index": pt_dance.DenseIndex,
    "quick": pt_dance.AnnRetriever,
}
# Where a function that takes **options or **kwargs hands them to.
HANDED_ON = {
    "dance.plot_history": ["analysis.plot_history"],
    "dance.report": ["analysis.write_report"],
    "DualEncoder.static": ["DualEncoder"],
    "DualEncoder.static_from": ["DualEncoder"],
    "DualEncoder.two_towers": ["DualEncoder"],
    "index.ann_retriever": ["AnnRetriever", "DenseRetriever"],
    "recipes.margin_mse_dual": ["recipes.margin_mse", "Round"],
    "recipes.margin_mse_mnrl_dual": ["recipes.margin_mse_dual", "recipes.margin_mse", "Round"],
}


class Block(NamedTuple):
    """A Python code block of a page."""

    caption: str
    tree: ast.Module


def text_of(page: str) -> str:
    return (FOLDER / f"{page}.rst").read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Return the Python code blocks of a page; compiling fails where one is no Python."""
    found = []
    lines = text_of(page).split("\n")
    for number, line in enumerate(lines):
        if not (start := re.fullmatch(r"( *)\.\. code-block:: python", line)):
            continue
        inside = " " * (len(start[1]) + 1)
        end = number + 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(inside)):
            end += 1
        code = textwrap.dedent("\n".join(lines[number + 1 : end]))
        caption = re.match(r":caption: (.*)\n", code)
        code = code[caption.end() :] if caption else code
        tree = ast.parse(code, f"{page}.rst, line {number + 1}")
        compile(tree, f"{page}.rst", "exec")
        found.append(Block(caption[1] if caption else "", tree))
    return found


def resolve(dotted: str) -> object:
    """Return what a dotted name of an example is: a class, a function or a module of the package."""
    first, *rest = dotted.split(".")
    value = VARIABLES.get(first) or getattr(pt_dance, first)
    for name in rest:
        if isinstance(value, property):
            value = getattr(pt_dance, inspect.signature(value.fget).return_annotation)
        value = getattr(value, name)
    return value


def dotted_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        inner = dotted_name(node.value)
        return inner and f"{inner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def parameters(dotted: str) -> set[str]:
    """Return the keywords that a call takes, those among them that are handed on."""
    if dotted == "Round":
        return {field.name for field in fields(Round)}
    found = inspect.signature(resolve(dotted)).parameters.values()
    names = {p.name for p in found if p.kind != p.VAR_KEYWORD}
    if any(p.kind == p.VAR_KEYWORD for p in found):
        for other in HANDED_ON.get(dotted, ["Round"] if dotted.startswith("recipes.") else []):
            names |= parameters(other)
    return names


def is_ours(dotted: str | None) -> bool:
    first = (dotted or "").split(".")[0]
    return first in VARIABLES or first in pt_dance.__all__


@pytest.mark.parametrize("page", PAGES)
def test_every_measurement_is_there(page):
    assert "MEASURED" not in (FOLDER / f"{page}.rst").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_well_formed(page):
    lines = text_of(page).split("\n")
    for title, line in itertools.pairwise(lines):
        if re.fullmatch(r"[=\-^]{4,}", line) and title.strip():
            assert len(title) <= len(line), title
    for target in re.findall(r":doc:`(?:[^`<]*<)?([\w-]+)>?`", text_of(page)):
        assert target in PAGES, target
    try:
        import docutils.core  # noqa: F401
    except ImportError:
        return
    assert problems_by_docutils(text_of(page)) == []


def problems_by_docutils(text: str) -> list[str]:
    """Return what docutils finds wrong with a page, where Sphinx's own directives and roles are taken as they are."""
    from docutils import nodes
    from docutils.core import publish_doctree
    from docutils.parsers.rst import Directive, directives, roles

    class Verbatim(Directive):
        has_content = True
        optional_arguments = 1
        final_argument_whitespace = True
        option_spec = dict.fromkeys(("caption", "maxdepth", "members", "no-members"), directives.unchanged)

        def run(self):
            return []

    for name in ("autoclass", "autofunction", "automodule", "code-block", "toctree"):
        directives.register_directive(name, Verbatim)
    for name in ("class", "doc", "func", "meth", "mod"):
        roles.register_local_role(name, lambda name, raw, text, *_: ([nodes.literal(raw, text)], []))
    settings = {"report_level": 1, "halt_level": 5, "warning_stream": io.StringIO()}
    tree = publish_doctree(text, settings_overrides=settings)
    links = [node["refuri"] for node in tree.findall(nodes.reference) if "refuri" in node]
    mails = [link for link in links if link.startswith("mailto:")]  # how nDCG with a cutoff is read
    return [node.astext() for node in tree.findall(nodes.system_message)] + mails


def test_every_page_is_in_the_table_of_contents():
    assert set(re.findall(r"^    .+ <([\w-]+)>$", text_of("index"), re.M)) == set(PAGES) - {"index"}


@pytest.mark.parametrize("page", PAGES)
def test_names_and_keywords_of_examples_exist(page):
    for block in blocks(page):
        defined = {alias.asname or alias.name for node in ast.walk(block.tree) if isinstance(node, ast.ImportFrom)
                   and node.module != "pt_dance" for alias in node.names}  # fmt: skip
        for node in ast.walk(block.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pt_dance":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and is_ours(dotted_name(node)) and dotted_name(node) not in defined:
                resolve(dotted_name(node))
            if isinstance(node, ast.Call) and is_ours(name := dotted_name(node.func)):
                if name in VARIABLES:
                    continue  # a transformer that is called with a frame
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - parameters(name)
                assert not unknown, f"{name} takes no {unknown}"


def text_of_any(page: str) -> str:
    return text_of(page) if page in PAGES else (ROOT / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README", "CONTRIBUTING", *PAGES])
def test_commands_name_scripts_and_options_that_exist(page):
    text = text_of_any(page).replace("\\\n", " ")
    for script in set(
        re.findall(r"(?<![\w./-])(?:experiments|notebooks|pt_dance|tests)/[\w/]+\.(?:py|rst|toml|md)", text)
    ):
        assert (ROOT / script).is_file(), script
    for script, options in re.findall(r"python ((?:experiments|notebooks|tests)/[\w/]+\.py)([^\n`]*)", text):
        path = ROOT / script
        imported = re.findall(r"^(?:from|import) (\w+)", code := path.read_text(encoding="utf-8"), re.M)
        beside = [path.with_name(f"{name}.py") for name in imported]
        code += "".join(other.read_text(encoding="utf-8") for other in beside if other.is_file())
        for option in re.findall(r" (--[\w-]+)", options):
            assert f'"{option}"' in code, f"{script} {option}"


@pytest.mark.parametrize("page", ["README", "CONTRIBUTING", *PAGES])
def test_names_and_keywords_in_sentences_exist(page):
    text = text_of_any(page)
    said = re.findall(r"``([^`]+)``" if page in PAGES else r"(?<!`)`([^`\n]+)`(?!`)", text)
    for code in (" ".join(part.split()) for part in said if not re.search(r"/|\.(?:py|md|rst)\b", part)):
        try:
            nodes = list(ast.walk(ast.parse(code.removeprefix("pt_dance."))))
        except SyntaxError:
            continue  # a command, or a word with a sign
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_ours(dotted_name(node)):
                resolve(dotted_name(node))
            if isinstance(node, ast.Call) and is_ours(name := dotted_name(node.func)) and name not in VARIABLES:
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - parameters(name)
                assert not unknown, f"{name} takes no {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_refer_to_exists(page):
    text = text_of(page)
    for name in re.findall(r"``?(?:pt_dance\.)?(recipes\.\w+)\(", text):
        assert callable(resolve(name)), name
    for name in re.findall(r":(?:class|func|mod|meth):`~?(pt_dance[\w.]+)`", text):
        resolve(name.removeprefix("pt_dance."))
    for name, members in re.findall(r"^\.\. auto\w+:: (\S+)\n(?:    :members: (.*)\n)?", text, re.M):
        target = resolve(name.removeprefix("pt_dance."))
        for member in filter(None, members.split(", ")):
            assert hasattr(target, member) or member in {f.name for f in fields(target)}, f"{name}.{member}"


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^\.\. auto\w+:: pt_dance\.(\S+)", text_of("api"), re.M))
    public = {name for name in pt_dance.__all__ if not name.startswith("_")}
    for module in pt_dance._MODULES:
        public |= {f"{module}.{name}" for name in getattr(pt_dance, module).__all__}
    assert public - listed == {"recipes.Round"}  # which is pt_dance.Round


@pytest.mark.parametrize("name", ["README", "benchmarks", "scaling"])
def test_the_tables_of_measurements_are_those_of_the_committed_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    pages = importlib.import_module("pages")
    page = pages.file_of(name).read_text(encoding="utf-8")
    assert set(pages.BLOCKS) == {"README", "benchmarks", "scaling"} and pages.render(page, name) == page
    other = pages.MEASURED.sub(lambda part: re.sub(r"\d", "7", part[0]), page)
    assert other != page and pages.render(other, name) == page
    with pytest.raises(ValueError, match="measured parts"):
        pages.render(re.sub("(measured: |end of )(memory|on-paper|medquad)", r"\1other", page), name)


def test_the_measures_of_the_space_are_the_committed_ones_and_every_picture_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    figures = importlib.import_module("figures")
    page = text_of("analysis")
    assert figures.render(page) == page and page.count("    * - ") > len(figures.SHOWN)
    assert figures.render(figures.MEASURED.sub(lambda found: found[0].replace("0.", "7."), page)) == page
    pictures = [name for name in PAGES for name in re.findall(r"^\.\. (?:figure|image):: (\S+)$", text_of(name), re.M)]
    assert len(pictures) >= 3 and all((FOLDER / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("recipe", METHODS)
def test_a_recipe_has_a_page_with_all_sections(recipe):
    page = METHODS[recipe]
    assert page in PAGES
    assert re.findall(r"^(.+)\n-{4,}$", text_of(page), re.M) == SECTIONS
    used = [dotted_name(node.func) for block in blocks(page) for node in ast.walk(block.tree) if type(node) is ast.Call]
    assert f"recipes.{recipe}" in used


def world() -> dict[str, object]:
    """Return the names that recipes in examples use."""
    anything = pt.Transformer.identity()
    return {
        "Round": Round,
        "bm25": anything,
        "mining": pt_dance.mining,
        "queries": SimpleNamespace(bm25=lambda num_results: anything),
        "recipes": recipes,
        "teacher": anything,
    }


@pytest.mark.parametrize("recipe", METHODS)
def test_a_recipe_is_the_rounds_that_its_page_spells_out(recipe):
    (spelled,) = [block for block in blocks(METHODS[recipe]) if block.caption.endswith(" is")]
    assert spelled.caption.startswith(f"recipes.{recipe}(")
    names = world()
    *before, last = spelled.tree.body
    exec(compile(ast.Module(before, []), "page", "exec"), names)
    rounds = eval(compile(ast.Expression(last.value), "page", "eval"), names)
    assert eval(spelled.caption.removesuffix(" is"), names) == rounds


@pytest.mark.parametrize("page", PAGES)
def test_recipes_and_rounds_of_examples_can_be_made(page):
    for block in blocks(page):
        names = world()
        for statement in ast.walk(block.tree):
            if not isinstance(statement, ast.stmt):
                continue
            imports = isinstance(statement, ast.ImportFrom) and statement.module in ("dataclasses", "pt_dance")
            target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", [])), None)
            makes = isinstance(target, ast.Name) and target.id in ("options", "recipe")
            called = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and statement.value.func
            if makes and isinstance(statement.value, ast.BinOp | ast.Call | ast.List | ast.ListComp):
                names |= {"normalize": True, "dual": True}
            elif not imports and not (isinstance(called, ast.Name) and called.id == "Round"):
                continue
            exec(compile(ast.Module([statement], []), f"{page}.rst", "exec"), names)
        if "recipe" in names:
            assert recipes.check_recipe(names["recipe"])
