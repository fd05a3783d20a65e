"""What changes a forward from the inside."""

from camkit.edit.alignment import HybridAlignment as HybridAlignment
from camkit.edit.calibrate import StaticCalibration as StaticCalibration
from camkit.edit.controls import (
    OneMoreHop as OneMoreHop,
    RandomGates as RandomGates,
    ScaleOutput as ScaleOutput,
)
from camkit.edit.decoupling import (
    ClassDecoupling as ClassDecoupling,
    PatchDecoupling as PatchDecoupling,
)
from camkit.edit.doei import DOEI as DOEI
from camkit.edit.fuzzy import FuzzyKeyPruning as FuzzyKeyPruning
from camkit.edit.handle import Handle as Handle, attach as attach
from camkit.edit.outliers import SuppressOutliers as SuppressOutliers
from camkit.edit.protocol import Edit as Edit, KeyEdit as KeyEdit
from camkit.edit.site import Site as Site
from camkit.edit.stream import Attended as Attended, StreamEdit as StreamEdit
from camkit.edit.virtual import VirtualClassTokens as VirtualClassTokens
