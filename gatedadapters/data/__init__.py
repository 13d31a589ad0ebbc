"""Users' tables, bundled real tasks and models, and batches that mix tasks."""
