"""What changes a forward from the inside."""

from camkit.edit.controls import ScaleOutput as ScaleOutput
from camkit.edit.handle import Handle as Handle, attach as attach
from camkit.edit.protocol import Edit as Edit, KeyEdit as KeyEdit
from camkit.edit.site import Site as Site
