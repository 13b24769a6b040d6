"""Which of the package's modules import which, read from the source; run as a file, it prints the graph of the folders.

python tests/support/import_graph.py               # folder: the folders that it imports, from the lowest floor up
python tests/support/import_graph.py --modules     # and of each module, the modules
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports_of(source: str, typed: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yield (module, imported name or None) of every import; those within `if TYPE_CHECKING` only where `typed`."""
    tree = ast.parse(source)
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only and not typed:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def package_modules() -> dict[str, Path]:
    """Return module -> file of the package; kernels/ is installed as megatron_tropd.kernels."""
    files = sorted(f.relative_to(ROOT) for top in ("megatron_tropd", "kernels") for f in (ROOT / top).rglob("*.py"))
    return {_module(file): ROOT / file for file in files}


def _module(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = ("megatron_tropd", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_graph(typed: bool = False) -> dict[str, set[str]]:
    """Return each module's imports of the package's modules; `typed`: those for type checking, too."""
    modules = package_modules()
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        graph[module] = set()
        for name, part in imports_of(file.read_text(encoding="utf-8"), typed):
            found = next((c for c in (f"{name}.{part}", name) if c in modules and c != "megatron_tropd"), None)
            if found:
                graph[module].add(found)
    return graph


def folder_of(module: str) -> str:
    """Return a module's folder; empty for those of the root, and for `kernels`, which all may import."""
    parts = module.split(".")
    is_folder = len(parts) > 1 and parts[1] != "kernels" and (ROOT / "megatron_tropd" / parts[1]).is_dir()
    return parts[1] if is_folder else ""


def folder_graph() -> dict[str, set[str]]:
    """Return each folder's imports of other folders."""
    graph: dict[str, set[str]] = {}
    for module, others in module_graph().items():
        folder = folder_of(module)
        if folder:
            graph.setdefault(folder, set()).update({folder_of(other) for other in others} - {"", folder})
    return graph


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return each folder's floor: one above the highest that it imports."""
    found: dict[str, int] = {}
    while len(found) < len(graph):
        ready = {f for f, others in graph.items() if f not in found and others <= found.keys()}
        assert ready, f"a circle among {sorted(graph.keys() - found.keys())}"
        found |= {folder: 1 + max((found[other] for other in graph[folder]), default=-1) for folder in ready}
    return found


def main() -> None:
    """Print the graph."""
    graph, modules = folder_graph(), module_graph()
    for folder, floor in sorted(floors(graph).items(), key=lambda item: (item[1], item[0])):
        print(f"{floor}  {folder:<12} {' '.join(sorted(graph[folder])) or '-'}")
        if "--modules" in sys.argv:
            for module in (m for m in modules if folder_of(m) == folder):
                print(f"     {module.removeprefix('megatron_tropd.')}: {' '.join(sorted(modules[module]))}")


if __name__ == "__main__":
    main()
