"""Recipes: one YAML file, read strictly, with every mistake told in one sentence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from curation.artifact import FORMS
from curation.store import Location
from embedding.config import BUNDLED, MODEL_FREE
from pipelines.errors import UserError
from pipelines.executor import Resources
from pipelines.stage import Stage, Step

Config = TypeVar("Config")
SHIPPED = Path(__file__).parent / "recipes"
PRESETS = Path(__file__).parent / "presets"
PRESET = "preset"  # the key that names some
TOP_KEYS = ("seed", "root", "resources", "steps")
STEP = "(a step)"  # stands in a config where the value is an input


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked."""

    seed: int
    root: str | None
    resources: Resources
    steps: tuple[Step, ...]


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, in which a key may not stand twice."""


def _mapping_without_doubles(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.value != "<<"]
    for i, key in enumerate(keys):
        if isinstance(key, list | dict):
            raise UserError(f"a key must be a word: got {key!r}{node.start_mark}", "write name: value")
        if key in keys[:i]:
            raise UserError(f"a key must stand once: got {key!r} twice{node.start_mark}", "rename one of the two")
    loader.flatten_mapping(node)  # "<<: *name" stands for the keys of another mapping; its own keys win
    return dict(loader.construct_pairs(node, deep=True))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_doubles)


def read_recipe(location: Location, overrides: Sequence[str], stages: Mapping[str, Stage]) -> Recipe:
    """Read a recipe, a file or the name of one that comes with the package, and apply ``step.key=value`` overrides.

    A file of the same name wins. Raises UserError.
    """
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    if location.uri in shipped and not location.exists():
        location = Location(str(shipped[location.uri]))
    try:
        text = location.read().decode()
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(
            f"no recipe {location}", f"give the path of a YAML file, or one of {', '.join(sorted(shipped))}"
        ) from e
    tree = parse_yaml(text, location.name)
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, stages)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """YAML text as a mapping. Raises UserError."""
    try:
        tree = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as e:
        raise UserError(f"{name} must be YAML: {' '.join(str(e).split())}", "check indentation and colons") from e
    if not isinstance(tree, dict):
        raise UserError(f"{name} must be a mapping with {', '.join(TOP_KEYS)}: got {type(tree).__name__}", "add steps:")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` or ``a.b.c=value`` in a parsed recipe; the value is YAML. Only steps that exist are changed."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set must be step.key=value: got {override!r}", "for example --set balanced.target=400")
    value = parse_value(override, text)
    if len(keys) == 1:
        tree[keys[0]] = value
        return
    name, *inner, key = keys
    owners = tree.get("steps") or {}
    if name == "resources":
        owners = tree
        tree["resources"] = tree.get("resources") or {}
    if not isinstance(owners, dict) or name not in owners:
        raise UserError(f"--set names step {name!r}, which is not in the recipe", did_you_mean(name, owners))
    if not isinstance(owners[name], dict):
        raise UserError(f"{name} must be a mapping: got {owners[name]!r}", f"write {name}: {{stage: ...}}")
    owner = owners[name] = dict(owners[name])  # other steps may share what is below it
    for step in inner:
        owner[step] = dict(owner.get(step) or {}) if isinstance(owner.get(step) or {}, dict) else {}
        owner = owner[step]
    owner[key] = value


def parse_value(override: str, text: str) -> Any:
    """The YAML value of an override. Raises UserError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(
            f"--set needs a YAML value: got {override!r}", "put text with brackets or colons in quotes"
        ) from e


def parse_recipe(tree: Mapping[str, Any], stages: Mapping[str, Stage]) -> Recipe:
    """Check a parsed recipe from top to bottom: a step may read only the steps above it. Raises UserError."""
    for key in tree:
        if key not in TOP_KEYS:
            raise UserError(f"a recipe has no key {key!r}", did_you_mean(str(key), TOP_KEYS))
    seed, steps, root = tree.get("seed", 0), tree.get("steps"), tree.get("root")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed must be an integer of at least 0: got {seed!r}", "write for example seed: 0")
    if root is not None and not isinstance(root, str):
        raise UserError(f"root must be a path or an S3 URI: got {root!r}", "write for example root: runs/first")
    if not isinstance(steps, dict) or not steps:
        raise UserError("a recipe must have steps: got none", "write steps: and below it name: {stage: ...}")
    resources = structure(Resources, tree.get("resources") or {}, "resources")
    done: list[Step] = []
    for name, entry in steps.items():
        done.append(parse_step(str(name), entry, done, stages, seed))
    return Recipe(seed, root, resources, tuple(done))


