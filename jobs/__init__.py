"""Programs that run on the cluster: `python -m jobs.train`, `python -m jobs.sweep`. Each calls `dabnn` and reports."""
