"""Every stage as a command on explicit inputs: ``openlvd neighbors --embeddings PATH --min-similarity 0.9 --out URI``.

The options are made from the stage and its config: an input is the path of an artifact, a setting is a field of the
config, and what the help says of it is the comment beside that field.
"""

import ast
import dataclasses
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
import typer.core
import yaml

from curation.artifact import Artifact
from curation.store import Location
from embedding.config import MODEL_FREE
from pipelines.engine import RUN_FILE, StepResult, read_root, run_alone
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.launch import open_executor
from pipelines.progress import StepProgress
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import PRESET, is_required, or_list, parse_step, preset_names, structure
from pipelines.stage import Stage, Step
from pipelines.stages.table import STAGES

PATH_HINT = "a path is a folder or s3:// prefix with a manifest.json, or ROOT/STEP of a run"
EPILOG = (
    "PATH is an artifact: a folder or s3:// prefix with a manifest.json, or ROOT/STEP of a run. A finished --out is "
    "left as it is, an interrupted one goes on."
)
PATH = "path"  # the parameter of the one input that needs no flag

Show = Callable[[StepResult, bool], None]  # prints a result, as JSON or for people
Run = Callable[[str, Stage, Mapping[str, Any]], StepResult]  # of a stage's name, the stage, and what is given


class Special(NamedTuple):
    """A stage that is more than itself as a command."""

    run: Run
    path: str  # what the help says of its PATH, beside that it stands for a flag


class FieldDoc(NamedTuple):
    """What the source says of a field of a config."""

    text: str  # the comment beside it; "" without one
    section: str  # the comment above the fields it stands among; "" without one


class Option(NamedTuple):
    """One option of a command."""

    name: str  # of the parameter
    flags: str
    annotation: Any
    metavar: str | None  # None: a flag
    help: str
    panel: str
    is_positional: bool = False  # given by its place, without a flag


class PanelCommand(typer.core.TyperCommand):
    """A command whose help has its options by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, a section a panel, in the order in which they were made."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                if param.param_type_name == "argument":
                    record = (str(param.metavar), record[1])  # click adds the type
                panels.setdefault(getattr(param, "rich_help_panel", None) or "Run", []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


class PanelGroup(typer.core.TyperGroup):
    """Commands by panel."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, a section a panel, in the order in which they were made."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None) or "Commands"
                panels.setdefault(str(panel), []).append((name, command.get_short_help_str(limit=formatter.width)))
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def add_stage_commands(app: typer.Typer, show: Show, special: Mapping[str, Special] | None = None) -> None:
    """Give ``app`` a command for every stage that reads what it is told; ``show`` prints the result.

    special: of stages that another function runs than ``run_command``.
    """
    for name, stage in STAGES.items():
        if not stage.reads_all:
            register = app.command(
                name, cls=PanelCommand, help=what_it_does(stage), epilog=EPILOG, rich_help_panel="A stage on its own"
            )
            register(make_command(name, stage, show, (special or {}).get(name, Special(run_command, ""))))


def what_it_does(stage: Stage) -> str:
    """The first sentence of the module of a stage, without the name of the stage."""
    first = (sys.modules[stage.run.__module__].__doc__ or "").split("\n\n")[0]
    said = " ".join(first.split()).partition(": ")[2].replace("``", "")
    return said if said[1:2] == "-" else said[:1].upper() + said[1:]  # k-NN stays as it is


def make_command(name: str, stage: Stage, show: Show, special: Special) -> Callable[..., None]:
    """The function behind a command; its signature says the options."""

    def command(**given: Any) -> None:
        show(special.run(name, stage, given), given["as_json"])

    options = [*positional_option(stage, special.path), *input_options(stage), *setting_options(stage), *run_options()]
    set_signature(command, [parameter(option) for option in options])
    return command


def parameter(option: Option) -> inspect.Parameter:
    """The parameter of a command's function that is an option, or is given by its place."""
    looks: dict[str, Any] = {"metavar": option.metavar, "help": option.help, "rich_help_panel": option.panel,
                             "show_default": False}  # fmt: skip
    how = typer.Argument(**looks) if option.is_positional else typer.Option(option.flags, **looks)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if option.annotation is bool else None,
        annotation=Annotated[option.annotation, how],
    )


