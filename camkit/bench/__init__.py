"""Measure methods on held-out masks: `run` returns a `Report` of `Variant`s."""

from camkit.bench.examples import Example as Example, collect_examples as collect_examples
from camkit.bench.markup import to_markdown as to_markdown
from camkit.bench.measure import run as run
from camkit.bench.oracles import (
    ErrorAnalysis as ErrorAnalysis,
    ErrorShares as ErrorShares,
    Oracle as Oracle,
)
from camkit.bench.page import to_html as to_html
from camkit.bench.protocol import (
    Choice as Choice,
    Entry as Entry,
    Repeats as Repeats,
    Variant as Variant,
    fitted_variant as fitted_variant,
    stages as stages,
    standard_variants as standard_variants,
)
from camkit.bench.quality import (
    MeanQuality as MeanQuality,
    Quality as Quality,
    QualityScores as QualityScores,
)
from camkit.bench.results import (
    Comparison as Comparison,
    Report as Report,
    Row as Row,
    to_json as to_json,
)
from camkit.photo import PhotoSettings as PhotoSettings
