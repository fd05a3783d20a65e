"""The page of `camkit app`: maps, stages and attention of a photo, answered from one forward."""

from camkit.app.explorer import Choice as Choice, Step as Step, View as View
from camkit.app.page import build as build, launch as launch
