"""What came out of an experiment: the HTML page, tables of metrics, side-by-side videos."""
