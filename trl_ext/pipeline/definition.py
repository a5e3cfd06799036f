"""A pipeline as its file states it: stages in their order, each a recipe of a command; checked before any runs."""

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from ..core.checks import Range, check_fields, shown
from ..scripts.recipe.environment import checked_environment
from ..scripts.recipe.named_code import check_trust
from ..scripts.recipe.overrides import take_option
from ..scripts.recipe.packaged import find_packaged, header_of
from ..scripts.recipe.reading import Lines, RecipeError, read_recipe
from ..scripts.recipe.required import require_model_and_data, require_rewards
from ..scripts.recipe.stand_ins import light_parser
from ..scripts.recipe.strict_parser import StrictParser, take_flag


# Folder of markers and recipes beside the stages' own
STAGES_FOLDER = "stages"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
# Keys of a recipe that the pipeline sets
_OWN_KEYS = ("output_dir", "resume_from_checkpoint", "overwrite")


class Command(NamedTuple):
    """
    What a stage of a command takes and gives.

    Args:
        module (`str`):
            Its script module.
        trains (`bool`):
            Whether it is launched with accelerate.
        takes_recipe (`bool`):
            Whether it takes `--config`.
        options (`bool`):
            Whether it has options of its own beside a recipe's keys.
        results (`dict[str, str]`):
            What later stages may take: name, and file below the stage's folder.
    """

    module: str
    trains: bool
    takes_recipe: bool
    options: bool
    results: dict[str, str]


def commands_of(training: Mapping[str, str]) -> dict[str, Command]:
    """
    The commands that can be stages.

    Args:
        training (`Mapping[str, str]`):
            Script module of each training command.

    Returns:
        `dict[str, Command]`
    """
    found = {name: Command(module, True, True, False, {"output_dir": ""}) for name, module in training.items()}
    sweep = {"output_dir": "", "constraints": "proxy_points/constraints.yaml"}
    pairs = {"output_dir": "", "pairs": "pairs.jsonl"}
    found["sweep"] = Command("trl_ext.scripts.sweep", False, True, True, sweep)
    found["sample-pairs"] = Command("trl_ext.scripts.sample_pairs", False, False, True, pairs)
    return found


