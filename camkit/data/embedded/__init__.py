"""What comes with camkit, so that it shows its work without a download: photographs and a model."""

from camkit.data.embedded.model import demo_model
from camkit.data.embedded.photos import DEMO_CLASSES, DemoPhotos, demo_photos

__all__ = ["DEMO_CLASSES", "DemoPhotos", "demo_model", "demo_photos"]
