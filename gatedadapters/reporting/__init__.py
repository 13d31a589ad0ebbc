"""How results are shown: intervals, tables as text and as HTML, versions. Nothing here knows what the result is of."""