def parse_step(name: str, entry: Any, earlier: Sequence[Step], stages: Mapping[str, Stage], seed: int) -> Step:
    """One step: its stage, its inputs by name, the rest into its config."""
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"a step's name must be letters, digits, - and _: got {name!r}", "it names a folder")
    if not isinstance(entry, dict) or "stage" not in entry:
        raise UserError(f"{name} must be a mapping with a stage: got {entry!r}", f"stages are {', '.join(stages)}")
    values = dict(entry)
    kind = values.pop("stage")
    if not isinstance(kind, str) or kind not in stages:
        raise UserError(f"{name}.stage must be a known stage: got {kind!r}", did_you_mean(str(kind), stages))
    stage = stages[kind]
    if stage.has_presets:
        values = with_presets(name, values)
    settle_lists(values, stage)
    inputs = {
        f"{key}.{source}": source
        for key, kinds in stage.lists.items()
        if key in values or is_required(stage.config, key)
        for source in find_list(f"{name}.{key}", values.get(key), kinds, earlier)
    }
    for key, kinds in {**stage.reads, **stage.optional, **stage.step_or_value}.items():
        value = values.get(key)
        if key in stage.step_or_value and value not in [step.name for step in earlier]:
            check_backbone(f"{name}.{key}", value, [step.name for step in earlier if step.kind in kinds])
            continue
        values.pop(key, None)
        if value is not None:
            inputs[key] = find_input(f"{name}.{key}", value, kinds, earlier)
        elif key in stage.reads:
            raise UserError(f"{name} must name its {key}: got none", f"add {key}: and a step of stage {or_list(kinds)}")
        if key in stage.step_or_value:
            values[key] = STEP
    if stage.reads_all:
        inputs |= {step.name: step.name for step in earlier}
    if "seed" in {field.name for field in fields(stage.config)}:
        values.setdefault("seed", seed)
    config: Any = structure(stage.config, values, name)
    acting = acts_as(f"{name}.{stage.acts_as}", stage, inputs, earlier)
    if stage.check is not None:
        steps = {step.name: step for step in earlier}
        stage.check(name, config, {key: steps[source] for key, source in inputs.items()})
    return Step(name, kind, config, inputs, acting or FORMS.get(kind, kind))


