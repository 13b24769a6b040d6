"""Reading a recipe: YAML file or shipped name, dotted overrides, and every check that needs no model and no data.

Relative paths in a recipe are relative to the current directory, wherever the YAML file lies. `base: NAME_OR_PATH` at
the top of a file starts from another recipe (a path is relative to the file that names it). Checks that need files
(heads divisible by TP, prompts, tokenizers) live with their stages.

    recipe = load_recipe("tropd_paper", ["student.hf_path=models/student", "training.steps=10"])
    validation.validate(recipe)  # contradictions and missing keys, before anything is loaded
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.methods import is_guided, method_table


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field | None]]:
    """Yield the full name of every key with its field, and of every section (`data`, `data.columns`) with None."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield name, None
            yield from _leaves(value, f"{name}.")
        else:
            yield name, field


_FIELDS: dict[str, dataclasses.Field] = {name: field for name, field in _leaves(Recipe()) if field is not None}
_SECTIONS = [name for name, field in _leaves(Recipe()) if field is None]
# Keys of earlier versions -> their default: recipes of runs name them. Any other value had been refused there.
_RETIRED = {"student.offload": False, "student.ranks": "shared", "student.replicas": 1}
_LARGEST = 3.4e38  # beyond it a number is infinite in float32, in which all of them are used
_EXAMPLES = Path("examples/recipes")  # a checkout's own, relative to the current directory


def load_recipe(name_or_path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides, in order.

    `name_or_path` is a YAML file, the name of a shipped recipe, or None for the defaults. Raises UserError that names
    the key and where it was set for an unknown key, a wrong type, a value out of its range, and an unreadable file.
    """
    from omegaconf import OmegaConf

    settings = [] if name_or_path is None else _read_file(find_recipe(name_or_path), ())
    settings += [_parse_override(text) for text in overrides]
    tree = OmegaConf.structured(Recipe)
    for key, value, source in settings:
        _set(tree, key, value, source)
    recipe = _to_recipe(tree)
    _check_values(recipe, {key: source for key, _, source in settings})
    scheduled = any(key == "guidance.schedule" for key, _, _ in settings)
    if not is_guided(recipe.objective.name) and not scheduled:
        recipe.guidance.schedule = "none"  # the default schedule belongs to the guided objectives
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the whole resolved recipe as YAML; `load_recipe(path)` reads it back equal."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(to_yaml(recipe), encoding="utf-8")


def to_yaml(recipe: Recipe) -> str:
    """Return the whole resolved recipe as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def help_of(key: str) -> str:
    """Return a key's documentation."""
    return _FIELDS[key].metadata["help"]


def recipe_sections() -> list[str]:
    """Return the names of all sections, those within others in full: `data`, `data.columns`."""
    return list(_SECTIONS)


def describe(about: str | None = None) -> str:
    """Return a paragraph per key: name, default, type or choices, documentation.

    Args:
        about: a section (`training`, `data.columns`), a key or a word of names and texts; None: every key.

    Raises:
        UserError: no key is about it.
    """
    found = {key: field for key, field in _FIELDS.items() if _is_about(key, field, about)}
    if not found:
        names = [*_SECTIONS, *_FIELDS, *(key.split(".")[-1] for key in _FIELDS)]
        assert about is not None  # all keys were found otherwise
        near = _nearest(about, names)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"no key is about {about!r}: {hint}Give a section ({', '.join(_SECTIONS)}), a key, or a word of its help."
        )
    lines, section = [], ""
    for key, field in found.items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"{section}:"]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines += [f"  {key} = {default}  ({_kind(field)})", f"      {field.metadata['help']}"]
        if key == "objective.name" and about:
            lines += ["", *(f"    {line}" for line in method_table().splitlines()), ""]
    return "\n".join(lines[1:])


def _is_about(key: str, field: dataclasses.Field, about: str | None) -> bool:
    if about is None or key == about:
        return True
    if about in _SECTIONS:
        return key.startswith(f"{about}.")
    if about in _FIELDS:
        return False
    word = about.lower()
    return word in key or word in field.metadata["help"].lower() or word in (field.metadata["choices"] or ())


