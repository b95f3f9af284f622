"""Configuration, clusters, submission, tracking and reports: everything around a run except the run itself."""
