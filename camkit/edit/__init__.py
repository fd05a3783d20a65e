"""What changes a forward from the inside."""

from camkit.edit.controls import ScaleOutput as ScaleOutput
from camkit.edit.protocol import (
    Edit as Edit,
    Handle as Handle,
    KeyEdit as KeyEdit,
    attach as attach,
)
