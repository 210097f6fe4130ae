"""A new run from another's weights (`run.init_from`): every tensor is taken, and the optimizer starts afresh."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megadit.checkpoint import LogicalTensor
from megadit.checkpoint.source import CheckpointSource, FolderSource, Spec, locate, open_source
from megadit.model.ecdit import whole_model
from megadit.runtime.agreement import of_main, together
from megadit.training.build import Run
from megadit.training.config import RunConfig, differing
from megadit.training.state import logical_fragment

logger = logging.getLogger("megadit")


def load_initial(run: Run) -> None:
    """Put the weights of `run.init_from` into the masters, so into the parameters, and into the averages. Collective.

    Each rank reads what it owns. Raises ValueError on all ranks, naming the folder, and every tensor that is missing,
    left over or of another shape.
    """
    path = of_main(lambda: locate(Path(run.config.run.init_from).expanduser()))
    parameters = dict(run.named)
    with together():
        source = open_source(path)
        names = names_of_weights(source, run.config.run.init_weights)
        check_accounted(path, names, run.config)
        if isinstance(source, CheckpointSource):
            source.check_bytes(run.process.rank, run.process.world_size)
        for fragment in (*run.engine.masters(), *run.ema.averages):
            fill(logical_fragment(parameters[fragment.name], fragment, run.grid), source, names[fragment.name][0])
    run.engine.restored(0)
    logger.info("starting from the weights of %s", path)
    now = run.config.to_dict()
    for section in ("model", "text"):
        for change in differing(section, source.config.get(section, {}), now[section]):
            if not change.startswith("text.tokenizer="):  # a path; the tokenizer itself comes along
                logger.warning("starting with another network than that of %s: %s", path, change)


def names_of_weights(source: CheckpointSource | FolderSource, weights: str) -> dict[str, tuple[str, Spec]]:
    """By parameter name: the tensor of the source to start from, and its shape and dtype.

    The weights that were trained are the float32 masters, where a checkpoint has them.
    """
    if isinstance(source, FolderSource):
        if source.config.get("format") != "megadit":
            raise ValueError(
                f"run.init_from={source.path} is no export of ours; make a run's folder of it first, with "
                "tools/convert_checkpoint.py import"
            )
        if weights == "ema" and source.config.get("weights") != "ema":
            raise ValueError(
                f"run.init_from={source.path} holds the weights {source.config.get('weights')!r}, no averages; use "
                "run.init_weights=model"
            )
        return {name: (name, spec) for name, spec in source.tensors.items()}
    kinds = ("ema",) if weights == "ema" else ("master", "weight")
    kind = next((kind for kind in kinds if source.parameters(kind)), None)
    if kind is None:
        raise ValueError(f"{source.path} holds no averages; use run.init_weights=model")
    return {name: (f"{kind}.{name}", spec) for name, spec in source.parameters(kind).items()}


def check_accounted(path: Path, names: Mapping[str, tuple[str, Spec]], config: RunConfig) -> None:
    """Raises ValueError listing all tensors that the model and the source do not have in common, in name and shape."""
    wanted = {name: tuple(p.shape) for name, p in whole_model(config.model, config.text).named_parameters()}
    faults = [f"{name}: the model has it, run.init_from does not" for name in wanted.keys() - names.keys()]
    faults += [f"{name}: run.init_from has it, the model does not" for name in names.keys() - wanted.keys()]
    for name in wanted.keys() & names.keys():
        shape = tuple(names[name][1].shape)
        if shape != wanted[name]:
            faults.append(f"{name}: shape {shape} in run.init_from, {wanted[name]} in the model")
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise ValueError(
            f"run.init_from={path} does not fit the model; use its model and text sections, or "
            f"tools/convert_checkpoint.py to change it:\n  {listed}"
        )


def fill(tensor: LogicalTensor, source: CheckpointSource | FolderSource, name: str) -> None:
    """Read this rank's pieces from the source's tensor of that name, into their own precision."""
    for piece in tensor.pieces:
        piece.tensor.copy_(source.read(name, piece.offsets, tuple(piece.tensor.shape)))
