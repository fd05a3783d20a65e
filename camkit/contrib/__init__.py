"""Methods without a default or a measured gain; names here may change in any version."""

from camkit.contrib.craft import ConceptBank as ConceptBank, CRAFTSeed as CRAFTSeed
