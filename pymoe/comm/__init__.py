"""Communication between ranks: control, transports, placement.  The only importer of mpi4py."""

from pymoe.comm.group import Group
from pymoe.comm.placement import Placement
from pymoe.comm.ranks import Ranks, agree, connecting, place
from pymoe.comm.runner import abort_on_error

__all__ = ["Group", "Placement", "Ranks", "abort_on_error", "agree", "connecting", "place"]
