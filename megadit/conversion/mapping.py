"""A network of diffusers under our names, and one of ours under theirs: the rules of an `Architecture`, applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.source import FolderSource, Source, Spec
from megadit.checkpoint.stream import Outgoing
from megadit.conversion.diffusers import ARCHITECTURES
from megadit.conversion.rule import Architecture, Rule
from megadit.model.config import ECDiTConfig, TextConfig
from megadit.model.ecdit import whole_model
from megadit.training.config import parse

CLASS_KEY = "_class_name"  # in their config.json


class MappedSource:
    """Tensors of a folder of diffusers, each made of theirs when it is read.

    What a rule makes is kept until another is needed: a tensor that is read in parts is made once.
    """

    def __init__(
        self,
        source: Source,
        rules: Sequence[Rule],
        shapes: Mapping[str, tuple[int, ...]],
        sections: dict[str, dict[str, Any]],
    ) -> None:
        """`shapes`: of our parameters. `sections`: of our configuration, {"model": {...}, "text": {...}}."""
        self.source, self.path, self.sections = source, source.path, sections
        self.rule_of = {name: rule for rule in rules for name in rule.ours}
        self.tensors = {
            name: Spec(shape, widest(source.tensors[theirs].dtype for theirs in self.rule_of[name].theirs))
            for name, shape in shapes.items()
        }
        self._kept: tuple[Rule, dict[str, Tensor]] | None = None

    @staticmethod
    def of(source: FolderSource, drop: Sequence[str] = ()) -> MappedSource:
        """`drop`: names of tensors to leave behind.

        Raises ValueError for a class that is not known, settings that ours cannot have, and, listing them all, for
        tensors that have no place, places that no tensor fills, and names to drop that are not there.
        """
        known = source.config.get(CLASS_KEY)
        if not isinstance(known, str) or known not in ARCHITECTURES:
            what = f"is a {known}" if known else f"says neither format=megadit nor {CLASS_KEY}"
            raise ValueError(f"{source.path / 'config.json'} {what}; known classes: {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[known]
        try:
            sections = architecture.sections(source.config)
        except ValueError as error:
            raise ValueError(f"{source.path / 'config.json'}: {error}") from error
        config = parse(sections, str(source.path))
        shapes, rules = accounted(architecture, config.model, config.text)
        theirs = their_shapes(rules, shapes)
        found = {name: spec.shape for name, spec in source.tensors.items() if name not in drop}
        faults = [f"{name}: to be dropped, but not there" for name in drop if name not in source.tensors]
        faults += [f"{name}: missing, of shape {theirs[name]}" for name in sorted(theirs.keys() - found.keys())]
        faults += [f"{name}: has no place in a {known}" for name in sorted(found.keys() - theirs.keys())]
        faults += [
            f"{name}: shape {found[name]}, not {theirs[name]}"
            for name in sorted(found.keys() & theirs.keys())
            if found[name] != theirs[name]
        ]
        if faults:
            what = (
                f"{source.path} is not the {known} of its config.json (--drop NAME leaves a tensor of theirs behind):"
            )
            raise ValueError("\n  ".join([what, *faults]))
        return MappedSource(source, rules, shapes, sections)

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        rule = self.rule_of[name]
        if self._kept is None or self._kept[0] is not rule:
            self._kept = None  # before the next ones are read
            theirs = [self.source.read(each).to(self.tensors[name].dtype) for each in rule.theirs]
            self._kept = rule, dict(zip(rule.ours, rule.to_ours(theirs), strict=True))
        out = self._kept[1][name]
        offsets = (0,) * out.ndim if offsets is None else offsets
        sizes = [size - offset for size, offset in zip(out.shape, offsets, strict=True)] if sizes is None else sizes
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            out = out.narrow(dim, offset, size)
        return out.contiguous()


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one that holds the elements of all exactly."""
    return reduce(torch.promote_types, dtypes)


def accounted(
    architecture: Architecture, model: ECDiTConfig, text: TextConfig
) -> tuple[dict[str, tuple[int, ...]], list[Rule]]:
    """(shapes of our parameters, the rules), each of them in exactly one rule; anything else is our mistake."""
    shapes = {name: tuple(p.shape) for name, p in whole_model(model, text).named_parameters()}
    rules = architecture.rules(model, text)
    ours = Counter(name for rule in rules for name in rule.ours)
    theirs = Counter(name for rule in rules for name in rule.theirs)
    assert ours == Counter(shapes.keys()), (
        f"rules and network differ: {ours - Counter(shapes)} {Counter(shapes) - ours}"
    )
    assert max(theirs.values()) == 1, theirs.most_common(1)
    return shapes, rules


def their_shapes(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What each of theirs must be, given ours."""
    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        ours = [torch.empty(shapes[name], device="meta") for name in rule.ours]
        found |= {name: tuple(t.shape) for name, t in zip(rule.theirs, rule.to_theirs(ours), strict=True)}
    return found


def fitting_architecture(model: ECDiTConfig, text: TextConfig, path: Path) -> tuple[Architecture, dict[str, Any]]:
    """The class of diffusers that this network can be, and its config.json. Raises ValueError saying why none can."""
    reasons = []
    for name, architecture in ARCHITECTURES.items():
        try:
            return architecture, {CLASS_KEY: name, **architecture.their_config(model, text)}
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("\n  ".join([f"{path} is no network of diffusers:", *dict.fromkeys(reasons)]))


def theirs_outgoing(
    read: Mapping[str, Outgoing], architecture: Architecture, model: ECDiTConfig, text: TextConfig
) -> list[Outgoing]:
    """Their tensors, as ones to write, each made of ours when it is needed."""
    shapes, rules = accounted(architecture, model, text)
    theirs = their_shapes(rules, shapes)

    def tensor(rule: Rule, index: int) -> Outgoing:
        dtype = widest(read[name].dtype for name in rule.ours)

        def parts() -> Iterator[Tensor]:
            ours = [whole(read[name]).to(dtype) for name in rule.ours]
            yield rule.to_theirs(ours)[index].contiguous()

        return Outgoing(rule.theirs[index], theirs[rule.theirs[index]], dtype, parts)

    return [tensor(rule, index) for rule in rules for index in range(len(rule.theirs))]


def whole(tensor: Outgoing) -> Tensor:
    """All of a tensor at once."""
    if not tensor.shape:
        (only,) = tensor.parts()
        return only
    out, row = torch.empty(tensor.shape, dtype=tensor.dtype), 0
    for part in tensor.parts():
        out[row : row + len(part)] = part
        row += len(part)
    return out
