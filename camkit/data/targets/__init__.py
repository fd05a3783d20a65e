"""The targets of `camkit.data.export`: what each format holds, and how its files are written."""
