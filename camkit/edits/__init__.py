"""Edits: what changes a forward from the inside."""

from camkit.edits.alignment import HybridAlignment as HybridAlignment
from camkit.edits.calibrate import (
    FuzzyKeyPruning as FuzzyKeyPruning,
    StaticCalibration as StaticCalibration,
    SuppressOutliers as SuppressOutliers,
)
from camkit.edits.controls import (
    KeepToSelf as KeepToSelf,
    MeanInjection as MeanInjection,
    OneMoreHop as OneMoreHop,
    RandomGates as RandomGates,
    ScaleOutput as ScaleOutput,
    SharpenLogits as SharpenLogits,
)
from camkit.edits.doei import (
    DOEI as DOEI,
    ClassDecoupling as ClassDecoupling,
    PatchDecoupling as PatchDecoupling,
)
from camkit.edits.handle import Handle as Handle, attach as attach
from camkit.edits.interaction import VirtualClassTokens as VirtualClassTokens
from camkit.edits.protocol import (
    AnyEdit as AnyEdit,
    Attended as Attended,
    BlockContext as BlockContext,
    Edit as Edit,
    KeyEdit as KeyEdit,
    PairEdit as PairEdit,
    StreamEdit as StreamEdit,
)
from camkit.ops.paired import PairBias as PairBias
