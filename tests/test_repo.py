"""The repository keeps its own rules: tree, links, quoted commands, import directions, sizes, and what is installed."""

import ast
import importlib.metadata
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from support.import_graph import folder_graph, folder_of, imports_of, module_graph, package_modules

import megatron_tropd
from megatron_tropd.cli import build_parser
from megatron_tropd.config import Recipe
from megatron_tropd.recipe import shipped_recipes

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("megatron_tropd", "examples", "kernels", "tools", "tests", "setup.py", "README.md"),
    *("pyproject.toml", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci", ".pre-commit-config.yaml"),
}
UNTRACKED = {"runs", "build", "dist", "megatron_tropd.egg-info"}


def _files(*suffixes):
    """The repository's files: what git tracks or would track, else (an unpacked archive) all that is not generated."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
        listed = [f for f in listed if f.split("/")[0] not in UNTRACKED and "__pycache__" not in f]
        listed = [f for f in listed if not f.startswith(".") or f.startswith(".ci/")]
    files = [Path(f) for f in listed if (ROOT / f).is_file()]
    return [f for f in files if not suffixes or f.suffix in suffixes]


SOURCES = [
    f for f in _files(".py") if f.parts[0] in ("megatron_tropd", "kernels", "tools", "examples") or len(f.parts) == 1
]
TESTS = [f for f in _files(".py") if f.parts[0] == "tests"]
DOCUMENTS = _files(".md")


def _read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def test_top_level_is_as_agreed():
    names = {file.parts[0] for file in _files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
    assert {n for n in TOP_LEVEL if not (ROOT / n).exists()} == set()


def test_nothing_global_is_installed_but_the_package():
    distribution = importlib.metadata.distribution("megatron-tropd")
    assert (distribution.read_text("top_level.txt") or "").split() == ["megatron_tropd"]


@pytest.mark.parametrize(
    ("python", "last"),
    [("3.10", "2.11.0"), ("3.11", "2.11.0"), ("3.12", "2.18.0")],  # megatron-core 0.17 and later need Python 3.12
)
@pytest.mark.parametrize("extra", ["gpu", "gpu-cu12", "gpu-cu13"])
def test_extras_take_the_transformer_engine_that_their_megatron_declares(extra, python, last):
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads(_read("pyproject.toml"))["project"]["optional-dependencies"][extra]
    requirements = [Requirement(text) for text in listed]
    environment = {"python_version": python}
    (engine,) = (r for r in requirements if r.name == "transformer-engine" and r.marker.evaluate(environment))
    assert engine.specifier.contains(last)
    assert engine.specifier.contains("2.12.0") == (python == "3.12")
    assert not engine.specifier.contains("2.8.0")
    assert engine.extras == {"pytorch", *({extra.replace("gpu", "core")} if extra != "gpu" else ())}


def test_setup_lists_every_package(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    listed = set(given["packages"])
    homes = {"megatron_tropd": "megatron_tropd", "kernels": "megatron_tropd.kernels"}
    homes["examples"] = "megatron_tropd"  # only examples/recipes is installed
    folders = [f.parent.parts for f in _files(".py") if f.name == "__init__.py" and f.parts[0] in homes]
    assert listed == {".".join((homes[parts[0]], *parts[1:])) for parts in folders}
    assert all(name.split(".")[0] == "megatron_tropd" for name in listed)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", _read(document)):
        path = target.split("#")[0]
        if path and "://" not in target:
            assert (ROOT / document.parent / path).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=str)
def test_tests_that_documents_name_exist(document):
    text = _read(document)
    for path in re.findall(r"\btests/[\w./]*\w", text):
        assert (ROOT / path).exists(), f"{document}: {path}"
    names = {f.name for f in TESTS}
    assert set(re.findall(r"\btest_\w+\.py\b", text)) <= names, document


def _quoted_commands(text):
    """Command lines of the fenced shell blocks, continuation lines joined, prompts and comments left out."""
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line and not line.startswith("#"):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_quoted_commands_are_true(document):
    for words in _quoted_commands(_read(document)):
        for word in words:
            if re.match(r"(examples|tools|tests|kernels|megatron_tropd)/[\w./-]+$", word):
                assert (ROOT / word).exists(), f"{document}: {word} in {' '.join(words)}"
            _check_override(document, word)
        start = next((i for i, w in enumerate(words) if w in ("megatron-tropd", "megatron_tropd")), None)
        if start is not None and "pip" not in words and "--help" not in words:
            options = [w for w in words[start + 1 :] if "=" not in w]
            arguments, rest = build_parser().parse_known_args(options)
            assert not [w for w in rest if w.startswith("-")], f"{document}: {' '.join(words)}"


def _check_override(document, word):
    match = re.match(r"(\w+)\.(\w+)=", word)
    if match and match[1] in vars(Recipe()):
        assert hasattr(getattr(Recipe(), match[1]), match[2]), f"{document}: {word}"


def test_every_recipe_key_is_documented_and_read():
    """A key without help is undocumented; a key that no module reads promises what does not happen."""
    readers = [f for f in SOURCES if f.parts[0] == "megatron_tropd" and f.name not in ("config.py", "recipe.py")]
    code = "\n".join(_read(f) for f in readers)
    for section, config in vars(Recipe()).items():
        for name, field in config.__dataclass_fields__.items():
            assert field.metadata["help"], f"{section}.{name}"
            assert re.search(rf"\.{name}\b", code) or f'"{name}"' in code, f"{section}.{name} is read nowhere"


def test_recipes_shipped_are_those_in_examples():
    assert set(shipped_recipes()) == {f.stem for f in _files(".yaml") if f.parent == Path("examples/recipes")}
    assert {"tiny", "smollm2", "tropd_paper"} <= set(shipped_recipes())


def test_kernels_import_nothing_of_ours():
    for module, others in module_graph().items():
        if module.startswith("megatron_tropd.kernels"):
            assert all(other.startswith("megatron_tropd.kernels") for other in others), module


# Folder -> the folders that it may import, in the order of their floors. `kernels` and the files of the root may be
# imported by all; nothing is nested deeper, and no folder imports one below it in this table.
FOLDERS = {
    "grading": "",
    "huggingface": "",
    "system": "",
    "parallel": "system",
    "tokenizers": "",
    "data": "grading system",
    "objective": "tokenizers",
    "records": "system",
    "machine": "records system",
    "numbers": "objective parallel",
    "mcore": "machine parallel system",
    "models": "huggingface machine mcore numbers parallel system tokenizers",
    "teacher": "mcore parallel tokenizers",
    "rollout": "mcore models parallel system tokenizers",
    "planning": "huggingface mcore models parallel rollout system",
    "prompts": "data rollout system tokenizers",
    "evaluation": "grading machine models numbers parallel prompts rollout system tokenizers",
    "reporting": "models objective planning system tokenizers",
    "training": "evaluation grading machine mcore models numbers objective parallel planning prompts records reporting "
    "rollout system teacher tokenizers",
    "doctor": "machine mcore models objective parallel planning rollout system teacher tokenizers training",
    "commands": "doctor evaluation grading huggingface models objective parallel planning prompts reporting rollout "
    "system tokenizers training",
}
ENTRANCES = ("megatron_tropd.cli", "megatron_tropd.__main__")


def test_folders_are_one_level_deep_and_of_a_size_that_one_can_read():
    files = [f for f in SOURCES if f.parts[0] == "megatron_tropd" and len(f.parts) > 2]
    assert {f.parts[1] for f in files} == set(FOLDERS)
    assert all(len(f.parts) == 3 for f in files)
    for folder in FOLDERS:
        count = sum(f.parts[1] == folder and f.name != "__init__.py" for f in files)
        assert 2 <= count <= 12, f"{folder} has {count} files"
    assert sum(f.parts[0] == "megatron_tropd" and len(f.parts) == 2 for f in SOURCES) <= 14


# The folders of tests/ that mirror none of the package: shared pieces, and tests of several folders or of none.
OTHER_TESTS = {"benchmarks", "e2e", "gpu", "kernels", "parity", "support"}


def test_tests_mirror_the_folders_of_the_package():
    assert all(len(f.parts) <= 3 for f in TESTS)
    assert {f.parts[1] for f in TESTS if len(f.parts) > 2} == FOLDERS.keys() | OTHER_TESTS
    tested = {f.parts[1] for f in TESTS if f.name.startswith("test_")}
    assert FOLDERS.keys() <= tested, f"no tests: {FOLDERS.keys() - tested}"
    # A file would hide another: pytest imports by name alone. So would a package: tests/ is on the path, and Python has
    # a `numbers`, Hugging Face a `tokenizers`.
    packages = {f.parts[1] for f in TESTS if f.name == "__init__.py"}
    assert packages == {"gpu", "support"}
    names = [f.name for f in TESTS if f.parts[1] not in packages and f.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_what_tests_share_is_no_test():
    """A test from which another file imports cannot change or move alone: shared pieces are in tests/support."""
    for file in TESTS:
        names = {part for module, name in imports_of(_read(file)) for part in (*module.split("."), name or "")}
        found = [name for name in names if name == "conftest" or name.startswith("test_")]
        assert not found, f"{file} imports {found}"


def test_imports_between_folders_go_one_way():
    floors = list(FOLDERS)
    for module, others in module_graph().items():
        folders = {folder_of(other) for other in others} - {""}
        if not folder_of(module) and module not in ENTRANCES:
            assert not folders, f"{module} is imported by all, and imports {folders}"
    for folder, others in folder_graph().items():
        assert others == set(FOLDERS[folder].split()), folder
        assert all(floors.index(other) < floors.index(folder) for other in others), folder


def test_the_graph_is_printed_by_a_command(capsys):
    runpy.run_path(str(ROOT / "tests/support/import_graph.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {folder: " ".join(others).replace("-", "") for _, folder, *others in lines}
    assert found == {folder: " ".join(sorted(others.split())) for folder, others in FOLDERS.items()}


def test_the_root_exports_what_it_names():
    for name in megatron_tropd.__all__:
        assert getattr(megatron_tropd, name).__name__ == name
    assert set(megatron_tropd.__all__) <= set(dir(megatron_tropd))


def test_imports_have_no_cycle():
    graph = module_graph(typed=True)
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module] - {module}:
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_only_parallel_reads_parallel_state():
    for module, file in package_modules().items():
        # The benchmark's baseline, Megatron's own cross-entropy, asks for Megatron's groups.
        if module not in ("megatron_tropd.parallel.groups", "megatron_tropd.kernels.benchmarks.cases"):
            assert not [
                m
                for m, name in imports_of(file.read_text(encoding="utf-8"))
                if "parallel_state" in (name, m.split(".")[-1])
            ], module


def test_no_private_name_crosses_modules():
    for file in SOURCES:
        private = [
            f"{m}.{n}"
            for m, n in imports_of(_read(file))
            if m.startswith("megatron_tropd") and n and re.match("_[a-z]", n)
        ]
        assert not private, f"{file}: {private}"


def test_files_and_functions_fit_on_a_screen():
    for file in SOURCES:
        text = _read(file)
        if file.parts[0] != "kernels":
            assert len(text.splitlines()) <= 350, f"{file} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "triton" not in file.name:
                assert node.end_lineno - node.lineno < 60, (
                    f"{file}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
                )


def test_nothing_speaks_of_one_machine():
    paths = re.compile("/" + r"(?:root|work|home/\w+)/" + "|" + r"py" + r"pi\.")
    for file in _files(".py", ".md", ".sh", ".yaml", ".toml", ".json", ".txt"):
        found = paths.search(_read(file))
        assert not found, f"{file}: {found[0]}"


# Plain English: pattern -> what to write instead. The field's terms are what readers search for.
_UNITS = (
    "token|rank|replica|step|row|sample|prompt|micro-batch|position|call|chunk|stage|GPU|node|virtual pipeline stage"
)
_AMOUNTS = "one|two|three|four|five|ids?|numbers?|lines?|objects?|bytes|ranks|rows|tokens?|entry|once|GPTModel|KiB"
PLAIN = {
    rf"\b({_AMOUNTS}) an? ({_UNITS})\b(?!'s| of the| may)": "per",
    r"\b(of|on|under) (its|their|his) own\b(?! \w)": "its own NOUN, dedicated or separate",
    r"\b(ranks|GPUs|processes|process|file|store|limit) of (its|their) own\b": "dedicated or separate",
    r"\b[Mm]end(s|ed|ing)?\b": "fix",
    r"\b[Aa]new\b": "again, or start over",
    r"\bpass(es|ed)? over (what|it|them|lines|files|prompts)\b": "skip",
    r"\b(is|are|were|was) passed over\b": "skipped",
    r"\bfor ever\b": "forever",
    r"\bby halves\b": "partly",
    r"\bheld against\b": "compared with",
    r"\b(layers?|eps|model) of experts\b": "MoE",
    r"\bdealt (out|to|over)\b": "distributed",
    r"\b[Uu]nlike (layouts|values|numbers|sizes)\b": "different",
    r"\b(speaks?|spoken) of (the|a|one|token|its)\b": "refers to",
    r"\bin force\b": "current, active or applies",
    r"\bgoes? first\b": "takes precedence",
    r"\bknows no\b": "does not support",
    r"\bso many (tokens|rows|records|terms|samples|problems|entries)\b": "this many",
    r"\bcomes? about\b": "results",
    r"\bat all events\b": "in any case",
    r"\bwant of\b": "lack of",
    r"\bwhoever\b": "the one that",
    r"\bsomebody('s)?\b": "someone",
    r"\bnothing but\b": "only",
    r"\bstands? in (for|on|where)\b": "is used instead",
}


@pytest.mark.parametrize("pattern", PLAIN)
def test_prose_is_plain_english(pattern):
    rule = re.compile(pattern)
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in _files(".py", ".md", ".sh", ".yaml", ".js", ".html")
        if file.name not in ("test_repo.py", "CHANGELOG.md")
        for number, line in enumerate(_read(file).splitlines(), 1)
        if rule.search(line)
    ]
    assert not found, f"write {PLAIN[pattern]}:\n" + "\n".join(found)
