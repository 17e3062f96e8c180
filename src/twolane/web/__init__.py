"""Files for browsers, as they are: the dashboard's page, and the charts library that it shares with the reports.

`vendor/uplot` is uPlot 1.6.32 from npm, unchanged, under its own licence (MIT).
"""
