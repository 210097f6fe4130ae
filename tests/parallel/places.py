"""Places in a layout for tests that communicate nothing."""

import itertools
import math

from megadit.parallel.grid import Grid, Group, Layout


class Place(Grid):
    """One rank's grid without process groups: ranks and sizes are right, a collective would fail."""

    def _create(self, name, axes):
        members = self.layout.members(axes, self.rank)
        return Group(None, len(members), members.index(self.rank))


def layouts_of(world_size):
    """Every layout of so many ranks."""
    degrees = [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
    return [Layout(*sizes) for sizes in itertools.product(degrees, repeat=4) if math.prod(sizes) == world_size]


def coordinates(layout, rank):
    """(pp, edp, ep, tp) of a rank, by arithmetic alone: tp is fastest, then ep, edp, pp."""
    rest, tp = divmod(rank, layout.tp)
    rest, ep = divmod(rest, layout.ep)
    pp, edp = divmod(rest, layout.edp)
    return pp, edp, ep, tp


def name_of(layout):
    """A layout's name as a test's id."""
    return "pp{}-edp{}-ep{}-tp{}".format(*layout.sizes)