def set_signature(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Have a function of any keywords say which it takes, as typer reads it."""
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {}


def flag(name: str) -> str:
    """``--min-similarity`` for ``min_similarity``."""
    return "--" + name.replace("_", "-")


def needs_no_flag(stage: Stage) -> str | None:
    """The one thing that a stage cannot do without: the artifact, or else the place outside, that it reads."""
    artifacts = [*stage.reads, *(key for key in stage.lists if is_required(stage.config, key))]
    outside = [key for key in stage.locations if is_required(stage.config, key)]
    needed = artifacts or outside
    return needed[0] if len(needed) == 1 and needed[0] not in stage.lists else None


def positional_option(stage: Stage, more: str) -> Iterator[Option]:
    """What is given without a flag, if anything; ``more`` is what the help says of it."""
    key = needs_no_flag(stage)
    if key is not None:
        panel = "Inputs" if key in stage.reads else "Settings"
        help = f"in place of {flag(key)} PATH{more}"
        yield Option(PATH, "", str | None, "PATH", help, panel, is_positional=True)


def with_flag(stage: Stage, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, as if all of it had come with its flag. Raises UserError for what has come in both ways."""
    key = needs_no_flag(stage)
    if key is None or given.get(PATH) is None:
        return dict(given)
    if given[key] is not None:
        raise UserError(
            f"PATH and {flag(key)} are one input: got {given[PATH]} and {given[key]}", "leave one of them out"
        )
    return {**given, key: given[PATH]}


def input_options(stage: Stage) -> Iterator[Option]:
    """An option for every artifact that a stage reads."""
    docs = field_docs(stage.config)
    for key, kinds in stage.reads.items():
        yield Option(key, flag(key), str | None, "PATH", f"{an_artifact(kinds)}  [required]", "Inputs")
    for key, kinds in stage.lists.items():
        needed = "  [required]" if is_required(stage.config, key) else "; may be left out"
        help = f"{an_artifact(kinds)}, the option once for each, in order; {docs[key].text}{needed}"
        yield Option(key, flag(key), list[str] | None, "[NAME=]PATH", help, "Inputs")
    for key, kinds in stage.step_or_value.items():
        required = "  [required]" if is_required(stage.config, key) else ""
        help = f"{an_artifact(kinds)}; or {docs[key].text}{required}"
        yield Option(key, flag(key), str | None, "PATH|VALUE", help, "Inputs")
    for key, kinds in stage.optional.items():
        yield Option(key, flag(key), str | None, "PATH", f"{an_artifact(kinds)}; may be left out", "Inputs")


def setting_options(stage: Stage) -> Iterator[Option]:
    """An option for every field of the config that is no input, and one for presets of them."""
    if stage.has_presets:
        help = (
            f"settings to begin with, the option once for each, later ones over earlier: {preset_names()}, or a .yaml"
        )
        yield Option(PRESET, flag(PRESET), list[str] | None, "NAME", help, "Settings")
    for field in settings_of(stage):
        yield field_option(stage.config, field, field.name, "Settings")


def run_options() -> Iterator[Option]:
    """Where the artifact goes, and how the work is done."""
    where = "where the artifact goes: a folder or s3://bucket/prefix  [required]"
    yield Option("out", "--out", str | None, "URI", where, "Run")
    yield Option("executor", "--executor", str | None, "NAME", "serial (this process) or ray  [default: serial]", "Run")
    yield Option("address", "--address", str | None, "HOST:PORT", "a Ray cluster; without it Ray runs on this machine",
                 "Run")  # fmt: skip
    yield Option("as_json", "--json", bool, None, "the result as one JSON object on stdout", "Run")
    for field in dataclasses.fields(Resources):
        yield field_option(Resources, field, f"resources_{field.name}", "Run")


def field_option(config: type, field: dataclasses.Field[Any], name: str, panel: str) -> Option:
    """The option of a field of a config."""
    doc, kind = field_docs(config)[field.name], get_type_hints(config)[field.name]
    default = "required" if is_required(config, field.name) else f"default: {default_text(field)}"
    flags = flag(name)
    if kind is bool:
        flags = f"{flags}/--no-{flags[2:]}"
    panel = f"{panel}, {doc.section}" if doc.section else panel
    text = re.sub(r"\bNone\b", "null", "; ".join(filter(None, [doc.text, keys_of(kind)])))
    return Option(name, flags, bool | None if kind is bool else str | None,
                  None if kind is bool else kind_text(kind), f"{text}  [{default}]", panel)  # fmt: skip


def an_artifact(kinds: Sequence[str]) -> str:
    """``an embed artifact``."""
    article = "an" if kinds[0][0] in "aeiou" else "a"
    return f"{article} {or_list(kinds)} artifact"


def settings_of(stage: Stage) -> list[dataclasses.Field[Any]]:
    """The fields of a config that are no inputs."""
    return [
        field for field in dataclasses.fields(stage.config) if field.name not in {**stage.lists, **stage.step_or_value}
    ]


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as one would write it on the command line."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return "each key its own"
    return value if isinstance(value, str) else json.dumps(value, default=dict)


def kind_text(kind: Any) -> str:
    """What a value looks like: ``INT``, ``[NUMBER, NUMBER]``, ``{KEY: VALUE}``."""
    words = {int: "INT", float: "NUMBER", str: "TEXT", bool: "BOOL", type(None): "null"}
    inner = get_args(kind)
    if get_origin(kind) in (types.UnionType, Union):
        return "|".join(kind_text(one) for one in inner)
    if get_origin(kind) is tuple:
        return "[" + ", ".join("..." if one is Ellipsis else kind_text(one) for one in inner) + "]"
    if dataclasses.is_dataclass(kind) or inner:
        return "{KEY: " + (kind_text(inner[-1]) if inner else "VALUE") + "}"
    return words[kind]


def keys_of(kind: Any) -> str:
    """The keys of a config within a config, with their meaning."""
    if not dataclasses.is_dataclass(kind):
        return ""
    docs = field_docs(kind)  # type: ignore[arg-type]
    keys = (f"{field.name} ({docs[field.name].text})" for field in dataclasses.fields(kind))
    return "keys: " + ", ".join(keys)


@cache
def field_docs(config: type) -> dict[str, FieldDoc]:
    """The comments beside the fields of a dataclass, and those that stand above a group of them.

    A comment below an empty line is a heading; any other below a field goes on with what is said of the field.
    """
    lines = textwrap.dedent(inspect.getsource(config)).splitlines(keepends=True)
    tokens = tokenize.generate_tokens(io.StringIO("".join(lines)).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}
    body = ast.parse("".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    ends = {node.end_lineno: node.target.id for node in body.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    docs: dict[str, FieldDoc] = {}
    last = section = ""  # the field whose comment may go on, the heading above
    for number, line in enumerate(lines, 1):
        if (name := ends.get(number)) is not None:
            docs[name] = FieldDoc(comments.get(number, ""), section)
            last = name
        elif line.lstrip().startswith("#"):
            if not lines[number - 2].strip():
                last, section = "", comments[number].partition(":")[0]
            elif last:
                docs[last] = docs[last]._replace(text=f"{docs[last].text} {comments[number]}")
        else:
            last = ""
    return docs


def run_command(name: str, stage: Stage, given: Mapping[str, Any]) -> StepResult:
    """Run a stage as the options say, with progress on stderr. Raises UserError or TaskError."""
    given = with_flag(stage, given)
    if given["out"] is None:
        raise UserError("--out must be given: got none", "the artifact is made there: a folder or s3://bucket/prefix")
    step, inputs = read_step(name, stage, given)
    with workplace(given) as (executor, progress):
        return run_alone(step, inputs, place_of(given["out"]), executor, progress.start, progress.say)


@contextmanager
def workplace(given: Mapping[str, Any]) -> Iterator[tuple[LocalExecutor | RayExecutor, StepProgress]]:
    """The executor that the options ask for, and what shows progress on stderr. Raises UserError."""
    speed = {field.name: given[f"resources_{field.name}"] for field in dataclasses.fields(Resources)}
    values = read_config(Resources, speed, "resources", lambda key: flag(f"resources_{key}"))
    try:
        resources = structure(Resources, values, "resources")
    except UserError as e:
        wrong = next((key for key in values if f"resources.{key} " in e.message), None)
        hint = (
            e.hint
            if wrong is None
            else f"give another {flag(f'resources_{wrong}')}: it is {field_docs(Resources)[wrong].text}"
        )
        raise UserError(e.message, hint) from e
    with (
        open_executor(given["executor"] or "serial", given["address"], resources) as executor,
        StepProgress(quiet=given["as_json"]) as progress,
    ):
        yield executor, progress


def read_step(name: str, stage: Stage, given: Mapping[str, Any]) -> tuple[Step, dict[str, Artifact]]:
    """The step that the options say, as a recipe would have it, and its inputs by their URI. Raises UserError."""
    inputs = read_inputs(stage, given)
    names = {key: key.partition(".")[2] or flag(key) for key in inputs}  # no step has the name of a flag
    earlier = [Step(names[key], found.stage, None, {}, found.kind) for key, found in inputs.items()]
    settings = {field.name: given[field.name] for field in settings_of(stage)}
    values = {key: given[key] for key in stage.step_or_value if given[key] is not None}
    needed = [field.name for field in dataclasses.fields(stage.config) if is_required(stage.config, field.name)]
    missing = [key for key in needed if given[key] in (None, [])]
    if missing:
        raise UserError(
            f"{flag(missing[0])} must be given: got none", f"it is {field_docs(stage.config)[missing[0]].text}"
        )
    entry = {
        "stage": name,
        **read_config(stage.config, settings, name, flag),
        **values,
        **({PRESET: given[PRESET]} if given.get(PRESET) else {}),
        **{key: names[key] for key in inputs if "." not in key},
        **{key: [names[found] for found in inputs if found.startswith(f"{key}.")] for key in stage.lists},
    }
    try:
        step = parse_step(name, entry, earlier, STAGES, seed=0)
    except UserError as e:
        raise UserError(e.message, e.hint if e.hint.startswith("did you mean") else see_help(name)) from e
    uris = {key: found.location.uri for key, found in inputs.items()}
    return dataclasses.replace(step, inputs=uris), {found.location.uri: found for found in inputs.values()}


def see_help(name: str) -> str:
    """The hint for an option with a wrong value."""
    return f"openlvd {name} --help says what every option takes"


def read_config(config: type, texts: Mapping[str, Any], owner: str, flag_of: Callable[[str], str]) -> dict[str, Any]:
    """The values of the settings that are given."""
    kinds = get_type_hints(config)
    return {key: read_value(text, kinds[key], flag_of(key), owner) for key, text in texts.items() if text is not None}


def read_value(text: Any, kind: Any, option: str, owner: str) -> Any:
    """A value from the command line: text as it is where text is meant, otherwise JSON or YAML. Raises UserError."""
    plain = set(get_args(kind) or [kind]) - {type(None)} == {str} and get_origin(kind) is not tuple
    if not isinstance(text, str) or (plain and not (text == "null" and kind is not str)):
        return text
    if {str, tuple[str, ...]} <= set(get_args(kind)):  # one text, or a list of some
        return read_texts(text)
    try:
        return json.loads(text)  # first, because 1e-3 is a number there, and text in YAML
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{option} must be YAML: got {text!r}", see_help(owner)) from e


def read_texts(text: str) -> Any:
    """The list that a text is, or the text: names of files may look like YAML."""
    if text.startswith("[") and text.endswith("]"):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return text


def read_inputs(stage: Stage, given: Mapping[str, Any]) -> dict[str, Artifact]:
    """The artifacts that a stage is to read, those of a list as ``list.name``. Raises UserError."""
    found: dict[str, Artifact] = {}
    for key, kinds in {**stage.reads, **stage.optional}.items():
        if given[key] is not None:
            found[key] = find_artifact(flag(key), given[key], kinds)
        elif key in stage.reads:
            raise UserError(f"{flag(key)} must be given: got none", f"it is {an_artifact(kinds)}; {PATH_HINT}")
    for key, kinds in stage.step_or_value.items():
        if given[key] not in (None, *MODEL_FREE) and artifact_at(given[key]) is not None:
            found[key] = find_artifact(flag(key), given[key], kinds)
    for key, kinds in stage.lists.items():
        for text in given[key] or []:
            name, path = split_name(text)
            artifact = find_artifact(flag(key), path, kinds)
            name = name or name_of(artifact)
            if not is_name(name) or f"{key}.{name}" in found:
                rule = "have one name each" if is_name(name) else "have names of letters, digits, - and _"
                raise UserError(f"{flag(key)} must {rule}: got {name!r} for {path}", f"write {flag(key)} NAME=PATH")
            found[f"{key}.{name}"] = artifact
    return found


def split_name(text: str) -> tuple[str, str]:
    """(name, path) of ``NAME=PATH``; no name when there is only a path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and is_name(name) else ("", text)


def is_name(text: str) -> bool:
    """Whether a step could be called so."""
    return text.replace("_", "").replace("-", "").isalnum()


def name_of(artifact: Artifact) -> str:
    """The step that left an artifact; the name of its folder when it stands alone."""
    location = artifact.location
    return location.parent.name if location.name == artifact.manifest["fingerprint"] else location.name


def find_artifact(option: str, text: str, kinds: Sequence[str]) -> Artifact:
    """The finished artifact at a path, of a fitting kind. Raises UserError."""
    artifact = artifact_at(text)
    if artifact is None:
        at = place_of(text)
        root = (at / RUN_FILE).exists()
        hint = f"{text} is a root: name one of its steps, {', '.join(read_root(at))}" if root else PATH_HINT
        raise UserError(f"{option} must be a finished artifact: got {text}", hint)
    if artifact.kind not in kinds:
        got = an_artifact([artifact.kind]).removesuffix(" artifact")
        raise UserError(f"{option} must be {an_artifact(kinds)}: got {got}, {artifact.location}", PATH_HINT)
    return artifact


def artifact_at(text: str) -> Artifact | None:
    """The finished artifact at a path, or of ROOT/STEP; None when there is none."""
    at = place_of(text)
    if Artifact(at).is_complete():
        return Artifact(at)
    if not (at.parent / RUN_FILE).exists():
        return None
    found = read_root(at.parent).get(at.name)
    return found if found is not None and found.is_complete() else None


def place_of(text: str) -> Location:
    """A location from the command line, with one name: absolute, without links, ``..`` or a slash at its end."""
    given = Location(text)
    return Location(str(Path(text).expanduser().resolve())) if given.is_local else Location(text.rstrip("/"))
