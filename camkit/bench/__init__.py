"""Seeds and refiners measured on held-out masks."""

from camkit.bench.measure import run as run
from camkit.bench.protocol import (
    PhotoSettings as PhotoSettings,
    Report as Report,
    Row as Row,
    Variant as Variant,
)
from camkit.bench.report import to_json as to_json, to_markdown as to_markdown
from camkit.bench.variants import standard_variants as standard_variants
