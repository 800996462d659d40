"""Data: which samples (`order`), what happens to them (`plan`), where they come from (`source`), who does the work
(`dali`, `loader`). Only the last two import torch and DALI."""
