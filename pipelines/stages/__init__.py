"""One file a stage: load, kernel, save, count."""