def _kind(field: dataclasses.Field) -> str:
    """Return what a key takes: its choices, or its types, after the words that a numeric key knows."""
    if field.metadata["choices"]:
        return " | ".join(field.metadata["choices"])
    takes = "mapping" if _is_mapping(field) else field.metadata["takes"]
    types = (takes or field.type.replace("None", "null")).split(" | ")
    words = field.metadata["words"]
    return " | ".join([*words, *(name for name in types if not words or name != "str")])


def shipped_recipes() -> list[str]:
    """Names that `load_recipe` finds without a path."""
    folders = [resources.files("megatron_tropd.recipes"), _EXAMPLES]
    files = [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the YAML file of a path or of a shipped name; UserError with the nearest names if there is none."""
    name = str(name_or_path)
    if Path(name).is_file():
        return Path(name)
    if "/" not in name:
        for folder in (resources.files("megatron_tropd.recipes"), _EXAMPLES):
            file = folder / f"{name.removesuffix('.yaml')}.yaml"
            if file.is_file():
                return Path(str(file))
    known = shipped_recipes()
    nearest = _nearest(Path(name).stem, known)
    hint = f" Did you mean {nearest}?" if nearest else ""
    raise UserError(
        f"recipe {name!r}: there is neither a file nor a shipped recipe of that name.{hint} Give the path of a YAML "
        f"file or one of {', '.join(known)}."
    )


def _read_file(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, Any, str]]:
    """Return the (key, value, source) settings of a YAML file, those of its `base` first."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if path.resolve() in chain:
        raise UserError(
            f"{path}: `base` leads back to this file; a recipe cannot start from itself. Remove one `base`."
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); fix the file.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected sections such as `training: {{steps: 10}}`."
        )
    settings = []
    if (base := content.pop("base", None)) is not None:
        beside = path.parent / str(base)
        settings = _read_file(beside if beside.is_file() else find_recipe(base), (*chain, path.resolve()))
    return settings + _flatten(content, str(path))


def _flatten(content: dict, source: str, prefix: str = "") -> list[tuple[str, Any, str]]:
    settings = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _FIELDS:
            settings += _flatten(value, source, f"{name}.")
        elif value is not None or name not in _SECTIONS:  # None: a section whose keys are all commented out
            settings.append((name, value, source))
    return settings


def _parse_override(text: str) -> tuple[str, Any, str]:
    """Split `section.key=value`; a value for a text key is used verbatim, others are read as YAML."""
    import yaml
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    source = f"override {text!r}"
    if not equals or not key:
        raise UserError(f"{source} is not of the form section.key=value, such as training.steps=10.")
    field = _FIELDS.get(key)
    if field is None or value in ("null", "") or not _is_text(field, value):
        try:
            return key, OmegaConf.from_dotlist([f"value={value}"])["value"], source
        except yaml.YAMLError as error:
            raise UserError(f"{source}: the value is not valid YAML ({' '.join(str(error).split())}).") from error
    return key, value, source


def _is_text(field: dataclasses.Field, value: str) -> bool:
    """Whether a value on the command line is used verbatim; values of numeric keys with words, and lists, are not."""
    if field.metadata["takes"]:
        return not value.lstrip().startswith("[")
    return "str" in field.type and not field.type.startswith(("list", "dict")) and not field.metadata["words"]


