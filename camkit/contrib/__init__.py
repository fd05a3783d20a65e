"""Methods without a default or a measured gain; names here may change in any version."""

from camkit.contrib.alignment import (
    DescriptorAlignment as DescriptorAlignment,
    TwoSidedAlignment as TwoSidedAlignment,
)
from camkit.contrib.components import FEMSeed as FEMSeed, KernelPCASeed as KernelPCASeed
from camkit.contrib.craft import ConceptBank as ConceptBank, CRAFTSeed as CRAFTSeed
from camkit.contrib.layers import (
    BestAgreementSeed as BestAgreementSeed,
    BlockSeed as BlockSeed,
    LogitLensSeed as LogitLensSeed,
)
from camkit.contrib.perturbed import (
    AblationCAMSeed as AblationCAMSeed,
    ScoreCAMSeed as ScoreCAMSeed,
)
from camkit.contrib.read_only import (
    ReadOnlyRefiner as ReadOnlyRefiner,
    ReadOnlySeed as ReadOnlySeed,
    with_pairs as with_pairs,
)
