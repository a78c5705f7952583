"""Settings of a run: one frozen dataclass, filled from defaults, then a YAML file, then the command
line.

`TrainConfig` holds what every trainer shares; a trainer derives its own dataclass from it. The
names follow SSL4MIS (`--base-lr`, `--labeled-num`, `--max-iterations`); its spellings with
underscores and its short names are accepted too.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro
import yaml

from ..data.atomic import write_atomic


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or contradicts another. The message names it and
    the valid choices."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that every trainer shares."""

    trainer: ClassVar[str]
    """Which one: "ideal", "gcl" or "pdcr"."""

    # --- run
    exp: str = "ideal"
    """Name of the run; its folder is OUT/EXP (OUT/EXP/seed_N with --seeds)."""
    out: Path = Path("runs")
    """Folder that holds the run folders."""
    seed: int = 1337
    """Seed of initial weights, batches and augmentation."""
    seeds: tuple[int, ...] = ()
    """Several seeds: one run each, then a table of mean and sd. Replaces --seed."""
    device: str = "auto"
    """auto (CUDA when present), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast type of the forward passes; fp16 uses a gradient scaler."""
    grad_clip: float | None = None
    """Largest norm of the gradient of all parameters together; default: no limit."""
    impl: Literal["auto", "cpu", "reference", "triton", "cuda"] = "auto"
    """Backend of the contrastive kernels; reference = plain torch, the same training without fused
    kernels."""
    resume: str = "none"
    """none, auto (continue from the run folder's last checkpoint if there is one), or a checkpoint
    file."""
    overwrite: bool = False
    """Delete an existing run folder of this name first."""
    deterministic: int = 1
    """1: ask CUDA libraries for deterministic kernels (CPU runs are deterministic anyway)."""
    log_every: int = 20
    """Iterations between log lines."""
    val_every: int = 200
    """Fine-tuning iterations between validations; 0 = never."""
    checkpoint_every: int = 200
    """Iterations between checkpoints; the end of a stage and SIGTERM always save."""
    tensorboard: bool = True
    """Write TensorBoard events when the package is installed."""
    report: bool = True
    """Write report.html with figures at the end."""
    profile_steps: int = 0
    """N > 0: only measure time and peak memory of N training steps with this --impl and with the
    plain-torch reference, and stop."""
    profile_alone: bool = False
    """With profile_steps: without the reference, where that does not fit into memory."""
    profile_warmup: int = 3
    """With profile_steps: steps before those that are measured; fewer where one takes minutes."""
    dry_run: bool = False
    """Print the resolved settings and stop."""

    # --- data
    dataset: Literal["acdc", "mmwhs", "msd", "ssl4mis", "phantom"] = "phantom"
    """Layout of the data folder."""
    data_root: Annotated[Path | None, tyro.conf.arg(aliases=["--root-path"])] = None
    """Folder of the data. Not needed for the phantom, which is generated when it is not given."""
    variant: Literal["A", "B", "C"] | None = None
    """Pre-processing variant; default: the data set's own."""
    size: Annotated[tuple[int, int] | None, tyro.conf.arg(aliases=["--patch-size"])] = None
    """Height and width of the training slices; default: the variant's own."""
    modality: Literal["mr", "ct"] = "mr"
    """Of MM-WHS."""
    phases: Literal["ED_ES", "ED", "ES"] = "ED_ES"
    """Cardiac phases of the ACDC layout; ED alone as Chaitanya et al."""
    stray_421: Literal["background", "atrium", "error"] = "background"
    """What the stray label value 421 of one MM-WHS file means; atrium: the left one."""
    task: Literal["hippocampus", "other"] | None = None
    """MSD task, which decides slices and crop; default: seen from the file names."""
    n4: bool = False
    """N4 bias-field correction before everything else (Chaitanya et al.); needs SimpleITK."""
    clip: bool = False
    """Clip intensities to the 1st..99th percentile (minmax: to [0, 1]) also where the variant does
    not."""
    labeled_num: int = 1
    """Number of labelled subjects."""
    draw: int = 0
    """Which draw of labelled subjects. Those of one draw are nested: 1 in 2 in 4. -1: the first
    ones in the order of the files or lists, as SSL4MIS takes them."""
    split_seed: int = 0
    """Choice of test and validation subjects, the same for every draw."""
    split_file: Path | None = None
    """Use this split file instead of drawing one."""
    val_num: int | None = None
    """Number of validation subjects; default: the data set's own."""
    test_num: int | None = None
    """Number of test subjects; default: the data set's own."""
    phantom_patients: int = 12
    """Number of patients of a generated phantom."""
    cache_dir: Path | None = None
    """Folder of prepared volumes; default OUT/cache."""

    # --- network
    model: Literal["unet"] = "unet"
    """Only the U-Net is there; the flag exists for SSL4MIS command lines."""
    num_classes: int | None = None
    """Classes with background. Known from the data set, of MSD from its dataset.json; a value
    given here is checked against it."""
    class_names: tuple[str, ...] = ()
    """Their names, background first; default: the data set's own."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Channels per encoder level."""
    dropout: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Dropout per encoder level."""
    channels_last: bool = True
    """Store maps as NHWC (faster convolutions on the CPU and on tensor cores)."""


Config = TypeVar("Config", bound=TrainConfig)


def parse_config(
    config_class: type[Config], arguments: Sequence[str] | None = None, *, prog: str | None = None
) -> Config:
    """Defaults < YAML file (`--config FILE`) < command line.

    Args:
        config_class: a dataclass derived from TrainConfig.
        arguments: command line without the program name; default sys.argv.

    Raises: ConfigError for an unreadable file, an unknown name or a value of the wrong type in it.
        A wrong command line prints a usage message and exits with code 2, as command-line programs
        do.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    path, arguments = _take_option(arguments, "--config")
    default = load_config(config_class, path) if path else config_class()
    return tyro.cli(
        config_class, default=default, args=arguments, prog=prog, description=config_class.__doc__
    )


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a YAML file of settings over the defaults."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'name: value' lines, got {type(content).__name__}")
    return config_from_dict(config_class, content, source=str(path))


