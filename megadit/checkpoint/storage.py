"""How torch.distributed.checkpoint (DCP) sees our tensors and our files.

DCP plans the resharding and carries errors to all ranks. The storage is ours, because DCP's own reader unpickles its
metadata, and its safetensors writer names a shard after its tensor, so that a rank could save only one box of each.
Each rank streams its boxes into one safetensors file, which any tool can open; the table of boxes is JSON, in the
manifest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadit.checkpoint import folder as disk
from megadit.runtime.tensor_file import CODES, DTYPES, HashedTensorFileWriter, Spec


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor that this rank holds.

    `tensor` has the box's shape and is a view on live storage, contiguous or not: loading writes through it.
    """

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class LogicalTensor:
    """A whole, named tensor as one rank sees it: its global shape and dtype, and the pieces that are here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class Shards(torch.Tensor):
    """A logical tensor as DCP wants it: of the global size, without storage, with this rank's pieces as its shards."""

    pieces: tuple[Piece, ...]

    @staticmethod
    def of(name: str, logical: LogicalTensor) -> Shards:
        """Raises ValueError, naming the tensor, for a piece that does not fit into it."""
        if logical.dtype not in CODES:
            raise ValueError(f"{name}: a checkpoint cannot hold {logical.dtype}")
        for piece in logical.pieces:
            box = f"{name}: a piece at {tuple(piece.offsets)} of sizes {tuple(piece.tensor.shape)}"
            if piece.tensor.dtype != logical.dtype:
                raise ValueError(f"{box} is {piece.tensor.dtype}, the tensor {logical.dtype}")
            if not len(piece.offsets) == piece.tensor.ndim == len(logical.shape) or any(
                offset < 0 or offset + size > whole
                for offset, size, whole in zip(piece.offsets, piece.tensor.shape, logical.shape, strict=True)
            ):
                raise ValueError(f"{box} is outside the tensor's shape {tuple(logical.shape)}")
        shards = torch.empty((), dtype=logical.dtype).expand(logical.shape).as_subclass(Shards)
        shards.pieces = tuple(piece for piece in logical.pieces if piece.tensor.numel())
        return shards

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape) for piece in self.pieces]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        # In a load the hint is a position in `pieces`, and pieces may share their offsets (replicas); in a save it
        # counts over all ranks, and offsets are unique.
        hint = index.index
        if hint is not None and hint < len(self.pieces) and tuple(self.pieces[hint].offsets) == index.offset:
            return self.pieces[hint].tensor
        return next(piece.tensor for piece in self.pieces if tuple(piece.offsets) == index.offset)