@dataclass
class PipelineArguments:
    """
    Keys of a pipeline's file, and options of `trl-ext pipeline`.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/pipeline"`):
            Folder; each stage has its own below it, under its name.
        stages (`dict`):
            Stages by name, in their order ([`Stage`]).
        accelerate_config (`str`, *optional*):
            Accelerate config of every training stage, a file or a name. Defaults to `single_process`.
        num_processes (`int`, *optional*):
            Number of processes of every training stage. Defaults to the accelerate config's.
        until (`str`, *optional*):
            Last stage to run. Defaults to the last one.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether the folder of a stage is deleted where another recipe or other inputs have made it.
    """

    output_dir: str = field(
        default="outputs/pipeline", metadata={"help": "Folder; each stage has its own below it, under its name."}
    )
    stages: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Stages by name, in their order, each with `command` and its recipe."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Accelerate config of every training stage, a file or a name."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes of every training stage."})
    until: str | None = field(default=None, metadata={"help": "Last stage to run."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Delete the folder of a stage where another recipe or other inputs have made it."},
    )

    def __post_init__(self) -> None:
        check_fields(self, {"output_dir": Range(empty=False), "num_processes": Range(at_least=1)})
        if not self.stages:
            raise RecipeError("`stages` is missing. Name at least one, with its `command`; docs/pipeline.md has some.")


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        name (`str`):
            Its name, and that of its folder.
        command (`str`):
            Command of `trl-ext`.
        config (`str`, *optional*):
            Recipe, a file or the name of a packaged one.
        settings (`dict`, *optional*):
            Keys of the recipe that differ, or the whole recipe where there is no `config`.
        options (`dict`, *optional*):
            Options of a command that has others than a recipe's keys.
        accelerate_config (`str`, *optional*):
            Accelerate config. Defaults to the pipeline's.
        num_processes (`int`, *optional*):
            Number of processes. Defaults to the pipeline's.
    """

    name: str
    command: str
    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    accelerate_config: str | None = None
    num_processes: int | None = None

    def __post_init__(self) -> None:
        ranges = {"config": Range(empty=False), "num_processes": Range(at_least=1)}
        check_fields(self, ranges, label=f"`stages.{self.name}.{{}}`")

    def reads(self) -> list[str]:
        """Names of the stages that it takes something from, each once, in the order of their mention."""
        return list(dict.fromkeys(name for name, _ in references([self.settings, self.options])))


@dataclass(frozen=True)
class Pipeline:
    """
    A checked pipeline.

    Args:
        path (`str`):
            Its file, or the name of a packaged one.
        title (`str`):
            First line of its file.
        text (`str`):
            Its file.
        output_dir (`Path`):
            Folder.
        stages (`list[Stage]`):
            Stages in their order, the last of them that which `until` names.
        commands (`dict[str, Command]`):
            The commands that can be stages.
        environment (`dict[str, str]`):
            Variables for every stage.
        overwrite (`bool`):
            Whether outdated folders are deleted.
        verbose (`bool`):
            Whether all that is logged is shown.
    """

    path: str
    title: str
    text: str
    output_dir: Path
    stages: list[Stage]
    commands: dict[str, Command]
    environment: dict[str, str]
    overwrite: bool
    verbose: bool

    def folder(self, stage: Stage | str) -> Path:
        """The output folder of a stage."""
        return self.output_dir / (stage if isinstance(stage, str) else stage.name)

    def result(self, name: str, what: str) -> Path:
        """The file or folder that a stage gives under a name."""
        command = next(stage.command for stage in self.stages if stage.name == name)
        return self.folder(name) / self.commands[command].results[what]

    def recipe(self, stage: Stage, now: bool = True) -> dict[str, Any]:
        """
        The whole recipe of a stage, its references replaced.

        Args:
            stage ([`Stage`]):
                Stage.
            now (`bool`, *optional*, defaults to `True`):
                Whether the stages that it reads are done; keys that take more of them than a path are left out else.

        Returns:
            `dict[str, Any]`
        """
        recipe = dict(read_recipe(stage.config)[0]) if stage.config else {}
        if stage.settings.get("dataset_name"):
            recipe.pop("datasets", None)
        if stage.settings.get("datasets"):
            recipe.pop("dataset_name", None)
        recipe |= self.settings(stage, now)
        recipe.pop("output_dir", None)
        return {**recipe, "output_dir": str(self.folder(stage))} if self.commands[stage.command].trains else recipe

    def settings(self, stage: Stage, now: bool = True) -> dict[str, Any]:
        """The settings of a stage, as [`recipe`] has them."""
        return {key: self._replaced(value) for key, value in stage.settings.items() if now or self._is_known(value)}

    def options(self, stage: Stage) -> list[str]:
        """The options of a stage as words of a command line, its output folder among them."""
        return [*option_words(self._replaced(stage.options)), "--output_dir", str(self.folder(stage))]

    def _is_known(self, value: Any) -> bool:
        return all(what != "constraints" for _, what in references(value))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._replaced(inner) for inner in value]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole and whole[1].endswith(".constraints"):
            name = whole[1].split(".")[1]
            return yaml.safe_load(self.result(name, "constraints").read_text())["constraints"]
        return _REFERENCE.sub(lambda match: str(self.result(*match[1].split(".")[1:])), value)


def option_words(options: Mapping[str, Any]) -> list[str]:
    """
    Options as words of a command line: `{"reward_weights": [[1, 0], [0, 1]]}` as `--reward_weights 1,0 0,1`.

    Args:
        options (`Mapping[str, Any]`):
            Values by name; a flag's is `True` or `False`.

    Returns:
        `list[str]`
    """
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(",".join(map(str, one)) if isinstance(one, list) else str(one) for one in values)]
    return words


def references(value: Any) -> list[tuple[str, str]]:
    """Stage and result of every `${stages.NAME.RESULT}` in a value; of what is written otherwise, itself and ""."""
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in references(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in references(inner)]
    found = []
    for content in _REFERENCE.findall(value) if isinstance(value, str) else ():
        parts = content.split(".")
        found.append((parts[1], parts[2]) if len(parts) == 3 and parts[0] == "stages" else (content, ""))
    return found


def read_pipeline(arguments: list[str], training: Mapping[str, str]) -> Pipeline:
    """
    Reads and checks a pipeline and all recipes of its stages.

    Args:
        arguments (`list[str]`):
            Command line of `trl-ext pipeline`.
        training (`Mapping[str, str]`):
            Script module of each training command.

    Returns:
        [`Pipeline`]

    Raises:
        RecipeError: If a key or stage is unknown, a value cannot be taken, or a stage refers to what is not before it.
    """
    arguments = list(arguments)
    path, trusted = take_option(list(arguments), "--config"), take_flag(list(arguments), "--trust_recipe_code")
    if path is None:
        raise RecipeError("`--config` is missing. Name a pipeline's file, or `pipeline/playground`.")
    parser = StrictParser((PipelineArguments,), prog="trl-ext pipeline")  # type: ignore[arg-type]
    environment = parser.check(arguments)
    stated = {item.name: getattr(parser.parsed, item.name) for item in fields(PipelineArguments)}
    options = PipelineArguments(**stated)
    lines = read_recipe(path)[1]
    commands = commands_of(training)
    stages = [_stage(name, entry, options, commands, path, lines) for name, entry in options.stages.items()]
    file = Path(path) if Path(path).is_file() else find_packaged(path)
    assert file is not None  # which has been read
    pipeline = Pipeline(
        path, header_of(file).title, file.read_text(encoding="utf-8-sig"), Path(options.output_dir),
        _until(stages, options.until), commands, environment, options.overwrite, parser.verbose,
    )  # fmt: skip
    for position, stage in enumerate(pipeline.stages):
        below = {place[2:]: line for place, line in lines.items() if place[:2] == ("stages", stage.name)}
        _Check(pipeline, stage, path, below, trusted).run(pipeline.stages[:position])
    return pipeline


def _until(stages: list[Stage], last: str | None) -> list[Stage]:
    names = [stage.name for stage in stages]
    if last is not None and last not in names:
        raise RecipeError(f"`until: {last}` is no stage{_suggestion(last, names)}. The stages are {', '.join(names)}.")
    return stages if last is None else stages[: names.index(last) + 1]


def _stage(
    name: Any, entry: Any, options: PipelineArguments, commands: Mapping[str, Command], path: str, lines: Lines
) -> Stage:
    line = lines.get(("stages", str(name)))
    where = f"`stages.{name}` in the recipe {path}" + (f", line {line}," if line else "")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == STAGES_FOLDER:
        raise RecipeError(
            f"{where} cannot be the name of a stage, which is that of its folder too. Use letters, digits, `_` and "
            f"`-`, and another name than `{STAGES_FOLDER}`."
        )
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where} must map keys to values, got {shown(entry)}. Give it a `command`.")
    known = [item.name for item in fields(Stage) if item.name != "name"]
    for key in entry:
        if key not in known:
            raise RecipeError(
                f"`{key}` of {where} is unknown{_suggestion(key, known)}. A stage has {', '.join(known)}; keys of its "
                "recipe go below `settings`."
            )
    command = str(entry.get("command"))
    if command not in commands:
        raise RecipeError(
            f"`command: {command}` of {where} cannot be a stage{_suggestion(command, commands)}. The commands are "
            f"{', '.join(commands)}."
        )
    stated = {key: {} if value is None and key in ("settings", "options") else value for key, value in entry.items()}
    if commands[command].trains:
        for key in ("accelerate_config", "num_processes"):
            stated[key] = entry.get(key, getattr(options, key))
    return Stage(name, **stated)


def _suggestion(name: Any, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:80], sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


@dataclass
class _Check:
    """Refuses a stage that could not run."""

    pipeline: Pipeline
    stage: Stage
    path: str
    lines: Lines
    trusted: bool

    def run(self, earlier: list[Stage]) -> None:
        self._references({stage.name: stage for stage in earlier})
        command = self.pipeline.commands[self.stage.command]
        if self.stage.options and not command.options:
            raise RecipeError(
                f"{self._where('options')} is not for `{self.stage.command}`, which has no options beside the keys of "
                "its recipe. Move them below `settings`."
            )
        if not command.takes_recipe and (self.stage.config or self.stage.settings):
            raise RecipeError(
                f"{self._where()} has a recipe, and `{self.stage.command}` takes none. Move what it says to `options`."
            )
        if not command.trains and (self.stage.accelerate_config or self.stage.num_processes):
            raise RecipeError(f"{self._where()} is not launched with accelerate. Remove `accelerate_config` and "
                              "`num_processes`.")  # fmt: skip
        if command.takes_recipe:
            self._recipe(command)
        if command.options:
            self._options(command)

    def _where(self, *place: str | int) -> str:
        line = self.lines.get(place)
        name = ".".join(["stages", self.stage.name, *map(str, place)])
        return f"`{name}` in the recipe {self.path}" + (f", line {line}," if line else "")

    def _references(self, earlier: Mapping[str, Stage]) -> None:
        for part in ("settings", "options"):
            for key, value in getattr(self.stage, part).items():
                for name, what in references(value):
                    self._reference(part, key, name, what, earlier)

    def _reference(self, part: str, key: str, name: str, what: str, earlier: Mapping[str, Stage]) -> None:
        where = self._where(part, key)
        if not what:
            raise RecipeError(f"{where} has `${{{name}}}`. Write `${{stages.NAME.output_dir}}` with an earlier stage.")
        if name not in earlier:
            raise RecipeError(
                f"{where} takes something from `{name}`, which is no earlier stage{_suggestion(name, earlier)}. "
                f"Before it stand {', '.join(earlier) or 'none'}."
            )
        results = self.pipeline.commands[earlier[name].command].results
        if what not in results:
            raise RecipeError(
                f"{where} takes `{what}` from `{name}`, and a stage of `{earlier[name].command}` gives "
                f"{' and '.join(results)}{_suggestion(what, results)}."
            )

    def _recipe(self, command: Command) -> None:
        stage, path = self.stage, f"{self.path} (stage {self.stage.name})"
        taken = [key for key in _OWN_KEYS if key in stage.settings]
        if taken:
            raise RecipeError(
                f"{self._where('settings', taken[0])} is the pipeline's, which sees to it for every stage. Remove it."
            )
        module = command.module if command.trains else "trl_ext.scripts.constrained_ppo"  # which a sweep runs
        trust = ["--trust_recipe_code"] if self.trusted else []
        if stage.config:
            _parser(module).check(["--config", stage.config, *trust])
        settings = self.pipeline.settings(stage, now=False)
        below = {place[1:]: line for place, line in self.lines.items() if place[:1] == ("settings",)}
        check_trust(settings, below, self.path, self.trusted)
        checked_environment(settings.pop("env", None), path, below)
        _parser(module).check_settings(settings, path, below)
        names = ("model_name_or_path", "datasets", "dataset_name", "reward_funcs")
        recipe = self.pipeline.recipe(stage, now=False)
        stated: Any = SimpleNamespace(**{name: recipe.get(name) for name in names})
        try:
            require_model_and_data(stated, stated, stated)
            if "constrained" in module:
                require_rewards(stated.reward_funcs)
        except RecipeError as error:
            raise RecipeError(f"{self._where()}: {error}") from None

    def _options(self, command: Command) -> None:
        parser = importlib.import_module(command.module).make_parser()
        known = {name[2:] for name in parser._option_string_actions if name.startswith("--")} - {"config", "help"}
        for key in self.stage.options:
            if key not in known or key == "output_dir":
                remedy = "The pipeline sets it. Remove it" if key == "output_dir" else "Rename or remove it"
                raise RecipeError(
                    f"{self._where('options', key)} is no option of `{self.stage.command}`{_suggestion(key, known)}. "
                    f"{remedy}."
                )
        code = {"reward_funcs": [self.stage.options.get("reward")]}
        check_trust(code, self.lines, self.path, self.trusted)

        def refuse(message: str) -> None:
            raise RecipeError(
                f"{self._where('options')}: {message}. `trl-ext {self.stage.command} --help` lists them."
            )

        parser.error = refuse
        recipe = ["--config", "recipe.yaml"] if command.takes_recipe else []
        parser.parse_args([*recipe, *self.pipeline.options(self.stage)])


def _parser(module: str) -> Any:
    return light_parser(module, "trl-ext") or importlib.import_module(module).make_parser(prog="trl-ext")