def config_from_dict(config_class: type[Config], values: dict, *, source: str) -> Config:
    """A config from plain values (YAML, checkpoint); `source` names the origin in errors."""
    types = typing.get_type_hints(config_class)
    hints = {field.name: types[field.name] for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"{source}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(hints))}"
        )
    converted = {
        name: _convert(value, hints[name], f"{source}: {name}") for name, value in values.items()
    }
    return config_class(**converted)


def config_to_dict(config: TrainConfig) -> dict:
    """Plain values: paths become strings, tuples lists. `config_from_dict` gives the config
    back."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write the resolved settings as YAML, atomically."""
    text = format_config(config).encode()
    write_atomic(path, lambda file: file.write(text), "settings file")


def format_config(config: TrainConfig) -> str:
    """The resolved settings as YAML text."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None)


def changed_settings(
    config: TrainConfig, saved: dict, *, ignore: Sequence[str]
) -> dict[str, tuple]:
    """{name: (saved, now)} of settings that differ, except the names in `ignore`."""
    now = config_to_dict(config)
    return {k: (saved.get(k), now[k]) for k in now if k not in ignore and saved.get(k) != now[k]}


def check_ranges(config: TrainConfig, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises ConfigError for the first setting outside its (lowest, highest) value."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(config, name) <= high:
            range_ = f"lie in {low}..{high}" if high < math.inf else f"be at least {low}"
            raise ConfigError(f"{name} must {range_}, got {getattr(config, name)}")


def check_positive(config: TrainConfig, *names: str) -> None:
    """Raises ConfigError for the first setting that is not positive and finite; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be positive, got {value}")


def _take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Remove `--config X` or `--config=X`, which must be known before the rest can be parsed."""
    rest, value, pending = [], None, iter(arguments)
    for argument in pending:
        if argument == name:
            value = next(pending, None)
            if value is None:
                raise ConfigError(f"{name} needs a file name")
        elif argument.startswith(name + "="):
            value = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    return value, rest


def _convert(value, hint, where: str):
    """`value` as the type of the field, or ConfigError saying what was expected."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        # YAML 1.1 reads a bare `off` as False
        value = "off" if value is False and "off" in options else value
        if value in options:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, options))}, got {value!r}")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else None
        fixed = options if Ellipsis not in options else None
        if items is None or (fixed and len(items) != len(fixed)):
            raise ConfigError(
                f"{where} must be a list of {len(fixed) if fixed else 'any number of'} values, "
                f"got {value!r}"
            )
        return tuple(_convert(v, options[0], where) for v in items)
    if options:  # X | None, or one value | several
        if value is None and type(None) in options:
            return None
        several = [o for o in options if typing.get_origin(o) is tuple]
        if isinstance(value, list | tuple) and several:
            return _convert(value, several[0], where)
        return _convert(value, next(o for o in options if o is not type(None)), where)
    if hint is Path:
        return Path(value).expanduser()
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
