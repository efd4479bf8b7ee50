"""The built-in references: one plain KernelBench-format file per task."""