class TilingSavePlanner(DefaultSavePlanner):
    """Plans a save of `tensors` and refuses, on all ranks, those that the ranks' pieces do not tile exactly."""

    def __init__(self, tensors: Mapping[str, LogicalTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def create_local_plan(self) -> SavePlan:
        self.state_dict = {name: Shards.of(name, tensor) for name, tensor in self.tensors.items()}
        # The table travels with the plan: a tensor of which no rank has a piece is in no write item.
        table = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        return replace(super().create_local_plan(), planner_data=table)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for plan in all_plans:
            for name, entry in plan.planner_data.items():
                if table.setdefault(name, entry) != entry:
                    raise ValueError(f"{name}: the ranks disagree on its shape or dtype: {table[name]} and {entry}")
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in table}
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            chunks[item.index.fqn].append(item.tensor_data.chunk)
        for name, (shape, _) in table.items():
            covered, whole = sum(math.prod(chunk.sizes) for chunk in chunks[name]), math.prod(shape)
            # DCP silently drops the second of two pieces at one place.
            if covered != whole or len({chunk.offsets for chunk in chunks[name]}) != len(chunks[name]):
                raise ValueError(
                    f"{name}: the pieces of all ranks have {covered} elements, in {len(chunks[name])} pieces, of the "
                    f"tensor's {whole}; each element must be saved by exactly one rank"
                )
        plans, metadata = super().create_global_plan(all_plans)  # raises for pieces that overlap
        for name, (shape, dtype) in table.items():  # tensors without elements
            whole_tensor = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            metadata.state_dict_metadata.setdefault(name, whole_tensor)
        return [replace(plan, planner_data=None) for plan in plans], metadata


class StrictLoadPlanner(DefaultLoadPlanner):
    """Plans a load into `tensors` and refuses, before anything is read, those that the checkpoint does not match."""

    def __init__(self, tensors: Mapping[str, LogicalTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name, tensor in self.tensors.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{name}: it is not in the checkpoint")
            if saved.size != torch.Size(tensor.shape):
                raise ValueError(f"{name}: shape {tuple(saved.size)} in the checkpoint, {tuple(tensor.shape)} here")
            if saved.properties.dtype != tensor.dtype:
                raise ValueError(f"{name}: {saved.properties.dtype} in the checkpoint, {tensor.dtype} here")
        self.state_dict = {name: Shards.of(name, tensor) for name, tensor in self.tensors.items()}
        return super().create_local_plan()


class Writer(StorageWriter):
    """Writes one safetensors file per rank; rank 0 then writes the manifest and makes the checkpoint the latest."""

    def __init__(
        self, folder: Path, step: int, metadata: Mapping[str, object], keep: int = 0, keep_every: int = 0
    ) -> None:
        self.folder, self.step, self.metadata = folder, step, metadata
        self.keep, self.keep_every = keep, keep_every

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        try:
            json.dumps(self.metadata)
        except TypeError as error:  # now, not after terabytes have been written
            raise ValueError(f"a checkpoint's metadata must be JSON: {error}") from error
        disk.begin(self.folder, self.step)
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        if not plan.items:
            future.set_result([])
            return future
        items = {_key(item.index): item for item in plan.items}
        specs = {key: _spec(_tensor_data(item)) for key, item in items.items()}
        path = disk.partial_path(self.folder, self.step) / plan.storage_data
        with HashedTensorFileWriter(path, specs) as file:
            for key in file.order:  # one at a time: a rank never holds a second copy of its state
                tensor = planner.resolve_data(items[key])
                assert isinstance(tensor, torch.Tensor)
                file.write(tensor)
        saved = disk.SavedFile(path.name, file.size, file.digest.hexdigest())
        results = [WriteResult(item.index, specs[key].num_bytes, saved) for key, item in items.items()]
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, dict] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"shape": list(entry.size), "dtype": dtype, "boxes": []}
        files: dict[str, disk.SavedFile] = {}
        for result in (result for of_rank in results for result in of_rank):
            files[result.storage_data.name] = result.storage_data
            chunk = metadata.state_dict_metadata[result.index.fqn].chunks[result.index.index]  # type: ignore[union-attr,index]
            box = [list(chunk.offsets), list(chunk.sizes), result.storage_data.name]
            tensors[result.index.fqn]["boxes"].append(box)
        manifest = {
            "format": disk.FORMAT,
            "step": self.step,
            "metadata": self.metadata,
            "files": [asdict(file) for file in files.values()],
            "tensors": tensors,
        }
        disk.commit(self.folder, self.step, manifest, self.keep, self.keep_every)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Reader(StorageReader):
    """Checks the files of a checkpoint, each on one rank, and reads the parts of their boxes that are asked for."""

    def __init__(self, path: Path, verify: bool = False, rank: int = 0, num_ranks: int = 1) -> None:
        self.path, self.verify, self.rank, self.num_ranks = path, verify, rank, num_ranks
        self.file_of: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        # Filled in by the next call: what is raised here, DCP turns into a warning and an assertion.
        return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        manifest = disk.read_manifest(self.path)
        for entry in manifest["files"][self.rank :: self.num_ranks]:
            disk.check_file(self.path / entry["name"], entry["size"], entry["sha256"] if self.verify else None)
        for name, entry in manifest["tensors"].items():
            chunks = []
            for offsets, sizes, file in entry["boxes"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self.file_of[MetadataIndex(name, offsets)] = file
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.file_of[item.storage_index], []).append(item)
        for name, items in per_file.items():
            try:
                with safe_open(self.path / name, framework="pt") as file:  # maps the file: reads what the slices touch
                    for item in items:
                        target = planner.resolve_tensor(item).detach()
                        key = _key(item.storage_index)
                        ranges = _slices(item.storage_offsets, item.lengths)
                        target.copy_(file.get_slice(key)[ranges] if ranges else file.get_tensor(key))
                        planner.commit_tensor(item, target)
            except SafetensorError as error:
                raise ValueError(f"{self.path / name}: damaged ({error})") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _tensor_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _spec(data: TensorWriteData) -> Spec:
    return Spec(tuple(data.chunk.sizes), data.properties.dtype)


def _key(index: MetadataIndex) -> str:
    """The name of a box inside its file: the tensor's name and the box's offsets, "head.weight@128,0"."""
    assert index.offset is not None
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
