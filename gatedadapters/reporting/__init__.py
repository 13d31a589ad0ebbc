"""How results are shown: intervals, tables and pages as text, Markdown and HTML. It knows nothing of any result."""