def with_presets(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a step over those of the presets that it names, the later ones over the earlier.

    A preset is a YAML file of settings: one that comes with the package, by its name, or a path that ends in .yaml.
    Settings within settings are laid over one another key by key. Raises UserError.
    """
    own = dict(values)
    given = own.pop(PRESET, None)
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError(f"{name}.{PRESET} must be a name or a list of names: got {given!r}", f"one of {preset_names()}")
    settled: dict[str, Any] = {}
    for each in names:
        settled = laid_over(settled, read_preset(f"{name}.{PRESET}", each))
    return laid_over(settled, own)


def preset_names() -> str:
    """The presets of the package."""
    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def read_preset(key: str, name: str) -> dict[str, Any]:
    """The settings of a preset. Raises UserError."""
    shipped = {path.stem: path for path in PRESETS.glob("*.yaml")}
    location = Location(name) if name.endswith(".yaml") else None
    if location is None and name in shipped:
        location = Location(str(shipped[name]))
    if location is None:
        raise UserError(f"{key} must be a preset: got {name!r}", did_you_mean(name, sorted(shipped)))
    try:
        return parse_yaml(location.read().decode(), location.name)
    except FileNotFoundError as e:
        raise UserError(f"{key} must be a file that exists: got {name}", f"or one of {preset_names()}") from e


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them; mappings within are laid over one another, anything else takes its place."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = laid_over(out[key], value) if both else value
    return out


def settle_lists(values: dict[str, Any], stage: Stage) -> None:
    """Take out lists that may be left out and are, and make a list of one name where a key takes one or several."""
    for key in stage.lists:
        if values.get(key) in (None, []) and not is_required(stage.config, key):
            values.pop(key, None)
        elif isinstance(values.get(key), str) and isinstance(get_type_hints(stage.config)[key], UnionType):
            values[key] = [values[key]]


def is_required(config: type, name: str) -> bool:
    """Whether a field of a config has no default."""
    field = next(field for field in fields(config) if field.name == name)
    return field.default is MISSING and field.default_factory is MISSING


def acts_as(key: str, stage: Stage, inputs: Mapping[str, str], earlier: Sequence[Step]) -> str | None:
    """The one kind of the steps in the list that a stage's output stands for. Raises UserError for several."""
    kinds = {step.name: step.kind for step in earlier}
    found = {kinds[source]: source for name, source in inputs.items() if name.startswith(f"{stage.acts_as}.")}
    if len(found) > 1:
        some = " and ".join(f"{source}, a {kind} step" for kind, source in found.items())
        raise UserError(f"{key} must be steps of one kind: got {some}", "make one union of pools, one of embeddings")
    return next(iter(found), None)


def check_backbone(key: str, value: Any, trained: Sequence[str]) -> None:
    """What names no earlier step must be a model: a typing mistake is not looked up on the internet."""
    known = [*MODEL_FREE, *BUNDLED, *trained]
    if isinstance(value, str) and value and value not in known and "/" not in value and not Path(value).exists():
        raise UserError(
            f"{key} must be pixels, phash, openlvd-tiny, an earlier train step, a folder, a file or a hub's "
            f"owner/name: got {value!r}",
            did_you_mean(value, known),
        )


def find_list(key: str, value: Any, kinds: Sequence[str], earlier: Sequence[Step]) -> list[str]:
    """The names of several earlier steps of fitting kinds, each once."""
    if not isinstance(value, list) or not value:
        fitting = ", ".join(step.name for step in earlier if step.kind in kinds)
        raise UserError(f"{key} must be a list of earlier steps: got {value!r}", f"for example {key}: [{fitting}]")
    names = [find_input(key, name, kinds, earlier) for name in value]
    doubles = [name for i, name in enumerate(names) if name in names[:i]]
    if doubles:
        raise UserError(f"{key} must name a step once: got {doubles[0]!r} twice", "leave one of them out")
    return names


def find_input(key: str, value: Any, kinds: Sequence[str], earlier: Sequence[Step]) -> str:
    """The name of an earlier step of a fitting kind."""
    names = {step.name: step.kind for step in earlier}
    if not isinstance(value, str) or value not in names:
        fitting = [name for name, kind in names.items() if kind in kinds]
        raise UserError(f"{key} must name an earlier step: got {value!r}", did_you_mean(str(value), fitting))
    if names[value] not in kinds:
        raise UserError(
            f"{key} must name a step of stage {or_list(kinds)}: got {value!r}, a {names[value]} step",
            did_you_mean("", [name for name, kind in names.items() if kind in kinds]),
        )
    return value


def structure(kind: type[Config], values: Any, owner: str) -> Config:
    """A config dataclass from plain values, strictly: no unknown key, no conversion. Raises UserError."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"{owner} must be a mapping: got {values!r}", f"its keys are {', '.join(names)}")
    for key in values:
        if key not in names:
            raise UserError(f"{owner} has no key {key!r}", did_you_mean(str(key), names))
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as e:
        errors = e.errors()
        of_key = (one for one in errors if one["loc"][:1] == errors[0]["loc"][:1])
        error = max(of_key, key=lambda one: len(one["loc"]))  # of one value or a list of some: what got farthest
        if error["type"] == "value_error":  # the config's own sentence
            raise UserError(str(error["ctx"]["error"]), f"change it in step {owner}") from e
        if error["type"] == "missing":
            raise UserError(f"{owner} must have {error['loc'][0]}: got none", f"add {error['loc'][0]}: to it") from e
        # of a value that may be one or several: which of them was tried
        kinds = ("str", "tuple[str, ...]", "int", "tuple[int, ...]")
        path = ".".join([owner, *(str(piece) for piece in error["loc"] if piece not in kinds)])
        message = error["msg"].removeprefix("Input should be ")
        raise UserError(
            f"{path} must be {message}: got {error['input']!r}", "see the key's comment for unit and range"
        ) from e


def did_you_mean(word: str, known: Any) -> str:
    """A hint with the nearest known words, or all of them."""
    names = [str(name) for name in known]
    close = get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(names)}" if names else "there is none yet: put such a step above this one"


def or_list(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
