"""A training run on disk: everything a step changes, in one safetensors file that appears whole or not at all."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curation.store import Location
from embedding.vit import ViT
from training.config import TrainConfig
from training.train_step import StepMetrics, TrainState

_FORMAT = "openlvd-checkpoint-3"
_BEST = "best.safetensors"
_WORDS = "history"  # the tensor that holds, as JSON, what a run has to say beside numbers


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written."""


class SkippedStep(NamedTuple):
    """A step whose loss or gradient was not finite, and the images it saw."""

    step: int
    keys: list[str]


@dataclass
class History:
    """What a run has measured so far, step by step."""

    metrics: dict[str, np.ndarray]  # float64 (n_steps,), filled up to the step reached
    skipped: list[SkippedStep] = field(default_factory=list)
    bad_samples: dict[str, str] = field(default_factory=dict)  # key to reason, of images that did not decode
    alarms: dict[str, str] = field(default_factory=dict)  # what was odd, by kind; of each the last time it was

    @classmethod
    def empty(cls, n_steps: int) -> "History":
        """Nothing measured yet."""
        metrics = {name: np.zeros(n_steps) for name in (*StepMetrics._fields, "replaced")}
        return cls(metrics | {"knn_accuracy": np.full(n_steps, np.nan)})


@dataclass
class Run:
    """A run in memory: what it is, where its checkpoints are, and all that a step changes."""

    config: TrainConfig
    data: str  # digest of what fixes the order of the samples
    folder: Location  # of the checkpoints
    state: TrainState
    history: History


def save_checkpoint(run: Run, step: int, keep: int = 2) -> None:
    """Write ``checkpoint-{step:07d}.safetensors`` after ``step`` steps, aside and then renamed; keep the newest.

    keep: how many. Holds a copy of the state in host memory. Raises CheckpointFailed when it cannot be written: those
    before stay.
    """
    folder, state, history = run.folder, run.state, run.history
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(state)}
    tensors |= {f"metrics.{name}": torch.from_numpy(values[:step].copy()) for name, values in history.metrics.items()}
    words = {"skipped": history.skipped, "bad_samples": history.bad_samples, "alarms": history.alarms}
    text = np.frombuffer(json.dumps(words).encode(), np.uint8)  # a header takes no more than 100 MB
    tensors[_WORDS] = torch.from_numpy(text.copy())
    meta = {"format": _FORMAT, "step": step, "config": asdict(run.config), "data": run.data}
    _save(folder / f"checkpoint-{step:07d}.safetensors", tensors, meta)
    steps = checkpoints(folder)
    newest = [old for old in steps if old <= step][-keep:]  # those of later steps were torn, or they had been read
    for old in steps:
        if old not in newest:
            (folder / f"checkpoint-{old:07d}.safetensors").delete()


def save_best(run: Run, step: int, accuracy: float) -> None:
    """Keep the teacher's backbone after ``step`` steps as the best so far. Raises CheckpointFailed."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in run.state.teacher.backbone.state_dict().items()}
    _save(run.folder / _BEST, tensors, {"format": _FORMAT, "step": step, "accuracy": accuracy})


def best_accuracy(folder: Location) -> float:
    """That of the best backbone that was kept, -1 when there is none.

    On a GPU a run that is repeated after a kill may measure another accuracy at the step of the best.
    """
    file = folder / _BEST
    return float(_read(file)[1]["accuracy"]) if file.exists() else -1.0


def load_best(folder: Location, backbone: ViT) -> int:
    """Fill a backbone with the best one and return its step. Raises FileNotFoundError when none was kept."""
    tensors, meta = _read(folder / _BEST)
    backbone.load_state_dict(tensors)
    return int(meta["step"])


def _save(file: Location, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    try:
        with file.side_file() as side:
            save_file(tensors, side, metadata={"openlvd": json.dumps(meta)})
    except (OSError, SafetensorError) as e:
        raise CheckpointFailed(
            f"a checkpoint must fit where it is kept: {file} could not be written ({e}); those before it are whole, "
            "make room and run again to go on from them"
        ) from e


def checkpoints(folder: Location) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    names = (re.fullmatch(r"checkpoint-(\d{7,})\.safetensors", entry.name) for entry in folder.list())
    return sorted(int(name[1]) for name in names if name)


def restore_newest(run: Run) -> int:
    """Fill state and history from the newest whole checkpoint and return its step; 0 when there is none.

    A file that is cut short is passed over. Raises ValueError, naming the fields, when a checkpoint is of another
    config or of other data.
    """
    history = run.history
    for step in reversed(checkpoints(run.folder)):
        try:
            tensors, meta = _read(run.folder / f"checkpoint-{step:07d}.safetensors")
        except SafetensorError:
            continue
        _check_same(meta, run.config, run.data, step)
        _load(run.state, tensors)
        for name, values in history.metrics.items():
            values[:step] = tensors[f"metrics.{name}"].numpy()
        words = json.loads(tensors[_WORDS].numpy().tobytes())
        history.skipped[:] = [SkippedStep(*item) for item in words["skipped"]]
        history.bad_samples.update(words["bad_samples"])
        history.alarms.update(words["alarms"])
        return step
    return 0


def _tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state by name; optimizer moments by the name of their parameter."""
    for part, module in (("student", state.student), ("teacher", state.teacher)):
        for name, tensor in module.state_dict().items():
            yield f"{part}.{name}", tensor
    yield from (("centre", state.centre_K), ("ibot_centre", state.ibot_centre_K))
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in state.optimizer.state[parameter].items():
                yield f"optimizer.{key}.{name}", value


def _load(state: TrainState, tensors: dict[str, Tensor]) -> None:
    for part, module in (("student", state.student), ("teacher", state.teacher)):
        prefix = f"{part}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state.centre_K = tensors["centre"].to(state.device)
    state.ibot_centre_K = tensors["ibot_centre"].to(state.device)
    state.optimizer.state.clear()
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            found = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if found["step"] is not None:
                state.optimizer.state[parameter] = {k: v.to(state.device) for k, v in found.items() if v is not None}


def _read(file: Location) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with file.local_copy() as path, safe_open(path, framework="pt") as opened:
        meta: dict[str, Any] = json.loads((opened.metadata() or {}).get("openlvd", "{}"))
        if meta.get("format") != _FORMAT:
            raise ValueError(f"a checkpoint must have format {_FORMAT}: got {meta.get('format')} in {file}")
        return {name: opened.get_tensor(name) for name in opened.keys()}, meta  # noqa: SIM118  (not a dict)


def _check_same(meta: dict[str, Any], config: TrainConfig, data: str, step: int) -> None:
    """Raise ValueError unless the checkpoint is of this very run."""
    ours, theirs = (_flat(each) for each in (json.loads(json.dumps(asdict(config))), meta["config"]))
    names = [*ours, *(name for name in theirs if name not in ours)]
    differ = [
        f"train.{name} ({theirs.get(name)} there, {ours.get(name)} here)"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    if meta["data"] != data:
        differ.append("the shards")
    if differ:
        raise ValueError(f"the checkpoint of step {step} must be of the same run: got other {', '.join(differ)}")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested fields, by dotted names."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out
