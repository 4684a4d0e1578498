"""The reports about a model: explain, profile, drawing, and all of them on one page.

Each report is a package. They share `mfx.reports.markup`, text as HTML and SVG, `mfx.reports.table`, a table of text
for a terminal, a notebook or a page, and `mfx.reports.training_state`, what parameters take. The package imports
nothing above ``mfx.api``.
"""