def _set(tree: Any, key: str, value: Any, source: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if key in _RETIRED and value == _RETIRED[key]:
        return
    name = key if key in _FIELDS else _mapping_of(key)
    if name is None:
        _refuse_unknown(key, source)
    field = _FIELDS[name]
    if key.endswith(".stop") and (isinstance(value, list) or OmegaConf.is_list(value)):
        _check_stop_strings(key, list(value), source)
    if type(value) is int and "float" in field.type:
        value = float(value)  # OmegaConf does so but for keys that take a word as well
    if OmegaConf.is_config(value):  # a list on the command line
        value = OmegaConf.to_container(value)
    is_text = all(isinstance(item, str) and item for item in (value if isinstance(value, list) else [value]))
    if field.metadata["takes"] and value is not None and (not is_text or value == []):
        raise UserError(f"{key}={value!r} ({source}): expected {_kind(field)} ({field.metadata['help']}).")
    try:
        OmegaConf.update(tree, key, value, merge=False)  # a mapping is replaced, one of its entries is set
    except OmegaConfBaseException as error:
        raise UserError(
            f"{key}={value!r} ({source}): expected {_kind(field)} ({field.metadata['help']}); "
            f"{str(error).splitlines()[0].rstrip('.')}."
        ) from error


def _check_stop_strings(key: str, value: list, source: str) -> None:
    """Refuse stop strings that would end every response at once, or that are no texts."""
    for place, text in enumerate(value):
        problem = None
        if not isinstance(text, str):
            problem = f"is of type {type(text).__name__}, expected text; write it in quotes"
        elif not text:
            problem = "is empty and would end every response after its first token; remove it"
        elif not text.strip(" \t"):
            problem = "is blank and would end every response after its first word; remove it"
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            problem = "holds half of a surrogate pair, which no text has; write the whole character"
        elif text in value[:place]:
            problem = "is listed twice; keep one"
        if problem:
            raise UserError(f"{key} ({source}): stop string {place + 1}, {text!r}, {problem}.")


def _mapping_of(key: str) -> str | None:
    """Return the key of a mapping of which `key` names an entry, as in tokenizer.chat_template_kwargs.name."""
    return next((name for name, field in _FIELDS.items() if _is_mapping(field) and key.startswith(f"{name}.")), None)


def _is_mapping(field: dataclasses.Field) -> bool:
    return field.type.startswith("dict")


def _refuse_unknown(key: str, source: str) -> NoReturn:
    if key in _SECTIONS:
        raise UserError(
            f"{key} ({source}) is a section, not a key: it takes no value. Set its keys, as in {key}.KEY=VALUE."
        )
    if key in _RETIRED:
        raise UserError(
            f"{key} ({source}): only the teacher, whose weights are frozen, has this key; the student's come and go "
            f"with training.offload_optimizer, and its ranks are all that are not the teacher's. Remove it, or set "
            f"{key.replace('student', 'teacher')}."
        )
    leaves = {name.split(".")[-1]: name for name in reversed(_FIELDS)}
    leaf = key.split(".")[-1]  # perhaps the right key in the wrong section, or without one
    nearest = leaves.get(leaf) or _nearest(key, list(_FIELDS)) or leaves.get(_nearest(leaf, list(leaves)) or "")
    hint = f"did you mean {nearest}?" if nearest else "no known key is near it."
    raise UserError(f"unknown key {key} ({source}): {hint} `megatron-tropd train --help-keys` lists all keys.")


def _nearest(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _to_recipe(tree: Any) -> Recipe:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        recipe = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation ${section.key} that leads nowhere
        raise UserError(
            f"{error.full_key}: {str(error).splitlines()[0]}; fix the ${{section.key}} it refers to."
        ) from error
    assert isinstance(recipe, Recipe)  # its structure
    return recipe


def _check_values(recipe: Recipe, sources: dict[str, str]) -> None:
    """Check every value against its field's choices and range."""
    for key, field in _FIELDS.items():
        value = reduce(getattr, key.split("."), recipe)
        rule = field.metadata
        if value is None or value in rule["words"]:
            continue
        expected = None
        known = rule["choices"] or rule["words"]
        if isinstance(value, float) and not abs(value) <= _LARGEST:
            expected = "a finite number"
        elif known and isinstance(value, str) and value not in known:
            near = _nearest(value, list(known))
            expected = f"one of {_kind(field).replace(' | ', ', ')}" + (f" (did you mean {near}?)" if near else "")
        elif rule["low"] is not None and not value >= rule["low"]:
            expected = f"at least {rule['low']}"
        elif rule["above"] is not None and not value > rule["above"]:
            expected = f"more than {rule['above']}"
        elif rule["high"] is not None and not value <= rule["high"]:
            expected = f"at most {rule['high']}"
        if expected:
            source = sources.get(key, "default")
            raise UserError(f"{key}={value} ({source}): expected {expected}. The key: {rule['help']}.")
