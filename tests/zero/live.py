"""What an engine holds and sends while it runs: bytes as they are alive, collectives as torch dispatches them."""

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megadit.parallel.grid import AXES, UNIONS

# c10d's name -> ours, and the tensor whose bytes count.
COLLECTIVES = {
    "allreduce_": ("all-reduce", lambda args: args[0][0]),
    "reduce_": ("reduce", lambda args: args[0][0]),
    "_allgather_base_": ("all-gather", lambda args: args[0]),
}


def storages(tensors):
    """{its address: the storage} of tensors that may share some."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def storage_bytes(tensors):
    """Bytes of memory that these tensors keep."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


class Live(TorchDispatchMode):
    """Within the context: `most` bytes alive at once, of the tensors that it was told of and of all made; `calls`.

    Scalars do not count, nor what is made of scalars alone, such as a vector with a number for each parameter; nor what
    lies in the memory of the tensors `apart`. joined: bytes that `torch.cat` has made.
    """

    def __init__(self, grid, apart):
        super().__init__()
        self.axes = {grid[name].handle.group_name: name for name in (*AXES, *UNIONS)}
        self.apart = storages(apart)
        self.alive, self.most, self.calls, self.joined = {}, 0, [], 0
        self.of_scalars = {}  # like `alive`

    def watch(self, tensors):
        made = {
            key: (StorageWeakRef(storage), storage.nbytes())
            for key, storage in storages(tensors).items()
            if key not in self.apart and (key not in self.alive or self.alive[key][0].expired())
        }
        if made:
            self.alive |= made
            self.most = max(self.most, self.total())

    def total(self):
        """Bytes that are alive now."""
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        return sum(nbytes for _, nbytes in self.alive.values())

    def take(self):
        """(most bytes, calls) since this was asked last."""
        taken = self.most, self.calls
        self.most, self.calls = self.total(), []
        return taken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count(func, args)
            return self.communicate(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.joined += out.nbytes
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor) and tensor.dim()]
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        if given and all(tensor.dim() == 0 or self.is_of_scalars(tensor) for tensor in given):
            self.of_scalars |= {key: StorageWeakRef(storage) for key, storage in storages(made).items()}
        else:
            self.watch(made)
        return out

    def is_of_scalars(self, tensor):
        reference = self.of_scalars.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    @staticmethod
    def communicate(func, args, kwargs):
        """With copies: gloo's threads let go of what they were given a moment after a collective has returned."""
        given = tree_map_only(torch.Tensor, torch.clone, args)
        out = func(*given, **kwargs)
        dist.Work.unbox(out[-1] if isinstance(out, tuple) else out).wait()
        for tensor, copy in zip(tree_leaves(args), tree_leaves(given), strict=True):
            if isinstance(tensor, torch.Tensor):
                tensor.detach().copy_(copy)
        return out

    def count(self, func, args):
        operation, whole = COLLECTIVES[func.overloadpacket.__name__]
        (group,) = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        axis = self.axes[dist.ProcessGroup.unbox(group).group_name]
        self.calls.append((axis, operation, whole(args).nbytes))
